"""How a librdkafka client is set up through confluent-kafka, and what its errors mean."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from confluent_kafka import KafkaError, KafkaException

from statestep.consumers.config import ConfigError
from statestep.consumers.kafka_client import REQUEST_MS, Properties
from statestep.consumers.ports import BrokerError

log = logging.getLogger("statestep")
librdkafka_log = logging.getLogger("librdkafka")  # its own lines; they come while a client is polled
librdkafka_log.addFilter(lambda line: not line.getMessage().startswith(("CONFWARN", "FAIL")))
# Left out: that a client was given properties of another kind of client, and each single try to connect.

REQUEST_S = REQUEST_MS / 1000
WARNING_S = 30.0  # at most one warning in so long while the broker is away

# What confluent-kafka raises. A fatal error comes out of `flush` and `poll` as a bare KafkaError, which `except
# Exception`, and even BaseException, lets through: it is none of them, and can still be raised and named. Where a
# callback of ours was to run at that moment, Python finds two errors at once and makes a SystemError of them.
RAISED: Any = (KafkaException, KafkaError, SystemError)

# kafka-python's names where librdkafka's are not the same with dots.
OTHER_NAMES = {
    "sasl_plain_username": "sasl.username",
    "sasl_plain_password": "sasl.password",
    "sasl_kerberos_name": "sasl.kerberos.principal",
    "ssl_cafile": "ssl.ca.location",
    "ssl_certfile": "ssl.certificate.location",
    "ssl_keyfile": "ssl.key.location",
    "ssl_password": "ssl.key.password",
    "ssl_crlfile": "ssl.crl.location",
    "ssl_ciphers": "ssl.cipher.suites",
    "fetch_max_wait_ms": "fetch.wait.max.ms",
    "max_request_size": "message.max.bytes",
    "receive_buffer_bytes": "socket.receive.buffer.bytes",
    "send_buffer_bytes": "socket.send.buffer.bytes",
}

UNKNOWN = {
    "api_version", "bootstrap_timeout_ms", "consumer_timeout_ms", "default_offset_commit_callback",
    "enable_incremental_fetch_sessions", "exclude_internal_topics", "kafka_client", "max_block_ms",
    "metric_group_prefix", "metric_reporters", "metrics_enabled", "metrics_num_samples", "metrics_sample_window_ms",
    "proxy_url", "sasl_kerberos_domain_name", "sasl_oauth_token_provider", "selector", "socket_options",
    "socks5_proxy", "ssl_context",
}  # fmt: skip

FORBIDDEN = {
    KafkaError._AUTHENTICATION,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
}
HOPELESS = FORBIDDEN | {  # trying again does not help
    KafkaError._BAD_MSG,
    KafkaError._BAD_COMPRESSION,
    KafkaError._NOT_IMPLEMENTED,
    KafkaError._UNSUPPORTED_FEATURE,
    KafkaError.INCONSISTENT_GROUP_PROTOCOL,
    KafkaError.INVALID_SESSION_TIMEOUT,
    KafkaError.UNSUPPORTED_VERSION,
}


def client_properties(properties: Properties) -> dict[str, Any]:
    """Properties as `kafka_client.client_properties` gives them, under librdkafka's names.

    One that librdkafka does not know is a `ConfigError`.

    >>> client_properties({"security_protocol": "SASL_SSL", "sasl_plain_username": "me", "ssl_check_hostname": False})
    {'security.protocol': 'SASL_SSL', 'sasl.username': 'me', 'ssl.endpoint.identification.algorithm': 'none'}
    >>> client_properties({"api_version": "2.8"})
    Traceback (most recent call last):
    statestep.consumers.config.ConfigError: the Kafka property 'api_version' is not known to librdkafka; leave it out
    """
    translated: dict[str, Any] = {}
    for name, value in properties.items():
        if name in UNKNOWN:
            raise ConfigError(f"the Kafka property {name!r} is not known to librdkafka; leave it out")
        if name == "ssl_check_hostname":
            translated["ssl.endpoint.identification.algorithm"] = "https" if value else "none"
        elif name == "bootstrap_servers" and not isinstance(value, str):
            translated["bootstrap.servers"] = ",".join(value)
        else:
            translated[OTHER_NAMES.get(name, name.replace("_", "."))] = value
    return translated


def connect(client: Any, properties: Properties, ours: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """A librdkafka client; it connects by itself, sooner or later. The properties win over `defaults` alone.

    Raises `BrokerError` where it cannot be set up, and what `client_properties` raises.
    """
    config = {**defaults, **client_properties(properties), **ours}
    try:
        return client(config, logger=librdkafka_log)
    except (*RAISED, TypeError, ValueError) as error:
        raise BrokerError(f"the Kafka client cannot be set up: {error_of(error)}") from None


def error_of(raised: Any) -> Any:
    """The KafkaError that was raised, bare or wrapped; anything else as it is."""
    return raised.args[0] if isinstance(raised, KafkaException) and raised.args else raised


def code_of(error: Any) -> int | None:
    """The error's code, one of KafkaError's constants; None of what is no KafkaError."""
    return int(error.code()) if isinstance(error, KafkaError) else None


def says(error: Any) -> str:
    """An error in a few words: librdkafka's name of it, and its sentence."""
    return f"{error.name()}: {error.str()}" if isinstance(error, KafkaError) else f"{type(error).__name__}: {error}"


def fail(doing: str, raised: Any) -> NoReturn:
    """Raise what librdkafka said as a `BrokerError` that tells what was being done."""
    raise BrokerError(f"{doing} failed: {says(error_of(raised))}") from None


class Patience:
    """Takes errors as silence where the broker may come back, with a warning now and then."""

    def __init__(self, doing: str, clock: Any = time.monotonic):
        self._doing, self._clock = doing, clock
        self._quiet_until = -float("inf")

    def bear(self, error: Any) -> None:
        """Go on, or raise `BrokerError` where waiting will not help."""
        if code_of(error) in HOPELESS:
            fail(self._doing, error)
        if self._clock() >= self._quiet_until:
            log.warning("%s: %s; trying on", self._doing, says(error))
            self._quiet_until = self._clock() + WARNING_S


def gather(consumer: Any, max_records: int, timeout_s: float) -> list[Any]:
    """What is at hand, up to `max_records`; where nothing is, wait for something, but not for more of it.

    To ask for many at once would wait until there are as many. Records, errors and ends of partitions alike.
    """
    messages: list[Any] = consumer.consume(max_records, 0)
    if not messages and timeout_s > 0:
        messages = consumer.consume(1, timeout_s)
        if messages and max_records > 1:
            messages += consumer.consume(max_records - 1, 0)
    return messages
