"""Memory made visible: every node that walks along time is given its state from outside, and gives it back.

The result runs over sequences of any length from any state: over T timesteps, or over one and then the next. Nodes
that cannot be cut so are refused by name, with the reason and the way out.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from statestep.export import walks, windows
from statestep.export.errors import ExportError
from statestep.export.probe import Tags
from statestep.export.stateful import Carried, Work, ahead, leave, refuse_ahead, refused
from statestep.export.surgery import Builder, pruned, sorted_nodes
from statestep.export.whole import RECURRENT, Layout, batch_axis, dims_of
from statestep.runtime import State


def carried(model: ModelProto, layout: Layout, tags: Tags) -> Carried:
    """Give every node of `model` that walks along time its state from outside. `model` itself is not changed."""
    copy = ModelProto()
    copy.CopyFrom(model)
    done = Carried(copy, layout, [_own_state(copy.graph, *pair, layout) for pair in layout.pairs])
    given = _downstream(copy.graph, {name for name, _ in layout.pairs})
    _refuse_rowless(copy.graph, layout, tags)
    work = Work(copy.graph, tags, layout, Builder(copy.graph), given, done)
    gone = {*layout.initials, *layout.lengths}
    work.builder.taken -= gone  # the states may take their names
    entering = [value for value in copy.graph.input if value.name not in gone]
    del copy.graph.input[:]
    copy.graph.input.extend(entering)
    for node in list(copy.graph.node):
        if node.op_type in RECURRENT:
            walks.recurrent(node, work)
        elif node.op_type == "Loop":
            walks.loop(node, work)
        elif node.op_type == "Scan":
            walks.scan(node, work)
        elif not windows.looks_back(node, work):
            _other(node, work)
    for value in copy.graph.output:
        refuse_ahead(value.name, work)
    if not done.states:
        raise ExportError(
            "nothing in the graph remembers earlier timesteps (no LSTM, GRU, RNN, Loop or Scan along time, no causal "
            "convolution): there is no state to carry, any model server can run it row by row"
        )
    sorted_nodes(copy.graph)
    pruned(copy.graph)
    pairs = tuple((state.input, state.output) for state in done.states)
    done.layout = replace(layout, pairs=pairs, initials=(), lengths=())
    return done


def _refuse_rowless(graph: onnx.GraphProto, layout: Layout, tags: Tags) -> None:
    """Every output has a row for each stream."""
    for value in graph.output:
        tag = tags[value.name]
        if tag.batch is None and tag.merged is None and value.name not in dict(layout.pairs).values():
            raise ExportError(
                f"output {value.name!r} of shape {list(tag.shape)} has no row for each stream to answer with: "
                "take it out of the graph's outputs"
            )


def _downstream(graph: onnx.GraphProto, start: set[str]) -> set[str]:
    """What depends on `start`, not followed through nodes that walk along time."""
    found = set(start)
    for node in graph.node:
        if node.op_type not in (*RECURRENT, "Loop", "Scan") and found.intersection(node.input):
            found.update(node.output)
    return found


def _own_state(graph: onnx.GraphProto, name: str, output: str, layout: Layout) -> State:
    """A state that the graph takes and gives by itself."""
    value = next(value for value in graph.input if value.name == name)
    sizes = [dim.dim_value or dim.dim_param for dim in dims_of(value)]
    batch = batch_axis(value, layout)
    if batch is None:
        raise ExportError(
            f"state {name!r} has shape {sizes}, which axis is the batch cannot be told: say it by --state "
            f"{name}={output}:AXIS"
        )
    shape = tuple(dim.dim_value for axis, dim in enumerate(dims_of(value)) if axis != batch)
    dims_of(value)[batch].dim_param = "B"
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
    return State(name, output, shape, batch, dtype)


def _other(node: NodeProto, work: Work) -> None:
    """Every other node works row by row, or the proof will name it; here is what can be told before."""
    taken = [work.tags[name] for name in node.input if name in work.tags]
    source = work.tags.get(node.input[0]) if node.input else None
    for name in node.output:
        tag = work.tags.get(name)
        if tag is None:
            continue
        short = tag.fewer or (tag.offset < 0 and not tag.odd)
        if short and tag.varies and not any(t.fewer or t.offset < 0 for t in taken):
            raise refused(
                node,
                "gives another number of rows than the sequence has, and every message must be answered by one row: "
                "take it out, or pad it on the left so that it gives as many as it takes",
            )
    rows = max((work.ahead[name][0] for name in node.input if name in work.ahead), default=0)
    if not rows or source is None:
        return
    tag = work.tags[node.output[0]]
    if node.op_type == "Slice" and source.time is not None and tag.time == source.time and tag.offset < source.offset:
        first = source.value.take(range(tag.shape[tag.time]), axis=source.time)
        if source.offset - tag.offset == rows and np.array_equal(first, tag.value):
            name = node.output[0]
            work.graph.node.remove(node)
            leave(work, node.input[0], name)
            return
    if tag.time is None and tag.varies:
        for name in node.input:
            refuse_ahead(name, work)
    ahead(node, 0, work)
