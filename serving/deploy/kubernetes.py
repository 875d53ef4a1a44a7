"""A fleet for KubeRay: what of its RayService the fleet file decides, as text."""

import hashlib
import json
import math
from typing import Any

import yaml

from serving.deploy.plan import HttpAddress, Pool, check_exposure, serve_config
from serving.settings import Fleet

NAME = "apt-ray-fleet"
"""The RayService of serving/kubernetes/base."""
ADDRESS = HttpAddress(host="0.0.0.0", port=8000)
"""Where the fleet listens in a pod; ports and network policies of serving/kubernetes/base fit."""
_DEPLOYED_BY = "KubeRay"


def render(fleet: Fleet, pools: list[Pool], *, tracking_uri: str, gpus: bool) -> str:
    """The fleet's part of a RayService, in YAML: a patch for kustomize.

    Equal fleets give equal text. Serve's configuration is that of a deploy; KubeRay hands it to
    the cluster that runs. The options of Serve's HTTP server, which a running one does not change,
    stand beside it in an annotation of the head: if they change, KubeRay starts another cluster.

    Raises:
        FleetError: The fleet has no tokens, or the registry's address holds a password.
    """
    check_exposure(fleet, ADDRESS)

    def config(revision: int) -> dict[str, Any]:
        return serve_config(
            fleet,
            pools,
            revision=revision,
            deployed_by=_DEPLOYED_BY,
            tracking_uri=tracking_uri,
            address=ADDRESS,
            gpus=gpus,
        )

    # The controller takes a plan of another revision for a deploy. Nothing here knows the last one.
    digest = hashlib.sha256(json.dumps(config(0), sort_keys=True).encode()).hexdigest()
    wanted = config(int(digest[:8], 16))
    http = " ".join(f"{name}={value}" for name, value in wanted["http_options"].items())
    head = {"template": {"metadata": {"annotations": {"apt-ray/http-options": http}}}}
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": NAME},
        "spec": {
            "serveConfigV2": _Lines(_yaml(wanted)),
            "rayClusterConfig": {"headGroupSpec": head},
        },
    }
    return _yaml(manifest)


def demand(pools: list[Pool], *, gpus: bool) -> str:
    """What the pools' replicas ask of the worker pods, at the least and at the most; one line."""

    def total(resource: str, bound: str) -> float:
        return math.fsum(
            getattr(pool.settings, resource) * getattr(pool.settings.autoscaling, bound)
            for pool in pools
        )

    resources = {"CPUs": "num_cpus"} | ({"GPUs": "num_gpus"} if gpus else {})
    parts = [
        f"{total(field, 'min_replicas'):g} to {total(field, 'max_replicas'):g} {unit}"
        for unit, field in resources.items()
    ]
    return f"{len(pools)} pools ask for {' and '.join(parts)} of the worker pods"


class _Lines(str):
    """Text that YAML shows line by line."""


class _Dumper(yaml.SafeDumper):
    """Plain values, in the order in which they come."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_Dumper.add_representer(
    _Lines, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
)


def _yaml(value: object) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=math.inf)
    return text
