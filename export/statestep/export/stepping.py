"""From a graph with its states outside to a step model's graph: one timestep, x [B, F] in, one row of answers out.

At one timestep a Loop along time runs once, so its body takes its place; a row that a kernel would round otherwise
among many is padded; what is constant is computed beforehand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.probe import Tag, Tags
from statestep.export.stateful import Carried, refused
from statestep.export.surgery import (
    Builder,
    attribute,
    constants_of,
    opened,
    pruned,
    renamed,
    session,
    simplified,
    sorted_nodes,
    with_outputs,
)
from statestep.export.whole import Entry, dims_of, rebatched, retimed, vocabulary

# Elementwise operators whose vector code and scalar code differ in the last bit. A row that fills whole vectors is
# always computed by the first, whoever stands beside it. What they are padded with must be in their domain.
VECTOR_TAILS = {"Log": 1.0, "Softplus": 0.0, "Mish": 0.0, "Sin": 0.0, "Cos": 0.0, "Atan": 0.0}
INITIAL = 5  # where a recurrent operator takes its initial hidden state
VECTOR = 16  # float32 numbers in the widest vector
PLAIN = {"Tanh": "Tanh", "Relu": "Relu", "Sigmoid": "Sigmoid"}  # activations of an RNN that are operators


def step_graph_of(carried: Carried, tags: Tags) -> ModelProto:
    """The step model's graph, not yet stamped. `tags` are of the graph that `carried` was made from."""
    model = ModelProto()
    model.CopyFrom(carried.model)
    layout, graph = carried.layout, model.graph
    if layout.streams:
        rebatched(graph, layout)
    if layout.steps:
        retimed(graph, layout.steps, 1)
    builder = Builder(graph)
    builder.taken -= {entry.name for entry in layout.entries}  # the one input of readings may bear the name of theirs
    for node in list(graph.node):
        if node.name in carried.walks:
            _open(node, builder)
        elif node.op_type == "RNN" and len(node.input) > INITIAL and node.input[INITIAL]:
            _lower(node, builder)
    _take_rows(carried, builder)
    _give_rows(carried, tags, builder)
    sorted_nodes(graph)
    pruned(graph)
    settle_shapes(model, carried)
    pad_rows(model)
    return simplified(model)


def settle_shapes(model: ModelProto, carried: Carried) -> None:
    """Replace shapes that are computed at every step by constants, in place: at one timestep only the batch is free.

    What a shape is at two batches tells: the size that differs becomes -1.
    """
    graph = model.graph
    computed = {n.input[1] for n in graph.node if n.op_type == "Reshape"} - set(constants_of(graph))
    if not computed:
        return
    shown = session(with_outputs(model, computed), plain=True)
    few, many = (_shapes(shown, carried, computed, batch) for batch in (3, 5))
    builder = Builder(graph)
    for node in graph.node:
        if node.op_type != "Reshape" or node.input[1] not in computed or attribute(node, "allowzero", 0):
            continue
        one, other = few[node.input[1]], many[node.input[1]]
        differ = one != other
        if differ.sum() + (one == -1).sum() <= 1:
            node.input[1] = builder.constant(f"{node.name}/shape", np.where(differ, -1, one))
    pruned(graph)


def _shapes(shown: Any, carried: Carried, names: set[str], batch: int) -> dict[str, Array]:
    feeds = {"x": np.zeros((batch, carried.layout.width), np.float32)}
    for state in carried.states:
        feeds[state.input] = np.stack([state.initial_value()] * batch, axis=state.batch_axis)
    ordered = sorted(names)
    return dict(zip(ordered, shown.run(ordered, feeds), strict=True))


def _open(node: NodeProto, builder: Builder) -> None:
    """Put the body of a Loop or Scan along time in its place: over one row it runs once."""
    body = attribute(node, "body")
    inputs = [value.name for value in body.input]
    before: list[NodeProto] = []
    if node.op_type == "Loop":
        kind = body.input[0].type.tensor_type
        number = builder.constant(f"{node.name}/iteration", np.zeros([1] * len(kind.shape.dim)))
        true = builder.constant(f"{node.name}/go_on", True, np.bool_)
        bound = dict(zip(inputs, [number, true, *node.input[2:]], strict=True))
        gathered, axes = len(node.output) - (len(inputs) - 2), [0] * len(node.output)
        skipped = 1  # the body's own condition
    else:
        count = int(attribute(node, "num_scan_inputs"))
        axes_in = attribute(node, "scan_input_axes", [0] * count)
        rows = []
        for name, axis in zip(node.input[-count:], axes_in, strict=True):
            made, row = builder.made("Squeeze", [name, builder.constant(f"{node.name}/axis", [axis])], f"{name}/row")
            before.append(made)
            rows.append(row)
        bound = dict(zip(inputs, [*node.input[:-count], *rows], strict=True))
        gathered = len(node.output) - (len(node.input) - count)
        axes = attribute(node, "scan_output_axes", [0] * gathered)
        skipped = 0
    nodes, results = opened(body, bound, builder, f"{node.name}/")
    final = len(node.output) - gathered
    for place, name in enumerate(node.output):
        source = results[place + skipped]
        if place < final:
            nodes.append(helper.make_node("Identity", [source], [name], name=f"{name}/Identity"))
        else:
            axis = builder.constant(f"{node.name}/axis", [axes[place - final]])
            nodes.append(helper.make_node("Unsqueeze", [source, axis], [name], name=f"{name}/Unsqueeze"))
    builder.graph.node.remove(node)
    builder.graph.node.extend([*before, *nodes])


