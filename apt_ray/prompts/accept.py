"""False alarms that a person called good join the memory: hard normals belong in the template, as
in HETMM (arXiv 2303.16191).

Distances to a memory that has grown are never larger, so neither is any score: a certified
false-alarm rate still holds, and what may suffer is the detection of defects. So only the places
of an image join that look unlike the memory, few of them, and an estimated threshold follows: it
falls by as much as the scores of the support images, left out one at a time, do.

B images, M_l places of reference layer l, K places in memory, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from PIL import Image

from apt_ray.detection.calibration import Threshold
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.detection.reference import ReferenceMemory, coreset
from apt_ray.detection.rule import Scales
from apt_ray.errors import PromptSetError
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.images import decode_image
from apt_ray.prompts.remember import show

MOST_PER_IMAGE = 0.05
"""Places of one image that join, as a share of the memory's own size."""

MOST_GROWTH = 0.5
"""Places that all accepted images together add at most, as a share of the memory's own size."""

_UNUSUAL = 2.0
"""Standard deviations beyond what is usual from which on a place joins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Acceptance:
    """What accepting images did.

    Attributes:
        prompt_set: the new one.
        added: places that joined the memory, of all layers.
        before, after: anomaly scores of the images.
        blocked: of each image the places, among the defects, of those that would pass if it joined;
            empty of one that did.
        defects: anomaly scores of the confirmed defects, before and after.
    """

    prompt_set: PromptSet
    added: int
    before: tuple[float, ...]
    after: tuple[float, ...]
    blocked: tuple[tuple[int, ...], ...]
    defects: tuple[tuple[float, float], ...]

    @property
    def passes(self) -> bool:
        """Whether none of the images is rejected any more."""
        return not any(map(self.prompt_set.threshold.rejects, self.after))

    @property
    def joined(self) -> tuple[int, ...]:
        """The places of the images that joined."""
        return tuple(place for place, defects in enumerate(self.blocked) if not defects)


@torch.inference_mode()
def accept(
    prompt_set: PromptSet,
    images: Sequence[Image.Image],
    backbone: Backbone,
    *,
    defects: Sequence[Image.Image] = (),
    decided: Threshold | None = None,
    force: bool = False,
) -> Acceptance:
    """Let images that were rejected wrongly join the memory, one after another.

    Args:
        prompt_set: whose memory it is; it stays as it is.
        images: RGB, of good parts.
        backbone: the prompt set's own.
        defects: RGB, of confirmed defects: an image with which one of them that is rejected would
            pass does not join.
        decided: what verdicts are taken by, if not by the prompt set's own threshold.
        force: let it join even so.

    Raises:
        PromptSetError: the memory has taken as many as it may, or the backbone is another.
    """
    encoded = [
        backbone.encode_in_batches(backbone.preprocess(some)) if some else None
        for some in (images, defects)
    ]
    return accept_features(
        prompt_set, encoded[0], backbone, defects=encoded[1], decided=decided, force=force
    )


@torch.inference_mode()
def accept_features(
    prompt_set: PromptSet,
    images: ImageFeatures | None,
    backbone: Backbone,
    *,
    defects: ImageFeatures | None = None,
    decided: Threshold | None = None,
    force: bool = False,
    left_out: LeftOut | None = None,
) -> Acceptance:
    """`accept` of images that are encoded; None where there are none.

    Args:
        left_out: of the prompt set, where the caller has it.
    """
    left_out = left_out or LeftOut.of(prompt_set, backbone)

    def scores(memory: ReferenceMemory, features: ImageFeatures | None) -> list[float]:
        return [] if features is None else _scores(backbone, prompt_set, memory, features)

    memory, threshold = prompt_set.memory, prompt_set.threshold
    before, defects_before = scores(memory, images), scores(memory, defects)
    rejects = (decided or threshold).rejects
    watched = [place for place, score in enumerate(defects_before) if rejects(score)]
    blocked: list[tuple[int, ...]] = []
    for number in range(len(before)):
        assert images is not None
        image = images[number : number + 1].to(torch.device("cpu"))
        larger, without = _with(prompt_set, memory, image), left_out.joined_by(image)
        lower, now = without.threshold, scores(larger, defects)
        rejects = (decided or lower).rejects
        passing = tuple(place for place in watched if not rejects(now[place]))
        blocked.append(() if force else passing)
        if not passing or force:
            memory, threshold, left_out = larger, lower, without
    extended = replace(prompt_set, memory=memory)
    provenance = prompt_set.provenance.model_copy(
        update={
            "accepted": prompt_set.provenance.accepted + blocked.count(()),
            "probe_score": Detector(backbone, extended).probe_score(),
            "threshold": threshold,
        }
    )
    return Acceptance(
        prompt_set=replace(extended, provenance=provenance),
        added=_places(memory) - _places(prompt_set.memory),
        before=tuple(before),
        after=tuple(scores(memory, images)),
        blocked=tuple(blocked),
        defects=tuple(zip(defects_before, scores(memory, defects), strict=True)),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LeftOut:
    """The support images of a prompt set, from its small copies, each in front of the memory that
    would be without it.

    Attributes:
        prompt_set, backbone: the two.
        support: their features; None where the threshold is none that follows them.
        memories: of each, the memory without it; it takes in what the prompt set's does.
        scores: of each in front of the memory that it was in front of first.
    """

    prompt_set: PromptSet
    backbone: Backbone
    support: ImageFeatures | None = None
    memories: tuple[ReferenceMemory, ...] = ()
    scores: tuple[float, ...] = ()

    @classmethod
    @torch.inference_mode()
    def of(cls, prompt_set: PromptSet, backbone: Backbone) -> LeftOut:
        """Those of a prompt set; none where its threshold is certified, or holds no copies."""
        threshold, thumbnails = prompt_set.threshold, prompt_set.thumbnails
        is_estimated = threshold.source == "left-out support images"
        if not is_estimated or len(thumbnails) != len(threshold.scores):
            return cls(prompt_set=prompt_set, backbone=backbone)
        pixels_S3HW = backbone.preprocess([decode_image(data) for data in thumbnails])
        support = backbone.encode_in_batches(pixels_S3HW)
        shown = show(support, pixels_S3HW, backbone, prompt_set.settings)
        # What joined before stands behind the places of support images.
        earlier = {
            layer: prompt_set.memory.layers[layer][
                min(shown.size, sum(part.layers[layer].shape[:2].numel() for part in shown.parts)) :
            ]
            for layer in support.layers
        }
        memories = [shown.memory(without=place) for place in range(len(support))]
        found = cls(
            prompt_set=prompt_set,
            backbone=backbone,
            support=support,
            memories=tuple(
                ReferenceMemory(
                    {
                        layer: torch.cat([tokens.cpu(), earlier[layer].cpu()])
                        for layer, tokens in memory.layers.items()
                    }
                )
                for memory in memories
            ),
        )
        return replace(found, scores=found._now())

    @torch.inference_mode()
    def joined_by(self, image: ImageFeatures) -> LeftOut:
        """The same once an image has joined, its features on the CPU."""
        memories = tuple(_with(self.prompt_set, memory, image) for memory in self.memories)
        return replace(self, memories=memories)

    @property
    def threshold(self) -> Threshold:
        """The prompt set's, as much lower as their scores are."""
        threshold = self.prompt_set.threshold
        if self.support is None:
            return threshold
        scores = tuple(
            score - (old - new)
            for score, old, new in zip(threshold.scores, self.scores, self._now(), strict=True)
        )
        value = threshold.value - (median(threshold.scores) - median(scores))
        return threshold.model_copy(update={"value": value, "scores": scores})

    def _now(self) -> tuple[float, ...]:
        """The score of each in front of its memory."""
        found: list[float] = []
        for place, memory in enumerate(self.memories):
            assert self.support is not None
            image = self.support[place : place + 1]
            found += _scores(self.backbone, self.prompt_set, memory, image)
        return tuple(found)


