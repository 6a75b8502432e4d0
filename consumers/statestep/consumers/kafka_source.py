"""Kafka as a source, through kafka-python: a member of the application's group on one input topic.

What is known of kafka-python 3.0.12 and kept in mind here:
- a join of the group can complete on the client's I/O thread at any time, also between two polls, and the listeners
  run only where partitions moved: so it is the assignor, which hears of every join, that marks what came of it;
- a join that completes while nobody is in `poll` is thrown away, and the whole group is asked to join again; members
  that are busy could do so for ever, so `poll` does not return before a join has completed, or a while has passed;
- nothing on the I/O thread may block: it marks, and it pauses what came;
- a deserializer that raises makes `poll` spin for ever: bytes are taken as they are;
- a partition without a position makes `poll` raise before anyone can seek: it gets one as soon as it comes;
- after membership was lost `group_metadata` names no member, and the broker refuses nothing to nobody: such a
  membership is not handed on;
- a static member whose place was taken hears so by a heartbeat, and keeps it to itself;
- a member that is expelled while it joins hears of no loss: it joins again under another name, and goes on with what it
  is given as if nobody else had had it meanwhile;
- a question for offsets goes to a leader that has moved away again and again, until the metadata is old enough to be
  fetched anew: after five minutes, if nobody says otherwise.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from kafka import TopicPartition
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import FencedInstanceIdError, KafkaError, OffsetOutOfRangeError
from kafka.structs import MemberState

from statestep.consumers.kafka_client import FORBIDDEN, REAL, REQUEST_MS, Clients, Properties, connect, fail
from statestep.consumers.kafka_place import LOOK_S, StaticPlace
from statestep.consumers.kafka_topics import identify
from statestep.consumers.ports import Change, Committed, Fenced, Headers, Identity, Polled, Record

log = logging.getLogger("statestep")

SESSION_TIMEOUT_MS = 10_000
MAX_POLL_INTERVAL_MS = 60_000
STABLE_MS = 5_000  # how long an offset whose transaction is still being decided is waited for
CLOSE_MS = 3_000
METADATA_MS = 3_000  # how long it may be unnoticed that a leader has moved; well below `REQUEST_MS`
WARNING_S = 30.0  # at most one warning in so long while the broker is away
BACKOFF_S = 0.1
JOIN_SLICE_MS = 100
JOIN_SLICES = 40  # together longer than the others need to hear, by a heartbeat, that they have to join again

Kind = Literal["assigned", "revoked", "lost"]


class Mark(NamedTuple):
    """What happened to the assignment, in the order in which it did."""

    kind: Literal["joined", "lost", "overtaken"]
    partitions: tuple[int, ...]  # joined: all that are owned from now on; else: those that are concerned
    generation: int = -1


class KafkaSource:
    """A member of the application's group on one input topic; a static one where it has an `instance_id`."""

    def __init__(
        self,
        topic: str,
        app_id: str,
        properties: Properties,
        partitions: int,
        *,
        instance_id: str | None = None,
        session_timeout_ms: int = SESSION_TIMEOUT_MS,
        max_poll_interval_ms: int = MAX_POLL_INTERVAL_MS,
        look_s: float = LOOK_S,
        clients: Clients = REAL,
    ):
        self._topic, self._app_id, self._properties, self._partitions = topic, app_id, properties, partitions
        self._instance_id = instance_id
        self._place = StaticPlace(topic, app_id, instance_id, properties, partitions, clients, look_s)
        self._clients = clients
        self._marks: deque[Mark] = deque()
        self._owned: frozenset[int] = frozenset()
        self._running: set[int] = set()  # partitions that were sought to, and so may give records
        self._generation = -1  # of the last join that was taken notice of
        self._quiet_until = -float("inf")
        session_timeout_ms = properties.get("session_timeout_ms", session_timeout_ms)
        assignor = _Assignor(self._marks, static=instance_id is not None)
        self._consumer = connect(
            clients.consumer,
            properties,
            client_id=app_id,
            group_id=app_id,
            group_instance_id=instance_id,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            metadata_max_age_ms=METADATA_MS,
            allow_auto_create_topics=False,
            partition_assignment_strategy=(assignor,),
            session_timeout_ms=session_timeout_ms,
            heartbeat_interval_ms=min(3_000, session_timeout_ms // 4),
            max_poll_interval_ms=max_poll_interval_ms,
        )
        assignor.consumer = self._consumer
        self._consumer.subscribe([topic], listener=_Listener(self._marks, assignor))
        try:
            self._consumer.topics()  # a leader that learns of partitions after it has joined begins a join that is lost
        except KafkaError as error:
            fail(f"looking for {topic!r}", error)

    @property
    def topic(self) -> str:
        """The topic's name."""
        return self._topic

    @property
    def partitions(self) -> int:
        """How many partitions the topic had when the service started."""
        return self._partitions

    def identity(self) -> Identity:
        """Asks the broker; raises `BrokerError`."""
        return identify(self._properties, self._app_id, self._topic, self._clients)

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        """One poll of the client, then what was marked, then whether the membership is that of the last mark.

        A broker that is away is waited for. Raises `BrokerError` where it refuses, and `Fenced`.
        """
        began = self._clients.clock()
        found: Mapping[Any, Sequence[Any]] = {}
        try:
            found = self._consumer.poll(timeout_ms=round(timeout_s * 1000), max_records=max(max_records, 1))
            for _ in range(JOIN_SLICES):
                if found or not self._joining():
                    break
                found = self._consumer.poll(timeout_ms=JOIN_SLICE_MS, max_records=max(max_records, 1))
        except OffsetOutOfRangeError as error:
            self._overtaken(error)
        except KafkaError as error:
            self._bear(error, timeout_s - (self._clients.clock() - began))
        membership = self._consumer.group_metadata()
        changes = self._drain()
        records = [
            Record(r.partition, r.offset, r.timestamp, r.key, r.value, _headers(r.headers))
            for tp, batch in found.items()
            if tp.partition in self._running
            for r in batch
        ]
        holds = self._holds(membership) and not self._place.look()
        return Polled(changes, records, membership if holds else None)

    def committed(self, partition: int) -> Committed | None:
        """What the group committed last, or None.

        Where a transaction over it is still open or being decided, its end is waited for; that may take longer than
        it is waited for here, up to the transaction timeout: then `BrokerError`, and the next try may find it.
        """
        return stable_offset(self._consumer, self._topic, partition)

    def bounds(self, partition: int) -> tuple[int, int]:
        """The low watermark, and the end as a reader of committed records sees it."""
        tp = TopicPartition(self._topic, partition)
        try:
            low = self._consumer.beginning_offsets([tp], timeout_ms=REQUEST_MS)[tp]
            return low, self._consumer.end_offsets([tp], timeout_ms=REQUEST_MS)[tp]
        except KafkaError as error:
            fail(f"asking for the offsets of {self._topic!r} partition {partition}", error)

    def offset_at(self, partition: int, time_ms: int) -> int:
        """The offset of the first record made at `time_ms` or later; the end if there is none."""
        tp = TopicPartition(self._topic, partition)
        try:
            found = self._consumer.offsets_for_times({tp: time_ms}, timeout_ms=REQUEST_MS)[tp]
        except KafkaError as error:
            fail(f"asking for the offset of a time in {self._topic!r} partition {partition}", error)
        return self.bounds(partition)[1] if found is None or found.offset < 0 else int(found.offset)

    def seek(self, partition: int, offset: int) -> None:
        """Go on reading at `offset`."""
        tp = TopicPartition(self._topic, partition)
        if tp not in self._consumer.assignment():
            return  # taken away since the poll that brought it; the next one tells
        self._consumer.seek(tp, offset)
        self._consumer.resume(tp)
        self._running.add(partition)

    def pause(self, partition: int) -> None:
        """Give nothing more of a partition before the next seek."""
        self._running.discard(partition)
        tp = TopicPartition(self._topic, partition)
        if tp in self._consumer.assignment():
            self._consumer.pause(tp)

    def high_watermarks(self) -> Mapping[int, int]:
        """What the last fetches told, without asking."""
        owned = self._running & {tp.partition for tp in self._consumer.assignment()}
        known = {p: self._consumer.highwater(TopicPartition(self._topic, p)) for p in owned}
        return {partition: offset for partition, offset in known.items() if offset is not None}

    @property
    def exhausted(self) -> bool:
        """Never: a topic has no end."""
        return False

    def close(self) -> None:
        """Leave the group, so that the others need not wait for a timeout; a static member keeps its place."""
        self._consumer.close(autocommit=False, timeout_ms=CLOSE_MS)

    def _drain(self) -> list[Change]:
        """Turn the marks into changes. More may come while it does: the membership is judged after it."""
        changes: list[Change] = []

        def tell(kind: Kind, partitions: frozenset[int], always: bool = False) -> None:
            self._running -= partitions
            if partitions or always:
                changes.append(Change(kind, tuple(sorted(partitions))))

        while self._marks:
            mark = self._marks.popleft()
            partitions = frozenset(mark.partitions)
            if mark.kind == "joined":
                tell("revoked", self._owned - partitions)
                # An empty assignment is told too, once: it says that the group was joined.
                tell("assigned", partitions - self._owned, always=self._generation < 0)
                self._owned, self._generation = partitions, mark.generation
                self._place.joined()
            elif mark.kind == "lost":
                tell("lost", self._owned & partitions)
                self._owned, self._generation = self._owned - partitions, -1
            else:
                tell("lost", self._owned & partitions)
                tell("assigned", self._owned & partitions)
        return changes

    def _joining(self) -> bool:
        return bool(self._consumer.group_metadata().state == MemberState.REBALANCING)

    def _holds(self, membership: Any) -> bool:
        """Whether a commit with this membership is one for the partitions that the service knows of."""
        if self._instance_id is not None and self._silently_fenced():
            raise Fenced(f"another process has joined the group with the instance id {self._instance_id!r}")
        generation: int = membership.generation_id
        stable = bool(membership.state == MemberState.STABLE)
        known = generation >= 0 and generation == self._generation and not self._marks
        return stable and known and not self._silent()

    def _silent(self) -> bool:
        """Whether the group's coordinator has not answered for a session: our place may have gone to others."""
        heartbeat = getattr(getattr(self._consumer, "_coordinator", None), "heartbeat", None)
        return heartbeat is not None and bool(heartbeat.session_timeout_expired())

    def _silently_fenced(self) -> bool:
        """Whether a heartbeat heard that another member has this one's instance id.

        kafka-python logs it, stops its heartbeats, and polls on as if nothing were. Stopped while the group is stable
        and no join is due, they are at no other time.
        """
        coordinator = getattr(self._consumer, "_coordinator", None)
        if coordinator is None:
            return False
        return not coordinator._heartbeat_enabled and coordinator.stable() and not coordinator.need_rejoin()

    def _bear(self, error: KafkaError, left_s: float) -> None:
        """Take an error of a poll as silence where the broker may come back, and raise where it will not help."""
        if isinstance(error, FencedInstanceIdError):
            raise Fenced(f"another process has joined the group with the instance id {self._instance_id!r}") from None
        if isinstance(error, FORBIDDEN) or not getattr(error, "retriable", False):
            fail(f"reading {self._topic!r}", error)
        if self._clients.clock() >= self._quiet_until:
            log.warning("reading %s: %s; trying on", self._topic, error)
            self._quiet_until = self._clients.clock() + WARNING_S
        if left_s > 0:
            self._clients.sleep(min(left_s, BACKOFF_S))

    def _overtaken(self, error: OffsetOutOfRangeError) -> None:
        """Retention deleted what was to be read next: the partition starts over, as if it were newly assigned."""
        offsets = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
        partitions = tuple(tp.partition for tp in offsets)
        if not partitions:
            fail(f"reading {self._topic!r}", error)
        log.warning("%s: offsets %s are no longer kept", self._topic, {tp.partition: o for tp, o in offsets.items()})
        for partition in partitions:
            self.pause(partition)
        self._marks.append(Mark("overtaken", partitions))


def stable_offset(consumer: Any, topic: str, partition: int, timeout_ms: int = STABLE_MS) -> Committed | None:
    """What a consumer's group committed last, or None; a consumer of committed records waits for what is undecided."""
    try:
        found = consumer.committed(TopicPartition(topic, partition), metadata=True, timeout_ms=timeout_ms)
    except KafkaError as error:
        fail(f"asking for the committed offset of {topic!r} partition {partition}", error)
    # confluent-kafka 2.16 writes the zero byte that ends a text in C.
    return None if found is None or found.offset < 0 else Committed(found.offset, (found.metadata or "").rstrip("\0"))


class _Assignor(CooperativeStickyAssignor):  # type: ignore[misc]  # kafka-python has no types
    """Marks every join of the group, and keeps what came still until the service has sought to where it goes on."""

    consumer: Any = None

    def __init__(self, marks: deque[Mark], static: bool):
        super().__init__()
        self._marks, self._static = marks, static
        self._held: set[Any] = set()
        self._member, self._generation = "", -1  # of the last join

    def on_assignment(self, assignment: Any, generation: int) -> None:
        """Runs on the client's I/O thread once the new assignment is in force: local calls only."""
        super().on_assignment(assignment, generation)
        held = set(assignment.partitions())
        member = self.consumer.group_metadata().member_id
        if self._missed_a_round(member, generation) and self._held:
            self._marks.append(Mark("lost", tuple(tp.partition for tp in self._held)))
            self._held = set()
        self._member, self._generation = member, generation
        for tp in held - self._held:
            self.consumer.pause(tp)
            self.consumer.seek(tp, 0)  # any position will do: nothing is fetched while paused
        self._held = held
        self._marks.append(Mark("joined", tuple(tp.partition for tp in held), generation))

    def _missed_a_round(self, member: str, generation: int) -> bool:
        """Whether the group went on without us, so that what we hold may have been another's in between.

        kafka-python tells of nothing where a member is expelled while it joins: it joins again under another name,
        and may be given what it had. A static member keeps its name, and is left out of rounds that it misses.
        """
        return member != self._member or (self._static and generation != self._generation + 1)

    def forget(self) -> None:
        """What was lost is not claimed at the next join: it may be another's by then."""
        self._held = set()
        self.member_assignment = None


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Marks what was lost; what came or went otherwise, the assignor has marked before."""

    def __init__(self, marks: deque[Mark], assignor: _Assignor):
        self._marks = marks
        self._assignor = assignor

    def on_partitions_assigned(self, assigned: Sequence[Any]) -> None:
        """Already marked."""

    def on_partitions_revoked(self, revoked: Sequence[Any]) -> None:
        """Already marked."""

    def on_partitions_lost(self, lost: Sequence[Any]) -> None:
        """Runs on the client's I/O thread."""
        self._assignor.forget()
        self._marks.append(Mark("lost", tuple(tp.partition for tp in lost)))


def _headers(headers: Sequence[tuple[str, bytes | None]]) -> Headers:
    return tuple((name, value or b"") for name, value in headers) if headers else ()
