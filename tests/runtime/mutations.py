"""Ways to damage a model file: as a bad disk would, and as somebody would who knows what is in it.

`mutate(data, seed)` gives the same bytes for the same seed. A third of the mutants is damaged byte by byte; the others
are parsed, changed in one to three places that mean something, and written again, so that they get past a parser.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from statestep.runtime.contract import CONTRACT_KEY
from statestep.runtime.operators import OPERATORS
from statestep.runtime.tensors import ELEMENTS

Rng = np.random.Generator

WHOLE = (0, 1, -1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, -(2**31), 2**32 + 1, 2**62, 2**63 - 1, -(2**63))
REAL = (0.0, -0.0, 1.0, -1.0, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
NAMES = ("", "x", "zero", "\x1b[2J", "a\nb", "n" * 5000, "../../etc/passwd", "*/_ORT_MEM_ADDR_/*", "Relu", "auto")
OPERATOR_NAMES = sorted(OPERATORS)


def mutate(data: bytes, seed: int) -> tuple[str, bytes]:
    """A damaged copy of a model file, and in words how it was damaged."""
    rng = np.random.default_rng(seed)
    if rng.random() < 1 / 3:
        change = _pick(rng, BYTES)
        return change.__name__, change(rng, data)
    model = onnx.load_model_from_string(data)
    changes = [_pick(rng, MEANINGS) for _ in range(rng.integers(1, 4))]
    for change in changes:
        change(rng, model)
    return "+".join(change.__name__ for change in changes), bytes(model.SerializeToString())


def _pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


# Byte by byte.


def bits_flipped(rng: Rng, data: bytes) -> bytes:
    damaged = bytearray(data)
    for place in rng.integers(0, len(data), int(rng.integers(1, 4))).tolist():
        damaged[place] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def cut_short(rng: Rng, data: bytes) -> bytes:
    return data[: int(rng.integers(0, len(data)))]


def run_replaced(rng: Rng, data: bytes) -> bytes:
    start, length = int(rng.integers(0, len(data))), int(rng.integers(1, 65))
    run: bytes = _pick(rng, (rng.bytes(length), b"\0" * length, b"\xff" * length, b"\x80" * length))
    return data[:start] + run + data[start + length :]


def run_removed(rng: Rng, data: bytes) -> bytes:
    start, length = int(rng.integers(0, len(data))), int(rng.integers(1, 65))
    return data[:start] + data[start + length :]


def run_put_in(rng: Rng, data: bytes) -> bytes:
    start, length = int(rng.integers(0, len(data))), int(rng.integers(1, 65))
    return data[:start] + rng.bytes(length) + data[start:]


def run_copied(rng: Rng, data: bytes) -> bytes:
    source, target = rng.integers(0, len(data), 2).tolist()
    return data[:target] + data[source : source + int(rng.integers(1, 513))] + data[target:]


BYTES: tuple[Callable[[Rng, bytes], bytes], ...] = (
    bits_flipped,
    cut_short,
    run_replaced,
    run_removed,
    run_put_in,
    run_copied,
)


# By meaning.


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all graphs in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from graphs(inner)


def every_node(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of all graphs in it."""
    return (node for inner in graphs(graph) for node in inner.node)


def _nodes(model: ModelProto) -> list[NodeProto]:
    return list(every_node(model.graph))


def _tensors(model: ModelProto) -> list[TensorProto]:
    held = [tensor for graph in graphs(model.graph) for tensor in graph.initializer]
    return held + [a.t for node in _nodes(model) for a in node.attribute if a.type == AttributeProto.TENSOR]


def _attributes(model: ModelProto) -> list[AttributeProto]:
    return [attribute for node in _nodes(model) for attribute in node.attribute]


def _infos(model: ModelProto) -> list[onnx.ValueInfoProto]:
    return [i for g in graphs(model.graph) for part in (g.input, g.output, g.value_info) for i in part]


def _known_names(model: ModelProto) -> list[str]:
    return [name for node in _nodes(model) for name in (*node.input, *node.output)] + list(NAMES)


