"""What every source, sink and changelog must keep: the words of `ports.py` as checks over a `World`.

`MemoryWorld` is the memory adapters; tests/broker has the same over a real Kafka. A check takes a fresh world and
raises AssertionError. `CHECKS` are for all, `GROUP_CHECKS` for adapters of a broker, where several members share a
group and a message can be refused. Nothing here waits longer than it must, nor for a fixed time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, Protocol

import pytest

from statestep.consumers.memory import MemoryBroker, MemoryChangelog, MemorySink, MemorySource
from statestep.consumers.ports import (
    Changelog,
    Committed,
    Fenced,
    Headers,
    Message,
    Polled,
    Record,
    Rejected,
    Sink,
    Source,
    StateRecord,
    Transaction,
    Undecided,
)

PARTITIONS = 2
DEADLINE_S = 30.0  # for a group to form and records to come
NOW_MS = 1_700_000_000_000
RAW: Headers = (("traceparent", b"00-ab"), ("twice", b"1"), ("twice", b"\xff\x00"), ("empty", b""))
TOO_LARGE_BYTES = 20_000_000


class World(Protocol):
    """An input topic of two partitions, an application's group on it, its changelog, and the topics that it writes."""

    def append(
        self,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        timestamp_ms: int = NOW_MS,
        headers: Headers = (),
    ) -> int:
        """Write a record to the input; gives its offset once it can be read."""

    def source(self, instance_id: str | None = None) -> Source:
        """A new member of the group; it is the only one, unless a check closes none before."""

    def sink(self, instance_id: str | None = None) -> Sink:
        """A sink of the application, not yet recovered."""

    def changelog(self) -> Changelog:
        """A reader of the application's states."""

    def messages(self, count: int) -> list[Message]:
        """What other consumers read of outputs, dead letters and events, once there are `count`, by partition.

        They see what is committed only, and look once more to see that no more comes.
        """


class MemoryWorld:
    """The memory adapters as a world."""

    def __init__(self) -> None:
        self.broker = MemoryBroker(PARTITIONS)

    def append(
        self, partition: int, key: bytes | None, value: bytes | None, timestamp_ms: int = NOW_MS, headers: Headers = ()
    ) -> int:
        return self.broker.append(partition, key, value, timestamp_ms, headers)

    def source(self, instance_id: str | None = None) -> Source:
        return MemorySource(self.broker)

    def sink(self, instance_id: str | None = None) -> Sink:
        return MemorySink(self.broker)

    def changelog(self) -> Changelog:
        return MemoryChangelog(self.broker)

    def messages(self, count: int) -> list[Message]:
        assert len(self.broker.messages) == count
        return sorted(self.broker.messages, key=lambda message: message.partition)


class Member:
    """A source that is polled, what it owns by the changes it was told, and the membership of its last poll."""

    def __init__(self, source: Source):
        self.source = source
        self.owned: set[int] = set()
        self.membership: Any = None
        self.records: list[Record] = []

    def poll(self, timeout_s: float = 0.1) -> Polled:
        polled = self.source.poll(timeout_s, 100)
        for change in polled.changes:
            came = change.kind == "assigned"
            assert came or self.owned >= set(change.partitions), f"{change} of partitions that were not owned"
            assert not came or not self.owned & set(change.partitions), f"{change} of partitions that were owned"
            self.owned = self.owned | set(change.partitions) if came else self.owned - set(change.partitions)
        assert {record.partition for record in polled.records} <= self.owned
        self.membership = polled.membership
        self.records += polled.records
        return polled


def poll_until(true: Callable[[], bool], *members: Member, what: str = "it") -> None:
    """Poll until something holds: each member from a thread of its own, since they wait for one another to join."""
    done = threading.Event()

    def run(member: Member) -> None:
        while not done.is_set():
            member.poll()

    with ThreadPoolExecutor(len(members)) as pool:
        running = [pool.submit(run, member) for member in members]
        deadline = time.monotonic() + DEADLINE_S
        try:
            while not true():
                assert time.monotonic() < deadline, f"{what} did not come to be; owned: {[m.owned for m in members]}"
                wait(running, 0.01, FIRST_EXCEPTION)
                if any(future.done() for future in running):
                    break
        finally:
            done.set()
        for future in running:
            future.result()


