"""A simulated Kafka cluster: topics, the transaction coordinator, and the groups, as a real broker (4.3) keeps them.

All of it is reached through clients (`clients.py`), but for what a harness does and looks at itself: `create`,
`delete`, `append`, `read` and the partitions. Markers of a transaction reach the partitions and the offsets some time
after `end_transaction` has answered, each on its own; until then readers of committed records wait at them.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Literal

from kafka.errors import (
    ConcurrentTransactionsError,
    InvalidProducerEpochError,
    InvalidProducerIdMappingError,
    InvalidTxnStateError,
    ProducerFencedError,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
)
from kafka.structs import TopicPartition

from .groups import Group, Offsets
from .log import Entry, Headers, NewRecord, Partition
from .world import World


class Topic:
    """A topic; one that is deleted and created again has another id."""

    def __init__(self, topic_id: uuid.UUID, partitions: int, configs: dict[str, str]):
        self.topic_id = topic_id
        self.configs = configs
        self.partitions = [Partition(configs) for _ in range(partitions)]


class Transaction:
    """What the coordinator knows of a transactional id."""

    def __init__(self, producer_id: int, timeout_s: float):
        self.producer_id = producer_id
        self.timeout_s = timeout_s
        self.epoch = -1
        self.former_epoch = -1  # of a producer that may still go on under `epoch`
        self.state: Literal["Empty", "Ongoing", "Commit", "Abort", "Committed", "Aborted"] = "Empty"
        self.partitions: dict[TopicPartition, Partition] = {}
        self.groups: dict[str, Group] = {}
        self.number = 0  # of the transactions that began: a timeout is for one of them
        self.markers_left = 0

    @property
    def epochs(self) -> set[int]:
        """Those under which its producer may ask for the next one."""
        return {self.epoch, self.former_epoch} - {-1}

    @property
    def ending(self) -> bool:
        """Whether its outcome is decided and markers are still under way."""
        return self.state in ("Commit", "Abort")


class Cluster:
    """The brokers. `marker_delay_s` is the longest that a marker usually takes, one in eight takes `marker_slow_s`."""

    marker_delay_s = 0.01
    marker_slow_s = 1.0
    abort_check_s = 10.0  # how often transactions that take too long are looked for

    def __init__(self, world: World):
        self.world = world
        self.topics: dict[str, Topic] = {}
        self.groups: dict[str, Group] = {}
        self.transactions: dict[str, Transaction] = {}
        self._producers = 1000

    # Topics

    def create(self, name: str, partitions: int = 1, configs: dict[str, str] | None = None) -> Topic:
        """Create a topic."""
        if name in self.topics:
            raise TopicAlreadyExistsError(f"Topic '{name}' already exists.")
        topic_id = uuid.UUID(int=self.world.random.getrandbits(128), version=4)
        self.topics[name] = Topic(topic_id, partitions, configs if configs is not None else {})
        return self.topics[name]

    def grow(self, name: str, partitions: int) -> None:
        """Add partitions to a topic, up to a number."""
        topic = self.topics[name]
        topic.partitions += [Partition(topic.configs) for _ in range(len(topic.partitions), partitions)]

    def delete(self, name: str) -> None:
        """Delete a topic; what was committed for it is forgotten with it."""
        del self.topics[name]
        for group in self.groups.values():
            for tp in [tp for tp in group.offsets if tp.topic == name]:
                del group.offsets[tp]

    def partition(self, tp: TopicPartition | tuple[str, int]) -> Partition:
        """One partition; `UnknownTopicOrPartitionError` if there is none."""
        topic = self.topics.get(tp[0])
        if topic is None or not 0 <= tp[1] < len(topic.partitions):
            raise UnknownTopicOrPartitionError(f"{tp[0]}-{tp[1]}")
        return topic.partitions[tp[1]]

    def group(self, name: str) -> Group:
        """A group, which comes to be when it is first asked for."""
        if name not in self.groups:
            self.groups[name] = Group(self.world)
        return self.groups[name]

    # What a harness writes and reads

    def append(
        self,
        topic: str,
        partition: int,
        key: bytes | None,
        value: bytes | None,
        headers: Headers = (),
        timestamp_ms: int | None = None,
    ) -> int:
        """Write a record outside of any transaction; its offset."""
        now_ms = self.world.wall_ms()
        record = NewRecord(key, value, headers, now_ms if timestamp_ms is None else timestamp_ms)
        return self.partition((topic, partition)).append([record], now_ms)

    def read(self, topic: str, partition: int) -> list[Entry]:
        """What a reader of committed records finds in a partition now."""
        log = self.partition((topic, partition))
        return log.fetch(log.low, len(log.entries) + 1, committed=True)[0]

    # Producers and transactions

    def init_producer(
        self, transactional_id: str | None, timeout_s: float, producer_id: int = -1, epoch: int = -1
    ) -> tuple[int, int]:
        """A producer id and epoch. An open transaction of that id is aborted first, and later asked again for.

        With a producer id and epoch it is a producer that goes on under the next epoch.
        """
        if transactional_id is None:
            self._producers += 1
            return self._producers, 0
        transaction = self.transactions.get(transactional_id)
        if transaction is None:
            self._producers += 1
            transaction = self.transactions[transactional_id] = Transaction(self._producers, timeout_s)
        known = producer_id >= 0
        if known and (producer_id != transaction.producer_id or epoch not in transaction.epochs):
            raise ProducerFencedError
        if transaction.ending:
            raise ConcurrentTransactionsError
        if transaction.state == "Ongoing":
            self._fence(transaction)
            raise ConcurrentTransactionsError
        transaction.state = "Empty"
        transaction.timeout_s = timeout_s
        if not known or epoch == transaction.epoch:
            transaction.former_epoch = epoch
            transaction.epoch += 1
        return transaction.producer_id, transaction.epoch

    def add_partitions(
        self, transactional_id: str, producer_id: int, epoch: int, partitions: Sequence[TopicPartition]
    ) -> None:
        """Make partitions part of the open transaction, and begin it with the first."""
        transaction = self._of(transactional_id, producer_id, epoch)
        found = {tp: self.partition(tp) for tp in partitions}
        self._begin(transaction)
        transaction.partitions.update(found)

    def add_offsets(self, transactional_id: str, producer_id: int, epoch: int, group: str) -> None:
        """Make a group's offsets part of the open transaction."""
        transaction = self._of(transactional_id, producer_id, epoch)
        self._begin(transaction)
        transaction.groups[group] = self.group(group)

    def commit_offsets(
        self,
        transactional_id: str,
        producer_id: int,
        epoch: int,
        group: str,
        member_id: str,
        instance: str | None,
        generation: int,
        offsets: Offsets,
    ) -> None:
        """Offsets that count once the transaction is committed."""
        transaction = self.transactions[transactional_id]
        if epoch != transaction.epoch:
            raise InvalidProducerEpochError
        if transaction.state != "Ongoing" or group not in transaction.groups:
            raise InvalidTxnStateError
        self.group(group).commit_in_transaction(producer_id, member_id, instance, generation, offsets)

    def produce(
        self,
        tp: TopicPartition,
        records: Sequence[NewRecord],
        producer_id: int,
        epoch: int,
        sequence: int,
        transactional_id: str | None,
    ) -> int:
        """Write a batch; the offset of its first record."""
        log = self.partition(tp)
        if transactional_id is not None:
            transaction = self.transactions[transactional_id]
            if epoch < transaction.epoch:
                raise InvalidProducerEpochError
            if transaction.state != "Ongoing" or tp not in transaction.partitions:
                raise InvalidTxnStateError
        return log.append(
            records,
            self.world.wall_ms(),
            producer_id=producer_id,
            epoch=epoch,
            sequence=sequence,
            transactional=transactional_id is not None,
        )

    def end_transaction(self, transactional_id: str, producer_id: int, epoch: int, commit: bool) -> None:
        """Decide the outcome. The same again changes nothing; but a late one ends whatever is open under its epoch."""
        transaction = self.transactions[transactional_id]
        if producer_id != transaction.producer_id:
            raise InvalidProducerIdMappingError
        if epoch != transaction.epoch:
            raise ProducerFencedError
        if transaction.state == "Ongoing":
            self._end(transaction, commit)
        elif transaction.state == ("Commit" if commit else "Abort"):
            raise ConcurrentTransactionsError
        elif transaction.state != ("Committed" if commit else "Aborted"):
            raise InvalidTxnStateError

    def _of(self, transactional_id: str, producer_id: int, epoch: int) -> Transaction:
        transaction = self.transactions[transactional_id]
        if producer_id != transaction.producer_id:
            raise InvalidProducerIdMappingError
        if epoch != transaction.epoch:
            raise ProducerFencedError
        if transaction.ending:
            raise ConcurrentTransactionsError
        return transaction

    def _begin(self, transaction: Transaction) -> None:
        if transaction.state == "Ongoing":
            return
        transaction.state = "Ongoing"
        transaction.partitions, transaction.groups = {}, {}
        transaction.number += 1
        number = transaction.number

        def time_out() -> None:
            if transaction.state == "Ongoing" and transaction.number == number:
                self._fence(transaction)

        late_s = self.world.random.random() * self.abort_check_s
        self.world.at(self.world.now + transaction.timeout_s + late_s, time_out)

    def _fence(self, transaction: Transaction) -> None:
        """Abort what is open, under the next epoch: nothing more is taken from whoever has it open."""
        transaction.former_epoch = transaction.epoch
        transaction.epoch += 1
        self._end(transaction, commit=False)

    def _end(self, transaction: Transaction, commit: bool) -> None:
        transaction.state = "Commit" if commit else "Abort"
        producer_id, epoch = transaction.producer_id, transaction.epoch

        def mark(target: Partition | Group) -> None:
            if isinstance(target, Partition):
                target.mark(producer_id, epoch, commit, self.world.wall_ms())
            else:
                target.mark(producer_id, commit)
            transaction.markers_left -= 1
            if transaction.markers_left == 0:
                transaction.state = "Committed" if commit else "Aborted"

        targets = [*transaction.partitions.values(), *transaction.groups.values()]
        transaction.markers_left = len(targets)
        draw = self.world.random.random
        slow_s = self.marker_slow_s * draw() if draw() < 0.125 else 0.0  # a broker that is busy
        for target in targets:
            delay_s = self.marker_delay_s * draw() + (slow_s if draw() < 0.5 else 0.0)
            self.world.at(self.world.now + delay_s, lambda target=target: mark(target))  # type: ignore[misc]
