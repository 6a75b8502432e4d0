"""Nodes that walk along time, LSTM, GRU, RNN, Loop and Scan: what they carry from row to row comes in and goes out."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto

from statestep.export.probe import Tag
from statestep.export.stateful import Work, declared, initial_of, leave, number, refuse_ahead, refused
from statestep.export.surgery import attribute
from statestep.export.whole import LENGTHS, RECURRENT

INITIALS = {"LSTM": "hc", "GRU": "h", "RNN": "h"}


def recurrent(node: NodeProto, work: Work) -> None:
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
    if tag.value.dtype == np.float16:
        raise refused(
            node,
            "computes in float16, of whose state more digits pass from row to row than it hands out: export it in "
            "float32; --weights fp16 stores its weights in half the bytes",
        )
    refuse_ahead(node.input[0], work)
    node.input.extend([""] * (max(RECURRENT[node.op_type]) + 1 - len(node.input)))
    if node.input[LENGTHS]:
        if work.tags[node.input[LENGTHS]].varies:
            raise refused(node, "takes sequence lengths that are computed from the readings: export it without a mask")
        node.input[LENGTHS] = ""
    units = int(attribute(node, "hidden_size") or work.tags[node.input[2]].shape[2])
    many = sum(other.op_type in RECURRENT for other in work.graph.node) > 1
    prefix = f"l{number(work, 'layer')}_" if many else ""
    for place, letter, out in zip(RECURRENT[node.op_type], INITIALS[node.op_type], (1, 2), strict=False):
        start = node.input[place]
        if start in work.given:
            continue
        shape, batch = (1, units), 1
        initial = initial_of(node, start, batch, shape, work) if start else np.zeros(shape, tag.value.dtype)
        name, output = declared(node, work, f"{prefix}{letter}0", f"{prefix}{letter}n", tag, shape, initial, batch)
        node.input[place] = name
        leave(work, node.output[out], output)


def loop(node: NodeProto, work: Work) -> None:
    """Carried values that depend on the readings become states; counters start anew at every step."""
    body = attribute(node, "body")
    count = len(body.input) - 2
    carried_out = [work.tags.get(name) for name in node.output[:count]]
    gathered = [work.tags[name] for name in node.output[count:] if name in work.tags]
    limit = work.tags.get(node.input[0])
    counting = [limit, *(tag for tag in carried_out if tag is not None and not tag.varies)]
    along = any(tag.time is not None for tag in gathered) or any(tag is not None and tag.counts for tag in counting)
    if not along:
        return
    for place, tag in enumerate(carried_out):
        if tag is None or not tag.varies or tag.time is not None:
            continue
        _carry(node, place + 2, tag, node.output[place], f"loop{len(work.done.walks) + 1}_s{place}", work)
    work.done.walks.append(node.name)


def scan(node: NodeProto, work: Work) -> None:
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
        refuse_ahead(name, work)
    for place in range(len(node.output) - gathered):
        tag = work.tags[node.output[place]]
        if tag.varies:
            _carry(node, place, tag, node.output[place], f"scan{len(work.done.walks) + 1}_s{place}", work)
    work.done.walks.append(node.name)


def _carry(node: NodeProto, place: int, tag: Tag, final: str, stem: str, work: Work) -> None:
    """Carried value at input `place` of a Loop or Scan, `final` after the last timestep."""
    if tag.batch is None or tag.odd or tag.merged is not None:
        raise refused(
            node,
            f"carries {final!r} of shape {list(tag.shape)}, which has no axis of its own for the batch: give each "
            "stream a row of it",
        )
    shape = tag.shape[: tag.batch] + tag.shape[tag.batch + 1 :]
    if node.input[place] in work.given:
        return
    initial = initial_of(node, node.input[place], tag.batch, shape, work)
    name, output = declared(node, work, stem, f"next_{stem}", tag, shape, initial, tag.batch)
    node.input[place] = name
    leave(work, final, output)
