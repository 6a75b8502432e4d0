"""How joins of a group become changes and memberships, and what errors of a poll mean, over a client that is scripted.

The client stands in for kafka-python's consumer alone; that the real one does the same is seen in tests/broker.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any, NamedTuple

import pytest
from kafka import TopicPartition
from kafka.errors import (
    FencedInstanceIdError,
    KafkaConnectionError,
    KafkaError,
    NodeNotReadyError,
    OffsetOutOfRangeError,
    TopicAuthorizationFailedError,
)
from kafka.structs import ConsumerGroupMetadata, MemberState

from statestep.consumers.kafka_client import Clients
from statestep.consumers.kafka_source import KafkaSource
from statestep.consumers.ports import BrokerError, Change, Fenced


class Assignment(NamedTuple):
    """What the assignor is told."""

    owned: list[TopicPartition]

    def partitions(self) -> list[TopicPartition]:
        return self.owned


class ScriptedConsumer:
    """Each poll runs the next step of a script, which may join, lose, or raise."""

    def __init__(self, **config: Any):
        self.assignor = config["partition_assignment_strategy"][0]
        self.script: deque[Any] = deque()
        self.owned: set[TopicPartition] = set()
        self.paused: set[TopicPartition] = set()
        self.generation = -1
        self.state = MemberState.UNJOINED
        self.member = "me"

    def subscribe(self, _topics: list[str], listener: Any) -> None:
        self.listener = listener

    def topics(self) -> set[str]:
        return {"in"}

    def join(self, generation: int, *partitions: int) -> None:
        """What a join does, on whatever thread: the assignment is swapped, then the assignor hears of it."""
        self.owned = {TopicPartition("in", p) for p in partitions}
        self.paused &= self.owned
        self.generation, self.state = generation, MemberState.STABLE
        self.assignor.on_assignment(Assignment(sorted(self.owned)), generation)

    def lose(self) -> None:
        self.generation, self.state = -1, MemberState.UNJOINED
        self.listener.on_partitions_lost(self.owned)
        self.owned = set()

    def poll(self, **_how: Any) -> dict[Any, Any]:
        if self.script:
            self.script.popleft()()
        return {}

    def group_metadata(self) -> ConsumerGroupMetadata:
        member = self.member if self.generation >= 0 else ""
        return ConsumerGroupMetadata("app", self.generation, member, None, self.state)

    def assignment(self) -> set[TopicPartition]:
        return self.owned

    def pause(self, tp: TopicPartition) -> None:
        assert tp in self.owned
        self.paused.add(tp)

    def resume(self, tp: TopicPartition) -> None:
        self.paused.discard(tp)

    def seek(self, tp: TopicPartition, _offset: int) -> None:
        assert tp in self.owned


class Clock:
    """Time that passes only where someone sleeps."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def made(instance_id: str | None = None) -> tuple[KafkaSource, Any, Clock]:
    clock = Clock()
    clients = Clients(consumer=ScriptedConsumer, clock=clock, sleep=clock.sleep)
    source = KafkaSource("in", "app", {}, 4, instance_id=instance_id, clients=clients)
    return source, source._consumer, clock


def raising(error: Exception) -> Any:
    def step() -> None:
        raise error

    return step


def test_joins_become_changes_in_order() -> None:
    """What came and what went of each join, though several were between two polls; what came is paused."""
    source, consumer, _ = made()
    assert source.poll(0, 1) == ([], [], None)
    consumer.join(1)
    consumer.join(2, 0, 1)
    polled = source.poll(0, 1)
    assert polled.changes == [Change("assigned", ()), Change("assigned", (0, 1))]
    assert polled.membership.generation_id == 2
    assert consumer.paused == consumer.owned
    for partition in (0, 1):
        source.seek(partition, 5)
    assert not consumer.paused
    consumer.join(3, 1)
    consumer.join(4, 1, 0, 2)
    assert source.poll(0, 1).changes == [Change("revoked", (0,)), Change("assigned", (0, 2))]
    assert consumer.paused == {TopicPartition("in", p) for p in (0, 2)}  # 1 goes on, 0 is as new
    consumer.join(5, 0, 1, 2)
    assert source.poll(0, 1).changes == []


@pytest.mark.parametrize("instance_id", [None, "one"])
def test_who_was_expelled_while_joining_takes_all_up_anew(instance_id: str | None) -> None:
    """kafka-python tells of no loss then; the name is another. What one had may have been another's in between."""
    source, consumer, _ = made(instance_id)
    consumer.join(1, 0, 1)
    source.poll(0, 1)
    for partition in (0, 1):
        source.seek(partition, 5)
    consumer.member = "me, again"
    consumer.join(2, 1, 2)
    assert source.poll(0, 1).changes == [Change("lost", (0, 1)), Change("assigned", (1, 2))]
    assert consumer.paused == consumer.owned