def tensor_shape(rng: Rng, model: ModelProto) -> None:
    """Dimensions that its bytes do not bear out."""
    if tensors := _tensors(model):
        tensor = _pick(rng, tensors)
        dims = list(tensor.dims)
        if dims and rng.random() < 0.7:
            dims[int(rng.integers(len(dims)))] = _pick(rng, WHOLE)
        else:
            dims.insert(int(rng.integers(len(dims) + 1)), _pick(rng, WHOLE))
        tensor.ClearField("dims")
        tensor.dims.extend(dims)


def tensor_resized(rng: Rng, model: ModelProto) -> None:
    """Another shape with the right number of bytes for it: only what uses the tensor can tell."""
    if tensors := _tensors(model):
        tensor = _pick(rng, tensors)
        shape = list(tensor.dims)
        change = int(rng.integers(5))
        if change == 0:
            shape = shape[::-1]
        elif change == 1:
            shape = [1, *shape]
        elif change == 2:
            shape = shape[1:]
        elif shape:
            shape[int(rng.integers(len(shape)))] = int(_pick(rng, (0, 1, 2, 5, 33)))
        _fill(tensor, shape, rng)


def tensor_values(rng: Rng, model: ModelProto) -> None:
    """Numbers at the edges of their type; in an axis, a shape or an index they lead anywhere."""
    if tensors := _tensors(model):
        _fill(tensor := _pick(rng, tensors), list(tensor.dims), rng)


def _fill(tensor: TensorProto, shape: list[int], rng: Rng) -> None:
    """Put other values of the same type into a tensor."""
    if tensor.data_type not in ELEMENTS or any(not 0 <= size <= 4096 for size in shape):
        return
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values = rng.choice(REAL if np.dtype(dtype).kind == "f" else WHOLE, size=shape)
    name = tensor.name
    with np.errstate(all="ignore"):
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(values).astype(dtype), name))


def tensor_type(rng: Rng, model: ModelProto) -> None:
    if tensors := _tensors(model):
        tensor = _pick(rng, tensors)
        same = [t for t, (size, _) in ELEMENTS.items() if size == ELEMENTS.get(tensor.data_type, (0, ""))[0]]
        tensor.data_type = _pick(rng, same or [1]) if rng.random() < 0.7 else int(rng.integers(-1, 30))


def attribute_value(rng: Rng, model: ModelProto) -> None:
    if attributes := _attributes(model):
        attribute = _pick(rng, attributes)
        if attribute.type == AttributeProto.INT:
            attribute.i = _pick(rng, WHOLE)
        elif attribute.type == AttributeProto.FLOAT:
            attribute.f = _pick(rng, REAL)
        elif attribute.type == AttributeProto.INTS:
            del attribute.ints[:]
            attribute.ints.extend(_pick(rng, WHOLE) for _ in range(rng.integers(0, 5)))
        elif attribute.type == AttributeProto.STRING:
            attribute.s = _pick(rng, NAMES).encode()


def attribute_renamed(rng: Rng, model: ModelProto) -> None:
    if attributes := _attributes(model):
        _pick(rng, attributes).name = _pick(rng, attributes).name


def attribute_type(rng: Rng, model: ModelProto) -> None:
    if attributes := _attributes(model):
        _pick(rng, attributes).type = int(rng.integers(0, 15))


def attribute_added(rng: Rng, model: ModelProto) -> None:
    node = _pick(rng, _nodes(model))
    name = _pick(rng, ("axis", "axes", "hidden_size", "direction", "layout", "keepdims", "to", "perm", "value", "body"))
    node.attribute.append(helper.make_attribute(name, _pick(rng, (1, -7, 2**40, [1, 0], [2**33], 0.5, "reverse"))))


def attribute_removed(rng: Rng, model: ModelProto) -> None:
    node = _pick(rng, _nodes(model))
    if node.attribute:
        del node.attribute[int(rng.integers(len(node.attribute)))]


def operator_replaced(rng: Rng, model: ModelProto) -> None:
    _pick(rng, _nodes(model)).op_type = _pick(rng, OPERATOR_NAMES)


