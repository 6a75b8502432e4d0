"""What each input of a graph over sequences is: readings with their axes, states, or lengths; told by trying it out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.surgery import attribute, bodies, constants_of
from statestep.export.whole import BATCH, LAYOUTS, LENGTHS, RECURRENT, STEPS, Entry, Layout, Whole, dims_of, drawn
from statestep.runtime.pairs import Named, partners

MANY = 29  # streams of the trial run that tells them from timesteps
TIME_NAMES = ("time", "seq", "step", "length", "frame", "t")
BATCH_NAMES = ("batch", "b", "n")


def layout_of(model: ModelProto, wanted: str | None = None, named: Named | None = None) -> Layout:
    """Tell readings, states and lengths apart, and find the axes, by trying them out.

    `wanted` settles the axes of every input of readings: one of `LAYOUTS`; `named` settles states: input → output, or
    (output, batch axis).
    Raises `ExportError` where an input is none of the three, or the axes cannot be told.
    """
    graph = model.graph
    reach = {value.name: set(_ends(graph.node, value.name)) for value in graph.input}
    _refuse_strangers(graph, named or {})
    told = {name: (pair, None) if isinstance(pair, str) else pair for name, pair in (named or {}).items()}
    pairs = tuple((name, output) for name, (output, _) in told.items()) or _pairs(graph)
    axes = tuple((name, axis) for name, (_, axis) in told.items() if axis is not None)
    lengths = tuple(name for name, ends in reach.items() if ends == {"length"})
    initials = tuple(n for n, ends in reach.items() if ends == {"state"} and n not in dict(pairs))
    apart = {*dict(pairs), *lengths, *initials}
    readings = [value for value in graph.input if value.name not in apart]
    if not readings:
        raise ExportError("the graph has no input that could be readings: each is a state or the lengths of a node")
    found: list[tuple[tuple[int, int], tuple[Entry, ...]]] = []
    problems: list[str] = []
    for entries in _candidates(readings, wanted):
        for streams in (None, *sorted(_born_together(graph))):
            sized = tuple(entry if streams is None else replace(entry, streams=streams) for entry in entries)
            layout = Layout(sized, pairs, initials, lengths, axes)
            try:
                if streams is None and layout.streams is None:  # it may be fixed at the very batch of the trials
                    Whole(model, layout).run(drawn(model, layout, layout.steps or STEPS, BATCH + 1, 0))
                found.append(((_independence(model, layout), _evidence(model, layout)), sized))
                break
            except ExportError as error:
                problems.append(str(error))
    if not found:
        raise ExportError(_no_layout(readings, wanted, problems))
    most = max(score for score, _ in found)
    best = [entries for score, entries in found if score == most]
    if len(best) > 1:
        best = [way for way in best if _grows(model, Layout(way, pairs, initials, lengths, axes))] or best
    entries = _settled(best, readings)
    if entries[0].steps == 1:
        raise ExportError(
            f"input {entries[0].name!r} is fixed at one timestep, which shows nothing of what the next would remember: "
            "export it with a free time axis, or with its states as inputs and outputs"
        )
    return Layout(entries, pairs, initials, lengths, axes)


def _refuse_strangers(graph: onnx.GraphProto, named: Named) -> None:
    """States that are told by hand must be there, and their batch axes too."""
    entering, leaving = {value.name: len(dims_of(value)) for value in graph.input}, [v.name for v in graph.output]
    for name, pair in named.items():
        output, axis = (pair, 0) if isinstance(pair, str) else pair
        if name not in entering:
            raise ExportError(f"state {name!r} is no input of the graph, it has: {list(entering)}")
        if output not in leaving:
            raise ExportError(f"state {name!r}: the graph has no output {output!r}, it has {leaving}")
        if not 0 <= axis < max(entering[name], 1):
            raise ExportError(f"state {name!r} has {entering[name]} axes, none of them is {axis}: count them from 0")


def _grows(model: ModelProto, layout: Layout) -> bool:
    """Whether a layout of fixed sizes also holds at others."""
    whole, steps, streams = Whole(model, layout), layout.steps or STEPS, layout.streams or BATCH
    try:
        for more, others in ((4, 0), (0, 1)):
            whole.run(drawn(model, layout, steps + more, streams + others, 0))
    except ExportError:
        return False
    return True


def _settled(best: list[tuple[Entry, ...]], readings: Sequence[Any]) -> tuple[Entry, ...]:
    """The one layout, by the axes' names where trying could not tell; features last, where they do not either."""
    if len(best) > 1:
        best = [way for way in best if all(map(_named_so, readings, way))] or best
    if len(best) > 1:
        best = [way for way in best if _letters(way[0]).endswith("F")] or best
    if len(best) > 1:
        letters = [_letters(way[0]) for way in best]
        raise ExportError(
            f"the axes of input {readings[0].name!r} could be any of {letters} "
            "(B batch, T time, F feature): say which by --layout"
        )
    return best[0]


