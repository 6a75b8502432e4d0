"""K18: who is expelled from the group while it joins is not told by kafka-python, and must take all up anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from statestep.consumers import kafka_source
from statestep.consumers.kafka_source import KafkaSource
from statestep.consumers.ports import Change

from ..consumers.conformance import PARTITIONS, Member
from .test_conformance import KafkaWorld

SESSION_MS = 3_000
DEADLINE_S = 60.0
ALL = tuple(range(PARTITIONS))


class SlowLeader(kafka_source._Assignor):
    """Takes longer over one assignment for two than the group waits for it."""

    armed, asked, free = threading.Event(), threading.Event(), threading.Event()
    told: ClassVar[list[str]] = []  # what the library said was lost

    def assign(self, cluster: Any, members: Any) -> Any:
        if len(members) > 1 and self.armed.is_set():
            self.armed.clear()
            self.asked.set()
            self.free.wait(DEADLINE_S)
        return super().assign(cluster, members)

    def forget(self) -> None:
        self.told.append("lost")
        super().forget()


@pytest.fixture
def world(bootstrap_servers: str, topic: Callable[..., str]) -> Iterator[KafkaWorld]:
    made = KafkaWorld(bootstrap_servers, topic)
    yield made
    made.close()


def test_k18_who_was_expelled_while_joining_takes_all_up_anew(
    world: KafkaWorld, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    """Another had the partitions for a while; the library gives them back as if nothing had been."""

    def source() -> KafkaSource:
        return KafkaSource(world.input, world.app_id, world.properties, PARTITIONS, session_timeout_ms=SESSION_MS)

    with monkeypatch.context() as patch:
        patch.setattr(kafka_source, "_Assignor", SlowLeader)
        first = Member(source())
    changes: list[Change] = []
    stop = threading.Event()

    def live() -> None:
        while not stop.is_set():
            changes.extend(first.poll().changes)

    def until(true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not true():
            assert time.monotonic() < deadline, changes
            second.poll() if second is not None else stop.wait(0.02)

    second: Member | None = None
    thread = threading.Thread(target=live)
    thread.start()
    try:
        until(lambda: first.owned == set(ALL) and first.membership is not None)
        SlowLeader.armed.set()
        second = Member(source())
        until(lambda: second is not None and second.owned == set(ALL) and second.membership is not None)
        assert SlowLeader.asked.is_set()
        second.source.close()
        second = None
        count = len(changes)
        SlowLeader.free.set()
        until(lambda: len(changes) > count and first.owned == set(ALL) and first.membership is not None)
    finally:
        SlowLeader.free.set()
        stop.set()
        thread.join()
        first.source.close()
    assert changes[count:] == [Change("lost", ALL), Change("assigned", ALL)]
    assert SlowLeader.told == [], "kafka-python tells of it now: is the guard still needed?"