def _with(prompt_set: PromptSet, memory: ReferenceMemory, image: ImageFeatures) -> ReferenceMemory:
    """A memory of the prompt set's once an image has joined; raises as `grown`."""
    size = prompt_set.settings.reference_size
    return grown(memory, image, prompt_set.provenance.scales, size=size)


def _scores(
    backbone: Backbone, prompt_set: PromptSet, memory: ReferenceMemory, features: ImageFeatures
) -> list[float]:
    scored = Detector(backbone, replace(prompt_set, memory=memory)).score(features)[1]
    return [float(score) for score in scored]


def grown(
    memory: ReferenceMemory, features: ImageFeatures, scales: Scales, *, size: int
) -> ReferenceMemory:
    """The memory with the places of one image that are unlike it.

    Args:
        features: of the one image, on the CPU.
        scales: what the distances of each layer are measured in.
        size: places that a layer of the memory was made with at most.

    Raises:
        PromptSetError: it has taken as many as it may.
    """
    layers: dict[int, torch.Tensor] = {}
    for layer, distances_1M in memory.distances(features).items():
        known_KD = memory.layers[layer]
        room = int((1 + MOST_GROWTH) * size) - len(known_KD)
        if room <= 0:
            raise PromptSetError(
                f"the memory has grown by {MOST_GROWTH:.0%} already: fit the category again, with"
                " the accepted images among its support images"
            )
        scale = scales.layers[layer]
        unusual_M = (distances_1M[0] - scale.mean) / scale.sd > _UNUSUAL
        tokens_XD = features.layers[layer][0][unusual_M]
        most = min(room, max(1, int(MOST_PER_IMAGE * size)))
        chosen = coreset(tokens_XD, most) if len(tokens_XD) else torch.arange(0)
        layers[layer] = torch.cat([known_KD, tokens_XD[chosen].half()])
    return ReferenceMemory(layers)


def _places(memory: ReferenceMemory) -> int:
    return sum(map(len, memory.layers.values()))
