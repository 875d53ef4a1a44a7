"""The fleet file: what is served, with what, to whom."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, StringConstraints, field_validator, model_validator

from apt_ray.config import Settings
from apt_ray.errors import FleetError, SettingsError
from apt_ray.images import ImageLimits

CategoryName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class Autoscaling(Settings):
    """Bounds and pace of one category's replicas; the names are those of Ray Serve."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=4, ge=1)
    target_ongoing_requests: float = Field(default=4, gt=0)
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)

    def overridden_by(self, other: "Autoscaling") -> "Autoscaling":
        """These settings, but those that `other` was given explicitly from `other`."""
        return self.model_copy(
            update={name: getattr(other, name) for name in other.model_fields_set}
        )


class Batching(Settings):
    """How a replica gathers images for its forward passes."""

    threads: int = Field(default=1, ge=1)
    max_batch_size: int = Field(default=8, ge=1)
    max_queue: int = Field(default=16, ge=1)


class Defaults(Batching):
    """What each category's application gets unless its own entry says otherwise."""

    autoscaling: Autoscaling = Autoscaling()
    num_cpus: float = Field(default=0.25, ge=0)
    num_gpus: float = Field(default=0.25, ge=0)

    @field_validator("num_gpus")
    @classmethod
    def _schedulable(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError("more than one GPU a replica must be a whole number")
        return value

    @property
    def batching(self) -> Batching:
        return Batching(**{name: getattr(self, name) for name in Batching.model_fields})


class HttpLimits(Settings):
    """What a request may be, before anything of it is decoded."""

    max_bytes: int = Field(default=20 * 2**20, gt=0)
    max_pixels: int = Field(default=40_000_000, gt=0)
    timeout_s: float = Field(default=30, gt=0)

    @property
    def image(self) -> ImageLimits:
        return ImageLimits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)


class ApiToken(Settings):
    """A caller's token, known by its hash only."""

    name: str = Field(min_length=1)
    sha256: Annotated[str, StringConstraints(to_lower=True, pattern=r"^[0-9A-Fa-f]{64}$")]


class Auth(Settings):
    """Who may ask; without tokens everyone who reaches the port."""

    tokens: tuple[ApiToken, ...] = ()


class Decision(Settings):
    """Where a category's threshold comes from, if not from its prompt set."""

    threshold: float | None = Field(default=None, ge=0, le=1)
    false_alarm_rate: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_source(self) -> "Decision":
        if self.threshold is not None and self.false_alarm_rate is not None:
            raise ValueError("give a threshold or a false_alarm_rate, not both")
        return self


class CategoryEntry(Decision):
    """One category of the fleet file."""

    alias: str = Field(default="champion", min_length=1)
    version: int | None = Field(default=None, ge=1)
    autoscaling: Autoscaling = Autoscaling()

    @model_validator(mode="after")
    def _one_reference(self) -> "CategoryEntry":
        if self.version is not None and "alias" in self.model_fields_set:
            raise ValueError("give an alias or a version, not both")
        return self

    @property
    def reference(self) -> str:
        """What the registry is asked for."""
        return self.alias if self.version is None else str(self.version)

    @property
    def decision(self) -> Decision:
        return Decision(threshold=self.threshold, false_alarm_rate=self.false_alarm_rate)


class Fleet(Settings):
    """A whole fleet file."""

    categories: Literal["all"] | dict[CategoryName, CategoryEntry] = "all"
    defaults: Defaults = Defaults()
    http: HttpLimits = HttpLimits()
    auth: Auth = Auth()

    @field_validator("categories", mode="before")
    @classmethod
    def _empty_entries(cls, value: Any) -> Any:
        """`bottle:` with nothing behind it means the same as `bottle: {}`."""
        if isinstance(value, dict):
            return {name: {} if entry is None else entry for name, entry in value.items()}
        return value

    @model_validator(mode="after")
    def _coherent(self) -> "Fleet":
        if not self.categories:
            raise ValueError("categories names none: name some, or write `categories: all`")
        entries = self.categories if isinstance(self.categories, dict) else {}
        bounds = {name: self.autoscaling(entry) for name, entry in entries.items()}
        for name, autoscaling in {"defaults": self.defaults.autoscaling, **bounds}.items():
            if autoscaling.min_replicas > autoscaling.max_replicas:
                raise ValueError(
                    f"{name}: min_replicas ({autoscaling.min_replicas}) is more than"
                    f" max_replicas ({autoscaling.max_replicas})"
                )
        return self

    def autoscaling(self, entry: CategoryEntry) -> Autoscaling:
        """The entry's autoscaling: the defaults with what it says of its own."""
        return self.defaults.autoscaling.overridden_by(entry.autoscaling)

    @classmethod
    def read(cls, path: Path) -> "Fleet":
        """The fleet file at `path`; FleetError names everything in it that is not accepted."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise FleetError(f"cannot read the fleet file {path}: {error}") from error
        try:
            return cls.parse({} if values is None else values)
        except SettingsError as error:
            raise FleetError(f"the fleet file {path} has {error}") from None
