"""Traps of kafka-python 3.0.12, each seen on a real broker, and beside it what keeps the adapter out of it.

The first half of a test fails loudly once the library behaves otherwise: then its guard may go. K1 to K15 are the
names by which the adapter's authors know them.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition, codec
from kafka.admin import OffsetSpec
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import CommitFailedError, KafkaError
from kafka.record import default_records
from kafka.structs import ConsumerGroupMetadata, MemberState, OffsetAndMetadata

from statestep.consumers.kafka_client import Clients
from statestep.consumers.kafka_codecs import DECODERS, bounded
from statestep.consumers.kafka_sink import KafkaSink
from statestep.consumers.ports import (
    Blocked,
    BrokerError,
    Committed,
    Fenced,
    Polled,
    StateRecord,
    Transaction,
    Undecided,
)

from ..consumers.conformance import Member, apart, begun, member_of, outputs, poll_until, states, states_of, transaction
from .kafka_server import KafkaServer
from .service_process import wait_until
from .test_conformance import KafkaWorld

FAST = {"request_timeout_ms": 1000, "delivery_timeout_ms": 2000, "retry_backoff_ms": 20}


@pytest.fixture
def world(bootstrap_servers: str, topic: Callable[..., str]) -> Iterator[KafkaWorld]:
    made = KafkaWorld(bootstrap_servers, topic)
    yield made
    made.close()


@pytest.fixture
def producer(world: KafkaWorld) -> Iterator[Any]:
    """A transactional producer as the library makes it, ready to begin."""
    with KafkaProducer(**world.properties, transactional_id=f"raw-{uuid.uuid4().hex}", **FAST) as made:
        made.init_transactions()
        yield made


def read(world: KafkaWorld, *topics: str) -> list[bytes | None]:
    """Every committed value of some topics."""
    with KafkaConsumer(**world.properties, isolation_level="read_committed") as consumer:
        parts = [TopicPartition(name, p) for name in topics for p in consumer.partitions_for_topic(name)]
        ends = consumer.end_offsets(parts)
        consumer.assign(parts)
        consumer.seek_to_beginning()
        found: list[bytes | None] = []
        while any(consumer.position(tp) < ends[tp] for tp in parts):
            found += [record.value for records in consumer.poll(100).values() for record in records]
        return found


def subscribed(world: KafkaWorld, **how: Any) -> Any:
    """A member as the library makes it, who knows the partitions before it first joins: see K17."""
    consumer = KafkaConsumer(world.input, **world.properties, **how)
    consumer.topics()
    return consumer


def joined(consumer: Any) -> None:
    """Poll until both partitions are assigned."""

    def polled() -> bool:
        consumer.poll(100)
        return len(consumer.assignment()) == 2

    wait_until(polled, "an assignment")


def delete(world: KafkaWorld, name: str) -> None:
    """Delete a topic for good: what is sent to it from now on is tried again until its time is up."""
    with KafkaAdminClient(**world.properties) as admin:
        admin.delete_topics([name])
        while admin.describe_topics([name])[0]["error_code"] == 0:
            pass


def test_k1_k9_a_batch_that_was_given_up_does_not_fail_the_transaction(
    world: KafkaWorld, producer: Any, topic: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    """The library commits what is left, and its sender trips over the rest. The sink fails, and nothing is there."""
    gone, going = (topic(2, keep=False) for _ in range(2))
    producer.begin_transaction()
    producer.send(world.output, b"there", partition=0)
    producer.send(gone, b"1", partition=0).get(10)
    delete(world, gone)
    lost = producer.send(gone, b"2", partition=0)
    producer.commit_transaction()
    assert lost.failed()
    assert read(world, world.output) == [b"there"]
    assert "Cannot reset producer state for a transactional producer" in caplog.text

    class Losing(KafkaProducer):  # type: ignore[misc]  # kafka-python has no types
        """Loses a topic in the middle of a transaction."""

        def send(self, name: str, **how: Any) -> Any:
            if how["value"] == b"lost":
                self.flush()
                delete(world, name)
            return super().send(name, **how)

    world.counts[going] = world.counts[world.input]
    member = member_of(world.source())
    sink = short(world, Clients(producer=Losing), output=going)
    sink.recover()
    with pytest.raises(Undecided, match="1 of 3 records were not acknowledged, among them the output of partition 1"):
        sink.commit(transaction(outputs(1, b"there", b"lost"), states(0, (b"m", b"1"))), member.membership)
    sink.recover()
    log = world.changelog()
    assert states_of(log, 0) == []
    assert member.source.committed(0) is None
    for closing in (log, sink, member.source):
        closing.close()


def patiently(ask: Callable[[], Any]) -> Any:
    """Ask as the service does: again, while the broker has no answer yet."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return ask()
        except BrokerError:
            assert time.monotonic() < deadline


