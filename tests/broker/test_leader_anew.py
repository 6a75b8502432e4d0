"""Trap: an admin client of librdkafka asks by the leader that it once heard of, though the broker names a newer one.

A restore would wait for a quarter of an hour, and so would the partition. kafka-python is held to the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec
from kafka import KafkaAdminClient

from statestep.consumers.kafka_changelog import KafkaChangelog
from statestep.consumers.kafka_source import KafkaSource
from statestep.consumers.librdkafka import LibrdkafkaChangelog, LibrdkafkaSource
from statestep.consumers.ports import BrokerError, Changelog, Source

from .kafka_server import KafkaServer
from .service_process import wait_until

APP, INPUT = "led", "readings"
SOON_SECONDS = 30.0


pytestmark = pytest.mark.usefixtures("quiet")


def answered(question: Callable[[], Any]) -> bool:
    """Whether the broker answers."""
    try:
        question()
    except (BrokerError, KafkaException):
        return False
    return True


def test_a_new_leader_is_heard_of_soon(kafka: KafkaServer) -> None:
    """Whoever asked before a leader was elected anew gets answers soon after; a bare admin client gets none."""
    kafka.start()
    properties = {"bootstrap_servers": [kafka.bootstrap_servers]}
    with KafkaAdminClient(**properties) as admin:
        topics = (INPUT, f"{APP}-state-changelog")
        admin.create_topics({topic: {"num_partitions": 1} for topic in topics}, wait_for_metadata=True)
    changelogs: list[Changelog] = [KafkaChangelog(APP, properties), LibrdkafkaChangelog(APP, properties)]
    sources: list[Source] = [source(INPUT, APP, properties, 1) for source in (KafkaSource, LibrdkafkaSource)]
    bare = AdminClient({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    place = TopicPartition(INPUT, 0)
    questions: list[Callable[[], Any]] = [
        *(partial(changelog.open, 0) for changelog in changelogs),
        *(partial(source.bounds, 0) for source in sources),
        *(partial(source.offset_at, 0, 0) for source in sources),
    ]

    def ask_bare() -> Any:
        return bare.list_offsets({place: OffsetSpec.latest()}, request_timeout=5)[place].result(10)

    try:
        for question in (*questions, ask_bare):
            wait_until(partial(answered, question), "a first answer")
        kafka.stop()
        kafka.start()
        for number, question in enumerate(questions):
            wait_until(partial(answered, question), f"the answer to question {number}", SOON_SECONDS)
        assert not answered(ask_bare)
    finally:
        for changelog in changelogs:
            changelog.close()
        for source in sources:
            source.close()
