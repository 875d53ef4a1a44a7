"""fit: from a handful of normal images to a prompt set."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version

import torch

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.anomalies.families import harmless_copies
from apt_ray.anomalies.spec import BankSpec
from apt_ray.config import FitSettings
from apt_ray.data.folders import support_hash
from apt_ray.detection.calibration import Threshold, calibrate, estimate
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import PromptSet, Provenance
from apt_ray.detection.reference import DistanceScale, ReferenceMemory, encode_turns
from apt_ray.detection.rule import RULE_VERSION, ScoreRule
from apt_ray.errors import DataError
from apt_ray.features.protocol import Backbone, ImageFeatures
from apt_ray.files import Location
from apt_ray.images import read_image
from apt_ray.prompts.lanes import Lane, folds
from apt_ray.prompts.trainer import PromptTrainer

Progress = Callable[[int, int], None]

_COPIES = 16
_PROGRESS_EVERY = 5


def fit(
    category: str,
    support: Sequence[Location],
    settings: FitSettings | None = None,
    *,
    backbone: Backbone,
    calibration: Sequence[Location] = (),
    bank: SupportBank | None = None,
    progress: Progress | None = None,
) -> PromptSet:
    """Fit the prompt set of one category.

    Args:
        category: its name.
        support: files of the support images, all normal; at least one.
        settings: hyperparameters; the defaults need no tuning.
        backbone: the frozen backbone.
        calibration: further normal images; with enough of them the false-alarm rate is certified.
        bank: the support set already encoded, where the caller has it.
        progress: called with (optimisation steps done, steps in all).

    Raises:
        DataError: a file is missing or not an image, or there is no support image.
    """
    if not support:
        raise DataError(f"{category} has no support image: give at least one image of a good part")
    settings = settings or FitSettings()
    images = [read_image(path) for path in support]
    if bank is None:
        spec = BankSpec.of(settings, support, fingerprint=backbone.fingerprint)
        bank = encode_support(backbone, images, spec)
    bank = bank.to(backbone.device)
    everything = Lane(
        settings=settings, bank=bank, images=tuple(range(bank.shots)), seed=settings.seed
    )
    # Scores of left-out images need prompts that never saw them: the folds train beside the real
    # one.
    needs_folds = not calibration and bank.shots > 1
    without_one = folds([bank], settings) if needs_folds else []
    trainer = PromptTrainer(backbone, [everything, *without_one])
    while trainer.steps_done < settings.steps:
        trainer.advance(min(_PROGRESS_EVERY, settings.steps - trainer.steps_done))
        if progress is not None:
            progress(trainer.steps_done, settings.steps)
    text_TPE = trainer.text_features()
    pixels = backbone.preprocess(images)
    shown = [
        bank.support.to(backbone.device),
        *encode_turns(pixels, settings.reference_rotations, backbone),
    ]

    def memory_of(kept: list[int]) -> ReferenceMemory:
        turns = ImageFeatures.concatenate([features[kept] for features in shown])
        return ReferenceMemory.of(turns, settings.reference_size)

    def apart() -> list[tuple[ImageFeatures, ReferenceMemory]]:
        """Normal images, each with a memory that was not made of it."""
        if bank.shots == 1:
            g = torch.Generator().manual_seed(settings.seed)
            copies = harmless_copies(pixels, _COPIES, g)
            return [(backbone.encode_in_batches(copies), memory_of([0]))]
        places = range(bank.shots)
        return [
            (shown[0][image : image + 1], memory_of([other for other in places if other != image]))
            for image in places
        ]

    reads_itself = backbone.spec.reference_encoder == "backbone"
    held_apart = apart() if not reads_itself or not calibration else []
    # What the backbone's own distances mean its constants say.
    scale = (
        None
        if reads_itself
        else DistanceScale.of(
            torch.cat([memory.distance(features) for features, memory in held_apart])
        )
    )
    memory = memory_of(list(range(bank.shots))).scaled(scale)
    rule = ScoreRule.of(backbone, settings)

    def scores(
        features: ImageFeatures, text_PE: torch.Tensor, memory: ReferenceMemory
    ) -> list[float]:
        _, scores_B = rule.score(features, text_PE, memory)
        values: list[float] = scores_B.tolist()
        return values

    threshold: Threshold
    if calibration:
        further = torch.cat([backbone.preprocess([read_image(path)]) for path in calibration])
        calibration_scores = scores(backbone.encode_in_batches(further), text_TPE[0], memory)
        threshold = calibrate(calibration_scores, settings.false_alarm_rate)
    else:
        texts = text_TPE[1:] if needs_folds else text_TPE
        normal_scores = [
            score
            for (features, without), text_PE in zip(held_apart, texts, strict=True)
            for score in scores(features, text_PE, without.scaled(scale))
        ]
        threshold = estimate(
            normal_scores,
            "left-out support images" if needs_folds else "copies of the support image",
        )

    fitted = PromptSet(
        provenance=Provenance(
            rule_version=RULE_VERSION,
            library_version=version("apt-ray"),
            category=category,
            backbone=backbone.spec,
            fingerprint=backbone.fingerprint,
            settings=settings,
            shots=bank.shots,
            support_hash=support_hash(support),
            support_names=tuple(path.name for path in support),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            threshold=threshold,
            distance_scale=scale,
        ),
        text_features=text_TPE[0].cpu(),
        contexts=trainer.contexts()[0].cpu(),
        meta_features=trainer.meta_T2E[0].cpu(),
        memory=memory,
    )
    probe_score = Detector(backbone, fitted).probe_score()
    provenance = fitted.provenance.model_copy(update={"probe_score": probe_score})
    return replace(fitted, provenance=provenance)
