"""What is known of librdkafka and confluent-kafka, and the guard against each: these fail when a release changes it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from confluent_kafka import Consumer, KafkaError, Producer
from confluent_kafka import TopicPartition as Place
from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType
from kafka.structs import OffsetAndMetadata

from statestep.consumers.kafka_topics import changelog_topic
from statestep.consumers.librdkafka_client import RAISED, client_properties, code_of, error_of
from statestep.consumers.librdkafka_source import LibrdkafkaSource, is_member
from statestep.consumers.ports import Blocked, BrokerError, Change, Committed, Rejected, StateRecord, Undecided

from ..consumers.conformance import (
    DEADLINE_S,
    NOW_MS,
    Member,
    begun,
    contents,
    member_of,
    outputs,
    poll_until,
    read,
    states,
    states_of,
    transaction,
)
from .kafka_server import KafkaServer
from .test_conformance_librdkafka import LibrdkafkaWorld


@pytest.fixture
def world(bootstrap_servers: str, topic: Callable[..., str]) -> Iterator[LibrdkafkaWorld]:
    made = LibrdkafkaWorld(bootstrap_servers, topic)
    yield made
    made.close()


@pytest.fixture
def open_transaction(world: LibrdkafkaWorld) -> Callable[[bytes], Producer]:
    """A transaction over input offset 7 and one state of partition 0, sent but not decided."""

    def begin(membership: bytes) -> Producer:
        producer = Producer({**client_properties(world.properties), "transactional.id": world.app_id + "-open"})
        producer.init_transactions(DEADLINE_S)
        producer.begin_transaction()
        producer.produce(changelog_topic(world.app_id), b"undecided", b"s", 0)
        assert producer.flush(DEADLINE_S) == 0
        producer.send_offsets_to_transaction([Place(world.input, 0, 7, "undecided")], membership, DEADLINE_S)
        return producer

    return begin


def test_a_membership_that_was_lost_is_not_handed_on(world: LibrdkafkaWorld) -> None:
    """Who did not poll in time is no member; librdkafka says so with the old generation, of nobody."""
    source = LibrdkafkaSource(
        world.input, world.app_id, world.properties, 2, session_timeout_ms=6000, max_poll_interval_ms=6000
    )
    member = member_of(source)
    stale = member.membership
    deadline = time.monotonic() + DEADLINE_S
    while is_member(source._consumer.consumer_group_metadata()):
        assert time.monotonic() < deadline, "the membership did not expire"
        time.sleep(0.05)
    lost = source._consumer.consumer_group_metadata()
    assert lost[: len(b"CGMDv2:") + 4] == stale[: len(b"CGMDv2:") + 4] and lost != stale
    polled = member.poll()
    assert Change("lost", (0, 1)) in polled.changes
    assert polled.membership is None or polled.membership != stale
    poll_until(lambda: len(member.owned) == 2 and member.membership is not None, member)
    source.close()


def test_a_short_text_beside_an_offset_comes_alone(world: LibrdkafkaWorld) -> None:
    """confluent-kafka 2.16 writes a zero byte behind it, and reads on up to one: each client must read the other's."""
    member, sink = begun(world)
    sink.commit(transaction(offsets={0: Committed(2, "6")}), member.membership)
    assert {member.source.committed(0) for _ in range(20)} == {Committed(2, "6")}
    sink.close()
    member.source.close()
    with KafkaConsumer(group_id=world.app_id, enable_auto_commit=False, **world.properties) as other:
        other.assign([TopicPartition(world.input, 0)])
        other.commit({TopicPartition(world.input, 0): OffsetAndMetadata(3, "7", -1)})
    again = world.source()
    assert {again.committed(0) for _ in range(20)} == {Committed(3, "7")}
    again.close()


def test_a_member_may_leave_while_it_is_asked_to_give_up(
    world: LibrdkafkaWorld, caplog: pytest.LogCaptureFixture
) -> None:
    """Closing calls back first, at a moment at which there is no membership to be had."""
    leaving, other = member_of(world.source()), Member(world.source())
    leaving.source.seek(0, 0)
    deadline = time.monotonic() + DEADLINE_S
    while not other.poll().changes:  # it has joined, with nothing yet: all is still to be given up by the first
        assert time.monotonic() < deadline, "the other did not join"
    leaving.source.close()
    assert not [record for record in caplog.records if record.name == "statestep" and record.levelname == "WARNING"]
    poll_until(lambda: len(other.owned) == 2 and other.membership is not None, other)
    other.source.close()


