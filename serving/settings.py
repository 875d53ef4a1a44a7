"""The fleet file: what is served, with what, to whom."""

import base64
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from apt_ray.config import CATEGORY_NAME, MAX_DAYS, OperatorThreshold, Settings
from apt_ray.data.feedback import FeedbackStore
from apt_ray.detection.drift import DriftSettings
from apt_ray.errors import DataError, FleetError, SettingsError
from apt_ray.images import ImageLimits
from apt_ray.settings_file import read_settings
from apt_ray.video.settings import WatchSettings
from serving.regions import mask_of_box, mask_of_png, mask_png

CategoryName = Annotated[str, StringConstraints(pattern=f"^{CATEGORY_NAME}$")]
PoolName = CategoryName
PathPrefix = Annotated[str, StringConstraints(pattern=r"^(/[A-Za-z0-9._~-]+)*$")]
Origin = Annotated[str, StringConstraints(to_lower=True, pattern=r"^https?://[A-Za-z0-9.:\[\]-]+$")]

ThresholdSource = Literal["prompt set", "fleet file", "operator"]
"""Who says what a threshold is; the later ones stand above the earlier."""

Runtime = Literal["auto", "torch", "openvino"]
"""What encodes images on CPUs."""

_WEB_ADDRESS = r"^https?://[^\s\"'<>]+$"


