"""The controller: the one process of the fleet that speaks to the registry.

It asks for all aliases in one query per interval, or at once when it is woken, and tells each pool
which version of which category to serve. Replicas and the root wait at `follow` and `routes` until
something changes. It can lose whatever it knows: Serve hands a new one its plan, the replicas
report again, and the last aliases lie in the local cache, as does what candidates were found to do.
"""

import asyncio
import re
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from apt_ray.config import CATEGORY_NAME, OperatorThreshold, Settings
from apt_ray.errors import AptError, RegistryConflictError, RegistryUnavailableError
from serving.controller.activity import Counts, summed
from serving.controller.cache import Cache
from serving.controller.drift import DriftReport, Drifts, DriftsCleared
from serving.controller.moves import (
    NEED_A_BACKBONE,
    MoveOrder,
    MoveResult,
    Operation,
    VersionSummary,
    carry_out,
    versions_of,
)
from serving.controller.orders import (
    CategoryStatus,
    CategoryThreshold,
    FleetStatus,
    Order,
    Orders,
    Plan,
    ReplicaReport,
    Routes,
    State,
    StoredVersion,
    pair_of,
)
from serving.controller.shadow import (
    KeptShadows,
    ShadowOrder,
    ShadowReport,
    Shadows,
    ShadowStatus,
)
from serving.controller.version_pictures import VersionPictures
from serving.logs import audit
from serving.settings import CategoryEntry, Decision, FeedbackSettings, ThresholdSource

if TYPE_CHECKING:
    from apt_ray.registry import Registry

WAIT_S = 10.0
"""The longest that `follow` and `routes` wait; a replica is heard of at least this often."""

_LOST_AFTER_S = 2.5 * WAIT_S
_AUDIT_LINES = 200
_OPERATIONS = 200
_CANDIDATE = "candidate"
_CHAMPION = "champion"

Found = TypeVar("Found", Orders, Routes)


class Aliases(Settings):
    """What the registry says: category -> alias -> version, and what operators decided."""

    categories: dict[str, dict[str, int]] = Field(default_factory=dict)
    thresholds: dict[str, OperatorThreshold] = Field(default_factory=dict)