def test_a_fatal_error_is_no_exception_and_is_caught_all_the_same(world: LibrdkafkaWorld) -> None:
    """`flush` raises it, at times as a bare KafkaError, which is no BaseException; RAISED names what it may be."""
    assert not issubclass(KafkaError, BaseException)
    older, newer = (
        Producer({**client_properties(world.properties), "transactional.id": world.app_id}) for _ in range(2)
    )
    for producer in (older, newer):
        producer.init_transactions(DEADLINE_S)
    older.begin_transaction()
    older.produce(world.output, b"zombie", partition=0)
    caught: object = None
    try:
        older.flush(DEADLINE_S)
    except RAISED as raised:
        caught = raised
    assert code_of(error_of(caught)) == KafkaError._FENCED


def test_a_partition_whose_next_record_was_deleted_starts_over(world: LibrdkafkaWorld) -> None:
    """Lost and assigned again, silent until the service says where it goes on, and then it does."""
    for number in range(10):
        world.append(0, b"k", b"%d" % number)
    member = member_of(world.source())
    with KafkaAdminClient(**world.properties) as admin:
        admin.delete_records({TopicPartition(world.input, 0): 6})
    member.source.seek(0, 2)
    deadline = time.monotonic() + DEADLINE_S
    while not (changes := list(member.poll().changes)):
        assert time.monotonic() < deadline, "nothing was told"
    assert changes == [Change("lost", (0,)), Change("assigned", (0,))]
    assert member.source.bounds(0) == (6, 10)
    member.source.seek(0, 6)
    assert [record.offset for record in read(member.source, 4)] == [6, 7, 8, 9]
    member.source.close()


def test_what_was_fetched_before_a_seek_never_comes_after_it(world: LibrdkafkaWorld) -> None:
    """However much is fetched ahead, the first record after a seek is the one that was sought."""
    producer = Producer(client_properties(world.properties))
    for number in range(50_000):
        producer.produce(world.input, b"%d" % number, b"k", number % 2)
    assert producer.flush(DEADLINE_S) == 0
    member = member_of(world.source())
    for partition in range(2):
        member.source.seek(partition, 0)
    poll_until(lambda: len(member.records) > 1000, member)
    for offset in (5, 20_000, 0, 24_999, 7):
        member.records.clear()
        member.source.seek(0, offset)
        poll_until(lambda: any(r.partition == 0 for r in member.records), member, what="a record")
        found = [r.offset for r in member.records if r.partition == 0]
        assert found == list(range(offset, offset + len(found)))
    member.source.close()


def test_an_offset_under_decision_is_waited_for(
    world: LibrdkafkaWorld, open_transaction: Callable[[bytes], Producer]
) -> None:
    """While a transaction is open its offset is neither told nor denied; once it is decided it is told."""
    member, sink = begun(world)
    sink.commit(transaction(offsets={0: Committed(3, "before")}), member.membership)
    producer = open_transaction(member.membership)
    with pytest.raises(BrokerError, match="committed offset"):
        member.source.committed(0)
    producer.commit_transaction(DEADLINE_S)
    assert member.source.committed(0) == Committed(7, "undecided")
    member.source.close()


def test_a_restore_waits_for_what_is_undecided(
    world: LibrdkafkaWorld, open_transaction: Callable[[bytes], Producer]
) -> None:
    """The end of a restore is where writing ends, not where deciding does: an open transaction is not missed."""
    member, sink = begun(world)
    sink.commit(transaction(states=states(0, (b"s", b"1"), (b"m", b"1"))), member.membership)
    producer = open_transaction(member.membership)
    log = world.changelog()
    assert log.open(0)
    found: list[StateRecord] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(found) < 2:
        assert time.monotonic() < deadline
        found += log.read(10)
    while log.position(0) < 3:  # behind the marker of what was committed
        assert time.monotonic() < deadline and not log.read(10)
    assert not log.finished(0)
    producer.commit_transaction(DEADLINE_S)
    while not log.finished(0):
        assert time.monotonic() < deadline
        found += log.read(10)
    assert contents(found) == [(b"s", b"1"), (b"m", b"1"), (b"s", b"undecided")]
    log.close()
    member.source.close()


def test_an_earlier_opening_says_nothing_of_the_next(world: LibrdkafkaWorld) -> None:
    """Opened at its end and then at its beginning, a partition is not finished before it was read."""
    member, sink = begun(world)
    for number in range(3):
        sink.commit(transaction(states=states(0, (b"s%d" % number, b"x"), (b"m", b"x"))), member.membership)
    log = world.changelog()
    for _ in range(5):
        assert len(states_of(log, 0)) == 6
        assert log.open(0, 9)
        assert log.finished(0) and log.position(0) == 9
        log.shut(0)
    log.close()
    member.source.close()