def _born_together(graph: onnx.GraphProto) -> set[int]:
    """Batches that a graph may be fixed at though its inputs do not say so: of the states that Loops start from."""
    held = constants_of(graph)
    loops = [node for node in graph.node if node.op_type in ("Loop", "Scan")]
    return {held[name].shape[0] for node in loops for name in node.input if name in held and held[name].ndim > 1}


def _no_layout(readings: Sequence[Any], wanted: str | None, problems: Sequence[str]) -> str:
    """The sentence on the first input that can be no readings, or else on what went wrong with them."""
    ranks = {len(axes) for axes in LAYOUTS.values() if None in axes} | {3}
    worst = next((value for value in readings if len(dims_of(value)) not in ranks), readings[0])
    shape = [dim.dim_value or dim.dim_param or "?" for dim in dims_of(worst)]
    what = f"input {worst.name!r} of shape {shape}"
    if problems:
        return problems[0]
    if wanted is not None and len(shape) != len([axis for axis in LAYOUTS[wanted] if axis is not None]):
        return f"{what} cannot have the axes {wanted}: say others by --layout, or let them be found"
    if len(shape) == 3 and not any(isinstance(size, int) for size in shape):
        return f"{what} does not say how many readings a timestep has: export it with a feature axis of a fixed size"
    return (
        f"{what} is neither readings ([batch, time, feature] in some order, or [batch, time]) nor a state or the "
        f"lengths of a recurrent node: export the graph without it, or fix it by --set {worst.name}=value"
    )


def _pairs(graph: onnx.GraphProto) -> tuple[tuple[str, str], ...]:
    """The states that a graph takes and gives, by name and shape."""
    leaving = {value.name: value for value in graph.output}
    found = []
    for value in graph.input:
        for name in partners(value.name):
            other = leaving.get(name)
            if other is not None and _shape(other) == _shape(value):
                found.append((value.name, name))
                break
    return tuple(found)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, tuple[Any, ...]]:
    kind = value.type.tensor_type
    return kind.elem_type, tuple(d.dim_value or None for d in kind.shape.dim)


def _ends(nodes: Any, start: str) -> Iterator[str]:
    """What an input is used as in the end: "state", "length" or "value", through nodes that only move it about."""
    moving = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Transpose", "Expand"}
    names = {start}
    for node in nodes:
        for place, name in enumerate(node.input):
            if name not in names:
                continue
            if node.op_type in RECURRENT and place in RECURRENT[node.op_type]:
                yield "state"
            elif node.op_type in RECURRENT and place == LENGTHS:
                yield "length"
            elif node.op_type in moving and place == 0:
                names.update(node.output)
            elif node.op_type != "Shape":
                yield "value"
        if any(name in names for body in bodies(node) for inner in body.node for name in inner.input):
            yield "value"


def _candidates(readings: Sequence[Any], wanted: str | None) -> Iterator[tuple[Entry, ...]]:
    """Every way to read the inputs' axes."""
    options = []
    for value in readings:
        dims = [d.dim_value or None for d in dims_of(value)]
        shapes = [LAYOUTS[wanted]] if wanted else list(LAYOUTS.values())
        ways = []
        for batch, time, feature in shapes:
            if len(dims) != (2 if feature is None else 3):
                continue
            width = 1 if feature is None else dims[feature]
            if width is not None:
                ways.append((value, batch, time, feature, width, dims[time], dims[batch]))
        options.append(ways)
    for chosen in itertools.product(*options):
        entries, first = [], 0
        for value, batch, time, feature, width, steps, streams in chosen:
            kind = value.type.tensor_type.elem_type
            entries.append(Entry(value.name, kind, batch, time, feature, width, first, steps, streams))
            first += width
        if len({entry.steps for entry in entries}) == 1 == len({entry.streams for entry in entries}):
            yield tuple(entries)


