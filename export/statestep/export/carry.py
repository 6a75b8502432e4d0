"""Memory made visible: every node that walks along time is given its state from outside, and gives it back.

The result runs over sequences of any length from any state: over T timesteps, or over one and then the next. Nodes
that cannot be cut so are refused by name, with the reason and the way out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.probe import Tag, Tags
from statestep.export.surgery import Builder, attribute, pruned, set_attribute, sorted_nodes
from statestep.export.whole import LENGTHS, RECURRENT, Layout
from statestep.runtime import State

INITIALS = {"LSTM": "hc", "GRU": "h", "RNN": "h"}


@dataclass
class Carried:
    """The graph with its states as inputs and outputs, for any number of timesteps."""

    model: ModelProto
    layout: Layout  # of the inputs that are left; every state is one of its pairs
    states: list[State] = field(default_factory=list)
    walks: list[str] = field(default_factory=list)  # the Loops and Scans along time, by node name
    exact: bool = True  # False where an operator rounds a single row in its own way


@dataclass
class _Work:
    """What `carried` holds while it goes from node to node."""

    graph: onnx.GraphProto
    tags: Tags
    layout: Layout
    builder: Builder
    given: set[str]  # what comes from states that the graph takes itself
    done: Carried
    ahead: dict[str, tuple[int, str]] = field(default_factory=dict)  # tensor → later rows that were left out, by whom
    names: dict[str, int] = field(default_factory=dict)


def refused(node: NodeProto, why: str) -> ExportError:
    """The sentence that names a node which cannot be streamed."""
    return ExportError(f"node {node.name!r} ({node.op_type}) {why}")


def carried(model: ModelProto, layout: Layout, tags: Tags) -> Carried:
    """Give every node of `model` that walks along time its state from outside. `model` itself is not changed."""
    copy = ModelProto()
    copy.CopyFrom(model)
    done = Carried(copy, layout, [_own_state(copy.graph, *pair, layout) for pair in layout.pairs])
    given = _downstream(copy.graph, {name for name, _ in layout.pairs})
    work = _Work(copy.graph, tags, layout, Builder(copy.graph), given, done)
    gone = {*layout.initials, *layout.lengths}
    work.builder.taken -= gone  # the states may take their names
    entering = [value for value in copy.graph.input if value.name not in gone]
    del copy.graph.input[:]
    copy.graph.input.extend(entering)
    for node in list(copy.graph.node):
        if node.op_type in RECURRENT:
            _recurrent(node, work)
        elif node.op_type == "Loop":
            _loop(node, work)
        elif node.op_type == "Scan":
            _scan(node, work)
        elif node.op_type == "Pad":
            _pad(node, work)
        elif node.op_type == "Conv":
            _conv(node, work)
        else:
            _other(node, work)
    for value in copy.graph.output:
        _refuse_ahead(value.name, work)
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
    dims = value.type.tensor_type.shape.dim
    free = [axis for axis, dim in enumerate(dims) if not dim.dim_value or dim.dim_value == layout.streams]
    if len(free) != 1:
        sizes = [dim.dim_value or dim.dim_param for dim in dims]
        raise ExportError(f"state {name!r} has shape {sizes}: its batch axis must be its one free dimension")
    shape = tuple(dim.dim_value for axis, dim in enumerate(dims) if axis != free[0])
    dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
    return State(name, output, shape, free[0], dtype)


def _state(
    node: NodeProto,
    work: _Work,
    stem: str,
    following: str,
    tag: Tag,
    shape: tuple[int, ...],
    initial: Array,
    batch: int,
) -> tuple[str, str]:
    """Declare a state of `shape` without its batch axis: the name it comes in by, and the one it is to leave by."""
    size: list[int | str] = [*shape[:batch], "B", *shape[batch:]]
    elem_type = helper.np_dtype_to_tensor_dtype(tag.value.dtype)
    name = work.builder.input(stem, elem_type, size)
    output = work.builder.name(following)
    work.graph.output.append(helper.make_tensor_value_info(output, elem_type, size))
    plain = bool((initial == initial.flat[0]).all()) if initial.size else True
    value = (initial.flat[0].item() if initial.size else 0) if plain else initial.tolist()
    work.done.states.append(State(name, output, shape, batch, tag.value.dtype.name, value))
    return name, output


def _leave(work: _Work, tensor: str, output: str) -> None:
    work.graph.node.append(helper.make_node("Identity", [tensor], [output], name=f"{output}/Identity"))


def _initial(node: NodeProto, name: str, batch: int, shape: tuple[int, ...], work: _Work) -> Array:
    """The value that the graph starts a state from, of one stream; it must not depend on the readings."""
    tag = work.tags[name]
    if tag.varies:
        raise refused(
            node,
            f"starts from {name!r}, which is computed from the readings: a stream has none yet when it starts; "
            "start it from a constant",
        )
    whole = np.broadcast_to(tag.value, _with(shape, batch, tag.value.shape[batch] if tag.value.ndim > batch else 1))
    first = whole.take(0, axis=batch)
    if not (whole == np.expand_dims(first, batch)).all():
        raise refused(node, f"starts each stream of a batch from another state ({name!r}): start all from the same")
    return np.asarray(first)


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis:])


def _number(work: _Work, kind: str) -> int:
    work.names[kind] = work.names.get(kind, 0) + 1
    return work.names[kind]


def _recurrent(node: NodeProto, work: _Work) -> None:
    """LSTM, GRU, RNN: initial_h and initial_c from outside, Y_h and Y_c back."""
    tag = work.tags[node.input[0]]
    direction = attribute(node, "direction", "forward")
    if tag.time is None and tag.merged is None and not tag.odd:
        return  # it walks along something else
    if direction != "forward":
        raise refused(
            node,
            f"is {direction}: it reads the sequence from its end, and that has not come yet when a row must be "
            "answered; train a network that only reads forward",
        )
    if attribute(node, "layout", 0) != 0 or tag.time != 0 or tag.batch != 1 or tag.offset:
        raise refused(node, "does not read [time, batch, feature] row by row: export it with layout 0 over all rows")
    _refuse_ahead(node.input[0], work)
    node.input.extend([""] * (max(RECURRENT[node.op_type]) + 1 - len(node.input)))
    if node.input[LENGTHS]:
        if work.tags[node.input[LENGTHS]].varies:
            raise refused(node, "takes sequence lengths that are computed from the readings: export it without a mask")
        node.input[LENGTHS] = ""
    units = int(attribute(node, "hidden_size") or work.tags[node.input[2]].shape[2])
    many = sum(other.op_type in RECURRENT for other in work.graph.node) > 1
    prefix = f"l{_number(work, 'layer')}_" if many else ""
    for place, letter, out in zip(RECURRENT[node.op_type], INITIALS[node.op_type], (1, 2), strict=False):
        start = node.input[place]
        if start in work.given:
            continue
        shape, batch = (1, units), 1
        initial = _initial(node, start, batch, shape, work) if start else np.zeros(shape, tag.value.dtype)
        name, output = _state(node, work, f"{prefix}{letter}0", f"{prefix}{letter}n", tag, shape, initial, batch)
        node.input[place] = name
        _leave(work, node.output[out], output)
    work.done.exact = work.done.exact and node.op_type != "RNN"


def _loop(node: NodeProto, work: _Work) -> None:
    """Carried values that depend on the readings become states; counters start anew at every step."""
    body = attribute(node, "body")
    count = len(body.input) - 2
    carried_out = [work.tags.get(name) for name in node.output[:count]]
    gathered = [work.tags[name] for name in node.output[count:] if name in work.tags]
    steps = work.tags[work.layout.entries[0].name].shape[work.layout.entries[0].time]
    counters = [tag for tag in carried_out if tag is not None and not tag.varies and tag.value.size == 1]
    limit = work.tags.get(node.input[0])
    along = any(tag.time is not None for tag in gathered)
    along = along or any(int(tag.value.reshape(())) == steps for tag in counters if tag.value.dtype.kind == "i")
    along = along or (limit is not None and limit.value.size == 1 and int(limit.value.reshape(())) == steps)
    if not along:
        return
    for place, tag in enumerate(carried_out):
        if tag is None or not tag.varies or tag.time is not None:
            continue
        _carry(node, place + 2, tag, node.output[place], f"loop{len(work.done.walks) + 1}_s{place}", work)
    work.done.walks.append(node.name)


def _scan(node: NodeProto, work: _Work) -> None:
    """The state variables of a Scan along time become states."""
    count = int(attribute(node, "num_scan_inputs"))
    axes = attribute(node, "scan_input_axes", [0] * count)
    tags = [work.tags[name] for name in node.input[len(node.input) - count :]]
    if not any(tag.time == axis for tag, axis in zip(tags, axes, strict=True)):
        return
    gathered = len(node.output) - (len(node.input) - count)
    backwards = [*attribute(node, "scan_input_directions", []), *attribute(node, "scan_output_directions", [])]
    if any(backwards) or any(tag.time != axis for tag, axis in zip(tags, axes, strict=True)):
        raise refused(node, "walks along the sequence from its end, which has not come yet: train a forward network")
    for name in node.input[len(node.input) - count :]:
        _refuse_ahead(name, work)
    for place in range(len(node.output) - gathered):
        tag = work.tags[node.output[place]]
        if tag.varies:
            _carry(node, place, tag, node.output[place], f"scan{len(work.done.walks) + 1}_s{place}", work)
    work.done.walks.append(node.name)


def _carry(node: NodeProto, place: int, tag: Tag, final: str, stem: str, work: _Work) -> None:
    """Carried value at input `place` of a Loop or Scan, `final` after the last timestep."""
    if tag.batch is None or tag.odd or tag.merged is not None:
        raise refused(node, f"carries {final!r} of shape {list(tag.shape)}, which has no axis of its own for the batch")
    shape = tag.shape[: tag.batch] + tag.shape[tag.batch + 1 :]
    if node.input[place] in work.given:
        return
    initial = _initial(node, node.input[place], tag.batch, shape, work)
    name, output = _state(node, work, stem, f"next_{stem}", tag, shape, initial, tag.batch)
    node.input[place] = name
    _leave(work, final, output)


def _pad(node: NodeProto, work: _Work) -> None:
    """Padding at the beginning of time is a memory of the last rows."""
    tag, after = work.tags[node.input[0]], work.tags[node.output[0]]
    if tag.time is None or after.time is None or after.offset == tag.offset:
        _other(node, work)
        return
    pads = work.tags[node.input[1]].value
    axes = list(range(len(tag.shape)))
    if len(node.input) > 3 and node.input[3]:
        axes = [int(axis) % len(tag.shape) for axis in work.tags[node.input[3]].value]
    place = axes.index(tag.time)
    before, behind = int(pads[place]), int(pads[place + len(axes)])
    if attribute(node, "mode", "constant") != "constant":
        raise refused(node, f"pads the sequence by mode {attribute(node, 'mode')!r}: pad it with a constant")
    fill = work.tags[node.input[2]].value.reshape(()) if len(node.input) > 2 and node.input[2] else np.float32(0)
    rest = pads.copy()
    rest[[place, place + len(axes)]] = 0
    if rest.any():
        node.input[1] = work.builder.constant(f"{node.name}/pads", rest)
        made, source = work.builder.made(node.op_type, list(node.input), f"{node.name}/others")
        made.attribute.extend(node.attribute)
        work.graph.node.append(made)
    else:
        source = node.input[0]
    window = _delayed(node, source, tag, before, np.asarray(fill), work) if before else source
    _ahead(node, behind, work)
    work.graph.node.remove(node)
    _leave(work, window, node.output[0])


def _conv(node: NodeProto, work: _Work) -> None:
    """A causal convolution keeps the rows that its window reaches back to."""
    tag = work.tags[node.input[0]]
    if tag.time is None or tag.time < 2:
        _other(node, work)
        return
    axis, rank = tag.time - 2, len(tag.shape) - 2
    reach = (work.tags[node.input[1]].shape[tag.time] - 1) * attribute(node, "dilations", [1] * rank)[axis]
    if attribute(node, "strides", [1] * rank)[axis] != 1:
        raise refused(node, "takes only some of the rows (a stride along time): every message must be answered")
    pads = _pads(node, tag, work)
    before, behind = pads[axis], pads[axis + rank]
    left_out = max((work.ahead[name][0] for name in node.input if name in work.ahead), default=0)
    lacking = reach - (tag.offset - left_out) - before
    if lacking > 0 and before + behind + tag.offset >= reach:
        raise refused(
            node,
            f"reads {lacking} rows that come later (its padding is on both sides): pad only on the left, by "
            "(kernel − 1) · dilation, as padding='causal' does",
        )
    if lacking > 0:
        raise refused(
            node,
            f"gives {lacking} rows fewer than it takes (no padding): pad on the left, by (kernel − 1) · dilation, "
            "so that every row is answered",
        )
    if before:
        node.input[0] = _delayed(node, node.input[0], tag, before, np.zeros((), tag.value.dtype), work)
    pads[axis] = pads[axis + rank] = 0
    set_attribute(node, "pads", pads)
    set_attribute(node, "auto_pad", "NOTSET")
    _ahead(node, behind, work)


def _pads(node: NodeProto, tag: Tag, work: _Work) -> list[int]:
    """A convolution's padding, before and behind each spatial axis."""
    rank = len(tag.shape) - 2
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        return list(attribute(node, "pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    kernel, dilations = work.tags[node.input[1]].shape[2:], attribute(node, "dilations", [1] * rank)
    total = [(size - 1) * dilation for size, dilation in zip(kernel, dilations, strict=True)]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return [*less, *more] if mode == "SAME_UPPER" else [*more, *less]


def _delayed(node: NodeProto, source: str, tag: Tag, rows: int, fill: Array, work: _Work) -> str:
    """`source` with its last `rows` rows before it, which are a state; the tensor's name."""
    if tag.batch is None or tag.time is None:
        raise refused(node, "looks back over rows of all streams at once: keep batch and time on axes of their own")
    full = list(tag.shape)
    full[tag.time] = rows
    shape = tuple(size for axis, size in enumerate(full) if axis != tag.batch)
    stem = f"window{_number(work, 'window')}"
    name, output = _state(node, work, stem, f"next_{stem}", tag, shape, np.full(shape, fill), tag.batch)
    build = work.builder
    window = build.node("Concat", [name, source], f"{node.name}/window", axis=tag.time)
    bounds = [
        build.constant(f"{node.name}/{what}", [v]) for what, v in (("from", -rows), ("to", 2**62), ("axis", tag.time))
    ]
    _leave(work, build.node("Slice", [window, *bounds], f"{node.name}/last_rows"), output)
    return window


def _ahead(node: NodeProto, behind: int, work: _Work) -> None:
    """Note that the rows which padding at the end would have given are left out."""
    before = [work.ahead[name] for name in node.input if name in work.ahead]
    total = behind + max((rows for rows, _ in before), default=0)
    if total:
        for name in node.output:
            work.ahead[name] = total, (before[0][1] if before and not behind else node.name)


def _other(node: NodeProto, work: _Work) -> None:
    """Every other node works row by row, or the proof will name it; here is what can be told before."""
    taken = [work.tags[name] for name in node.input if name in work.tags]
    source = work.tags.get(node.input[0]) if node.input else None
    for name in node.output:
        tag = work.tags.get(name)
        if tag is None:
            continue
        if (tag.odd or tag.offset < 0) and not any(t.odd or t.offset < 0 for t in taken) and tag.varies:
            raise refused(
                node, "gives another number of rows than the sequence has: every message must be answered by one row"
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
            _leave(work, node.input[0], name)
            return
    if tag.time is None and tag.varies:
        for name in node.input:
            _refuse_ahead(name, work)
    _ahead(node, 0, work)


def _refuse_ahead(name: str, work: _Work) -> None:
    """What is used as a row's answer must not have been made by looking ahead."""
    if name not in work.ahead:
        return
    rows, origin = work.ahead[name]
    node = next((node for node in work.graph.node if node.name == origin), None)
    sentence = (
        f"reads {rows} rows that come later (its padding is on both sides): pad only on the left, as 'causal' does"
    )
    raise refused(node, sentence) if node is not None else ExportError(f"node {origin!r} {sentence}")
