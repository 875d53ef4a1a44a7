"""What runs an exported graph: ONNX Runtime, OpenVINO, or TorchScript in PyTorch.

N images, H, W pixels, S pixels a side of a map.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from apt_ray.errors import AptError, ExportError
from apt_ray.export.header import INPUT, KEY, OUTPUTS, Format
from apt_ray.export.writers import quiet
from apt_ray.optional import require

Answer = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]
"""Maps `(N, S, S)`, scores `(N,)` and verdicts `(N,)`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Runtime:
    """A graph, ready to run on this machine's CPU.

    Attributes:
        header: what its metadata say, None if they say nothing of ours.
        run: uint8 pixels `(N, H, W, 3)` to what the graph says of them.
    """

    header: str | None
    run: Callable[[npt.NDArray[np.uint8]], Answer]


def open_runtime(
    kind: Format,
    files: Mapping[str, bytes],
    *,
    threads: int | None = None,
    source: str,
) -> Runtime:
    """The runtime of a graph in memory.

    Args:
        kind: format of the graph.
        files: their content by suffix, as `writers` has it.
        threads: that it computes on; None leaves it to the runtime. TorchScript computes on those
            of PyTorch.
        source: names the graph in messages.

    Raises:
        MissingDependencyError: The runtime is not installed.
        ExportError: It cannot read the graph.
    """
    try:
        return _OPENERS[kind](files, threads)
    except AptError:
        raise
    except Exception as error:  # each runtime has its own
        raise ExportError(
            f"{source} cannot be read as {kind} ({_brief(error)}): copy it again from where it"
            f" came, or export it again with `apt-ray export`"
        ) from error


def _open_onnx(files: Mapping[str, bytes], threads: int | None) -> Runtime:
    require("onnxruntime", extra="edge")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    if threads:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        files[".onnx"], options, providers=["CPUExecutionProvider"]
    )

    def run(pixels_NHW3: npt.NDArray[np.uint8]) -> Answer:
        maps_NSS, scores_N, verdicts_N = session.run(list(OUTPUTS), {INPUT: pixels_NHW3})
        return maps_NSS, scores_N, verdicts_N

    header = session.get_modelmeta().custom_metadata_map.get(KEY)
    return Runtime(header=header, run=run)


def _open_openvino(files: Mapping[str, bytes], threads: int | None) -> Runtime:
    require("openvino", extra="edge")
    import openvino

    core = openvino.Core()
    model = core.read_model(files[".xml"], openvino.Tensor(_bytes(files[".bin"])))
    header = str(model.get_rt_info([KEY]).astype(str)) if model.has_rt_info([KEY]) else None
    # Left alone, OpenVINO computes in bfloat16 wherever the processor can.
    hint = "bf16" if _precision(header) == "bfloat16" else "f32"
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", settings)

    def run(pixels_NHW3: npt.NDArray[np.uint8]) -> Answer:
        answered = compiled([pixels_NHW3])
        maps_NSS, scores_N, verdicts_N = (answered[place] for place in range(len(OUTPUTS)))
        return maps_NSS, scores_N, verdicts_N.astype(np.bool_)

    return Runtime(header=header, run=run)


def _open_torchscript(files: Mapping[str, bytes], threads: int | None) -> Runtime:
    import torch

    said = {KEY: ""}
    with quiet():
        graph = torch.jit.load(io.BytesIO(files[".torchscript"]), "cpu", _extra_files=said)

    def run(pixels_NHW3: npt.NDArray[np.uint8]) -> Answer:
        with torch.inference_mode():
            maps_NSS, scores_N, verdicts_N = graph(torch.from_numpy(pixels_NHW3))
        return maps_NSS.numpy(), scores_N.numpy(), verdicts_N.numpy()

    text: str | bytes = said[KEY]
    header = text.decode() if isinstance(text, bytes) else text
    return Runtime(header=header or None, run=run)


_OPENERS: dict[Format, Callable[[Mapping[str, bytes], int | None], Runtime]] = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "torchscript": _open_torchscript,
}


def _bytes(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)


def _precision(header: str | None) -> str | None:
    """What a header says, damaged or not; whoever reads all of it says what is wrong."""
    try:
        found: str | None = json.loads(header or "{}").get("precision")
        return found
    except (ValueError, AttributeError):
        return None


def _brief(error: Exception) -> str:
    """Its first line: runtimes print whole stacks."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
