"""Detector: images in, anomaly maps, scores and verdicts out.

B images, N patch tokens, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from scipy import sparse
from scipy.sparse import csgraph

from apt_ray.detection.calibration import Threshold
from apt_ray.detection.kinds import look
from apt_ray.detection.prompt_set import PromptSet
from apt_ray.detection.rule import ScoreRule, resize_map
from apt_ray.errors import PromptSetError
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.images import cover
from apt_ray.levels import Reading

MAX_REGIONS = 20
"""The most regions that one inspection reports, worst first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Region:
    """A connected area above the threshold, as a box in pixels of the image sent.

    Attributes:
        x, y: left and top edge.
        width, height: of the box.
        peak: highest value of the anomaly map inside, 0..1.
        area: pixels above the threshold.
    """

    x: int
    y: int
    width: int
    height: int
    peak: float
    area: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Inspection:
    """What the detector says of one image.

    Attributes:
        anomaly_map: `(H, W)` float32 in 0..1, higher is worse; at the size of the image, unless
            another was asked for.
        anomaly_score: root mean square of the highest 0.5 % of the map, 0..1.
        threshold: the score above which the image is anomalous.
        is_anomalous: whether it is.
        p_value: share of normal images that would score as high, None without calibration images.
        regions: what lies above the threshold, worst first; empty if the image is not anomalous.
        kinds: kind of defect -> probability that it is the one that the most anomalous part shows;
            empty if the image is not anomalous, and where no defects were confirmed.
    """

    anomaly_map: npt.NDArray[np.float32]
    anomaly_score: float
    threshold: float
    is_anomalous: bool
    p_value: float | None
    regions: tuple[Region, ...]
    kinds: Mapping[str, float] = field(default_factory=dict)


