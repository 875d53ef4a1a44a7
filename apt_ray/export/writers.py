"""Graphs to the files of each format, with the header inside."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from apt_ray.export.graph import DetectorGraph
from apt_ray.export.header import INPUT, KEY, OUTPUTS, ExportHeader, Format
from apt_ray.optional import require

Files = dict[str, bytes]
"""The content of each file of a graph, by suffix."""

SUFFIXES: dict[Format, tuple[str, ...]] = {
    "onnx": (".onnx",),
    "openvino": (".xml", ".bin"),
    "torchscript": (".torchscript",),
}
"""Of the files of a format; the first is the one that is opened."""

MODULES: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "torchscript": (),
}
"""What a format needs to be written and checked."""

_ORIGIN, _LINEAR = "pkg.torch.onnx.fx_node", "torch.ops.aten.linear"
"""What PyTorch's exporter says of a node that was a linear layer."""

_OPSET = 18
"""Of ONNX: the oldest that PyTorch's exporter writes, since runtimes on devices are seldom new."""


def write_torchscript(graph: DetectorGraph, example: torch.Tensor, header: ExportHeader) -> Files:
    """The graph as TorchScript."""
    buffer = io.BytesIO()
    with quiet(), torch.no_grad():
        # What is checked is the file that this becomes, on many images.
        traced = torch.jit.trace(graph, example, check_trace=False)
        torch.jit.save(traced, buffer, _extra_files={KEY: header.model_dump_json()})
    return {".torchscript": buffer.getvalue()}


def to_onnx(graph: DetectorGraph, example: torch.Tensor, *, batch: int | None) -> Any:
    """The graph as a ModelProto."""
    require("onnx", "onnxscript", extra="edge")
    free = {0: torch.export.Dim("images", min=1, max=4096)}
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            graph,
            (example,),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes=None if batch else (free,),
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto


def write_onnx(model: Any, header: ExportHeader) -> Files:
    """A ModelProto with the header in its metadata."""
    # Exporters write into each node where it comes from, with paths of this machine.
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.value_info, *model.graph.initializer):
        value.ClearField("metadata_props")
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, header.model_dump_json()
    return {".onnx": model.SerializeToString()}


def write_openvino(model: Any, header: ExportHeader) -> Files:
    """A ModelProto as OpenVINO's intermediate representation, weights as they are."""
    require("openvino", extra="edge")
    import openvino

    # `openvino.convert_model` does the same, and reports to its makers.
    converted = openvino.Core().read_model(model.SerializeToString())
    converted.set_rt_info(header.model_dump_json(), [KEY])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.xml"
        openvino.save_model(converted, path, compress_to_fp16=False)
        return {suffix: path.with_suffix(suffix).read_bytes() for suffix in (".xml", ".bin")}


def quantise(model: Any) -> Any:
    """A ModelProto whose linear layers multiply in int8, with ranges that follow each image.

    Convolutions stay in float32: a memory compares small differences of what they give, and loses
    them in 8 bits.
    """
    require("onnx", "onnxruntime", extra="edge")
    import onnx
    from onnxruntime import quantization

    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        quantization.quantize_dynamic(
            model,
            path,
            nodes_to_quantize=_linear_layers(model),
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
        )
        return onnx.load(path)


def _linear_layers(model: Any) -> list[str]:
    """The names of those of the encoders: the score rule multiplies, but has no layers."""
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm")
        and any(entry.key == _ORIGIN and _LINEAR in entry.value for entry in node.metadata_props)
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print, log and warn of: what they made is checked instead."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
