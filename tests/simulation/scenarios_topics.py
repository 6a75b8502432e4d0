"""Scenarios of topics, offsets and times."""

from __future__ import annotations

from typing import Any

import pytest
from kafka.admin import OffsetSpec
from kafka.errors import (
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
)
from kafka.structs import OffsetAndMetadata, TopicPartition

from .bench import Bench, scenario, until, write


@scenario
def a_topic_is_described(bench: Bench) -> None:
    """The admin tells ids, partitions and settings; a topic that does not exist has an error code."""
    from kafka.admin import ConfigResource, ConfigResourceType

    topic = bench.topic(partitions=3, cleanup_policy="compact")
    admin = bench.admin()
    found, missing = admin.describe_topics([topic, "no-such-topic"])
    assert (found["error_code"], found["name"], len(found["partitions"])) == (0, topic, 3)
    assert len(found["topic_id"]) == 36
    assert (missing["error_code"], missing["partitions"]) == (3, [])
    configs = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)])
    assert configs["topic"][topic]["cleanup.policy"]["value"] == "compact"
    with pytest.raises(TopicAlreadyExistsError):
        admin.create_topics({topic: {"num_partitions": 3, "replication_factor": 1}})
    with pytest.raises(UnknownTopicOrPartitionError):
        admin.list_partition_offsets({TopicPartition("no-such-topic", 0): OffsetSpec.LATEST})


@scenario
def positions_without_policy(bench: Bench) -> None:
    """Without a position and a policy `poll` raises; an offset that is not there raises and names itself."""
    topic, group = bench.topic(), bench.name("group")
    tp = TopicPartition(topic, 0)
    consumer = bench.consumer(group_id=group, auto_offset_reset="none", enable_auto_commit=False)
    consumer.assign([tp])
    with pytest.raises(NoOffsetForPartitionError):
        consumer.poll(timeout_ms=5_000)
    consumer.seek(tp, 10)
    with pytest.raises(OffsetOutOfRangeError) as caught:
        for _ in range(300):
            consumer.poll(timeout_ms=100)
    assert caught.value.args[0] == {tp: 10}


@scenario
def what_is_read_may_vanish(bench: Bench) -> None:
    """Retention: the low watermark rises, and an offset before it raises; reading on from the watermark works."""
    topic = bench.topic()
    tp = TopicPartition(topic, 0)
    write(bench.producer(), topic, b"a", b"b", b"c")
    consumer = bench.consumer(group_id=None, auto_offset_reset="none")
    bench.admin().delete_records({tp: 2})
    until(bench, lambda: consumer.beginning_offsets([tp]) == {tp: 2})
    assert consumer.end_offsets([tp]) == {tp: 3}
    consumer.assign([tp])
    consumer.seek(tp, 0)
    with pytest.raises(OffsetOutOfRangeError):
        for _ in range(300):
            consumer.poll(timeout_ms=100)
    assert consumer.position(tp) == 0
    consumer.seek(tp, 2)
    got: list[Any] = []
    for _ in range(50):
        got += consumer.poll(timeout_ms=100).get(tp, [])
    assert [record.value for record in got] == [b"c"]


@scenario
def a_topic_made_anew_has_another_id(bench: Bench) -> None:
    """A topic that is deleted and created again is another one, and empty; offsets committed for it are forgotten."""
    topic, group = bench.topic(), bench.name("group")
    tp = TopicPartition(topic, 0)
    write(bench.producer(), topic, b"a")
    admin = bench.admin()
    consumer = bench.consumer(group_id=group, enable_auto_commit=False)
    consumer.assign([tp])
    consumer.commit({tp: OffsetAndMetadata(1, "", -1)})
    (before,) = admin.describe_topics([topic])
    admin.delete_topics([topic])
    until(bench, lambda: admin.describe_topics([topic])[0]["error_code"] == 3)
    admin.create_topics({topic: {"num_partitions": 1, "replication_factor": 1}}, wait_for_metadata=True)
    (after,) = admin.describe_topics([topic])
    assert before["topic_id"] != after["topic_id"]
    assert admin.list_partition_offsets({tp: OffsetSpec.LATEST})[tp].offset == 0
    assert consumer.committed(tp, timeout_ms=10_000) is None


@scenario
def times_are_found(bench: Bench) -> None:
    """The first record that was made at a time or later, or None where there is none."""
    topic = bench.topic()
    tp = TopicPartition(topic, 0)
    producer, now_ms = bench.producer(), bench.wall_ms()
    for number in range(3):
        producer.send(topic, value=b"v", key=b"k", partition=0, timestamp_ms=now_ms + 1000 * number)
    producer.flush()
    consumer = bench.consumer(group_id=None)
    assert consumer.offsets_for_times({tp: now_ms + 500})[tp].offset == 1
    assert consumer.offsets_for_times({tp: now_ms + 60_000})[tp] is None