def _lower(node: NodeProto, builder: Builder) -> None:
    """ONNX's RNN in matrix products: h' = f(x·Wᵀ + h·Rᵀ + b). The operator rounds a single row in its own way."""
    name = (attribute(node, "activations") or ["Tanh"])[0]
    if name not in PLAIN or attribute(node, "clip") is not None:
        what = f"the activation {name}" if name not in PLAIN else "a clip"
        raise refused(node, f"has {what}, which is not supported here: train it with tanh, relu or sigmoid, unclipped")
    graph, label = builder.graph, node.name
    held = constants_of(graph)
    if any(source not in held for source in node.input[1:4] if source):
        raise refused(node, "has weights that are computed: export it with its weights as constants")
    w, r = held[node.input[1]][0], held[node.input[2]][0]  # [H, I], [H, H]
    bias = held[node.input[3]][0] if node.input[3] else np.zeros(2 * len(r), w.dtype)  # [2H]
    first = builder.constant(f"{label}/first", [0])
    weights = [
        builder.constant(f"{label}/{what}", value, w.dtype)
        for what, value in (("W", w), ("R", r), ("b", bias[: len(r)] + bias[len(r) :]))
    ]
    x = builder.node("Squeeze", [node.input[0], first], f"{label}/x")  # [B, I]
    h = builder.node("Squeeze", [node.input[5], first], f"{label}/h")  # [B, H]
    seen = builder.node("Gemm", [x, weights[0], weights[2]], f"{label}/seen", transB=1)
    kept = builder.node("Gemm", [h, weights[1]], f"{label}/kept", transB=1)
    total = builder.node("Add", [seen, kept], f"{label}/total")
    after = builder.node(PLAIN[name], [total], f"{label}/next")
    both = builder.constant(f"{label}/both", [0, 1])
    graph.node.append(helper.make_node("Unsqueeze", [after, both], [node.output[0]], name=f"{label}/Y"))
    graph.node.append(helper.make_node("Unsqueeze", [after, first], [node.output[1]], name=f"{label}/Y_h"))
    graph.node.remove(node)


def _take_rows(carried: Carried, builder: Builder) -> None:
    """One input x [B, F] in place of those of readings."""
    graph, layout = builder.graph, carried.layout
    entries = {entry.name: entry for entry in layout.entries}
    others = [value for value in graph.input if value.name not in entries]
    del graph.input[:]
    x = builder.input("x", TensorProto.FLOAT, ["B", layout.width])
    graph.input.extend(others)
    count, names = len(graph.node), {}
    for entry in layout.entries:
        own = x
        if entry.width != layout.width:
            bounds = [[entry.first], [entry.first + entry.width], [1]]
            own = builder.node("Slice", [x, *(builder.constant(f"{x}/cut", b) for b in bounds)], f"{x}/{entry.name}")
        own = _whole_numbers(own, entry, carried, builder)
        if entry.elem_type != TensorProto.FLOAT:
            own = builder.node("Cast", [own], f"{entry.name}/cast", to=entry.elem_type)
        names[entry.name] = _as_sequence(own, entry, builder)
    _rename_in(graph, names, count)


def _rename_in(graph: onnx.GraphProto, names: dict[str, str], count: int) -> None:
    """Rename tensors in the first `count` nodes."""
    nodes = [renamed(node, names) if place < count else node for place, node in enumerate(graph.node)]
    del graph.node[:]
    graph.node.extend(nodes)


def _as_sequence(own: str, entry: Entry, builder: Builder) -> str:
    """[B, W] as a sequence of one row, its axes where the graph wants them."""
    if entry.feature is None:
        return own if entry.batch == 0 else builder.node("Transpose", [own], f"{entry.name}/row", perm=[1, 0])
    axis = builder.constant(f"{entry.name}/axis", [entry.time])
    if entry.batch < entry.feature:
        return builder.node("Unsqueeze", [own, axis], f"{entry.name}/row")
    turned = builder.node("Transpose", [own], f"{entry.name}/turned", perm=[1, 0])
    return builder.node("Unsqueeze", [turned, axis], f"{entry.name}/row")


def _whole_numbers(own: str, entry: Entry, carried: Carried, builder: Builder) -> str:
    """Where a table is looked up a number outside it would stop the whole batch; it becomes 0, and its row NaN."""
    if np.issubdtype(entry.dtype, np.floating):
        return own
    size = vocabulary(carried.model, entry)
    if size is None:
        return builder.node("Round", [own], f"{own}/rounded")
    low, high = (builder.constant(f"{own}/bound", bound, np.float32) for bound in (-0.5, size - 0.5))
    above = builder.node("Greater", [own, low], f"{own}/above")
    below = builder.node("Less", [own, high], f"{own}/below")
    known = builder.node("And", [above, below], f"{own}/known")  # [B, W]
    zero = builder.constant(f"{own}/zero", 0.0, np.float32)
    rounded = builder.node("Round", [own], f"{own}/rounded")
    return builder.node("Where", [known, rounded, zero], f"{own}/number")


