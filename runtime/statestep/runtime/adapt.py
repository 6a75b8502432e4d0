"""A step model from elsewhere, made to fit: constant inputs fixed, the time axis of a single step taken away.

Both are changes of the graph, made before there is a session: what hangs on a constant is then computed once, when the
session is made, and a step goes as it does with a model of our own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from statestep.runtime.contract import Contract, ContractError
from statestep.runtime.pairs import Tensor, batch_symbol, time_axis

AXES_AS_INPUT = 13  # the opset from which Squeeze and Unsqueeze take their axes as a tensor
IR_OWN_WEIGHTS = 4  # the file format from which a weight need not be listed as an input too

Array = np.ndarray[Any, Any]


def with_constants(model: ModelProto, constants: Mapping[str, Any], opset: int) -> ModelProto:
    """A copy whose inputs named in `constants` (name → number, list or array) have become weights.

    A number fills a fixed shape. An input with one free axis, a length for each stream say, is filled for as many
    rows as the batch has. Raises `ContractError` for a name that is no input, and a value that does not fit.
    """
    fixed = _copied(model)
    graph = fixed.graph
    free = {value.name: value for value in [*graph.input]}
    for name, value in constants.items():
        if name not in free:
            raise ContractError(f"the constant {name!r} is no input of the graph, it has {list(free)}")
        kind = free[name].type.tensor_type
        if not kind.elem_type:
            raise ContractError(f"the constant {name!r} cannot be set, the graph does not say what its input takes")
        shape = [dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim]
        array = _array(name, value, helper.tensor_dtype_to_np_dtype(kind.elem_type), shape)
        if None in shape and array.ndim == 0:
            _fill_for_the_batch(graph, name, array, shape, [v for v in free.values() if v.name not in constants], opset)
        else:
            graph.initializer.append(numpy_helper.from_array(array, name))
        graph.input.remove(free[name])
    return fixed


def one_by_one(
    model: ModelProto, contract: Contract, inputs: Sequence[Tensor], outputs: Sequence[Tensor], opset: int
) -> tuple[ModelProto, Contract] | None:
    """A model that takes sequences of one timestep, [B, 1, F], as one that takes rows, [B, F]; its answers likewise.

    None for a model that takes rows. `contract` was guessed from the tensors `inputs` and `outputs` of `model`.
    """
    x = next(tensor for tensor in inputs if tensor.name == contract.input)
    axis = time_axis(x, batch_symbol(contract, inputs))
    if axis is None:
        return None
    changed = _copied(model)
    graph = changed.graph
    inside = _unused(graph, f"{x.name}_with_time")
    _rename(graph.node, x.name, inside)
    graph.node.insert(0, _at_axis(graph, "Unsqueeze", x.name, inside, axis, opset))
    _drop_axis(graph.input, x.name, axis)
    shapes = {tensor.name: tensor.shape for tensor in outputs}
    answers = []
    for output in contract.outputs:
        shape, batch = shapes[output.name], output.batch_axis
        place = axis if axis != batch else 1 - batch  # where a layer leaves the time that it was given
        if len(shape) == 3 and 0 <= place != batch and shape[place] in (1, x.shape[axis]) and shape[place] is not None:
            inside = _unused(graph, f"{output.name}_with_time")
            _rename(graph.node, output.name, inside)
            graph.node.append(_at_axis(graph, "Squeeze", inside, output.name, place, opset))
            _drop_axis(graph.output, output.name, place)
            output = replace(output, batch_axis=batch - (place < batch))
        answers.append(output)
    return changed, replace(contract, outputs=tuple(answers))


def _copied(model: ModelProto) -> ModelProto:
    """A copy whose inputs are only those that must be fed: old files list their weights among them."""
    copy = ModelProto()
    copy.CopyFrom(model)
    weights = {tensor.name for tensor in copy.graph.initializer}
    fed = [value for value in model.graph.input if value.name not in weights]
    del copy.graph.input[:]
    copy.graph.input.extend(fed)
    copy.ir_version = max(copy.ir_version, IR_OWN_WEIGHTS)
    return copy


def _array(name: str, value: Any, dtype: np.dtype[Any], shape: list[int | None]) -> Array:
    """A constant as an array that fits the input's dtype and shape."""
    try:
        given = np.asarray(value)
        with np.errstate(all="ignore"):
            array = given.astype(dtype)
            kept = given.dtype.kind in "biuf" and (dtype.kind == "b") == (given.dtype.kind == "b")
            kept = kept and bool((np.isfinite(array) if dtype.kind == "f" else array == given).all())
    except (TypeError, ValueError, OverflowError):
        kept = False
    if not kept:
        raise ContractError(f"the constant {name!r} is {value!r}, the input takes {dtype}")
    if array.ndim == 0 and None not in shape:
        return np.full([size or 0 for size in shape], array)
    fits = len(shape) == array.ndim and all(a in (None, b) for a, b in zip(shape, array.shape, strict=True))
    if array.ndim and not fits:
        raise ContractError(f"the constant {name!r} has shape {list(array.shape)}, the input has {_shown(shape)}")
    return array


