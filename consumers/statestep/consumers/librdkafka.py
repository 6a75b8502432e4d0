"""Kafka through librdkafka, the client of the extra `librdkafka`: the adapters of kafka-python's, by other means.

Importing this raises `ConfigError` where the extra is not installed.
"""

from statestep.consumers.config import ConfigError

try:
    from statestep.consumers.librdkafka_changelog import LibrdkafkaChangelog
    from statestep.consumers.librdkafka_sink import LibrdkafkaSink
    from statestep.consumers.librdkafka_source import LibrdkafkaSource
except ModuleNotFoundError as missing:
    if missing.name != "confluent_kafka":
        raise
    raise ConfigError(
        "--client librdkafka needs the package confluent-kafka; install it with pip install 'statestep[librdkafka]'"
    ) from None

__all__ = ["LibrdkafkaChangelog", "LibrdkafkaSink", "LibrdkafkaSource"]
