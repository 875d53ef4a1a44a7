"""The validation value: what a trial is worth, without a single test image.

T lanes, F families, D draws, J judged images, X images, N patch tokens, E joint width, S pixels a
side of a map.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
import torch.nn.functional as F

from apt_ray.auroc import auroc_of_rows
from apt_ray.detection.calibration import SPREAD
from apt_ray.detection.rule import (
    Scale,
    Scales,
    ScoreRule,
    anomalous_log_odds,
    anomalous_probability,
)
from apt_ray.errors import SettingsError
from apt_ray.features.protocol import Backbone
from apt_ray.prompts.lanes import Lane
from apt_ray.prompts.remember import distance_scale
from apt_ray.validation.judge import Evidence, Judge

_UNSEEN = SPREAD / 1.645
"""Standard deviation of unseen normal images' scores about those of left-out support images: a
threshold that lies `SPREAD` above the median is to be passed by 5 % of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationValue:
    """What a trial is worth, as AUROC in 0..1, higher is better.

    Attributes:
        value: mean over the judged images, of ranking whole images.
        sd: standard deviation over them (0 for a single one).
        patch: AUROC of ranking patches by the map, mean over the judged images.
        families: mean over the judged images for each perturbation family.
        images: the value of each judged image, judge by judge.
    """

    value: float
    sd: float
    patch: float
    families: dict[str, float]
    images: tuple[float, ...]


def judge_folds(
    backbone: Backbone,
    folds: Sequence[Lane],
    text_TPE: torch.Tensor,
    judges: Sequence[Judge],
    layers: Collection[int] | None = None,
) -> ValidationValue:
    """The validation value of text features that the lanes of `folds` have learned.

    Perturbed and normal images are scored as they will be served, by prompts and memory; neither
    the prompts nor the memory nor the scales of a judged image have seen it. AUROC by the few
    normal images at hand would jump from one to the other, so each stands for images around it:
    the value is the chance that a perturbed image scores higher than a normal one whose score is
    normally distributed about it.

    Args:
        backbone: the text features' own.
        folds: all lanes of `lanes.folds`, whose banks are those of the judges' support sets.
        text_TPE: their text features.
        judges: one for each bank, in their order.
        layers: the judges' reference layers that the memory has; None is all of them.

    Raises:
        SettingsError: lanes, judges and layers do not belong together.
    """
    shots = [len(judge.spec.support) for judge in judges]
    judged = [judge.spec.support for judge in judges for _ in judge.spec.support]
    if [lane.bank.spec.support for lane in folds] != judged:
        raise SettingsError("each bank needs a judge of the same support images, in its order")
    values, patches = [], []
    first = 0
    for judge, count in zip(judges, shots, strict=True):
        value_JF, patch_J = _judge(
            backbone, folds[first : first + count], text_TPE[first : first + count], judge, layers
        )
        values.append(value_JF)
        patches.append(patch_J)
        first += count
    value_XF = torch.cat(values)
    images = value_XF.mean(1).tolist()
    return ValidationValue(
        value=fmean(images),
        sd=stdev(images) if len(images) > 1 else 0.0,
        patch=float(torch.cat(patches).nanmean()),
        families=dict(zip(judges[0].families, value_XF.mean(0).tolist(), strict=True)),
        images=tuple(images),
    )


def _judge(
    backbone: Backbone,
    folds: Sequence[Lane],
    text_TPE: torch.Tensor,
    judge: Judge,
    layers: Collection[int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `(J, F)` and AUROC over patches `(J,)`, float64 on the CPU."""
    rule = ScoreRule.of(backbone, folds[0].settings)
    normal, perturbed, patch = [], [], []
    for place in range(len(judge.labels_JXN)):
        # Of a single support image there is one lane, which judges all of its copies.
        text_PE = text_TPE[min(place, len(text_TPE) - 1)]
        scales = _scales(backbone, text_PE, judge, place, layers)
        _, scores_1 = _score(rule, judge.normal, place, text_PE, scales)
        maps_XSS, scores_X = _score(rule, judge.perturbed, place, text_PE, scales)
        normal.append(scores_1)
        perturbed.append(scores_X)
        p_XN = F.adaptive_avg_pool2d(maps_XSS, backbone.grid).flatten(1)
        patch.append(auroc_of_rows(p_XN, judge.labels_JXN[place]).nanmean())
    scores_J, scores_JX = torch.cat(normal).double(), torch.stack(perturbed).double()
    above_JXJ = (scores_JX[..., None] - scores_J) / _UNSEEN
    chance_JX = torch.special.ndtr(above_JXJ).mean(-1).cpu()
    return chance_JX.unflatten(1, (len(judge.families), -1)).mean(-1), torch.stack(patch)


def _scales(
    backbone: Backbone,
    text_PE: torch.Tensor,
    judge: Judge,
    place: int,
    layers: Collection[int] | None,
) -> Scales:
    """What is ordinary, by the judged images beside the one at `place`; by it where it is alone."""
    others = [other for other in range(len(judge.labels_JXN)) if other != place]
    tokens_JNE = judge.normal.tokens_JXNE[others, 0].float()
    # Blocks have no lengths, so what counts them may count one layer more than there is.
    kept = [layer for layer in judge.normal.layers if layers is None or layer in layers]
    return Scales(
        prompts=Scale.of_odds(anomalous_log_odds(tokens_JNE, text_PE, backbone.constants)),
        layers={
            layer: distance_scale(
                judge.normal.layers[layer][others],
                smallest=judge.smallest[layer],
                widened=judge.widened,
            )
            for layer in kept
        },
    )


def _score(
    rule: ScoreRule, evidence: Evidence, place: int, text_PE: torch.Tensor, scales: Scales
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps `(X, S, S)` and scores `(X,)` of the images made of one."""
    tokens_XNE = evidence.tokens_JXNE[place].float()
    odds_XN = anomalous_log_odds(tokens_XNE, text_PE, rule.constants)
    distances = {layer: evidence.layers[layer][place] for layer in scales.layers}
    maps_XSS, scores_X = rule.score_evidence(odds_XN, distances, scales)
    if rule.cls_weight == 0:
        return maps_XSS, scores_X
    p_X = anomalous_probability(evidence.cls_JXE[place].float(), text_PE, rule.constants)
    return maps_XSS, (1 - rule.cls_weight) * scores_X + rule.cls_weight * p_X