def short(world: KafkaWorld, clients: Clients | None = None, output: str | None = None) -> KafkaSink:
    """A sink that gives up soon."""
    names = (world.input, world.app_id, world.properties, output or world.output, world.dead, world.counts)
    return KafkaSink(*names, transaction_timeout_ms=2500, clients=clients or Clients())


def test_k2_a_transaction_that_the_broker_aborted_is_reported_as_committed(world: KafkaWorld, producer: Any) -> None:
    """After a sequence that is out of order the library starts an epoch anew and says that all is well."""
    out = TopicPartition(world.output, 0)
    producer.begin_transaction()
    producer.send(*out[:1], b"first", partition=0).get(10)
    producer._transaction_manager.set_sequence_number(out, 100)
    lost = producer.send(world.output, b"second", partition=0)
    producer.commit_transaction()
    assert lost.failed()
    assert read(world, world.output) == []

    member, sink = begun(world)
    sink.commit(transaction(outputs(0, b"1")), member.membership)
    assert isinstance(sink, KafkaSink)
    sink._producer._transaction_manager.set_sequence_number(out, 100)
    with pytest.raises(Undecided):
        sink.commit(transaction(outputs(0, b"2")), member.membership)
    sink.recover()
    sink.commit(transaction(outputs(0, b"3")), member.membership)
    assert read(world, world.output) == [b"1", b"3"]
    sink.close()
    member.source.close()


def test_k3_offsets_of_a_failed_transaction_go_along_with_the_next(world: KafkaWorld, producer: Any) -> None:
    """The library commits what was refused before. The sink's next transaction holds its own offsets alone."""
    parts = [TopicPartition(world.input, p) for p in (0, 1)]
    group, stale = f"raw-{uuid.uuid4().hex}", {}
    with subscribed(world, group_id=group) as consumer:
        joined(consumer)
        good = consumer.group_metadata()
        stale = ConsumerGroupMetadata(group, good.generation_id - 1, good.member_id, None, MemberState.STABLE)
        producer.begin_transaction()
        with pytest.raises(CommitFailedError):
            producer.send_offsets_to_transaction({parts[0]: OffsetAndMetadata(77, "stale", -1)}, stale)
        producer.abort_transaction()
        producer.begin_transaction()
        producer.send_offsets_to_transaction({parts[1]: OffsetAndMetadata(5, "", -1)}, good)
        producer.commit_transaction()
        # The offsets of a transaction count a moment after its commit was answered.
        wait_until(lambda: [consumer.committed(tp) for tp in parts] == [77, 5], "the offsets of both transactions")

    member, sink = begun(world)
    m = member.membership
    old = ConsumerGroupMetadata(m.group_id, m.generation_id - 1, m.member_id, None, m.state)
    with pytest.raises(Undecided):
        sink.commit(transaction(offsets={0: Committed(77, "stale")}), old)
    with pytest.raises(Undecided, match="recover"):
        sink.commit(transaction(offsets={1: Committed(5, "")}), m)
    sink.recover()
    sink.commit(transaction(offsets={1: Committed(5, "")}), m)
    assert [member.source.committed(p) for p in (0, 1)] == [None, Committed(5, "")]
    sink.close()
    member.source.close()


