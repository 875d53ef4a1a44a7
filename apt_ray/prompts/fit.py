"""fit: from a handful of normal images to a prompt set."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version

import torch
from PIL import Image

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
    shown = [
        bank.support.to(backbone.device),
        *encode_turns(backbone.preprocess(images), settings.reference_rotations, backbone),
    ]

    def memory_of(kept: list[int]) -> ReferenceMemory:
        turns = ImageFeatures.concatenate([features[kept] for features in shown])
        return ReferenceMemory.of(turns, settings.reference_size)

    g = torch.Generator().manual_seed(settings.seed)
    scale = _distance_scale(backbone, images, shown[0], memory_of, g)
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
        pixels = torch.cat([backbone.preprocess([read_image(path)]) for path in calibration])
        calibration_scores = scores(backbone.encode_in_batches(pixels), text_TPE[0], memory)
        threshold = calibrate(calibration_scores, settings.false_alarm_rate)
    elif needs_folds:
        left_out_scores = []
        for image in range(bank.shots):
            others = [other for other in range(bank.shots) if other != image]
            one = shown[0][image : image + 1]
            left_out_scores += scores(one, text_TPE[1 + image], memory_of(others).scaled(scale))
        threshold = estimate(left_out_scores, "left-out support images")
    else:
        g = torch.Generator().manual_seed(settings.seed)
        copies = harmless_copies(backbone.preprocess(images), _COPIES, g)
        copy_scores = scores(backbone.encode_in_batches(copies), text_TPE[0], memory)
        threshold = estimate(copy_scores, "copies of the support image")

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


def _distance_scale(
    backbone: Backbone,
    images: Sequence[Image.Image],
    support: ImageFeatures,
    memory_of: Callable[[list[int]], ReferenceMemory],
    g: torch.Generator,
) -> DistanceScale | None:
    """What distances are measured in, where the backbone's constants do not say.

    Each support image is held against the others; a single one, against altered copies of it.
    """
    if backbone.spec.reference_encoder == "backbone":
        return None
    shots = len(support)
    if shots > 1:
        distances = [
            memory_of([other for other in range(shots) if other != image]).distance(
                support[image : image + 1]
            )
            for image in range(shots)
        ]
    else:
        copies = harmless_copies(backbone.preprocess(images), _COPIES, g)
        distances = [memory_of([0]).distance(backbone.encode_in_batches(copies))]
    return DistanceScale.of(torch.cat(distances))
