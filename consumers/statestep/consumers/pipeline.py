"""Records in; messages, tallies and next offsets out: the one apply path, for live records and for replayed ones.

No I/O and no clock: the engine is the only thing that changes, and only until its `commit` or `rollback`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NoReturn

import msgspec
import numpy as np

from statestep.consumers.batch import Advance, Batch, Ending, Refusal, Row, Tally
from statestep.consumers.checkpoint import Progress
from statestep.consumers.codec import MAX_DEAD_LETTER_BYTES, Decoder, Encoder, Ended, Observation, Refused
from statestep.consumers.events import Phase, Told, level_of
from statestep.consumers.ports import Message, Record
from statestep.consumers.teller import STATUS, Teller, words
from statestep.consumers.times import from_ms
from statestep.runtime import NO_TIME, Advanced, Engine
from statestep.runtime.engine import OFFSET
from statestep.runtime.silence import GAP_PERIODS, elapsed_of

NOTHING: Mapping[tuple[int, int], int] = {}
UNDELIVERABLE = Refused("undeliverable", "no broker takes its output; its stream has advanced all the same")
UNTOLD = Refused("undeliverable", "no broker takes what tells that an event begins or ends with it")
PLAIN = ("prediction", "expected", "score", "threshold", "anomaly", "status")  # roles that every output has a place for
UNKNOWN = "unknown"  # the level or status that a model does not tell
COUNTED = ("score", "anomaly", "drift", "score_drift")  # roles that metrics are made of
Array = np.ndarray[Any, Any]
Policy = Literal["dead-letter", "skip", "fail"]
Decoded = Observation | Ended | Refused


class BadMessage(RuntimeError):
    """A message that cannot be applied, under the policy `fail`."""


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
        max_dead_letter_bytes: int = MAX_DEAD_LETTER_BYTES,
        events: bool = False,
    ):
        """With `events` the beginning and the end of each are answered by a message of their own, too."""
        self.engine = engine
        self.decoder = decoder
        self.encoder = encoder
        self._policy = policy
        self._max_dead_letter_bytes = max_dead_letter_bytes
        self._events = events
        contract = engine.model.contract
        self.teller = Teller(contract, encoder.topic)
        self._statuses = words(contract, "status", STATUS)
        self._features = contract.feature_names
        self._period_ns = None if contract.period_seconds is None else contract.period_seconds * 1e9
        self._plain = {output.name: output.role for output in contract.outputs if output.role in PLAIN}
        self._counted = {output.name: output.role for output in contract.outputs if output.role in COUNTED}
        self._forecast = [contract.feature_names.index(name) for name in encoder.features("expected")]  # columns of x
        self._others = [output.name for output in contract.outputs if not output.role]

    def decode(self, records: Sequence[Record]) -> list[Decoded]:
        """What each record is."""
        return [self.decoder.decode(record) for record in records]

    def advance(
        self,
        records: Sequence[Record],
        decoded: Sequence[Decoded],
        progress: Mapping[int, Progress],
    ) -> Batch:
        """Advance the streams of `records`, in order.

        Records below their partition's `next` are applied like all others; only their answers are suppressed.
        Raises `checkpoint.Stop` where the log is not what it was when they were applied before.
        """
        offsets: dict[int, list[int]] = {}
        for record in records:
            offsets.setdefault(record.partition, []).append(record.offset)
        batch = Batch([], progress, {p: progress[p].applied(found) for p, found in offsets.items()}, Tally())
        run: list[Row] = []
        for record, what in zip(records, decoded, strict=True):
            if isinstance(what, Observation):
                run.append(Row(record, what))
            elif isinstance(what, Refused):
                self._refuse(batch, record, what)
            else:  # a tombstone ends its stream here: what came before it is applied first
                self._advance(batch, run)
                run = []
                self._end(batch, record, what.key)
        self._advance(batch, run)
        batch.tally.consumed.update({partition: len(found) for partition, found in offsets.items()})
        batch.tally.bytes = sum(len(record.value or b"") for record in records)
        return batch

    def encode(self, batch: Batch, undeliverable: Mapping[tuple[int, int], int] = NOTHING) -> list[Message]:
        """The messages that answer a batch: outputs in the order of their records, then events, then dead letters.

        `undeliverable` names records, by partition and offset, whose answer no broker took, and how often. At 0 only
        what tells of an event's beginning or end is left out; then theirs is a dead letter, and at last a bare one.
        Their streams advance as if nothing were: a replay must decide alike.
        """
        messages: list[Message] = []
        told: list[Message] = []
        refusals: list[Refusal] = []
        for item in batch.work:
            if isinstance(item, Refusal):
                refusals.append(item)
                continue
            answers, notices = self._outputs(item) if isinstance(item, Advance) else self._endings(item)
            if undeliverable:
                refusals += self._leave_out(batch, item, undeliverable, answers, notices)
            messages += answers
            told += chain.from_iterable(notices.values())
        messages += told
        if self._policy == "dead-letter":
            # What a feature's value shows is found after what the JSON shows; offsets put them in order again.
            refusals.sort(key=lambda refusal: (refusal.record.partition, refusal.record.offset))
            messages += [self._dead_letter(refusal, undeliverable) for refusal in refusals]
        return messages

    def _leave_out(
        self,
        batch: Batch,
        item: Advance | Ending,
        undeliverable: Mapping[tuple[int, int], int],
        answers: list[Message],
        notices: dict[int, list[Message]],
    ) -> list[Refusal]:
        """Take out what no broker took of an item's answers; the records whose answer is a dead letter now."""
        records = [item.record] if isinstance(item, Ending) else [row.record for row in item.rows]
        found = {
            i: times for i, r in enumerate(records) if (times := undeliverable.get((r.partition, r.offset))) is not None
        }
        lost, untold = [i for i, times in found.items() if times], found.keys() & notices.keys()
        if self._policy == "fail" and (lost or untold):
            first = min([*lost, *untold])
            self._stop(records[first], UNDELIVERABLE if first in lost else UNTOLD)
        for i in untold:
            del notices[i]
        for i in reversed(lost):
            del answers[i]
        batch.tally.untold += len(untold)
        batch.tally.refused.update({UNDELIVERABLE.reason: len(lost)})
        batch.tally.tombstones -= len(lost) if isinstance(item, Ending) else 0
        batch.tally.predicted -= 0 if isinstance(item, Ending) else len(lost)
        return [Refusal(records[i], UNDELIVERABLE) for i in lost]

    def _dead_letter(self, refusal: Refusal, undeliverable: Mapping[tuple[int, int], int]) -> Message:
        """The dead letter of a record; bare where it was refused as it is."""
        record, why = refusal
        refused = undeliverable.get((record.partition, record.offset), 0)
        if refused > (why is UNDELIVERABLE):
            record = record._replace(headers=())
            return self.encoder.dead_letter(record, why, 0)
        return self.encoder.dead_letter(record, why, self._max_dead_letter_bytes)

    def _advance(self, batch: Batch, run: list[Row]) -> None:
        """One call of the engine, for the rows between two tombstones."""
        x, refused = self.decoder.matrix([row.observation for row in run])
        if any(refused):
            for row, why in zip(run, refused, strict=True):
                if why is not None:
                    self._refuse(batch, row.record, why)
            good = [i for i, why in enumerate(refused) if why is None]
            run, x = [run[i] for i in good], x[good]
        keys = [stream_key(row.record.partition, row.observation.key) for row in run]
        held = self._held(batch, [row.record for row in run], keys)  # [N]
        if held.any():
            batch.tally.replayed += int(held.sum())
            new = np.flatnonzero(~held).tolist()
            run, keys, x = [run[i] for i in new], [keys[i] for i in new], x[new]
        if not run:
            return
        times = np.fromiter((row.observation.time for row in run), np.int64, len(run))  # [N]
        offsets = np.fromiter((row.record.offset for row in run), np.int64, len(run))  # [N]
        out = self.engine.advance(keys, x, times, offsets)
        for i in np.flatnonzero(out.dirtied).tolist():
            batch.dirtied.setdefault(run[i].record.partition, []).append((run[i].record.offset, keys[i]))
        batch.tally.waves.append(out.waves)
        batch.tally.runs += out.runs
        batch.tally.rows.append(len(run))
        if (scores := out.role("score")) is not None:
            batch.scores.append((out.slots[~out.rejected], scores[~out.rejected]))
        if (counts := out.role("event")) is not None and (shares := out.role("contribution")) is not None:
            within = np.flatnonzero((counts != 0) & ~out.rejected)
            batch.loudest.append((out.slots[within], shares[within].argmax(axis=1)))
        answered = {partition: batch.before[partition].next for partition in batch.progress}
        live = np.fromiter((r.offset >= answered[r.partition] for r, _ in run), bool, len(run))  # [N]
        batch.tally.replayed += len(run) - int(live.sum())
        for i in np.flatnonzero(out.rejected & live).tolist():
            self._refuse(batch, run[i].record, Refused("non-finite", "the model's result is not finite"))
        kept = np.flatnonzero(live & ~out.rejected)  # [n]
        if kept.size:
            self._note(batch, [run[i] for i in kept.tolist()], x[kept], times, out, kept)

    def _held(self, batch: Batch, records: Sequence[Record], streams: Sequence[bytes]) -> Array:
        """bool [N]: replayed records that the state of their stream holds already, since it was written later."""
        replayed = np.fromiter((r.offset < batch.before[r.partition].next for r in records), bool, len(records))  # [N]
        if replayed.any():
            slots = self.engine.table.slots(streams)  # [N]
            offsets = np.fromiter((record.offset for record in records), np.int64, len(records))  # [N]
            replayed &= (slots >= 0) & (self.engine.table.column(OFFSET)[slots] >= offsets)
        return replayed

    def _note(self, batch: Batch, rows: list[Row], x: Array, times: Array, out: Advanced, kept: Array) -> None:
        """Keep what the answers and the metrics need of the rows that are live."""
        late, gap = self._judge_times(times[kept], out.previous_time[kept])
        absent, bridged, reset = np.isnan(x), out.bridged[kept], out.reset[kept]  # [n, F], [n], [n]
        flags = {"out_of_order": late, "gap": gap, "missing": np.logical_or.reduce(absent, axis=1)}
        batch.work.append(Advance(rows, out, kept, flags | {"bridged": bridged > 0, "reset": reset}))
        batch.tally.predicted += len(rows)
        batch.tally.out_of_order += int(late.sum())
        batch.tally.gaps += int(gap.sum())
        batch.tally.bridged += int(bridged.sum())
        batch.tally.reset += int(reset.sum())
        batch.event_times.append(times[kept])
        for name, role in self._counted.items():
            batch.columns.setdefault(role, []).append(out[name][kept])
        self._count(batch.tally, out, kept, absent)
        if (expected := out.role("expected")) is not None:
            later = ~out.first[kept]
            # In float64, since the difference of two float32 can overflow. A missing value has no error.
            errors = np.abs(x[later][:, self._forecast].astype(np.float64) - expected[kept][later])
            batch.abs_errors.append(errors[np.isfinite(errors)])

    def _judge_times(self, times: Array, previous: Array) -> tuple[Array, Array]:
        """bool [n] each: older than what its stream has seen; more than 1.5 periods after it."""
        known = (previous != NO_TIME) & (times != NO_TIME)
        late = known & (times < previous)
        if self._period_ns is None:
            return late, np.zeros(len(times), bool)
        return late, elapsed_of(previous, times) > GAP_PERIODS * self._period_ns

    def _count(self, tally: Tally, out: Advanced, kept: Array, absent: Array) -> None:
        """Readings that were missing, what the model says of itself, events that begin and end."""
        for column, missing in enumerate(absent.sum(axis=0).tolist()):
            if missing:
                tally.missing[self._features[column]] += missing
        if (status := out.role("status")) is not None:
            for number, rows in zip(*np.unique(status[kept], return_counts=True), strict=True):
                tally.statuses[self._status(int(number)) or UNKNOWN] += int(rows)
        if (counts := out.role("event")) is None:
            return
        tally.begun += int(np.count_nonzero(np.abs(counts[kept]) == 1))
        severity = out.role("severity")
        for place in kept[counts[kept] < 0].tolist():
            tally.ended[UNKNOWN if severity is None else level_of(float(severity[place]))] += 1

    def _status(self, number: int) -> str | None:
        return self._statuses[number] if 0 <= number < len(self._statuses) else None

    def _outputs(self, advance: Advance) -> tuple[list[Message], dict[int, list[Message]]]:
        """One message a row; and by place those that tell of an event's beginning or end."""
        out, kept = advance.out, advance.kept
        values = {role: out[name][kept].tolist() for name, role in self._plain.items()}
        if "status" in values:
            values["status"] = list(map(self._status, values["status"]))
        others = {name: out[name][kept].tolist() for name in self._others}
        steps, first = out.step[kept].tolist(), out.first[kept].tolist()
        told = self.teller.tell(advance.rows, out, kept)
        odd = np.logical_or.reduce(list(advance.flags.values())).tolist()
        messages, notices = [], dict[int, list[Message]]()
        for n, (record, observation) in enumerate(advance.rows):
            flags = [name for name, is_so in advance.flags.items() if is_so[n]] if odd[n] else []
            row = {role: value[n] for role, value in values.items()}
            if first[n]:
                row.pop("expected", None)
            extra = {name: value[n] for name, value in others.items()} if others else msgspec.UNSET
            messages.append(self.encoder.message(record, observation, steps[n], flags, row, extra, told.get(n)))
            if self._events and n in told and (found := self._notices(advance.rows[n], row, told[n])):
                notices[n] = found
        return messages, notices

    def _notices(self, row: Row, values: Mapping[str, Any], told: Told) -> list[Message]:
        """What tells that an event begins, or ends, or both, with a row."""
        (record, observation), event = row, told.event
        score, threshold = values.get("score"), values.get("threshold")
        begins: list[Phase] = ["begin"] if event.steps == 1 else []
        ends: list[Phase] = ["end"] if event.phase == "end" else []
        return [
            self.encoder.notice(
                record, observation.key, observation.time, told, phase=phase, score=score, threshold=threshold
            )
            for phase in begins + ends
        ]

    def _endings(self, ending: Ending) -> tuple[list[Message], dict[int, list[Message]]]:
        """The tombstone passed on, and what tells that the event ends in which its stream was."""
        record, event = ending
        messages = [self.encoder.tombstone(record)]
        if event is None or not self._events:
            return messages, {}
        told, time = Told(event, []), from_ms(record.timestamp_ms)
        return messages, {0: [self.encoder.notice(record, record.key or b"", time, told, phase="end", ended=True)]}

    def _end(self, batch: Batch, record: Record, key: bytes) -> None:
        """End the stream that a tombstone names, and pass the tombstone on."""
        stream = stream_key(record.partition, key)
        if self._held(batch, [record], [stream]).any():
            batch.tally.replayed += 1
            return
        event = None
        if self.teller.reads_records and stream in self.engine.table:
            event = self.teller.standing(record.partition, key, self.engine.read([stream]))
        if self.engine.end([stream], np.array([record.offset])).any():
            batch.dirtied.setdefault(record.partition, []).append((record.offset, stream))
        if self._suppressed(batch, record):
            return
        batch.tally.tombstones += 1
        if event is not None:
            batch.tally.ended[event.level or UNKNOWN] += 1
        batch.work.append(Ending(record, event))

    def _refuse(self, batch: Batch, record: Record, why: Refused) -> None:
        if self._suppressed(batch, record):
            return
        if self._policy == "fail":
            self._stop(record, why)
        batch.tally.refused[why.reason] += 1
        batch.work.append(Refusal(record, why))

    def _stop(self, record: Record, why: Refused) -> NoReturn:
        raise BadMessage(
            f"partition {record.partition}, offset {record.offset}: {why.sentence} ({why.reason}); "
            "--on-bad-message dead-letter would set it aside and go on"
        )

    def _suppressed(self, batch: Batch, record: Record) -> bool:
        """Whether a record was answered before; counted as replayed if so."""
        replayed = record.offset < batch.before[record.partition].next
        batch.tally.replayed += replayed
        return replayed
