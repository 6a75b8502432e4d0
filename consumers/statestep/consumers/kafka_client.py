"""How a kafka-python client is set up: properties under the names people know, errors in one sentence."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import AuthorizationError, KafkaError, SaslAuthenticationFailedError, UnsupportedCodecError

from statestep.consumers import kafka_codecs
from statestep.consumers.deadline import within
from statestep.consumers.ports import BrokerError

log = logging.getLogger("statestep")

BOOTSTRAP_MS = 15_000  # how long a broker may take to answer at all
REQUEST_MS = 15_000  # how long a blocking question may take
RECONNECT_MS = 1_000  # at most between two tries to connect; the client's own 30 s would outlast most outages

FORBIDDEN = (AuthorizationError, SaslAuthenticationFailedError)  # trying again does not help

Properties = Mapping[str, Any]


class Clients(NamedTuple):
    """All of the outside that the Kafka adapters touch; a simulation brings its own."""

    consumer: Any = KafkaConsumer
    producer: Any = KafkaProducer
    admin: Any = KafkaAdminClient
    clock: Callable[[], float] = time.monotonic  # seconds
    sleep: Callable[[float], None] = time.sleep
    within: Callable[[float, Callable[[], Any]], Any] = within


REAL = Clients()

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
    "group_instance_id", "transaction_timeout_ms",
}  # fmt: skip


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
    kafka_codecs.bound()
    known = getattr(client, "DEFAULT_CONFIG", config)
    config = {name: value for name, value in config.items() if name in known}
    config.setdefault("bootstrap_timeout_ms", BOOTSTRAP_MS)
    config.setdefault("reconnect_backoff_max_ms", RECONNECT_MS)
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


def fail(doing: str, error: KafkaError) -> NoReturn:
    """Raise what kafka-python said as a `BrokerError` that tells what was being done."""
    missing = "; pip install 'statestep[compression]'" if isinstance(error, UnsupportedCodecError) else ""
    raise BrokerError(f"{doing} failed: {error}{missing}") from None
