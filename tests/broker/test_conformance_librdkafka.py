"""The adapters of librdkafka keep the same words of `ports` as those of kafka-python, on a real broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from statestep.consumers.kafka_sink import Guarantee
from statestep.consumers.librdkafka_changelog import LibrdkafkaChangelog
from statestep.consumers.librdkafka_sink import LibrdkafkaSink
from statestep.consumers.librdkafka_source import LibrdkafkaSource

from ..consumers.conformance import CHECKS, GROUP_CHECKS, PARTITIONS, World
from .test_conformance import KafkaWorld

MakeWorld = Callable[[Guarantee], "LibrdkafkaWorld"]


class LibrdkafkaWorld(KafkaWorld):
    """The other client's world; what writes the input and reads the outputs is kafka-python in both."""

    def source(self, instance_id: str | None = None) -> Any:
        return LibrdkafkaSource(self.input, self.app_id, self.properties, PARTITIONS, instance_id=instance_id)

    def sink(self, instance_id: str | None = None, **how: Any) -> Any:
        topics = (self.output, self.dead, self.counts)
        how |= {"events": self.events, "instance_id": instance_id, "guarantee": self.guarantee}
        return LibrdkafkaSink(self.input, self.app_id, self.properties, *topics, **how)

    def changelog(self) -> Any:
        return LibrdkafkaChangelog(self.app_id, self.properties)


@pytest.fixture
def make_world(bootstrap_servers: str, topic: Callable[..., str]) -> Iterator[MakeWorld]:
    made: list[LibrdkafkaWorld] = []

    def make(guarantee: Guarantee) -> LibrdkafkaWorld:
        made.append(LibrdkafkaWorld(bootstrap_servers, topic))
        made[-1].guarantee = guarantee
        return made[-1]

    yield make
    for world in made:
        world.close()


@pytest.mark.parametrize("check", [*CHECKS, *GROUP_CHECKS], ids=lambda check: check.__name__)
def test_librdkafka_conforms(check: Callable[[World], None], make_world: MakeWorld) -> None:
    """Every check of the conformance suite holds for a real broker."""
    check(make_world("exactly-once"))


@pytest.mark.parametrize("check", CHECKS[-6:], ids=lambda check: check.__name__)
def test_librdkafka_conforms_at_least_once(check: Callable[[World], None], make_world: MakeWorld) -> None:
    """What concerns transactions holds with outputs outside of them, too."""
    check(make_world("at-least-once"))
