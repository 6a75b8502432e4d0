"""A graph over whole sequences, run on x [T, B, F] whatever its own layout, and at sizes that it was not made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from statestep.export.compare import Array
from statestep.export.errors import ExportError, first_line
from statestep.export.surgery import attribute, bodies, constants_of, every_tensor, session, with_outputs

RECURRENT = {"LSTM": (5, 6), "GRU": (5,), "RNN": (5,)}  # operator → where its initial states come in
LENGTHS = 4  # where a recurrent operator takes the lengths of its sequences
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

        A graph with a fixed batch is run for as many streams at a time; then the outputs' batch axes are not known
        here, so B must be that batch.
        """
        steps, streams = x.shape[:2]
        key = steps if self.layout.steps else None, streams if self.layout.streams else None
        if key not in self.sessions:
            model = resized(self.model, self.layout, *key)
            names = every_tensor(model.graph) if self.plain else []
            self.sessions[key] = session(with_outputs(model, names), plain=self.plain)
        ready = self.sessions[key]
        feeds = {entry.name: entry.laid_out(x) for entry in self.layout.entries}
        for node in ready.get_inputs():
            if node.name not in feeds:
                feeds[node.name] = self._other(node, steps, streams, states or {})
        names = [node.name for node in ready.get_outputs()]
        try:
            return dict(zip(names, ready.run(names, feeds), strict=True))
        except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
            raise ExportError(
                f"the graph fails on {streams} sequences of {steps} timesteps: {first_line(error)}"
            ) from None

    def _other(self, node: Any, steps: int, streams: int, states: Mapping[str, Array]) -> Array:
        """A state or the lengths."""
        if node.name in states:
            return np.ascontiguousarray(states[node.name])
        shape = [size if isinstance(size, int) else streams for size in node.shape]
        if node.name in self.layout.lengths:
            return np.full(shape, steps, np.int64 if "64" in node.type else np.int32)
        return np.zeros(shape, {"tensor(double)": np.float64, "tensor(int64)": np.int64}.get(node.type, np.float32))


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


def resized(model: ModelProto, layout: Layout, steps: int | None, streams: int | None) -> ModelProto:
    """A graph that is fixed at some timesteps or streams, made for others; the same where it is free or fits.

    The fixed number of timesteps stands in the constants that shapes are made of. Each small whole-number constant
    that holds it is changed; whether that was right the proof tells.
    """
    same_steps = steps is None or steps == layout.steps
    same_streams = streams is None or streams == layout.streams
    if same_steps and same_streams:
        return model
    made = ModelProto()
    made.CopyFrom(model)
    readings = {entry.name: entry for entry in layout.entries}
    for value in made.graph.input:
        if value.name in readings:
            entry = readings[value.name]
            dims_of(value)[entry.time].dim_value = steps or layout.steps or 0
            dims_of(value)[entry.batch].dim_value = streams or layout.streams or 0
        elif layout.streams and not same_streams:
            for dim in dims_of(value):
                if dim.dim_value == layout.streams:
                    dim.dim_value = streams or 0
                    break
    for value in made.graph.output:
        value.type.tensor_type.ClearField("shape")
    del made.graph.value_info[:]
    if not same_steps:
        retimed(made.graph, layout.steps or 0, steps or 0)
    if not same_streams:
        rebatched(made.graph, layout.streams or 0)
    return made


def retimed(graph: onnx.GraphProto, before: int, after: int) -> None:
    """Change a number of timesteps that is written into the graph's constants, in place."""
    for holder in (graph.initializer, [_tensor(node) for node in graph.node if node.op_type == "Constant"]):
        for tensor in holder:
            if tensor is None or tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.INT32):
                continue
            value = numpy_helper.to_array(tensor)
            if value.size > 8 or not np.isin(value, (before, before - 1)).any():
                continue
            changed = np.where(value == before, after, value)
            if value.ndim == 0 or value.size == 1:  # the index of the last row
                changed = np.where(value == before - 1, after - 1, changed)
            tensor.CopyFrom(numpy_helper.from_array(changed.astype(value.dtype), tensor.name))
    for node in graph.node:
        for body in bodies(node):
            retimed(body, before, after)


def _tensor(node: NodeProto) -> onnx.TensorProto | None:
    item = node.attribute[0] if node.attribute else None
    return item.t if item is not None and item.type == onnx.AttributeProto.TENSOR else None


def rebatched(graph: onnx.GraphProto, before: int) -> None:
    """In every Reshape to a fixed shape the first size that is the batch becomes free, in place."""
    held = constants_of(graph)
    for index, node in enumerate(graph.node):
        if node.op_type != "Reshape" or node.input[1] not in held:
            continue
        shape = held[node.input[1]].copy()
        if -1 in shape or before not in shape:
            continue
        shape[list(shape).index(before)] = -1
        name = f"{node.input[1]}/free_{index}"
        graph.initializer.append(numpy_helper.from_array(shape, name))
        node.input[1] = name
