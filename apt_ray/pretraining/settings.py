"""Settings of a pretraining run."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from apt_ray.errors import SettingsError


class TrainSettings(BaseModel):
    """Settings of a run; its length is given in steps or in minutes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, gt=0, description="Length in steps (repeatable).")
    minutes: float | None = Field(
        default=None, gt=0, description="Length in minutes of training time."
    )
    seed: int = Field(default=0, ge=0)
    batch_pairs: int = Field(default=16, ge=2, description="Pairs a step of the smallest pictures.")
    sizes: dict[float, int] = Field(
        default={0.0: 64, 0.5: 96, 0.8: 128},
        description="Picture sizes in pixels, by the share of the run from which on they hold.",
    )
    start: Literal["scratch", "shipped"] = Field(
        default="scratch", description="Random weights, or those that the package holds."
    )
    left_out: tuple[str, ...] = Field(
        default=(), description="Kinds of surface that the run never shows."
    )
    bfloat16: bool | None = Field(
        default=None,
        description="Towers in mixed precision, the losses never; None: where it is fast, on GPUs"
        " and on CPUs with AVX-512.",
    )
    phrases: int = Field(default=160, ge=8, description="Compositional phrases a step.")
    state_phrases: int = Field(
        default=16, ge=1, description="Normal, and anomalous, phrases a step."
    )
    free_texts: int = Field(default=32, ge=0, description="Random token sequences a step.")
    token_jitter: float = Field(
        default=0.3, ge=0, description="Noise, relative to the tokens' scale."
    )
    learning_rate: float = Field(default=1e-3, gt=0)
    scale_rate: float = Field(
        default=20, gt=0, description="Learning rate of the scales, relative."
    )
    weight_decay: float = Field(default=0.05, ge=0)
    warmup_steps: int = Field(default=80, ge=1)
    dense_weight: float = Field(default=2.0, ge=0)
    reference_weight: float = Field(default=0.7, ge=0)
    head_weight: float = Field(default=0.5, ge=0)
    focus: float = Field(
        default=0.0,
        ge=0,
        description="Focal exponent of the patch losses: how much more hard patches count.",
    )
    image_weight: float = Field(default=0.3, ge=0)
    pooled_weight: float = Field(default=0.3, ge=0)
    phrase_weight: float = Field(default=0.5, ge=0)
    contrast_weight: float = Field(default=0.2, ge=0)
    spread_weight: float = Field(
        default=1.0, ge=0, description="Weight of 1 / participation ratio."
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainSettings:
        if (self.steps is None) == (self.minutes is None):
            raise SettingsError("give the length of the run as either steps or minutes")
        if 0.0 not in self.sizes or any(size % 8 or size < 32 for size in self.sizes.values()):
            raise SettingsError("sizes need one from 0.0 on, all multiples of 8 from 32 pixels up")
        return self
