"""What a model file may hold: read as hostile, and refused in one sentence before onnxruntime sees a byte of it.

Nothing here runs the model. What cannot be told from the file, such as a node that asks for terabytes only when it
runs, is for a process that may die: the first load of a file belongs into one.
"""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from math import prod
from pathlib import Path

import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

from statestep.runtime.operators import OPERATORS, reason_against
from statestep.runtime.tensors import SHOWN, RefusedError, check_info, check_tensor, refuse_sparse, shown

MAX_BYTES = 1 << 30  # of a file; protobuf ends at 2 GiB, the largest recurrent networks in use are a tenth of this
MAX_NODES = 100_000  # functions expanded; an unrolled sequence of a thousand steps has a third of it
MAX_DEPTH = 8  # graphs in graphs and functions in functions; exporters write three, each level is a recursion
OLDEST_OPSET = 7  # onnxruntime promises nothing below it, and Dropout there meant training
SENTENCE = 400  # characters of an error of onnxruntime's, which repeats names from the file as well

ATTRIBUTES = frozenset(
    (
        AttributeProto.FLOAT,
        AttributeProto.INT,
        AttributeProto.STRING,
        AttributeProto.TENSOR,
        AttributeProto.GRAPH,
        AttributeProto.FLOATS,
        AttributeProto.INTS,
        AttributeProto.STRINGS,
    )
)
CONDITIONED = {"If": 1, "Loop": 2}  # how many of their inputs are single numbers, which are read without looking
OPTIONAL = onnx.defs.OpSchema.FormalParameterOption.Optional
DEFAULT = ("", "ai.onnx")  # the two names of ONNX's own domain

Function = tuple[str, str, str]  # domain, name, overload
Constants = ChainMap[str, TensorProto]  # of a graph, then of those that it lies in
Extent = tuple[int, int]  # nodes with functions expanded, depth of graphs and functions


class ModelError(ValueError):
    """A file that is no step model: unreadable, not ONNX, refused by onnxruntime, or at odds with its contract."""


def read(path: str | Path, sha256: str | None = None) -> bytes:
    """The bytes of a model file, read once. With `sha256`, in hex, only these bytes will do.

    Raises `ModelError` where the file cannot be read, is too large, or is another one than the pinned.
    """
    try:
        if (size := Path(path).stat().st_size) > MAX_BYTES:
            raise ModelError(f"{path}: has {size:,} bytes, a model may have {MAX_BYTES:,}")
        with Path(path).open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # it may have grown, or be a device without an end
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise ModelError(
            f"{path}: has the SHA-256 {found}, yet {sha256.lower()} is pinned; "
            "put the pinned file back, or pin this one if the change is meant"
        )
    return data


def parse(data: bytes, name: str = "model") -> ModelProto:
    """The model that `data` holds, checked: the graph is of known operators and carries all that it needs.

    Raises `ModelError`, one sentence that begins with `name`, for

    - what is no ONNX file, or has an operator set that onnxruntime does not promise to run
    - weights outside the file, wherever a tensor can be; tensors whose bytes do not match their shape
    - operators that are not in `operators.OPERATORS`: of other domains, random, quantised as they run, on text…
    - functions that call themselves, and more nodes, nesting, axes or elements than any recurrent network has
    """
    if len(data) > MAX_BYTES:
        raise ModelError(f"{name}: has {len(data):,} bytes, a model may have {MAX_BYTES:,}")
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError; its class moved between releases
        raise ModelError(f"{name}: is not an ONNX file ({first_line(error)})") from None
    if not model.graph.node:
        raise ModelError(f"{name}: is not an ONNX file (it holds no graph)")
    try:
        _check(model)
    except RefusedError as refused:
        raise ModelError(f"{name}: {refused}") from None
    return model


