"""The broker that the tests in this folder share, and topics of their own on it."""

from __future__ import annotations

import gc
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from .kafka_server import BOOTSTRAP_VARIABLE, KafkaServer


@pytest.fixture(scope="session")
def bootstrap_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`host:port` of a real broker: the one that the environment names, or one that lives for this session."""
    external = os.environ.get(BOOTSTRAP_VARIABLE)
    if external:
        yield external
        return
    with KafkaServer(tmp_path_factory.mktemp("kafka")) as kafka:
        yield kafka.bootstrap_servers


@pytest.fixture
def topic(bootstrap_servers: str) -> Iterator[Callable[..., str]]:
    """`topic(partitions=1, config=None, prefix="test", keep=True) -> name`: creates a topic for a test.

    It is deleted after the test, unless `keep` is false: then the test itself deletes it.
    """
    created: list[str] = []
    with KafkaAdminClient(bootstrap_servers=bootstrap_servers) as admin:

        def create(
            partitions: int = 1, config: Mapping[str, str] | None = None, prefix: str = "test", keep: bool = True
        ) -> str:
            name = f"{prefix}-{uuid.uuid4().hex[:12]}"
            options = {"num_partitions": partitions, "replication_factor": 1, "configs": dict(config or {})}
            admin.create_topics({name: options}, wait_for_metadata=True)
            if keep:
                created.append(name)
            return name

        yield create
        if created:
            admin.delete_topics(created)


@pytest.fixture
def kafka(tmp_path: Path) -> Iterator[KafkaServer]:
    """A broker of this test's own, for tests that stop or kill it; not yet started."""
    server = KafkaServer(tmp_path / "kafka")
    yield server
    server.kill()


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """kafka-python logs each connection that fails, and leaves its socket open where a broker goes just then."""
    caplog.set_level(logging.CRITICAL, "kafka")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
