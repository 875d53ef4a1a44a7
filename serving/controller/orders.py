"""What passes between the controller, the replicas and the root.

A *plan* is the controller's part of Serve's configuration: who serves what, without versions.
*Orders* are what one pool shall serve now, versions included. *Reports* come back.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from apt_ray.config import Settings
from serving.controller.activity import Activity, Counts
from serving.controller.drift import DriftReport, DriftReset, DriftStatus
from serving.controller.shadow import ShadowOrder, ShadowReport, ShadowStatus
from serving.settings import (
    Auth,
    CategoryEntry,
    CategoryName,
    CategoryShadow,
    Decision,
    PoolName,
    RegionOfInterest,
    ThresholdSource,
)

State = Literal["READY", "LOADING", "IDLE", "FAILED"]
Newcomers = Literal["served", "deploy", "name"]
"""What lets a category be served that gets its first champion after the deploy: nothing, it is
`served` at once; the next `deploy`; or its `name` in the fleet file, and a deploy."""


class Message(Settings):
    """Passes between processes, one of which may run an earlier version than the other."""

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """What the sender did not know has its default."""
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            if name not in self.__dict__ and not field.is_required():
                self.__dict__[name] = field.get_default(call_default_factory=True)


class Plan(Settings):
    """Who serves what, and who may ask: the state that a deploy changes.

    A category that moves is in two pools for a while.
    """

    revision: int = Field(default=0, description="One more for every deploy.")
    deployed_by: str = ""
    pools: dict[PoolName, dict[CategoryName, CategoryEntry]] = Field(default_factory=dict)
    auth: Auth = Auth()
    names_all: bool = Field(
        default=False, description="Whether the fleet file says `categories: all`."
    )
    joined: PoolName | None = Field(
        default=None,
        description="The pool of this plan that then serves whatever category gets a champion.",
    )
    shadow: CategoryShadow = Field(
        default=CategoryShadow(), description="Of the categories that have none of their own."
    )

    def to_config(self) -> dict[str, Any]:
        """Plain values that say no more than they must: a thousand categories stay readable."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def newcomers(self) -> Newcomers:
        if not self.names_all:
            return "name"
        return "served" if self.joined in self.pools else "deploy"

    def joined_by(self, categories: Iterable[CategoryName]) -> "Plan":
        """The same with those of these categories that it does not serve, where it takes any."""
        if self.joined is None or self.joined not in self.pools:
            return self
        known = {category for category, _, _ in self.places()}
        new = {name: CategoryEntry() for name in sorted(categories) if name not in known}
        if not new:
            return self
        pools = {**self.pools, self.joined: {**self.pools[self.joined], **new}}
        return self.model_copy(update={"pools": pools})

    def places(self) -> Iterator[tuple[CategoryName, PoolName, CategoryEntry]]:
        """Every category in every pool that shall serve it."""
        for pool, entries in self.pools.items():
            for category, entry in entries.items():
                yield category, pool, entry


class Order(Message):
    """One category as a pool shall serve it."""

    version: int | None = Field(description="Null: the one that it serves, for want of news.")
    decision: Decision = Decision()
    by_operator: bool = Field(
        default=False, description="Whether the decision is an operator's, not the fleet file's."
    )
    region_of_interest: RegionOfInterest | None = None


class Orders(Message):
    """All that one pool shall serve."""

    categories: dict[CategoryName, Order] = Field(default_factory=dict)
    auth: Auth = Auth()
    drift_resets: dict[CategoryName, DriftReset] = Field(default_factory=dict)
    shadows: dict[CategoryName, ShadowOrder] = Field(default_factory=dict)

    @property
    def etag(self) -> str:
        """Changes with the content."""
        return digest(self)


class Routes(Message):
    """All that the root needs: category -> the pools that may be asked."""

    pools: dict[CategoryName, tuple[PoolName, ...]] = Field(default_factory=dict)
    auth: Auth = Auth()

    @property
    def etag(self) -> str:
        return digest(self)