class Autoscaling(Settings):
    """Bounds and pace of one pool's replicas; the names are those of Ray Serve."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=4, ge=1)
    target_ongoing_requests: float = Field(default=4, gt=0)
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)
    downscale_to_zero_delay_s: float | None = Field(default=None, ge=0)

    def overridden_by(self, other: "Autoscaling") -> "Autoscaling":
        """These settings, but those that `other` was given explicitly from `other`."""
        return self.model_copy(
            update={name: getattr(other, name) for name in other.model_fields_set}
        )


class Batching(Settings):
    """How a replica gathers images for its forward passes."""

    threads: int = Field(default=1, ge=1)
    max_batch_size: int = Field(default=8, ge=1)
    runtime: Runtime = Field(
        default="auto",
        description="What encodes images on CPUs; auto is openvino where it gives the same"
        " features, and torch elsewhere.",
    )
    max_wait_s: float = Field(
        default=2, gt=0, description="How long an image may have to wait for its turn."
    )

    @model_validator(mode="before")
    @classmethod
    def _of_today(cls, value: Any) -> Any:
        """A number of images cannot be converted: how long they take is measured."""
        if isinstance(value, dict) and "max_queue" in value:
            raise ValueError(
                "max_queue is of 0.1: say instead how many seconds an image may wait for its turn,"
                " max_wait_s (default 2)"
            )
        return value


class PoolSettings(Batching):
    """One pool: replicas that hold one backbone and the prompt sets of all its categories."""

    autoscaling: Autoscaling = Autoscaling()
    num_cpus: float = Field(default=0.25, ge=0)
    num_gpus: float = Field(default=0.25, ge=0)

    def overridden_by(self, other: "PoolSettings") -> "PoolSettings":
        """These settings, but those that `other` was given explicitly from `other`."""
        given = {name: getattr(other, name) for name in other.model_fields_set}
        given["autoscaling"] = self.autoscaling.overridden_by(other.autoscaling)
        return self.model_copy(update=given)

    @property
    def batching(self) -> Batching:
        return Batching(**{name: getattr(self, name) for name in Batching.model_fields})


class StreamSettings(WatchSettings):
    """Streams of frames: what they may take, and how each is watched."""

    max_streams: int = Field(default=8, ge=0, description="At a time, of one replica; 0 for none.")
    max_s: float = Field(default=3600, gt=0, description="Seconds that one may last.")
    max_ahead_bytes: int = Field(
        default=64 * 2**20,
        gt=0,
        description="Of frames of one stream that came and are not inspected yet.",
    )


class HttpLimits(Settings):
    """What a request may be, before anything of it is decoded, and where it comes from."""

    max_bytes: int = Field(default=20 * 2**20, gt=0)
    max_pixels: int = Field(default=40_000_000, gt=0)
    max_images: int = Field(default=16, ge=1)
    timeout_s: float = Field(default=30, gt=0)
    streams: StreamSettings = StreamSettings()
    root_path: PathPrefix = Field(
        default="", description="What a web server before the fleet takes off the path."
    )
    allow_origins: tuple[Origin, ...] = Field(
        default=(), description="Whose web pages may ask: scheme and host, as browsers send them."
    )

    @property
    def image(self) -> ImageLimits:
        return ImageLimits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)


Scope = Annotated[
    str, StringConstraints(pattern=f"^(operate|(inspect|feedback)(:{CATEGORY_NAME})?)$")
]


class ApiToken(Settings):
    """A caller's token, known by its hash only.

    Its scopes say what it is good for: `inspect` for every category, `inspect:<category>` for one,
    `feedback` and `feedback:<category>` for saying what inspected parts really were, `operate` for
    the state of the fleet and for what changes it.
    """

    name: str = Field(pattern=r"^\P{Cc}+$", description="One line.")
    sha256: Annotated[str, StringConstraints(to_lower=True, pattern=r"^[0-9A-Fa-f]{64}$")]
    scopes: tuple[Scope, ...] = Field(default=("inspect",), min_length=1)


class Auth(Settings):
    """Who may ask; without tokens everyone who reaches the port."""

    tokens: tuple[ApiToken, ...] = ()


class RegistrySettings(Settings):
    """How the fleet follows the registry."""

    poll_s: float = Field(default=10, gt=0)
    cache: str = Field(default="~/.cache/apt-ray/fleet", min_length=1)
    page: str | None = Field(
        default=None,
        pattern=_WEB_ADDRESS,
        description="Address at which people's browsers reach the registry, for links to it.",
    )


class HistorySettings(Settings):
    """What each node keeps of the inspections of a category."""

    images: int = Field(default=0, ge=0, description="The last so many; 0 keeps none.")
    days: float = Field(default=30, gt=0, le=MAX_DAYS)
    folder: str = Field(default="~/.cache/apt-ray/history", min_length=1)


class CategoryShadow(Settings):
    """How a candidate is tried beside what serves, and what a promotion over HTTP asks of it."""

    share: float = Field(
        default=0, ge=0, le=1, description="Of the images, chosen by request id; 0 tries none."
    )
    required_images: int = Field(
        default=0, ge=0, description="On which both have to agree; 0 asks for nothing."
    )
    required_agreement: float = Field(
        default=0.99,
        ge=0,
        le=1,
        description="Share of the tried images on which they have to, where any are required.",
    )

    def overridden_by(self, other: "CategoryShadow | None") -> "CategoryShadow":
        """These settings, but those that `other` was given explicitly from `other`."""
        names = CategoryShadow.model_fields
        given = {name: getattr(other, name) for name in other.model_fields_set} if other else {}
        return CategoryShadow(**{name: getattr(self, name) for name in names} | given)


class ShadowSettings(CategoryShadow):
    """The same for the fleet."""

    images: int = Field(
        default=100,
        ge=0,
        description="Those on which both disagree, the last so many of a category on each node, in"
        " the history's folder; 0 keeps none.",
    )


class FeedbackSettings(Settings):
    """What is kept of what people say of inspected images, and when it may be used."""

    images: int = Field(default=1000, ge=1, description="Of a category.")
    mib: float = Field(default=1024, gt=0, description="Of a category's images.")
    days: float = Field(default=365, gt=0, le=MAX_DAYS)
    per_day: int = Field(default=200, ge=1, description="Of one caller and one category.")
    callers: int = Field(
        default=1, ge=1, description="How many must agree before an image may join the memory."
    )
    folder: str = Field(
        default="~/.cache/apt-ray/feedback",
        min_length=1,
        description="Local, or s3://bucket/prefix.",
    )

    def store(self) -> FeedbackStore:
        """What is kept there."""
        return FeedbackStore(
            self.folder,
            images=self.images,
            mib=self.mib,
            days=self.days,
            per_day=self.per_day,
        )


class RegionOfInterest(Settings):
    """The part of a category's images outside of which nothing counts.

    Either a box, as shares (0..1) of the image's width and height, or a mask: an image that is
    black where nothing counts, stretched over every image.
    """

    box: tuple[float, float, float, float] | None = Field(
        default=None, description="Left, top, width, height."
    )
    mask: str | None = Field(default=None, description="Path from the fleet file's folder.")
    mask_png: str | None = Field(
        default=None, description="The mask itself in base64; deploying puts it here."
    )

    @model_validator(mode="after")
    def _one_shape(self) -> "RegionOfInterest":
        if (self.box is None) == (self.mask is None and self.mask_png is None):
            raise ValueError("give a box or a mask")
        if self.box is not None:
            left, top, width, height = self.box
            inside = left >= 0 and top >= 0 and left + width <= 1 and top + height <= 1
            if not (inside and width > 0 and height > 0):
                raise ValueError(
                    "the box is [left, top, width, height], shares of the image (0..1)"
                )
        try:
            is_empty = self.mask is None and not self.mask_HW.any()
        except (OSError, ValueError) as error:
            raise ValueError(f"mask_png is not what deploying puts there ({error})") from None
        if is_empty:
            raise ValueError("the region of interest leaves nothing to count: make it larger")
        return self

    @property
    def mask_HW(self) -> NDArray[np.bool_]:
        """What counts, (H, W), stretched over every image; the file of `mask` must be read."""
        if self.box is not None:
            return mask_of_box(self.box)
        return mask_of_png(base64.b64decode(self.mask_png or ""))

    @property
    def share(self) -> float:
        """The share of an image that counts, above 0 and up to 1."""
        return float(self.mask_HW.mean())

    def with_mask_read(self, folder: Path) -> "RegionOfInterest":
        """The same with the content of the mask's file in it. Raises DataError."""
        if self.mask is None:
            return self
        data = mask_png(folder / self.mask)
        return RegionOfInterest(mask_png=base64.b64encode(data).decode())


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
    pool: PoolName | None = None
    autoscaling: Autoscaling = Autoscaling()
    region_of_interest: RegionOfInterest | None = None
    shadow: CategoryShadow | None = None

    @model_validator(mode="after")
    def _coherent_entry(self) -> "CategoryEntry":
        if self.version is not None and "alias" in self.model_fields_set:
            raise ValueError("give an alias or a version, not both")
        if self.pool is not None and self.autoscaling.model_fields_set:
            raise ValueError("a shared pool scales as a whole: give autoscaling under pools")
        return self

    @property
    def reference(self) -> str:
        """What the registry is asked for."""
        return self.alias if self.version is None else str(self.version)

    @property
    def decision(self) -> Decision:
        return Decision(threshold=self.threshold, false_alarm_rate=self.false_alarm_rate)

    def decided(self, operator: OperatorThreshold | None) -> tuple[Decision, ThresholdSource]:
        """How its images are decided, and who says so: an operator's threshold stands above the
        fleet file's, and that above the version's."""
        if operator is not None and operator.value is not None:
            return Decision(threshold=operator.value), "operator"
        return self.decision, "prompt set" if self.decision == Decision() else "fleet file"


