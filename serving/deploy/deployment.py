"""Deploying a fleet: one at a time, growing before shrinking, waiting until it serves."""

import copy
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.serve.schema import ApplicationDetails, ServeInstanceDetails

from apt_ray.config import CATEGORY_NAME
from apt_ray.errors import FleetError, RegistryError, RegistryUnavailableError, SettingsError
from apt_ray.machine import who
from apt_ray.registry import CHAMPION, Registry
from serving.app import CONTROLLER, ROOT, pool_application
from serving.controller.drift import DriftStatus
from serving.controller.orders import CategoryStatus, FleetStatus, Plan
from serving.controller.shadow import ShadowStatus
from serving.deploy.cluster import Cluster
from serving.deploy.plan import (
    IMPORT_PATH,
    HttpAddress,
    check_capacity,
    check_exposure,
    pools_of,
    serve_config,
)
from serving.settings import CategoryEntry, Fleet

_POLL_S = 0.5

Progress = Callable[[str], None]
Config = dict[str, Any]


def deploy(
    fleet: Fleet,
    *,
    cluster: Cluster,
    registry: Registry,
    tracking_uri: str,
    address: HttpAddress,
    timeout_s: float,
    progress: Progress,
) -> list[str]:
    """Make the cluster serve exactly this fleet and wait until it does; its categories.

    Applications that do not change are left alone, those that the fleet no longer has are removed.
    A category that moves to another pool is served by both until the new one is ready. One that
    cannot be served holds up no other.

    Raises:
        FleetError: The fleet must not or cannot be deployed so, or another deploy came first; or
            all is deployed and some category cannot be served, for the reason that is named.
        RegistryError: The registry does not answer.
    """
    check_exposure(fleet, address)
    entries, absent = resolve(fleet, registry)
    pools = pools_of(fleet, entries)
    capacity = cluster.capacity()
    check_capacity(pools, capacity)
    if any(pool.settings.num_gpus for pool in pools) and not capacity.gpus:
        progress("the cluster has no GPU: replicas use CPUs only")
    details = cluster.serve_details()
    _check_owner(details)
    before = _deployed_plan(details)
    revision = before.revision + 1
    config = serve_config(
        fleet,
        pools,
        revision=revision,
        deployed_by=who(),
        tracking_uri=tracking_uri,
        address=address,
        gpus=capacity.gpus > 0,
    )
    _check_http(details, config["http_options"])
    for line in _changes(details, config):
        progress(line)
    waiting = _Waiting(cluster, revision, timeout_s=timeout_s, progress=progress)
    new = _plan(config)
    moved = _moved(before, new)
    first = _grown(details, before, config, moved)
    with cluster.claimed(revision):
        cluster.deploy(first)
    if moved:
        progress(f"moving to other pools: {', '.join(moved)}")
        failed = waiting.until_serving(first, new=new)
        # What its new pool cannot serve stays in the old one.
        config = _grown(details, before, config, [name for name in moved if name in failed])
        cluster.deploy(config)
    failed = absent | waiting.until_serving(config, new=new)
    if failed:
        raise FleetError(
            "; ".join(f"{name} cannot be served: {failed[name]}" for name in sorted(failed))
            + " (all else is deployed)"
        )
    return sorted(entries)


def take_down(cluster: Cluster) -> int:
    """Stop serving; how many applications that ended. FleetError if others' are among them."""
    details = cluster.serve_details()
    _check_owner(details)
    cluster.shut_down_serve()
    return len(details.applications)


def resolve(fleet: Fleet, registry: Registry) -> tuple[dict[str, CategoryEntry], dict[str, str]]:
    """The categories of the fleet file, for `all` those that have a champion now; and why some of
    them cannot be served.

    What the registry does not have yet is served as soon as it has it. Raises FleetError if the
    registry has nothing at all.
    """
    aliases = registry.aliases()
    absent: dict[str, str] = {}
    if isinstance(fleet.categories, dict):
        for name, entry in fleet.categories.items():
            if entry.version is not None or entry.alias not in aliases.get(name, {}):
                try:
                    registry.resolve(name, entry.reference)
                except RegistryUnavailableError:
                    raise
                except RegistryError as error:
                    absent[name] = str(error)
        return fleet.categories, absent
    entries = {}
    for name in sorted(name for name, known in aliases.items() if CHAMPION in known):
        if re.fullmatch(CATEGORY_NAME, name):
            entries[name] = CategoryEntry()
        else:
            absent[name] = (
                "its name cannot stand in an address: register it again under one of letters,"
                " digits, '-' and '_'"
            )
    if not entries:
        raise FleetError(
            f"the registry at {registry.address} has no category with a champion: tune one first,"
            " for example with `ray job submit --working-dir . -- python tuning/search.py --data"
            " DIR`"
        )
    return entries, absent


