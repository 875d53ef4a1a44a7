"""The settings of a search. Each field is a flag of `tuning/search.py`, too."""

from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from apt_ray.anomalies.spec import BankSpec, file_digests
from apt_ray.config import BackboneSpec, FitSettings, Flag, Ground, Settings
from apt_ray.files import Location
from tuning.space import DEFAULT_SPACE, Space

RUNGS = 4
"""How often a trial reports its validation value, at equal distances; ASHA stops trials there."""


class SearchSettings(Settings):
    """What one search does with each category."""

    shots: int = Field(
        default=4, ge=1, description="Normal images that each prompt set is fitted to."
    )
    support_seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Flag(names=("--seeds",))
    ] = Field(
        default=(0, 1, 2),
        min_length=1,
        description="Each draws a support set: a trial is judged on all of them, the winner is"
        " fitted to the first.",
    )
    trials: int = Field(default=8, ge=1, description="Settings that are tried in each category.")
    live_trials: int = Field(
        default=8, ge=1, description="Trials that run at a time, over all categories."
    )
    searcher: Literal["random", "optuna"] = Field(
        default="random",
        description="Draw settings at random, or where Optuna expects good values.",
    )
    scheduler: Literal["asha", "none"] = Field(
        default="asha",
        description=f"asha stops the worse half of the trials after 1/{RUNGS} and after 2/{RUNGS}"
        " of the steps, none stops nothing.",
    )
    objective: Literal["mean", "pareto"] = Field(
        default="mean",
        description="The mean of the validation values of images and of patches, or both as two"
        " objectives (with --searcher optuna --scheduler none); the mean chooses the winner either"
        " way.",
    )
    steps: Annotated[int, Flag(names=("--max-steps", "--steps"))] = Field(
        default=FitSettings().steps,
        ge=RUNGS,
        description="Optimisation steps of a trial and of the final fit.",
    )
    time_budget_s: Annotated[float | None, Flag(names=("--time-budget",), metavar="SECONDS")] = (
        Field(
            default=None,
            gt=0,
            description="Start no trial and stop those that run after this long; the best so far is"
            " registered as candidate. No limit by default.",
        )
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the settings that are tried.")
    promote: Literal["auto", "never"] = Field(
        default="auto",
        description="auto lets a winner become the champion by the registry's rules, never leaves"
        " it a candidate.",
    )
    ground: Ground = Field(
        default=FitSettings().ground, description=FitSettings.model_fields["ground"].description
    )
    white_level: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description=FitSettings.model_fields["white_level"].description,
    )
    space: Space = Field(
        default_factory=lambda: dict(DEFAULT_SPACE), description="What the trials vary."
    )
    backbone: BackboneSpec = Field(
        default=BackboneSpec(), description="What trials and fits see images with."
    )

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
        return FitSettings.parse(
            {
                "steps": self.steps,
                "seed": self.support_seeds[0],
                "ground": self.ground,
                "white_level": self.white_level,
                **searched,
            }
        )

    def bank_specs(
        self, supports: Sequence[Sequence[Location]], *, fingerprint: str
    ) -> list[tuple[BankSpec, Sequence[Location]]]:
        """The banks that trials of a category may ask for, each with its support images' files.

        Args:
            supports: the files for each of `support_seeds`.
            fingerprint: of the encoder.

        Raises:
            DataError: a file cannot be read.
        """
        searched = [name for name in ("region", "object_mask") if name in self.space]
        places = [
            FitSettings.parse(dict(zip(searched, values, strict=True)))
            for values in product(*(self.space[name].ends for name in searched))
        ]
        digests = [file_digests(support) for support in supports]
        return [
            (
                BankSpec(
                    fingerprint=fingerprint,
                    support=digest,
                    seed=seed,
                    region=place.region,
                    object_mask=place.object_mask,
                    ground=self.ground,
                    white_level=self.white_level,
                    judged=True,
                ),
                support,
            )
            for place in places
            for seed, support, digest in zip(self.support_seeds, supports, digests, strict=True)
        ]

    def rung_steps(self, rung: int) -> int:
        """The step at which a rung, from 1 to RUNGS, reports."""
        return self.steps * rung // RUNGS


class EngineSettings(Settings):
    """Where and how the lanes are computed; none of it changes what a search finds."""

    mode: Annotated[Literal["auto", "shared", "own"], Flag(names=("--engine",))] = Field(
        default="auto",
        description="shared: one process a GPU, or a node where there is none, batches all trials;"
        " own: each live trial has a CPU and a backbone of its own, which is faster there; auto:"
        " shared where there are GPUs, else own.",
    )
    gpus: Annotated[float, Flag(names=("--engine-gpus",))] = Field(
        default=1.0, gt=0, le=1, description="GPU fraction of a shared engine."
    )
    threads: Annotated[int | None, Flag(names=("--engine-threads",))] = Field(
        default=None,
        ge=1,
        description="PyTorch's threads in an engine on CPUs. By default all CPUs of its node, and 1"
        " where each trial has its own.",
    )
    bank_cache: Annotated[str | None, Flag(metavar="DIR")] = Field(
        default=None,
        description="Where encoded support sets are kept on each node, '' for nowhere."
        " ~/.cache/apt-ray/banks by default.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "EngineSettings":
        if self.mode == "own" and self.gpus < 1:
            raise ValueError("--engine own computes on CPUs: leave --engine-gpus out")
        return self
