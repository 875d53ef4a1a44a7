"""From a fleet to what Serve runs: which versions, whether they fit, the wait until they serve."""

import ipaddress
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ray.serve.schema import ApplicationDetails, ServeInstanceDetails

from apt_ray.errors import FleetError
from apt_ray.registry import Registry
from serving.app import (
    CATEGORY_DEPLOYMENT,
    ROOT,
    ROOT_DEPLOYMENT,
    CategoryArgs,
    RootArgs,
    application_name,
)
from serving.cluster import Capacity, Cluster
from serving.settings import CategoryEntry, Fleet

_IMPORT_PATH = "serving.app:"
_POLL_S = 0.5
# Serve's own limit is for what the replicas' limit cannot see: a request that reaches none of them.
_PROXY_GRACE_S = 15
_RETRY_AFTER_S = 1

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedCategory:
    """A category that will be served, and by which version of its prompt set."""

    name: str
    version: int
    entry: CategoryEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpAddress:
    """Where the fleet listens."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


def deploy(
    fleet: Fleet,
    *,
    cluster: Cluster,
    registry: Registry,
    tracking_uri: str,
    address: HttpAddress,
    timeout_s: float,
    progress: Progress,
) -> list[ServedCategory]:
    """Make the cluster serve exactly this fleet and wait until it does.

    Applications that do not change are left alone, those that the fleet no longer has are removed.

    Raises:
        FleetError: The fleet must not or cannot be deployed so, or an application fails; what was
            deployed is left in place, so that it can be looked at.
        RegistryError: A version cannot be found.
    """
    check_exposure(fleet, address)
    categories = resolve(fleet, registry)
    capacity = cluster.capacity()
    check_capacity(fleet, categories, capacity)
    if fleet.defaults.num_gpus and not capacity.gpus:
        progress("the cluster has no GPU: replicas use CPUs only")
    config = serve_config(
        fleet, categories, tracking_uri=tracking_uri, address=address, gpus=capacity.gpus > 0
    )
    details = cluster.serve_details()
    _check_owner(details)
    _check_http(details, config["http_options"])
    for line in _changes(details, config):
        progress(line)
    cluster.deploy(config)
    names = [application["name"] for application in config["applications"]]
    _wait(cluster, names, timeout_s=timeout_s, progress=progress)
    return categories


def take_down(cluster: Cluster) -> int:
    """Stop serving; how many applications that ended. FleetError if others' are among them."""
    details = cluster.serve_details()
    _check_owner(details)
    cluster.shut_down_serve()
    return len(details.applications)


def check_exposure(fleet: Fleet, address: HttpAddress) -> None:
    """FleetError if others could reach the fleet without a token."""
    if not address.is_loopback and not fleet.auth.tokens:
        raise FleetError(
            f"on {address.host} everyone in reach could use the fleet: add tokens to the fleet file"
            " (`python -m serving.fleet token NAME` makes one), or stay on --host 127.0.0.1"
        )


def resolve(fleet: Fleet, registry: Registry) -> list[ServedCategory]:
    """The versions that the fleet file asks for, as they stand in the registry now, by name.

    They are fixed here, so that all replicas of a category answer alike, whenever they started.
    """
    if isinstance(fleet.categories, dict):
        return [
            ServedCategory(
                name=name, version=registry.resolve(name, entry.reference).version, entry=entry
            )
            for name, entry in sorted(fleet.categories.items())
        ]
    champions = registry.champions()
    if not champions:
        raise FleetError(
            f"the registry at {registry.address} has no category with a champion: tune one first,"
            " for example with `ray job submit --working-dir . -- python tuning/search.py --data"
            " DIR`"
        )
    return [
        ServedCategory(name=name, version=version, entry=CategoryEntry())
        for name, version in sorted(champions.items())
    ]