def member_of(source: Source) -> Member:
    """A member that owns all partitions and may commit."""
    member = Member(source)
    poll_until(lambda: len(member.owned) == PARTITIONS and member.membership is not None, member)
    return member


def apart(*members: Member) -> bool:
    """Whether each owns one partition and may commit it."""
    return all(len(member.owned) == 1 and member.membership is not None for member in members)


def begun(world: World, instance_id: str | None = None) -> tuple[Member, Sink]:
    """The only member of the group, and a sink that may commit for it."""
    member, sink = member_of(world.source(instance_id)), world.sink(instance_id)
    sink.recover()
    return member, sink


def states_of(log: Changelog, partition: int, position: int | None = None) -> list[StateRecord]:
    """Everything of a partition from a position on, as a restore reads it."""
    assert log.open(partition, position), f"position {position} of partition {partition} is not there"
    found: list[StateRecord] = []
    deadline = time.monotonic() + DEADLINE_S
    while not log.finished(partition):
        assert time.monotonic() < deadline, f"no end, at {log.position(partition)}"
        found += log.read(3)
    log.shut(partition)
    return found


def transaction(
    messages: Iterable[Message] = (), states: Iterable[StateRecord] = (), offsets: Mapping[int, Committed] | None = None
) -> Transaction:
    return Transaction(list(messages), list(states), dict(offsets or {0: Committed(0, "")}))


def outputs(partition: int, *values: bytes) -> list[Message]:
    return [Message(False, partition, b"k", value, ()) for value in values]


def states(partition: int, *records: tuple[bytes, bytes | None]) -> list[StateRecord]:
    return [StateRecord(partition, key, value) for key, value in records]


def contents(records: Sequence[StateRecord]) -> list[tuple[bytes, bytes | None]]:
    return [(record.key, record.value) for record in records]


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
    first, sink = begun(world)
    assert first.source.committed(0) is None
    sink.commit(transaction(offsets={0: Committed(2, '{"first":0,"ä":1}')}), first.membership)
    assert first.source.committed(0) == Committed(2, '{"first":0,"ä":1}')
    sink.commit(transaction(offsets={0: Committed(1, "later")}), first.membership)
    assert first.source.committed(0) == Committed(1, "later")
    sink.close()
    first.source.close()
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


def check_a_pause_lasts_until_a_seek(world: World) -> None:
    """A paused partition gives nothing, the other goes on, and a seek says where it resumes."""
    for number in range(4):
        world.append(number % PARTITIONS, b"k", b"%d" % number)
    source = world.source()
    for partition in joined(source):
        source.seek(partition, 0)
    source.pause(0)
    assert offsets(read(source, 2), 1) == [0, 1]
    world.append(0, b"k", b"4")
    assert not source.poll(0.2, 10).records
    source.seek(0, 1)
    assert offsets(read(source, 2), 0) == [1, 2]
    source.close()


def check_the_input_is_known_again(world: World) -> None:
    """The topic has an identity that stays, and it is a log."""
    source = world.source()
    identity = source.identity()
    assert identity.partitions == PARTITIONS
    assert identity.is_log
    source.close()
    again = world.source()
    assert again.identity() == identity
    again.close()


