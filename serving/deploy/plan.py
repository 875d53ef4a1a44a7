"""From a fleet file to what Serve runs: pools, their applications, whether they fit the cluster."""

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from apt_ray.errors import FleetError
from apt_ray.machine import is_loopback
from serving.app import (
    CONTROLLER,
    CONTROLLER_DEPLOYMENT,
    POOL_DEPLOYMENT,
    ROOT,
    ROOT_DEPLOYMENT,
    ControllerArgs,
    PoolArgs,
    RootArgs,
    pool_application,
)
from serving.controller.orders import Plan
from serving.deploy.cluster import Capacity
from serving.settings import Autoscaling, CategoryEntry, Fleet, PoolSettings

IMPORT_PATH = "serving.app:"
# Serve's own limit is for what the replicas' limit cannot see: a request that reaches none of them.
_PROXY_GRACE_S = 15
_RETRY_AFTER_S = 1
# More than wait in a replica, so that it refuses the rest itself, with a better explanation than
# the proxy's; a bound of the bodies that it holds.
_MAX_ONGOING = 256
# Replicas and the root wait at the controller; each is one ongoing request.
_MAX_WAITING = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """A pool of the fleet: its settings and its categories."""

    name: str
    settings: PoolSettings
    categories: dict[str, CategoryEntry]

    @property
    def is_shared(self) -> bool:
        """Whether it is entered through the root; a category's own pool has an address itself."""
        return list(self.categories) != [self.name]


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpAddress:
    """Where the fleet listens."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def pools_of(fleet: Fleet, entries: dict[str, CategoryEntry]) -> list[Pool]:
    """The pools that serve these categories, by name."""
    members: dict[str, dict[str, CategoryEntry]] = {}
    for name, entry in sorted(entries.items()):
        members.setdefault(fleet.pool_of(name, entry), {})[name] = entry
    return [
        Pool(
            name=name,
            settings=fleet.shared_pool(name)
            if name in fleet.pools
            else fleet.own_pool(categories[name]),
            categories=categories,
        )
        for name, categories in sorted(members.items())
    ]


def check_exposure(fleet: Fleet, address: HttpAddress) -> None:
    """FleetError if others could reach the fleet without a token."""
    if not address.is_loopback and not fleet.auth.tokens:
        raise FleetError(
            f"on {address.host} everyone in reach could use the fleet: add tokens to the fleet file"
            " (`python -m serving.fleet token NAME` makes one), or stay on --host 127.0.0.1"
        )


def check_capacity(pools: list[Pool], capacity: Capacity) -> None:
    """FleetError, with the numbers, if the pools' fewest replicas could never all run."""
    for resource in ("CPU", "GPU"):
        total, of_node = (
            (capacity.cpus, capacity.node_cpus)
            if resource == "CPU"
            else (capacity.gpus, capacity.node_gpus)
        )
        if resource == "GPU" and not total:
            continue  # the replicas use CPUs then
        field = f"num_{resource.lower()}s"
        remedy = (
            f"lower {field} or min_replicas in the fleet file, let categories share a pool, or add"
            " a node"
        )
        demands = [
            (getattr(pool.settings, field), pool.settings.autoscaling.min_replicas)
            for pool in pools
        ]
        need = sum(each * count for each, count in demands)
        if need > total + 1e-6:
            raise FleetError(
                f"{len(pools)} pools need at least {sum(count for _, count in demands)} replicas"
                f" with {need:g} {resource} in all, and the cluster has {total:g}: {remedy}"
            )
        largest = max(each for each, _ in demands)
        if largest > of_node and not capacity.grows:
            raise FleetError(
                f"a replica needs {largest:g} {resource} on one node, and the largest node has"
                f" {of_node:g}: {remedy}"
            )


