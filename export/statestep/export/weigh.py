"""Weights in half the bytes: stored as float16, computed with as float32, so that a row's bits still are its own."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from statestep.export.surgery import Builder

LEAST_BYTES = 1024  # of a constant that counts as a weight; smaller ones are scales and shapes


def halved(model: ModelProto) -> ModelProto:
    """A copy that stores its weights (float32 constants of `LEAST_BYTES` or more) as float16 and computes as before."""
    small = ModelProto()
    small.CopyFrom(model)
    graph = small.graph
    builder = Builder(graph)
    for tensor in list(graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or 4 * np.prod(tensor.dims) < LEAST_BYTES:
            continue
        value = numpy_helper.to_array(tensor).astype(np.float16)
        graph.initializer.remove(tensor)
        half = builder.constant(f"{tensor.name}/half", value, np.float16)
        cast = helper.make_node("Cast", [half], [tensor.name], name=f"{tensor.name}/Cast", to=TensorProto.FLOAT)
        graph.node.insert(0, cast)
    return small


def rounded(model: ModelProto) -> ModelProto:
    """A copy whose weights have the values that `halved` keeps, in float32: the reference of its proof."""
    copy = ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and 4 * np.prod(tensor.dims) >= LEAST_BYTES:
            value = numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return copy