def first_line(error: Exception) -> str:
    """The first line of what a library says, cut, and without characters that would steer a terminal."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in line[:SENTENCE])


def _check(model: ModelProto) -> None:
    """Raise `RefusedError` for the first thing that a model may not hold."""
    for text in _texts(model):
        if isinstance(text, bytes):  # as which protobuf gives what is not UTF-8
            raise RefusedError(f"holds a name that is not UTF-8, {text[:SHOWN]!r}; was the file damaged?")
    _check_opset(model)
    if model.training_info:
        raise RefusedError("holds a training graph; export it for inference")
    functions = {_key(function): function for function in model.functions}
    if len(functions) < len(model.functions):
        raise RefusedError("holds two functions of one name")
    extents: dict[Function, Extent] = {}
    for key in _callees_first(functions):
        function = functions[key]
        if key[0] in DEFAULT:
            raise RefusedError(f"holds a function in the place of ONNX's own operator {shown(key[1])}")
        _check_attributes(function.attribute_proto)
        extents[key] = _extent(function.node, ChainMap(), extents)
    nodes, depth = _graph_extent(model.graph, ChainMap(), extents)
    if nodes > MAX_NODES:
        raise RefusedError(f"has {nodes:,} nodes, a model may have {MAX_NODES:,}")
    if depth > MAX_DEPTH:
        raise RefusedError(f"has graphs nested {depth} deep, {MAX_DEPTH} are allowed")
    every = chain(model.graph.node, *(function.node for function in model.functions))
    if any(_graphs(attribute) for node in every for attribute in node.attribute):
        _check_shapes_agree(model)


def _check_shapes_agree(model: ModelProto) -> None:
    """What loops and branches declare must be what reaches them: onnxruntime trusts it, and a wrong rank crashes it."""
    try:
        onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except Exception as error:  # RuntimeError and classes of onnx's own
        raise RefusedError(f"has shapes that contradict each other ({first_line(error)})") from None


def _texts(model: ModelProto) -> Iterator[str | bytes]:
    """Every name and note that anybody reads later on."""
    yield from (model.producer_name, model.domain)
    yield from (item.domain for item in model.opset_import)
    yield from chain.from_iterable((entry.key, entry.value) for entry in model.metadata_props)
    for function in model.functions:
        yield from (function.name, function.domain, function.overload)
        yield from chain(function.input, function.output, function.attribute)
        yield from (item.domain for item in function.opset_import)
        yield from _node_texts(function.node)
    yield from _graph_texts(model.graph)


def _graph_texts(graph: GraphProto) -> Iterator[str | bytes]:
    yield graph.name
    for info in chain(graph.input, graph.output, graph.value_info):
        yield info.name
        yield from (dim.dim_param for dim in info.type.tensor_type.shape.dim)
    yield from (tensor.name for tensor in graph.initializer)
    yield from (sparse.values.name for sparse in graph.sparse_initializer)
    yield from _node_texts(graph.node)


def _node_texts(nodes: Iterable[NodeProto]) -> Iterator[str | bytes]:
    for node in nodes:
        yield from (node.name, node.op_type, node.domain, node.overload)
        yield from chain(node.input, node.output)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name, attribute.t.name)
            for graph in _graphs(attribute):
                yield from _graph_texts(graph)


def _check_opset(model: ModelProto) -> None:
    own = [item for item in model.opset_import if item.domain in DEFAULT]
    within = chain.from_iterable(function.opset_import for function in model.functions)
    versions = [item.version for item in chain(own, within) if item.domain in DEFAULT]
    if not own:
        raise RefusedError("does not say which version of ONNX's operators it asks for")
    if min(versions) < OLDEST_OPSET:
        raise RefusedError(
            f"asks for version {min(versions)} of ONNX's operators, {OLDEST_OPSET} is the oldest that is run"
        )


def _key(item: FunctionProto) -> Function:
    return item.domain, item.name, item.overload


def _called(node: NodeProto) -> Function:
    return node.domain, node.op_type, node.overload


def _callees_first(functions: Mapping[Function, FunctionProto]) -> list[Function]:
    """The functions in an order in which each comes after those that it calls."""
    known = functions.keys()
    calls = {key: known & {_called(node) for node in _every_node(f.node)} for key, f in functions.items()}
    try:
        return list(TopologicalSorter(calls).static_order())
    except CycleError as error:
        raise RefusedError(f"holds the function {shown(error.args[1][0][1])}, which calls itself") from None


def _every_node(nodes: Iterable[NodeProto]) -> Iterator[NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                yield from _every_node(graph.node)


def _graphs(attribute: AttributeProto) -> Sequence[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]


def _graph_extent(graph: GraphProto, around: Constants, functions: Mapping[Function, Extent]) -> Extent:
    """Check a graph with all graphs in it. `around` are the constants of the graphs that it lies in."""
    for sparse in graph.sparse_initializer:
        refuse_sparse(sparse)
    for tensor in graph.initializer:
        check_tensor(tensor)
    for info in chain(graph.input, graph.output, graph.value_info):
        check_info(info)
    own = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            own |= {
                name: attribute.t for name in node.output for attribute in node.attribute if attribute.HasField("t")
            }
    return _extent(graph.node, around.new_child(own), functions)


def _extent(nodes: Iterable[NodeProto], weights: Constants, functions: Mapping[Function, Extent]) -> Extent:
    """Check nodes with all that is in them. `weights` are the constants that they see."""
    count = depth = 0
    for node in nodes:
        more, below = functions.get(_called(node), (1, 0))
        if _called(node) not in functions:
            _check_operator(node, weights)
        _check_attributes(node.attribute)
        for attribute in node.attribute:
            for graph in _graphs(attribute):
                inside, deeper = _graph_extent(graph, weights, functions)
                more, below = more + inside, max(below, deeper)
        count, depth = count + more, max(depth, below)
    return count, depth + 1


def _check_operator(node: NodeProto, weights: Constants) -> None:
    """Raise `RefusedError` unless it is one of ONNX's own operators that a step model may use, and used as such."""
    if reason := reason_against(node.op_type):
        raise RefusedError(f"uses the operator {shown(node.op_type)}, {reason}")
    if node.domain not in DEFAULT:
        raise RefusedError(
            f"uses the operator {shown(node.op_type)} of {shown(node.domain)}; only ONNX's own operators are run"
        )
    if node.op_type not in OPERATORS:
        raise RefusedError(f"uses the operator {shown(node.op_type)}, which is not one that a step model may use")
    _check_present(node)
    if node.op_type in CONDITIONED:
        for name in node.input[: CONDITIONED[node.op_type]]:
            if name in weights and prod(weights[name].dims) != 1:
                raise RefusedError(f"gives the operator {shown(node.op_type)} no single number in {shown(name)}")
    if node.op_type == "Dropout" and len(node.input) > 2 and node.input[2]:
        flag = weights.get(node.input[2])
        if flag is None or flag.data_type != TensorProto.BOOL or any(flag.raw_data) or any(flag.int32_data):
            raise RefusedError("uses Dropout in training mode, which draws random numbers; export it for inference")
    if node.op_type == "BatchNormalization" and any(a.name == "training_mode" and a.i for a in node.attribute):
        raise RefusedError(
            "uses BatchNormalization in training mode, where a row depends on its batch-mates; export it for inference"
        )


def _check_present(node: NodeProto) -> None:
    """An absent input or output, written as an empty name, must be one that may be absent: kernels do not look."""
    for values, kind in ((node.input, "inputs"), (node.output, "outputs")):
        if all(values):
            continue
        formal = getattr(onnx.defs.get_schema(node.op_type), kind)
        for place, value in enumerate(values):
            if not value and formal[min(place, len(formal) - 1)].option != OPTIONAL:
                raise RefusedError(
                    f"leaves out one of the {kind} of the operator {shown(node.op_type)}, which must be there"
                )


def _check_attributes(attributes: Iterable[AttributeProto]) -> None:
    for attribute in attributes:
        for sparse in chain((attribute.sparse_tensor,), attribute.sparse_tensors):
            if sparse.ByteSize():
                refuse_sparse(sparse)
        for tensor in chain((attribute.t,) if attribute.HasField("t") else (), attribute.tensors):
            check_tensor(tensor)
        if not attribute.ref_attr_name and attribute.type not in ATTRIBUTES:
            raise RefusedError(f"holds the attribute {shown(attribute.name)} of a kind that no operator takes")
