"""The builders of the fleet's Serve applications: a pool, the root, the controller.

Serve calls them with the `args` of its configuration. What is expensive happens in the replicas,
when Serve makes one of the classes here; torch and MLflow are imported only there.
"""

import asyncio
import os
from collections.abc import Awaitable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayTaskError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from apt_ray.config import Settings
from apt_ray.detection.drift import DriftSettings
from apt_ray.errors import AptError, FleetError
from apt_ray.machine import expanded
from serving.api.access import Access
from serving.api.history import (
    KeptInspection,
    KeptInspections,
    KeptPicture,
    Mark,
    Only,
    Picked,
    Wanted,
)
from serving.api.ingress import create_api
from serving.api.messages import CategoryReport, Explanation, Inspected, InspectionRequest
from serving.api.pools import Answering, Pools, Refusal
from serving.api.root import create_root_api
from serving.api.searches import Jobs, Searches
from serving.api.training_images import TrainingImages
from serving.api.tuning import Tuning
from serving.api.webhooks import SECRET_VARIABLE
from serving.controller.cache import Cache
from serving.controller.controller import WAIT_S, Controller
from serving.controller.drift import DriftsCleared
from serving.controller.moves import MoveOrder, MoveResult, Operation, VersionSummary, carry_out
from serving.controller.orders import (
    CategoryThreshold,
    FleetStatus,
    Orders,
    Plan,
    ReplicaReport,
    Routes,
    StoredVersion,
)
from serving.controller.shadow import ShadowStatus
from serving.settings import (
    Auth,
    Batching,
    FeedbackSettings,
    HistorySettings,
    HttpLimits,
    PoolName,
    RegistrySettings,
    SearchSettings,
)

if TYPE_CHECKING:
    from apt_ray.registry import Registry

POOL_DEPLOYMENT = "Pool"
ROOT_DEPLOYMENT = "Root"
CONTROLLER_DEPLOYMENT = "Controller"
ROOT = "root"
CONTROLLER = "controller"
# A replica that cannot start now will not start in a minute: say so instead of trying on.
_CONSTRUCTOR_RETRIES = 2
_PATIENCE_S = 120.0
# A promotion compares for some minutes at most, once a node has a quarter of a core for it.
_PROMOTION_CPUS = 0.25
_PROMOTION_S = 1800.0


class PoolArgs(Settings):
    """All that the application of a pool is built from; its categories come from the controller."""

    pool: PoolName
    shared: bool
    registry_address: str
    registry: RegistrySettings
    device: Literal["cpu", "cuda"]
    batching: Batching
    http: HttpLimits
    history: HistorySettings = HistorySettings()
    feedback: FeedbackSettings | None = None
    drift: DriftSettings | None = None
    shadow_images: int = 0


class RootArgs(Settings):
    """All that the root application is built from."""

    registry_address: str
    registry: RegistrySettings
    http: HttpLimits
    searches: SearchSettings | None = None
    feedback: FeedbackSettings | None = None


class ControllerArgs(Settings):
    """All that the controller is built from; the fleet's plan is its user_config."""

    tracking_uri: str
    registry: RegistrySettings
    feedback: FeedbackSettings | None = None


def pool_application(pool: str) -> str:
    """The Serve application of a pool."""
    return f"pool-{pool}"


@lru_cache(maxsize=1)
def controller_handle() -> "DeploymentHandle[Any]":
    """The controller, for whoever is connected to the cluster."""
    return serve.get_deployment_handle(CONTROLLER_DEPLOYMENT, CONTROLLER)


def build_pool(args: PoolArgs) -> Application:
    """A pool: every replica is inspector and HTTP server in one, and answers by handle as well."""
    deployment = serve.deployment(
        name=POOL_DEPLOYMENT, max_constructor_retry_count=_CONSTRUCTOR_RETRIES
    )
    return deployment(serve.ingress()(PoolReplica)).bind(args)


def build_root(args: RootArgs) -> Application:
    """The fleet's front page, lists, health, and the way to the shared pools."""
    return serve.deployment(name=ROOT_DEPLOYMENT)(serve.ingress()(RootReplica)).bind(args)


def build_controller(args: ControllerArgs) -> Application:
    """Decides who serves what."""
    return serve.deployment(name=CONTROLLER_DEPLOYMENT)(ControllerReplica).bind(args)


