"""Weights in half the bytes: stored as float16, computed with as float32, so that a row's bits still are its own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.surgery import Builder, constants_of

LEAST_BYTES = 1024  # of a constant that counts as a weight; smaller ones are scales and shapes


def rounded(model: ModelProto) -> ModelProto:
    """A copy whose weights (float32 constants of `LEAST_BYTES` or more) have the values that float16 can hold.

    Raises `ExportError` for a weight beyond the range of float16.
    """
    copy = _with_weights_as_initialisers(model)
    for tensor in copy.graph.initializer:
        if _is_weight(tensor):
            value = numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):
                less = value.astype(np.float16).astype(np.float32)
            if not np.isfinite(less[np.isfinite(value)]).all():
                raise ExportError(
                    f"weight {tensor.name!r} holds {np.abs(value).max():.4g}, beyond the 65,504 at which float16 ends: "
                    "leave the weights as they are (fp32)"
                )
            tensor.CopyFrom(numpy_helper.from_array(less, tensor.name))
    return copy


def halved(model: ModelProto) -> ModelProto:
    """A copy that stores as float16 every weight that loses nothing by it, and computes as before.

    Of a rounded graph these are its weights; what was computed of them beforehand, a sum of biases say, need not be.
    """
    small = _with_weights_as_initialisers(model)
    graph = small.graph
    builder = Builder(graph)
    for tensor in list(graph.initializer):
        if not _is_weight(tensor):
            continue
        value = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = value.astype(np.float16)
        if half.astype(np.float32).tobytes() != value.tobytes():
            continue
        graph.initializer.remove(tensor)
        stored = builder.constant(f"{tensor.name}/half", half, np.float16)
        cast = helper.make_node("Cast", [stored], [tensor.name], name=f"{tensor.name}/Cast", to=TensorProto.FLOAT)
        graph.node.insert(0, cast)
    return small


def cost(full: Mapping[str, Array], less: Mapping[str, Array]) -> float:
    """The largest difference between the outputs of two graphs, in units of each output's spread.

    >>> cost({"y": np.array([0.0, 2.0])}, {"y": np.array([0.0, 2.5])})
    0.5
    """
    largest = 0.0
    for name, value in full.items():
        if value.dtype.kind == "f":
            spread = max(float(value.astype(np.float64).std()), float(np.finfo(np.float32).tiny))
            largest = max(largest, float(np.abs(value.astype(np.float64) - less[name]).max()) / spread)
    return largest


def _is_weight(tensor: TensorProto) -> bool:
    return tensor.data_type == TensorProto.FLOAT and 4 * int(np.prod(tensor.dims)) >= LEAST_BYTES


def _with_weights_as_initialisers(model: ModelProto) -> ModelProto:
    """A copy in which large constants are initialisers, not nodes."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    held = constants_of(graph)
    for node in list(graph.node):
        if node.op_type == "Constant" and held[node.output[0]].nbytes >= LEAST_BYTES:
            graph.initializer.append(numpy_helper.from_array(held[node.output[0]], node.output[0]))
            graph.node.remove(node)
    return copy
