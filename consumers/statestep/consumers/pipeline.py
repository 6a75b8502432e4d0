"""Records in; messages, tallies and each partition's next offset out. The one apply path, for live records and replayed.

No I/O and no clock: the engine is the only thing that changes, and only until its `commit` or `rollback`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from statestep.consumers.checkpoint import Progress
from statestep.consumers.codec import Decoder, Encoder, Observation, Refused
from statestep.consumers.ports import Message, Record
from statestep.runtime import NO_TIME, Advanced, Engine

GAP_PERIODS = 1.5  # a stream that was silent for longer has a gap
Policy = Literal["dead-letter", "skip", "fail"]


class BadMessage(RuntimeError):
    """A message that cannot be applied, under the policy `fail`."""


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
    waves: list[int] = field(default_factory=list)  # model runs, one entry a call of the engine
    rows: list[int] = field(default_factory=list)  # rows of each of these calls
    out_of_order: int = 0
    gaps: int = 0


@dataclass(slots=True)
class Batch:
    """The result of applying records."""

    messages: list[Message]  # in the order of their records within each partition
    progress: dict[int, Progress]
    tally: Tally
    # Per predicted row, for metrics and for the page of streams.
    slots: list[np.ndarray[Any, Any]] = field(default_factory=list)
    columns: dict[str, list[np.ndarray[Any, Any]]] = field(default_factory=dict)
    event_times: list[np.ndarray[Any, Any]] = field(default_factory=list)

    def column(self, name: str) -> np.ndarray[Any, Any]:
        """All live rows of an output role, one after the other."""
        return np.concatenate(self.columns.get(name) or [np.empty(0, np.float32)])


def stream_key(partition: int, key: bytes) -> bytes:
    """The engine's key: a stream is (partition, key), so the same key on two partitions is two streams."""
    return b"%d/%s" % (partition, key)


def split_key(stream: bytes) -> tuple[int, bytes]:
    """The inverse of `stream_key`.

    >>> split_key(stream_key(3, b"a/b"))
    (3, b'a/b')
    """
    partition, _, key = stream.partition(b"/")
    return int(partition), key