class Detector:
    """A backbone and a prompt set that belong together, ready to inspect images.

    Args:
        backbone, prompt_set: the two.
        region_of_interest: `(H, W)` bool of any size, stretched over every image; where it is
            False nothing counts, and what is True in part is True.

    Raises:
        PromptSetError: They do not belong together, or the score looks at the whole image
            (`cls_weight`), which no region of interest can be cut out of, or the region is so
            small that no image could be anomalous.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt_set: PromptSet,
        *,
        region_of_interest: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        if prompt_set.fingerprint != backbone.fingerprint:
            raise PromptSetError(
                f"the prompt set of {prompt_set.category} was fitted to another backbone"
                f" ({prompt_set.backbone.name}, fingerprint {prompt_set.fingerprint}) than the one"
                f" loaded ({backbone.spec.name}, {backbone.fingerprint}): load the backbone that it"
                f" names, or fit it again"
            )
        if region_of_interest is not None and prompt_set.settings.cls_weight > 0:
            raise PromptSetError(
                f"the prompt set of {prompt_set.category} scores the whole image (cls_weight"
                f" {prompt_set.settings.cls_weight:g}): fit it with cls_weight 0, or use no region"
                f" of interest"
            )
        self.backbone = backbone
        self.prompt_set = prompt_set
        self._interest_SS = (
            None
            if region_of_interest is None
            else torch.from_numpy(
                cover(region_of_interest, (backbone.prompt_size,) * 2).astype(np.float32)
            ).to(backbone.device)
        )
        self._text_PE = prompt_set.text_features.to(backbone.device)
        self._memory = prompt_set.memory.to(backbone.device)
        self._kinds = prompt_set.kinds and prompt_set.kinds.to(backbone.device)
        self._rule = ScoreRule.of(backbone, prompt_set.settings)
        if self._interest_SS is not None:
            highest = self._rule.highest_score(self._interest_SS)
            if highest < 1 and not prompt_set.threshold.rejects(highest):
                raise PromptSetError(
                    f"the region of interest of {prompt_set.category} is"
                    f" {float(self._interest_SS.mean()):.2g} of an image: no part could score above"
                    f" {highest:.2g} there, and so none above the threshold of"
                    f" {prompt_set.threshold.value:.2g}; make the region larger"
                )

    @property
    def category(self) -> str:
        return self.prompt_set.category

    @property
    def reading(self) -> Reading:
        """How image files are to be read for it."""
        return self.prompt_set.reading

    @property
    def counted_share(self) -> float:
        """What the region of interest leaves of an image, 0..1."""
        return 1.0 if self._interest_SS is None else float(self._interest_SS.mean())

    def inspect(self, images: Sequence[Image.Image]) -> list[Inspection]:
        """Inspect RGB images of any size in one batch, one forward pass of the backbone."""
        features = self.backbone.encode_images(self.backbone.preprocess(images))
        maps_BHW, scores_B = self.score(features)
        scores = scores_B.tolist()
        kinds = self.name_kinds(features, maps_BHW, scores)
        return [
            replace(self.conclude(map_HW, score, image.size), kinds=kind)
            for image, map_HW, score, kind in zip(
                images, maps_BHW.cpu(), scores, kinds, strict=True
            )
        ]

    def conclude(
        self,
        map_SS: torch.Tensor,
        score: float,
        size: tuple[int, int],
        *,
        map_size: tuple[int, int] | None = None,
    ) -> Inspection:
        """What a map and a score of `score`, on the CPU, mean for an image of (width, height).

        The anomaly map may be wanted at another size; regions are in pixels of the image.
        """
        return conclude(self.prompt_set.threshold, map_SS, score, size, map_size=map_size)

    def name_kinds(
        self, features: ImageFeatures, maps_BSS: torch.Tensor, scores: Sequence[float]
    ) -> list[dict[str, float]]:
        """The kinds of `Inspection`, of encoded images with the maps and scores of `score`."""
        rejected = [
            place
            for place, score in enumerate(scores)
            if self._kinds and self.prompt_set.threshold.rejects(score)
        ]
        named: list[dict[str, float]] = [{} for _ in scores]
        if self._kinds and rejected:
            looks_RD = look(features[rejected], maps_BSS[rejected])
            for place, kinds in zip(rejected, self._kinds.probabilities(looks_RD), strict=True):
                named[place] = kinds
        return named

    def probe_score(self) -> float:
        """The anomaly score of a fixed image, drawn by formula; it tells damage from health."""
        _, scores_B = self.score(_probe_features(self.backbone))
        return float(scores_B)

    @torch.no_grad()
    def score(
        self, features: ImageFeatures, *, reference_weight: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Maps at the backbone's prompt size and scores of encoded images.

        `reference_weight` replaces that of the prompt set: 0 prompts only, 1 reference only.
        PromptSetError if the prompt set's tensors are not of the features' widths and layers.
        """
        self._check_widths(features)
        rule = self._rule
        if reference_weight is not None:
            rule = replace(rule, reference_weight=reference_weight)
        return rule.score(
            features,
            self._text_PE,
            self._memory,
            self.prompt_set.provenance.scales,
            interest_SS=self._interest_SS,
        )

    def _check_widths(self, features: ImageFeatures) -> None:
        """A file may name a backbone to which its tensors do not belong."""
        own = {layer: tokens.shape[1] for layer, tokens in self._memory.layers.items()}
        seen = {layer: tokens.shape[-1] for layer, tokens in features.layers.items()}
        widths = self._text_PE.shape[1], features.tokens_BNE.shape[-1]
        if own != seen or widths[0] != widths[1]:
            raise PromptSetError(
                f"the prompt set of {self.prompt_set.category} holds features of width {widths[0]},"
                f" and {own} by layer, its backbone gives {widths[1]} and {seen}: fit or register"
                f" the category again"
            )


def conclude(
    threshold: Threshold,
    map_SS: torch.Tensor,
    score: float,
    size: tuple[int, int],
    *,
    map_size: tuple[int, int] | None = None,
) -> Inspection:
    """`Detector.conclude` where no detector is, only its threshold."""
    is_anomalous = threshold.rejects(score)
    map_size = map_size or size
    map_HW: npt.NDArray[np.float32] = resize_map(map_SS, map_size).numpy()
    regions: tuple[Region, ...] = ()
    if is_anomalous:
        whole_HW = map_HW if map_size == size else resize_map(map_SS, size).numpy()
        regions = find_regions(whole_HW, threshold.value)
    return Inspection(
        anomaly_map=map_HW,
        anomaly_score=score,
        threshold=threshold.value,
        is_anomalous=is_anomalous,
        p_value=threshold.p_value(score),
        regions=regions,
    )


