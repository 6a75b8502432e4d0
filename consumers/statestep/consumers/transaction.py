"""Putting a transaction together: the answers, what is due of the dirty streams, and a marker for all that moves.

It reads the engine and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from statestep.consumers import checkpoint
from statestep.consumers.batch import Batch
from statestep.consumers.changelog import MARKER, STREAM, Marker, StateCodec, encode_marker
from statestep.consumers.checkpoint import Dirty, Pace, Progress
from statestep.consumers.expiry import Expiry
from statestep.consumers.pipeline import split_key
from statestep.consumers.ports import Change, Committed, Identity, Message, Record, StateRecord, Transaction
from statestep.runtime import Engine, Records


@dataclass(frozen=True, slots=True)
class Limits:
    """When a transaction is due, and how large it may be."""

    commit_interval_s: float = 0.1
    batch_records: int = 4096
    snapshot_interval_s: float = 10.0  # the age that `redo` is kept under; 0 writes every dirty stream each time
    snapshot_bytes: int = 4 << 20  # of states in one transaction, unless the interval is 0
    drain_s: float = 7.0  # for snapshots after the signal to stop
    batch_bytes: int = 16 << 20  # of the records' values

    def pace(self, state_bytes: int, *, at_once: bool, ending: bool, searching: bool, idle: bool) -> Pace:
        """How many states may go into a transaction, for each partition; `state_bytes` of one state of all of them.

        All that are dirty with `at_once`; when `ending` as many as fit; while a refused message is `searching` for,
        none beside messages.
        """
        interval_s = 0.0 if at_once else self.snapshot_interval_s
        if ending:
            interval_s = min(interval_s, 1e-6)
        records = max(self.snapshot_bytes // state_bytes, 1)
        if searching:
            records = 1 if idle else 0
        return Pace(interval_s, records)


@dataclass(slots=True)
class Turn:
    """One transaction with all that follows from it, once it counts."""

    records: list[Record]
    batch: Batch
    after: dict[int, Progress]  # of every partition that is running or opening
    transaction: Transaction
    written: dict[int, int] = field(default_factory=dict)  # how many of each partition's waiting streams it makes clean
    fresh: dict[int, int] = field(default_factory=dict)  # and how many of those that it makes dirty itself
    streams: list[bytes] = field(default_factory=list)  # the engine's keys of all these
    forgotten: list[bytes] = field(default_factory=list)  # streams that were silent for too long
    refused: bool = False  # a message was refused for what it is
    changes: list[Change] = field(default_factory=list)  # of the group, while the outcome is not known
    recovered: bool = False

    @property
    def moved(self) -> set[int]:
        """The partitions that came or went since then."""
        return {partition for change in self.changes for partition in change.partitions}


class Composer:
    """What it takes to write a partition's progress and its streams' states."""

    def __init__(
        self, engine: Engine, codec: StateCodec, writer: str, *, keeps_states: bool, semantics: str, model: str
    ):
        self._engine = engine
        self._codec = codec
        self._keeps_states = keeps_states
        self.expiry = Expiry(engine, keeps_states=keeps_states)
        self._semantics, self._model, self._writer = semantics, model, writer

    def compose(
        self,
        records: list[Record],
        batch: Batch,
        messages: Sequence[Message],
        *,
        running: Mapping[int, Progress],
        opening: Mapping[int, Progress],
        waiting: Mapping[int, Sequence[Dirty]],
        identity: Identity,
        elapsed_s: float,
        now_s: float,
        pace: Pace,
    ) -> Turn:
        """One transaction: of `running` partitions those that move or have states due, and all that are `opening`.

        `waiting` are the dirty streams by partition, the longest dirty first; `elapsed_s` is the time since the last
        transaction.
        """
        turn = Turn(records, batch, {**running, **opening, **batch.progress}, Transaction(messages, [], {}))
        states: list[StateRecord] = []
        offsets: dict[int, Committed] = {}
        self.expiry.look(now_s)
        for partition, progress in list(turn.after.items()):
            queue, dirtied = waiting[partition], batch.dirtied.get(partition, [])
            chosen = checkpoint.due(queue, len(dirtied), elapsed_s, now_s, pace) if self._keeps_states else 0
            moved = partition in opening or progress.next != running[partition].next
            unmarked = not (queue or dirtied) and progress.unmarked
            if not (moved or chosen or unmarked):
                continue
            first, second = min(chosen, len(queue)), max(chosen - len(queue), 0)
            streams = [queue[i].stream for i in range(first)] + [stream for _, stream in dirtied[:second]]
            left = [queue[first].first] if first < len(queue) else [offset for offset, _ in dirtied[second:][:1]]
            after = checkpoint.marked(progress, left[0] if left else progress.position)
            marker = checkpoint.marker(after, identity, self._semantics, self._model, self._writer)
            forgotten = self.expiry.take(partition, after.redo)
            if self._keeps_states:
                states += self._states(partition, streams, forgotten, marker)
            turn.after[partition], offsets[partition] = after, checkpoint.committed(marker)
            turn.written[partition], turn.fresh[partition] = first, second
            turn.streams += streams
            turn.forgotten += forgotten
        turn.transaction = Transaction(messages, states, offsets)
        return turn

    def _states(
        self, partition: int, streams: list[bytes], forgotten: list[bytes], marker: Marker
    ) -> list[StateRecord]:
        """The changelog records of `streams`, tombstones of those `forgotten`, and the partition's marker."""
        held = self._engine.read(streams)
        keys = [split_key(stream)[1] for stream in streams]
        alive = np.flatnonzero(held.step > 0)  # [n]
        gone = [keys[i] for i in np.flatnonzero(held.step == 0).tolist()] + [split_key(key)[1] for key in forgotten]
        picked = Records(
            [state[alive] for state in held.states], held.step[alive], held.time[alive], held.offset[alive]
        )
        records = self._codec.encode(partition, [keys[i] for i in alive.tolist()], picked, marker.epoch)
        ended = [StateRecord(partition, STREAM + key, None) for key in gone]
        return [*records, *ended, StateRecord(partition, MARKER, encode_marker(marker))]
