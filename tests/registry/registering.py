"""Prompt sets for the tests of the registry."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from mlflow import MlflowClient

from apt_ray.config import BackboneSpec, FitSettings
from apt_ray.detection.calibration import calibrate
from apt_ray.detection.prompt_set import PromptSet, Provenance
from apt_ray.detection.reference import ReferenceMemory
from apt_ray.detection.rule import Scale, Scales
from apt_ray.registry import RegisteredVersion, Registry
from apt_ray.registry.mlflow.names import TRIALS_EXPERIMENT


def make_prompt_set(category: str, *, seed: int = 0) -> PromptSet:
    """A small prompt set of random numbers, of a backbone that does not exist."""
    g = torch.Generator().manual_seed(seed)
    text_PE = F.normalize(torch.randn(2, 6, generator=g), dim=-1)
    return PromptSet(
        provenance=Provenance(
            library_version="0.1.0",
            category=category,
            backbone=BackboneSpec(),
            fingerprint="f1" * 32,
            settings=FitSettings(seed=seed),
            shots=4,
            support_hash="ab" * 32,
            support_names=("0.png", "1.png", "2.png", "3.png"),
            created="2025-01-01T00:00:00+00:00",
            threshold=calibrate([0.1, 0.2, 0.3], 0.25),
            scales=Scales(prompts=Scale(mean=0, sd=1), layers={2: Scale(mean=0, sd=1)}),
            metrics={"validation": 0.9125, "validation_sd": 0.0312, "validation.scratch": 0.87},
        ),
        text_features=text_PE,
        contexts=torch.randn(2, 8, 5, generator=g),
        meta_features=text_PE.flip(0),
        memory=ReferenceMemory({2: torch.randn(7, 3, generator=g).half()}),
    )


def spoilt(prompt_set: PromptSet) -> PromptSet:
    """One that takes bad for good: its prompts are swapped, and its memory is noise."""
    g = torch.Generator().manual_seed(0)
    return replace(
        prompt_set,
        text_features=prompt_set.text_features.flip(0),
        memory=ReferenceMemory(
            {
                layer: F.normalize(torch.randn(tokens.shape, generator=g), dim=-1)
                for layer, tokens in prompt_set.memory.layers.items()
            }
        ),
    )


def register(
    registry: Registry,
    prompt_set: PromptSet,
    *,
    support: tuple[Path, ...] = (),
    held_out: tuple[Path, ...] = (),
) -> RegisteredVersion:
    return registry.register(prompt_set, pictures={}, trials=[], support=support, held_out=held_out)


def logged_trials(uri: str, search: str) -> list[str]:
    """The trials of a search that MLflow holds, one entry for each run."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(TRIALS_EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"tags.search = '{search}'")
    return sorted(run.data.tags["trial"] for run in runs)