def test_a_static_member_that_missed_a_round_takes_all_up_anew() -> None:
    """It keeps its name, and the others may have shared out what it had and given it back."""
    source, consumer, _ = made("one")
    consumer.join(1, 0)
    consumer.join(3, 0)
    assert source.poll(0, 1).changes == [
        Change("assigned", (0,)),
        Change("lost", (0,)),
        Change("assigned", (0,)),
    ]
    consumer.join(4, 0)
    assert source.poll(0, 1).changes == []


def test_a_membership_is_that_of_the_last_join_or_none() -> None:
    """None before a join, after a loss, while rejoining, and where a join came after the changes were drained."""
    source, consumer, _ = made()
    consumer.join(1, 0)
    assert source.poll(0, 1).membership.generation_id == 1
    consumer.script.append(consumer.lose)
    polled = source.poll(0, 1)
    assert polled.changes == [Change("lost", (0,))]
    assert polled.membership is None
    assert consumer.assignor.member_assignment is None  # what was lost is not claimed by the next join
    consumer.join(7, 0)
    assert source.poll(0, 1).changes == [Change("assigned", (0,))]
    consumer.state = MemberState.REBALANCING
    assert source.poll(0, 1).membership is None
    consumer.state = MemberState.STABLE
    assert source.poll(0, 1).membership.generation_id == 7
    consumer.generation = 8  # joined, and the assignment is not yet in force
    assert source.poll(0, 1).membership is None
    consumer.join(8, 0)
    taken = consumer.group_metadata()
    consumer.join(9, 0)
    source._drain()
    assert not source._holds(taken)  # a snapshot from before a join that was drained
    taken = consumer.group_metadata()
    consumer.join(9, 0)
    assert not source._holds(taken)  # a join that was not drained yet


def test_changes_add_up_to_what_is_owned() -> None:
    """Whatever joins and losses come between polls, the changes take what was owned to what is owned."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw = random.Random(seed)
    source, consumer, _ = made()
    owned: set[int] = set()
    for generation in range(2000):
        if draw.random() < 0.2:
            consumer.lose()
        else:
            consumer.join(generation, *draw.sample(range(4), draw.randrange(5)))
        if draw.random() < 0.5:
            for change in source.poll(0, 1).changes:
                assert change.kind == "assigned" or owned >= set(change.partitions)
                came = set(change.partitions) if change.kind == "assigned" else set()
                assert not owned & came
                owned = owned - set(change.partitions) | came
            assert owned == {tp.partition for tp in consumer.owned}


def test_a_broker_that_is_away_is_waited_for() -> None:
    """Connections that fail are silence: time passes, and the next poll is like any other; a word now and then."""
    source, consumer, clock = made()
    consumer.join(1, 0)
    for error in (KafkaConnectionError("reset"), NodeNotReadyError("node 1")):
        consumer.script.append(raising(error))
        before = clock.now
        assert source.poll(0.05, 10).records == []
        assert before < clock.now <= before + 0.05


def test_what_does_not_pass_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    """A refusal is a `BrokerError`, a taken place is `Fenced`, and silence is told of once in a while."""
    source, consumer, clock = made("one")
    for error in (TopicAuthorizationFailedError("in"), KafkaError("odd")):
        consumer.script.append(raising(error))
        with pytest.raises(BrokerError, match="'in'"):
            source.poll(0, 1)
    consumer.script.append(raising(FencedInstanceIdError()))
    with pytest.raises(Fenced, match="'one'"):
        source.poll(0, 1)
    caplog.clear()
    for _ in range(100):
        consumer.script.append(raising(KafkaConnectionError("reset")))
        source.poll(1.0, 1)
    assert 1 <= len(caplog.records) <= 1 + clock.now / 30


def test_what_retention_took_starts_over() -> None:
    """A place that is no longer kept is lost and assigned again, and silent until it is sought to."""
    source, consumer, _ = made()
    consumer.join(1, 0, 1)
    source.poll(0, 1)
    for partition in (0, 1):
        source.seek(partition, 5)
    consumer.script.append(raising(OffsetOutOfRangeError({TopicPartition("in", 1): 5})))
    polled = source.poll(0, 1)
    assert polled.changes == [Change("lost", (1,)), Change("assigned", (1,))]
    assert polled.membership.generation_id == 1
    assert consumer.paused == {TopicPartition("in", 1)}