def serve_config(
    fleet: Fleet,
    pools: list[Pool],
    *,
    revision: int,
    deployed_by: str,
    tracking_uri: str,
    address: HttpAddress,
    gpus: bool,
) -> dict[str, Any]:
    """The fleet as Serve's configuration (a ServeDeploySchema), in plain values.

    A change of `args` replaces an application's replicas, a change of `deployments` leaves them
    running where it can. Categories, decisions, regions and tokens stand in the controller's
    `user_config`, so they change without touching a replica; versions stand nowhere.
    """
    _check_tracking_uri(tracking_uri)
    names_all = fleet.categories == "all"
    plan = Plan(
        revision=revision,
        deployed_by=deployed_by,
        # What concerns Serve alone is no business of the controller's.
        pools={
            pool.name: {
                name: entry.model_copy(
                    update={
                        "autoscaling": Autoscaling(),
                        "pool": None,
                        # Whole, since a plan does not tell what was given from what is default.
                        "shadow": entry.shadow and fleet.shadow.overridden_by(entry.shadow),
                    }
                )
                for name, entry in pool.categories.items()
            }
            for pool in pools
        },
        auth=fleet.auth,
        names_all=names_all,
        joined=fleet.pool if names_all else None,
        shadow=fleet.shadow.overridden_by(None),
    )
    controller = {
        "name": CONTROLLER,
        "route_prefix": None,
        "import_path": f"{IMPORT_PATH}build_controller",
        "args": ControllerArgs(
            tracking_uri=tracking_uri, registry=fleet.registry, feedback=fleet.feedback
        ).model_dump(mode="json"),
        "deployments": [
            {
                "name": CONTROLLER_DEPLOYMENT,
                "user_config": plan.to_config(),
                "max_ongoing_requests": _MAX_WAITING,
                "ray_actor_options": {"num_cpus": 0},
            }
        ],
    }
    root = {
        "name": ROOT,
        "route_prefix": "/",
        "import_path": f"{IMPORT_PATH}build_root",
        "args": RootArgs(
            registry_address=tracking_uri,
            registry=fleet.registry,
            http=fleet.http,
            searches=fleet.searches,
            feedback=fleet.feedback,
        ).model_dump(mode="json"),
        "deployments": [
            {
                "name": ROOT_DEPLOYMENT,
                "max_ongoing_requests": 1000,
                "ray_actor_options": {"num_cpus": 0},
            }
        ],
    }
    applications = [
        _application(fleet, pool, tracking_uri=tracking_uri, gpus=gpus) for pool in pools
    ]
    return {
        "http_options": {
            "host": address.host,
            "port": address.port,
            "request_timeout_s": fleet.http.timeout_s + _PROXY_GRACE_S,
        },
        "logging_config": {"encoding": "JSON"},
        "applications": [controller, root, *applications],
    }


def _application(fleet: Fleet, pool: Pool, *, tracking_uri: str, gpus: bool) -> dict[str, Any]:
    settings = pool.settings
    num_gpus = settings.num_gpus if gpus else 0
    return {
        "name": pool_application(pool.name),
        "route_prefix": None if pool.is_shared else f"/v1/{pool.name}",
        "import_path": f"{IMPORT_PATH}build_pool",
        "args": PoolArgs(
            pool=pool.name,
            shared=pool.is_shared,
            registry_address=tracking_uri,
            registry=fleet.registry,
            device="cuda" if num_gpus else "cpu",
            batching=settings.batching,
            http=fleet.http,
            history=fleet.history,
            feedback=fleet.feedback,
            drift=fleet.drift,
            shadow_images=fleet.shadow.images,
        ).model_dump(mode="json"),
        "deployments": [
            {
                "name": POOL_DEPLOYMENT,
                "autoscaling_config": settings.autoscaling.model_dump(exclude_none=True),
                "max_ongoing_requests": _MAX_ONGOING,
                "max_queued_requests": _MAX_ONGOING,
                "backpressure_config": {"retry_after_s": _RETRY_AFTER_S},
                "max_surge_percent": 100,  # a new replica is ready before an old one goes
                "ray_actor_options": {"num_cpus": settings.num_cpus, "num_gpus": num_gpus},
            }
        ],
    }


def _check_tracking_uri(uri: str) -> None:
    if "@" in urlsplit(uri).netloc:
        raise FleetError(
            "the registry's address holds a password, and Ray's dashboard shows what Serve is"
            " configured with: give it without, and set MLFLOW_TRACKING_USERNAME and"
            " MLFLOW_TRACKING_PASSWORD in the environment of the Ray nodes"
        )
