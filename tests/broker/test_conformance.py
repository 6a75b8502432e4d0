"""The Kafka adapters keep the same words of `ports` as the memory adapters, on a real broker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator

import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition

from statestep.consumers.broker import KafkaSink, KafkaSource
from statestep.consumers.ports import Headers, Message

from ..consumers.conformance import CHECKS, DEADLINE_S, NOW_MS, PARTITIONS, World


class KafkaWorld:
    """An input topic, an output and a dead letter topic, and a group of its own."""

    def __init__(self, bootstrap_servers: str, topic: Callable[..., str]):
        self.properties = {"bootstrap_servers": [bootstrap_servers]}
        self.input, self.output, self.dead = (topic(PARTITIONS) for _ in range(3))
        self.app_id = f"conformance-{uuid.uuid4().hex[:12]}"
        self.producer = KafkaProducer(**self.properties)

    def append(
        self, partition: int, key: bytes | None, value: bytes | None, timestamp_ms: int = NOW_MS, headers: Headers = ()
    ) -> int:
        sent = self.producer.send(self.input, value, key, list(headers), partition=partition, timestamp_ms=timestamp_ms)
        return int(sent.get(DEADLINE_S).offset)

    def source(self) -> KafkaSource:
        return KafkaSource(self.input, self.app_id, self.properties, PARTITIONS)

    def sink(self) -> KafkaSink:
        counts = dict.fromkeys((self.input, self.output, self.dead, ""), PARTITIONS)
        return KafkaSink(self.app_id, self.properties, self.output, self.dead, counts)

    def messages(self, count: int) -> list[Message]:
        parts = [TopicPartition(t, p) for t in (self.output, self.dead) for p in range(PARTITIONS)]
        found: dict[TopicPartition, list[Message]] = {tp: [] for tp in parts}
        with KafkaConsumer(**self.properties, isolation_level="read_committed") as consumer:
            consumer.assign(parts)
            consumer.seek_to_beginning()
            deadline = time.monotonic() + DEADLINE_S
            while sum(map(len, found.values())) < count:
                assert time.monotonic() < deadline, found
                for tp, records in consumer.poll(200).items():
                    found[tp] += [
                        Message(tp.topic == self.dead, tp.partition, r.key, r.value, tuple(r.headers)) for r in records
                    ]
            assert not consumer.poll(200)
        return [message for tp in parts for message in found[tp]]

    def close(self) -> None:
        self.producer.close()


@pytest.fixture
def world(bootstrap_servers: str, topic: Callable[..., str]) -> Iterator[KafkaWorld]:
    made = KafkaWorld(bootstrap_servers, topic)
    yield made
    made.close()


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_kafka_conforms(check: Callable[[World], None], world: KafkaWorld) -> None:
    """Every check of the conformance suite holds for a real broker."""
    check(world)