def test_k4_a_membership_that_was_lost_is_fenced_by_nobody(world: KafkaWorld, producer: Any) -> None:
    """The broker takes offsets of nobody in particular, and the library names nobody. The source hands none on."""
    member = member_of(world.source())
    producer.begin_transaction()
    nobody = ConsumerGroupMetadata(world.app_id, -1, "", None, MemberState.UNJOINED)
    producer.send_offsets_to_transaction({TopicPartition(world.input, 0): OffsetAndMetadata(9, "", -1)}, nobody)
    producer.commit_transaction()
    assert member.source.committed(0) == Committed(9, "")

    source: Any = member.source
    source._consumer._coordinator.reset_generation()  # as an answer to a heartbeat does it
    metadata = source._consumer.group_metadata()
    assert (metadata.generation_id, metadata.member_id) == (-1, "")
    assert not source._holds(metadata)
    kinds = [change.kind for change in member.poll(5.0).changes]
    poll_until(lambda: len(member.owned) == 2 and member.membership is not None, member)
    assert kinds[:1] == ["lost"]
    source.close()


def test_k5_a_commit_waits_for_a_broker_without_end(tmp_path: Path) -> None:
    """The library still waits long after its timeouts. The sink gives up, is recovered, and nothing is committed.

    In a process of its own: the library leaves a socket behind for every connection that is refused.
    """
    command = [sys.executable, "-m", __name__, str(tmp_path)]
    ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr[-5000:]


def commit_without_a_broker(kafka: KafkaServer) -> None:
    """Loses the broker in the middle of a commit, and goes on once it is back."""
    properties = {"bootstrap_servers": [kafka.bootstrap_servers]}
    with KafkaAdminClient(**properties) as admin:
        admin.create_topics({name: {"num_partitions": 2} for name in ("in", "out", "dead")}, wait_for_metadata=True)

    class Killing(KafkaProducer):  # type: ignore[misc]  # kafka-python has no types
        """Loses its broker once everything is written."""

        armed = True

        def send_offsets_to_transaction(self, offsets: Any, group_metadata: Any) -> None:
            if Killing.armed:
                Killing.armed = False
                kafka.kill()
            super().send_offsets_to_transaction(offsets, group_metadata)

    names = iter(("in", "out", "dead", "events"))
    world = KafkaWorld(kafka.bootstrap_servers, lambda _partitions: next(names))
    member = member_of(world.source())
    sink = short(world, Clients(producer=Killing))
    sink.recover()
    with pytest.raises(Blocked, match="did not return within 5 s"):
        sink.commit(transaction(outputs(0, b"1"), states(0, (b"m", b"1"))), member.membership)
    with pytest.raises(BrokerError, match="no Kafka broker answers"):
        sink.recover()
    assert member.poll(0.5).records == []  # and the group is waited for in the meantime
    kafka.start()
    sink.recover()
    poll_until(lambda: member.membership is not None and len(member.owned) == 2, member)
    assert read(world, "out") == []
    assert patiently(lambda: member.source.committed(0)) is None
    sink.commit(transaction(outputs(0, b"2"), states(0, (b"m", b"2"))), member.membership)
    assert read(world, "out") == [b"2"]
    sink.close()
    member.source.close()
    world.producer.close()


def test_k6_k12_what_the_library_does_unasked_is_not_asked_for(world: KafkaWorld) -> None:
    """It decodes, commits, resets offsets and makes topics by itself if told to, or if nobody says no."""
    defaults = KafkaConsumer.DEFAULT_CONFIG
    assert defaults["enable_auto_commit"]
    assert defaults["auto_offset_reset"] == "latest"
    assert defaults["allow_auto_create_topics"]
    assert defaults["isolation_level"] == "read_uncommitted"
    source: Any = world.source()
    config = source._consumer.config
    assert config["key_deserializer"] is None
    assert config["value_deserializer"] is None
    assert not config["enable_auto_commit"]
    assert config["auto_offset_reset"] == "none"
    assert not config["allow_auto_create_topics"]
    assert config["isolation_level"] == "read_committed"
    source.close()


def test_k7_a_static_member_whose_place_was_taken_polls_on(world: KafkaWorld) -> None:
    """The library hears it with a heartbeat and keeps it to itself. The source raises."""
    how: dict[str, Any] = {"enable_auto_commit": False, "group_id": f"raw-{uuid.uuid4().hex}"}
    how |= {"group_instance_id": "one", "heartbeat_interval_ms": 200, "session_timeout_ms": 5000}
    how |= {"partition_assignment_strategy": [CooperativeStickyAssignor]}
    first, second = (subscribed(world, **how) for _ in range(2))
    joined(first)
    joined(second)
    coordinator = first._coordinator
    wait_until(lambda: first.poll(100) == {} and not coordinator._heartbeat_enabled, "the end of its heartbeats")
    assert first.group_metadata().state is MemberState.STABLE
    assert not coordinator.need_rejoin()
    assert first.poll(500) == {}
    first.close()
    second.close()

    older, newer = Member(world.source("one")), Member(world.source("one"))
    poll_until(lambda: len(older.owned) == 2, older)
    poll_until(lambda: len(newer.owned) == 2, newer)
    with pytest.raises(Fenced, match="instance id 'one'"):
        poll_until(lambda: False, older)
    assert newer.poll().membership is not None
    older.source.close()
    newer.source.close()


