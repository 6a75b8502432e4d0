"""Durable states as things to look at: what is held of a partition, and the rows of lists. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from statestep.consumers.changelog import MARKER, STREAM, Marker, look
from statestep.consumers.checkpoint import Stop
from statestep.consumers.codec import text
from statestep.consumers.ports import Committed, StateRecord
from statestep.runtime import NO_TIME


@dataclass(slots=True)
class Held:
    """What is durable of a partition."""

    partition: int
    marker: Marker | None
    committed: Committed | None
    end: int | None  # offset of the input's next message, None if nobody knows
    moving: bool = False  # whether something was committed while it was read
    streams: dict[bytes, StateRecord] = field(default_factory=dict)  # by key; those of the marker's epoch
    epochs: int = -1  # the highest state epoch of any record


def hold(
    partition: int, values: Mapping[bytes, StateRecord], marker: Marker | None, committed: Committed | None
) -> Held:
    """A partition, from its latest changelog records by key. Raises `Corrupt`."""
    held = Held(partition, marker, committed, None)
    for key, record in values.items():
        if record.value is not None and key != MARKER:
            epoch = look(record).epoch
            held.epochs = max(held.epochs, epoch)
            if marker is not None and epoch == marker.epoch:
                held.streams[key[len(STREAM) :]] = record
    return held


class PartitionRow(NamedTuple):
    """A partition in a list."""

    partition: int
    sequence: int | None  # None, here and below: it has no marker
    redo: int | None
    next: int | None
    unwritten: int | None  # messages from redo to next, whose states a restart would make again
    behind: int | None  # messages from redo to the end of the input
    epoch: int | None
    streams: int
    model: str | None
    committed: int | None


class StreamRow(NamedTuple):
    """A stream in a list."""

    stream: str
    partition: int
    step: int
    offset: int
    time: int | None  # ns since the epoch
    age_s: float | None  # since that time
    bytes: int
    layout: str


def partition_row(held: Held) -> PartitionRow:
    """What a list says of a partition."""
    at, seen = None if held.committed is None else held.committed.offset, held.marker
    if seen is None:
        return PartitionRow(held.partition, None, None, None, None, None, None, 0, None, at)
    behind = None if held.end is None else max(held.end - seen.redo, 0)
    place = (held.partition, seen.sequence, seen.redo, seen.next, seen.next - seen.redo, behind)
    return PartitionRow(*place, seen.epoch, len(held.streams), seen.model, at)


def stream_row(record: StateRecord, now_ns: int) -> StreamRow:
    """What a list says of a stream. Raises `Corrupt`."""
    head = look(record)
    time = None if head.time == NO_TIME else head.time
    age_s = None if time is None else (now_ns - time) / 1e9
    name = text(record.key[len(STREAM) :])
    return StreamRow(name, record.partition, head.step, head.offset, time, age_s, head.size, head.layout)


def stalest(holds: Iterable[Held], count: int, now_ns: int) -> list[StreamRow]:
    """The `count` streams whose event time is the oldest, the oldest first; those without a time come last."""
    rows = [stream_row(record, now_ns) for held in holds for record in held.streams.values()]
    rows.sort(key=lambda row: (row.time is None, row.time, row.partition, row.stream))
    return rows[:count]


def find(holds: Iterable[Held], stream: str) -> list[tuple[Held, bytes]]:
    """Where a stream lives, by its name for people. Raises `Stop` where nobody knows it."""
    found = [
        (held, key)
        for held in holds
        for key in held.streams
        if key == stream.encode("utf-8", "surrogatepass") or text(key) == stream
    ]
    if not found:
        raise Stop(f"no state of the stream {stream!r} is kept here; `statestep state ls --streams 100` lists what is")
    return found
