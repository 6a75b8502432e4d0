"""A graph over whole sequences, run on x [T, B, F] whatever its own layout, and at sizes that it was not made for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.surgery import attribute, bodies, constants_of, every_tensor, reason, session, with_outputs

RECURRENT = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}  # operator → where its initial states come in
LENGTHS = 4  # where a recurrent operator takes the lengths of its sequences
COMPARING = ("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal")
STEPS, BATCH = 37, 3  # of a trial run; primes that hidden sizes rarely have
LAYOUTS = {"BTF": (0, 1, 2), "TBF": (1, 0, 2), "BFT": (0, 2, 1), "BT": (0, 1, None), "TB": (1, 0, None)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One input of readings. `first` is its first column in x; fixed sizes of time and batch are None where free."""

    name: str
    elem_type: int
    batch: int  # axes
    time: int
    feature: int | None  # None: one reading a timestep, without an axis of its own
    width: int  # readings a timestep
    first: int
    steps: int | None
    streams: int | None

    @property
    def dtype(self) -> Any:
        """numpy's dtype."""
        return helper.tensor_dtype_to_np_dtype(self.elem_type)

    @property
    def places(self) -> tuple[int, ...]:
        """Where time, batch and, if there is one, feature stand."""
        return (self.time, self.batch) if self.feature is None else (self.time, self.batch, self.feature)

    def laid_out(self, x: Array) -> Array:
        """x [T, B, F] → this input's own columns, axes and dtype."""
        own = x[:, :, self.first : self.first + self.width].astype(self.dtype)  # [T, B, W]
        own = own[:, :, 0] if self.feature is None else own
        return np.ascontiguousarray(own.transpose(np.argsort(self.places)))


@dataclass(frozen=True, slots=True)
class Layout:
    """What each input of a graph over sequences is."""

    entries: tuple[Entry, ...]
    pairs: tuple[tuple[str, str], ...] = ()  # states that the graph itself takes and gives
    initials: tuple[str, ...] = ()  # initial states that it takes and does not give back
    lengths: tuple[str, ...] = ()  # how long each sequence is
    axes: tuple[tuple[str, int], ...] = ()  # the batch axes of states, where they were told

    @property
    def width(self) -> int:
        """F, the readings of a timestep over all inputs."""
        return sum(entry.width for entry in self.entries)

    @property
    def steps(self) -> int | None:
        """The number of timesteps that the graph is fixed at."""
        return next((entry.steps for entry in self.entries if entry.steps is not None), None)

    @property
    def streams(self) -> int | None:
        """The batch that the graph is fixed at."""
        return next((entry.streams for entry in self.entries if entry.streams is not None), None)