def describe_status(details: ServeInstanceDetails, status: FleetStatus | None) -> list[str]:
    """The fleet's state, one application a line, then one category a line."""
    lines = []
    for name, application in sorted(details.applications.items()):
        replicas = [
            f"{len(deployment.replicas)} of {deployment.target_num_replicas} replicas"
            for deployment in application.deployments.values()
        ]
        parts = [f"{name:28}", f"{application.status.value:14}", *replicas, _cause(application)]
        lines.append("  ".join(part for part in parts if part))
    if status is None:
        return lines
    lines.append(f"revision {status.revision}, deployed by {status.deployed_by}")
    lines.append(f"registry: {status.registry}")
    return lines + [
        f"{name:28}  {_describe_category(category)}" for name, category in status.categories.items()
    ]


def _describe_category(status: CategoryStatus) -> str:
    parts = [
        f"{status.state:8}",
        f"version {', '.join(map(str, status.serving)) or '-'} of {status.wanted or '?'}",
        f"candidate {status.candidate} waits" if status.candidate else "",
        f"{status.replicas} replicas",
        f"pool {', '.join(status.pools)}",
        f"{status.counted_share:.2%} of an image counts" if status.counted_share < 1 else "",
        "threshold by an operator" if status.threshold_source == "operator" else "",
        "from the local cache" if status.from_cache else "",
        *_describe_drift(status.drift),
        _describe_shadow(status.shadow) if status.shadow else "",
        status.problem or "",
    ]
    return "  ".join(part for part in parts if part)


def _describe_drift(drift: DriftStatus | None) -> list[str]:
    return [f"drift: {each.says}, since {each.since}" for each in drift.alarms] if drift else []


def _describe_shadow(status: ShadowStatus) -> str:
    name = f"shadow: version {status.candidate} beside {status.champion}"
    if status.problem:
        return f"{name} cannot be tried: {status.problem}"
    if not status.images:
        return f"{name}: no image yet"
    return (
        f"{name} agrees on {status.agreement:.2%} of {status.images:,} images, rejects"
        f" {status.candidate_rejects:,} more and {status.champion_rejects:,} fewer"
    )


def _plan(config: Config) -> Plan:
    return Plan.parse(_controller(config)["user_config"])


def _controller(config: Config) -> Config:
    applications: list[Config] = config["applications"]
    (controller,) = [each for each in applications if each["name"] == CONTROLLER]
    deployment: Config = controller["deployments"][0]
    return deployment


def _deployed(details: ServeInstanceDetails) -> dict[str, Config]:
    """Application -> its configuration, in plain values."""
    return {
        # Serve copies the logging of the whole into each application.
        name: application.deployed_app_config.model_dump(
            mode="json", exclude_unset=True, exclude={"logging_config"}
        )
        for name, application in details.applications.items()
        if application.deployed_app_config is not None
    }


def _deployed_plan(details: ServeInstanceDetails) -> Plan:
    """The plan that Serve runs; an empty one without a fleet, or with one of another version."""
    try:
        return _plan({"applications": list(_deployed(details).values())})
    except (ValueError, SettingsError):
        return Plan()


def _moved(before: Plan, after: Plan) -> list[str]:
    """Categories that are in both plans, but in none of the same pools."""

    def places(plan: Plan) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for category, pool, _ in plan.places():
            found.setdefault(category, set()).add(pool)
        return found

    old, new = places(before), places(after)
    return sorted(name for name in set(old) & set(new) if not old[name] & new[name])


def _grown(details: ServeInstanceDetails, before: Plan, config: Config, moved: list[str]) -> Config:
    """The new configuration with moved categories in their old pools, too: no new way in yet."""
    grown = copy.deepcopy(config)
    after = _plan(config)
    old = {
        pool: {name: entry for name, entry in entries.items() if name in moved}
        for pool, entries in before.pools.items()
    }
    pools = {
        name: {**old.get(name, {}), **after.pools.get(name, {})}
        for name in sorted({*after.pools, *(name for name, entries in old.items() if entries)})
    }
    union = after.model_copy(update={"pools": pools})
    _controller(grown)["user_config"] = union.to_config()
    new = {application["name"]: application for application in grown["applications"]}
    needed = {pool_application(pool) for pool in pools} - set(new)
    for name, application in _deployed(details).items():
        if name in needed:
            grown["applications"].append(application)
    for category in moved:
        # Its own application gets its address when it is ready; until then the root hands on.
        if own := new.get(pool_application(category)):
            own["route_prefix"] = None
    return grown


