"""A running Ray cluster as the fleet needs it: how much it holds, and its Serve configuration."""

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.experimental import internal_kv
from ray.serve.schema import ServeInstanceDetails

from apt_ray.errors import FleetError
from serving.app import controller_handle
from serving.controller.orders import FleetStatus

_PROBE_S = 5
_CLAIM = "apt-ray-fleet-revision-"
_CLAIM_VALID_S = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """What the cluster holds, used or not; with an autoscaler, what it may grow to.

    Attributes:
        cpus, gpus: in all.
        node_cpus, node_gpus: of the largest node that is up.
        grows: whether an autoscaler may add nodes.
    """

    cpus: float
    gpus: float
    node_cpus: float
    node_gpus: float
    grows: bool


class Cluster:
    """A Ray cluster, reached as a driver and through its dashboard's REST interface.

    Args:
        address: `auto`, which honours RAY_ADDRESS, or host:port of its head.

    Raises:
        FleetError: There is no cluster, or it has no dashboard.
    """

    def __init__(self, address: str = "auto") -> None:
        try:
            _probe(address)
            context = ray.init(
                address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise FleetError(
                f"no Ray cluster answers at {address!r} ({error}): start one with"
                " `ray start --head`, or name its address with --ray-address"
            ) from error
        if not context.dashboard_url:
            raise FleetError(
                "this Ray cluster runs without its dashboard, which takes Serve's configuration:"
                " start it with `ray start --head`, after `pip install 'ray[default,serve]'`"
            )
        try:
            self._serve = ServeSubmissionClient(f"http://{context.dashboard_url}")
        except (ConnectionError, RuntimeError) as error:
            raise FleetError(
                f"Ray's dashboard at {context.dashboard_url} does not take this request ({error}):"
                " deploy from one that reaches it, such as the head node, and name its host in"
                " no_proxy where http_proxy is set"
            ) from error

    def capacity(self) -> Capacity:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        # Ray has no public name for this; its own libraries ask here too.
        limits = ray._private.state.state.get_max_resources_from_cluster_config() or {}

        def total(resource: str) -> float:
            present: float = sum(node.get(resource, 0) for node in nodes)
            return max(present, limits.get(resource, 0))

        return Capacity(
            cpus=total("CPU"),
            gpus=total("GPU"),
            node_cpus=max(node.get("CPU", 0) for node in nodes),
            node_gpus=max(node.get("GPU", 0) for node in nodes),
            grows=bool(limits),
        )

    def serve_details(self) -> ServeInstanceDetails:
        """Everything that Serve runs, with its configuration and state."""
        return ServeInstanceDetails.model_validate(self._serve.get_serve_details())

    def deploy(self, config: Mapping[str, Any]) -> None:
        """Make `config`, a ServeDeploySchema, the whole of what Serve runs."""
        try:
            self._serve.deploy_applications(dict(config))
        except RuntimeError as error:
            raise FleetError(f"Serve refuses the fleet's configuration: {error}") from error

    @staticmethod
    @contextmanager
    def claimed(revision: int) -> Iterator[None]:
        """Be the one deploy that makes this revision; FleetError if another one already does.

        If the block raises, the claim is given up. That of a process that died is void after some
        minutes.
        """
        key = f"{_CLAIM}{revision}".encode()
        now = str(time.time()).encode()
        if internal_kv._internal_kv_put(key, now, overwrite=False):
            claimed_at = float(internal_kv._internal_kv_get(key) or 0)
            if time.time() - claimed_at < _CLAIM_VALID_S:
                raise FleetError(
                    f"another deploy makes revision {revision} at this moment: wait for it, look at"
                    " `python -m serving.fleet status`, and deploy again if it still is needed"
                )
            internal_kv._internal_kv_put(key, now, overwrite=True)
        try:
            yield
        except BaseException:
            internal_kv._internal_kv_del(key)
            raise

    def fleet_status(self) -> FleetStatus | None:
        """What the fleet's controller says; None if it does not answer now."""
        try:
            status: FleetStatus = controller_handle().status.remote().result(timeout_s=_PROBE_S)
            return status
        except Exception:
            return None

    def shut_down_serve(self) -> None:
        self._serve.delete_applications()  # type: ignore[no-untyped-call]
        for key in internal_kv._internal_kv_list(_CLAIM):
            internal_kv._internal_kv_del(key)  # revisions begin anew


def _probe(address: str) -> None:
    """OSError if a named head does not answer: Ray itself would try on for many minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=_PROBE_S).close()