Categories = Annotated[
    Annotated[Literal["all"], Tag("[all]")]
    | Annotated[dict[CategoryName, CategoryEntry], Tag("[named]")],
    # So that what is wrong with one is not told as what is wrong with the other.
    Discriminator(lambda value: "[all]" if isinstance(value, str) else "[named]"),
]


class SearchSettings(Settings):
    """Searches that are started over HTTP, and the images that are sent for them."""

    folder: str = Field(default="~/.cache/apt-ray/searches", min_length=1)
    max_images: int = Field(default=200, ge=1)
    dashboard: str | None = Field(
        default=None,
        pattern=_WEB_ADDRESS,
        description="Address at which people's browsers reach Ray's dashboard, for links to jobs.",
    )


class Fleet(Settings):
    """A whole fleet file."""

    categories: Categories = "all"
    defaults: PoolSettings = PoolSettings()
    pools: dict[PoolName, PoolSettings] = Field(default_factory=dict)
    pool: PoolName | None = None
    http: HttpLimits = HttpLimits()
    registry: RegistrySettings = RegistrySettings()
    history: HistorySettings = HistorySettings()
    feedback: FeedbackSettings | None = FeedbackSettings()
    searches: SearchSettings | None = SearchSettings()
    drift: DriftSettings | None = DriftSettings()
    shadow: ShadowSettings = ShadowSettings()
    auth: Auth = Auth()

    @field_validator("categories", "pools", mode="before")
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
        wanted = {"pool": self.pool} | {name: entry.pool for name, entry in entries.items()}
        for name, pool in wanted.items():
            if pool is not None and pool not in self.pools and pool != name:
                raise ValueError(f"{name}: there is no pool {pool!r} under pools")
        for pool in self.pools:
            if pool in entries and self.pool_of(pool, entries[pool]) != pool:
                raise ValueError(
                    f"{pool} is a pool and a category of another pool: rename the pool"
                )
        settings = {name: self.own_pool(entry) for name, entry in entries.items()}
        settings |= {name: self.shared_pool(name) for name in self.pools}
        for name, each in {"defaults": self.defaults, **settings}.items():
            bounds, gpus = each.autoscaling, each.num_gpus
            if bounds.min_replicas > bounds.max_replicas:
                raise ValueError(
                    f"{name}: min_replicas ({bounds.min_replicas}) is more than"
                    f" max_replicas ({bounds.max_replicas})"
                )
            if gpus > 1 and gpus != int(gpus):
                raise ValueError(f"{name}: num_gpus above 1 must be a whole number (got {gpus:g})")
        return self

    def pool_of(self, category: str, entry: CategoryEntry) -> str:
        """The pool that serves a category; one that it does not share is named after it."""
        return entry.pool or self.pool or category

    def own_pool(self, entry: CategoryEntry) -> PoolSettings:
        """The settings of a category's own pool."""
        return self.defaults.overridden_by(PoolSettings(autoscaling=entry.autoscaling))

    def shared_pool(self, name: str) -> PoolSettings:
        """The settings of a pool of the fleet file."""
        return self.defaults.overridden_by(self.pools[name])

    @classmethod
    def read(cls, path: Path) -> "Fleet":
        """The fleet file at `path`, with the masks that it names read.

        Raises FleetError, which names everything in it that is not accepted.
        """
        try:
            values = read_settings(path, "fleet file")
        except SettingsError as error:
            raise FleetError(str(error)) from None
        try:
            return cls.parse({} if values is None else values)._with_masks_read(path.parent)
        except SettingsError as error:
            raise FleetError(f"the fleet file {path} has {error}") from None
        except DataError as error:
            raise FleetError(f"the fleet file {path}: {error}") from None

    def _with_masks_read(self, folder: Path) -> "Fleet":
        if not isinstance(self.categories, dict):
            return self
        entries = {
            name: entry.model_copy(
                update={"region_of_interest": entry.region_of_interest.with_mask_read(folder)}
            )
            if entry.region_of_interest
            else entry
            for name, entry in self.categories.items()
        }
        return self.model_copy(update={"categories": entries})