def test_k8_a_position_stays_where_it_was_after_an_abort(world: KafkaWorld) -> None:
    """Records of a transaction that failed do not come again by themselves: who aborts must seek."""
    for number in range(3):
        world.append(0, b"k", b"%d" % number)
    member, sink = begun(world)
    member.source.seek(0, 0)
    poll_until(lambda: len(member.records) == 3, member)
    old = member.membership
    stale = ConsumerGroupMetadata(old.group_id, old.generation_id - 1, old.member_id, None, old.state)
    with pytest.raises(Undecided):
        sink.commit(transaction(offsets={0: Committed(3, "")}), stale)
    sink.recover()
    assert not member.poll(0.5).records
    member.source.seek(0, 0)
    poll_until(lambda: len(member.records) == 6, member)
    assert [record.offset for record in member.records] == [0, 1, 2, 0, 1, 2]
    sink.close()
    member.source.close()


def test_k10_k11_the_producer_is_bounded_by_its_user_alone(world: KafkaWorld) -> None:
    """Its memory has no bound, and a wait for the last commit lasts a tenth of a second, unless one says otherwise."""
    assert "buffer_memory" not in KafkaProducer.DEFAULT_CONFIG
    assert KafkaProducer.DEFAULT_CONFIG["retry_backoff_ms"] == 100
    sink: Any = world.sink()
    sink.recover()
    config = sink._producer.config
    assert config["retry_backoff_ms"] == 20
    assert config["request_timeout_ms"] < config["delivery_timeout_ms"] < config["transaction_timeout_ms"]
    sink.close()


