"""The changelog of an application's states, read back through librdkafka.

The end of a restore is the high watermark of everything that was written, aborted or undecided as it may be. A reader
of committed records asked for the end would name what is decided so far, so an admin client is asked. Records that no
reader is shown are passed by the events that tell of a partition's end; the client's own position is not looked at,
for it may still be that of an earlier opening.

The admin client is told to hear anew every few seconds who leads: when a broker says that there is a newer leader it
does not ask for it by itself, and would be refused for a quarter of an hour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from confluent_kafka import Consumer, IsolationLevel, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from statestep.consumers.kafka_client import REAL, Clients, Properties
from statestep.consumers.kafka_source import METADATA_MS
from statestep.consumers.kafka_topics import changelog_topic
from statestep.consumers.librdkafka_client import RAISED, REQUEST_S, Patience, connect, fail, gather
from statestep.consumers.librdkafka_source import FETCH_WAIT_MS, QUEUE_WAIT_MS
from statestep.consumers.ports import StateRecord

READ_S = 0.02  # how long a read waits where nothing is at hand
FETCH_BYTES = 8 * 1024 * 1024
AHEAD_KBYTES = 64 * 1024


class LibrdkafkaChangelog:
    """Reads committed records of single partitions, outside of any group."""

    def __init__(self, app_id: str, properties: Properties, *, clients: Clients = REAL):
        self._topic = changelog_topic(app_id)
        self._patience = Patience(f"reading {self._topic!r}", clients.clock)
        self._ends: dict[int, int] = {}  # by open partition
        self._positions: dict[int, int] = {}
        self._errors: list[Any] = []  # of the clients as a whole
        common = {"client.id": app_id, "error_cb": self._errors.append}
        self._admin = connect(AdminClient, properties, common, {"metadata.max.age.ms": METADATA_MS})
        ours = {
            "group.id": app_id,  # which is never joined; without one there is no consumer
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
        defaults = {
            "max.partition.fetch.bytes": FETCH_BYTES,
            "fetch.wait.max.ms": FETCH_WAIT_MS,
            "queued.max.messages.kbytes": AHEAD_KBYTES,
            "fetch.queue.backoff.ms": QUEUE_WAIT_MS,
            "check.crcs": True,
        }
        self._consumer = connect(Consumer, properties, common | ours, defaults)

    def open(self, partition: int, position: int | None = None) -> bool:
        """Asks for what is kept and what is written by now; raises `BrokerError`."""
        self.shut(partition)
        doing = f"opening {self._topic!r} partition {partition}"
        place = TopicPartition(self._topic, partition)
        try:
            asked = [
                self._admin.list_offsets(
                    {place: spec}, isolation_level=IsolationLevel.READ_UNCOMMITTED, request_timeout=REQUEST_S
                )[place]
                for spec in (OffsetSpec.earliest(), OffsetSpec.latest())
            ]
            low, end = (found.result(REQUEST_S).offset for found in asked)
            start = low if position is None else position
            if not low <= start <= end:
                return False
            self._consumer.incremental_assign([TopicPartition(self._topic, partition, start)])
        except (*RAISED, TimeoutError) as raised:
            fail(doing, raised)
        self._ends[partition], self._positions[partition] = end, start
        return True

    def read(self, max_records: int) -> Sequence[StateRecord]:
        """What is at hand. A broker that is away gives nothing; raises `BrokerError` where it refuses."""
        if all(self.finished(partition) for partition in self._ends):
            return ()
        try:
            messages = gather(self._consumer, max_records, READ_S)
        except RAISED as raised:
            fail(f"reading {self._topic!r}", raised)
        records = [
            StateRecord(m.partition(), m.key() or b"", m.value(), m.offset()) for m in messages if m.error() is None
        ]
        for partition, _, _, offset in records:
            self._positions[partition] = offset + 1
        if len(records) < len(messages):
            for message in messages:
                if message.error() is not None:
                    self._told(message)
        while self._errors:
            self._patience.bear(self._errors.pop())
        return records

    def finished(self, partition: int) -> bool:
        """By position, which also passes what no reader is shown: markers of transactions, aborted records."""
        return self._positions[partition] >= self._ends[partition]

    def position(self, partition: int) -> int:
        """The offset after the last record that was read, and after what is not shown behind it."""
        return self._positions[partition]

    def shut(self, partition: int) -> None:
        """Read no more of a partition."""
        if self._ends.pop(partition, None) is None:
            return
        del self._positions[partition]
        try:
            self._consumer.incremental_unassign([TopicPartition(self._topic, partition)])
        except RAISED as raised:
            fail(f"closing {self._topic!r} partition {partition}", raised)

    def close(self) -> None:
        """Let go of the broker."""
        self._ends.clear()
        self._consumer.close()

    def _told(self, message: Any) -> None:
        """Take the event that a partition was read to its end, or an error."""
        error, partition = message.error(), message.partition()
        if error.code() == KafkaError._PARTITION_EOF:
            if partition in self._ends:
                self._positions[partition] = max(self._positions[partition], message.offset())
        elif error.code() == KafkaError._AUTO_OFFSET_RESET:
            fail(f"reading {self._topic!r} partition {partition}", error)
        else:
            self._patience.bear(error)
