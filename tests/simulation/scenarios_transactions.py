"""Scenarios of transactions and what is read of them."""

from __future__ import annotations

import pytest
from kafka.admin import OffsetSpec
from kafka.errors import (
    CommitFailedError,
    InvalidProducerEpochError,
    InvalidTimestampError,
    InvalidTxnStateError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumberError,
    ProducerFencedError,
    UnknownTopicOrPartitionError,
)
from kafka.structs import OffsetAndMetadata, TopicPartition

from .bench import HOUR_MS, Bench, Member, committed_in, scenario, settled, transactional, until, write


@scenario
def markers_take_offsets(bench: Bench) -> None:
    """Each commit and each abort takes one offset in each partition that it wrote to; aborted records stay hidden."""
    topic = bench.topic(partitions=2)
    producer = transactional(bench)
    producer.begin_transaction()
    write(producer, topic, b"a", b"b")
    write(producer, topic, b"x", partition=1)
    producer.commit_transaction()
    producer.begin_transaction()
    write(producer, topic, b"c")
    producer.abort_transaction()
    producer.begin_transaction()
    (sent,) = write(producer, topic, b"d")
    assert sent.value.offset == 5
    producer.commit_transaction()
    assert committed_in(bench, topic) == [(0, b"a"), (1, b"b"), (5, b"d")]
    assert committed_in(bench, topic, partition=1) == [(0, b"x")]
    admin = bench.admin()
    both = [TopicPartition(topic, number) for number in (0, 1)]

    def ends() -> list[int]:
        found = admin.list_partition_offsets(dict.fromkeys(both, OffsetSpec.LATEST))
        return [found[tp].offset for tp in both]

    until(bench, lambda: ends() == [7, 2])


@scenario
def the_end_of_a_committed_reader_is_the_stable_offset(bench: Bench) -> None:
    """K14: `end_offsets` of a reader of committed records stops at an open transaction, the admin's does not."""
    topic = bench.topic()
    tp = TopicPartition(topic, 0)
    producer = transactional(bench)
    producer.begin_transaction()
    write(producer, topic, b"a", b"b")
    reader = bench.consumer(isolation_level="read_committed", group_id=None)
    anyone = bench.consumer(isolation_level="read_uncommitted", group_id=None)
    assert reader.end_offsets([tp]) == {tp: 0}
    assert anyone.end_offsets([tp]) == {tp: 2}
    assert bench.admin().list_partition_offsets({tp: OffsetSpec.LATEST})[tp].offset == 2
    producer.commit_transaction()
    until(bench, lambda: reader.end_offsets([tp]) == {tp: 3})


@scenario
def a_second_producer_fences_the_first(bench: Bench) -> None:
    """Initialising an id aborts what its former producer had open, and fences that one for good."""
    topic, name = bench.topic(), bench.name("txn")
    first = transactional(bench, name)
    first.begin_transaction()
    write(first, topic, b"lost")
    second = transactional(bench, name)
    with pytest.raises(ProducerFencedError):
        first.commit_transaction()
    with pytest.raises(KafkaError, match="error state"):
        first.begin_transaction()
    second.begin_transaction()
    write(second, topic, b"kept")
    second.commit_transaction()
    assert [value for _, value in committed_in(bench, topic)] == [b"kept"]


@scenario
def a_fenced_producer_cannot_write(bench: Bench) -> None:
    """What a fenced producer sends fails, its future says so, and its transaction cannot be committed."""
    topic, name = bench.topic(), bench.name("txn")
    first = transactional(bench, name)
    first.begin_transaction()
    write(first, topic, b"lost")
    transactional(bench, name)
    (late,) = write(first, topic, b"late")
    assert late.failed()
    with pytest.raises(KafkaError):
        first.commit_transaction()
    assert committed_in(bench, topic) == []


