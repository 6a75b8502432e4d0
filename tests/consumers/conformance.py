"""What every source and sink must keep: the words of `ports.py` as checks over a `World`.

`MemoryWorld` is the memory adapters; tests/broker has the same over a real Kafka. A check takes a fresh world and
raises AssertionError; `CHECKS` lists them all. Nothing here waits longer than it must, nor for a fixed time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from statestep.consumers.memory import MemoryBroker, MemorySink, MemorySource
from statestep.consumers.ports import Committed, Headers, Message, Record, Sink, Source

PARTITIONS = 2
DEADLINE_S = 30.0  # for a group to form and records to come
NOW_MS = 1_700_000_000_000
RAW: Headers = (("traceparent", b"00-ab"), ("twice", b"1"), ("twice", b"\xff\x00"), ("empty", b""))


class World(Protocol):
    """An input topic of two partitions, an application's group on it, and the places of outputs and dead letters."""

    def append(
        self,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        timestamp_ms: int = NOW_MS,
        headers: Headers = (),
    ) -> int:
        """Write a record to the input; gives its offset once it can be read."""

    def source(self) -> Source:
        """A new member of the group; it is the only one, unless a check closes none before."""

    def sink(self) -> Sink:
        """A sink of the application."""

    def messages(self, count: int) -> list[Message]:
        """What other consumers read of outputs and dead letters, once there are `count`, partition by partition."""


class MemoryWorld:
    """The memory adapters as a world."""

    def __init__(self) -> None:
        self.broker = MemoryBroker(PARTITIONS)

    def append(
        self, partition: int, key: bytes | None, value: bytes | None, timestamp_ms: int = NOW_MS, headers: Headers = ()
    ) -> int:
        return self.broker.append(partition, key, value, timestamp_ms, headers)

    def source(self) -> Source:
        return MemorySource(self.broker)

    def sink(self) -> Sink:
        return MemorySink(self.broker)

    def messages(self, count: int) -> list[Message]:
        assert len(self.broker.messages) == count
        return sorted(self.broker.messages, key=lambda message: message.partition)


def joined(source: Source) -> set[int]:
    """Poll until both partitions are assigned."""
    owned: set[int] = set()
    deadline = time.monotonic() + DEADLINE_S
    while owned != set(range(PARTITIONS)):
        assert time.monotonic() < deadline, f"only {owned} were assigned"
        polled = source.poll(0.2, 100)
        assert not polled.records, "records of a partition that nobody sought to"
        for change in polled.changes:
            owned = owned | set(change.partitions) if change.kind == "assigned" else owned - set(change.partitions)
    return owned


def read(source: Source, count: int, max_records: int = 100) -> list[Record]:
    """Poll until `count` records came, and once more, to see that no other does."""
    records: list[Record] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(records) < count:
        assert time.monotonic() < deadline, f"only {len(records)} of {count} records came"
        found = source.poll(0.2, max_records).records
        assert len(found) <= max_records
        records += found
    assert not source.poll(0.2, max_records).records
    assert len(records) == count
    return records


def offsets(records: Sequence[Record], partition: int) -> list[int]:
    return [record.offset for record in records if record.partition == partition]


def check_records_come_as_they_were_written(world: World) -> None:
    """Key, value, headers and timestamp to the byte; null and no bytes are told apart."""
    written = [
        Record(0, 0, NOW_MS, b"k", b"\x00\xff", RAW),
        Record(0, 1, NOW_MS + 5, None, b"", ()),
        Record(0, 2, NOW_MS + 7, b"", None, (("h", b"1"),)),
        Record(1, 0, NOW_MS, b"x" * 5000, b"y" * 100_000, ()),
    ]
    for record in written:
        offset = world.append(record.partition, record.key, record.value, record.timestamp_ms, record.headers)
        assert offset == record.offset
    source = world.source()
    for partition in joined(source):
        source.seek(partition, 0)
    found = read(source, len(written))
    assert sorted(found) == sorted(written)
    source.close()


def check_nothing_comes_before_a_seek(world: World) -> None:
    """An assigned partition is silent until the service has said where it goes on; each has its own place."""
    for partition in range(PARTITIONS):
        for number in range(4):
            world.append(partition, b"k", b"%d" % number)
    source = world.source()
    joined(source)
    assert not source.poll(0.3, 100).records
    source.seek(1, 2)
    assert offsets(read(source, 2), 1) == [2, 3]
    source.seek(0, 3)
    assert offsets(read(source, 1), 0) == [3]
    source.close()


