"""What each tensor of a graph over sequences is made of: found by running it, at several lengths, batches and readings.

No rule for any operator is needed: an axis that grows with the number of timesteps is time, a tensor that changes with
the readings carries them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from statestep.export.compare import Array
from statestep.export.surgery import constants_of
from statestep.export.whole import BATCH, STEPS, Whole, drawn

MORE_STEPS, MORE_STREAMS = 4, 1  # of the trial runs that tell what grows


@dataclass(frozen=True, slots=True)
class Tag:
    """One tensor. Its time axis has T + `offset` places; `merged` is an axis of all T·B rows, `by_time` their order."""

    shape: tuple[int, ...]  # at STEPS and BATCH, or at the sizes that the graph is fixed at
    value: Array
    varies: bool  # with the readings
    time: int | None = None
    offset: int = 0
    batch: int | None = None
    merged: int | None = None
    by_time: bool = False  # timestep by timestep; otherwise stream by stream
    fewer: bool = False  # an axis grows, but not by a place for each timestep
    odd: bool = False  # an axis holds more than one place for each timestep, stream or both
    counts: bool = False  # a whole number that is T


Tags = Mapping[str, Tag]


def probe(whole: Whole) -> dict[str, Tag]:
    """The tags of every tensor, inputs and constants too. `whole` must be plain."""
    layout, model = whole.layout, whole.model
    steps, streams = layout.steps or STEPS, layout.streams or BATCH
    x = drawn(model, layout, steps, streams, seed=1)
    first = _values(whole, x)
    other = _values(whole, drawn(model, layout, steps, streams, seed=2))
    longer = _values(whole, drawn(model, layout, steps + MORE_STEPS, streams, seed=3))
    wider = _values(whole, drawn(model, layout, steps, streams + MORE_STREAMS, seed=4))
    tags = {}
    for name, value in first.items():
        tags[name] = _tag(value, other[name], longer[name], wider[name], (steps, streams))
    if any(tag.merged is not None for tag in tags.values()):
        x[:, 0] = drawn(model, layout, steps, 1, seed=5)[:, 0]  # of the first stream alone
        touched = _values(whole, x)
        tags = {name: _ordered(tag, touched[name]) for name, tag in tags.items()}
    return tags


def _ordered(tag: Tag, touched: Array) -> Tag:
    """With the order of its merged axis: the rows that changed are the first stream's."""
    if tag.merged is None or not tag.varies:
        return tag
    apart = (touched != tag.value).any(axis=tuple(axis for axis in range(tag.value.ndim) if axis != tag.merged))
    return replace(tag, by_time=bool(np.flatnonzero(apart)[-1:] > len(apart) // 2))


def _values(whole: Whole, x: Array) -> dict[str, Array]:
    given = whole.run(x)
    held = constants_of(whole.model.graph)
    return {
        name: np.asarray(value)
        for name, value in (held | whole.feeds(x) | given).items()
        if not isinstance(value, list)
    }


def _tag(value: Array, other: Array, longer: Array, wider: Array, sizes: tuple[int, int]) -> Tag:
    steps, streams = sizes
    varies = value.shape != other.shape or not np.array_equal(value, other, equal_nan=value.dtype.kind == "f")
    if value.ndim != longer.ndim or value.ndim != wider.ndim:
        return Tag(value.shape, value, varies, odd=True)
    time, batch, merged, offset, fewer, odd = None, None, None, 0, False, False
    for axis, size in enumerate(value.shape):
        by_time, by_batch = longer.shape[axis] - size, wider.shape[axis] - size
        if by_time and by_batch:
            odd = odd or merged is not None or size != steps * streams
            merged = axis
        elif by_time:
            fewer, odd = fewer or 0 < by_time < MORE_STEPS, odd or by_time > MORE_STEPS
            time, offset = axis, size - steps
        elif by_batch:
            odd = odd or by_batch != MORE_STREAMS or size != streams or batch is not None
            batch = axis
    counts = _counts(value, longer, steps)
    return Tag(value.shape, value, varies, time, offset, batch, merged, fewer=fewer, odd=odd, counts=counts)


def _counts(value: Array, longer: Array, steps: int) -> bool:
    """Whether a tensor is the number of timesteps."""
    if value.size != 1 or longer.size != 1 or value.dtype.kind != "i":
        return False
    return bool(value.reshape(()) == steps and longer.reshape(()) == steps + MORE_STEPS)
