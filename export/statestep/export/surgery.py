"""ONNX graphs as plain data: made ready to be taken apart, run with every tensor in view, opened, and put together."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper, version_converter

from statestep.export.compare import Array
from statestep.export.errors import ExportError, first_line
from statestep.runtime import session_options

OPSET = 18  # what a step model asks for at least
SENTENCE = 300  # characters of an error of onnxruntime's
OPTIONAL_OUTPUTS = {"LSTM": 3, "GRU": 2, "RNN": 2}  # Y, Y_h, Y_c


def prepared(model: ModelProto) -> ModelProto:
    """A copy to be taken apart: opset 18 or later, no local functions, every node and every output named."""
    ready = ModelProto()
    ready.CopyFrom(model)
    if ready.functions:
        ready = onnx.inliner.inline_local_functions(ready)
    ready = _raised(ready)
    graph = ready.graph
    initialisers = {tensor.name for tensor in graph.initializer}
    entering = [value for value in graph.input if value.name not in initialisers]
    del graph.input[:]
    graph.input.extend(entering)
    forget_the_machine(graph)
    seen: set[str] = set()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}_{index}"
        seen.add(node.name)
        wanted = OPTIONAL_OUTPUTS.get(node.op_type, len(node.output))
        node.output.extend([""] * (wanted - len(node.output)))
        for place, name in enumerate(node.output):
            node.output[place] = name or f"{node.name}/output_{place}"
        for body in bodies(node):
            _forget_sizes(body)
    fold(ready)
    return ready


def _forget_sizes(body: GraphProto) -> None:
    """Drop what a body declares of its tensors' sizes: it may hold for one batch alone."""
    for value in (*body.input, *body.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    del body.value_info[:]
    for node in body.node:
        for inner in bodies(node):
            _forget_sizes(inner)


def fold(model: ModelProto) -> None:
    """Compute beforehand what depends on constants alone, in place; every tensor keeps its name."""
    graph = model.graph
    known = set(constants_of(graph))
    fixed = []
    for node in graph.node:
        if node.op_type != "Constant" and known.issuperset(reads(node)):
            fixed.append(node)
            known.update(node.output)
    if not fixed:
        return
    rest = [node for node in graph.node if node not in fixed]
    wanted = {name for node in rest for name in reads(node)} | {value.name for value in graph.output}
    names = [name for node in fixed for name in node.output if name in wanted]
    alone = ModelProto()
    alone.CopyFrom(model)
    constant = [node for node in graph.node if node.op_type == "Constant"]
    del alone.graph.node[:], alone.graph.input[:], alone.graph.output[:]
    alone.graph.node.extend([*constant, *fixed])
    alone.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = session(alone).run(names, {}) if names else []
    if any(isinstance(value, list) for value in values):
        return
    del graph.node[:]
    graph.node.extend(rest)
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in zip(names, values, strict=True))


def opset_of(model: ModelProto) -> int:
    """The version of the standard operators that a model asks for."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def _raised(model: ModelProto) -> ModelProto:
    if (found := opset_of(model)) >= OPSET:
        return model
    try:
        raised = version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter raises RuntimeError and its own kinds
        raise ExportError(
            f"the graph has opset {found} and cannot be raised to {OPSET} ({first_line(error)}): "
            f"export it again with opset {OPSET} or later"
        ) from None
    raised.ir_version = max(raised.ir_version, 8)
    return raised


def forget_the_machine(graph: GraphProto) -> None:
    """Drop exporters' notes: torch's writes the stack at each node's making, with its machine's paths."""
    for item in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    for node in graph.node:
        for body in bodies(node):
            forget_the_machine(body)


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs inside a node: the branches of an If, the body of a Loop or Scan."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def nodes_of(graph: GraphProto) -> Iterator[NodeProto]:
    """Every node, those inside of others too."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from nodes_of(body)


def reads(node: NodeProto) -> Iterator[str]:
    """Every tensor that a node takes, what the graphs inside it take from outside too."""
    yield from (name for name in node.input if name)
    for body in bodies(node):
        own = {value.name for value in body.input} | {tensor.name for tensor in body.initializer}
        own.update(name for inner in body.node for name in inner.output)
        yield from (name for inner in body.node for name in reads(inner) if name not in own)
        yield from (value.name for value in body.output if value.name not in own)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """An attribute's value, `default` where it is absent; texts as str."""
    for item in node.attribute:
        if item.name == name:
            value = helper.get_attribute_value(item)
            if isinstance(value, bytes):
                return value.decode()
            return [v.decode() if isinstance(v, bytes) else v for v in value] if isinstance(value, list) else value
    return default


def set_attribute(node: NodeProto, name: str, value: Any) -> None:
    """Give a node an attribute in place of the one of that name."""
    kept = [item for item in node.attribute if item.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def constants_of(graph: GraphProto) -> dict[str, Array]:
    """The values of a graph's initialisers and Constant nodes."""
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            held[node.output[0]] = _constant(node)
    return held


def _constant(node: NodeProto) -> Array:
    item = node.attribute[0]
    value = helper.get_attribute_value(item)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value, np.int64 if item.name.startswith("value_int") else np.float32)


