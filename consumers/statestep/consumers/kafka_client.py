"""How a kafka-python client is set up: properties under the names people know, errors in one sentence, topics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import KafkaError, TopicAlreadyExistsError

from statestep.consumers.ports import BrokerError

log = logging.getLogger("statestep")

BOOTSTRAP_MS = 15_000  # how long a broker may take to answer at all
REQUEST_MS = 15_000  # how long a blocking question may take

Properties = Mapping[str, Any]

# Names that Java's client or librdkafka use, where they are not kafka-python's with dots.
OTHER_NAMES = {
    "sasl_mechanisms": "sasl_mechanism",
    "sasl_username": "sasl_plain_username",
    "sasl_password": "sasl_plain_password",
    "ssl_ca_location": "ssl_cafile",
    "ssl_certificate_location": "ssl_certfile",
    "ssl_key_location": "ssl_keyfile",
    "ssl_key_password": "ssl_password",
}
OURS = {
    "group_id", "enable_auto_commit", "auto_offset_reset", "isolation_level", "transactional_id", "acks",
    "enable_idempotence", "partition_assignment_strategy", "key_deserializer", "value_deserializer",
    "key_serializer", "value_serializer", "bootstrap_servers", "client_id", "allow_auto_create_topics",
}  # fmt: skip


def prepare_topics(
    properties: Properties, app_id: str, topic: str, made: Sequence[str], *, create: bool
) -> dict[str, int]:
    """See that the input exists and that `made` do; the number of partitions by topic, the input's also under "".

    Missing ones of `made` are created with the input's partition count, or refused if `create` is false.
    """
    admin = connect(KafkaAdminClient, properties, client_id=app_id)
    try:
        counts = _partition_counts(admin, [topic, *made])
        if topic not in counts:
            raise BrokerError(f"the input topic {topic!r} does not exist; create it, or name another with --input")
        missing = [name for name in made if name not in counts]
        if missing and not create:
            raise BrokerError(f"the topic {missing[0]!r} does not exist and --no-create-topics forbids making it")
        for name in missing:
            log.info("creating topic %s with %d partitions", name, counts[topic])
            try:
                admin.create_topics({name: {"num_partitions": counts[topic]}}, wait_for_metadata=True)
            except TopicAlreadyExistsError:  # another process of the application was quicker
                admin.wait_for_topics([name], timeout_ms=REQUEST_MS)
        counts = _partition_counts(admin, [topic, *made])
        return counts | {"": counts[topic]}
    except KafkaError as error:
        fail("looking at the topics", error)
    finally:
        admin.close()


def client_properties(given: Properties) -> dict[str, Any]:
    """Kafka properties under the names of kafka-python, with its types.

    Dotted names of Java's client and of librdkafka are taken too. One that no client knows, or that the service
    sets itself, is a ValueError.

    >>> client_properties({"security.protocol": "SASL_SSL", "sasl.username": "me", "request.timeout.ms": "9000"})
    {'security_protocol': 'SASL_SSL', 'sasl_plain_username': 'me', 'request_timeout_ms': 9000}
    """
    known = KafkaAdminClient.DEFAULT_CONFIG | KafkaProducer.DEFAULT_CONFIG | KafkaConsumer.DEFAULT_CONFIG
    properties = {}
    for name, value in given.items():
        key = name.replace(".", "_").replace("-", "_")
        key = OTHER_NAMES.get(key, key)
        if key in OURS:
            raise ValueError(f"the Kafka property {name!r} is the service's own to set; leave it out")
        if key not in known:
            raise ValueError(f"the Kafka property {name!r} is not known to the client kafka-python")
        properties[key] = _typed(name, value, known[key])
    return properties


def _typed(name: str, value: Any, default: Any) -> Any:
    """A property's text as the type of its default."""
    if not isinstance(value, str) or isinstance(default, str) or default is None:
        return value
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"the Kafka property {name!r} is {value!r}, it must be true or false")
        return value.lower() == "true"
    if isinstance(default, int | float):
        try:
            return int(value)
        except ValueError:
            raise ValueError(f"the Kafka property {name!r} is {value!r}, it must be a whole number") from None
    return value


def connect(client: Any, properties: Properties, **ours: Any) -> Any:
    """A kafka-python client with the properties that it knows; settings of ours that are not in `OURS` give way."""
    fixed = {name: value for name, value in ours.items() if name in OURS}
    config = {name: value for name, value in ours.items() if name not in OURS} | dict(properties) | fixed
    config = {name: value for name, value in config.items() if name in client.DEFAULT_CONFIG}
    config.setdefault("bootstrap_timeout_ms", BOOTSTRAP_MS)
    where = ",".join(config.get("bootstrap_servers", []))
    try:
        with _quiet():
            return client(**config)
    except KafkaError as error:
        raise BrokerError(
            f"no Kafka broker answers at {where} ({type(error).__name__}: {error}); "
            "is it running, and is --bootstrap-servers right?"
        ) from None
    except (ValueError, OSError, AssertionError) as error:
        raise BrokerError(f"the Kafka client cannot be set up for {where}: {error}") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the client's log still while it tries: each failed try is an error there, the last is a sentence here."""
    logger = logging.getLogger("kafka")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _partition_counts(admin: Any, topics: Sequence[str]) -> dict[str, int]:
    found = admin.describe_topics(list(topics))
    return {item["name"]: len(item["partitions"]) for item in found if not item["error_code"] and item["partitions"]}


def fail(doing: str, error: KafkaError) -> NoReturn:
    """Raise what kafka-python said as a `BrokerError` that tells what was being done."""
    raise BrokerError(f"{doing} failed: {type(error).__name__}: {error}") from None
