"""What encodes images in a process of the fleet or of a batch."""

from apt_ray.errors import ExportError, MissingDependencyError
from apt_ray.export.compiled import compile_encoders
from apt_ray.features.clip import FrozenCLIP
from serving.logs import logger
from serving.settings import Runtime


def choose_runtime(backbone: FrozenCLIP, runtime: Runtime, *, threads: int) -> None:
    """Let a backbone encode images by a runtime from now on; on a GPU that is PyTorch.

    Args:
        threads: that OpenVINO computes on.

    Raises:
        MissingDependencyError: OpenVINO is asked for by name, and not installed.
        ExportError: it is asked for by name, and cannot compile the encoders, or computes other
            features.
    """
    if backbone.device.type != "cpu" or runtime == "torch":
        return
    try:
        compile_encoders(backbone, threads=threads)
    except (ExportError, MissingDependencyError) as error:
        if runtime == "openvino":
            raise
        logger.warning("PyTorch encodes images: %s", error)
