"""How far an application is in its input, asked of the cluster from outside, and all that lies in a topic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import KafkaError

from .cluster import Cluster, partitions_of
from .judge import Seen
from .service_process import wait_until

READ_SECONDS = 120.0


class Progress:
    """Committed offsets of a group, and the ends of its input; while nobody answers, it is as far as it was."""

    def __init__(self, cluster: Cluster, group: str, topic: str, partitions: int) -> None:
        self.committed: dict[int, int] = {}
        self._cluster = cluster
        self._group = group
        self._partitions = [TopicPartition(topic, partition) for partition in range(partitions)]
        self._admin: Any = None

    def ends(self) -> dict[int, int]:
        """The offset of the next record of each partition of the input."""
        found: dict[int, int] = {}

        def answered() -> bool:
            ends = self._ask(
                lambda admin: admin.list_partition_offsets(dict.fromkeys(self._partitions, OffsetSpec.LATEST))
            )
            if ends is not None:
                found.update({tp.partition: end.offset for tp, end in ends.items()})
            return len(found) == len(self._partitions)

        wait_until(answered, "the ends of the input")
        return found

    def reached(self, ends: dict[int, int]) -> bool:
        """Whether the group has committed all `ends`."""
        offsets = self._ask(lambda admin: admin.list_group_offsets(self._group))
        if offsets is not None:
            self.committed = {tp.partition: found.offset for tp, found in offsets[self._group].items()}
        return all(self.committed.get(partition, 0) >= end for partition, end in ends.items())

    def close(self) -> None:
        """Let go."""
        if self._admin is not None:
            self._admin.close()
            self._admin = None

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        try:
            if self._admin is None:
                self._admin = self._cluster.admin()
            return question(self._admin)
        except KafkaError:
            self.close()
            return None


def read_topic(cluster: Cluster, topic: str) -> list[Seen]:
    """All that a reader of committed records finds in a topic, partition by partition.

    Raises AssertionError where a transaction that nobody ends keeps such a reader from the end.
    """
    with cluster.admin() as admin:
        partitions = [TopicPartition(topic, p["partition_index"]) for p in partitions_of(admin, topic)]
        ends = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
    assert partitions, f"there is no topic {topic}"
    consumer = KafkaConsumer(
        bootstrap_servers=cluster.bootstrap_servers, isolation_level="read_committed", enable_auto_commit=False
    )
    found: dict[Any, list[Seen]] = {tp: [] for tp in partitions}
    try:
        consumer.assign(partitions)
        consumer.seek_to_beginning()

        def read() -> bool:
            for tp, records in consumer.poll(timeout_ms=200).items():
                found[tp] += [Seen(tp.partition, r.offset, r.key, r.value, dict(r.headers)) for r in records]
            return all(consumer.position(tp) >= ends[tp].offset for tp in partitions)

        wait_until(read, f"the committed end of {topic}, {ends}", READ_SECONDS)
    finally:
        consumer.close()
    return [record for tp in partitions for record in found[tp]]