@pytest.mark.parametrize("kind", ["gzip", "snappy", "lz4", "zstd"])
def test_k13_a_small_batch_inflates_without_bound(
    world: KafkaWorld, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record is as large as it says, whatever a fetch may hold. The decoders put in the client's place stop."""
    size = 30_000_000
    encode, decode = (getattr(codec, f"{kind}_{what}") for what in ("encode", "decode"))
    assert len(decode(encode(bytes(size)))) == size  # the library's own
    how = {"compression_type": kind, "max_request_size": 2 * size}
    with KafkaProducer(**world.properties, **how) as compressing:
        compressing.send(world.input, bytes(size), b"bomb", partition=0).get(30)
    member = member_of(world.source())
    member.source.seek(0, 0)
    poll_until(lambda: bool(member.records), member)
    assert len(member.records[0].value or b"") == size
    decoder = bounded(kind, DECODERS[kind], most=size)  # of what is a little larger, with its key
    monkeypatch.setattr(default_records, f"{kind}_decode", decoder)
    member.source.seek(0, 0)
    with pytest.raises(BrokerError, match=rf"compressed by {kind} inflates beyond 28 MiB; --client librdkafka"):
        poll_until(lambda: False, member)
    member.source.close()


def test_k14_the_end_of_what_is_committed_is_not_the_end(world: KafkaWorld, producer: Any) -> None:
    """The library's end offsets stop before an open transaction. The changelog waits until that is decided."""
    changelog = TopicPartition(f"{world.app_id}-state-changelog", 0)
    producer.begin_transaction()
    producer.send(changelog.topic, b"1", b"m", partition=0).get(10)
    with KafkaConsumer(**world.properties, isolation_level="read_committed") as consumer:
        assert consumer.end_offsets([changelog])[changelog] == 0
    with KafkaAdminClient(**world.properties) as admin:
        assert admin.list_partition_offsets({changelog: OffsetSpec.LATEST})[changelog].offset == 1

    log = world.changelog()
    assert log.open(0)
    assert log.read(10) == []
    assert not log.finished(0)
    producer.commit_transaction()
    found: list[StateRecord] = []
    while not log.finished(0):
        found += log.read(10)
    assert [record.value for record in found] == [b"1"]
    log.close()


def test_k15_a_member_may_commit_what_it_does_not_own(world: KafkaWorld) -> None:
    """The broker looks at the generation alone. The sink commits what it is given: whoever calls it must know."""
    first, sink = begun(world)
    second = Member(world.source())
    poll_until(lambda: apart(first, second), first, second)
    (others,) = second.owned
    sink.commit(Transaction([], [], {others: Committed(3, "not mine")}), first.membership)
    assert second.source.committed(others) == Committed(3, "not mine")
    for closing in (sink, first.source, second.source):
        closing.close()


def test_k16_a_join_that_completes_between_polls_is_done_again(world: KafkaWorld) -> None:
    """Members of the library that are busy make each other join without end. Those of the adapter settle."""
    how: dict[str, Any] = {"enable_auto_commit": False, "group_id": f"raw-{uuid.uuid4().hex}"}
    how |= {"partition_assignment_strategy": [CooperativeStickyAssignor], "heartbeat_interval_ms": 200}
    first, second = (subscribed(world, **how) for _ in range(2))
    generations: set[int] = set()

    def busy() -> bool:
        for consumer in (first, second):
            consumer.poll(0)
            threading.Event().wait(0.02)  # for whatever a member does; a join ends meanwhile
        generations.add(first.group_metadata().generation_id)
        return len(generations) >= 8

    wait_until(busy, "eight generations of a group of two")
    first.close()
    second.close()

    class Busy(Member):
        """Polls for a moment and does other things for ten times as long."""

        def poll(self, timeout_s: float = 0.02) -> Polled:
            threading.Event().wait(0.2)
            return super().poll(timeout_s)

    members = [Busy(world.source()) for _ in range(2)]
    poll_until(lambda: apart(*members), *members)
    metadata = members[0].membership
    assert metadata.generation_id < 8
    for member in members:
        assert member.poll().membership is not None
        member.source.close()


def test_a_pending_offset_is_waited_for_and_no_older_one_given(world: KafkaWorld, producer: Any) -> None:
    """While another's transaction over an offset is open, what is committed is not known, and so not told."""
    member, sink = begun(world)
    sink.commit(transaction(offsets={0: Committed(1, "old")}), member.membership)
    producer.begin_transaction()
    offsets = {TopicPartition(world.input, 0): OffsetAndMetadata(2, "new", -1)}
    producer.send_offsets_to_transaction(offsets, member.membership)
    with pytest.raises(BrokerError, match="committed offset"):
        member.source.committed(0)
    ending = threading.Timer(1.0, producer.commit_transaction)
    ending.start()
    assert member.source.committed(0) == Committed(2, "new")
    ending.join()
    sink.close()
    member.source.close()


def test_a_producer_that_was_given_up_takes_its_threads_along(world: KafkaWorld, topic: Callable[..., str]) -> None:
    """After failures one sender lives, that of the producer in use; the library's own close would leave them all."""
    gone = topic(2, keep=False)
    left = KafkaProducer(**world.properties, **FAST | {"delivery_timeout_ms": 60_000})
    left.send(gone, b"there", partition=0).get(10)
    delete(world, gone)
    left.send(gone, b"never there", partition=0)
    with pytest.raises(KafkaError):
        left.close(timeout=0)
    assert left._sender.is_alive()
    left._sender.force_close()
    left._sender.join(10)
    left.close()

    member, before = member_of(world.source()), set(threading.enumerate())
    sink = short(world)
    m = member.membership
    old = ConsumerGroupMetadata(m.group_id, m.generation_id - 1, m.member_id, None, m.state)
    for _ in range(3):
        sink.recover()
        with pytest.raises(Undecided):
            sink.commit(transaction(outputs(0, b"1"), states(0, (b"m", b"1"))), old)
    sink.recover()
    assert len(set(threading.enumerate()) - before) == 1
    sink.close()
    assert not set(threading.enumerate()) - before
    member.source.close()


logging.getLogger("kafka").setLevel(logging.ERROR)

if __name__ == "__main__":
    with KafkaServer(Path(sys.argv[1]) / "kafka") as server:
        commit_without_a_broker(server)
        print("done", flush=True)