def _give_rows(carried: Carried, tags: Tags, builder: Builder) -> None:
    """Each output without its time axis, batch first."""
    graph = builder.graph
    states = {state.output for state in carried.states}
    answers = [value.name for value in graph.output if value.name not in states]
    names = {name: builder.name(f"{name}/sequence") for name in answers}
    _rename_in(graph, names, len(graph.node))
    for name in answers:
        _leave_row(names[name], name, tags[name], builder)
        sizes: list[int | str] = ["B", *_rest(tags[name])]
        elem_type = helper.np_dtype_to_tensor_dtype(tags[name].value.dtype)
        value = next(value for value in graph.output if value.name == name)
        value.CopyFrom(helper.make_tensor_value_info(name, elem_type, sizes))  # what was declared is of a sequence
    _poison(carried, builder)


def _rest(tag: Tag) -> list[int]:
    """The sizes of an output's axes beside time and batch."""
    return [size for axis, size in enumerate(tag.shape) if axis not in (tag.time, tag.batch, tag.merged)]


def _leave_row(source: str, name: str, tag: Tag, builder: Builder) -> None:
    batch = tag.batch if tag.merged is None else tag.merged
    if tag.time is not None:
        axis = builder.constant(f"{name}/axis", [tag.time])
        source = builder.node("Squeeze", [source, axis], f"{name}/row")
        batch = None if batch is None else batch - (tag.time < batch)
    rank = len(tag.shape) - (tag.time is not None)
    if batch:
        perm = [batch, *(axis for axis in range(rank) if axis != batch)]
        source = builder.node("Transpose", [source], f"{name}/by_stream", perm=perm)
    builder.graph.node.append(helper.make_node("Identity", [source], [name], name=f"{name}/Identity"))


def _poison(carried: Carried, builder: Builder) -> None:
    """A row with a number that no table holds gets NaN in an answer or a state, so that the engine refuses it."""
    known = [node.output[0] for node in builder.graph.node if node.name.endswith("/known/And")]
    if not known:
        return
    axes = {state.output: state.batch_axis for state in carried.states}
    floats = [v for v in builder.graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT]
    floats.sort(key=lambda value: value.name in axes)  # answers first
    if not floats:
        raise ExportError(
            "no output and no state of the graph is a float32 that could mark a row whose number is in no table: "
            "add one to its outputs, the scores that its answer was chosen by for example"
        )
    target, nan = floats[0], builder.constant("not_a_number", np.nan, np.float32)
    sizes = [1] * len(dims_of(target))
    sizes[axes.get(target.name, 0)] = -1
    node = next(node for node in builder.graph.node if target.name in node.output)
    source = node.input[0]
    for flag in known:
        shape = builder.constant(f"{flag}/shape", sizes)
        whole = builder.node("Reshape", [_all(flag, builder), shape], f"{flag}/row")
        source = builder.node("Where", [whole, source, nan], f"{target.name}/checked")
    node.input[0] = source


def _all(flag: str, builder: Builder) -> str:
    """bool [B, W] → [B, 1]: whether the whole row holds."""
    number = builder.node("Cast", [flag], f"{flag}/number", to=TensorProto.FLOAT)
    axis = builder.constant(f"{flag}/axis", [1])
    least = builder.node("ReduceMin", [number, axis], f"{flag}/least", keepdims=1)
    return builder.node("Cast", [least], f"{flag}/all", to=TensorProto.BOOL)


def pad_rows(model: ModelProto) -> None:
    """Give every operator of `VECTOR_TAILS` rows that fill whole vectors, in place.

    Each number is put on a row of its own with 15 others beside it, so that no tail is left whatever the batch.
    """
    graph = model.graph
    builder = Builder(graph)
    for node in list(graph.node):
        if node.op_type not in VECTOR_TAILS or node.input[0] in constants_of(graph):
            continue
        label, last = node.name, builder.constant(f"{node.name}/last", [-1])
        column = builder.node("Unsqueeze", [node.input[0], last], f"{label}/column")  # [… , 1]
        fill = builder.constant(f"{label}/fill", VECTOR_TAILS[node.op_type], np.float32)
        pads = builder.constant(f"{label}/pads", [0, VECTOR - 1])
        padded = builder.node("Pad", [column, pads, fill, last], f"{label}/padded")  # [… , 16]
        made, bent = builder.made(node.op_type, [padded], f"{label}/bent")
        made.attribute.extend(node.attribute)
        graph.node.append(made)
        first = builder.constant(f"{label}/first", 0)
        graph.node.append(helper.make_node("Gather", [bent, first], list(node.output), name=label, axis=-1))
        graph.node.remove(node)
    sorted_nodes(graph)
