"""Kafka as a source, through librdkafka: a member of the application's group on one input topic.

What is known of librdkafka 2.16 and kept in mind here:
- its callbacks run inside `consume`, on our thread, once a join: also where nothing moved. So the membership that a
  callback found is the last one that was told of, and any other is one of which the callbacks are still to come;
- where membership was lost it keeps the generation and forgets the member: such a membership is not handed on;
- who was joining when all brokers went keeps its old membership until they are back; it is told that they went, but
  not of their return;
- a partition whose offset is out of range cannot be sought any more, and one that was paused wakes after a second: so
  what gives no records is not fetched at all, and a seek is to begin fetching, which is allowed at any time;
- a static member whose place was taken hears so once, in a message, and never again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from confluent_kafka import Consumer, KafkaError, TopicPartition

from statestep.consumers import kafka_client
from statestep.consumers.kafka_client import REAL, Clients, Properties
from statestep.consumers.kafka_place import LOOK_S, StaticPlace
from statestep.consumers.kafka_source import CLOSE_MS, MAX_POLL_INTERVAL_MS, SESSION_TIMEOUT_MS, Kind, stable_offset
from statestep.consumers.kafka_topics import identify
from statestep.consumers.librdkafka_client import (
    FORBIDDEN,
    RAISED,
    REQUEST_S,
    Patience,
    code_of,
    connect,
    error_of,
    fail,
    gather,
)
from statestep.consumers.ports import Blocked, BrokerError, Change, Committed, Fenced, Headers, Identity, Polled, Record

log = logging.getLogger("statestep")

FETCH_WAIT_MS = 100  # how long the broker holds a fetch back where there is nothing; a seek waits for its end
QUEUE_WAIT_MS = 20  # how long nothing is fetched once enough is at hand; the default of a second would be a hole
AHEAD_RECORDS = 20_000  # how many records of a partition are fetched ahead
AHEAD_KBYTES = 32 * 1024  # of all partitions
REACH_S = 0.5  # to find out whether a broker is back; nothing else can be done until one is
MEMBERSHIP = b"CGMDv2:"  # how librdkafka begins to write a membership: then a generation, a group and a member


class LibrdkafkaSource:
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
        self._patience = Patience(f"reading {topic!r}", clients.clock)
        self._changes: list[Change] = []
        self._errors: list[Any] = []  # of the client as a whole
        self._owned: set[int] = set()
        self._running: set[int] = set()  # partitions that were sought to, and so are fetched
        self._member, self._generation = "", -1  # our name in the group, and the last generation that it was seen in
        self._missed: set[int] = set()  # partitions that may have been another's for a while, unnoticed
        self._closing = self._away = False
        self._joined: bytes | None = None  # the membership that the last callback found
        self._fenced = False
        # confluent-kafka 2.16 reads an offset's text up to a zero byte that only itself writes: kafka-python is asked.
        self._asking: Any = None
        session_timeout_ms = properties.get("session_timeout_ms", session_timeout_ms)
        ours: dict[str, Any] = {
            "client.id": app_id,
            "group.id": app_id,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "partition.assignment.strategy": "cooperative-sticky",
            "error_cb": self._errors.append,
        }
        if instance_id is not None:
            ours["group.instance.id"] = instance_id
        defaults = {
            "session.timeout.ms": session_timeout_ms,
            "heartbeat.interval.ms": min(3_000, session_timeout_ms // 4),
            "max.poll.interval.ms": max(max_poll_interval_ms, session_timeout_ms),
            "fetch.wait.max.ms": FETCH_WAIT_MS,
            "queued.min.messages": AHEAD_RECORDS,
            "queued.max.messages.kbytes": AHEAD_KBYTES,
            "fetch.queue.backoff.ms": QUEUE_WAIT_MS,
            "check.crcs": True,
        }
        self._consumer = connect(Consumer, properties, ours, defaults)
        self._consumer.subscribe([topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost)

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
        """What is at hand, after the callbacks, and whether the membership is the one that they found.

        A broker that is away is waited for. Raises `BrokerError` where it refuses, and `Fenced`.
        """
        if self._fenced:
            raise self._displaced()
        try:
            messages = gather(self._consumer, max(max_records, 1), timeout_s)
            membership = self._membership()
        except RAISED as raised:
            fail(f"reading {self._topic!r}", raised)
        if any(message.error() is not None for message in messages):
            messages = self._told(messages)
        while self._errors:
            error = self._errors.pop()
            if code_of(error) in FORBIDDEN:
                fail(f"reading {self._topic!r}", error)
            self._away |= code_of(error) == KafkaError._ALL_BROKERS_DOWN
            self._patience.bear(error)
        self._away = self._away and not self._reaches()
        changes, self._changes = self._anew() + self._changes, []
        records = [
            Record(m.partition(), m.offset(), m.timestamp()[1], m.key(), m.value(), _headers(m.headers()))
            for m in messages
            if m.partition() in self._running
        ]
        if membership is not None and generation_of(membership) == self._generation + 1:
            self._generation += 1  # a round in which nothing moves calls nobody back
        holds = membership is not None and membership == self._joined and is_member(membership) and not self._away
        return Polled(changes, records, membership if holds and not self._place.look() else None)

    def committed(self, partition: int) -> Committed | None:
        """What the group committed last, or None.

        Where a transaction over it is still open or being decided, its end is waited for; that may take longer than
        it is waited for here, up to the transaction timeout: then `BrokerError`, and the next try may find it.
        """
        if self._asking is None:
            self._asking = kafka_client.connect(
                self._clients.consumer,
                self._properties,
                client_id=self._app_id,
                group_id=self._app_id,  # of which it never becomes a member
                enable_auto_commit=False,
                isolation_level="read_committed",
            )
        return stable_offset(self._asking, self._topic, partition)

    def bounds(self, partition: int) -> tuple[int, int]:
        """The low watermark, and the end as a reader of committed records sees it."""
        doing = f"asking for the offsets of {self._topic!r} partition {partition}"
        try:
            found = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), timeout=REQUEST_S)
        except RAISED as raised:
            fail(doing, raised)
        if found is None:
            fail(doing, TimeoutError(f"no answer within {REQUEST_S:g} s"))
        return int(found[0]), int(found[1])

    def offset_at(self, partition: int, time_ms: int) -> int:
        """The offset of the first record made at `time_ms` or later; the end if there is none."""
        doing = f"asking for the offset of a time in {self._topic!r} partition {partition}"
        try:
            place = TopicPartition(self._topic, partition, time_ms)
            found = self._consumer.offsets_for_times([place], timeout=REQUEST_S)[0]
        except RAISED as raised:
            fail(doing, raised)
        if found.error is not None:
            fail(doing, found.error)
        return int(found.offset) if found.offset >= 0 else self.bounds(partition)[1]

    def seek(self, partition: int, offset: int) -> None:
        """Fetch from `offset` on, and nothing that was fetched before."""
        if partition not in self._owned:
            return  # taken away; the poll that told of it was the last one
        self.pause(partition)
        try:
            self._consumer.incremental_assign([TopicPartition(self._topic, partition, offset)])
        except RAISED as raised:
            fail(f"going to offset {offset} of {self._topic!r} partition {partition}", raised)
        self._running.add(partition)

    def pause(self, partition: int) -> None:
        """Fetch nothing more of a partition before the next seek."""
        try:
            if partition in self._running:
                self._stop([partition])
        except RAISED as raised:
            fail(f"pausing {self._topic!r} partition {partition}", raised)

    def high_watermarks(self) -> Mapping[int, int]:
        """What the last fetches told, without asking."""
        known = {
            p: self._consumer.get_watermark_offsets(TopicPartition(self._topic, p), cached=True)[1]
            for p in self._running
        }
        return {partition: offset for partition, offset in known.items() if offset >= 0}

    @property
    def exhausted(self) -> bool:
        """Never: a topic has no end."""
        return False

    def close(self) -> None:
        """Leave the group, so that the others need not wait for a timeout; a static member keeps its place."""
        self._closing = True
        try:
            self._clients.within(CLOSE_MS / 1000, self._consumer.close)
        except (Blocked, *RAISED) as error:
            log.warning("leaving the group was given up: %s", error)
        if self._asking is not None:
            self._asking.close(autocommit=False, timeout_ms=CLOSE_MS)

    # Callbacks: they run while `consume` or `close` waits, and must not raise; confluent-kafka makes a muddle of it.

    def _assigned(self, consumer: Any, places: Sequence[Any]) -> None:
        self._heed(lambda: consumer.incremental_assign([]))  # nothing is fetched before a seek
        first = self._joined is None
        self._take_part(consumer)
        self._mark("assigned", places, always=first)  # an empty one is told too, once: the group was joined
        self._owned |= {place.partition for place in places}
        self._place.joined()

    def _take_part(self, consumer: Any) -> None:
        """Keep the membership. Where the group went on without us, what we hold may have been another's then.

        As in `kafka_source`, where kafka-python is known to tell of nothing.
        """
        self._joined = self._membership()
        if self._joined is None:
            return
        member, generation = consumer.memberid() or "", generation_of(self._joined)
        static = self._instance_id is not None
        if member != self._member or (static and generation > self._generation + 1):
            self._missed |= self._owned
        self._member, self._generation = member, generation

    def _anew(self) -> list[Change]:
        """What may have been another's for a while is taken up anew."""
        missed, self._missed = sorted(self._missed & self._owned), set()
        for partition in missed:
            self.pause(partition)
        return [Change("lost", tuple(missed)), Change("assigned", tuple(missed))] if missed else []

    def _revoked(self, consumer: Any, places: Sequence[Any]) -> None:
        self._let_go(places)
        self._take_part(consumer)
        self._mark("revoked", places)

    def _lost(self, _: Any, places: Sequence[Any]) -> None:
        self._let_go(places)
        self._joined = None
        self._mark("lost", places)

    def _let_go(self, places: Sequence[Any]) -> None:
        partitions = [place.partition for place in places]
        self._heed(lambda: self._stop(partitions))
        self._owned -= set(partitions)

    def _reaches(self) -> bool:
        """Whether any broker answers."""
        try:
            self._consumer.list_topics(self._topic, timeout=REACH_S)
        except RAISED:
            return False
        return True

    def _membership(self) -> bytes | None:
        if self._closing:
            return None  # confluent-kafka would wait for ever, and hold the interpreter's lock
        try:
            found: bytes = self._consumer.consumer_group_metadata()
            return found
        except RuntimeError:  # there is none while the client closes, which may call back first
            return None

    def _heed(self, call: Callable[[], None]) -> None:
        try:
            call()
        except RAISED as raised:  # such as after a fatal error, which `consume` tells of
            self._errors.append(error_of(raised))

    def _stop(self, partitions: Sequence[int]) -> None:
        """Fetch none of these any more. A callback must say so even of none, or the client does what it likes."""
        running = [p for p in partitions if p in self._running]
        self._running -= set(running)
        self._consumer.incremental_unassign([TopicPartition(self._topic, p) for p in running])

    def _mark(self, kind: Kind, places: Sequence[Any], always: bool = False) -> None:
        if places or always:
            self._changes.append(Change(kind, tuple(sorted(place.partition for place in places))))

    def _told(self, messages: Sequence[Any]) -> list[Any]:
        """The records among messages; errors are dealt with."""
        overtaken = []
        for message in messages:
            error = message.error()
            if error is None:
                continue
            if error.code() == KafkaError._FATAL:
                self._fenced = self._instance_id is not None
                if self._fenced:
                    raise self._displaced()
                fail(f"reading {self._topic!r}", error)
            if error.code() == KafkaError._AUTO_OFFSET_RESET:
                overtaken += [message.partition()] if message.partition() in self._running else []
            elif error.code() != KafkaError._MAX_POLL_EXCEEDED:  # of which a callback tells
                self._patience.bear(error)
        if overtaken:  # retention deleted what was to be read next: they start over, as if newly assigned
            log.warning("%s: the next offsets of partitions %s are no longer kept", self._topic, overtaken)
            self._stop(overtaken)
            self._changes += [Change("lost", tuple(overtaken)), Change("assigned", tuple(overtaken))]
        return [message for message in messages if message.error() is None]

    def _displaced(self) -> Fenced:
        return Fenced(f"another process has joined the group with the instance id {self._instance_id!r}")


def generation_of(membership: bytes) -> int:
    """The generation that a membership names, as librdkafka writes it.

    >>> generation_of(b"CGMDv2:" + bytes([7, 0, 0, 0]) + b"group" + bytes(3))
    7
    """
    if not membership.startswith(MEMBERSHIP):
        raise BrokerError("this confluent-kafka tells memberships in a way that is not known here; install 2.16")
    start = len(MEMBERSHIP)
    return int.from_bytes(membership[start : start + 4], "little", signed=True)


def is_member(membership: bytes) -> bool:
    """Whether a membership, as librdkafka writes it, names a generation and a member.

    A broker may fence nothing that comes with another.

    >>> is_member(b"CGMDv2:" + bytes([7, 0, 0, 0]) + b"group" + bytes(1) + b"member" + bytes(2))
    True
    >>> is_member(b"CGMDv2:" + bytes([7, 0, 0, 0]) + b"group" + bytes(3))
    False
    """
    return generation_of(membership) >= 0 and bool(membership[len(MEMBERSHIP) + 4 :].split(b"\0")[1])


def _headers(headers: Sequence[tuple[str, bytes | None]] | None) -> Headers:
    return tuple((name, value or b"") for name, value in headers) if headers else ()