def _fill_for_the_batch(
    graph: GraphProto,
    name: str,
    value: Array,
    shape: list[int | None],
    others: list[onnx.ValueInfoProto],
    opset: int,
) -> None:
    """Make `name` a tensor of `shape` whose one free axis has the size of the batch, as another input has it."""
    if shape.count(None) > 1:
        raise ContractError(f"the constant {name!r} has shape {_shown(shape)}, of more than one free axis: give a list")
    mine = next(v for v in graph.input if v.name == name).type.tensor_type.shape.dim[shape.index(None)].dim_param
    places = [
        (value.name, axis, dim.dim_param)
        for value in others
        for axis, dim in enumerate(value.type.tensor_type.shape.dim)
        if not dim.HasField("dim_value")
    ]
    same = [place for place in places if mine and place[2] == mine] or places
    if not same:
        raise ContractError(f"the constant {name!r} has shape {_shown(shape)}, no other input tells the free size")
    source, axis, _ = same[0]
    sizes, rows, target = (_unused(graph, f"{name}_{part}") for part in ("sizes", "rows", "shape"))
    weights = {
        f"{target}_axis": np.array([axis], np.int64),
        f"{target}_value": value,
        **{f"{target}_{place}": np.array([size], np.int64) for place, size in enumerate(shape) if size is not None},
    }
    graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in weights.items())
    parts = [rows if size is None else f"{target}_{place}" for place, size in enumerate(shape)]
    made = [
        helper.make_node("Shape", [source], [sizes]),
        helper.make_node("Gather", [sizes, f"{target}_axis"], [rows]),
        helper.make_node("Concat", parts, [target], axis=0),
        helper.make_node("Expand", [f"{target}_value", target], [name]),
    ]
    for node in reversed(made):
        graph.node.insert(0, node)


def _at_axis(graph: GraphProto, operator: str, source: str, target: str, axis: int, opset: int) -> NodeProto:
    """Squeeze or Unsqueeze, as the opset writes its axes."""
    if opset < AXES_AS_INPUT:
        return helper.make_node(operator, [source], [target], axes=[axis])
    axes = _unused(graph, f"{target}_axes")
    graph.initializer.append(helper.make_tensor(axes, TensorProto.INT64, [1], [axis]))
    return helper.make_node(operator, [source, axes], [target])


def _drop_axis(values: Iterable[onnx.ValueInfoProto], name: str, axis: int) -> None:
    """Take an axis out of the shape that the graph declares of `name`, where it declares one."""
    for value in values:
        shape = value.type.tensor_type.shape
        if value.name == name and axis < len(shape.dim):
            del shape.dim[axis]


def _rename(nodes: Iterable[NodeProto], old: str, new: str) -> None:
    """Call a tensor otherwise wherever nodes take or give it, in graphs within graphs too."""
    for node in nodes:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _rename(inner.node, old, new)
                for value in inner.output:
                    if value.name == old:
                        value.name = new


def _unused(graph: GraphProto, name: str) -> str:
    """`name`, or with strokes behind it until no tensor is called so."""
    used = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    used |= {name for node in graph.node for name in (*node.input, *node.output)}
    while name in used:
        name += "_"
    return name


def _shown(shape: list[int | None]) -> str:
    return str(["free" if size is None else size for size in shape])
