"""The settings of a search. Each field is a flag of `tuning/search.py`, too."""

from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from apt_ray.anomalies.spec import BankSpec, JudgeSpec, file_digests
from apt_ray.config import BACKBONE, BackboneSpec, FitSettings, Flag, Ground, Settings
from apt_ray.files import Location
from tuning.space import REFERENCE, REMEMBERED, Space, default_space, starting_point

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
    live_trials: int | None = Field(
        default=None,
        ge=1,
        description="Trials that run at a time, over all categories. By default as many as have the"
        " CPUs that they need, and 8 an engine where they share engines.",
    )
    warm_start: int = Field(
        default=0,
        ge=0,
        description="Trials that take settings of the registry's champions instead of drawn ones:"
        " those of the category's own first, then those of other categories.",
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
    objective: Literal["image", "pareto"] = Field(
        default="image",
        description="How well whole images are told apart, or that and how well anomalies are"
        " located as two objectives (with --searcher optuna --scheduler none); the first chooses"
        " the winner either way.",
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
    backbone: BackboneSpec = Field(
        default=BackboneSpec(), description="What trials and fits see images with."
    )
    space: Space = Field(
        default_factory=lambda known: default_space(known.get("backbone", BackboneSpec())),
        description="What the trials vary.",
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
        for name in set(self.space) & set(REFERENCE):
            for value in self.space[name].choices or ():
                self.backbone_of({name: value})
        unknown = [k for k, v in starting_point(self.space, self.backbone).items() if v is None]
        if unknown:
            raise ValueError(
                f"the first trial takes what holds without a search, which is not known of"
                f" {', '.join(unknown)}: give --{unknown[0].replace('_', '-')}"
            )
        return self

    def fit_settings(self, searched: Mapping[str, Any] = MappingProxyType({})) -> FitSettings:
        """The settings of a fit to the first support set, with searched values in place."""
        own = {name: value for name, value in searched.items() if name not in REFERENCE}
        return self._fit_settings({"steps": self.steps, "seed": self.support_seeds[0], **own})

    def _fit_settings(self, known: Mapping[str, Any]) -> FitSettings:
        read = {"ground": self.ground, "white_level": self.white_level}
        return FitSettings.parse({**read, **known})

    def backbone_of(self, searched: Mapping[str, Any] = MappingProxyType({})) -> BackboneSpec:
        """What a fit sees images with, with searched values in place."""
        read = {name: value for name, value in searched.items() if name in REFERENCE}
        return BackboneSpec.parse({**self.backbone.model_dump(), **read}) if read else self.backbone

    def judged_by(
        self, searched: Mapping[str, Any] = MappingProxyType({})
    ) -> tuple[BackboneSpec, tuple[int, ...] | None]:
        """What the judge of a trial sees images with, and which of its reference layers count.

        Layers do not depend on which others are read, so one judge serves all trials that differ in
        them alone; only the lengths are those of the last one. None is all layers.
        """
        spec = self.backbone_of(searched)
        if spec.reference_layers is None or not {"reference_layers", "reference_lengths"} & set(
            self.space
        ):
            return spec, None
        tried = [
            self.backbone_of({"reference_layers": value}).reference_layers or ()
            for value in self._values("reference_layers")
        ] or [spec.reference_layers]
        last = spec.reference_layers[-1]
        layers = sorted({layer for one in tried if one[-1] == last for layer in one})
        counted = [layers.index(layer) for layer in spec.reference_layers]
        if spec.reference_lengths and spec.reads != BACKBONE:
            counted.append(len(layers))
        wide = {"reference_layers": tuple(layers), "reference_lengths": True}
        return spec.model_copy(update=wide), tuple(counted)

    def judging(self) -> list[BackboneSpec]:
        """All that judges of trials see images with, each once."""
        read = [name for name in REFERENCE if name in self.space]
        points = product(*(self._values(name) for name in read))
        specs = (self.judged_by(dict(zip(read, values, strict=True)))[0] for values in points)
        return list(dict.fromkeys(specs))

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
        digests = [file_digests(support) for support in supports]
        return [
            (
                BankSpec(
                    fingerprint=fingerprint,
                    support=digest,
                    seed=seed,
                    region=place.region,
                    object_mask=place.object_mask,
                    ground=place.ground,
                    white_level=place.white_level,
                ),
                support,
            )
            for place in self._points("region", "object_mask")
            for seed, support, digest in zip(self.support_seeds, supports, digests, strict=True)
        ]

    def judge_specs(
        self, supports: Sequence[Sequence[Location]], *, fingerprint: str
    ) -> list[tuple[JudgeSpec, Sequence[Location]]]:
        """The judges that trials of a category may ask for, of one of `judging`; as `bank_specs`.

        Raises:
            DataError: a file cannot be read.
        """
        digests = [file_digests(support) for support in supports]
        return [
            (JudgeSpec.of(settings, digest, fingerprint=fingerprint, seed=seed), support)
            for settings in self._points(*REMEMBERED)
            for seed, support, digest in zip(self.support_seeds, supports, digests, strict=True)
        ]

    def _points(self, *names: str) -> list[FitSettings]:
        """Settings with all values of some axes, those that are searched."""
        searched = [name for name in names if name in self.space]
        points = product(*(self._values(name) for name in searched))
        return [self._fit_settings(dict(zip(searched, values, strict=True))) for values in points]

    def _values(self, name: str) -> tuple[Any, ...]:
        return tuple(self.space[name].choices or ()) if name in self.space else ()

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