def operator_unknown(rng: Rng, model: ModelProto) -> None:
    node = _pick(rng, _nodes(model))
    node.domain = _pick(rng, ("ai.onnx", "com.microsoft", "ai.onnx.ml", "x", "ai.onnx.preview.training"))


def input_replaced(rng: Rng, model: ModelProto) -> None:
    """Another tensor of the graph, from before or after: a wrong shape, a wrong type, or a cycle."""
    node = _pick(rng, _nodes(model))
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = _pick(rng, _known_names(model))


def input_added(rng: Rng, model: ModelProto) -> None:
    _pick(rng, _nodes(model)).input.append(_pick(rng, _known_names(model)))


def input_removed(rng: Rng, model: ModelProto) -> None:
    node = _pick(rng, _nodes(model))
    if node.input:
        del node.input[int(rng.integers(len(node.input)))]


def input_left_out(rng: Rng, model: ModelProto) -> None:
    node = _pick(rng, _nodes(model))
    if node.input:
        node.input[int(rng.integers(len(node.input)))] = ""


def output_left_out(rng: Rng, model: ModelProto) -> None:
    node = _pick(rng, _nodes(model))
    if node.output:
        node.output[int(rng.integers(len(node.output)))] = ""


def output_renamed(rng: Rng, model: ModelProto) -> None:
    node = _pick(rng, _nodes(model))
    if node.output:
        node.output[int(rng.integers(len(node.output)))] = _pick(rng, _known_names(model))


def output_added(rng: Rng, model: ModelProto) -> None:
    _pick(rng, _nodes(model)).output.append(_pick(rng, _known_names(model)))


def node_moved(rng: Rng, model: ModelProto) -> None:
    graph = _pick(rng, [g for g in graphs(model.graph) if g.node])
    nodes = list(graph.node)
    order = rng.permutation(len(nodes))
    del graph.node[:]
    graph.node.extend(nodes[place] for place in order)


def node_removed(rng: Rng, model: ModelProto) -> None:
    graph = _pick(rng, [g for g in graphs(model.graph) if g.node])
    del graph.node[int(rng.integers(len(graph.node)))]


def node_copied(rng: Rng, model: ModelProto) -> None:
    graph = _pick(rng, list(graphs(model.graph)))
    graph.node.append(_pick(rng, _nodes(model)))


def node_wrapped(rng: Rng, model: ModelProto) -> None:
    """A node in the branch of an If, that one in another, up to nine deep."""
    graph = _pick(rng, [g for g in graphs(model.graph) if g.node])
    place = int(rng.integers(len(graph.node)))
    node = graph.node[place]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output if name]
    zero = numpy_helper.from_array(np.array(0, np.float32))
    other = helper.make_graph(
        [helper.make_node("Constant", [], [value.name], value=zero) for value in outputs], "other", [], outputs
    )
    for _ in range(_pick(rng, (1, 2, 9))):
        inner = helper.make_graph([node], "branch", [], outputs)
        node = helper.make_node("If", ["always"], [o.name for o in outputs], then_branch=inner, else_branch=other)
    graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    graph.node[place].CopyFrom(node)


def node_looped(rng: Rng, model: ModelProto) -> None:
    """A node in the body of a Loop that runs few times, never, or for ever."""
    graph = _pick(rng, [g for g in graphs(model.graph) if g.node])
    place = int(rng.integers(len(graph.node)))
    node = graph.node[place]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output if name]
    condition = helper.make_tensor_value_info("go_on", TensorProto.BOOL, [])
    count = helper.make_tensor_value_info("turn", TensorProto.INT64, [])
    body = helper.make_graph(
        [node, helper.make_node("Identity", ["go_on"], ["goes_on"])],
        "body",
        [count, condition],
        [helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []), *values],
    )
    often = _pick(rng, WHOLE) if rng.random() < 0.05 else _pick(rng, (0, 1, 3, -1))
    turns = numpy_helper.from_array(np.array(often, np.int64), "turns")
    graph.initializer.extend([turns, numpy_helper.from_array(np.array(True), "go")])
    loop = helper.make_node("Loop", ["turns", "go"], [value.name for value in values], body=body)
    graph.node[place].CopyFrom(loop)


