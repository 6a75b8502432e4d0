"""What became of the records of a batch: those that the engine advanced, those set aside, the streams that ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from statestep.consumers.checkpoint import Progress
from statestep.consumers.codec import Observation, Refused
from statestep.consumers.events import Event
from statestep.consumers.ports import Record
from statestep.runtime import Advanced

Array = np.ndarray[Any, Any]


class Row(NamedTuple):
    """A record that became an observation."""

    record: Record
    observation: Observation


@dataclass(slots=True)
class Tally:
    """What happened to the records of a batch: consumed = predicted + refused + tombstones + replayed."""

    consumed: Counter[int] = field(default_factory=Counter)  # by partition
    bytes: int = 0
    predicted: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by reason
    tombstones: int = 0
    replayed: int = 0
    waves: list[int] = field(default_factory=list)  # of each call of the engine
    runs: int = 0  # of the model
    rows: list[int] = field(default_factory=list)  # rows of each of these calls
    out_of_order: int = 0
    gaps: int = 0
    bridged: int = 0  # timesteps without readings
    reset: int = 0  # streams whose states began anew after a gap
    missing: Counter[str] = field(default_factory=Counter)  # readings that were stood in for, by feature
    statuses: Counter[str] = field(default_factory=Counter)  # rows, by what the model says of itself
    begun: int = 0  # events
    ended: Counter[str] = field(default_factory=Counter)  # events, by their level in the end
    untold: int = 0  # beginnings and ends of events that no broker took


@dataclass(frozen=True, slots=True)
class Advance:
    """One call of the engine: the rows that are to be answered, and what it gave for them."""

    rows: list[Row]  # n of them
    out: Advanced
    kept: Array  # int64 [n] their places in `out`
    flags: dict[str, Array]  # bool [n] each: what is unusual about a row


class Refusal(NamedTuple):
    """A record that is set aside."""

    record: Record
    why: Refused


class Ending(NamedTuple):
    """A tombstone: its stream is forgotten, and with it the event that it was in."""

    record: Record
    event: Event | None


@dataclass(slots=True)
class Batch:
    """The result of applying records, not yet encoded."""

    work: list[Advance | Refusal | Ending]  # what is to be answered, in order
    before: Mapping[int, Progress]
    progress: dict[int, Progress]  # of the partitions that records came from, after them
    tally: Tally
    # By partition the streams that were clean and are dirty now, with the offset that made them so, rising.
    dirtied: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)
    # For metrics and for the page of streams: an array for each call of the engine.
    scores: list[tuple[Array, Array]] = field(default_factory=list)  # (slots, scores) of what was applied, replays too
    loudest: list[tuple[Array, Array]] = field(default_factory=list)  # likewise (slots, columns of `contribution`)
    columns: dict[str, list[Array]] = field(default_factory=dict)  # by role
    event_times: list[Array] = field(default_factory=list)
    abs_errors: list[Array] = field(default_factory=list)

    def column(self, role: str) -> Array:
        """All answered rows of an output, one after the other."""
        return np.concatenate(self.columns.get(role) or [np.empty(0, np.float32)])

    @property
    def errors(self) -> Array:
        """|seen − expected| of every forecast feature of every answered row that had a forecast."""
        return np.concatenate(self.abs_errors or [np.empty(0)])