def check_a_transaction_is_there_whole(world: World) -> None:
    """Outputs, dead letters and events to the byte, in the partition of their record, in order; and states."""
    member, sink = begun(world)
    first = [Message(False, 0, b"k", b"%d" % number, RAW) for number in range(5)]
    others = [
        Message(False, 1, b"", None, ()),
        Message(True, 1, None, b"\xff", RAW),
        Message(True, 0, b"k" * 4096, None, ()),
        Message(True, 1, b"k", b"x" * 900_000, ()),
        *(Message(False, 1, b"k", b'{"id":%d}' % number, RAW, event=True) for number in range(4)),
        Message(False, 0, b"k", b"event", (), event=True),
    ]
    marked = [*states(0, (b"sk", b"1"), (b"m", b"\x00")), *states(1, (b"m", b""))]
    offsets = {0: Committed(5, "1"), 1: Committed(4, "1")}
    positions = sink.commit(transaction([*first[:3], *first[3:], *others], marked, offsets), member.membership)
    assert set(positions) == {0, 1}
    count = len(first) + len(others)
    found = world.messages(count)
    assert [m for m in found if not (m.dead or m.event) and m.partition == 0] == first
    assert [m for m in found if m.event and m.partition == 1] == others[4:8]
    assert sorted(map(repr, found)) == sorted(map(repr, [*first, *others]))
    assert [member.source.committed(p) for p in (0, 1)] == [Committed(5, "1"), Committed(4, "1")]
    log = world.changelog()
    assert contents(states_of(log, 0)) == [(b"sk", b"1"), (b"m", b"\x00")]
    assert contents(states_of(log, 1)) == [(b"m", b"")]
    log.close()
    sink.close()
    assert len(world.messages(count)) == count
    member.source.close()


def check_order_within_a_partition_is_kept(world: World) -> None:
    """Over many transactions, outputs come in the order in which they were committed, also states."""
    member, sink = begun(world)
    for number in range(20):
        marker = states(0, (b"s", b"%d" % number), (b"m", b"%d" % number))
        sink.commit(transaction(outputs(0, b"a%d" % number, b"b%d" % number), marker), member.membership)
    sink.close()
    found = [message.value for message in world.messages(40)]
    assert found == [b"%c%d" % (which, number) for number in range(20) for which in b"ab"]
    log = world.changelog()
    records = states_of(log, 0)
    assert [r.value for r in records if r.key == b"m"] == [b"%d" % number for number in range(20)]
    assert [r.offset for r in records] == sorted({r.offset for r in records})
    log.close()
    member.source.close()


def check_states_are_read_from_a_position(world: World) -> None:
    """A mirror that has read up to a position goes on there, and one that a commit gave is such a position."""
    member, sink = begun(world)
    after = sink.commit(transaction(states=states(0, (b"a", b"1"), (b"m", b"1"))), member.membership)[0]
    log = world.changelog()
    assert contents(states_of(log, 0, after)) == []
    sink.commit(transaction(states=states(0, (b"a", None), (b"m", b"2"))), member.membership)
    assert contents(states_of(log, 0, after)) == [(b"a", None), (b"m", b"2")]
    assert contents(states_of(log, 0))[-2:] == [(b"a", None), (b"m", b"2")]
    assert log.open(0)
    while not log.finished(0):
        log.read(1)
    end = log.position(0)
    log.shut(0)
    assert contents(states_of(log, 0, end)) == []
    assert not log.open(0, end + 1000)
    log.close()
    sink.close()
    member.source.close()


def check_a_changelog_has_an_end_wherever_it_is(world: World) -> None:
    """Nothing was written; partitions are open side by side; what is written after an opening may stay unread."""
    log = world.changelog()
    assert states_of(log, 0) == []
    member, sink = begun(world)
    written = [(b"%d" % number, b"x") for number in range(10)]
    both = [*states(0, *written), *states(1, *written[:5])]
    sink.commit(transaction(states=both, offsets={0: Committed(0, ""), 1: Committed(0, "")}), member.membership)
    assert log.open(0)
    assert log.open(1)
    sink.commit(transaction(states=states(1, (b"late", b"x")), offsets={1: Committed(0, "")}), member.membership)
    found: dict[int, list[tuple[bytes, bytes | None]]] = {0: [], 1: []}
    deadline = time.monotonic() + DEADLINE_S
    while not (log.finished(0) and log.finished(1)):
        assert time.monotonic() < deadline, found
        for record in log.read(4):
            found[record.partition].append((record.key, record.value))
    assert found[0] == written
    assert found[1][:5] == written[:5]
    log.close()
    sink.close()
    member.source.close()


def check_nothing_is_committed_before_it_is_recovered(world: World) -> None:
    """Recovering twice harms nothing; a transaction without messages and states still commits its offsets."""
    member, sink = begun(world)
    sink.recover()
    sink.commit(transaction(offsets={1: Committed(7, "x")}), member.membership)
    assert member.source.committed(1) == Committed(7, "x")
    assert world.messages(0) == []
    sink.close()
    member.source.close()


