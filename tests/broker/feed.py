"""What flows into the service while things break: readings of many streams, and everything that is no good reading.

Which message comes next is a function of the seed. A header says what each one is, so that `judge` need not ask the
code under test: `reading`, `tombstone`, or the reason for which it must become a dead letter.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

from kafka import KafkaProducer
from kafka.errors import KafkaError

KIND = "kind"  # the header's name
READING, TOMBSTONE = "reading", "tombstone"
STREAMS = 6  # in each partition; one of them has the same key in all
PERIOD_SECONDS = 60
BEGAN = 1_700_000_000  # the event time of the first reading, seconds since the epoch
MAX_MESSAGE_BYTES = 4096  # what the service is told to take at most
TURN_SECONDS = 0.02
BAD: list[tuple[str, str]] = [  # why it is refused, its value
    ("malformed", "not json"),
    ("malformed", '{"flow": 1, "pressure": 2'),
    ("missing-feature", '{"flow": 1}'),
    ("missing-feature", '{"flow": 1, "pressure": null}'),
    ("wrong-type", '{"flow": "1.5", "pressure": 2}'),
    ("non-finite", '{"flow": NaN, "pressure": 2}'),
    ("out-of-range", '{"flow": 1e39, "pressure": 2}'),
    ("bad-time", '{"flow": 1, "pressure": 2, "ts": "yesterday"}'),
    ("wrong-shape", "[1, 2, 3]"),
    ("empty", ""),
    ("no-key", '{"flow": 1, "pressure": 2}'),
    ("key-too-large", '{"flow": 1, "pressure": 2}'),
    ("too-large", '{"flow": 1, "pressure": 2, "pad": "' + "x" * MAX_MESSAGE_BYTES + '"}'),
]


class Fed(NamedTuple):
    """A message before it is sent."""

    kind: str
    partition: int
    key: bytes | None
    value: bytes | None


def messages(seed: int, partitions: int) -> Iterator[Fed]:
    """Without end: of 100 messages about 70 follow the period, the others are odd in one way or another."""
    rng = random.Random(seed)
    clocks: Counter[tuple[int, bytes]] = Counter()  # periods since `BEGAN`
    while True:
        partition = rng.randrange(partitions)
        number = rng.randrange(STREAMS)
        key = b"everywhere" if number == 0 else b"pump-%d-%d" % (partition, number)
        stream = partition, key
        clocks[stream] += 1
        periods, times = clocks[stream], 1
        odd = rng.random()
        if odd < 0.05:
            times = 2  # a duplicate: the same bytes once more
        elif odd < 0.10:
            periods -= rng.randrange(1, 20)  # out of order
        elif odd < 0.15:
            periods = clocks[stream] = periods + rng.randrange(2, 50)  # a gap
        elif odd < 0.16:
            periods += 525_600  # a clock that jumps by a year, and back
        elif odd < 0.18:
            yield Fed(TOMBSTONE, partition, key, None)
            continue
        elif odd < 0.30:
            reason, value = rng.choice(BAD)
            wrong = {"no-key": None, "key-too-large": key * 1000}
            yield Fed(reason, partition, wrong.get(reason, key), value.encode())
            continue
        document = {
            "flow": rng.gauss(0, 1),
            "pressure": rng.gauss(0, 1),
            "ts": BEGAN + periods * PERIOD_SECONDS,
        }
        for _ in range(times):
            yield Fed(READING, partition, key, json.dumps(document).encode())


class Feed(threading.Thread):
    """Sends `messages` to a topic, some a second, until it is told to stop.

    What cannot be delivered is counted, and the next is sent: what counts as input is what lies in Kafka.
    """

    def __init__(self, bootstrap_servers: str, topic: str, partitions: int, *, seed: int, rate: float) -> None:
        super().__init__(name="feed", daemon=True)
        self.failed: Counter[str] = Counter()
        self.sent = 0
        self._messages = messages(seed, partitions)
        self._topic = topic
        self._rate = rate  # messages a second
        self._bootstrap_servers = bootstrap_servers
        self._stopping = threading.Event()

    def run(self) -> None:
        """The thread's body. A producer that is of no use any more is replaced."""
        producer = self._connect()
        began = time.monotonic()
        while not self._stopping.wait(TURN_SECONDS):
            for _ in range(round((time.monotonic() - began) * self._rate) - self.sent):
                self.sent += 1
                try:
                    self._send(producer, next(self._messages))
                except KafkaError as error:
                    self._count(error)
                    producer.close(timeout=0)
                    producer = self._connect()
        try:
            producer.flush(timeout=60)
        except KafkaError as error:
            self._count(error)
        with suppress(KafkaError):  # it flushes once more
            producer.close(timeout=5)

    def stop(self) -> None:
        """Send no more, and return once everything is acknowledged or given up."""
        self._stopping.set()
        self.join(120)
        assert not self.is_alive(), "the feed did not end"

    def _connect(self) -> Any:
        while True:
            try:
                return KafkaProducer(
                    bootstrap_servers=self._bootstrap_servers,
                    acks="all",
                    enable_idempotence=True,
                    linger_ms=10,
                    delivery_timeout_ms=120_000,
                    max_block_ms=30_000,
                )
            except KafkaError as error:
                self._count(error)
                if self._stopping.wait(TURN_SECONDS):
                    raise

    def _send(self, producer: Any, fed: Fed) -> None:
        sent = producer.send(
            self._topic, key=fed.key, value=fed.value, partition=fed.partition, headers=[(KIND, fed.kind.encode())]
        )
        sent.add_errback(self._count)

    def _count(self, error: BaseException) -> None:
        self.failed[type(error).__name__] += 1
