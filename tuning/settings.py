"""The settings of a search."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, field_validator

from apt_ray.config import BackboneSpec, FitSettings, Settings

RUNGS = 4
"""How often a trial reports its held-out value, at equal distances; ASHA stops trials there."""


class SearchSettings(Settings):
    """What one search does with each category."""

    shots: int = Field(ge=1)
    support_seeds: tuple[int, ...] = Field(min_length=1)
    trials: int = Field(ge=1)
    steps: int = Field(ge=RUNGS)
    seed: int = Field(ge=0)
    live_trials: int | None = Field(ge=1)
    cpus_per_trial: float = Field(gt=0)
    scheduler: Literal["asha", "none"]
    storage: str
    backbone: BackboneSpec

    @field_validator("support_seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("must differ from one another")
        return seeds

    def fit_settings(self, searched: Mapping[str, Any] = MappingProxyType({})) -> FitSettings:
        """The settings of a fit to the first support set, with searched values in place."""
        return FitSettings.parse({"steps": self.steps, "seed": self.support_seeds[0], **searched})

    @property
    def threads(self) -> int:
        """PyTorch's threads in one worker process."""
        return math.ceil(self.cpus_per_trial)