@scenario
def offsets_of_a_transaction_count_with_its_commit(bench: Bench) -> None:
    """Offsets and their metadata are there once the transaction is committed, and never if it is aborted."""
    topic, group = bench.topic(), bench.name("group")
    tp = TopicPartition(topic, 0)
    member = Member(bench, topic, group)
    settled(bench, 1, member)
    producer = transactional(bench)
    for offset, commit in [(5, True), (7, False)]:
        producer.begin_transaction()
        producer.send_offsets_to_transaction({tp: OffsetAndMetadata(offset, f"note {offset}", -1)}, member.me)
        if commit:
            producer.commit_transaction()
        else:
            producer.abort_transaction()
    found = member.ask(lambda consumer: consumer.committed(tp, metadata=True, timeout_ms=10_000))
    assert (found.offset, found.metadata) == (5, "note 5")


@scenario
def a_transaction_times_out(bench: Bench) -> None:
    """The broker aborts a transaction that is open for too long; its producer is fenced."""
    topic = bench.topic()
    producer = transactional(bench, transaction_timeout_ms=1_000)
    producer.begin_transaction()
    write(producer, topic, b"a")
    tp = TopicPartition(topic, 0)
    reader = bench.consumer(isolation_level="read_committed", group_id=None)
    until(bench, lambda: reader.end_offsets([tp]) == {tp: 2})
    with pytest.raises(ProducerFencedError):
        producer.commit_transaction()
    assert committed_in(bench, topic) == []


@scenario
def an_empty_transaction_asks_nobody(bench: Bench) -> None:
    """A transaction without records and offsets ends in the client, commit or abort."""
    producer = transactional(bench, transaction_timeout_ms=1_000)
    for _ in range(2):
        producer.begin_transaction()
        producer.commit_transaction()
        producer.begin_transaction()
        producer.abort_transaction()
    with pytest.raises(KafkaError, match="Invalid transition"):
        producer.commit_transaction()


@scenario
def a_record_too_large_spoils_its_transaction(bench: Bench) -> None:
    """A record over the topic's limit fails by its future; the transaction can only be aborted, the next one fails too.

    The batch that failed has used up a sequence number: the broker misses it, so the next batch is out of order.
    """
    topic = bench.topic(max_message_bytes="2000")
    producer = transactional(bench)
    producer.begin_transaction()
    (sent,) = write(producer, topic, b"x" * 3000)
    assert isinstance(sent.exception, MessageSizeTooLargeError)
    with pytest.raises(KafkaError, match="error state"):
        producer.commit_transaction()
    producer.abort_transaction()
    producer.begin_transaction()
    (sent,) = write(producer, topic, b"small")
    assert isinstance(sent.exception, OutOfOrderSequenceNumberError)
    with pytest.raises(KafkaError, match="Invalid transition"):
        producer.commit_transaction()
    assert committed_in(bench, topic) == []


@scenario
def a_record_too_large_for_the_client(bench: Bench) -> None:
    """A record over the client's own limit is refused by `send`, and nothing is spoilt."""
    topic = bench.topic()
    producer = transactional(bench)
    producer.begin_transaction()
    with pytest.raises(MessageSizeTooLargeError):
        producer.send(topic, value=b"x" * 2_000_000, key=b"k", partition=0)
    write(producer, topic, b"small")
    producer.commit_transaction()
    assert committed_in(bench, topic) == [(0, b"small")]


@scenario
def a_record_from_the_future_spoils_its_transaction(bench: Bench) -> None:
    """A record stamped more than an hour ahead is refused by its future."""
    topic = bench.topic()
    producer = transactional(bench)
    producer.begin_transaction()
    sent = producer.send(topic, value=b"x", key=b"k", partition=0, timestamp_ms=bench.wall_ms() + 2 * HOUR_MS)
    producer.flush()
    assert isinstance(sent.exception, InvalidTimestampError)
    with pytest.raises(KafkaError, match="error state"):
        producer.commit_transaction()
    producer.abort_transaction()


