"""Sends a simulated fleet's readings into a topic, as pumps would: what there is to serve where no real sensors are."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import msgspec
from kafka import KafkaAdminClient
from kafka.errors import KafkaError, TopicAlreadyExistsError

from statestep.consumers.fleet import IDLE_SECONDS, SENSORS, START_NS, play, simulate
from statestep.consumers.kafka_client import Properties, connect, fail
from statestep.consumers.kafka_delivery import KafkaWriter, Route
from statestep.consumers.ports import BrokerError, Message, Undecided
from statestep.consumers.tables import FileError

CLIENT_ID = "statestep-fleet"
RUN_DAYS = 30  # of one simulation; an endless fleet is one after the other
DAY_NS = 86_400_000_000_000
PARTITIONS = 4  # of a topic that is made here


def produce_fleet(
    write: Callable[[Sequence[Message]], None],
    *,
    seed: int,
    pumps: int = 48,
    days: float | None = None,
    speed: float = 300.0,
    stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Write a fleet over `days`, or without end where that is None, until `stopping`; gives how many readings.

    A paced fleet reports as live sensors do, with the time of day at which a reading is sent; at `speed` 0 all of it
    is sent as fast as it goes, under its simulated times. After every `RUN_DAYS` the next seed goes on.
    """
    sent = 0
    for run in count():
        left = RUN_DAYS if days is None else min(days - run * RUN_DAYS, RUN_DAYS)
        if left <= 0:
            return sent
        fleet = simulate(pumps, left, seed=seed + run, start_ns=START_NS + run * RUN_DAYS * DAY_NS)
        for portion in play(fleet, speed, stamp=time.time_ns if speed else None):
            if portion:
                try:
                    write([Message(False, 0, key, value, (), time_ms) for key, value, time_ms in portion])
                except Undecided as error:
                    raise BrokerError(f"{error}; some readings may be missing") from None
                sent += len(portion)
            if stopping():
                return sent
            if not portion:
                time.sleep(IDLE_SECONDS)
    return sent


def open_topic(properties: Properties, topic: str) -> KafkaWriter:
    """A writer to `topic`, which is made where it is missing; readings go to the partition of their key's murmur2."""
    admin = connect(KafkaAdminClient, properties, client_id=CLIENT_ID)
    try:
        admin.create_topics({topic: {"num_partitions": PARTITIONS}}, wait_for_metadata=True)
    except TopicAlreadyExistsError:
        pass  # it stays as it is
    except KafkaError as error:
        fail(f"creating the topic {topic!r}", error)
    finally:
        admin.close()
    # No count of an input's partitions: nothing is answered here, so the client chooses the partition by key.
    return KafkaWriter(CLIENT_ID, properties, Route(topic, topic, frozenset()))


def write_fleet(path: Path, *, seed: int, pumps: int = 48, days: float = 5.0) -> int:
    """Write a fleet as a CSV file with the columns pump, ts and the sensors, by time; gives how many rows."""
    rows = 0
    try:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, ["pump", "ts", *(sensor.name for sensor in SENSORS)])
            table.writeheader()
            for reading in simulate(pumps, days, seed=seed).messages():
                table.writerow({"pump": reading.key.decode(), **msgspec.json.decode(reading.value)})
                rows += 1
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}") from None
    return rows
