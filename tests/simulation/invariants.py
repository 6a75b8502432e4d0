"""What must hold after every simulated commit, and at the end: nothing of it asks the service.

A commit is looked at in the instant in which the coordinator decides it, for from then on it counts. The changelog is
mirrored here as its committed records come, latest by key; `Watch` works out from it and the input what a restore at
that instant would rebuild. As replaying the whole input each time would cost too much, each stream is judged by what
comes to the same: its record is what the stream was at the record's offset, and no message of the stream lies between
that and `redo`. On a sample of the commits the streams are rebuilt in full, to hold that shortcut to account.

What fails is kept in `failures`, not raised: a request's effect may happen where nobody would hear of it.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_left
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from kafka.structs import OffsetAndMetadata, TopicPartition

from statestep.consumers.changelog import MARKER, Marker, decode_marker
from statestep.runtime import NO_TIME

from .cluster import Cluster, Transaction
from .feed import TOPIC, Answer, Feed, Remembered, Told, applied, judged
from .groups import Group
from .log import Entry
from .world import World

APP = "app"
OUTPUT, DEAD, EVENTS, CHANGELOG = "out", "dead", "events", f"{APP}-state-changelog"
ANSWERS = (OUTPUT, DEAD, EVENTS)
# magic, format, layout, epoch, offset, step, time, h, length, began, checksum
RECORD = struct.Struct("<3sB8sIqqqqqqI")
SAMPLE = 0.05  # of commits after which all streams are rebuilt in full


class Durable:
    """What is committed of one partition."""

    def __init__(self) -> None:
        self.marker: Marker | None = None
        self.states: dict[bytes, bytes] = {}  # the changelog's records, latest by key
        # At-least-once: by topic the offsets whose answer has been seen.
        self.answered: dict[str, set[int]] = {topic: set() for topic in ANSWERS}
        self.scanned = dict.fromkeys(ANSWERS, 0)


class Watch:
    """Looks at every commit of a cluster, and at who commits."""

    def __init__(self, world: World, cluster: Cluster, feed: Feed, partitions: int, exactly_once: bool):
        self.failures: list[str] = []
        self.commits = self.rebuilt = self.restores = 0
        self.durable = [Durable() for _ in range(partitions)]
        self.on_commit: Callable[[Transaction], object] = lambda transaction: None
        self._world, self._cluster, self._feed, self._exactly_once = world, cluster, feed, exactly_once
        self._owned: dict[str, tuple[int, frozenset[int]]] = {}  # by member: generation and partitions
        self._looking = False
        self._watch_coordinator()
        self._watch_group(cluster.group(APP))

    def expect(self, true: bool, what: str, *values: object) -> bool:
        """Keep a failure unless it holds."""
        if not true:
            said = f"{self._world.now:.3f} {what}"
            self.failures.append(f"{said}: {' '.join(map(repr, values))}" if values else said)
        return true

    # Who commits

    def _watch_coordinator(self) -> None:
        end = self._cluster._end

        def watched(transaction: Transaction, commit: bool) -> None:
            if commit:
                self._look(transaction)
            end(transaction, commit)

        self._cluster._end = watched  # type: ignore[method-assign]

    def _watch_group(self, group: Group) -> None:
        sync, commit = group.sync, group.commit_in_transaction

        def watched_sync(member_id: str, *rest: Any) -> None:
            sync(member_id, *rest)
            if group.state == "Stable":
                for member in group.members.values():
                    given = member.assignment.partitions() if member.assignment is not None else ()
                    self._owned[member.member_id] = group.generation, frozenset(tp.partition for tp in given)

        def watched_commit(
            producer_id: int, member_id: str, instance: str | None, generation: int, offsets: Mapping[Any, Any]
        ) -> None:
            commit(producer_id, member_id, instance, generation, offsets)
            last, owned = self._owned.get(member_id, (-1, frozenset()))
            theirs = {tp.partition for tp in offsets}
            self.expect(last == generation, "offsets of a member without an assignment", member_id, last, generation)
            self.expect(theirs <= owned, "offsets of partitions that are not the member's", member_id, theirs, owned)

        group.sync = watched_sync  # type: ignore[method-assign,assignment]
        group.commit_in_transaction = watched_commit  # type: ignore[method-assign]

    # Commits

    def _look(self, transaction: Transaction) -> None:
        self.commits += 1
        written: dict[str, dict[int, list[Entry]]] = {topic: {} for topic in (*ANSWERS, CHANGELOG)}
        for tp, log in transaction.partitions.items():
            written[tp.topic][tp.partition] = log.open.get(transaction.producer_id, [])
        pending = [g.pending.get(transaction.producer_id, {}) for g in transaction.groups.values()]
        offsets = {tp.partition: told for group in pending for tp, told in group.items()}
        self.expect(
            offsets.keys() == written[CHANGELOG].keys(), "markers and offsets differ", offsets, written[CHANGELOG]
        )
        for topic in ANSWERS:
            self.expect(written[topic].keys() <= offsets.keys(), "answers without an offset", topic, written[topic])
        for partition, told in offsets.items():
            records = written[CHANGELOG].get(partition, [])
            self._look_at(partition, told, records, written)
        self.on_commit(transaction)

    def _look_at(
        self,
        partition: int,
        told: OffsetAndMetadata,
        records: list[Entry],
        written: Mapping[str, Mapping[int, list[Entry]]],
    ) -> None:
        """One partition of a transaction."""
        durable, where = self.durable[partition], f"partition {partition}"
        keys = [record.key for record in records]
        if not self.expect(keys.count(MARKER) == 1 and keys[-1] == MARKER, f"{where}: no marker at the end", keys):
            return
        assert records[-1].value is not None
        before, marker = durable.marker, decode_marker(records[-1].value)
        self._check_marker(where, before, marker, told, self._feed.records[partition])
        durable.marker = marker
        for record in records[:-1]:
            assert record.key is not None
            if record.value is None:
                durable.states.pop(record.key, None)
            else:
                durable.states[record.key] = record.value
        first = marker.next if before is None else before.next
        if self._exactly_once:
            self._check_answers(partition, first, marker.next, written)
        else:
            self._check_seen(partition, first, marker.next)
        self._check_states(partition)
        if self._world.random.random() < SAMPLE:
            self.rebuild(partition, durable.states)

    def _check_marker(
        self, where: str, before: Marker | None, marker: Marker, told: OffsetAndMetadata, records: list[int]
    ) -> None:
        """Invariant 4."""
        expect = self.expect
        expect(told.offset == marker.next, f"{where}: the offset is not the marker's", told, marker)
        expect(
            told.metadata == f"{marker.sequence} {marker.writer}", f"{where}: not the marker's metadata", told, marker
        )
        if before is None:
            expect(marker.sequence == 0, f"{where}: the first sequence", marker)
        else:
            expect(marker.sequence == before.sequence + 1, f"{where}: a sequence was left out", before, marker)
            expect(marker.redo >= before.redo and marker.next >= before.next, f"{where}: it falls", before, marker)
            expect(marker.epoch == before.epoch, f"{where}: another epoch", before, marker)
        count = bisect_left(records, marker.next) - bisect_left(records, marker.redo)
        expect(marker.records == count, f"{where}: not the records from redo to next: {count}", marker)

    def _check_answers(
        self, partition: int, first: int, end: int, written: Mapping[str, Mapping[int, list[Entry]]]
    ) -> None:
        """Invariants 2 and 3: each record from `first` to `end` is answered once, in order, and nothing else is."""
        for topic in ANSWERS:
            wanted = self._owed(topic, partition, first, end)
            entries = written[topic].get(partition, [])
            found = [self.judge(topic, partition, entry) for entry in entries]
            self.expect(
                found == wanted, f"partition {partition}: answers in {topic} from {first} to {end}", found, wanted
            )

    def _check_seen(self, partition: int, first: int, end: int) -> None:
        """The same of at-least-once: each has been answered by now, perhaps more than once, and always alike."""
        durable = self.durable[partition]
        for topic in ANSWERS:
            log = self._cluster.partition((topic, partition))
            entries, durable.scanned[topic] = log.fetch(durable.scanned[topic], len(log.entries) + 1, committed=True)
            durable.answered[topic] |= {self.judge(topic, partition, entry) for entry in entries}
            lost = set(self._owed(topic, partition, first, end)) - durable.answered[topic]
            self.expect(not lost, f"partition {partition}: not answered in {topic} from {first} to {end}", lost)

    def _owed(self, topic: str, partition: int, first: int, end: int) -> list[int]:
        """The records from `first` to `end` that must have an answer in a topic."""
        answers, visible = self._feed.answers[partition], self._visible(partition, first, end)
        if topic == EVENTS:  # what no broker took of an answer, it may not have taken of the event
            return [offset for offset in visible if answers[offset].notice and answers[offset].kind != "dead"]
        return [offset for offset in visible if (answers[offset].kind == "dead") == (topic == DEAD)]

    def _visible(self, partition: int, first: int, end: int) -> list[int]:
        records = self._feed.records[partition]
        return records[bisect_left(records, first) : bisect_left(records, end)]

    def judge(self, topic: str, partition: int, entry: Entry) -> int:
        """Which record an entry answers; a failure unless it says what it must."""
        headers = {name: value.decode() for name, value in entry.headers if name != "note"}
        prefix = "__streams.errors." if topic == DEAD else "statestep.source."
        offset = int(headers.get(prefix + "offset", -1))
        wanted = self._feed.answers[partition].get(offset)
        if self.expect(wanted is not None, f"partition {partition}: an answer in {topic} to nothing", offset):
            assert wanted is not None
            if topic == EVENTS:
                wanted = Answer("event", wanted.key, None, event=wanted.notice)
            elif wanted.kind != "output":
                wanted = wanted._replace(event=None)
            wanted = wanted._replace(value=wanted.value if topic == DEAD else None)
            found = told(topic, entry, headers)
            self.expect(found == wanted, f"partition {partition}, offset {offset}: the answer", found, wanted)
            self.expect(headers.get(prefix + "partition") == str(partition), f"offset {offset}: its partition", headers)
        return offset

    # States

    def _check_states(self, partition: int) -> None:
        """Invariant 1, by the shortcut, for every stream."""
        durable = self.durable[partition]
        marker = durable.marker
        assert marker is not None
        streams = self._feed.streams[partition]
        found = {key[1:]: state for key, value in durable.states.items() if (state := read(value, marker.epoch))}
        for key in found.keys() - streams.keys():
            self.expect(False, f"partition {partition}: a state of a stream that never was", key)
        for key, history in streams.items():
            state = found.get(key)
            if state is None:
                last = history.before(marker.redo)
                good = last is None or None in history.between(marker.redo, marker.next)
                good = good or (last is not None and self._feed.forgettable(partition, last, marker.next))
            else:
                # A stream that a replay begins anew, because it ended later and left no record, may be written on the
                # way with what it never held: the replay from there ends it as well.
                ends = None in history.between(state.offset + 1, marker.next)
                good = (ends or state == history.before(state.offset + 1)) and state.offset < marker.next
                good = good and not history.between(state.offset + 1, marker.redo)
            self.expect(good, f"partition {partition}: a restore would get {key!r} wrong", state, marker)

    def rebuild(self, partition: int, states: Mapping[bytes, bytes]) -> None:
        """Invariant 1, in full: states, then the input from `redo` to `next` in plain loops."""
        self.rebuilt += 1
        marker = self.durable[partition].marker
        assert marker is not None
        found: dict[bytes, Remembered | None] = {
            key[1:]: state for key, value in states.items() if (state := read(value, marker.epoch))
        }
        for offset in self._visible(partition, marker.redo, marker.next):
            answer = self._feed.answers[partition][offset]
            key, before = answer.key, found.get(answer.key or b"")
            if before is not None and before.offset >= offset:
                continue
            if answer.value is None:
                found.pop(key or b"", None)
                continue
            reason, v, time = judged(key, answer.value)
            if not reason and answer.reason != "non-finite":
                found[key or b""], *_ = applied(before, offset, v, time, self._feed.silent)
        wanted = {key: history.before(marker.next) for key, history in self._feed.streams[partition].items()}
        wanted = {
            key: state
            for key, state in wanted.items()
            if state is not None and (key in found or not self._feed.forgettable(partition, state, marker.next))
        }
        self.expect(found == wanted, f"partition {partition}: rebuilt in full", found, wanted, marker)

    # At the end

    def look_at_logs(self) -> None:
        """All once more, from what readers of committed records see in the topics and in the group."""
        for partition, durable in enumerate(self.durable):
            marker = durable.marker
            if not self.expect(marker is not None, f"partition {partition} was never begun"):
                continue
            assert marker is not None
            latest = {entry.key: entry.value for entry in self._cluster.read(CHANGELOG, partition)}
            states = {key: value for key, value in latest.items() if key not in (None, MARKER) and value is not None}
            self.expect(latest.get(MARKER) is not None, f"partition {partition}: no marker is left")
            valid = {key: value for key, value in states.items() if read(value, marker.epoch) is not None}
            self.expect(valid == durable.states, f"partition {partition}: the changelog is not what was committed")
            self.rebuild(partition, {key: value for key, value in states.items() if key is not None})
            told = self._cluster.group(APP).offsets.get(TopicPartition(TOPIC, partition))
            self.expect(told is not None and told.offset == marker.next, "the group's offset", told, marker)
            if self._exactly_once:
                entries = {topic: {partition: self._cluster.read(topic, partition)} for topic in ANSWERS}
                self._check_answers(partition, 0, marker.next, entries)
            else:
                self._check_seen(partition, 0, marker.next)

    def unanswered(self) -> int:
        """How many records of the input are still to be answered."""
        return sum(
            len(records) - bisect_left(records, 0 if durable.marker is None else durable.marker.next)
            for records, durable in zip(self._feed.records, self.durable, strict=True)
        )

    def dirty(self) -> list[int]:
        """The partitions of which a restore would still replay something."""
        return [p for p, d in enumerate(self.durable) if d.marker is None or d.marker.redo < d.marker.next]


def read(value: bytes, epoch: int) -> Remembered | None:
    """What a state record holds, if it is one of the epoch."""
    if len(value) != RECORD.size:
        return None
    _, _, _, theirs, *held, _ = RECORD.unpack(value)
    return Remembered(*held) if theirs == epoch else None


def told(topic: str, entry: Entry, headers: Mapping[str, str]) -> Answer:
    """What an entry of an output topic says, in the words of the reference."""
    if topic == DEAD:
        return Answer("dead", entry.key, entry.value, headers["__streams.errors.exception"])
    if entry.value is None:
        return Answer("tombstone", entry.key, None)
    found = json.loads(entry.value)
    key = entry.key if found["stream"].encode() == entry.key else b"not the one in the value"
    event = found if topic == EVENTS else found.get("event")
    if event is not None:
        since = NO_TIME if event["since"] is None else round(datetime.fromisoformat(event["since"]).timestamp() * 1000)
        event = Told(event["id"], event["phase"], event["steps"], since if since == NO_TIME else since * 1_000_000)
    if topic == EVENTS:
        return Answer("event", key, None, event=event)
    return Answer("output", key, None, "", found["step"], found["prediction"]["v"], tuple(found["flags"]), event)