@scenario
def stale_offsets_go_out_with_the_next_transaction(bench: Bench) -> None:
    """K3: what a refused `send_offsets_to_transaction` left behind is committed by the producer's next transaction."""
    topic, group = bench.topic(partitions=2), bench.name("group")
    mine, other = TopicPartition(topic, 0), TopicPartition(topic, 1)
    member = Member(bench, topic, group)
    settled(bench, 2, member)
    producer = transactional(bench)
    producer.begin_transaction()
    with pytest.raises(CommitFailedError):
        stale = member.me._replace(generation_id=99)
        producer.send_offsets_to_transaction({other: OffsetAndMetadata(6, "", -1)}, stale)
    producer.abort_transaction()
    producer.begin_transaction()
    producer.send_offsets_to_transaction({mine: OffsetAndMetadata(1, "", -1)}, member.me)
    producer.commit_transaction()
    assert member.committed(mine) == 1
    assert member.committed(other) == 6


@scenario
def a_batch_that_is_given_up_does_not_fail_the_transaction(bench: Bench) -> None:
    """K1: a batch that nobody takes in time fails its futures, and the transaction is committed without it."""
    topic, doomed = bench.topic(), bench.topic()
    producer = transactional(bench, request_timeout_ms=1_000, delivery_timeout_ms=3_000, linger_ms=1_000)
    producer.begin_transaction()
    write(producer, doomed, b"in time")
    written, lost = [producer.send(name, value=b"x", key=b"k", partition=0) for name in (topic, doomed)]
    bench.admin().delete_topics([doomed])
    producer.flush()
    assert written.succeeded()
    assert isinstance(lost.exception, KafkaTimeoutError | UnknownTopicOrPartitionError), lost.exception
    producer.commit_transaction()
    assert committed_in(bench, topic) == [(0, b"x")]


@scenario
def a_commit_may_lie(bench: Bench) -> None:
    """K2: a batch that is out of order raises the epoch; a commit that waits for it returns as if all were well."""
    topic, other = bench.topic(max_message_bytes="2000"), bench.topic()
    producer = transactional(bench)
    producer.begin_transaction()
    write(producer, topic, b"x" * 3000)  # uses up a sequence number that the broker misses from now on
    producer.abort_transaction()
    producer.begin_transaction()
    write(producer, other, b"kept?")
    lost = producer.send(topic, value=b"small", key=b"k", partition=0)
    producer.commit_transaction()
    assert isinstance(lost.exception, OutOfOrderSequenceNumberError)
    tp = TopicPartition(other, 0)
    reader = bench.consumer(isolation_level="read_committed", group_id=None)
    until(bench, lambda: reader.end_offsets([tp]) == {tp: 2})  # the marker of an abort
    assert committed_in(bench, other) == []


@scenario
def transactions_follow_each_other(bench: Bench) -> None:
    """A producer goes on through many transactions without pause, though markers are still under way."""
    topic = bench.topic()
    producer = transactional(bench)
    for number in range(5):
        producer.begin_transaction()
        producer.send(topic, value=b"%d" % number, key=b"k", partition=0)
        producer.commit_transaction()
    assert [value for _, value in committed_in(bench, topic)] == [b"%d" % number for number in range(5)]


@scenario
def a_producer_that_timed_out_goes_on(bench: Bench) -> None:
    """Who writes on after its transaction timed out fails by its future, and is given the next epoch unasked."""
    topic = bench.topic()
    tp = TopicPartition(topic, 0)
    producer = transactional(bench, transaction_timeout_ms=1_000)
    producer.begin_transaction()
    write(producer, topic, b"lost")
    reader = bench.consumer(isolation_level="read_committed", group_id=None)
    until(bench, lambda: reader.end_offsets([tp]) == {tp: 2})
    (late,) = write(producer, topic, b"late")
    assert isinstance(late.exception, InvalidProducerEpochError | InvalidTxnStateError), late.exception
    bench.sleep(2.0)
    producer.begin_transaction()
    write(producer, topic, b"kept")
    producer.commit_transaction()
    assert [value for _, value in committed_in(bench, topic)] == [b"kept"]
