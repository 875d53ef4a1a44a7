"""Judging a trial without a single test image: perturbation families that it never trained on.

T lanes, F families, D draws, V clean views, N patch tokens, E joint width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch

from apt_ray.backbone import FrozenCLIP
from apt_ray.bank import SupportBank
from apt_ray.config import FitSettings
from apt_ray.errors import SettingsError
from apt_ray.scoring import anomalous_probability, auroc, top_mean
from apt_ray.synthesis import SELECTION
from apt_ray.training import Lane, PromptTrainer


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutValue:
    """What a trial is worth, as AUROC in 0..1, higher is better.

    Attributes:
        value: mean over the lanes.
        sd: standard deviation over the lanes (0 for a single lane).
        families: mean over the lanes for each perturbation family.
        lanes: the value of each lane.
    """

    value: float
    sd: float
    families: dict[str, float]
    lanes: tuple[float, ...]


class HeldOutTrial:
    """One setting of the hyperparameters, trained on every support seed and every fold at once.

    A fold leaves one support image out of the training and is judged on perturbed copies of it. A
    bank of a single image has one fold, judged on other crops and turns of that image.

    Attributes:
        steps_done: steps taken so far, of `settings.steps`.
    """

    def __init__(
        self, backbone: FrozenCLIP, banks: Sequence[SupportBank], settings: FitSettings
    ) -> None:
        if any(bank.selection is None for bank in banks):
            raise SettingsError("encode the support sets with what judges trials (judged=True)")
        self._backbone = backbone
        self._judged = [(bank, image) for bank in banks for image in range(bank.shots)]
        self._trainer = PromptTrainer(
            backbone,
            [fold(bank, image, settings) for bank, image in self._judged],
        )

    @property
    def steps_done(self) -> int:
        return self._trainer.steps_done

    def advance(self, steps: int) -> None:
        """Train every lane for `steps` further steps."""
        self._trainer.advance(steps)

    def value(self) -> HeldOutValue:
        """The held-out value of what was learned so far."""
        text_TPE = self._trainer.text_features()
        value_TF = torch.stack(
            [
                self._judge(bank, image, text_PE)
                for (bank, image), text_PE in zip(self._judged, text_TPE, strict=True)
            ]
        )
        lanes = value_TF.nanmean(1).tolist()
        return HeldOutValue(
            value=fmean(lanes),
            sd=stdev(lanes) if len(lanes) > 1 else 0.0,
            families=dict(zip(SELECTION, value_TF.nanmean(0).tolist(), strict=True)),
            lanes=tuple(lanes),
        )

    def _judge(self, bank: SupportBank, image: int, text_PE: torch.Tensor) -> torch.Tensor:
        """Per family the mean of the AUROC over patches and that over images."""
        device, constants = self._backbone.device, self._backbone.constants
        assert bank.selection is not None
        tokens_FDNE = bank.selection.tokens_FSDNE[:, image].to(device).float()
        clean_VNE = bank.judged_clean_SVNE[image].to(device).float()
        p_FDN = anomalous_probability(tokens_FDNE, text_PE, constants)
        labels_FDN = bank.selection.labels_FSDN[:, image].to(device)
        patch_F = auroc(p_FDN.flatten(1), labels_FDN.flatten(1))
        clean_V = top_mean(anomalous_probability(clean_VNE, text_PE, constants))
        perturbed_FD = top_mean(p_FDN)
        score_FX = torch.cat([perturbed_FD, clean_V.expand(len(p_FDN), -1)], 1)
        label_X = torch.cat([torch.ones_like(perturbed_FD[0]), torch.zeros_like(clean_V)])
        return (patch_F + auroc(score_FX, label_X)) / 2


def fold(bank: SupportBank, left_out: int, settings: FitSettings) -> Lane:
    """The lane that learns from all support images but one; from the only one if need be."""
    others = tuple(image for image in range(bank.shots) if image != left_out)
    return Lane(
        settings=settings, bank=bank, images=others or (left_out,), seed=settings.seed + left_out
    )
