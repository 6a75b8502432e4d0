"""A consumer's place in its group, as kafka-python's coordinator keeps it: join, sync, heartbeats, generation.

All but `ensure` happens in the client's I/O thread. Only cooperative assignors are known here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from kafka.coordinator.assignors.abstract import RebalanceProtocol
from kafka.errors import (
    FencedInstanceIdError,
    IllegalGenerationError,
    KafkaConfigurationError,
    KafkaConnectionError,
    KafkaError,
    RebalanceInProgressError,
    RetriableError,
    UnknownMemberIdError,
)
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment
from kafka.structs import ConsumerGroupMetadata, MemberState

from .cluster import Cluster
from .groups import Joined
from .world import LATENCY_S, Process, World

UNINFORMED = 0.3  # how often a leader's first assignment knows of no partitions


class Brought:
    """What a member joins with; the group's leader gives it to the assignor."""

    __slots__ = ("group_instance_id", "key", "member_id", "metadata")

    def __init__(self, metadata: Any, instance: str | None):
        self.metadata = metadata
        self.group_instance_id = instance
        self.member_id = ""
        owned = tuple((tp.topic, tuple(tp.partitions)) for tp in metadata.owned_partitions)
        self.key = (tuple(metadata.topics), owned)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Brought) and self.key == other.key

    __hash__ = None  # type: ignore[assignment]


class Join:
    """One attempt to join."""

    def __init__(self) -> None:
        self.done = False
        self.error: KafkaError | None = None
        self.assignment: Any = None


