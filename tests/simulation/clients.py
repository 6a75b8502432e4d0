"""The client library, simulated: classes in place of kafka-python's KafkaConsumer, KafkaProducer, KafkaAdminClient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import kafka
from kafka.errors import KafkaTimeoutError, RetriableError, UnknownTopicOrPartitionError
from kafka.structs import OffsetAndTimestamp, TopicPartition

from .cluster import Cluster
from .consumer import SimulatedConsumer
from .producer import SimulatedProducer
from .world import RETRY_S, NoAnswerError, SilenceError, World

T = TypeVar("T")
POINTS = (  # all points at which a schedule is asked, by what reaches them
    *("admin.connect", "admin.describe_topics", "admin.create_topics", "admin.delete_topics", "admin.delete_records"),
    "admin.create_partitions",
    *("admin.describe_configs", "admin.list_offsets", "admin.describe_groups", "admin.remove_group_members"),
    *("consumer.connect", "consumer.metadata", "consumer.poll", "consumer.fetch", "consumer.group_metadata"),
    *("consumer.committed", "consumer.commit", "consumer.list_offsets", "consumer.close"),
    *("consumer.join", "consumer.sync", "consumer.heartbeat", "consumer.leave"),  # these in the I/O thread
    *("producer.connect", "producer.init", "producer.begin", "producer.send", "producer.flush"),
    *("producer.add_partitions", "producer.produce", "producer.add_offsets", "producer.offsets"),
    *("producer.end:commit", "producer.end:abort"),
)


class SimulatedAdmin:
    """What adapters ask of KafkaAdminClient."""

    DEFAULT_CONFIG = kafka.KafkaAdminClient.DEFAULT_CONFIG

    def __init__(self, world: World, cluster: Cluster, configs: Mapping[str, Any]):
        self.config = {**self.DEFAULT_CONFIG, **configs}
        self._world, self._cluster = world, cluster
        self._ask("admin.connect", lambda: None)

    def describe_topics(self, topics: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One description a topic; one that does not exist has the error code 3."""
        names = list(self._cluster.topics) if topics is None else list(topics)
        return self._ask("admin.describe_topics", lambda: [self._describe(name) for name in names])

    def _describe(self, name: str) -> dict[str, Any]:
        topic = self._cluster.topics.get(name)
        numbers = range(len(topic.partitions)) if topic is not None else ()
        return {
            "error_code": 3 if topic is None else 0,
            "name": name,
            "topic_id": None if topic is None else str(topic.topic_id),
            "is_internal": False,
            "partitions": [
                {"error_code": 0, "partition_index": number, "leader_id": 1, "leader_epoch": 0} for number in numbers
            ],
        }

    def create_topics(
        self, new_topics: Mapping[str, Mapping[str, Any]], wait_for_metadata: bool = False, **_: Any
    ) -> dict[str, Any]:
        """Create topics; `TopicAlreadyExistsError` where one is there."""

        def create() -> None:
            for name, options in new_topics.items():
                self._cluster.create(name, max(options.get("num_partitions", 1), 1), dict(options.get("configs", {})))

        self._ask("admin.create_topics", create)
        return {"topics": [{"name": name, "error_code": 0} for name in new_topics]}

    def create_partitions(self, topic_partitions: Mapping[str, int], **_: Any) -> None:
        """Add partitions to topics, up to a number."""

        def grow() -> None:
            for name, count in topic_partitions.items():
                self._cluster.grow(name, count)

        self._ask("admin.create_partitions", grow)

    def delete_topics(self, topics: Iterable[str], **_: Any) -> None:
        """Delete topics."""
        names = list(topics)

        def delete() -> None:
            for name in names:
                self._cluster.delete(name)

        self._ask("admin.delete_topics", delete)

    def delete_records(self, records_to_delete: Mapping[TopicPartition, int], **_: Any) -> None:
        """Delete what lies before offsets, as retention does."""

        def delete() -> None:
            for tp, offset in records_to_delete.items():
                self._cluster.partition(tp).delete_before(offset)

        self._ask("admin.delete_records", delete)

    def wait_for_topics(self, topic_names: Iterable[str], timeout_ms: float = 10_000) -> None:
        """Wait until topics are there."""
        wanted, until = list(topic_names), self._world.now + timeout_ms / 1000
        while any(found["error_code"] for found in self.describe_topics(wanted)):
            if self._world.now >= until:
                raise KafkaTimeoutError(f"Topics not ready after {timeout_ms}ms: {wanted}")
            self._world.sleep(0.1)

    def describe_configs(
        self, config_resources: Sequence[Any], include_synonyms: bool = False, config_filter: str = "modified"
    ) -> dict[str, dict[str, Any]]:
        """The settings of topics that are not the defaults, or `all` of those that matter here."""
        defaults = {"cleanup.policy": "delete", "max.message.bytes": "1048588", "retention.ms": "604800000"}

        def describe() -> dict[str, Any]:
            found = {}
            for resource in config_resources:
                topic = self._cluster.topics.get(resource.name)
                mine = {} if topic is None else topic.configs
                settings = {**(defaults if config_filter != "modified" and topic is not None else {}), **mine}
                found[resource.name] = {name: {"value": value} for name, value in settings.items()}
            return found

        return {"topic": self._ask("admin.describe_configs", describe)}

    def list_partition_offsets(
        self, topic_partition_specs: Mapping[TopicPartition, Any], isolation_level: Any = None, timeout_ms: Any = None
    ) -> dict[TopicPartition, OffsetAndTimestamp]:
        """High watermarks (-1, LATEST) or low ones (-2, EARLIEST), as a reader of uncommitted records sees them."""

        def find(tp: TopicPartition, spec: int) -> int:
            log = self._cluster.partition(tp)
            assert spec in (-1, -2), spec
            return log.high if spec == -1 else log.low

        return self._ask(
            "admin.list_offsets",
            lambda: {tp: OffsetAndTimestamp(find(tp, int(spec)), -1, 0) for tp, spec in topic_partition_specs.items()},
        )

    def describe_groups(self, group_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
        """State and members of groups, each with what it was assigned."""
        names = list(group_ids)
        return self._ask(
            "admin.describe_groups", lambda: {name: self._cluster.group(name).describe() for name in names}
        )

    def remove_group_members(self, group_id: str, members: Iterable[Any]) -> None:
        """Let static members leave, by their instance ids."""
        instances = [member.group_instance_id for member in members]

        def remove() -> None:
            for instance in instances:
                self._cluster.group(group_id).leave_instance(instance)

        self._ask("admin.remove_group_members", remove)

    def close(self) -> None:
        """Let go."""

    def __enter__(self) -> SimulatedAdmin:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, point: str, does: Callable[[], T]) -> T:
        limit_ms = self.config["bootstrap_timeout_ms" if point == "admin.connect" else "request_timeout_ms"]
        until = self._world.now + limit_ms / 1000
        while True:
            try:
                return self._world.effect(point, does, max(until - self._world.now, 0.0))
            except NoAnswerError:
                raise KafkaTimeoutError("Timeout") from None
            except UnknownTopicOrPartitionError:
                raise
            except (RetriableError, SilenceError):
                if self._world.now + RETRY_S >= until:
                    raise KafkaTimeoutError("Timeout") from None
                self._world.sleep(RETRY_S)


class Clients:
    """The three client classes, each bound to one world and cluster: what an adapter gets in place of the library's."""

    def __init__(self, world: World, cluster: Cluster):
        class KafkaConsumer(SimulatedConsumer):
            """KafkaConsumer."""

            def __init__(self, *topics: str, **configs: Any):
                super().__init__(world, cluster, configs)
                if topics:
                    self.subscribe(topics)

        class KafkaProducer(SimulatedProducer):
            """KafkaProducer."""

            def __init__(self, **configs: Any):
                super().__init__(world, cluster, configs)

        class KafkaAdminClient(SimulatedAdmin):
            """KafkaAdminClient."""

            def __init__(self, **configs: Any):
                super().__init__(world, cluster, configs)

        self.KafkaConsumer = KafkaConsumer
        self.KafkaProducer = KafkaProducer
        self.KafkaAdminClient = KafkaAdminClient