class PoolReplica:
    """One replica of a pool."""

    async def __init__(self, args: PoolArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        from serving.replica.beside import Beside  # with torch: for these replicas only
        from serving.replica.drift import DriftWatches
        from serving.replica.follower import Follower
        from serving.replica.history import History
        from serving.replica.inspector import Inspector
        from serving.replica.meter import Meter

        self._args = args
        self._access = Access(Auth())
        controller = _RemoteController()
        cache = Cache(args.registry.cache, args.registry_address)
        meter = Meter()
        self._controller = controller
        self._history = History(
            args.history, args.registry_address, disagreements=args.shadow_images, meter=meter
        )
        self._inspector = Inspector(
            limits=args.http.image,
            batching=args.batching,
            device=args.device,
            shared=args.shared,
            meter=meter,
            beside=Beside(controller, cache),
            history=self._history,
            drift=DriftWatches(args.drift, meter=meter) if args.drift else None,
        )
        self._answering = Answering(self._inspector, self._history)
        follower = Follower(
            args.pool,
            serve.get_replica_context().replica_id.unique_id,
            controller,
            cache=cache,
            inspector=self._inspector,
            access=self._access,
            wait_s=WAIT_S,
        )
        await follower.start(patience_s=_PATIENCE_S)
        self._following = asyncio.create_task(follower.follow_forever())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(
            self._inspector,
            http=self._args.http,
            access=self._access,
            history=self._history,
            controller=self._controller,
            feedback=self._args.feedback.store() if self._args.feedback else None,
        )

    async def inspect(
        self, category: str, data: bytes, asked: InspectionRequest
    ) -> Inspected | Refusal:
        return await self._answering.inspect(category, data, asked)

    async def explain(
        self, category: str, data: bytes, asked: InspectionRequest
    ) -> Explanation | Refusal:
        return await self._answering.explain(category, data, asked)

    async def describe(self, category: str) -> CategoryReport | Refusal:
        return await self._answering.describe(category)

    async def history(
        self, category: str, before: int | None, limit: int, only: Only
    ) -> KeptInspections | Refusal:
        return await self._answering.history(category, before, limit, only)

    async def history_picture(
        self, category: str, number: int, picture: KeptPicture
    ) -> bytes | Refusal:
        return await self._answering.history_picture(category, number, picture)

    async def mark(
        self, category: str, number: int, mark: Mark, by: str
    ) -> KeptInspection | Refusal:
        return await self._answering.mark(category, number, mark, by)

    async def pick(self, category: str, wanted: Wanted) -> list[Picked] | Refusal:
        return await self._answering.pick(category, wanted)

    def check_health(self) -> None:
        if self._following.done():
            raise RuntimeError("this replica no longer follows the controller")


class RootReplica:
    """One replica of the root."""

    async def __init__(self, args: RootArgs) -> None:  # type: ignore[misc]
        access = Access(Auth())
        controller = _RemoteController()
        pools = Pools(_RemotePool, access, Cache(args.registry.cache, args.registry_address))
        # Not ready before it knows who may ask.
        await pools.start(controller, patience_s=_PATIENCE_S)
        self._following = asyncio.create_task(pools.follow_forever(controller))
        self._api = create_root_api(
            pools,
            controller,
            http=args.http,
            access=access,
            webhook_secret=os.environ.get(SECRET_VARIABLE, ""),
            tuning=_tuning(args, args.searches) if args.searches else None,
            feedback=args.feedback.store() if args.feedback else None,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._api

    def check_health(self) -> None:
        if self._following.done():
            raise RuntimeError("this replica no longer follows the controller")


def _tuning(args: RootArgs, searches: SearchSettings) -> Tuning:
    folder = expanded(Path(searches.folder))
    return Tuning(
        searches=Searches(
            _jobs,
            folder,
            tracking_uri=args.registry_address,
            dashboard=searches.dashboard,
        ),
        images=TrainingImages(folder / "images", limits=args.http.image, most=searches.max_images),
    )


def _jobs() -> Jobs:
    from ray.job_submission import JobSubmissionClient

    try:
        # That of this replica's own Ray: a machine may run several.
        return JobSubmissionClient(ray.get_runtime_context().gcs_address)
    except (ConnectionError, RuntimeError) as error:
        raise FleetError(f"Ray's dashboard does not take jobs: {error}") from error


class ControllerReplica:
    """The controller as a Serve deployment."""

    def __init__(self, args: ControllerArgs) -> None:
        self._controller = Controller(
            partial(_open_registry, args.tracking_uri),
            Cache(args.registry.cache, args.tracking_uri),
            poll_s=args.registry.poll_s,
            page=args.registry.page,
            promoting=partial(_promote, args.tracking_uri, args.feedback),
            feedback=args.feedback,
        )
        self._polling: asyncio.Task[None] | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        await self._controller.plan(Plan.parse(config))
        if self._polling is None:
            self._polling = asyncio.create_task(self._controller.poll_forever())

    async def follow(self, pool: str, replica: str, report: ReplicaReport, wait_s: float) -> Orders:
        return await self._controller.follow(pool, replica, report, wait_s=wait_s)

    async def routes(self, known: str) -> Routes:
        return await self._controller.routes(known)

    async def resolve(self, category: str, alias: str) -> int | None:
        return await self._controller.resolve(category, alias)

    async def fetch(self, category: str, version: int) -> StoredVersion:
        return await self._controller.fetch(category, version)

    async def status(self) -> FleetStatus:
        return await self._controller.status()

    async def audit_lines(self) -> list[dict[str, object]]:
        return await self._controller.audit_lines()

    async def wake(self, reason: str) -> None:
        await self._controller.wake(reason)

    async def move(self, order: MoveOrder) -> Operation:
        return await self._controller.move(order)

    async def operation(self, identifier: str) -> Operation | None:
        return await self._controller.operation(identifier)

    async def versions(self, category: str, limit: int) -> list[VersionSummary]:
        return await self._controller.versions(category, limit)

    async def pictures(self, category: str, version: int) -> tuple[str, ...] | None:
        return await self._controller.pictures(category, version)

    async def picture(self, category: str, version: int, name: str) -> bytes | None:
        return await self._controller.picture(category, version, name)

    async def threshold(self, category: str) -> CategoryThreshold:
        return await self._controller.threshold(category)

    async def set_threshold(
        self, category: str, value: float | None, reason: str, by: str
    ) -> CategoryThreshold:
        return await self._controller.set_threshold(category, value, reason=reason, by=by)

    async def reset_drift(self, category: str, anew: bool, reason: str, by: str) -> DriftsCleared:
        return await self._controller.reset_drift(category, anew=anew, reason=reason, by=by)

    async def shadow(self, category: str) -> ShadowStatus | None:
        return await self._controller.shadow(category)

    def check_health(self) -> None:
        if self._polling is not None and self._polling.done():
            raise RuntimeError("the controller no longer polls the registry")


def _open_registry(address: str) -> "Registry":
    from apt_ray.registry import open_registry  # with torch: for the controller only

    return open_registry(address)


def _promote_there(address: str, feedback: FeedbackSettings | None, order: MoveOrder) -> MoveResult:
    return carry_out(_open_registry(address), order, feedback=feedback)


async def _promote(address: str, feedback: FeedbackSettings | None, order: MoveOrder) -> MoveResult:
    """Encode images in a task of its own: the controller answers meanwhile, and needs no core."""
    # Not twice: whoever died may have moved the alias already.
    task = ray.remote(num_cpus=_PROMOTION_CPUS, max_retries=0)(_promote_there)
    reference = task.remote(address, feedback, order)
    try:
        result: MoveResult = await asyncio.wait_for(
            _own_errors(asyncio.wrap_future(reference.future())), _PROMOTION_S
        )
    except asyncio.TimeoutError:
        ray.cancel(reference)
        raise FleetError(
            f"the comparison did not end within {_PROMOTION_S / 60:g} minutes: see in Ray's"
            f" dashboard whether a node has {_PROMOTION_CPUS:g} CPU free, then ask again"
        ) from None
    return result


class _RemoteController:
    """A `ControllerClient` that asks by handle."""

    async def follow(
        self, pool: str, replica: str, report: ReplicaReport, *, wait_s: float
    ) -> Orders:
        orders: Orders = await controller_handle().follow.remote(pool, replica, report, wait_s)
        return orders

    async def resolve(self, category: str, alias: str) -> int | None:
        version: int | None = await _own_errors(controller_handle().resolve.remote(category, alias))
        return version

    async def fetch(self, category: str, version: int) -> StoredVersion:
        stored: StoredVersion = await _own_errors(
            controller_handle().fetch.remote(category, version)
        )
        return stored

    async def routes(self, known: str) -> Routes:
        routes: Routes = await controller_handle().routes.remote(known)
        return routes

    async def status(self) -> FleetStatus:
        status: FleetStatus = await controller_handle().status.remote()
        return status

    async def audit_lines(self) -> list[dict[str, object]]:
        lines: list[dict[str, object]] = await controller_handle().audit_lines.remote()
        return lines

    async def wake(self, reason: str) -> None:
        await controller_handle().wake.remote(reason)

    async def move(self, order: MoveOrder) -> Operation:
        operation: Operation = await _own_errors(controller_handle().move.remote(order))
        return operation

    async def operation(self, identifier: str) -> Operation | None:
        operation: Operation | None = await controller_handle().operation.remote(identifier)
        return operation

    async def versions(self, category: str, limit: int) -> list[VersionSummary]:
        versions: list[VersionSummary] = await _own_errors(
            controller_handle().versions.remote(category, limit)
        )
        return versions

    async def pictures(self, category: str, version: int) -> tuple[str, ...] | None:
        names: tuple[str, ...] | None = await _own_errors(
            controller_handle().pictures.remote(category, version)
        )
        return names

    async def picture(self, category: str, version: int, name: str) -> bytes | None:
        picture: bytes | None = await _own_errors(
            controller_handle().picture.remote(category, version, name)
        )
        return picture

    async def threshold(self, category: str) -> CategoryThreshold:
        threshold: CategoryThreshold = await controller_handle().threshold.remote(category)
        return threshold

    async def set_threshold(
        self, category: str, value: float | None, *, reason: str, by: str
    ) -> CategoryThreshold:
        threshold: CategoryThreshold = await _own_errors(
            controller_handle().set_threshold.remote(category, value, reason, by)
        )
        return threshold

    async def reset_drift(
        self, category: str, *, anew: bool, reason: str, by: str
    ) -> DriftsCleared:
        cleared: DriftsCleared = await controller_handle().reset_drift.remote(
            category, anew, reason, by
        )
        return cleared

    async def shadow(self, category: str) -> ShadowStatus | None:
        status: ShadowStatus | None = await controller_handle().shadow.remote(category)
        return status


async def _own_errors(answer: Awaitable[Any]) -> Any:
    """The answer; an AptError is raised as it was, without the traceback of another process."""
    try:
        return await answer
    except RayTaskError as error:
        if isinstance(error.cause, AptError):
            raise error.cause from None
        raise


async def _unless_gone(response: Any) -> Any:
    """The answer; a caller that goes away costs no forward pass."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


class _RemotePool:
    """A pool as the root reaches it."""

    def __init__(self, pool: str) -> None:
        self._handle = serve.get_deployment_handle(POOL_DEPLOYMENT, pool_application(pool))

    async def inspect(
        self, category: str, data: bytes, asked: InspectionRequest
    ) -> Inspected | Refusal:
        answer: Inspected | Refusal = await _unless_gone(
            self._handle.inspect.remote(category, data, asked)
        )
        return answer

    async def explain(
        self, category: str, data: bytes, asked: InspectionRequest
    ) -> Explanation | Refusal:
        answer: Explanation | Refusal = await _unless_gone(
            self._handle.explain.remote(category, data, asked)
        )
        return answer

    async def describe(self, category: str) -> CategoryReport | Refusal:
        answer: CategoryReport | Refusal = await self._handle.describe.remote(category)
        return answer

    async def history(
        self, category: str, before: int | None, limit: int, only: Only
    ) -> KeptInspections | Refusal:
        asked = self._handle.history.remote(category, before, limit, only)
        answer: KeptInspections | Refusal = await asked
        return answer

    async def history_picture(
        self, category: str, number: int, picture: KeptPicture
    ) -> bytes | Refusal:
        asked = self._handle.history_picture.remote(category, number, picture)
        answer: bytes | Refusal = await asked
        return answer

    async def mark(
        self, category: str, number: int, mark: Mark, by: str
    ) -> KeptInspection | Refusal:
        asked = self._handle.mark.remote(category, number, mark, by)
        answer: KeptInspection | Refusal = await asked
        return answer

    async def pick(self, category: str, wanted: Wanted) -> list[Picked] | Refusal:
        answer: list[Picked] | Refusal = await self._handle.pick.remote(category, wanted)
        return answer
