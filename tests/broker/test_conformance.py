"""The Kafka adapters keep the same words of `ports` as the memory adapters, on a real broker."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from statestep.consumers.kafka_changelog import KafkaChangelog
from statestep.consumers.kafka_sink import Guarantee, KafkaSink
from statestep.consumers.kafka_source import KafkaSource
from statestep.consumers.kafka_topics import changelog_topic, prepare_topics
from statestep.consumers.ports import Headers, Message

from ..consumers.conformance import CHECKS, DEADLINE_S, GROUP_CHECKS, NOW_MS, PARTITIONS, World


class KafkaWorld:
    """An input topic, topics of outputs, dead letters and events, a changelog and a group of its own."""

    guarantee: Guarantee = "exactly-once"

    def __init__(self, bootstrap_servers: str, topic: Callable[..., str]):
        self.properties = {"bootstrap_servers": [bootstrap_servers]}
        self.input, self.output, self.dead, self.events = (topic(PARTITIONS) for _ in range(4))
        self.app_id = f"conformance-{uuid.uuid4().hex[:12]}"
        made = [self.output, self.dead, self.events]
        self.counts = prepare_topics(self.properties, self.app_id, self.input, made, create=True)
        self.producer = KafkaProducer(**self.properties)

    def append(
        self, partition: int, key: bytes | None, value: bytes | None, timestamp_ms: int = NOW_MS, headers: Headers = ()
    ) -> int:
        sent = self.producer.send(self.input, value, key, list(headers), partition=partition, timestamp_ms=timestamp_ms)
        return int(sent.get(DEADLINE_S).offset)

    def source(self, instance_id: str | None = None) -> KafkaSource:
        return KafkaSource(self.input, self.app_id, self.properties, PARTITIONS, instance_id=instance_id)

    def sink(self, instance_id: str | None = None) -> KafkaSink:
        return KafkaSink(
            self.input,
            self.app_id,
            self.properties,
            self.output,
            self.dead,
            self.counts,
            events=self.events,
            instance_id=instance_id,
            guarantee=self.guarantee,
        )

    def changelog(self) -> KafkaChangelog:
        return KafkaChangelog(self.app_id, self.properties)

    def messages(self, count: int) -> list[Message]:
        parts = [TopicPartition(t, p) for t in (self.output, self.dead, self.events) for p in range(PARTITIONS)]
        found: dict[TopicPartition, list[Message]] = {tp: [] for tp in parts}
        with KafkaConsumer(**self.properties, isolation_level="read_committed") as consumer:
            consumer.assign(parts)
            consumer.seek_to_beginning()
            deadline = time.monotonic() + DEADLINE_S
            while sum(map(len, found.values())) < count:
                assert time.monotonic() < deadline, found
                for tp, records in consumer.poll(200).items():
                    kinds = {"dead": tp.topic == self.dead, "event": tp.topic == self.events}
                    found[tp] += [
                        Message(partition=tp.partition, key=r.key, value=r.value, headers=tuple(r.headers), **kinds)
                        for r in records
                    ]
            assert not consumer.poll(200)
        return [message for tp in parts for message in found[tp]]

    def close(self) -> None:
        self.producer.close()
        with KafkaAdminClient(**self.properties) as admin:
            admin.delete_topics([changelog_topic(self.app_id)])


class AtLeastOnceWorld(KafkaWorld):
    """The same, where outputs are written before the transaction and outside of it."""

    guarantee: Guarantee = "at-least-once"


@pytest.fixture
def worlds(bootstrap_servers: str, topic: Callable[..., str]) -> Iterator[Callable[[type[KafkaWorld]], KafkaWorld]]:
    made: list[KafkaWorld] = []

    def make(kind: type[KafkaWorld]) -> KafkaWorld:
        made.append(kind(bootstrap_servers, topic))
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.mark.parametrize("check", [*CHECKS, *GROUP_CHECKS], ids=lambda check: check.__name__)
def test_kafka_conforms(check: Callable[[World], None], worlds: Callable[[type[KafkaWorld]], KafkaWorld]) -> None:
    """Every check of the conformance suite holds for a real broker."""
    check(worlds(KafkaWorld))


@pytest.mark.parametrize("check", CHECKS[-6:], ids=lambda check: check.__name__)
def test_kafka_conforms_at_least_once(
    check: Callable[[World], None], worlds: Callable[[type[KafkaWorld]], KafkaWorld]
) -> None:
    """What concerns transactions holds with outputs outside of them, too."""
    check(worlds(AtLeastOnceWorld))