def test_a_record_that_the_broker_refuses_is_rejected_whatever_it_is(world: LibrdkafkaWorld) -> None:
    """Too far in the future, or too large for the topic, which only the broker can know."""
    with KafkaAdminClient(**world.properties) as admin:
        limit = {"max.message.bytes": "100000"}
        admin.alter_configs([ConfigResource(ConfigResourceType.TOPIC, world.output, configs=limit)])
    member, sink = begun(world)
    future = [message._replace(timestamp_ms=NOW_MS * 5) for message in outputs(0, b"x")]
    for refused in (future, outputs(0, b"x" * 200_000)):
        with pytest.raises(Rejected):
            sink.commit(transaction([*outputs(0, b"good"), *refused]), member.membership)
        sink.recover()
    sink.commit(transaction(outputs(0, b"next")), member.membership)
    assert [message.value for message in world.messages(1)] == [b"next"]
    member.source.close()


@pytest.mark.usefixtures("quiet")
def test_an_outage_is_silence_and_what_it_interrupts_is_undecided(kafka: KafkaServer) -> None:
    """Polls give nothing, a commit is undecided, recover says that no broker answers; afterwards all goes on."""
    kafka.start()
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:

        def topic(partitions: int) -> str:
            name = f"outage-{time.monotonic_ns()}"
            admin.create_topics({name: {"num_partitions": partitions, "replication_factor": 1}}, wait_for_metadata=True)
            return name

        world = LibrdkafkaWorld(kafka.bootstrap_servers, topic)
    world.producer.close()
    member, sink = member_of(world.source()), world.sink(transaction_timeout_ms=3000)
    sink.recover()
    sink.commit(transaction(outputs(0, b"before"), states(0, (b"m", b"1"))), member.membership)
    kafka.kill()
    for _ in range(10):
        assert not member.poll().records
    began = time.monotonic()
    with pytest.raises((Undecided, Blocked)):
        sink.commit(transaction(outputs(0, b"during"), states(0, (b"m", b"2"))), member.membership)
    assert time.monotonic() - began < 25
    began = time.monotonic()
    with pytest.raises(BrokerError):
        sink.recover()
    assert time.monotonic() - began < 17
    with pytest.raises(BrokerError):
        member.source.committed(0)
    kafka.start()
    poll_until(lambda: len(member.owned) == 2 and member.membership is not None, member)
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            sink.recover()
            break
        except BrokerError:
            assert time.monotonic() < deadline, "the transactional id could not be taken up"
    poll_until(lambda: len(member.owned) == 2 and member.membership is not None, member)
    sink.commit(transaction(outputs(0, b"after"), states(0, (b"m", b"3"))), member.membership)
    assert [message.value for message in world.messages(2)] == [b"before", b"after"]
    log = world.changelog()
    assert contents(states_of(log, 0)) == [(b"m", b"1"), (b"m", b"3")]
    log.close()
    member.source.close()


@pytest.mark.usefixtures("quiet")
def test_a_membership_is_not_handed_on_while_all_brokers_are_away(kafka: KafkaServer) -> None:
    """Not even that of a member that was joining just then, which librdkafka goes on to name: it is not ready."""
    kafka.start()
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.create_topics({"in": {"num_partitions": 2, "replication_factor": 1}}, wait_for_metadata=True)
    properties = {"bootstrap_servers": [kafka.bootstrap_servers]}
    member = member_of(LibrdkafkaSource("in", "app", properties, 2, session_timeout_ms=6000))
    # It holds the next round open, for it is not polled, until it leaves. Where that cannot be heard it is missed.
    group = {"group.id": "app", "partition.assignment.strategy": "cooperative-sticky", "session.timeout.ms": 6000}
    other = Consumer({**client_properties(properties), **group})
    other.subscribe(["in"])
    poll_until(lambda: len(member.owned) == 1, member)
    kafka.kill()
    poll_until(lambda: member.membership is None, member)
    deadline = time.monotonic() + 7.0  # longer than the session
    while time.monotonic() < deadline:
        assert member.poll().membership is None
    kafka.start()
    other.close()
    poll_until(lambda: len(member.owned) == 2 and member.membership is not None, member)
    member.source.close()


def test_a_missing_package_is_named_with_its_extra() -> None:
    """A wrong configuration, in one sentence that says what to install."""
    code = (
        "import sys; sys.modules['confluent_kafka'] = None\n"
        "from statestep.consumers.config import ConfigError\n"
        "try: import statestep.consumers.librdkafka\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'statestep[librdkafka]'" in done.stdout
