"""KafkaConsumer as kafka-python 3.0.12 has it, over the simulated cluster: polls, positions, offsets, its traps.

As in the real one, the generation changes as soon as a join is answered, in the I/O thread (`membership.py`); the
assignment changes, and the listeners run, only within `poll`. A member that its heartbeat finds to be lost has the
generation -1 and no member id from then on; a fenced static member hears of nothing and polls on. Positions outlive
rebalances and aborts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import kafka
from kafka.consumer.fetcher import ConsumerRecord
from kafka.errors import (
    CommitFailedError,
    IllegalStateError,
    KafkaError,
    KafkaTimeoutError,
    NoOffsetForPartitionError,
    OffsetOutOfRangeError,
    RebalanceInProgressError,
    RetriableError,
    UnknownTopicOrPartitionError,
)
from kafka.structs import ConsumerGroupMetadata, MemberState, OffsetAndMetadata, OffsetAndTimestamp, TopicPartition

from .cluster import Cluster
from .log import Entry, Partition
from .membership import Membership
from .world import RETRY_S, NoAnswerError, SilenceError, World

T = TypeVar("T")
COMPUTE_S = 0.0005  # the longest that a process computes between two polls: a loop of polls does not stop the clock
FETCH_WAIT_S = 0.05  # how long a fetch that finds nothing is held before the next


class Place:
    """Where a consumer is in a partition."""

    def __init__(self) -> None:
        self.position: int | None = None
        self.paused = False
        self.highwater: int | None = None


class SimulatedConsumer:
    """Made by `Clients`; the configuration is kafka-python's."""

    DEFAULT_CONFIG = kafka.KafkaConsumer.DEFAULT_CONFIG

    def __init__(self, world: World, cluster: Cluster, configs: Mapping[str, Any]):
        unknown = set(configs) - set(self.DEFAULT_CONFIG)
        if unknown:
            raise kafka.errors.KafkaConfigurationError(f"Unrecognized configs: {unknown}")
        self.config = {**self.DEFAULT_CONFIG, **configs}
        self._world, self._cluster = world, cluster
        self._process = world.alive()
        self._stable = self.config["isolation_level"] == "read_committed"
        self._topics: list[str] | None = None
        self._listener: Any = None
        self._listening = False
        self._places: dict[TopicPartition, Place] = {}
        self._failed: tuple[TopicPartition, int, KafkaError] | None = None  # to be raised by the next poll
        self._member: Membership | None = None
        self._closed = False
        self._ask("consumer.connect", lambda: None, self._until(self.config["bootstrap_timeout_ms"]))

    @property
    def _coordinator(self) -> Membership | None:
        """Adapters look at its `_heartbeat_enabled`, `stable()` and `need_rejoin()`, for want of better."""
        return self._member

    # What is read

    def subscribe(self, topics: Sequence[str] = (), pattern: str | None = None, listener: Any = None) -> None:
        """Read topics as a member of the group."""
        assert pattern is None, "the simulation knows no patterns"
        self._topics = sorted(topics)
        self._listener = listener
        if self._member is None:
            self._member = Membership(self._world, self._cluster, self._process, self.config)
        self._member.topics = set(topics)

    def assign(self, partitions: Iterable[TopicPartition]) -> None:
        """Read partitions without the group's leave."""
        kept = self._places
        self._places = {tp: kept.get(tp) or Place() for tp in partitions}

    def assignment(self) -> set[TopicPartition]:
        """What is read now."""
        return set(self._places)

    def subscription(self) -> set[str] | None:
        """The topics of `subscribe`."""
        return None if self._topics is None else set(self._topics)

    def partitions_for_topic(self, topic: str) -> set[int]:
        """The numbers of a topic's partitions."""
        known = self._ask("consumer.metadata", lambda: self._cluster.topics.get(topic), None)
        return set(range(len(known.partitions))) if known is not None else set()

    def topics(self) -> set[str]:
        """All topics. Whoever asks after `subscribe` joins with full knowledge of the partitions."""
        found = self._ask("consumer.metadata", lambda: set(self._cluster.topics), None)
        if self._member is not None:
            self._member.informed = True
        return found

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Go on at an offset."""
        if not isinstance(offset, int) or offset < 0:
            raise ValueError("Offset must be int >= 0")
        if partition not in self._places:
            raise ValueError("Unassigned partition")
        self._places[partition].position = offset

    def pause(self, *partitions: TopicPartition) -> None:
        """Fetch nothing from partitions."""
        for tp in partitions:
            self._places[tp].paused = True

    def resume(self, *partitions: TopicPartition) -> None:
        """Fetch from partitions again."""
        for tp in partitions:
            self._places[tp].paused = False

    def paused(self) -> set[TopicPartition]:
        """What is assigned and paused."""
        return {tp for tp, place in self._places.items() if place.paused}

    def position(self, partition: TopicPartition, timeout_ms: float | None = None) -> int | None:
        """The offset of the next record."""
        if partition not in self._places:
            raise IllegalStateError("Partition is not assigned")
        self._find_positions(self._until(timeout_ms))
        return self._places[partition].position

    def highwater(self, partition: TopicPartition) -> int | None:
        """The high watermark, as the last fetch told it."""
        if partition not in self._places:
            raise IllegalStateError("Partition is not assigned")
        return self._places[partition].highwater

    # Polls

    def poll(
        self, timeout_ms: float = 0, max_records: int | None = None, update_offsets: bool = True
    ) -> dict[TopicPartition, list[Any]]:
        """Records, if any come within the time; the group's business is done here too."""
        if self._closed:
            raise IllegalStateError("KafkaConsumer is closed")
        if timeout_ms < 0:
            raise ValueError("Timeout must not be negative")
        count = self.config["max_poll_records"] if max_records is None else max_records
        if count <= 0:
            raise ValueError("max_records must be positive")
        self._world.point("consumer.poll")
        until = self._world.now + timeout_ms / 1000
        self._world.sleep(self._world.random.random() * COMPUTE_S)
        while True:
            found = self._poll_once(until, count)
            if found or self._world.now >= until:
                return found

    def _poll_once(self, until: float, count: int) -> dict[TopicPartition, list[Any]]:
        world = self._world
        if self._topics is not None and self._member is not None:
            assignment = self._member.ensure(until, self._prepare)
            if assignment is False:
                return {}
            if assignment is not None:
                self._take_up(assignment)
            self._member.last_poll = world.now
        if not self._find_positions(until):
            return {}
        if self._failed is not None:
            (tp, offset, error), self._failed = self._failed, None
            if tp in self._places and self._places[tp].position == offset:
                raise error
        wanted = [tp for tp, place in self._places.items() if not place.paused and place.position is not None]
        found: dict[TopicPartition, list[Any]] = {}
        if wanted:
            try:
                wait_s = max(until - world.now, 0.005)
                found = self._accept(world.effect("consumer.fetch", lambda: self._fetch(wanted, count), wait_s))
            except (NoAnswerError, SilenceError):
                return {}
        if not found and world.now < until:
            world.sleep(min(until - world.now, FETCH_WAIT_S), wakeable=True)
        return found

    def _fetch(self, wanted: list[TopicPartition], count: int) -> list[tuple[TopicPartition, Any, int, int]]:
        """What some of the partitions have, from a different one on each time; nothing is changed by asking."""
        draw = self._world.random
        first = draw.randrange(len(wanted))
        answers: list[tuple[TopicPartition, Any, int, int]] = []
        for tp in wanted[first:] + wanted[:first]:
            place = self._places.get(tp)
            if place is None or place.position is None:
                continue
            share = count if draw.random() < 0.7 else draw.randint(1, count)
            try:
                log = self._cluster.partition(tp)
                entries, following = log.fetch(place.position, share, self._stable)
            except UnknownTopicOrPartitionError:
                continue
            except OffsetOutOfRangeError:
                answers.append((tp, None, -1, -1))
                continue
            answers.append((tp, entries, following, log.high))
            count -= len(entries)
            if count <= 0:
                break
        return answers

    def _accept(self, answers: list[tuple[TopicPartition, Any, int, int]]) -> dict[TopicPartition, list[Any]]:
        found: dict[TopicPartition, list[Any]] = {}
        for tp, entries, following, high in answers:
            place = self._places[tp]
            if entries is None:
                self._out_of_range(tp, place, bool(found))
                continue
            place.position, place.highwater = following, high
            if entries:
                found[tp] = [_record(tp, entry) for entry in entries]
        return found

    def _out_of_range(self, tp: TopicPartition, place: Place, found: bool) -> None:
        if self.config["auto_offset_reset"] in ("earliest", "latest"):
            place.position = self._reset(self._cluster.partition(tp))
            return
        error = OffsetOutOfRangeError({tp: place.position})
        if not found:
            raise error
        assert place.position is not None
        self._failed = (tp, place.position, error)

    def _reset(self, log: Partition) -> int:
        return log.low if self.config["auto_offset_reset"] == "earliest" else log.stable if self._stable else log.high

    def _find_positions(self, until: float | None) -> bool:
        """Give each partition that has no position the committed one, or what the policy says."""
        missing = [tp for tp, place in self._places.items() if place.position is None]
        if not missing:
            return True
        group = self.config["group_id"]
        for tp in missing:
            committed = None
            if group is not None:
                try:
                    committed = self._committed(tp, until)
                except KafkaTimeoutError:
                    return False
            if committed is not None:
                self._places[tp].position = committed.offset
        missing = [tp for tp in missing if self._places[tp].position is None]
        if missing and self.config["auto_offset_reset"] not in ("earliest", "latest"):
            raise NoOffsetForPartitionError(set(missing))
        for tp in missing:
            try:
                log = self._ask("consumer.list_offsets", lambda tp=tp: self._cluster.partition(tp), until)  # type: ignore[misc]
            except KafkaTimeoutError:
                return False
            self._places[tp].position = self._reset(log)
        return True

    # Rebalances

    def _prepare(self) -> None:
        """Before a join: a member that is none any more has lost what it had."""
        assert self._member is not None
        if self._member.lost and self._places:
            lost = _ordered(self._places)
            try:
                self._tell("on_partitions_lost", lost)
            finally:
                self._places.clear()

    def _take_up(self, assignment: Any) -> None:
        assert self._member is not None
        new = sorted(assignment.partitions())
        revoked = _ordered(tp for tp in self._places if tp not in new)
        added = _ordered(tp for tp in new if tp not in self._places)
        shuffled = list(added)
        self._world.random.shuffle(shuffled)
        kept = {tp: place for tp, place in self._places.items() if tp in new}
        self._places = {**kept, **{tp: Place() for tp in shuffled}}
        self._member.assignor.on_assignment(assignment, self._member.generation)
        failed: KafkaError | None = None
        for method, partitions in (("on_partitions_revoked", revoked), ("on_partitions_assigned", added)):
            if partitions:
                try:
                    self._tell(method, partitions)
                except KafkaError as error:
                    failed = error
        if revoked:
            self._member.rejoin_needed = True
        if failed is not None:
            raise failed

    def _tell(self, method: str, partitions: Collection[TopicPartition]) -> None:
        if self._listener is None:
            return
        self._listening = True
        try:
            getattr(self._listener, method)(partitions)
        except Exception as error:
            raise KafkaError("User rebalance callback throws an error") from error
        finally:
            self._listening = False

    def group_metadata(self) -> ConsumerGroupMetadata:
        """The membership as it is at this instant, whatever the assignment is."""
        self._world.point("consumer.group_metadata")
        return ConsumerGroupMetadata(self.config["group_id"]) if self._member is None else self._member.metadata()

    # Questions

    def committed(
        self, partition: TopicPartition, metadata: bool = False, timeout_ms: float | None = None
    ) -> OffsetAndMetadata | int | None:
        """What the group committed; a reader of committed records waits while a transaction is about to change it."""
        if self.config["group_id"] is None:
            raise IllegalStateError("Requires group_id")
        found = self._committed(partition, self._until(timeout_ms))
        return found if metadata or found is None else int(found.offset)

    def _committed(self, tp: TopicPartition, until: float | None) -> OffsetAndMetadata | None:
        group = self._cluster.group(self.config["group_id"])
        return self._ask("consumer.committed", lambda: group.committed(tp, self._stable), until)

    def beginning_offsets(
        self, partitions: Iterable[TopicPartition], timeout_ms: float | None = None
    ) -> dict[TopicPartition, int]:
        """The low watermarks."""
        return self._list(partitions, lambda log: log.low, timeout_ms)

    def end_offsets(
        self, partitions: Iterable[TopicPartition], timeout_ms: float | None = None
    ) -> dict[TopicPartition, int]:
        """The ends: for a reader of committed records the last stable offsets."""
        return self._list(partitions, lambda log: log.stable if self._stable else log.high, timeout_ms)

    def offsets_for_times(
        self, timestamps: Mapping[TopicPartition, int], timeout_ms: float | None = None
    ) -> dict[TopicPartition, OffsetAndTimestamp | None]:
        """The first records made at a time or later; None where there is none."""

        def find() -> dict[TopicPartition, OffsetAndTimestamp | None]:
            found = {tp: self._cluster.partition(tp).offset_at(time_ms) for tp, time_ms in timestamps.items()}
            return {tp: e and OffsetAndTimestamp(e.offset, e.timestamp_ms, 0) for tp, e in found.items()}

        return self._ask("consumer.list_offsets", find, self._until(timeout_ms or self.config["request_timeout_ms"]))

    def commit(self, offsets: Mapping[TopicPartition, OffsetAndMetadata], timeout_ms: float | None = None) -> None:
        """Commit outside of any transaction."""
        if self.config["group_id"] is None:
            raise IllegalStateError("Requires group_id")
        member = self.group_metadata()
        if self._member is not None and member.state != MemberState.STABLE:
            if member.state == MemberState.REBALANCING:
                raise RebalanceInProgressError("the consumer is undergoing a rebalance")
            raise CommitFailedError("the consumer is not part of an active group")
        me = (member.member_id, self.config["group_instance_id"], member.generation_id)
        group = self._cluster.group(self.config["group_id"])
        self._ask("consumer.commit", lambda: group.commit(*me, offsets), self._until(timeout_ms))

    def close(self, autocommit: bool = True, timeout_ms: float | None = None) -> None:
        """Tell the listener what is given back, and leave the group; a static member stays until its session ends."""
        if self._closed:
            return
        self._closed = True
        if self._topics is not None and self._member is not None:
            if self._places:
                self._tell(
                    "on_partitions_lost" if self._member.lost else "on_partitions_revoked", _ordered(self._places)
                )
            self._places.clear()
            self._member.leave()
        self._world.point("consumer.close")

    def _list(
        self, partitions: Iterable[TopicPartition], what: Callable[[Partition], int], timeout_ms: float | None
    ) -> dict[TopicPartition, int]:
        wanted = list(partitions)
        until = self._until(timeout_ms or self.config["request_timeout_ms"])
        return self._ask(
            "consumer.list_offsets", lambda: {tp: what(self._cluster.partition(tp)) for tp in wanted}, until
        )

    def _until(self, timeout_ms: float | None) -> float | None:
        return None if timeout_ms is None else self._world.now + timeout_ms / 1000

    def _ask(self, point: str, does: Callable[[], T], until: float | None) -> T:
        """Ask, again and again while the cluster says to, up to a time; then a KafkaTimeoutError."""
        if self._listening:
            raise RuntimeError("Cannot block on net.run() from the IO thread itself")
        world = self._world
        while True:
            left = None if until is None else max(until - world.now, 0.0)
            try:
                return world.effect(point, does, left)
            except NoAnswerError:
                raise KafkaTimeoutError("Timeout") from None
            except (RetriableError, SilenceError):
                if until is not None and world.now + RETRY_S >= until:
                    world.sleep(max(until - world.now, 0.0))
                    raise KafkaTimeoutError("Timeout") from None
                world.sleep(RETRY_S)


def _ordered(partitions: Iterable[TopicPartition]) -> Collection[TopicPartition]:
    """A set that is walked in order, so that a run does not hang on how strings are hashed."""
    return dict.fromkeys(sorted(partitions)).keys()


def _record(tp: TopicPartition, entry: Entry) -> Any:
    key, value = entry.key, entry.value
    sizes = (-1 if key is None else len(key), -1 if value is None else len(value), -1)
    headers = list(entry.headers)
    return ConsumerRecord(*tp, 0, entry.offset, entry.timestamp_ms, 0, key, value, headers, None, *sizes)