def _named_so(value: Any, entry: Entry) -> bool:
    """Whether the axes' own names say what the entry says."""
    time = dims_of(value)[entry.time].dim_param.lower()
    batch = dims_of(value)[entry.batch].dim_param.lower()
    return _among(time, TIME_NAMES) or (_among(batch, BATCH_NAMES) and not _among(time, BATCH_NAMES))


def _among(name: str, words: Sequence[str]) -> bool:
    return any(name == word or (len(word) > 1 and word in name) for word in words)


def _letters(entry: Entry) -> str:
    return next(name for name, axes in LAYOUTS.items() if axes == (entry.batch, entry.time, entry.feature))


def _independence(model: ModelProto, layout: Layout) -> int:
    """For how many outputs a change of one stream's readings stays in its rows, less those where it does not.

    Along time it would not stay: what is later remembers it, by as many rows later as there are streams here.
    """
    steps, streams = layout.steps or STEPS, layout.streams or MANY
    if streams == 1:
        return 0
    whole, x = Whole(model, layout), drawn(model, layout, steps, streams, 0)
    before = whole.run(x)
    x[:, 0] = drawn(model, layout, steps, 1, 7)[:, 0]
    after, score = whole.run(x), 0
    for name in set(before) - set(dict(layout.pairs).values()):
        apart = np.asarray(before[name] != after[name])
        own = False
        for axis, size in enumerate(apart.shape):
            touched = np.flatnonzero(apart.any(axis=tuple(a for a in range(apart.ndim) if a != axis)))
            own = own or (size == streams and touched.tolist() == [0])
            own = own or (size == streams * steps and touched.tolist() == list(range(steps)))
            own = own or (size == streams * steps and touched.tolist() == list(range(0, streams * steps, streams)))
        score += 1 if own else -1
    return score


def _evidence(model: ModelProto, layout: Layout) -> int:
    """How many nodes that walk along time find it where the layout has it, less those that do not."""
    steps, streams = layout.steps or STEPS, layout.streams or BATCH
    tensors = Whole(model, layout, plain=True).run(drawn(model, layout, steps, streams, 0))
    held = constants_of(model.graph)
    score = 0
    for node in model.graph.node:
        shapes = [np.shape(tensors.get(name, held.get(name, ()))) for name in node.input]
        entry = layout.entries[0]
        if node.input and node.input[0] in {e.name for e in layout.entries}:
            entry = next(e for e in layout.entries if e.name == node.input[0])
            shapes[0] = entry.laid_out(np.zeros((steps, streams, layout.width), np.float32)).shape
        if node.op_type in RECURRENT:
            score += 1 if shapes[0][:2] == (steps, streams) else -1
        elif node.op_type == "Loop":
            gathered = [np.shape(tensors[name]) for name in node.output if name in tensors]
            gathered = gathered[len(attribute(node, "body").input) - 2 :] or _counted(node, tensors)
            score += any(shape[:1] == (steps,) for shape in gathered) - any(
                shape[:1] == (streams,) for shape in gathered
            )
        elif node.op_type == "Scan":
            score += _scanned(node, shapes, steps)
        elif node.op_type == "Conv":
            score += any(size >= steps for size in shapes[0][2:]) - (streams in shapes[0][2:])
    return score


def _counted(node: NodeProto, tensors: Mapping[str, Array]) -> list[tuple[int, ...]]:
    """How often a Loop that gathers nothing went round, as its counters say."""
    numbers = [np.asarray(tensors[name]) for name in node.output if not isinstance(tensors.get(name, []), list)]
    return [(int(number.reshape(())),) for number in numbers if number.size == 1 and number.dtype.kind == "i"]


def _scanned(node: NodeProto, shapes: Sequence[tuple[int, ...]], steps: int) -> int:
    count = attribute(node, "num_scan_inputs")
    axes = attribute(node, "scan_input_axes", [0] * count)
    return 1 if all(s and s[a] == steps for s, a in zip(shapes[-count:], axes, strict=True)) else -1