class Controller:
    """Decides what every pool serves.

    Args:
        registry: opens the registry; called in threads, since importing MLflow takes seconds.
        cache: what is known when the registry is away.
        poll_s: seconds between two queries.
        page: the registry's address for people, if it has one.
        promoting: does elsewhere what takes minutes of a core; None does it here.
        feedback: where it lies, if the fleet takes any.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        registry: "Callable[[], Registry]",
        cache: Cache,
        *,
        poll_s: float,
        page: str | None = None,
        promoting: Callable[[MoveOrder], Awaitable[MoveResult]] | None = None,
        feedback: FeedbackSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open_registry = registry
        self._pictures = VersionPictures(registry)
        self._cache = cache
        self._poll_s = poll_s
        self._page = page
        self._promoting = promoting
        self._feedback = feedback
        self._clock = clock
        self._deployed = Plan()
        self._plan = Plan()  # with the categories that came after the deploy
        self._aliases = cache.recall("aliases", Aliases) or Aliases()
        self._registry = "not asked yet"
        self._polled_at: float | None = None
        self._reports: dict[tuple[str, str], tuple[float, ReplicaReport]] = {}
        self._polling = asyncio.Lock()
        self._changed = asyncio.Condition()
        self._woken = asyncio.Event()
        self._asked = asyncio.Event()
        self._audit: deque[dict[str, object]] = deque(maxlen=_AUDIT_LINES)
        self._operations: dict[str, Operation] = {}
        self._drifts = Drifts()
        self._shadows = Shadows(cache.recall("shadows", KeptShadows))
        self._kept_shadows = self._shadows.kept
        self._moving: set[asyncio.Task[None]] = set()

    async def plan(self, plan: Plan) -> None:
        """Follow this plan from now on."""
        if plan.revision != self._deployed.revision:
            before, after = _places(self._deployed), _places(plan)
            self._note(
                "deploy",
                revision=plan.revision,
                by=plan.deployed_by,
                added=sorted(set(after) - set(before)),
                removed=sorted(set(before) - set(after)),
                changed=sorted(n for n in set(before) & set(after) if before[n] != after[n]),
                tokens=[token.name for token in plan.auth.tokens],
            )
        self._deployed = plan
        self._take_in()
        self._follow_candidates()
        self._woken.set()
        await self._announce()

    async def poll_forever(self) -> None:
        """Ask the registry again and again; ends only by being cancelled."""
        while True:
            self._woken.clear()
            await self.poll()
            self._asked.set()
            try:
                await asyncio.wait_for(self._woken.wait(), self._poll_s)
            except asyncio.TimeoutError:
                continue

    async def poll(self) -> None:
        """Ask the registry once. Without an answer, what it last said stays true."""
        async with self._polling:  # or an older answer could come after a newer one
            await self._poll()
            if (shadows := self._shadows.kept) != self._kept_shadows:
                await asyncio.to_thread(self._cache.remember, "shadows", shadows)
                self._kept_shadows = shadows

    async def _poll(self) -> None:
        try:
            found = await asyncio.to_thread(lambda: self._open_registry().categories())
        except AptError as error:
            if self._registry != str(error):
                self._note("registry away", reason=str(error))
            self._registry = str(error)
            return
        except Exception as error:
            self._registry = f"the registry cannot be asked: {error!r}"
            return
        if self._registry != "ok":
            self._note("registry answers", categories=len(found))
        self._registry, self._polled_at = "ok", self._clock()
        news = Aliases(
            categories={name: dict(category.aliases) for name, category in found.items()},
            thresholds={
                name: category.threshold for name, category in found.items() if category.threshold
            },
        )
        if news != self._aliases:
            self._note_moves(news)
            self._aliases = news
            self._take_in()
            self._follow_candidates()
            await asyncio.to_thread(self._cache.remember, "aliases", self._aliases)
            await self._announce()

    def _take_in(self) -> None:
        """Let whatever has a champion be served, where the fleet file says so."""
        before = {category for category, _, _ in self._plan.places()}
        self._plan = self._deployed.joined_by(
            name
            for name, aliases in self._aliases.categories.items()
            if _CHAMPION in aliases and re.fullmatch(CATEGORY_NAME, name)
        )
        deployed = {category for category, _, _ in self._deployed.places()}
        for category, pool, _ in self._plan.places():
            if category not in before | deployed:
                self._note("joined", category=category, pool=pool)

    def _follow_candidates(self) -> None:
        """Let replicas try the candidates that wait, where the fleet file says so."""
        orders = {
            category: order
            for category, _, entry in reversed(list(self._plan.places()))
            if (order := self._shadow_order(category, entry))
        }
        begun, ended = self._shadows.follow(orders)
        for category, found in ended.items():
            numbers = found.model_dump(exclude={"problem"}, exclude_none=True)
            self._note("shadow ends", category=category, **numbers)
        for category in begun:
            tried = orders[category].model_dump(exclude={"pair"})
            self._note("shadow begins", category=category, **tried)

    async def shadow(self, category: str) -> ShadowStatus | None:
        """What the candidate of a category makes of the same images; None where none is tried."""
        live = self._live_reports().values()
        return self._shadows.status(
            category, [report.shadows[category] for report in live if category in report.shadows]
        )

    async def wake(self, reason: str) -> None:
        """Ask the registry now instead of at the end of the interval."""
        self._note("wake", reason=reason)
        self._woken.set()

    async def threshold(self, category: str) -> CategoryThreshold:
        """Who says what the threshold of a category of the plan is."""
        entry = next(entry for name, _, entry in self._plan.places() if name == category)
        decision, source = self._decision(category, entry)
        said = self._aliases.thresholds.get(category)
        return CategoryThreshold(
            category=category,
            source=source,
            threshold=decision.threshold,
            reason=said.reason if said else "",
            by=said.by if said else "",
            at=said.at if said else None,
        )

    async def set_threshold(
        self, category: str, value: float | None, *, reason: str, by: str
    ) -> CategoryThreshold:
        """Keep an operator's decision in the registry, for all to follow; None takes back what was
        decided. Raises RegistryError."""
        said = OperatorThreshold(
            value=value,
            reason=reason,
            by=by,
            at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        await asyncio.to_thread(lambda: self._open_registry().set_threshold(category, said))
        self._note("threshold", category=category, value=value, reason=reason, by=by)
        await self.poll()
        return await self.threshold(category)

    async def reset_drift(
        self, category: str, *, anew: bool, reason: str, by: str
    ) -> DriftsCleared:
        """Take back the alarms of a category; replicas compare, or learn anew, from now on."""
        cleared = self._drifts.reset(category, anew=anew)
        self._note("drift reset", **cleared.model_dump(), reason=reason, by=by)
        await self._announce()
        return cleared

    async def follow(
        self, pool: str, replica: str, report: ReplicaReport, *, wait_s: float = WAIT_S
    ) -> Orders:
        """What `pool` shall serve, once it differs from `report.orders` or `wait_s` have passed."""
        await self._asked.wait()  # or the first orders of all would name no versions
        key = (pool, replica)
        known = self._reports.get(key)
        self._note_swaps(pool, replica, known[1] if known else ReplicaReport(), report)
        self._note_drift(pool, replica, report)
        for category, shadow in report.shadows.items():
            self._shadows.hear(category, shadow)
        self._reports[key] = (self._clock(), report)
        orders = await self._until(lambda: self._orders(pool), report.orders, wait_s)
        self._reports[key] = (self._clock(), report)
        return orders

    async def routes(self, known: str, *, wait_s: float = WAIT_S) -> Routes:
        """Where to ask for what, once it differs from `known` or `wait_s` have passed."""
        return await self._until(self._routes, known, wait_s)

    async def resolve(self, category: str, alias: str) -> int | None:
        """The version behind an alias of a category, None if there is none.

        Raises RegistryUnavailableError if the registry has not said yet.
        """
        if self._registry != "ok" and category not in self._aliases.categories:
            raise RegistryUnavailableError(self._registry)
        return self._aliases.categories.get(category, {}).get(alias)

    async def fetch(self, category: str, version: int) -> StoredVersion:
        """A version's prompt set, from the cache or the registry. Raises RegistryError."""
        stored = await asyncio.to_thread(self._cache.get, category, version)
        if stored is None:
            stored = await asyncio.to_thread(self._load, category, version)
            # What is only tried must not push out of the cache what serves.
            if version in self._wanted(category):
                await asyncio.to_thread(self._cache.put, stored)
        return stored

    async def move(self, order: MoveOrder) -> Operation:
        """Begin to move an alias of a category; `operation` tells what comes of it.

        RegistryConflictError while another move of the category is being made, NotTriedEnoughError
        if the candidate has not shown what its promotion asks for.
        """
        for other in self._operations.values():
            if other.category == order.category and other.state == "running":
                raise RegistryConflictError(
                    f"{other.by or 'somebody'} asked to {other.kind} {other.category} at"
                    f" {other.started}, which is not done yet: wait for operation {other.id}"
                )
        if order.kind == "promote" and not order.force:
            order = self._tried(order)
        operation = Operation(
            id=uuid.uuid4().hex,
            started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **order.model_dump(include=set(Operation.model_fields)),
        )
        while len(self._operations) >= _OPERATIONS:
            del self._operations[next(iter(self._operations))]
        self._operations[operation.id] = operation
        self._note(**self._line_of(operation))
        task = asyncio.create_task(self._carry_out(operation, order))
        self._moving.add(task)
        task.add_done_callback(self._moving.discard)
        return operation

    def _tried(self, order: MoveOrder) -> MoveOrder:
        """A promotion of the very version that has shown what is asked for.

        Raises NotTriedEnoughError. The first version of a category has nothing to agree with.
        """
        category = order.category
        entry = next((entry for name, _, entry in self._plan.places() if name == category), None)
        said = (entry and entry.shadow) or self._plan.shadow
        # Whoever asks may ask for more than the fleet file does; for less takes force.
        images = max(said.required_images, order.required_images or 0)
        agreement = said.required_agreement
        if order.required_agreement is not None:
            least = agreement if said.required_images else 0
            agreement = max(order.required_agreement, least)
        aliases = self._aliases.categories.get(category, {})
        champion = self._version(category, entry) if entry else aliases.get(_CHAMPION)
        candidate = aliases.get(_CANDIDATE)
        if not images or champion is None or candidate is None or candidate == champion:
            return order
        self._shadows.require(
            category, images=images, agreement=agreement, champion=champion, candidate=candidate
        )
        return order.model_copy(update={"version": candidate})

    async def operation(self, identifier: str) -> Operation | None:
        """A move that was begun; None if this controller has begun none of that id."""
        return self._operations.get(identifier)

    async def versions(self, category: str, limit: int) -> list[VersionSummary]:
        """The newest versions of a category, newest first. Raises RegistryError."""
        return await asyncio.to_thread(
            lambda: versions_of(self._open_registry(), category, limit=limit, page=self._page)
        )

    async def pictures(self, category: str, version: int) -> tuple[str, ...] | None:
        """The names of a version's pictures; None of an unknown version. Raises RegistryError."""
        found = await self._pictures.of(category, version)
        return None if found is None else tuple(found)

    async def picture(self, category: str, version: int, name: str) -> bytes | None:
        """One of them, a PNG file; None if there is none of that name. Raises RegistryError."""
        found = await self._pictures.of(category, version)
        return (found or {}).get(name)

    async def _carry_out(self, operation: Operation, order: MoveOrder) -> None:
        end: dict[str, object]
        try:
            if order.kind in NEED_A_BACKBONE and self._promoting is not None:
                result = await self._promoting(order)
            else:
                result = await asyncio.to_thread(
                    lambda: carry_out(self._open_registry(), order, feedback=self._feedback)
                )
            end = {"state": "done", "result": result}
        except Exception as error:
            end = {
                "state": "failed",
                "error": str(error) if isinstance(error, AptError) else repr(error),
            }
        ended = operation.model_copy(update=end)
        if operation.id in self._operations:
            self._operations[operation.id] = ended
        self._note(**self._line_of(ended))
        self._woken.set()

    def _line_of(self, operation: Operation) -> dict[str, Any]:
        line = operation.model_dump(exclude={"kind", "id", "started", "result"}, exclude_none=True)
        result = operation.result
        return {
            "operation": operation.kind,
            "operation_id": operation.id,
            **line,
            **(result.model_dump(include={"moved", "version", "verdict", "why"}) if result else {}),
        }

    async def status(self) -> FleetStatus:
        """Everything at a glance."""
        reports: dict[str, list[ReplicaReport]] = {pool: [] for pool in self._plan.pools}
        hours: dict[str, list[Counts]] = {}
        drifts: dict[str, list[DriftReport]] = {}
        shadows: dict[str, list[ShadowReport]] = {}
        for (pool, _), report in self._live_reports().items():
            reports[pool].append(report)
            for category, counts in report.last_hour.items():
                hours.setdefault(category, []).append(counts)
            for category, drift in report.drift.items():
                drifts.setdefault(category, []).append(drift)
            for category, shadow in report.shadows.items():
                shadows.setdefault(category, []).append(shadow)
        etags = {pool: self._orders(pool).etag for pool in self._plan.pools}
        pools: dict[str, tuple[str, ...]] = {}
        for category, pool, _ in self._plan.places():
            pools[category] = (*pools.get(category, ()), pool)
        return FleetStatus(
            revision=self._plan.revision,
            deployed_by=self._plan.deployed_by,
            registry=self._registry,
            polled_s_ago=None if self._polled_at is None else self._clock() - self._polled_at,
            newcomers=self._plan.newcomers,
            categories={
                category: self._status_of(
                    category,
                    pools[category],
                    reports,
                    etags,
                    hours.get(category, []),
                    drifts.get(category, []),
                    shadows.get(category, []),
                )
                for category in sorted(pools)
            },
        )

    async def audit_lines(self) -> list[dict[str, object]]:
        """The last operations, oldest first."""
        return list(self._audit)

    def _load(self, category: str, version: int) -> StoredVersion:
        prompt_set, registered = self._open_registry().load(category, str(version))
        return StoredVersion(
            category=category,
            version=registered.version,
            run_id=registered.run_id,
            data=prompt_set.to_bytes(),
        )

    def _status_of(
        self,
        category: str,
        pools: tuple[str, ...],
        reports: dict[str, list[ReplicaReport]],
        etags: dict[str, str],
        hours: list[Counts],
        drifts: list[DriftReport],
        shadows: list[ShadowReport],
    ) -> CategoryStatus:
        # Every replica of every pool that shall serve it counts: only then may one pool go.
        expected = [
            (pool, report.orders, report.categories.get(category))
            for pool in pools
            for report in reports[pool]
        ]
        serving = [served for _, _, served in expected if served is not None]
        versions = {served.version for served in serving if served.version is not None}
        entry = self._plan.pools[pools[0]][category]
        wanted = self._version(category, entry)
        # A problem with earlier orders may be none with these.
        problems = {
            pool: served.problem
            for pool, orders, served in expected
            if served and served.problem and orders == etags[pool]
        }
        if wanted is None:
            problems = dict.fromkeys(pools, self._why_no_version(category, entry))
        is_late = any(
            served is None or served.problem or served.version != wanted
            for pool, _, served in expected
            if pool not in problems
        )
        state: State = "LOADING" if is_late else "READY" if expected else "IDLE"
        if problems and not is_late:
            state = "FAILED"
        return CategoryStatus(
            state=state,
            pools=pools,
            wanted=wanted,
            serving=tuple(sorted(versions)),
            replicas=sum(served.version is not None for served in serving),
            from_cache=any(served.source == "cache" for served in serving),
            counted_share=entry.region_of_interest.share if entry.region_of_interest else 1.0,
            candidate=self._candidate(category, wanted),
            threshold=next(
                (
                    served.threshold
                    for served in sorted(serving, key=lambda served: -(served.version or 0))
                    if served.threshold is not None
                ),
                None,
            ),
            last_hour=summed(hours),
            threshold_source=self._decision(category, entry)[1],
            drift=self._drifts.status(category, versions, drifts),
            shadow=self._shadows.status(category, shadows),
            problem=next(iter(problems.values()), None),
            failing=tuple(sorted(problems)),
        )

    def _version(self, category: str, entry: CategoryEntry) -> int | None:
        if entry.version is not None:
            return entry.version
        return self._aliases.categories.get(category, {}).get(entry.alias)

    def _wanted(self, category: str) -> set[int | None]:
        """The versions of a category that pools shall serve."""
        entries = (pool.get(category) for pool in self._plan.pools.values())
        return {self._version(category, entry) for entry in entries if entry is not None}

    def _candidate(self, category: str, wanted: int | None) -> int | None:
        """The candidate that waits."""
        candidate = self._aliases.categories.get(category, {}).get(_CANDIDATE)
        return candidate if candidate is not None and candidate > (wanted or 0) else None

    def _decision(self, category: str, entry: CategoryEntry) -> tuple[Decision, ThresholdSource]:
        """How a category is decided, and who says so."""
        return entry.decided(self._aliases.thresholds.get(category))

    def _why_no_version(self, category: str, entry: CategoryEntry) -> str:
        if self._registry != "ok":
            return self._registry
        known = self._aliases.categories.get(category)
        if known is None:
            return f"the registry has no category {category!r}: tune it, or drop it from the fleet"
        return (
            f"the registry has no alias {entry.alias!r} for {category}; it has"
            f" {', '.join(known) or 'none'}: set one, or name another in the fleet file"
        )

    def _order(self, category: str, entry: CategoryEntry) -> Order:
        decision, source = self._decision(category, entry)
        return Order(
            version=self._version(category, entry),
            decision=decision,
            by_operator=source == "operator",
            region_of_interest=entry.region_of_interest,
        )

    def _shadow_order(self, category: str, entry: CategoryEntry) -> ShadowOrder | None:
        """The candidate to be tried; None where none waits, or none shall be tried."""
        share = (entry.shadow or self._plan.shadow).share
        order = self._order(category, entry)
        candidate = self._candidate(category, order.version)
        if not share or order.version is None or candidate is None:
            return None
        return ShadowOrder(
            champion=order.version,
            candidate=candidate,
            share=share,
            pair=pair_of(order, candidate),
        )

    def _orders(self, pool: str) -> Orders:
        return Orders(
            categories={
                category: self._order(category, entry)
                for category, entry in self._plan.pools.get(pool, {}).items()
            },
            auth=self._plan.auth,
            drift_resets={
                category: reset
                for category, reset in self._drifts.resets.items()
                if category in self._plan.pools.get(pool, {})
            },
            shadows={
                category: order
                for category, entry in self._plan.pools.get(pool, {}).items()
                if (order := self._shadow_order(category, entry))
            },
        )

    def _routes(self) -> Routes:
        pools: dict[str, tuple[str, ...]] = {}
        for category, pool, _ in self._plan.places():
            # A category that moves is asked for at the pool that it shares: its own has a way of
            # its own in.
            others = pools.get(category, ())
            pools[category] = (*others, pool) if pool == category else (pool, *others)
        return Routes(pools=pools, auth=self._plan.auth)

    async def _until(self, current: Callable[[], Found], known: str, wait_s: float) -> Found:
        """`current()` once its etag is not `known`, or after `wait_s`."""
        deadline = self._clock() + wait_s
        async with self._changed:
            while (now := current()).etag == known and (left := deadline - self._clock()) > 0:
                try:
                    await asyncio.wait_for(self._changed.wait(), left)
                except asyncio.TimeoutError:
                    break
        return now

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _live_reports(self) -> dict[tuple[str, str], ReplicaReport]:
        now = self._clock()
        self._reports = {
            key: (heard_at, report)
            for key, (heard_at, report) in self._reports.items()
            if now - heard_at < _LOST_AFTER_S and key[0] in self._plan.pools
        }
        return {key: report for key, (_, report) in self._reports.items()}

    def _note(self, operation: str, **fields: object) -> None:
        self._audit.append(audit(operation, **fields))

    def _note_moves(self, news: Aliases) -> None:
        for category, _, entry in self._plan.places():
            if (said := news.thresholds.get(category)) != self._aliases.thresholds.get(category):
                self._note(
                    "threshold follows",
                    category=category,
                    decision=said.model_dump() if said else None,
                )
            before = self._version(category, entry)
            after = news.categories.get(category, {}).get(entry.alias)
            if entry.version is None and before != after:
                self._note(
                    "alias moved", category=category, alias=entry.alias, before=before, after=after
                )

    def _note_drift(self, pool: str, replica: str, report: ReplicaReport) -> None:
        for category, drift in report.drift.items():
            for alarm in self._drifts.hear(category, drift):
                self._note(
                    "drift",
                    category=category,
                    version=drift.version,
                    pool=pool,
                    replica=replica,
                    **alarm.model_dump(exclude={"at"}),
                )

    def _note_swaps(
        self, pool: str, replica: str, before: ReplicaReport, after: ReplicaReport
    ) -> None:
        if before.categories == after.categories:
            return
        for category in sorted(set(before.categories) | set(after.categories)):
            old, new = before.categories.get(category), after.categories.get(category)
            if old == new:
                continue
            self._note(
                "serve",
                pool=pool,
                replica=replica,
                category=category,
                before=old.version if old else None,
                after=new.version if new else None,
                problem=new.problem if new else None,
            )


def _places(plan: Plan) -> dict[str, str]:
    """Category -> where and how the plan serves it."""
    return {
        category: f"{pool} {entry.model_dump_json()}" for category, pool, entry in plan.places()
    }