class Pipeline:
    """Decoding, advancing and encoding for one model; which policy refused records meet."""

    def __init__(
        self,
        engine: Engine,
        decoder: Decoder,
        encoder: Encoder,
        *,
        policy: Policy = "dead-letter",
        max_dead_letter_bytes: int = 900_000,
        keyed_by_field: bool = False,
    ):
        self.engine = engine
        self.decoder = decoder
        self.encoder = encoder
        self._policy = policy
        self._max_dead_letter_bytes = max_dead_letter_bytes
        self._keyed_by_field = keyed_by_field
        contract = engine.model.contract
        self._period_ns = None if contract.period_seconds is None else contract.period_seconds * 1e9
        self._roles = {output.name: output.role for output in contract.outputs if output.role}
        self._others = [output.name for output in contract.outputs if not output.role]

    def decode(self, records: Sequence[Record]) -> list[Observation | Refused | None]:
        """What each record is; None is a tombstone."""
        decode = self.decoder.decode
        return [None if r.value is None and not self._keyed_by_field else decode(r) for r in records]

    def apply(
        self,
        records: Sequence[Record],
        decoded: Sequence[Observation | Refused | None],
        progress: Mapping[int, Progress],
    ) -> Batch:
        """Advance the streams of `records`, in order.

        Records below their partition's `resume` are applied like all others; only their messages are suppressed.
        """
        batch = Batch([], dict(progress), Tally())
        run: list[Row] = []
        for record, what in zip(records, decoded, strict=True):
            if isinstance(what, Observation):
                run.append(Row(record, what))
            elif isinstance(what, Refused):
                self._refuse(batch, record, what)
            else:  # a tombstone ends its stream here: what came before it is applied first
                self._advance(batch, run)
                run = []
                self._end(batch, record)
        self._advance(batch, run)
        for record in records:
            batch.tally.consumed[record.partition] += 1
            batch.tally.bytes += len(record.value or b"")
            batch.progress[record.partition] = batch.progress[record.partition].advanced(record.offset)
        return batch

    def _advance(self, batch: Batch, run: list[Row]) -> None:
        """One call of the engine, for the rows between two tombstones."""
        if not run:
            return
        x, refused = self.decoder.matrix([row.observation for row in run])
        if any(refused):
            for row, why in zip(run, refused, strict=True):
                if why is not None:
                    self._refuse(batch, row.record, why)
            kept = [i for i, why in enumerate(refused) if why is None]
            run, x = [run[i] for i in kept], x[kept]
        keys = [stream_key(row.record.partition, row.observation.key) for row in run]
        times = np.fromiter((row.observation.time for row in run), np.int64, len(run))  # [N]
        out = self.engine.advance(keys, x, times)
        late, gap = self._judge_times(times, out)
        batch.tally.waves.append(out.waves)
        batch.tally.rows.append(len(run))
        self._emit(batch, run, out, late, gap)

    def _judge_times(
        self, times: np.ndarray[Any, Any], out: Advanced
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """bool [N] each: older than what its stream has seen; more than 1.5 periods after it."""
        known = (out.previous_time != NO_TIME) & (times != NO_TIME)
        late = known & (times < out.previous_time)
        if self._period_ns is None:
            return late, np.zeros(len(times), bool)
        ahead = known & ~late
        # float64 holds a difference of ns times exactly enough: 2^53 ns are 104 days, beyond that any gap is one.
        elapsed = np.where(ahead, times.astype(np.float64) - out.previous_time.astype(np.float64), 0.0)
        return late, elapsed > GAP_PERIODS * self._period_ns

    def _emit(
        self, batch: Batch, run: list[Row], out: Advanced, late: np.ndarray[Any, Any], gap: np.ndarray[Any, Any]
    ) -> None:
        """Messages for the rows that are live, and what the metrics want to know of them."""
        progress = batch.progress
        live = np.fromiter((row.record.offset >= progress[row.record.partition].resume for row in run), bool, len(run))
        batch.tally.replayed += len(run) - int(live.sum())
        if out.rejected.any():
            for i in np.flatnonzero(out.rejected).tolist():
                if live[i]:
                    self._refuse(batch, run[i].record, Refused("non-finite", "the model's result is not finite"))
            live &= ~out.rejected
        kept = np.flatnonzero(live)
        if not kept.size:
            return
        roles = {role: out[name][kept] for name, role in self._roles.items()}  # each [n, …]
        values = {role: array.tolist() for role, array in roles.items()}
        others = {name: out[name][kept].tolist() for name in self._others}
        steps = out.step[kept].tolist()
        late, gap = late[kept], gap[kept]
        odd = (late | gap).tolist()
        message = self.encoder.message
        for n, i in enumerate(kept.tolist()):
            flags = []
            if odd[n]:
                flags = ["out_of_order"] * bool(late[n]) + ["gap"] * bool(gap[n])
            row = {role: value[n] for role, value in values.items()}
            extra = {name: value[n] for name, value in others.items()} if others else msgspec.UNSET
            batch.messages.append(message(run[i].record, run[i].observation, steps[n], flags, row, extra))
        batch.tally.predicted += len(kept)
        batch.tally.out_of_order += int(late.sum())
        batch.tally.gaps += int(gap.sum())
        batch.slots.append(out.slots[kept])
        batch.event_times.append(np.fromiter((run[i].observation.time for i in kept.tolist()), np.int64, len(kept)))
        for role, array in roles.items():
            batch.columns.setdefault(role, []).append(array)

    def _end(self, batch: Batch, record: Record) -> None:
        """Forget the stream that a tombstone names, and pass the tombstone on."""
        if not record.key:
            self._refuse(batch, record, Refused("no-key", "the message has neither a key nor a value"))
            return
        self.engine.drop([stream_key(record.partition, record.key)])
        if record.offset < batch.progress[record.partition].resume:
            batch.tally.replayed += 1
            return
        batch.tally.tombstones += 1
        batch.messages.append(self.encoder.tombstone(record))

    def _refuse(self, batch: Batch, record: Record, why: Refused) -> None:
        if record.offset < batch.progress[record.partition].resume:
            batch.tally.replayed += 1
            return
        if self._policy == "fail":
            raise BadMessage(
                f"partition {record.partition}, offset {record.offset}: {why.sentence} ({why.reason}); "
                "--on-bad-message dead-letter would set it aside and go on"
            )
        batch.tally.refused[why.reason] += 1
        if self._policy == "dead-letter":
            batch.messages.append(self.encoder.dead_letter(record, why, self._max_dead_letter_bytes))