def check_capacity(fleet: Fleet, categories: list[ServedCategory], capacity: Capacity) -> None:
    """FleetError, with the numbers, if the fleet's fewest replicas could never all run."""
    replicas = sum(fleet.autoscaling(category.entry).min_replicas for category in categories)
    demands = [("CPU", fleet.defaults.num_cpus, capacity.cpus, capacity.node_cpus)]
    if capacity.gpus:
        demands.append(("GPU", fleet.defaults.num_gpus, capacity.gpus, capacity.node_gpus))
    for resource, each, total, of_node in demands:
        remedy = (
            f"lower num_{resource.lower()}s or min_replicas in the fleet file, name fewer"
            " categories, or add a node"
        )
        if replicas * each > total:
            raise FleetError(
                f"{len(categories)} categories need at least {replicas} replicas with {each:g}"
                f" {resource} each, {replicas * each:g} in all, and the cluster has {total:g}:"
                f" {remedy}"
            )
        if each > of_node and not capacity.grows:
            raise FleetError(
                f"a replica needs {each:g} {resource} on one node, and the largest node has"
                f" {of_node:g}: {remedy}"
            )


def serve_config(
    fleet: Fleet,
    categories: list[ServedCategory],
    *,
    tracking_uri: str,
    address: HttpAddress,
    gpus: bool,
) -> dict[str, Any]:
    """The fleet as Serve's configuration (a ServeDeploySchema), in plain values.

    `args` holds what a replica is built from: a change replaces the replicas. `deployments` holds
    what Serve needs to know: a change of it leaves them running where it can.
    """
    _check_tracking_uri(tracking_uri)
    num_gpus = fleet.defaults.num_gpus if gpus else 0
    root = {
        "name": ROOT,
        "route_prefix": "/",
        "import_path": f"{_IMPORT_PATH}build_root",
        "args": RootArgs(
            categories=tuple(category.name for category in categories),
            http=fleet.http,
            auth=fleet.auth,
        ).model_dump(mode="json"),
        "deployments": [
            {
                "name": ROOT_DEPLOYMENT,
                "max_ongoing_requests": 100,
                "ray_actor_options": {"num_cpus": 0},
            }
        ],
    }
    applications = [
        {
            "name": application_name(category.name),
            "route_prefix": f"/v1/{category.name}",
            "import_path": f"{_IMPORT_PATH}build_category",
            "args": CategoryArgs(
                category=category.name,
                version=category.version,
                tracking_uri=tracking_uri,
                decision=category.entry.decision,
                device="cuda" if num_gpus else "cpu",
                batching=fleet.defaults.batching,
                http=fleet.http,
                auth=fleet.auth,
            ).model_dump(mode="json"),
            "deployments": [
                {
                    "name": CATEGORY_DEPLOYMENT,
                    "autoscaling_config": fleet.autoscaling(category.entry).model_dump(),
                    # A replica takes twice what it queues, so that it can refuse the rest itself,
                    # with a better explanation than the proxy's.
                    "max_ongoing_requests": 2 * fleet.defaults.max_queue,
                    "max_queued_requests": 2 * fleet.defaults.max_queue,
                    "backpressure_config": {"retry_after_s": _RETRY_AFTER_S},
                    "max_surge_percent": 100,  # a new replica is ready before an old one goes
                    "ray_actor_options": {
                        "num_cpus": fleet.defaults.num_cpus,
                        "num_gpus": num_gpus,
                    },
                }
            ],
        }
        for category in categories
    ]
    return {
        "http_options": {
            "host": address.host,
            "port": address.port,
            "request_timeout_s": fleet.http.timeout_s + _PROXY_GRACE_S,
        },
        "applications": [root, *applications],
    }


def describe_status(details: ServeInstanceDetails) -> list[str]:
    """The fleet's state, one application a line."""
    lines = []
    for name, application in sorted(details.applications.items()):
        replicas = [
            f"{len(deployment.replicas)} of {deployment.target_num_replicas} replicas"
            for deployment in application.deployments.values()
        ]
        config = application.deployed_app_config
        version = config.args.get("version") if config else None
        parts = [
            f"{application.route_prefix or '-':24}",
            f"{application.status.value:14}",
            f"version {version}" if version else name,
            *replicas,
            _cause(application),
        ]
        lines.append("  ".join(part for part in parts if part))
    return lines


