"""Kafka as a source and a sink, through kafka-python.

What is known of kafka-python 3.0.12 and kept in mind here:
- its rebalance listeners run on its I/O thread, while `poll` waits, and may not block: they only mark;
- a deserializer that raises makes `poll` spin for ever: bytes are taken as they are;
- `flush` says nothing of batches that failed: every future is looked at;
- a partition without a position makes `poll` raise before anyone can seek: the listener gives it one, and pauses it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import (
    CommitFailedError,
    IllegalGenerationError,
    KafkaError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    UnknownMemberIdError,
)
from kafka.structs import OffsetAndMetadata

from statestep.consumers.kafka_client import REQUEST_MS, Properties, connect, fail
from statestep.consumers.ports import (
    BrokerError,
    Change,
    CommitRefused,
    Committed,
    Message,
    Polled,
    Record,
)

log = logging.getLogger("statestep")

DELIVERY_MS = 120_000  # how long a message is tried; then the service stops, and a restart goes on from the commit
CLOSE_MS = 3_000
BATCH_BYTES = 256 * 1024
REQUEST_BYTES = 4 * 1024 * 1024  # more than any output or dead letter has; the topic's own limit still holds


class KafkaSource:
    """A member of the application's group on one input topic."""

    def __init__(self, topic: str, app_id: str, properties: Properties, partitions: int):
        self._topic = topic
        self._partitions = partitions
        self._changes: list[Change] = []
        self._consumer = connect(
            KafkaConsumer,
            properties,
            client_id=app_id,
            group_id=app_id,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            partition_assignment_strategy=(CooperativeStickyAssignor(),),
        )
        self._consumer.subscribe([topic], listener=_Listener(self._consumer, self._changes))
        self._running: set[int] = set()  # partitions that were sought to, and so may give records

    @property
    def topic(self) -> str:
        """The topic's name."""
        return self._topic

    @property
    def partitions(self) -> int:
        """How many partitions the topic had when the service started."""
        return self._partitions

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        """One poll of the client, on whose calling thread the listener has left its marks."""
        try:
            found = self._consumer.poll(timeout_ms=round(timeout_s * 1000), max_records=max(max_records, 1))
        except OffsetOutOfRangeError as error:
            return self._overtaken(error)
        except KafkaError as error:
            fail(f"reading {self._topic!r}", error)
        changes = self._drain()
        records = [
            Record(r.partition, r.offset, r.timestamp, r.key, r.value, _headers(r.headers))
            for tp, batch in found.items()
            if tp.partition in self._running
            for r in batch
        ]
        return Polled(changes, records)

    def committed(self, partition: int) -> Committed | None:
        """What the group committed last, or None."""
        tp = TopicPartition(self._topic, partition)
        try:
            found = self._consumer.committed(tp, metadata=True, timeout_ms=REQUEST_MS)
        except KafkaError as error:
            fail(f"asking for the committed offset of {self._topic!r} partition {partition}", error)
        return None if found is None or found.offset < 0 else Committed(found.offset, found.metadata or "")

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

    def commit(self, offsets: Mapping[int, Committed]) -> None:
        """Commit for the group, with each partition's note as the metadata."""
        wanted = {
            TopicPartition(self._topic, p): OffsetAndMetadata(c.offset, c.metadata, -1) for p, c in offsets.items()
        }
        try:
            self._consumer.commit(wanted, timeout_ms=REQUEST_MS)
        except (CommitFailedError, RebalanceInProgressError, IllegalGenerationError, UnknownMemberIdError) as error:
            raise CommitRefused(f"the group has moved on ({type(error).__name__})") from None
        except KafkaError as error:
            fail(f"committing offsets of {self._topic!r}", error)

    def high_watermarks(self) -> Mapping[int, int]:
        """What the last fetches told, without asking."""
        known = {p: self._consumer.highwater(TopicPartition(self._topic, p)) for p in self._assigned()}
        return {partition: offset for partition, offset in known.items() if offset is not None}

    @property
    def exhausted(self) -> bool:
        """Never: a topic has no end."""
        return False

    def close(self) -> None:
        """Leave the group, so that the others need not wait for a timeout."""
        self._consumer.close(autocommit=False, timeout_ms=CLOSE_MS)

    def _assigned(self) -> set[int]:
        return self._running & {tp.partition for tp in self._consumer.assignment()}

    def _drain(self) -> list[Change]:
        """Take the listener's marks. It runs only while a client call waits, so none is added meanwhile."""
        changes = self._changes[:]
        del self._changes[: len(changes)]
        for change in changes:
            self._running -= set(change.partitions)
        return changes

    def _overtaken(self, error: OffsetOutOfRangeError) -> Polled:
        """Retention deleted what was to be read next: the partition starts over, as if it were newly assigned."""
        offsets = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
        partitions = tuple(tp.partition for tp in offsets)
        if not partitions:
            fail(f"reading {self._topic!r}", error)
        log.warning("%s: offsets %s are no longer kept", self._topic, {tp.partition: o for tp, o in offsets.items()})
        for partition in partitions:
            self._consumer.pause(TopicPartition(self._topic, partition))
        changes = [*self._drain(), Change("lost", partitions), Change("assigned", partitions)]
        self._running -= set(partitions)
        return Polled(changes, [])


