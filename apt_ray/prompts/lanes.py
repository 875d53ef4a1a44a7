"""Lanes: what a PromptTrainer trains, and where they stand.

T lanes, P prompts (0 normal, the others anomalous), L longest context, C token width, B images a
step, N patch tokens, E joint width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apt_ray.anomalies.bank import SupportBank
from apt_ray.config import FitSettings


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Lane:
    """One prompt set in training, known to its trainer by identity.

    Attributes:
        settings: its own hyperparameters; `steps` is the length of its cosine schedule.
        bank: the support set that it learns from.
        images: which of the bank's support images it may see.
        seed: of its initial contexts and its batches.
    """

    settings: FitSettings
    bank: SupportBank
    images: tuple[int, ...]
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LaneState:
    """All that a lane needs to go on elsewhere, on the CPU.

    Attributes:
        contexts_PLC: learned contexts, float32.
        velocity_PLC: the optimiser's momentum, float32.
        meta_2E: the meta-prompt, float32.
        norm: norm of the initial contexts, a scalar.
        generator: state of the lane's random generator, uint8.
        steps_done: steps taken so far.
    """

    contexts_PLC: torch.Tensor
    velocity_PLC: torch.Tensor
    meta_2E: torch.Tensor
    norm: torch.Tensor
    generator: torch.Tensor
    steps_done: int


def fold(bank: SupportBank, left_out: int, settings: FitSettings) -> Lane:
    """The lane that learns from all support images but one; from the only one if need be."""
    others = tuple(image for image in range(bank.shots) if image != left_out)
    return Lane(
        settings=settings, bank=bank, images=others or (left_out,), seed=settings.seed + left_out
    )


def folds(banks: Sequence[SupportBank], settings: FitSettings) -> list[Lane]:
    """Every `fold` of every bank, bank by bank."""
    return [fold(bank, image, settings) for bank in banks for image in range(bank.shots)]