def _check_tracking_uri(uri: str) -> None:
    if "@" in urlsplit(uri).netloc:
        raise FleetError(
            "the registry's address holds a password, and Ray's dashboard shows what Serve is"
            " configured with: give it without, and set MLFLOW_TRACKING_USERNAME and"
            " MLFLOW_TRACKING_PASSWORD in the environment of the Ray nodes"
        )


def _check_owner(details: ServeInstanceDetails) -> None:
    """FleetError if Serve runs what is not a fleet's."""
    foreign = sorted(
        name
        for name, application in details.applications.items()
        if application.deployed_app_config is None
        or not application.deployed_app_config.import_path.startswith(_IMPORT_PATH)
    )
    if foreign:
        raise FleetError(
            f"Serve of this cluster also runs {', '.join(foreign)}, which would be deleted: remove"
            " them (`serve shutdown`), or use another cluster"
        )


def _check_http(details: ServeInstanceDetails, wanted: Mapping[str, Any]) -> None:
    """FleetError if Serve's HTTP server runs with other options, which only a restart changes."""
    if not details.proxies:
        return
    present = {name: getattr(details.http_options, name) for name in wanted}
    different = [name for name in wanted if present[name] != wanted[name]]
    if different:
        raise FleetError(
            "Serve's HTTP server runs with other options ("
            + ", ".join(f"{name} {present[name]}, not {wanted[name]}" for name in different)
            + ") and must be restarted to change them: `python -m serving.fleet down`, then deploy"
        )


def _changes(details: ServeInstanceDetails, config: Mapping[str, Any]) -> list[str]:
    """What the configuration will do, one application a line."""
    present = {
        name: application.deployed_app_config.model_dump(mode="json", exclude_unset=True)
        for name, application in details.applications.items()
        if application.deployed_app_config is not None
    }
    wanted = {application["name"]: application for application in config["applications"]}
    lines = []
    for name, application in wanted.items():
        version = application["args"].get("version")
        label = f"{name} (version {version})" if version else name
        if name not in present:
            change = "new"
        else:
            change = "unchanged" if present[name] == application else "changed"
        lines.append(f"{label}: {change}")
    return lines + [f"{name}: removed" for name in sorted(set(present) - set(wanted))]


def _wait(cluster: Cluster, names: list[str], *, timeout_s: float, progress: Progress) -> None:
    """Return once all applications run and HTTP is served; FleetError if one fails or none ends."""
    started = time.monotonic()
    ready: set[str] = set()
    while True:
        details = cluster.serve_details()
        for name in names:
            application = details.applications.get(name)
            status = application.status.value if application else "NOT_STARTED"
            if application and status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise FleetError(
                    f"{name} cannot be served: {_cause(application) or status}\n(the whole message:"
                    " Ray's dashboard, or `serve status`)"
                )
            if status == "RUNNING" and name not in ready:
                ready.add(name)
                progress(f"{name}: ready after {time.monotonic() - started:.0f} s")
        removed = set(details.applications) <= set(names)
        served = details.proxies and all(
            proxy.status.value == "HEALTHY" for proxy in details.proxies.values()
        )
        if len(ready) == len(names) and removed and served:
            return
        if time.monotonic() - started > timeout_s:
            raise FleetError(_overdue(details, set(names) - ready, timeout_s))
        time.sleep(_POLL_S)


def _overdue(details: ServeInstanceDetails, names: set[str], timeout_s: float) -> str:
    reasons = [
        f"{name}: {_cause(details.applications[name]) or 'no reason given'}"
        for name in sorted(names & set(details.applications))
    ]
    what = "; ".join(reasons) or "HTTP is not served yet"
    return (
        f"the fleet is not ready after {timeout_s:g} s ({what}): it may still become so (`python -m"
        " serving.fleet status`); give it more time with --timeout, or look at Ray's dashboard"
    )


def _cause(application: ApplicationDetails) -> str:
    """What an application's messages come down to: the last error that they name, or their end."""
    messages = [
        application.message,
        *(deployment.message for deployment in application.deployments.values()),
    ]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*: ", line)]
    return (errors or lines or [""])[-1]
