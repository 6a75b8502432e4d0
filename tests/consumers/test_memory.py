"""The memory adapters: they keep the words of `ports`, and their scripted faults are what they say."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from statestep.consumers.memory import MemoryBroker, MemorySink, MemorySource
from statestep.consumers.ports import BrokerError, Change, CommitRefused, Committed, Message

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
    assert source.poll(0, 10) == ([Change("lost", (0,)), Change("assigned", (1,))], [])
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
    assert source.poll(0, 10) == ([Change("lost", (0,)), Change("assigned", (0,))], [])
    for offset in (2, 6):
        with pytest.raises(BrokerError, match=f"offset {offset} of partition 0 is not kept"):
            source.seek(0, offset)
    source.seek(0, 3)
    assert [record.offset for record in source.poll(0, 10).records] == [3, 4]


def test_scripted_failures_fail_so_often() -> None:
    """A failed flush loses what it held, a refused commit keeps nothing; the next ones succeed."""
    broker = MemoryBroker(1)
    sink, source = MemorySink(broker), MemorySource(broker)
    sink.fail_next()
    sink.send([message(b"lost"), message(b"lost too")])
    with pytest.raises(BrokerError, match="2 messages were not acknowledged"):
        sink.flush()
    sink.send([message(b"kept")])
    sink.close()
    assert [m.value for m in broker.outputs] == [b"kept"]
    source.refuse_next(2)
    for _ in range(2):
        with pytest.raises(CommitRefused):
            source.commit({0: Committed(1, "")})
    assert source.committed(0) is None
    source.commit({0: Committed(1, "")})
    assert source.committed(0) == Committed(1, "")