def _check_owner(details: ServeInstanceDetails) -> None:
    """FleetError if Serve runs what is not a fleet's."""
    foreign = sorted(
        name
        for name, application in details.applications.items()
        if application.deployed_app_config is None
        or not application.deployed_app_config.import_path.startswith(IMPORT_PATH)
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


def _changes(details: ServeInstanceDetails, config: Config) -> list[str]:
    """What the configuration will do, one application a line."""
    present = _deployed(details)
    wanted = {application["name"]: application for application in config["applications"]}
    lines = []
    for name, application in wanted.items():
        if name not in present:
            change = "new"
        else:
            change = "unchanged" if present[name] == application else "changed"
        if name != CONTROLLER:  # it changes with every deploy: its lines are the categories
            lines.append(f"{name}: {change}")
    lines += [f"{name}: removed" for name in sorted(set(present) - set(wanted))]
    before, after = _deployed_plan(details), _plan(config)
    old = {(category, pool): entry for category, pool, entry in before.places()}
    new = {(category, pool): entry for category, pool, entry in after.places()}
    for place in sorted(set(old) | set(new)):
        if old.get(place) != new.get(place):
            verb = "added to" if place not in old else "removed from"
            verb = "changed in" if place in old and place in new else verb
            lines.append(f"{place[0]}: {verb} pool {place[1]}")
    return lines


class _Waiting:
    """Waits for what is deployed, as long as it is this deploy's."""

    def __init__(
        self, cluster: Cluster, revision: int, *, timeout_s: float, progress: Progress
    ) -> None:
        self._cluster = cluster
        self._revision = revision
        self._timeout_s = timeout_s
        self._progress = progress
        self._started = time.monotonic()
        self._ready: set[str] = set()

    def until_serving(self, config: Config, *, new: Plan) -> dict[str, str]:
        """Return once HTTP is served and every category is as planned, or cannot be: those that
        their pools in `new` cannot serve so, and why.

        FleetError if the fleet itself fails or is not ready in time, or if another deploy took
        over.
        """
        names = {application["name"] for application in config["applications"]}
        places = list(new.places())
        while True:
            details = self._cluster.serve_details()
            self._check_revision(details)
            broken = {name: why for name in sorted(names) if (why := self._look_at(name, details))}
            removed = set(details.applications) <= names
            served = details.proxies and all(
                proxy.status.value == "HEALTHY" for proxy in details.proxies.values()
            )
            is_settled = names <= self._ready | set(broken)
            status = self._cluster.fleet_status() if is_settled else None
            if status and status.revision == self._revision:
                failed = {
                    category: broken[name]
                    for category, pool, _ in places
                    if (name := pool_application(pool)) in broken
                }
                others = {category for category, _, _ in places} - set(failed)
                if removed and served and not _late(status, others):
                    return failed | _failed(status, new, others)
            if time.monotonic() - self._started > self._timeout_s:
                raise FleetError(_overdue(details, names - self._ready, self._timeout_s))
            time.sleep(_POLL_S)

    def _check_revision(self, details: ServeInstanceDetails) -> None:
        plan = _deployed_plan(details)
        if plan.revision != self._revision:
            raise FleetError(
                f"another deploy, revision {plan.revision} by {plan.deployed_by}, has taken the"
                f" place of this one, revision {self._revision}: look at `python -m serving.fleet"
                " status`, then deploy again"
            )

    def _look_at(self, name: str, details: ServeInstanceDetails) -> str | None:
        """Why an application fails, if it does; FleetError if no other can do without it."""
        application = details.applications.get(name)
        status = application.status.value if application else "NOT_STARTED"
        if application and status in ("DEPLOY_FAILED", "UNHEALTHY"):
            why = (
                f"{_cause(application) or status} (the whole message: Ray's dashboard, or `serve"
                " status`)"
            )
            if name in (CONTROLLER, ROOT):
                raise FleetError(f"{name} cannot be served: {why}")
            return why
        if status == "RUNNING" and name not in self._ready:
            self._ready.add(name)
            self._progress(f"{name}: ready after {time.monotonic() - self._started:.0f} s")
        return None


def _failed(status: FleetStatus, plan: Plan, categories: set[str]) -> dict[str, str]:
    """Those that their pools in the plan cannot serve, and why."""
    failed = {}
    for name, pool, _ in plan.places():
        if name in categories and pool in (category := status.categories[name]).failing:
            kept = ", ".join(f"version {version}" for version in category.serving)
            failed[name] = f"{category.problem}{f' ({kept} keeps serving)' if kept else ''}"
    return failed


def _late(status: FleetStatus, categories: set[str]) -> bool:
    """Whether some are not as planned yet."""
    known = status.categories
    return any(name not in known or known[name].state == "LOADING" for name in categories)


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
