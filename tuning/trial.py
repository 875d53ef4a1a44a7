"""What runs in Ray's worker processes: encoding support sets, trials, the fit of the winner.

A worker process keeps the backbone and the anomaly banks that it used last, so that the trials that
an actor runs one after another load neither again. Nothing here imports MLflow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray
import torch
from PIL import Image
from ray import ObjectRef, tune

from apt_ray.backbone import FrozenCLIP, load_backbone
from apt_ray.bank import SupportBank, encode_support
from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.data.folders import Category
from apt_ray.fitting import fit
from apt_ray.images import read_image
from apt_ray.prompt_set import PromptSet
from apt_ray.selection import HeldOutTrial
from tuning.labelled import report_labelled
from tuning.pictures import draw_held_out, draw_support
from tuning.settings import RUNGS

Banks = tuple["ObjectRef[SupportBank]", ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialPlan:
    """What all trials of a category share.

    Attributes:
        backbone: The frozen model, loaded once a process.
        banks: One a support seed, in Ray's object store.
        settings: The settings that are not searched.
        threads: PyTorch's threads in a trial.
    """

    backbone: BackboneSpec
    banks: Banks
    settings: FitSettings
    threads: int


def encode_bank(
    paths: Sequence[Path], *, backbone: BackboneSpec, seed: int, threads: int
) -> tuple[SupportBank, int]:
    """The bank of one support set and its shots; DataError if a picture cannot be read."""
    torch.set_num_threads(threads)
    images = [read_image(path) for path in paths]
    bank = encode_support(_resident_backbone(backbone), images, seed=seed)
    return bank, bank.shots


def run_trial(config: Mapping[str, Any], *, plan: TrialPlan) -> None:
    """Train the support seeds and folds of one trial together; report after each rung."""
    torch.set_num_threads(plan.threads)
    settings = FitSettings.parse(plan.settings.model_dump() | dict(config))
    trial = HeldOutTrial(_resident_backbone(plan.backbone), _resident_banks(plan.banks), settings)
    for rung in range(1, RUNGS + 1):
        trial.advance(settings.steps * rung // RUNGS - trial.steps_done)
        held_out = trial.value()
        tune.report(
            {
                "rung": rung,
                "steps": trial.steps_done,
                "held_out": held_out.value,
                "held_out_sd": held_out.sd,
                "families": held_out.families,
            }
        )


def fit_winner(
    category: str,
    support: Sequence[Path],
    calibration: Sequence[Path],
    settings: FitSettings,
    *,
    backbone: BackboneSpec,
    bank: SupportBank,
    metrics: dict[str, float],
    threads: int,
    test: Category | None = None,
) -> tuple[PromptSet, dict[str, Image.Image]]:
    """The prompt set of the best settings on all shots, and pictures of what it sees.

    The labelled pictures of `test`, if it has any, are reported in metrics `test.*`.
    """
    torch.set_num_threads(threads)
    model = _resident_backbone(backbone)
    prompt_set = fit(
        category,
        support,
        settings,
        backbone=model,
        calibration=calibration,
        bank=bank,
        metrics=metrics,
    )
    images = [read_image(path) for path in support]
    pictures = {
        "support_images": draw_support(model, prompt_set, images),
        "held_out_perturbations": draw_held_out(model, prompt_set, images[0]),
    }
    if test is not None:
        reported, drawn = report_labelled(model, prompt_set, test, support=tuple(support))
        metrics = prompt_set.metrics | reported
        provenance = prompt_set.provenance.model_copy(update={"metrics": metrics})
        prompt_set = replace(prompt_set, provenance=provenance)
        pictures |= drawn
    return prompt_set, pictures


@lru_cache(maxsize=1)
def _resident_backbone(spec: BackboneSpec) -> FrozenCLIP:
    return load_backbone(spec)


@lru_cache(maxsize=1)
def _resident_banks(banks: Banks) -> list[SupportBank]:
    return ray.get(list(banks))