@dataclass
class Whole:
    """A prepared graph with its layout, and its sessions by number of timesteps and of streams."""

    model: ModelProto
    layout: Layout
    plain: bool = False  # every tensor comes out, and nothing is optimised
    sessions: dict[tuple[int | None, int | None], Any] = field(default_factory=dict)

    def run(self, x: Array, states: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """x [T, B, F] and the graph's own states, zero where absent → every output as the graph gives it.

        A graph of fixed sizes is changed where x has others.
        """
        steps, streams = x.shape[:2]
        ready = self._session(steps, streams)
        names = [node.name for node in ready.get_outputs()]
        try:
            return dict(zip(names, ready.run(names, self.feeds(x, states)), strict=True))
        except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
            raise ExportError(self._failure(reason(error), steps, streams)) from None

    def feeds(self, x: Array, states: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """x [T, B, F] as the graph's inputs, and the graph's own states, zero where absent."""
        steps, streams = x.shape[:2]
        feeds = {entry.name: entry.laid_out(x) for entry in self.layout.entries}
        for node in self._session(steps, streams).get_inputs():
            if node.name not in feeds:
                feeds[node.name] = self._other(node, steps, streams, states or {})
        return feeds

    def _session(self, steps: int, streams: int) -> Any:
        key = steps if self.layout.steps else None, streams if self.layout.streams else None
        if key not in self.sessions:
            model = self.model
            if key not in ((None, None), (self.layout.steps, self.layout.streams)):
                model = resized(model, self.layout, *key)
            names = every_tensor(model.graph) if self.plain else []
            try:
                self.sessions[key] = session(with_outputs(model, names), plain=self.plain)
            except ExportError as error:
                raise ExportError(self._failure(str(error), steps, streams)) from None
        return self.sessions[key]

    def _failure(self, sentence: str, steps: int, streams: int) -> str:
        name = blamed(sentence)
        where = f"node {name!r}" if name else "the graph"
        fixed = [f"{size} {what}" + "s" * (size != 1) for size, what in self._fixed(steps, streams)]
        entry = self.layout.entries[0]
        if fixed and entry.feature is None:
            return (
                f"input {entry.name!r} was read as [{'batch, time' if entry.batch == 0 else 'time, batch'}], fixed at "
                f"{' and '.join(fixed)}, and {where} takes no other size: where it is [time, feature], export it "
                "with a batch axis too"
            )
        if fixed:
            return (
                f"{where} takes exactly {' and '.join(fixed)}: it mixes rows, or the graph was unrolled or exported "
                "for that size alone; export it with a free time axis and a free batch axis"
            )
        if "not support" in sentence or "NOT_IMPLEMENTED" in sentence:
            return f"{where} is not what onnxruntime can run ({sentence}): export it in float32"
        return (
            f"{where} fails on {streams} sequences of {steps} timestep{'s' * (steps != 1)} ({sentence}): export it "
            "with a free time axis and a free batch axis, or say by --layout which is which"
        )

    def _fixed(self, steps: int, streams: int) -> Iterator[tuple[int, str]]:
        """The sizes that the graph was not made for and was run at."""
        if self.layout.steps not in (None, steps):
            yield self.layout.steps or 0, "timestep"
        if self.layout.streams not in (None, streams):
            yield self.layout.streams or 0, "stream"

    def _other(self, node: Any, steps: int, streams: int, states: Mapping[str, Array]) -> Array:
        """A state or the lengths."""
        if node.name in states:
            return np.ascontiguousarray(states[node.name])
        shape = [size if isinstance(size, int) else streams for size in node.shape]
        if node.name in self.layout.lengths:
            return np.full(shape, steps, np.int64 if "64" in node.type else np.int32)
        return np.zeros(shape, {"tensor(double)": np.float64, "tensor(int64)": np.int64}.get(node.type, np.float32))


def blamed(sentence: str) -> str | None:
    """The node that an error of onnxruntime's names.

    >>> blamed("Non-zero status code returned while running Gather node. Name:'first' Status Message: out of bounds")
    'first'
    """
    found = re.search(r"Name:'([^']*)'|Node \(([^)]*)\)", sentence)
    return None if found is None else found.group(1) or found.group(2)


def vocabulary(model: ModelProto, entry: Entry) -> int | None:
    """How many different whole numbers an input may hold: the rows of the table that it is looked up in."""
    if np.issubdtype(entry.dtype, np.floating):
        return None
    held = constants_of(model.graph)
    names = {entry.name}
    sizes = []
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] in names and node.input[0] in held:
            sizes.append(held[node.input[0]].shape[attribute(node, "axis", 0)])
        elif node.op_type in ("Cast", "Identity", "Transpose", "Squeeze", "Unsqueeze", "Reshape"):
            names.update(node.output if node.input[0] in names else ())
    return min(sizes, default=None)


def drawn(model: ModelProto, layout: Layout, steps: int, streams: int, seed: int) -> Array:
    """Random readings: float32 [T, B, F], whole numbers for inputs of whole numbers."""
    rng = np.random.default_rng(seed)
    columns: list[Array] = []
    for entry in layout.entries:
        if np.issubdtype(entry.dtype, np.floating):
            columns.append(rng.standard_normal((steps, streams, entry.width)))
        else:
            columns.append(rng.integers(0, vocabulary(model, entry) or 2, (steps, streams, entry.width)))
    return np.concatenate(columns, axis=-1).astype(np.float32)


def dims_of(value: onnx.ValueInfoProto) -> Any:
    """The declared dimensions of a graph input or output."""
    return value.type.tensor_type.shape.dim


def batch_axis(value: onnx.ValueInfoProto, layout: Layout) -> int | None:
    """Which axis of a state is the batch: the one told, its one free one, or one of the size of the fixed batch."""
    sizes = [dim.dim_value for dim in dims_of(value)]
    if value.name in dict(layout.axes):
        return dict(layout.axes)[value.name]
    if 0 in sizes:
        return sizes.index(0) if sizes.count(0) == 1 else None
    if len(sizes) > 2 and sizes[1] == layout.streams:  # [layers, batch, units]
        return 1
    return sizes.index(layout.streams) if layout.streams in sizes else None


def resized(model: ModelProto, layout: Layout, steps: int | None, streams: int | None) -> ModelProto:
    """A graph that is fixed at some timesteps or streams, made for others.

    The fixed number of timesteps stands in the constants that shapes are made of. Each small whole-number constant
    that holds it is changed; whether that was right the proof tells.
    """
    same_steps = steps is None or steps == layout.steps
    same_streams = streams is None or streams == layout.streams
    made = ModelProto()
    made.CopyFrom(model)
    readings = {entry.name: entry for entry in layout.entries}
    for value in made.graph.input:
        if value.name in readings:
            entry = readings[value.name]
            for axis, size in ((entry.time, steps), (entry.batch, streams)):
                if size is not None:
                    dims_of(value)[axis].dim_value = size
        elif layout.streams and not same_streams and (own := batch_axis(value, layout)) is not None:
            dims_of(value)[own].dim_value = streams or 0
    for value in made.graph.output:
        value.type.tensor_type.ClearField("shape")
    del made.graph.value_info[:]
    if layout.streams and not same_streams:
        rebatched(made.graph, layout, streams or 1)
    if layout.steps and not same_steps:
        retimed(made.graph, layout.steps, steps or 1)
    return made


def retimed(graph: onnx.GraphProto, before: int, after: int, *, inner: bool = False) -> None:
    """Change a number of timesteps that is written into the graph's constants, in place.

    In the body of a Loop only single numbers are: lists there cut gates apart. Of floats only those that something is
    compared with: tf2onnx counts so.
    """
    compared = {name for node in graph.node if node.op_type in COMPARING for name in node.input}
    held = [(tensor.name, tensor) for tensor in graph.initializer]
    held += [(node.output[0], _tensor(node)) for node in graph.node if node.op_type == "Constant"]
    for name, tensor in held:
        whole = tensor is not None and tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
        if tensor is None or not (whole or (inner and name in compared)):
            continue
        value = numpy_helper.to_array(tensor)
        if value.size > (1 if inner else 8) or not np.isin(value, (before, before - 1)).any():
            continue
        changed = np.where(value == before, after, value)
        if value.ndim == 0 or value.size == 1:  # the index of the last row
            changed = np.where(value == before - 1, after - 1, changed)
        tensor.CopyFrom(numpy_helper.from_array(changed.astype(value.dtype), tensor.name))
    for node in graph.node:
        for body in bodies(node):
            retimed(body, before, after, inner=True)


def _tensor(node: NodeProto) -> onnx.TensorProto | None:
    item = node.attribute[0] if node.attribute else None
    return item.t if item is not None and item.type == onnx.AttributeProto.TENSOR else None


def rebatched(graph: onnx.GraphProto, layout: Layout, after: int = 1) -> None:
    """Free a fixed batch, in place: the size that is the batch in each Reshape, and constant initial states."""
    held = constants_of(graph)
    before, rows = layout.streams or 0, (layout.streams or 0) * (layout.steps or 0)
    for index, node in enumerate(graph.node):
        for place, axis in _births(node):
            start = held.get(node.input[place])
            if start is None or start.ndim <= axis or start.shape[axis] != before:
                continue
            one = start.take([0], axis=axis)
            if (start == one).all():
                node.input[place] = _added(graph, f"{node.name}/birth_{place}", np.repeat(one, after, axis=axis))
            elif node.op_type in RECURRENT:  # a Loop carries weights too
                raise ExportError(
                    f"node {node.name!r} ({node.op_type}) starts each of its {before} streams from another state "
                    f"({node.input[place]!r}): start all from the same"
                )
        if node.op_type == "Reshape" and node.input[1] in held:
            shape = held[node.input[1]].copy()
            apart = before == 1 and before in shape  # a single stream has as many rows as timesteps
            wanted = rows if rows in shape and rows and not apart else before
            if -1 not in shape and wanted in shape:
                shape[list(shape).index(wanted)] = -1
                node.input[1] = _added(graph, f"{node.name}/free_{index}", shape)


def _births(node: NodeProto) -> list[tuple[int, int]]:
    """Where a node takes initial states, and which axis of them is the batch."""
    if node.op_type in RECURRENT:
        return [(place, 1) for place in RECURRENT[node.op_type] if len(node.input) > place and node.input[place]]
    if node.op_type in ("Loop", "Scan"):
        return [(place, 0) for place, name in enumerate(node.input) if name]
    return []


def _added(graph: onnx.GraphProto, name: str, value: Array) -> str:
    graph.initializer.append(numpy_helper.from_array(value, name))
    return name
