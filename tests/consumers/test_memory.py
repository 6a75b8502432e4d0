"""The memory adapters: they keep the words of `ports`, and their scripted faults are what they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from statestep.consumers.memory import MemoryBroker, MemoryChangelog, MemorySink, MemorySource
from statestep.consumers.ports import BrokerError, Change, Committed, Message, StateRecord, Transaction, Undecided

from .conformance import CHECKS, MemoryWorld, World


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_memory_conforms(check: Callable[[World], None]) -> None:
    """Every check of the conformance suite holds for the memory adapters."""
    check(MemoryWorld())


def message(value: bytes) -> Message:
    return Message(False, 0, b"k", value, ())


def test_a_source_is_exhausted_once_everything_was_read() -> None:
    """Not before it has joined, not while changes wait, and not while a feed may still bring more."""
    broker = MemoryBroker(1)
    broker.append(0, b"k", b"1")
    source = MemorySource(broker)
    assert not source.exhausted
    source.poll(0, 10)
    source.seek(0, 0)
    assert not source.exhausted
    source.poll(0, 10)
    assert source.exhausted
    source.revoke(0)
    assert not source.exhausted

    portions = iter([True, True, False])
    fed = MemorySource(broker, feed=lambda: next(portions))
    fed.poll(0, 10)
    fed.seek(0, 1)
    assert not fed.exhausted
    fed.poll(0, 10)
    assert not fed.exhausted
    fed.poll(0, 10)
    assert fed.exhausted


def test_partitions_move_as_they_are_told_to() -> None:
    """Changes come in order with the next poll; of what was taken away nothing is read, sought to or not."""
    broker = MemoryBroker(2)
    for partition in (0, 1):
        broker.append(partition, b"k", b"1")
    source = MemorySource(broker, partitions=[0])
    assert source.poll(0, 10).changes == [Change("assigned", (0,))]
    source.seek(0, 0)
    source.revoke(0, lost=True)
    source.assign(1)
    assert source.poll(0, 10)[:2] == ([Change("lost", (0,)), Change("assigned", (1,))], [])
    source.seek(0, 0)
    source.seek(1, 0)
    assert [record.partition for record in source.poll(0, 10).records] == [1]
    source.close()
    assert source.poll(0, 10).records == []


def test_retention_takes_a_reader_by_surprise() -> None:
    """A place that is deleted before it was read comes back as lost and assigned, and cannot be sought to."""
    broker = MemoryBroker(1)
    for number in range(5):
        broker.append(0, b"k", b"%d" % number)
    source = MemorySource(broker)
    source.poll(0, 10)
    source.seek(0, 1)
    broker.delete_before(0, 3)
    broker.delete_before(0, 2)  # what is gone stays gone
    assert source.bounds(0) == (3, 5)
    assert source.poll(0, 10)[:2] == ([Change("lost", (0,)), Change("assigned", (0,))], [])
    for offset in (2, 6):
        with pytest.raises(BrokerError, match=f"offset {offset} of partition 0 is not kept"):
            source.seek(0, offset)
    source.seek(0, 3)
    assert [record.offset for record in source.poll(0, 10).records] == [3, 4]


def transaction(value: bytes, offset: int, partition: int = 0) -> Transaction:
    states = [StateRecord(partition, b"m", value)]
    return Transaction([message(value)], states, {partition: Committed(offset, "")})


def test_scripted_failures_lose_a_transaction_or_the_news_of_it() -> None:
    """In turn: one of which nothing counts, one that counts though it raises, and then all is well."""
    broker = MemoryBroker(1)
    sink, source, changelog = MemorySink(broker), MemorySource(broker), MemoryChangelog(broker)
    source.poll(0, 10)
    sink.fail_next()
    sink.fail_next(counts=True)
    with pytest.raises(Undecided):
        sink.commit(transaction(b"lost", 1), source)
    assert (source.committed(0), broker.messages) == (None, [])
    assert changelog.open(0) and changelog.finished(0)
    with pytest.raises(Undecided):
        sink.commit(transaction(b"kept", 2), source)
    assert source.committed(0) == Committed(2, "")
    assert sink.commit(transaction(b"kept too", 3), source) == {0: 2}
    assert [m.value for m in broker.outputs] == [b"kept", b"kept too"]
    assert changelog.open(0)
    assert [(record.value, record.offset) for record in changelog.read(10)] == [(b"kept", 0), (b"kept too", 1)]
    assert changelog.open(0, 1) and [record.offset for record in changelog.read(10)] == [1]
    assert not changelog.open(0, 3)


def test_only_the_owner_of_a_partition_writes_for_it() -> None:
    """Who has lost it, be it without notice, is refused, and nothing of the transaction counts."""
    broker = MemoryBroker(2)
    first, second, sink = MemorySource(broker, [0, 1]), MemorySource(broker, [1]), MemorySink(broker)
    before = first.poll(0, 10).membership
    second.poll(0, 10)
    with pytest.raises(Undecided, match="partition 1 belongs to another member"):
        sink.commit(transaction(b"zombie", 1, 1), before)
    assert broker.offsets == {}
    sink.commit(transaction(b"mine", 1, 0), before)
    assert broker.offsets == {0: Committed(1, "")}


def test_an_unsettled_group_lets_nothing_be_committed() -> None:
    """For so many polls there is no membership."""
    source = MemorySource(MemoryBroker(1))
    source.unsettle(2)
    assert [source.poll(0, 10).membership is None for _ in range(4)] == [True, True, False, False]
