"""What scenarios are made of: a bench of clients, members of a group that live by themselves, and waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from kafka.admin import OffsetSpec
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.structs import ConsumerGroupMetadata, TopicPartition

SESSION_MS = 3_000
HOUR_MS = 3_600_000


class Bench(Protocol):
    """Clients, topics and time. Clients are closed when the scenario has ended."""

    def consumer(self, **config: Any) -> Any:
        """A KafkaConsumer."""

    def producer(self, **config: Any) -> Any:
        """A KafkaProducer."""

    def admin(self) -> Any:
        """A KafkaAdminClient."""

    def topic(self, partitions: int = 1, **configs: str) -> str:
        """A new topic's name; `_` in the names of settings stands for a dot."""

    def name(self, what: str) -> str:
        """A name that nobody else has."""

    def sleep(self, seconds: float) -> None:
        """Let time pass."""

    def wall_ms(self) -> int:
        """The wall clock."""

    def start(self, member: Member, live: Callable[[], None]) -> None:
        """Run a member's life in a process of its own."""

    def vanish(self, member: Member) -> None:
        """End a member as a crash would: it says nothing more to anybody."""


SCENARIOS: list[Callable[[Bench], None]] = []


def scenario(check: Callable[[Bench], None]) -> Callable[[Bench], None]:
    """Take a check into the list."""
    SCENARIOS.append(check)
    return check


class Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # kafka-python has no types
    """Notes what came and went, as `+0,1`, `-1` and `!0` (lost)."""

    def __init__(self, notes: list[str]):
        self._notes = notes

    def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        self._note("+", assigned)

    def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        self._note("-", revoked)

    def on_partitions_lost(self, lost: Iterable[Any]) -> None:
        self._note("!", lost)

    def _note(self, sign: str, partitions: Iterable[Any]) -> None:
        self._notes.append(sign + ",".join(str(number) for number in sorted(tp.partition for tp in partitions)))


class Assignor(CooperativeStickyAssignor):  # type: ignore[misc]
    """Notes each join that completes, as `=0,1`."""

    def __init__(self, notes: list[str]):
        super().__init__()
        self._notes = notes

    def on_assignment(self, assignment: Any, generation: int) -> None:
        super().on_assignment(assignment, generation)
        self._notes.append("=" + ",".join(str(tp.partition) for tp in sorted(assignment.partitions())))


class Member:
    """A consumer in a group that polls all the time in a process of its own, and notes what happens to it.

    It is never polled by turns with others: kafka-python throws a join away that ends between two polls.
    """

    def __init__(self, bench: Bench, topic: str, group: str, **config: Any):
        self.bench = bench
        self.notes: list[str] = []
        self.got: list[Any] = []
        self.owned: set[int] = set()
        self.me = ConsumerGroupMetadata(group)
        self.polls = True
        self.error: Exception | None = None
        self._stopped = False
        self._asked: list[tuple[Callable[[Any], Any], list[Any]]] = []
        self._config = {
            "group_id": group,
            "enable_auto_commit": False,
            "auto_offset_reset": "earliest",
            "isolation_level": "read_committed",
            "session_timeout_ms": SESSION_MS,
            "heartbeat_interval_ms": 300,
            "request_timeout_ms": 5_000,
            "partition_assignment_strategy": (Assignor(self.notes),),
        } | config
        bench.start(self, lambda: self._live(topic))

    def _live(self, topic: str) -> None:
        try:
            consumer = self.bench.consumer(**self._config)
            consumer.subscribe([topic], listener=Listener(self.notes))
            consumer.topics()  # so that the first join is not followed by one that may be forgotten
            while not self._stopped:
                if self.polls:
                    for records in consumer.poll(timeout_ms=100).values():
                        self.got.extend(records)
                else:
                    self.bench.sleep(0.1)
                while self._asked:
                    call, answer = self._asked.pop()
                    answer.append(_tried(lambda call=call: call(consumer)))  # type: ignore[misc]
                self.owned = {tp.partition for tp in consumer.assignment()}
                self.me = consumer.group_metadata()
        except Exception as error:
            self.error = error

    def ask(self, call: Callable[[Any], Any]) -> Any:
        """Let it call something of its consumer between two polls; what came of it."""
        answer: list[Any] = []
        self._asked.append((call, answer))
        until(self.bench, lambda: bool(answer), self)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def committed(self, partition: TopicPartition, timeout_ms: int = 10_000) -> int | None:
        """The group's committed offset."""
        found: int | None = self.ask(lambda consumer: consumer.committed(partition, timeout_ms=timeout_ms))
        return found

    def close(self) -> None:
        """Close its consumer and end."""

        def leave(consumer: Any) -> None:
            consumer.close(autocommit=False, timeout_ms=5_000)
            self.stop()

        self.ask(leave)

    def stop(self) -> None:
        """End without a word."""
        self._stopped = True


def _tried(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return error


def until(bench: Bench, true: Callable[[], bool], *members: Member, seconds: float = 30.0) -> None:
    """Wait until something holds."""
    for _ in range(round(seconds / 0.02)):
        for member in members:
            if member.error is not None:
                raise member.error
        if true():
            return
        bench.sleep(0.02)
    raise AssertionError([member.notes for member in members])


def settled(bench: Bench, partitions: int, *members: Member) -> None:
    """Wait until each has its share, and for long enough that nobody begins to join again."""

    def done() -> bool:
        owned = [number for member in members for number in member.owned]
        generations = {member.me.generation_id for member in members}
        return sorted(owned) == list(range(partitions)) and len(generations) == 1 and generations != {-1}

    until(bench, done, *members)
    for _ in range(4):
        bench.sleep(0.25)
        until(bench, done, *members)


def transactional(bench: Bench, name: str | None = None, **config: Any) -> Any:
    """A producer with an id, ready to begin."""
    settings = {"transactional_id": name or bench.name("txn"), "retry_backoff_ms": 20, "request_timeout_ms": 10_000}
    producer = bench.producer(**(settings | config))
    producer.init_transactions()
    return producer


def write(producer: Any, topic: str, *values: bytes | None, partition: int = 0, key: bytes = b"k") -> list[Any]:
    """Send values and wait; the futures."""
    futures = [producer.send(topic, value=value, key=key, partition=partition) for value in values]
    producer.flush()
    return futures


def committed_in(bench: Bench, topic: str, partition: int = 0, **config: Any) -> list[tuple[int, bytes | None]]:
    """Offset and value of all that a reader of committed records finds up to the high watermark."""
    consumer = bench.consumer(isolation_level="read_committed", auto_offset_reset="earliest", group_id=None, **config)
    tp = TopicPartition(topic, partition)
    end = bench.admin().list_partition_offsets({tp: OffsetSpec.LATEST})[tp].offset
    consumer.assign([tp])
    found = []
    for _ in range(300):
        for record in consumer.poll(timeout_ms=100).get(tp, []):
            found.append((record.offset, record.value))
        if consumer.position(tp) >= end:
            return found
    raise AssertionError(f"the reader stays at {consumer.position(tp)} before {end}")
