"""The original graph as the sequence file beside a step model: x [T, B, F] in, [T, B, …] out, from a stream's birth.

Nothing is changed between: casts and transpositions are put around it, and states that it takes begin as declared.
"""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, TensorProto, helper

from statestep.export.probe import Tag, Tags
from statestep.export.surgery import Builder, pruned, renamed, sorted_nodes
from statestep.export.whole import Entry, Layout, dims_of


def offline_of(model: ModelProto, layout: Layout, tags: Tags) -> ModelProto:
    """The sequence form of a prepared graph over sequences."""
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    builder = Builder(graph)
    builder.taken -= {entry.name for entry in layout.entries}
    others = [value for value in graph.input if value.name not in {entry.name for entry in layout.entries}]
    answers = [value.name for value in graph.output if value.name not in dict(layout.pairs).values()]
    inner = list(graph.node)
    del graph.input[:], graph.node[:], graph.output[:]
    x = builder.input("x", TensorProto.FLOAT, [layout.steps or "T", layout.streams or "B", layout.width])
    shape = builder.node("Shape", [x], "x/shape")
    steps, streams = (_part(shape, place, builder) for place in (0, 1))
    names = {entry.name: _entry(x, entry, layout, builder) for entry in layout.entries}
    for value in others:
        elem_type = value.type.tensor_type.elem_type
        dims = [dim.dim_value or 0 for dim in dims_of(value)]
        sizes = [builder.constant(f"{value.name}/size", [size]) if size else streams for size in dims]
        size = builder.node("Concat", sizes, f"{value.name}/sizes", axis=0)
        fill = steps if value.name in layout.lengths else builder.constant(f"{value.name}/zero", [0])
        start = builder.node("Cast", [fill], f"{value.name}/start", to=elem_type)
        names[value.name] = builder.node("Expand", [start, size], f"{value.name}/birth")
    sequence = {name: builder.name(f"{name}/given") for name in answers}
    graph.node.extend(renamed(node, names | sequence) for node in inner)
    for name in answers:
        _leave(sequence[name], name, tags[name], (steps, streams), builder)
    sorted_nodes(graph)
    pruned(graph)
    return made


def _part(shape: str, place: int, builder: Builder) -> str:
    """One size of a shape, [1]."""
    bounds = [builder.constant("shape/from", [place]), builder.constant("shape/to", [place + 1])]
    return builder.node("Slice", [shape, *bounds], "shape/part")


def _entry(x: str, entry: Entry, layout: Layout, builder: Builder) -> str:
    own = x
    if entry.width != layout.width:
        bounds = [[entry.first], [entry.first + entry.width], [2]]
        own = builder.node("Slice", [x, *(builder.constant("x/cut", bound) for bound in bounds)], f"x/{entry.name}")
    if not np.issubdtype(entry.dtype, np.floating):
        own = builder.node("Round", [own], f"{entry.name}/rounded")
    if entry.elem_type != TensorProto.FLOAT:
        own = builder.node("Cast", [own], f"{entry.name}/cast", to=entry.elem_type)
    if entry.feature is None:
        own = builder.node("Squeeze", [own, builder.constant("x/axis", [2])], f"{entry.name}/flat")
    order = [int(axis) for axis in np.argsort(entry.places)]
    if order == sorted(order):
        return own
    return builder.node("Transpose", [own], f"{entry.name}/turned", perm=order)


def _leave(source: str, name: str, tag: Tag, sizes: tuple[str, str], builder: Builder) -> None:
    """An output as [T, B, …], or [B, …] where it answers for the last row."""
    rank = len(tag.shape)
    if tag.merged is not None:
        front = [tag.merged, *(axis for axis in range(rank) if axis != tag.merged)]
        source = _turned(source, front, name, builder)
        rest = builder.constant(f"{name}/rest", [tag.shape[axis] for axis in front[1:]])
        ordered = list(sizes) if tag.by_time else [sizes[1], sizes[0]]
        shape = builder.node("Concat", [*ordered, rest], f"{name}/apart", axis=0)
        source = builder.node("Reshape", [source, shape], f"{name}/rows")
        if not tag.by_time:
            source = _turned(source, [1, 0, *range(2, rank + 1)], name, builder)
    else:
        front = [axis for axis in (tag.time, tag.batch) if axis is not None]
        source = _turned(source, [*front, *(axis for axis in range(rank) if axis not in front)], name, builder)
    builder.graph.node.append(helper.make_node("Identity", [source], [name], name=f"{name}/Identity"))
    own = [size for axis, size in enumerate(tag.shape) if axis not in (tag.time, tag.batch, tag.merged)]
    axes: list[int | str] = ["B"] if tag.time is None and tag.merged is None else ["T", "B"]
    value = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(tag.value.dtype), [*axes, *own])
    builder.graph.output.append(value)


def _turned(source: str, order: list[int], name: str, builder: Builder) -> str:
    return source if order == sorted(order) else builder.node("Transpose", [source], f"{name}/turned", perm=order)