class Membership:
    """The state of one member."""

    def __init__(self, world: World, cluster: Cluster, process: Process, config: dict[str, Any]):
        self._world, self._cluster, self._process = world, cluster, process
        self._config = config
        self._instance: str | None = config["group_instance_id"]
        self.generation = -1
        self.member_id = ""
        self.state = MemberState.UNJOINED
        self.rejoin_needed = True
        self.topics: set[str] = set()
        self.assignor = self._one_assignor()
        self.last_poll = 0.0
        self._rejoining = False
        self._join: Join | None = None
        self._heartbeat_enabled = False
        self._ticking = False
        self._closed = False
        self._joined_topics: set[str] | None = None
        self.informed = self._leads = False
        self._led: dict[str, int] | None = None  # the partition counts that this member, as leader, assigned by

    def _one_assignor(self) -> Any:
        first = self._config["partition_assignment_strategy"][0]
        assignor = first() if isinstance(first, type) else first
        if RebalanceProtocol.COOPERATIVE not in assignor.supported_protocols():
            raise KafkaConfigurationError("the simulation knows cooperative assignors only")
        return assignor

    @property
    def lost(self) -> bool:
        """Whether this member is none, as far as it knows."""
        return self.generation == -1 or not self.member_id

    def metadata(self) -> ConsumerGroupMetadata:
        """What a transaction's offsets go out with, as it is at this instant."""
        group = self._config["group_id"]
        return ConsumerGroupMetadata(group, self.generation, self.member_id, self._instance, self.state)

    def stable(self) -> bool:
        """Whether it has joined, as far as it knows."""
        return bool(self.state == MemberState.STABLE)

    def need_rejoin(self) -> bool:
        """Whether the group is to be joined, again.

        Where a leader joins because partitions were added, it ends once it has assigned them, in the I/O thread:
        if that is between two polls, nobody looks at the join any more, and no heartbeat is sent again.
        """
        if self._led is not None and self._led != self._counts(self._led):
            return True
        return self.rejoin_needed or (self._joined_topics is not None and self._joined_topics != self.topics)

    def ensure(self, until: float, prepare: Callable[[], None]) -> Any:
        """Join where that is needed; an assignment to be taken up, None where none came, False at `until`."""
        world = self._world
        while self.need_rejoin():
            if self._join is None or self._join.done:  # one that ended between two polls is not looked at
                if not self._rejoining:
                    prepare()
                    self._rejoining = True
                    self._heartbeat_enabled = False
                self._join = self._start()
            join = self._join
            while not join.done:
                if world.now >= until:
                    return False
                world.sleep(until - world.now, wakeable=True)
            self._join = None
            if join.error is None:
                self._rejoining = self.rejoin_needed = False
                if not self._leads:
                    self._led = None
                self.state = MemberState.STABLE
                self.last_poll = world.now
                self._beat()
                return join.assignment
            if isinstance(join.error, UnknownMemberIdError | RebalanceInProgressError | IllegalGenerationError):
                continue
            if not isinstance(join.error, RetriableError):
                raise join.error
            if world.now >= until:
                return False
            world.sleep(min(self._config["retry_backoff_ms"] / 1000, until - world.now))
        return None

    def reset(self, member_id: str = "") -> None:
        """Be no member any more."""
        self.generation, self.member_id = -1, member_id
        self.rejoin_needed = True
        self.state = MemberState.UNJOINED

    def leave(self) -> None:
        """Say good-bye, for good: a static member does so by silence."""
        self._closed = True
        self._leave()

    def _leave(self) -> None:
        if self._instance is None and self.member_id and self.state != MemberState.UNJOINED:
            member_id, group = self.member_id, self._group
            self._world.io_effect(self._process, "consumer.leave", lambda: group().leave(member_id), lambda: None)
        self.reset()

    def _group(self) -> Any:
        return self._cluster.group(self._config["group_id"])

    def _counts(self, topics: Collection[str]) -> dict[str, int]:
        known = self._cluster.topics
        return {name: len(known[name].partitions) if name in known else 0 for name in topics}

    # Join and sync

    def _start(self) -> Join:
        self.state = MemberState.REBALANCING
        self._joined_topics = self.topics
        join, world = Join(), self._world
        brought = Brought(self.assignor.metadata(self.topics), self._instance)
        session_s = self._config["session_timeout_ms"] / 1000
        rebalance_s = self._config["max_poll_interval_ms"] / 1000

        def answer(result: Joined | KafkaError) -> None:
            world.io(self._process, world.random.random() * LATENCY_S, lambda: self._joined(join, result))

        member = (self.member_id, self._instance)
        world.io_effect(
            self._process,
            "consumer.join",
            lambda: self._group().join(*member, session_s, rebalance_s, brought, answer),
            lambda: self._fail(join, KafkaConnectionError()),
        )
        return join

    def _joined(self, join: Join, result: Joined | KafkaError) -> None:
        if join.done or self._closed:
            return
        if isinstance(result, KafkaError):
            if isinstance(result, UnknownMemberIdError):
                self.reset()
            self._fail(join, result)
            return
        if self.state != MemberState.REBALANCING:
            self._fail(join, RetriableError("unjoined meanwhile"))
            return
        self.generation, self.member_id = result.generation, result.member_id
        self._leads = result.leader == result.member_id
        given = self._assign(result.members) if self._leads else {}
        world = self._world

        def answer(assignment: Any) -> None:
            world.io(self._process, world.random.random() * LATENCY_S, lambda: self._synced(join, assignment))

        me = (self.member_id, self._instance, self.generation)
        world.io_effect(
            self._process,
            "consumer.sync",
            lambda: self._group().sync(*me, given, answer),
            lambda: self._synced(join, KafkaConnectionError()),
        )

    def _synced(self, join: Join, result: Any) -> None:
        if join.done or self._closed:
            return
        if isinstance(result, KafkaError):
            self.rejoin_needed = True
            if isinstance(result, UnknownMemberIdError):
                self.reset()
            elif isinstance(result, IllegalGenerationError):
                self.reset(self.member_id)
            self._fail(join, result)
            return
        join.assignment = result if result is not None else ConsumerProtocolAssignment(1, [], b"")
        join.done = True
        self._world.wake(self._process)

    def _fail(self, join: Join, error: KafkaError) -> None:
        if not join.done:
            join.done, join.error = True, error
            self._world.wake(self._process)

    def _assign(self, members: dict[str, Brought]) -> dict[str, Any]:
        topics = sorted({topic for brought in members.values() for topic in brought.key[0]})
        self._led = self._counts(topics)
        if not self.informed:  # the client's first metadata may be later than its first join
            self.informed = True
            if self._world.random.random() < UNINFORMED:
                self._led = dict.fromkeys(topics, 0)
        for member_id, brought in members.items():
            brought.member_id = member_id
        assigned: dict[str, Any] = self.assignor.assign(_Metadata(self._led), list(members.values()))
        return assigned

    # Heartbeats

    def _beat(self) -> None:
        self._heartbeat_enabled = True
        if not self._ticking:
            self._ticking = True
            self._world.io(self._process, self._config["heartbeat_interval_ms"] / 1000, self._tick)

    def _tick(self) -> None:
        world = self._world
        if self._closed or not self._heartbeat_enabled or self.state != MemberState.STABLE:
            self._ticking = False  # `_beat` starts it again
            return
        if world.now - self.last_poll > self._config["max_poll_interval_ms"] / 1000:
            self._leave()
            self._ticking = self._heartbeat_enabled = False
            return
        me = (self.member_id, self._instance, self.generation)

        def does() -> None:
            outcome: KafkaError | None = None
            try:
                self._group().heartbeat(*me)
            except KafkaError as error:
                outcome = error
            world.io(self._process, world.random.random() * LATENCY_S, lambda: self._heard(outcome))

        world.io_effect(self._process, "consumer.heartbeat", does, lambda: None)
        world.io(self._process, self._config["heartbeat_interval_ms"] / 1000, self._tick)

    def _heard(self, error: KafkaError | None) -> None:
        if self._closed or self.state != MemberState.STABLE:
            return
        if isinstance(error, RebalanceInProgressError):
            self.rejoin_needed = True
        elif isinstance(error, IllegalGenerationError):
            self.reset(self.member_id)
        elif isinstance(error, FencedInstanceIdError):
            self._heartbeat_enabled = False  # and nobody is told
        elif isinstance(error, UnknownMemberIdError):
            self.reset()
        if error is not None:
            self._world.wake(self._process)


class _Metadata:
    """The cluster as an assignor sees it."""

    def __init__(self, counts: dict[str, int]):
        self._counts = counts

    def topics(self) -> list[str]:
        return list(self._counts)

    def partitions_for_topic(self, topic: str) -> list[int] | None:
        return list(range(self._counts[topic])) if self._counts.get(topic) else None
