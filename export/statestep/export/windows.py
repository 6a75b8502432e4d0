"""Causal convolutions and padding: the rows that a window reaches back to are a state, looking ahead is refused."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from statestep.export.compare import Array
from statestep.export.probe import Tag
from statestep.export.stateful import Work, ahead, declared, in_rows, leave, number, refused
from statestep.export.surgery import attribute, set_attribute


def looks_back(node: NodeProto, work: Work) -> bool:
    """Give a convolution or a padding along time its window; False for a node that is none, which stays as it is."""
    if node.op_type not in ("Pad", "Conv"):
        return False
    tag = work.tags[node.input[0]]
    if node.op_type == "Conv":
        if tag.time is None or tag.time < 2:
            return False
        _conv(node, work)
        return True
    after = work.tags[node.output[0]]
    if tag.time is None or after.time is None or after.offset == tag.offset:
        return False
    _pad(node, work)
    return True


def _pad(node: NodeProto, work: Work) -> None:
    """Padding at the beginning of time is a memory of the last rows."""
    tag = work.tags[node.input[0]]
    assert tag.time is not None
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
    ahead(node, behind, work)
    work.graph.node.remove(node)
    leave(work, window, node.output[0])


def _conv(node: NodeProto, work: Work) -> None:
    """A causal convolution keeps the rows that its window reaches back to."""
    tag = work.tags[node.input[0]]
    assert tag.time is not None
    axis, rank = tag.time - 2, len(tag.shape) - 2
    reach = (work.tags[node.input[1]].shape[tag.time] - 1) * attribute(node, "dilations", [1] * rank)[axis]
    if attribute(node, "strides", [1] * rank)[axis] != 1:
        raise refused(
            node,
            "takes only some of the rows (a stride along time), and every message must be answered: give it a stride "
            "of 1",
        )
    pads = _pads(node, tag, work)
    before, behind = pads[axis], pads[axis + rank]
    left_out = max((work.ahead[name][0] for name in node.input if name in work.ahead), default=0)
    lacking = reach - (tag.offset - left_out) - before
    if lacking > 0 and before + behind + tag.offset >= reach:
        raise refused(
            node,
            f"looks {in_rows(lacking)} ahead (its padding is not on the left alone): pad only on the left, by "
            "(kernel − 1) · dilation, as padding='causal' does",
        )
    if lacking > 0:
        raise refused(
            node,
            f"gives {in_rows(lacking)} fewer than it takes (no padding): pad on the left, by (kernel − 1) · dilation, "
            "so that every row is answered",
        )
    if before:
        node.input[0] = _delayed(node, node.input[0], tag, before, np.zeros((), tag.value.dtype), work)
    pads[axis] = pads[axis + rank] = 0
    set_attribute(node, "pads", pads)
    set_attribute(node, "auto_pad", "NOTSET")
    ahead(node, behind, work)


def _pads(node: NodeProto, tag: Tag, work: Work) -> list[int]:
    """A convolution's padding, before and behind each spatial axis."""
    rank = len(tag.shape) - 2
    mode = attribute(node, "auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        return list(attribute(node, "pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    kernel, dilations = work.tags[node.input[1]].shape[2:], attribute(node, "dilations", [1] * rank)
    total = [(size - 1) * dilation for size, dilation in zip(kernel, dilations, strict=True)]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return [*less, *more] if mode == "SAME_UPPER" else [*more, *less]


def _delayed(node: NodeProto, source: str, tag: Tag, rows: int, fill: Array, work: Work) -> str:
    """`source` with its last `rows` rows before it, which are a state; the tensor's name."""
    if tag.batch is None or tag.time is None:
        raise refused(node, "looks back over rows of all streams at once: keep batch and time on axes of their own")
    full = list(tag.shape)
    full[tag.time] = rows
    shape = tuple(size for axis, size in enumerate(full) if axis != tag.batch)
    stem = f"window{number(work, 'window')}"
    name, output = declared(node, work, stem, f"next_{stem}", tag, shape, np.full(shape, fill), tag.batch)
    build = work.builder
    window = build.node("Concat", [name, source], f"{node.name}/window", axis=tag.time)
    bounds = [
        build.constant(f"{node.name}/{what}", [v]) for what, v in (("from", -rows), ("to", 2**62), ("axis", tag.time))
    ]
    leave(work, build.node("Slice", [window, *bounds], f"{node.name}/last_rows"), output)
    return window