_PROBED: WeakKeyDictionary[Backbone, ImageFeatures] = WeakKeyDictionary()


def _probe_features(backbone: Backbone) -> ImageFeatures:
    """Encoded once: a replica of a long tail tests hundreds of prompt sets."""
    if backbone not in _PROBED:
        image = probe_image((backbone.input_size,) * 2)
        _PROBED[backbone] = backbone.encode_images(backbone.preprocess([image]))
    return _PROBED[backbone]


def probe_image(size: tuple[int, int]) -> Image.Image:
    """Waves of three lengths and directions, one a channel: every patch differs from the others.

    `size` is (width, height).
    """
    width, height = size
    y_HW, x_HW = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    waves_3HW = np.sin(
        2 * np.pi * np.stack([3 * x_HW + y_HW, 7 * y_HW - 2 * x_HW, 17 * (x_HW + y_HW)])
    )
    return Image.fromarray(np.rint(127.5 * (1 + waves_3HW)).astype(np.uint8).transpose(1, 2, 0))


def find_regions(map_HW: npt.NDArray[np.float32], threshold: float) -> tuple[Region, ...]:
    """The 8-connected areas of a map above a threshold, the worst `MAX_REGIONS` of them.

    A row's pixels above the threshold are a few runs, and it is runs that touch, not pixels: some
    thousands in a photograph of millions of pixels.
    """
    above_HW = map_HW > threshold
    height, width = above_HW.shape
    step = width + 1  # a clear column before each row ends the runs of the row before
    padded = np.zeros(height * step + 1, np.bool_)
    padded[:-1].reshape(height, step)[:, 1:] = above_HW
    edges = np.flatnonzero(padded[1:] != padded[:-1]) + 1
    if not len(edges):
        return ()
    starts, ends = edges[::2], edges[1::2]
    # Of the next row's runs, those from the first that ends behind this run's left neighbour to the
    # last that begins no later than its right neighbour.
    first = np.searchsorted(ends, starts + step - 1, side="right")
    counts = np.searchsorted(starts, ends + step, side="right") - first
    upper = np.repeat(np.arange(len(starts)), counts)
    lower = np.arange(counts.sum()) + np.repeat(first - counts.cumsum() + counts, counts)
    touching = sparse.coo_array((np.ones(len(upper)), (upper, lower)), shape=(len(starts),) * 2)
    _, labels = csgraph.connected_components(touching, directed=False)

    order = np.argsort(labels, kind="stable")
    begins = np.flatnonzero(np.diff(labels[order], prepend=-1))
    lengths = ends - starts
    rows, lefts = starts // step, starts % step - 1
    # The pixels above the threshold come in the order of the runs.
    peaks = np.maximum.reduceat(map_HW[above_HW], lengths.cumsum() - lengths)[order]
    peaks = np.maximum.reduceat(peaks, begins)
    worst = np.lexsort((order[begins], -peaks))[:MAX_REGIONS]
    boxes = zip(
        np.minimum.reduceat(lefts[order], begins)[worst].tolist(),
        np.minimum.reduceat(rows[order], begins)[worst].tolist(),
        np.maximum.reduceat((lefts + lengths)[order], begins)[worst].tolist(),
        np.maximum.reduceat(rows[order], begins)[worst].tolist(),
        peaks[worst].tolist(),
        np.add.reduceat(lengths[order], begins)[worst].tolist(),
        strict=True,
    )
    return tuple(
        Region(x=x, y=y, width=right - x, height=bottom + 1 - y, peak=peak, area=area)
        for x, y, right, bottom, peak, area in boxes
    )