def check_a_poll_is_bounded_and_in_order(world: World) -> None:
    """However few records a poll may give, none is lost, doubled or out of its partition's order."""
    for number in range(20):
        world.append(number % PARTITIONS, b"k", b"%d" % number)
    source = world.source()
    for partition in joined(source):
        source.seek(partition, 0)
    records = read(source, 20, max_records=3)
    assert offsets(records, 0) == offsets(records, 1) == list(range(10))
    source.close()


def check_a_seek_may_go_back_and_forth(world: World) -> None:
    """A restore reads again what was read before; the end may be sought to, and later records are read from there."""
    for number in range(6):
        world.append(0, b"k", b"%d" % number)
    source = world.source()
    joined(source)
    source.seek(0, 0)
    assert offsets(read(source, 6), 0) == [0, 1, 2, 3, 4, 5]
    source.seek(0, 3)
    assert offsets(read(source, 3), 0) == [3, 4, 5]
    source.seek(0, 6)
    world.append(0, b"k", b"6")
    assert offsets(read(source, 1), 0) == [6]
    source.close()


def check_what_is_committed_is_found_by_the_next_owner(world: World) -> None:
    """Offset and text, for each partition by itself; of one never committed there is nothing."""
    for number in range(3):
        world.append(0, b"k", b"%d" % number)
    first = world.source()
    joined(first)
    assert first.committed(0) is None
    first.commit({0: Committed(2, '{"first":0,"ä":1}')})
    first.commit({0: Committed(1, "later")})
    assert first.committed(0) == Committed(1, "later")
    first.close()
    second = world.source()
    joined(second)
    assert second.committed(0) == Committed(1, "later")
    assert second.committed(1) is None
    second.close()


def check_bounds_and_times(world: World) -> None:
    """The first and next offset; the first record made at a time or later, or the end if there is none."""
    for number in range(5):
        world.append(0, b"k", b"%d" % number, NOW_MS + 1000 * number)
    source = world.source()
    joined(source)
    assert source.bounds(0) == (0, 5)
    assert source.bounds(1) == (0, 0)
    assert source.partitions == PARTITIONS
    times = (NOW_MS - 1, NOW_MS, NOW_MS + 1, NOW_MS + 4000, NOW_MS + 4001)
    assert [source.offset_at(0, at) for at in times] == [0, 0, 1, 4, 5]
    assert source.offset_at(1, NOW_MS) == 0
    for partition in range(PARTITIONS):
        source.seek(partition, 0)
    read(source, 5)
    assert source.high_watermarks().get(0) == 5
    assert not source.exhausted or isinstance(source, MemorySource)
    source.close()


def check_a_poll_waits_no_longer_than_asked(world: World) -> None:
    """Without records it comes back in time, so that a signal is seen."""
    source = world.source()
    for partition in joined(source):
        source.seek(partition, 0)
    began = time.monotonic()
    assert not source.poll(0.2, 10).records
    assert time.monotonic() - began < 2.0
    source.close()


def check_what_is_flushed_is_there(world: World) -> None:
    """Outputs and dead letters apart, to the byte, in the partition of the record that they answer, in order."""
    sink = world.sink()
    outputs = [Message(False, 0, b"k", b"%d" % number, RAW) for number in range(5)]
    others = [
        Message(False, 1, b"", None, ()),
        Message(True, 1, None, b"\xff", RAW),
        Message(True, 0, b"k" * 4096, None, ()),
        Message(True, 1, b"k", b"x" * 900_000, ()),
    ]
    sink.send(outputs[:3])
    sink.send([*outputs[3:], *others])
    sink.flush()
    found = world.messages(9)
    assert [message for message in found if not message.dead and message.partition == 0] == outputs
    assert sorted(map(repr, found)) == sorted(map(repr, [*outputs, *others]))
    sink.flush()  # nothing more to say
    sink.close()
    assert len(world.messages(9)) == 9


CHECKS: tuple[Callable[[World], None], ...] = (
    check_records_come_as_they_were_written,
    check_nothing_comes_before_a_seek,
    check_a_poll_is_bounded_and_in_order,
    check_a_seek_may_go_back_and_forth,
    check_what_is_committed_is_found_by_the_next_owner,
    check_bounds_and_times,
    check_a_poll_waits_no_longer_than_asked,
    check_what_is_flushed_is_there,
)
