"""How large a fleet or a search has to be, before there is one: replicas, memory, hours, cost.

Formulas, each held against a simulation in `benchmarks.sizing` (docs/scaling.md):

- A replica is a single server; requests reach the one of two random replicas that has fewer of
  them, as Ray Serve sends them. With utilisation u and a squared coefficient of variation v of
  service times, the mean time in service and queue, in units of the service time, is
  `1 + (1 + v) / 2 * w`, where w is `u / (1 - u)` for one replica (Pollaczek and Khinchine) and
  `sum over i >= 2 of u ** (2**i - 2)` for infinitely many (Mitzenmacher, 2001, of exponential
  times); between both the difference fades by `1.2 / replicas**2`, which is our own fit.
- A search is bound by processor time: encoding, training, judging and Ray Tune's own.
"""

import math
from dataclasses import dataclass, field, fields

from apt_ray.errors import SettingsError

BUSY = 0.7
"""The share of its time that a replica should be busy: beyond it the wait grows quickly."""

_TERMS = range(2, 9)
_MIB_PER_GIB = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Speeds:
    """What things take, of one thread of a CPU unless said; the defaults are docs/scaling.md's.

    Attributes:
        name: of the machine that they were measured on.
        image_s: seconds of a replica for the encoders, map and score of one image.
        decode_s: seconds for decoding a megapixel of JPEG.
        variation: squared coefficient of variation of both together.
        request_s: seconds of proxy and ingress for a request, outside of the replica.
        replica_mib: memory of a replica without categories.
        category_mib: memory of one more category in a replica.
        encode_s: seconds for banks and judges of one category with three support seeds.
        trial_s: seconds for training and judging one trial of 100 steps with 12 lanes.
        tune_s: seconds of Ray Tune itself for one trial.
        fit_s: seconds for the final fit of one category.
        registry_s: seconds of the registry's answer for the aliases of 1,000 categories.
    """

    name: str = "one of the two threads of an AVX-512 core, built-in encoders (docs/scaling.md)"
    image_s: float = 0.052
    decode_s: float = 0.012
    variation: float = 0.01
    request_s: float = 0.003
    replica_mib: float = 501.0
    category_mib: float = 0.45
    encode_s: float = 166.0
    trial_s: float = 2.2
    tune_s: float = 1.6
    fit_s: float = 1.9
    registry_s: float = 0.84


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetDemand:
    """What a fleet is to do.

    Attributes:
        categories: products.
        rps: images a second, all categories together, at the busiest time.
        megapixels: of an image.
        shared: whether all categories share one pool; else each has one of its own.
        replica_cpus: CPUs that Ray sets aside for a replica.
        node_cpus, node_gib: of a node.
        price: of a node for an hour, in any currency; None is not told.
    """

    categories: int
    rps: float
    megapixels: float = 1.0
    shared: bool = True
    replica_cpus: float = 1.0
    node_cpus: int = 8
    node_gib: float = 32.0
    price: float | None = None

    def __post_init__(self) -> None:
        for name in ("categories", "megapixels", "replica_cpus", "node_cpus", "node_gib"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be more than 0, not {getattr(self, name):g}")
        if not self.rps >= 0:
            raise SettingsError(f"rps must not be less than 0, and is {self.rps:g}")
        if self.replica_cpus > self.node_cpus:
            raise SettingsError(
                f"a replica of {self.replica_cpus:g} CPUs fits on no node of {self.node_cpus}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetPlan:
    """What that takes.

    Attributes:
        pools: how many there are.
        replicas: of all pools.
        busy: share of its time that a replica works, 0..1.
        latency_s: mean time of a request, from its arrival to its answer.
        replica_mib: memory of one replica with its categories.
        memory_gib: of all replicas.
        nodes: of the kind that was named.
        cost: of all nodes for an hour; None if no price was named.
        warnings: what will be felt first, and the remedy.
    """

    pools: int
    replicas: int
    busy: float
    latency_s: float
    replica_mib: float
    memory_gib: float
    nodes: int
    cost: float | None
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchDemand:
    """What is to be searched: categories, trials of each, on how many CPUs."""

    categories: int
    trials: int = 64
    cpus: int = 8
    steps: int = 100

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) < 1:
                raise SettingsError(f"{each.name} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPlan:
    """What that takes, in hours of CPU and by the clock."""

    encoding_h: float
    training_h: float
    tune_h: float
    clock_h: float


def mean_time(replicas: int, busy: float, variation: float) -> float:
    """Mean time of a request in a pool, in units of the mean service time; see the module.

    Args:
        replicas: of the pool, at least 1.
        busy: utilisation, 0 to below 1.
        variation: squared coefficient of variation of service times.
    """
    alone = busy / (1 - busy)
    many = sum(math.pow(busy, 2**term - 2) for term in _TERMS)
    share = 1.0 if replicas == 1 else 1.2 / replicas**2
    return 1 + (1 + variation) / 2 * (many + share * (alone - many))


def plan_fleet(demand: FleetDemand, speeds: Speeds) -> FleetPlan:
    """The fewest replicas that are busy `BUSY` of their time, and what they take."""
    service_s = speeds.image_s + speeds.decode_s * demand.megapixels
    pools = 1 if demand.shared else demand.categories
    rate = demand.rps / pools
    of_pool = max(1, math.ceil(rate * service_s / BUSY - 1e-9))
    busy = rate * service_s / of_pool
    replicas = pools * of_pool
    members = demand.categories if demand.shared else 1
    replica_mib = speeds.replica_mib + members * speeds.category_mib
    of_node = max(
        1,
        min(
            int(demand.node_cpus / demand.replica_cpus),
            int(demand.node_gib * _MIB_PER_GIB / replica_mib),
        ),
    )
    nodes = math.ceil(replicas / of_node)
    return FleetPlan(
        pools=pools,
        replicas=replicas,
        busy=busy,
        latency_s=speeds.request_s + service_s * mean_time(of_pool, busy, speeds.variation),
        replica_mib=replica_mib,
        memory_gib=replicas * replica_mib / _MIB_PER_GIB,
        nodes=nodes,
        cost=None if demand.price is None else nodes * demand.price,
        warnings=tuple(_warnings(demand, speeds, replica_mib, busy)),
    )


def plan_search(demand: SearchDemand, speeds: Speeds) -> SearchPlan:
    """Hours of CPU, and by the clock where all CPUs always have something to do."""
    encoding_s = demand.categories * speeds.encode_s
    training_s = demand.categories * (
        demand.trials * speeds.trial_s * demand.steps / 100 + speeds.fit_s
    )
    tune_s = demand.categories * demand.trials * speeds.tune_s
    return SearchPlan(
        encoding_h=encoding_s / 3600,
        training_h=training_s / 3600,
        tune_h=tune_s / 3600,
        clock_h=(encoding_s + training_s + tune_s) / demand.cpus / 3600,
    )


def _warnings(demand: FleetDemand, speeds: Speeds, replica_mib: float, busy: float) -> list[str]:
    found = []
    if replica_mib > demand.node_gib * _MIB_PER_GIB:
        most = int((demand.node_gib * _MIB_PER_GIB - speeds.replica_mib) / speeds.category_mib)
        found.append(
            f"a replica needs {replica_mib / _MIB_PER_GIB:.1f} GiB, a node has"
            f" {demand.node_gib:g}: share {demand.categories:,} categories among pools of at most"
            f" {most:,}"
        )
    poll_s = speeds.registry_s * demand.categories / 1000
    if poll_s > 10:
        found.append(
            f"the registry takes {poll_s:.0f} s to tell the aliases of {demand.categories:,}"
            " categories, longer than the 10 s between two questions: raise registry.poll_s and"
            " let its webhooks tell of changes"
        )
    if not demand.shared and busy < 0.05 and demand.categories > 50:
        found.append(
            f"replicas are busy {busy:.1%} of their time: let rarely asked categories share a pool"
        )
    return found
