"""Trap: Kafka gives a static member that comes back what its place had, without a round; what is nobody's stays so."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from statestep.consumers import kafka_source
from statestep.consumers.kafka_client import REAL
from statestep.consumers.kafka_place import StaticPlace
from statestep.consumers.kafka_source import KafkaSource
from statestep.consumers.librdkafka_source import LibrdkafkaSource

from ..consumers.conformance import PARTITIONS, Member, poll_until

NEVER, SOON = float("inf"), 0.5  # seconds after which a member looks


@pytest.mark.parametrize("client", [KafkaSource, LibrdkafkaSource])
def test_a_partition_without_an_owner_gets_one(
    client: Any, bootstrap_servers: str, topic: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A static member that does not look goes on without it; one that does gives its place up, and all is dealt out."""
    name, app_id = topic(PARTITIONS), f"place-{uuid.uuid4().hex[:12]}"
    properties = {"bootstrap_servers": [bootstrap_servers]}
    deal, forgetful = kafka_source._Assignor.assign, [True]

    def assign(assignor: Any, cluster: Any, members: Any) -> Any:
        dealt = deal(assignor, cluster, members)
        for given in dealt.values() if forgetful[0] else ():
            given.assigned_partitions = [(t, [p for p in parts if p != 1]) for t, parts in given.assigned_partitions]
        return dealt

    monkeypatch.setattr(kafka_source._Assignor, "assign", assign)

    def member(source: Any, instance_id: str, look_s: float) -> Member:
        return Member(source(name, app_id, properties, PARTITIONS, instance_id=instance_id, look_s=look_s))

    leader, first = member(KafkaSource, "a", NEVER), member(client, "b", NEVER)
    with closing(leader.source):
        poll_until(lambda: leader.owned == {0} and leader.membership is not None, leader, what="a leader")
        with closing(first.source):
            poll_until(lambda: first.membership is not None and leader.membership is not None, leader, first)
        forgetful[0] = False
        place = StaticPlace(name, app_id, "b", properties, PARTITIONS, REAL)
        second = member(client, "b", NEVER)
        with closing(second.source):
            poll_until(lambda: second.membership is not None, leader, second)
            poll_until(lambda: place._ownerless() == frozenset({1}), leader, second)
            assert not second.owned
        third = member(client, "b", SOON)
        with closing(third.source):
            poll_until(lambda: third.owned == {1} and third.membership is not None, leader, third)
            poll_until(lambda: place._ownerless() == frozenset(), leader, third)
