"""The changelog of an application's states, read back through kafka-python.

The end of a restore is the high watermark of everything that was written, aborted or undecided as it may be. A reader
of committed records asked for the end would name what is decided so far, and a restore that ends there could miss a
transaction that is just being committed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from kafka import TopicPartition
from kafka.admin import OffsetSpec
from kafka.errors import KafkaError

from statestep.consumers.kafka_client import FORBIDDEN, REAL, REQUEST_MS, Clients, Properties, connect, fail
from statestep.consumers.kafka_topics import changelog_topic
from statestep.consumers.ports import StateRecord

log = logging.getLogger("statestep")

READ_MS = 20  # how long a read waits where nothing is at hand
FETCH_BYTES = 8 * 1024 * 1024
WARNING_S = 30.0


class KafkaChangelog:
    """Reads committed records of single partitions, outside of any group."""

    def __init__(self, app_id: str, properties: Properties, *, clients: Clients = REAL):
        self._topic = changelog_topic(app_id)
        self._clients = clients
        self._app_id, self._properties = app_id, properties
        self._ends: dict[int, int] = {}  # by open partition
        self._quiet_until = -float("inf")
        self._admin: Any = None
        self._consumer = connect(
            clients.consumer,
            properties,
            client_id=app_id,
            group_id=None,
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
            max_partition_fetch_bytes=FETCH_BYTES,
        )

    def open(self, partition: int, position: int | None = None) -> bool:
        """Asks for what is kept and what is written by now; raises `BrokerError`."""
        tp = TopicPartition(self._topic, partition)
        try:
            if self._admin is None:
                self._admin = connect(
                    self._clients.admin, self._properties, client_id=self._app_id, request_timeout_ms=REQUEST_MS
                )
            low, end = (
                self._admin.list_partition_offsets({tp: spec})[tp].offset
                for spec in (OffsetSpec.EARLIEST, OffsetSpec.LATEST)
            )
            if position is not None and not low <= position <= end:
                return False
            self._ends[partition] = end
            self._assign()
            self._consumer.seek(tp, low if position is None else position)
        except KafkaError as error:
            self._ends.pop(partition, None)
            self._let_go_of_admin()
            fail(f"opening {self._topic!r} partition {partition}", error)
        return True

    def read(self, max_records: int) -> Sequence[StateRecord]:
        """One short poll. A broker that is away gives nothing; raises `BrokerError` where it refuses."""
        if all(self.finished(partition) for partition in self._ends):
            return ()
        try:
            found = self._consumer.poll(timeout_ms=READ_MS, max_records=max_records)
        except KafkaError as error:
            if isinstance(error, FORBIDDEN) or not getattr(error, "retriable", False):
                fail(f"reading {self._topic!r}", error)
            if self._clients.clock() >= self._quiet_until:
                log.warning("reading %s: %s; trying on", self._topic, error)
                self._quiet_until = self._clients.clock() + WARNING_S
            self._clients.sleep(READ_MS / 1000)
            return ()
        return [StateRecord(r.partition, r.key or b"", r.value, r.offset) for rs in found.values() for r in rs]

    def finished(self, partition: int) -> bool:
        """By position, which also passes what no reader is shown: markers of transactions, aborted records."""
        return self.position(partition) >= self._ends[partition]

    def position(self, partition: int) -> int:
        """The offset after the last record that was read, and after what is not shown behind it."""
        return int(self._consumer.position(TopicPartition(self._topic, partition)))

    def shut(self, partition: int) -> None:
        """Read no more of a partition."""
        if self._ends.pop(partition, None) is not None:
            self._assign()

    def close(self) -> None:
        """Let go of the broker."""
        self._let_go_of_admin()
        self._consumer.close(autocommit=False)

    def _assign(self) -> None:
        """Those that stay open keep their positions."""
        self._consumer.assign([TopicPartition(self._topic, partition) for partition in sorted(self._ends)])

    def _let_go_of_admin(self) -> None:
        if self._admin is not None:
            self._admin.close()
            self._admin = None
