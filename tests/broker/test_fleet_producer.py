"""The simulated fleet on a real broker."""

from __future__ import annotations

import uuid

from kafka import KafkaConsumer

from statestep.consumers.fleet import simulate
from statestep.consumers.fleet_producer import PARTITIONS, open_topic, produce_fleet


def test_a_fleet_lands_in_a_topic_of_its_own(bootstrap_servers: str) -> None:
    """The topic is made where it is missing and kept where it is not; each pump's readings are in one partition, whole
    and in order, twice after two runs of one seed.
    """
    topic = f"fleet-{uuid.uuid4().hex[:12]}"
    for _ in range(2):
        writer = open_topic({"bootstrap_servers": bootstrap_servers}, topic)
        sent = produce_fleet(writer.write, seed=4, pumps=8, days=0.5, speed=0.0)
        writer.close()
    fleet = simulate(pumps=8, days=0.5, seed=4)
    found: dict[bytes, list[tuple[int, bytes]]] = {}
    with KafkaConsumer(
        topic, bootstrap_servers=bootstrap_servers, auto_offset_reset="earliest", consumer_timeout_ms=20_000
    ) as consumer:
        for _ in range(2 * sent):
            record = next(consumer)
            found.setdefault(record.key, []).append((record.partition, record.value))
        assert consumer.partitions_for_topic(topic) == set(range(PARTITIONS))
    for key in fleet.keys:
        assert len({partition for partition, _ in found[key]}) == 1
        assert [value for _, value in found[key]] == 2 * [r.value for r in fleet.messages() if r.key == key]
    assert len({partition for rows in found.values() for partition, _ in rows}) > 1
