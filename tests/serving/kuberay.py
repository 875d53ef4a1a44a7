"""KubeRay's objects as far as serving/kubernetes uses them, as JSON schemas of our own.

The fields are those of KubeRay's API reference (ray.io/v1, version 1.7). A field that is not here
is refused, so that a misspelt one is; pod templates are Kubernetes' own and checked by its schemas.
KubeRay's whole definitions come with KubeRay alone: the tests read them too where KUBERAY_CRDS
names the folder of their files (`ray.io_rayclusters.yaml`, `ray.io_rayservices.yaml`).
"""

from collections.abc import Iterator
from typing import Any

_COUNT = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_ANYTHING = {"type": "object"}


def _object(*required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


_METADATA = _object("name", name=_TEXT, namespace=_TEXT)
_CLUSTER = _object(
    "rayVersion",  # without it, KubeRay refuses a token
    "headGroupSpec",
    rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
    authOptions=_object(
        "mode", mode={"enum": ["disabled", "token"]}, secretName={"type": "string"}
    ),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=_object(
        version={"enum": ["v1", "v2"]},
        idleTimeoutSeconds=_COUNT,
        resources=_ANYTHING,
        securityContext=_ANYTHING,
        volumeMounts={"type": "array", "items": _ANYTHING},
    ),
    headGroupSpec=_object("template", rayStartParams=_TEXTS, template=_ANYTHING),
    workerGroupSpecs={
        "type": "array",
        "items": _object(
            *("groupName", "minReplicas", "maxReplicas", "template"),
            groupName={"type": "string"},
            minReplicas=_COUNT,
            maxReplicas=_COUNT,
            rayStartParams=_TEXTS,
            template=_ANYTHING,
        ),
    },
)

SCHEMAS = {
    "RayCluster": _object(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": "RayCluster"},
        metadata=_METADATA,
        spec=_CLUSTER,
    ),
    "RayService": _object(
        *("apiVersion", "kind", "metadata", "spec"),
        apiVersion={"const": "ray.io/v1"},
        kind={"const": "RayService"},
        metadata=_METADATA,
        spec=_object(
            *("serveConfigV2", "rayClusterConfig"),
            serveConfigV2={"type": "string"},
            rayClusterConfig=_CLUSTER,
            upgradeStrategy=_object(
                type={"enum": ["NewCluster", "NewClusterWithIncrementalUpgrade", "None"]}
            ),
            rayClusterDeletionDelaySeconds=_COUNT,
        ),
    ),
}


def unknown_fields(value: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    """What a definition of Kubernetes does not know; its schemas do not refuse that, its server
    drops it."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, item in value.items():
            inner = known.get(name, others if isinstance(others, dict) else None)
            if inner is not None:
                yield from unknown_fields(item, inner, f"{path}.{name}")
            elif not others and schema.get("type") == "object" and (known or path):
                yield f"{path}.{name}"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from unknown_fields(item, schema.get("items", {}), f"{path}[{index}]")
