"""What the simulation claims of Kafka holds of a real broker and of kafka-python itself: the same scenarios."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer

from ..simulation.scenarios import SCENARIOS, Bench, Member


class RealBench:
    """kafka-python's own clients on a broker."""

    def __init__(self, bootstrap_servers: str):
        self._where = {"bootstrap_servers": bootstrap_servers}
        self._topics: list[str] = []
        self._clients: list[Any] = []
        self._admin: Any = None
        self._members: list[tuple[Member, threading.Thread]] = []

    def consumer(self, **config: Any) -> Any:
        return self._kept(KafkaConsumer(**self._where, **config))

    def producer(self, **config: Any) -> Any:
        return self._kept(KafkaProducer(**self._where, **config))

    def admin(self) -> Any:
        if self._admin is None:
            self._admin = self._kept(KafkaAdminClient(**self._where))
        return self._admin

    def topic(self, partitions: int = 1, **configs: str) -> str:
        name = self.name("topic")
        settings = {key.replace("_", "."): value for key, value in configs.items()}
        options = {"num_partitions": partitions, "replication_factor": 1, "configs": settings}
        self.admin().create_topics({name: options}, wait_for_metadata=True)
        self._topics.append(name)
        return name

    def name(self, what: str) -> str:
        return f"{what}-{uuid.uuid4().hex[:12]}"

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wall_ms(self) -> int:
        return int(time.time() * 1000)

    def start(self, member: Member, live: Callable[[], None]) -> None:
        thread = threading.Thread(target=live, name="member")
        self._members.append((member, thread))
        thread.start()

    def vanish(self, member: Member) -> None:
        def silence(consumer: Any) -> None:
            consumer._coordinator._close_heartbeat()  # and as it polls no more, it is dead to the broker
            member.stop()

        member.ask(silence)

    def _kept(self, client: Any) -> Any:
        self._clients.append(client)
        return client

    def close(self) -> None:
        for member, thread in self._members:
            member.stop()
            thread.join(10)
        self.admin().delete_topics(self._topics, raise_errors=False)  # a scenario may have deleted some
        for client in self._clients:
            with contextlib.suppress(Exception):
                if isinstance(client, KafkaConsumer):
                    client.close(autocommit=False, timeout_ms=1_000)
                elif isinstance(client, KafkaProducer):
                    client.close(timeout=1)
                else:
                    client.close()


@pytest.fixture
def bench(bootstrap_servers: str, quiet: None) -> Iterator[RealBench]:
    real = RealBench(bootstrap_servers)
    yield real
    real.close()


@pytest.mark.parametrize("check", SCENARIOS, ids=lambda check: check.__name__)
def test_kafka_behaves(check: Callable[[Bench], None], bench: RealBench) -> None:
    """Each scenario holds over a real broker."""
    check(bench)
