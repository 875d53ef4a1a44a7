"""The settings of a search."""

from collections.abc import Mapping
from itertools import product
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from apt_ray.config import BackboneSpec, FitSettings, Settings
from tuning.calls import BankName
from tuning.space import Space

RUNGS = 4
"""How often a trial reports its held-out value, at equal distances; ASHA stops trials there."""


class SearchSettings(Settings):
    """What one search does with each category."""

    shots: int = Field(ge=1)
    support_seeds: tuple[int, ...] = Field(min_length=1)
    trials: int = Field(ge=1)
    live_trials: int = Field(ge=1)
    searcher: Literal["random", "optuna"]
    scheduler: Literal["asha", "none"]
    objective: Literal["mean", "pareto"]
    steps: int = Field(ge=RUNGS)
    time_budget_s: float | None = Field(gt=0)
    seed: int = Field(ge=0)
    promote: Literal["auto", "never"]
    space: Space
    backbone: BackboneSpec

    @field_validator("support_seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("must differ from one another")
        return seeds

    @model_validator(mode="after")
    def _consistent(self) -> "SearchSettings":
        if self.objective == "pareto" and (self.searcher, self.scheduler) != ("optuna", "none"):
            raise ValueError("two objectives need --searcher optuna and --scheduler none")
        return self

    def fit_settings(self, searched: Mapping[str, Any] = MappingProxyType({})) -> FitSettings:
        """The settings of a fit to the first support set, with searched values in place."""
        return FitSettings.parse({"steps": self.steps, "seed": self.support_seeds[0], **searched})

    def bank_names(self, category: str) -> tuple[BankName, ...]:
        """The banks that trials of a category may ask for."""
        places = [
            self.space[name].ends if name in self.space else (getattr(FitSettings(), name),)
            for name in ("region", "object_mask")
        ]
        return tuple(BankName(category, *place) for place in product(*places))

    def rung_steps(self, rung: int) -> int:
        """The step at which a rung, from 1 to RUNGS, reports."""
        return self.steps * rung // RUNGS


class EngineSettings(Settings):
    """Where and how the lanes are computed; none of it changes what a search finds."""

    mode: Literal["auto", "shared", "own"] = Field(
        default="auto",
        description="shared: one engine a GPU, or a node, batches all trials; own: each trial's"
        " process holds a model of its own; auto: shared where there are GPUs, else own, which is"
        " faster there.",
    )
    gpus: float = Field(default=1.0, gt=0, le=1, description="GPU fraction of one engine.")
    threads: int | None = Field(
        default=None, ge=1, description="PyTorch's threads on a CPU; None is all of a node's CPUs."
    )
    bank_cache: str | None = Field(default=None, description="Folder of cached banks on each node.")

    @model_validator(mode="after")
    def _consistent(self) -> "EngineSettings":
        if self.mode == "own" and self.gpus < 1:
            raise ValueError("--engine own computes on CPUs: leave --engine-gpus out")
        return self
