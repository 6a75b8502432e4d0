"""The topics that the service needs: which there must be, which it makes, and how they must be kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from kafka.admin import ConfigResource, ConfigResourceType
from kafka.errors import KafkaError, TopicAlreadyExistsError

from statestep.consumers.kafka_client import FORBIDDEN, REAL, REQUEST_MS, Clients, Properties, connect, fail
from statestep.consumers.ports import BrokerError, Identity

log = logging.getLogger("statestep")

STATE_RECORD_BYTES = 8 * 1024 * 1024  # of the largest record that a changelog made here takes
BACKOFF_S = 0.5
SETTLED_S = 3.0  # by when every node knows how a new topic is kept
DAY_MS = 24 * 60 * 60 * 1000
CHANGELOG = {
    "cleanup.policy": "compact",
    "segment.bytes": str(64 * 1024 * 1024),  # the segment that is being written to is never compacted
    "min.cleanable.dirty.ratio": "0.1",
    "delete.retention.ms": str(DAY_MS),  # a restore that takes longer than this could miss that a stream has ended
    "max.message.bytes": str(STATE_RECORD_BYTES),
}


def changelog_topic(app_id: str) -> str:
    """The name of the topic that holds an application's states.

    >>> changelog_topic("pumps")
    'pumps-state-changelog'
    """
    return f"{app_id}-state-changelog"


def prepare_topics(
    properties: Properties,
    app_id: str,
    topic: str,
    made: Sequence[str],
    *,
    create: bool,
    clients: Clients = REAL,
) -> dict[str, int]:
    """See that the input is there, and `made` (output, dead letters) and the changelog; partition counts by topic.

    Those that are missing are created with the input's partition count and the broker's own number of replicas, or
    refused where `create` is false. Raises `BrokerError` for what is missing or kept in a way that loses states, and
    where nobody answers for as long as a question may take: the client does not ask the others where one node is away.
    """
    began = clients.clock()
    while True:
        try:
            return _prepare(properties, app_id, topic, made, create, clients)
        except _AskAgain as error:
            if clients.clock() - began > error.for_s:
                raise
            clients.sleep(BACKOFF_S)


class _AskAgain(BrokerError):
    """What may be otherwise in a moment."""

    for_s: float  # how long it is asked again


class _Away(_AskAgain):
    """A node did not answer, which the next one may do."""

    for_s = REQUEST_MS / 1000


class _Unsettled(_AskAgain):
    """A topic is missing, or kept in a way that loses states: so is one just made, at nodes that know little of it."""

    for_s = SETTLED_S


def _prepare(
    properties: Properties, app_id: str, topic: str, made: Sequence[str], create: bool, clients: Clients
) -> dict[str, int]:
    """`prepare_topics`, once. All of it can be done again."""
    changelog = changelog_topic(app_id)
    wanted = [topic, *made, changelog]
    with _admin(properties, app_id, "looking at the topics", clients) as admin:
        counts = _partition_counts(admin, wanted)
        if topic not in counts:
            raise BrokerError(f"the input topic {topic!r} does not exist; create it, or name another with --input")
        missing = [name for name in wanted if name not in counts]
        if missing and not create:
            raise BrokerError(f"the topic {missing[0]!r} does not exist and --no-create-topics forbids making it")
        for name in missing:
            _create(admin, name, counts[topic], CHANGELOG if name == changelog else {})
        counts = _partition_counts(admin, wanted)
        for name in wanted:
            if name not in counts:
                raise _Unsettled(f"the topic {name!r} went away while the service was starting; start it again")
        _check_changelog(changelog, counts[changelog], topic, counts[topic], _settings(admin, changelog))
        return counts


def identify(properties: Properties, app_id: str, topic: str, clients: Clients = REAL) -> Identity:
    """What a topic is by now. Raises `BrokerError`, also where it has gone."""
    with _admin(properties, app_id, f"looking at the topic {topic!r}", clients) as admin:
        for found in admin.describe_topics([topic]):
            if found["name"] == topic and not found["error_code"] and found["partitions"]:
                policy = _settings(admin, topic).get("cleanup.policy", "delete")
                return Identity(str(found["topic_id"]), len(found["partitions"]), policy == "delete")
    raise BrokerError(f"the topic {topic!r} does not exist any more")


@contextmanager
def _admin(properties: Properties, app_id: str, doing: str, clients: Clients) -> Iterator[Any]:
    """An admin client for a while; what it raises becomes a `BrokerError` that tells what was being done."""
    admin = connect(clients.admin, properties, client_id=app_id)
    try:
        yield admin
    except KafkaError as error:
        if getattr(error, "retriable", False) and not isinstance(error, FORBIDDEN):
            raise _Away(f"{doing} failed: {type(error).__name__}: {error}") from None
        fail(doing, error)
    finally:
        admin.close()


def _create(admin: Any, name: str, partitions: int, configs: Mapping[str, str]) -> None:
    log.info("creating topic %s with %d partitions", name, partitions)
    try:
        admin.create_topics({name: {"num_partitions": partitions, "configs": dict(configs)}}, wait_for_metadata=True)
    except TopicAlreadyExistsError:  # another process of the application was quicker
        admin.wait_for_topics([name], timeout_ms=REQUEST_MS)


def _partition_counts(admin: Any, topics: Sequence[str]) -> dict[str, int]:
    found = admin.describe_topics(list(topics))
    return {item["name"]: len(item["partitions"]) for item in found if not item["error_code"] and item["partitions"]}


def _settings(admin: Any, topic: str) -> dict[str, str]:
    """A topic's configuration as it is in force, the broker's defaults included."""
    found = admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic)], config_filter="all")
    return {name: str(entry["value"]) for name, entry in found["topic"][topic].items()}


def _check_changelog(name: str, partitions: int, topic: str, wanted: int, settings: Mapping[str, str]) -> None:
    """Refuse a changelog from which a restore could come back with states missing or streams that had ended."""
    if partitions != wanted:
        raise BrokerError(
            f"the topic {name!r} has {partitions} partitions and the input {topic!r} has {wanted}; a state lies where "
            "its stream's messages lie, so use another --app-id, or an input with as many partitions"
        )
    policy = settings.get("cleanup.policy", "delete")
    if policy != "compact":
        raise _Unsettled(
            f"the topic {name!r} has cleanup.policy={policy}, which deletes states that are still needed; "
            "set it to compact"
        )
    kept_ms = int(settings.get("delete.retention.ms", DAY_MS))
    if kept_ms < DAY_MS:
        raise _Unsettled(
            f"the topic {name!r} has delete.retention.ms={kept_ms}, so that a restore may not see that a stream has "
            f"ended; set it to {DAY_MS} (a day) or more"
        )
