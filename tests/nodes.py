"""A Ray cluster of several nodes on this machine, which share no folder of their own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray._private.node import Node
from ray.cluster_utils import Cluster

from tests.processes import processes_below


@dataclass(frozen=True)
class Nodes:
    """The nodes: each has a home, under which caches lie, that no other knows."""

    cluster: Cluster
    homes: Mapping[str, Path]
    workers: Mapping[str, Node]

    @property
    def address(self) -> str:
        address: str = self.cluster.address
        return address

    def worker_of(self, actor: str) -> str | None:
        """The worker on which an actor of this class runs; None if that is the head."""
        for node_id, node in self.workers.items():
            (raylet,) = node.all_processes["raylet"]
            if processes_below(raylet.process.pid, f"ray::{actor}"):
                return node_id
        return None

    def lose(self, node_id: str) -> None:
        """Kill all processes of a worker, as a loss of its machine does."""
        self.cluster.remove_node(self.workers[node_id], allow_graceful=False)


@contextmanager
def three_nodes(
    folder: Path, *, environment: Mapping[str, str], head_cpus: float = 1, dashboard: bool = False
) -> Iterator[Nodes]:
    """A head and two workers of one CPU, whose processes have these variables, too."""

    def arguments(name: str) -> dict[str, object]:
        home = folder / name
        home.mkdir()
        # As in pods, which do nothing else: Ray's workers do not give way to other processes.
        own = {"HOME": str(home), "RAY_worker_niceness": "0"}
        return {"env_vars": {**environment, **own}}

    head = {"num_cpus": head_cpus, "include_dashboard": dashboard, **arguments("head")}
    if dashboard:
        head["dashboard_port"] = 0
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        homes, workers = {cluster.head_node.node_id: folder / "head"}, {}
        for name in ("worker-1", "worker-2"):
            node = cluster.add_node(num_cpus=1, **arguments(name))
            homes[node.node_id], workers[node.node_id] = folder / name, node
        cluster.wait_for_nodes()
        yield Nodes(cluster, homes, workers)
    finally:
        cluster.shutdown()