class ServedVersion(Message):
    """What a replica does for one category."""

    version: int | None = Field(description="What it serves; null if nothing.")
    source: Literal["registry", "cache"] | None = Field(
        default=None, description="Where it was loaded from; `cache` means the registry was away."
    )
    problem: str | None = Field(default=None, description="Why it does not do as ordered.")
    threshold: float | None = Field(default=None, description="By which it decides now.")


class ReplicaReport(Message):
    """What a replica serves now."""

    orders: str = Field(default="", description="Etag of the orders that it has carried out.")
    followed: bool = Field(default=True, description="False while it runs from its cache alone.")
    categories: dict[CategoryName, ServedVersion] = Field(default_factory=dict)
    last_hour: dict[CategoryName, Counts] = Field(
        default_factory=dict, description="Of the categories with traffic."
    )
    drift: dict[CategoryName, DriftReport] = Field(default_factory=dict)
    shadows: dict[CategoryName, ShadowReport] = Field(default_factory=dict)


class CategoryStatus(Message):
    """One category as the whole fleet serves it."""

    state: State
    pools: tuple[PoolName, ...]
    wanted: int | None = Field(description="The registry's version; null if there is none.")
    serving: tuple[int, ...] = Field(description="Versions that replicas serve.")
    replicas: int = Field(description="How many replicas serve it.")
    from_cache: bool = Field(description="Whether a replica serves it without the registry.")
    counted_share: float = Field(
        default=1.0,
        description="Share of an image that counts; below 1 with a region of interest.",
    )
    candidate: int | None = Field(
        default=None,
        description="The registry's candidate where it is newer than what is wanted: it waits to be"
        " promoted or discarded.",
    )
    threshold: float | None = Field(
        default=None,
        description="The anomaly score above which a part is anomalous, by what serves now.",
    )
    last_hour: Activity | None = Field(
        default=None,
        description="What its images came to, by the minute; null without any. Replicas keep it in"
        " memory and tell it every 10 s: one that ends takes its hour along.",
    )
    threshold_source: ThresholdSource = Field(
        default="prompt set", description="Who says what its threshold is."
    )
    drift: DriftStatus | None = Field(
        default=None,
        description="Whether its images and scores are still what they were; null without traffic,"
        " or where the fleet file turns it off.",
    )
    shadow: ShadowStatus | None = Field(
        default=None,
        description="What the candidate makes of the same images; null where none is tried.",
    )
    problem: str | None = None
    failing: tuple[PoolName, ...] = Field(
        default=(), description="Those of its pools that cannot serve it as they are told."
    )


class FleetStatus(Message):
    """The state of the fleet as its controller knows it."""

    revision: int
    deployed_by: str
    registry: str = Field(description="`ok`, or why the registry does not answer.")
    polled_s_ago: float | None = Field(description="Since the registry last answered.")
    newcomers: Newcomers = Field(
        default="name",
        description="What lets a category be served that gets its first champion: nothing, it is"
        " `served` at once; the next `deploy` of the fleet file; or its `name` in that file, and a"
        " deploy.",
    )
    categories: dict[CategoryName, CategoryStatus]


class CategoryThreshold(Settings):
    """Who says what the threshold of a category is, and what an operator decided last."""

    category: CategoryName
    source: ThresholdSource
    threshold: float | None = Field(
        description="The one that holds; null where it is the prompt set's, or by a false-alarm"
        " rate: `GET /v1/<category>` tells."
    )
    reason: str = Field(default="", description="Why an operator set it, or took it back.")
    by: str = Field(default="", description="The name of that operator's token.")
    at: str | None = Field(default=None, description="When, ISO 8601, UTC.")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredVersion:
    """A version of a prompt set on its way from the registry to a replica."""

    category: str
    version: int
    run_id: str
    data: bytes


def pair_of(order: Order, candidate: int) -> str:
    """Names what serves and who is tried beside it: whatever changes a verdict changes the name."""
    return f"{candidate}-{digest(order)}"


def digest(settings: Settings) -> str:
    return hashlib.sha256(settings.model_dump_json().encode()).hexdigest()[:16]