class Builder:
    """Adds nodes and constants to a graph, each tensor under a name that is not taken yet."""

    def __init__(self, graph: GraphProto):
        self.graph = graph
        self.taken = {value.name for value in (*graph.input, *graph.initializer)}
        self.taken.update(name for node in nodes_of(graph) for name in node.output)

    def name(self, wanted: str) -> str:
        """`wanted`, or with a number behind it."""
        name, number = wanted, 2
        while name in self.taken:
            name, number = f"{wanted}_{number}", number + 1
        self.taken.add(name)
        return name

    def constant(self, wanted: str, value: Any, dtype: Any = np.int64) -> str:
        """An initialiser."""
        name = self.name(wanted)
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, op: str, inputs: Sequence[str], wanted: str, **attributes: Any) -> str:
        """A node with one output, appended; its output's name."""
        made, name = self.made(op, inputs, wanted, **attributes)
        self.graph.node.append(made)
        return name

    def made(self, op: str, inputs: Sequence[str], wanted: str, **attributes: Any) -> tuple[NodeProto, str]:
        """A node with one output that is not appended yet, and its output's name."""
        name = self.name(wanted)
        return helper.make_node(op, list(inputs), [name], name=f"{name}/{op}", **attributes), name

    def input(self, wanted: str, elem_type: int, shape: Sequence[int | str]) -> str:
        """A graph input."""
        name = self.name(wanted)
        self.graph.input.append(helper.make_tensor_value_info(name, elem_type, list(shape)))
        return name

    def output(self, tensor: str, wanted: str, elem_type: int, shape: Sequence[int | str | None] | None) -> str:
        """A graph output of its own name that is a copy of `tensor`."""
        name = self.node("Identity", [tensor], wanted)
        self.graph.output.append(helper.make_tensor_value_info(name, elem_type, shape))
        return name


def renamed(node: NodeProto, names: Mapping[str, str]) -> NodeProto:
    """A copy of `node` with its tensors renamed, in the graphs inside it too."""
    copy = NodeProto()
    copy.CopyFrom(node)
    _rename(copy, names)
    return copy


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    for tensors in (node.input, node.output):
        for place, name in enumerate(tensors):
            tensors[place] = names.get(name, name)
    for body in bodies(node):
        for inner in body.node:
            _rename(inner, names)
        for value in body.output:
            value.name = names.get(value.name, value.name)


def opened(
    body: GraphProto, bound: Mapping[str, str], builder: Builder, prefix: str
) -> tuple[list[NodeProto], list[str]]:
    """A body's nodes as nodes of the graph around it, its inputs `bound` to tensors there; and its outputs' names."""
    names = dict(bound)
    for tensor in body.initializer:
        names[tensor.name] = builder.name(f"{prefix}{tensor.name}")
        moved = onnx.TensorProto()
        moved.CopyFrom(tensor)
        moved.name = names[tensor.name]
        builder.graph.initializer.append(moved)
    for node in body.node:
        names.update({name: builder.name(f"{prefix}{name}") for name in node.output if name})
    nodes = [renamed(node, names) for node in body.node]
    for node in nodes:
        node.name = f"{prefix}{node.name or node.op_type}"
    return nodes, [names.get(value.name, value.name) for value in body.output]


def pruned(graph: GraphProto) -> None:
    """Take out the nodes, initialisers and declared shapes that no output needs."""
    needed = {value.name for value in graph.output}
    kept: list[NodeProto] = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            needed.update(reads(node))
            kept.append(node)
    kept.reverse()
    initialisers = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(initialisers)


def sorted_nodes(graph: GraphProto) -> None:
    """Put nodes behind those that they read from; where nothing asks for it the order stays."""
    own = {name for node in graph.node for name in node.output}
    ready: set[str] = set()
    waiting, done = list(graph.node), []
    while waiting:
        later = []
        for node in waiting:
            if all(name in ready or name not in own for name in reads(node)):
                done.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise ExportError(f"the graph runs in a circle at node {later[0].name!r}")
        waiting = later
    del graph.node[:]
    graph.node.extend(done)


def session(model: ModelProto, *, plain: bool = False) -> ort.InferenceSession:
    """A session over `model`; `plain` without any of onnxruntime's optimisations, so that every tensor is there."""
    options = session_options()
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
        raise ExportError(f"onnxruntime cannot load the graph: {reason(error)}") from None


def reason(error: Exception) -> str:
    """What onnxruntime says is wrong, without its own prefixes and the places in its source.

    >>> reason(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: /a/b.h:5 f(int) no."))
    'f(int) no.'
    """
    said = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Exception during initialization: )?", "", first_line(error))
    return re.sub(r"/\S+\.(cc|h):\d+ ", "", said)[:SENTENCE]


def with_outputs(model: ModelProto, names: Iterable[str]) -> ModelProto:
    """A copy that gives those tensors too."""
    shown = ModelProto()
    shown.CopyFrom(model)
    there = {value.name for value in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    return shown


def every_tensor(graph: GraphProto) -> list[str]:
    """The outputs of all top-level nodes, in the order of their making."""
    return [name for node in graph.node if node.op_type != "Constant" for name in node.output if name]


def simplified(model: ModelProto) -> ModelProto:
    """The same graph with all that is constant computed beforehand, so that weights are initialisers.

    By onnxruntime's own basic optimisations, which it would make at every load. What it makes of operators that are
    not ONNX's is not taken: then the graph stays as it is.
    """
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "simplified.onnx"
        options.optimized_model_filepath = str(path)
        try:
            ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
            raise ExportError(f"onnxruntime cannot load the step graph: {reason(error)}") from None
        simple = onnx.load(path)
    if any(node.domain not in ("", "ai.onnx") for node in nodes_of(simple.graph)):
        return model
    kept = [entry for entry in simple.opset_import if entry.domain in ("", "ai.onnx")]
    del simple.opset_import[:]
    simple.opset_import.extend(kept)
    forget_the_machine(simple.graph)
    return simple