def check_an_old_membership_is_refused(world: World) -> None:
    """After a partition moved, a transaction that was begun before is not committed, nor any part of it."""
    first, sink = begun(world)
    old = first.membership
    second = Member(world.source())
    poll_until(lambda: apart(first, second), first, second, what="a partition each")
    late = [*outputs(0, b"zombie"), Message(False, 0, b"k", b"zombie", (), event=True)]
    with pytest.raises(Undecided):
        sink.commit(transaction(late, states(0, (b"m", b"zombie"))), old)
    with pytest.raises(Undecided):
        sink.commit(transaction(), old)
    sink.recover()
    partition = min(first.owned)
    offsets = {partition: Committed(1, "new")}
    sink.commit(transaction(outputs(partition, b"member"), offsets=offsets), first.membership)
    assert [message.value for message in world.messages(1)] == [b"member"]
    log = world.changelog()
    assert states_of(log, 0) == []  # though the log ends with what was aborted
    assert first.source.committed(partition) == Committed(1, "new")
    for closing in (log, sink, first.source, second.source):
        closing.close()


def check_a_successor_fences_who_was_before(world: World) -> None:
    """Two processes with one instance id: the older sink may not write again, and its member is told."""
    first, sink = begun(world, "one")
    sink.commit(transaction(outputs(0, b"1"), states(0, (b"m", b"1"))), first.membership)
    second, successor = begun(world, "one")
    with pytest.raises(Fenced):
        sink.commit(transaction(outputs(0, b"zombie"), states(0, (b"m", b"zombie"))), first.membership)
    successor.commit(transaction(outputs(0, b"2"), states(0, (b"m", b"2"))), second.membership)
    with pytest.raises(Fenced):
        poll_until(lambda: False, first)
    assert [message.value for message in world.messages(2)] == [b"1", b"2"]
    log = world.changelog()
    assert contents(states_of(log, 0)) == [(b"m", b"1"), (b"m", b"2")]
    for closing in (log, sink, successor, first.source, second.source):
        closing.close()


def check_what_is_refused_is_named_and_the_next_works(world: World) -> None:
    """A message that is too large fails its transaction whole, be it an event's; without it, the same goes through."""
    member, sink = begun(world)
    for event in (False, True):
        large = Message(False, 1, b"large", b"x" * TOO_LARGE_BYTES, (), event=event)
        with pytest.raises(Rejected, match="large"):
            sink.commit(transaction([*outputs(0, b"a"), large], states(0, (b"m", b"1"))), member.membership)
        sink.recover()
        assert member.source.committed(0) is None
        poll_until(lambda: member.membership is not None, member)
    sink.commit(transaction(outputs(0, b"a"), states(0, (b"m", b"2"))), member.membership)
    assert [message.value for message in world.messages(1)] == [b"a"]
    log = world.changelog()
    assert contents(states_of(log, 0)) == [(b"m", b"2")]
    for closing in (log, sink, member.source):
        closing.close()


CHECKS: tuple[Callable[[World], None], ...] = (
    check_records_come_as_they_were_written,
    check_nothing_comes_before_a_seek,
    check_a_poll_is_bounded_and_in_order,
    check_a_seek_may_go_back_and_forth,
    check_a_pause_lasts_until_a_seek,
    check_what_is_committed_is_found_by_the_next_owner,
    check_bounds_and_times,
    check_a_poll_waits_no_longer_than_asked,
    check_the_input_is_known_again,
    check_a_transaction_is_there_whole,
    check_order_within_a_partition_is_kept,
    check_states_are_read_from_a_position,
    check_a_changelog_has_an_end_wherever_it_is,
    check_nothing_is_committed_before_it_is_recovered,
)
GROUP_CHECKS: tuple[Callable[[World], None], ...] = (
    check_an_old_membership_is_refused,
    check_a_successor_fences_who_was_before,
    check_what_is_refused_is_named_and_the_next_works,
)
