"""Trap: kafka-python forgets what it was to tell a coordinator that is away, and lets its caller wait for ever.

Of a rolling restart a service would know nothing but a call that does not return.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
from kafka import (
    ConsumerGroupMetadata,
    KafkaAdminClient,
    KafkaConsumer,
    KafkaProducer,
    OffsetAndMetadata,
    TopicPartition,
)

from statestep.consumers.kafka_client import REAL
from statestep.consumers.kafka_delivery import abandon, open_producer

from .kafka_server import KafkaServer

BACK_SECONDS = 60.0
OFFSETS = {TopicPartition("in", 0): OffsetAndMetadata(7, "", -1)}


pytestmark = pytest.mark.usefixtures("quiet")


def send_offsets(producer: Any) -> threading.Thread:
    """Send offsets in a thread of its own, which ends once they are there."""
    sending = threading.Thread(
        target=lambda: producer.send_offsets_to_transaction(OFFSETS, ConsumerGroupMetadata("group")), daemon=True
    )
    sending.start()
    return sending


def test_offsets_that_were_sent_while_the_broker_was_away_arrive(kafka: KafkaServer) -> None:
    """Those of our producer do once it is back. Those of a bare one do not: else what we do for it can go."""
    kafka.start()
    properties = {"bootstrap_servers": [kafka.bootstrap_servers]}
    with KafkaAdminClient(**properties) as admin:
        admin.create_topics({"in": {"num_partitions": 1}}, wait_for_metadata=True)
    ids: dict[str, Any] = {"transaction_timeout_ms": 120_000, "client_id": "test"}
    ours = open_producer(REAL, properties, 120_000, transactional_id="ours", **ids)
    bare = KafkaProducer(**properties, transactional_id="bare", **ids)
    try:
        for producer in (ours, bare):
            producer.init_transactions()
            producer.begin_transaction()
            producer.send("in", value=b"1").get(30)
        kafka.kill()
        arriving, forgotten = send_offsets(ours), send_offsets(bare)
        forgotten.join(2.0)  # until it has found nobody
        kafka.start()
        arriving.join(BACK_SECONDS)
        assert not arriving.is_alive()
        ours.commit_transaction()
        # A commit is acknowledged before its marks are in every log: who asks for stable offsets waits for them.
        with KafkaConsumer(**properties, group_id="group", isolation_level="read_committed") as consumer:
            assert consumer.committed(TopicPartition("in", 0), timeout_ms=30_000) == 7
        assert forgotten.is_alive()
    finally:
        for producer in (ours, bare):
            abandon(producer)