def shape_declared(rng: Rng, model: ModelProto) -> None:
    info = _pick(rng, _infos(model))
    dims = info.type.tensor_type.shape.dim
    if dims and rng.random() < 0.7:
        dims[int(rng.integers(len(dims)))].dim_value = _pick(rng, WHOLE)
    else:
        dims.add().dim_param = _pick(rng, NAMES)


def type_declared(rng: Rng, model: ModelProto) -> None:
    info = _pick(rng, _infos(model))
    if rng.random() < 0.8:
        info.type.tensor_type.elem_type = int(rng.integers(0, 24))
    else:
        info.type.sequence_type.elem_type.tensor_type.elem_type = 1


def entrance_renamed(rng: Rng, model: ModelProto) -> None:
    _pick(rng, _infos(model)).name = _pick(rng, _known_names(model))


def entrance_removed(rng: Rng, model: ModelProto) -> None:
    graph = _pick(rng, list(graphs(model.graph)))
    values = _pick(rng, (graph.input, graph.output, graph.initializer))
    if values:
        del values[int(rng.integers(len(values)))]


def weight_fed(rng: Rng, model: ModelProto) -> None:
    """An initialiser that is also an input, or that has the name of a computed tensor."""
    if model.graph.initializer:
        _pick(rng, list(model.graph.initializer)).name = _pick(rng, _known_names(model))


def versions(rng: Rng, model: ModelProto) -> None:
    if rng.random() < 0.5 and model.opset_import:
        model.opset_import[0].version = _pick(rng, (*range(-1, 32), 2**40))
    else:
        model.ir_version = _pick(rng, (-1, 0, 1, 2, 3, 4, 7, 9, 12, 13, 99, 2**40))


def made_a_function(rng: Rng, model: ModelProto) -> None:
    """A node becomes a function that may call itself."""
    node = _pick(rng, list(model.graph.node))
    kept = NodeProto()
    kept.CopyFrom(node)
    kept.ClearField("attribute")
    inputs, outputs = [n for n in node.input if n], [n for n in node.output if n]
    if len(set(inputs)) == len(inputs) and inputs and outputs:
        if rng.random() < 0.3:
            kept.op_type, kept.domain = "F", "own"
        opset = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        model.functions.append(helper.make_function("own", "F", inputs, outputs, [kept], opset))
        model.opset_import.append(opset[1])
        node.CopyFrom(helper.make_node("F", inputs, outputs, domain="own"))


def contract_changed(rng: Rng, model: ModelProto) -> None:
    """One value somewhere in the contract."""
    for entry in model.metadata_props:
        if entry.key == CONTRACT_KEY:
            document = json.loads(entry.value)
            holder = _pick(rng, list(_holders(document)))
            place = _pick(rng, list(holder) if isinstance(holder, dict) else range(len(holder)))
            holder[place] = _pick(rng, (None, -1, 0, 2**70, 1e300, "", "x", "h0", [], {}, [[[]]], True, "float16"))
            entry.value = json.dumps(document)


def _holders(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


MEANINGS: tuple[Callable[[Rng, ModelProto], None], ...] = (
    tensor_shape,
    tensor_resized,
    tensor_resized,
    tensor_values,
    tensor_type,
    attribute_value,
    attribute_value,
    attribute_renamed,
    attribute_type,
    attribute_added,
    attribute_removed,
    operator_replaced,
    operator_replaced,
    operator_unknown,
    input_replaced,
    input_replaced,
    input_added,
    input_removed,
    input_left_out,
    output_left_out,
    output_renamed,
    output_added,
    node_moved,
    node_removed,
    node_copied,
    node_wrapped,
    node_looped,
    shape_declared,
    type_declared,
    entrance_renamed,
    entrance_removed,
    weight_fed,
    versions,
    made_a_function,
    contract_changed,
)
