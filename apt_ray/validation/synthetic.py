"""Judging a trial without a single test image: perturbation families that it never trained on.

T lanes, F families, D draws, V clean views, N patch tokens, E joint width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from apt_ray.anomalies.families import SELECTION
from apt_ray.auroc import auroc_of_rows
from apt_ray.detection.rule import anomalous_probability, top_mean
from apt_ray.errors import SettingsError
from apt_ray.features.protocol import Backbone
from apt_ray.prompts.lanes import Lane


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationValue:
    """What a trial is worth, as AUROC in 0..1, higher is better.

    Attributes:
        value: mean over the lanes.
        sd: standard deviation over the lanes (0 for a single lane).
        patch: its part that ranks patches, `value` is the mean of both parts.
        image: its part that ranks images.
        families: mean over the lanes for each perturbation family.
        lanes: the value of each lane.
    """

    value: float
    sd: float
    patch: float
    image: float
    families: dict[str, float]
    lanes: tuple[float, ...]


def judge_folds(
    backbone: Backbone, folds: Sequence[Lane], text_TPE: torch.Tensor
) -> ValidationValue:
    """The validation value of text features that the lanes of `fold` have learned."""
    value_2TF = torch.stack(
        [_judge(backbone, lane, text_PE) for lane, text_PE in zip(folds, text_TPE, strict=True)], 1
    )
    value_TF = value_2TF.mean(0)
    lanes = value_TF.nanmean(1).tolist()
    patch, image = value_2TF.flatten(1).nanmean(1).tolist()
    return ValidationValue(
        value=fmean(lanes),
        sd=stdev(lanes) if len(lanes) > 1 else 0.0,
        patch=patch,
        image=image,
        families=dict(zip(SELECTION, value_TF.nanmean(0).tolist(), strict=True)),
        lanes=tuple(lanes),
    )


def _judge(backbone: Backbone, lane: Lane, text_PE: torch.Tensor) -> torch.Tensor:
    """AUROC over patches and over images, for each family: `(2, F)`."""
    bank, image = lane.bank, _judged_image(lane)
    if bank.selection is None:
        raise SettingsError("encode the support sets with what judges trials (judged=True)")
    device, constants = backbone.device, backbone.constants
    tokens_FDNE = bank.selection.tokens_FSDNE[:, image].to(device).float()
    clean_VNE = bank.judged_clean_SVNE[image].to(device).float()
    p_FDN = anomalous_probability(tokens_FDNE, text_PE, constants)
    labels_FDN = bank.selection.labels_FSDN[:, image].to(device)
    patch_F = auroc_of_rows(p_FDN.flatten(1), labels_FDN.flatten(1))
    clean_V = top_mean(anomalous_probability(clean_VNE, text_PE, constants))
    perturbed_FD = top_mean(p_FDN)
    score_FX = torch.cat([perturbed_FD, clean_V.expand(len(p_FDN), -1)], 1)
    label_X = torch.cat([torch.ones_like(perturbed_FD[0]), torch.zeros_like(clean_V)])
    return torch.stack([patch_F, auroc_of_rows(score_FX, label_X)])


def _judged_image(lane: Lane) -> int:
    """The image that a lane of `fold` was not shown; the only one if there is one."""
    left_out = set(range(lane.bank.shots)) - set(lane.images)
    return left_out.pop() if left_out else 0