class _Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Marks what came and went, and keeps what came still until the service has sought to where it goes on."""

    def __init__(self, consumer: Any, changes: list[Change]):
        self._consumer = consumer
        self._changes = changes

    def on_partitions_assigned(self, assigned: Sequence[Any]) -> None:
        """Runs on the client's I/O thread: local calls only."""
        for tp in assigned:
            self._consumer.pause(tp)
            self._consumer.seek(tp, 0)  # any position will do: nothing is fetched while paused
        self._mark("assigned", assigned)

    def on_partitions_revoked(self, revoked: Sequence[Any]) -> None:
        """Runs on the client's I/O thread."""
        self._mark("revoked", revoked)

    def on_partitions_lost(self, lost: Sequence[Any]) -> None:
        """Runs on the client's I/O thread."""
        self._mark("lost", lost)

    def _mark(self, kind: Any, partitions: Sequence[Any]) -> None:
        if partitions or kind == "assigned":  # an empty assignment says that the group was joined
            self._changes.append(Change(kind, tuple(tp.partition for tp in partitions)))


class KafkaSink:
    """Outputs to one topic and dead letters to another, idempotent and acknowledged by all in-sync replicas."""

    def __init__(
        self, app_id: str, properties: Properties, output: str, dead_letters: str, partitions: Mapping[str, int]
    ):
        """`partitions` gives the number of partitions of either topic and of the input (under the name "")."""
        self._topics = {False: output, True: dead_letters}
        inputs = partitions.get("")
        self._aligned = {dead: partitions.get(topic) == inputs for dead, topic in self._topics.items()}
        self._futures: list[Any] = []
        self._producer = connect(
            KafkaProducer,
            properties,
            client_id=app_id,
            acks="all",
            enable_idempotence=True,
            allow_auto_create_topics=False,
            **{"batch_size": BATCH_BYTES, "linger_ms": 5, "max_request_size": REQUEST_BYTES}
            | {"delivery_timeout_ms": DELIVERY_MS, "max_block_ms": REQUEST_MS},
        )

    def send(self, messages: Sequence[Message]) -> None:
        """Hand messages to the client, to the record's partition number where the topics are cut alike."""
        try:
            for message in messages:
                self._futures.append(
                    self._producer.send(
                        self._topics[message.dead],
                        value=message.value,
                        key=message.key,
                        headers=list(message.headers),
                        partition=message.partition if self._aligned[message.dead] else None,
                        timestamp_ms=message.timestamp_ms,
                    )
                )
        except KafkaError as error:
            fail(f"writing to {self._topics[message.dead]!r}", error)

    def flush(self) -> None:
        """Wait, then look at every future: the client's own flush is silent about batches that failed."""
        futures, self._futures = self._futures, []
        try:
            self._producer.flush(timeout=DELIVERY_MS / 1000)
        except KafkaError as error:
            fail("waiting for outputs to be acknowledged", error)
        lost = [future for future in futures if not future.succeeded()]
        if lost:
            reason = lost[0].exception or "no acknowledgement"
            raise BrokerError(f"{len(lost)} of {len(futures)} messages were not acknowledged: {reason}")

    def close(self) -> None:
        """Let go; what was to be sent was flushed before."""
        self._producer.close(timeout=CLOSE_MS / 1000)


def _headers(headers: Sequence[tuple[str, bytes | None]]) -> tuple[tuple[str, bytes], ...]:
    return tuple((name, value or b"") for name, value in headers) if headers else ()
