"""fit: from a handful of normal images to a prompt set."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch
from PIL import Image

from apt_ray.anomalies.bank import SupportBank, encode_support
from apt_ray.anomalies.spec import BankSpec
from apt_ray.config import FitSettings
from apt_ray.data.distinct import Distinct, pixel_digest
from apt_ray.data.folders import support_hash
from apt_ray.detection.calibration import Threshold, calibrate, estimate
from apt_ray.detection.detector import Detector
from apt_ray.detection.prompt_set import THUMBNAIL_SIDE, PromptSet, Provenance
from apt_ray.detection.rule import RULE_VERSION, Scale, Scales, ScoreRule, anomalous_log_odds
from apt_ray.errors import DataError, SettingsError
from apt_ray.features.protocol import Backbone
from apt_ray.files import AnyPath, Location, location
from apt_ray.images import encode_jpeg, find_reading, read_image
from apt_ray.levels import Reading
from apt_ray.prompts.lanes import Lane
from apt_ray.prompts.remember import remember
from apt_ray.prompts.trainer import PromptTrainer
from apt_ray.text import printable
from apt_ray.version import __version__

Progress = Callable[[int, int], None]

_PROGRESS_EVERY = 5


def fit(
    category: str,
    support: Sequence[AnyPath],
    settings: FitSettings | None = None,
    *,
    backbone: Backbone,
    calibration: Sequence[AnyPath] = (),
    bank: SupportBank | None = None,
    reading: Reading | None = None,
    progress: Progress | None = None,
) -> PromptSet:
    """Fit the prompt set of one category.

    Images with the pixels of an earlier one are left out, and named in the provenance.

    Args:
        category: its name.
        support: files of the support images, all normal; at least one.
        settings: hyperparameters; the defaults need no tuning.
        backbone: the frozen backbone.
        calibration: further normal images; with enough of them the false-alarm rate is certified.
            If all are copies the support images set the threshold, as without any.
        bank: the support set already encoded, where the caller has it.
        reading: how image files are read, where the caller knows; else by `find_reading`.
        progress: called with (optimisation steps done, steps in all).

    Raises:
        DataError: a file is missing or not an image, or there is no support image.
        SettingsError: the bank holds another number of images.
    """
    if not support:
        raise DataError(f"{category} has no support image: give at least one image of a good part")
    settings = settings or FitSettings()
    if reading is None:
        reading = find_reading(support, ground=settings.ground, white_level=settings.white_level)
    distinct = Distinct()
    shown: dict[Location, Image.Image] = {}
    for path in map(location, support):
        if distinct.admit(path, pixel_digest(image := read_image(path, reading))):
            shown[path] = image
    images = list(shown.values())
    further = [
        backbone.preprocess([image])
        for path in calibration
        if distinct.admit(path, pixel_digest(image := read_image(path, reading)))
    ]
    if bank is None:
        spec = BankSpec.of(settings, list(shown), fingerprint=backbone.fingerprint)
        bank = encode_support(backbone, images, spec)
    if bank.shots != len(images):
        raise SettingsError(
            f"the bank of {category} holds {bank.shots} images, its support set {len(images)} that"
            f" differ: encode the bank from these"
        )
    bank = bank.to(backbone.device)
    everything = Lane(
        settings=settings, bank=bank, images=tuple(range(bank.shots)), seed=settings.seed
    )
    trainer = PromptTrainer(backbone, [everything])
    while trainer.steps_done < settings.steps:
        trainer.advance(min(_PROGRESS_EVERY, settings.steps - trainer.steps_done))
        if progress is not None:
            progress(trainer.steps_done, settings.steps)
    text_PE = trainer.text_features()[0]

    support_features = bank.support.to(backbone.device)
    memory, held_out = remember(support_features, backbone.preprocess(images), settings, backbone)
    odds_SN = anomalous_log_odds(support_features.tokens_BNE, text_PE, backbone.constants)
    scales = Scales(prompts=Scale.of_odds(odds_SN), layers=held_out.scales)
    rule = ScoreRule.of(backbone, settings)
    threshold: Threshold
    if further:
        features = backbone.encode_in_batches(torch.cat(further))
        _, scores_C = rule.score(features, text_PE, memory, scales)
        threshold = calibrate(scores_C.tolist(), settings.false_alarm_rate)
    else:
        odds_HN = anomalous_log_odds(held_out.tokens_BNE, text_PE, backbone.constants)
        _, scores_H = rule.score_evidence(odds_HN, held_out.distances, scales)
        threshold = estimate(scores_H.tolist(), held_out.source)

    fitted = PromptSet(
        provenance=Provenance(
            rule_version=RULE_VERSION,
            library_version=__version__,
            category=category,
            backbone=backbone.spec,
            fingerprint=backbone.fingerprint,
            settings=settings,
            shots=bank.shots,
            support_hash=support_hash(list(shown)),
            support_names=tuple(printable(path.name) for path in shown),
            copies=distinct.copies,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            threshold=threshold,
            scales=scales,
            reading=reading,
        ),
        text_features=text_PE.cpu(),
        contexts=trainer.contexts()[0].cpu(),
        meta_features=trainer.meta_T2E[0].cpu(),
        memory=memory,
        thumbnails=tuple(encode_jpeg(image, side=THUMBNAIL_SIDE) for image in images),
    )
    probe_score = Detector(backbone, fitted).probe_score()
    provenance = fitted.provenance.model_copy(update={"probe_score": probe_score})
    return replace(fitted, provenance=provenance)
