"""The Kafka adapter, unchanged but for what is seen of each call: invariants that only its callers can break."""

from __future__ import annotations

from typing import Any

from statestep.consumers.kafka_changelog import KafkaChangelog
from statestep.consumers.kafka_sink import KafkaSink
from statestep.consumers.kafka_source import KafkaSource
from statestep.consumers.ports import Polled, Transaction
from statestep.runtime import Engine

from .invariants import Watch


class WatchedSource(KafkaSource):
    """Sees that nothing is uncommitted across polls, and keeps the membership that came last."""

    watch: Watch
    engine: Engine
    sink: WatchedSink
    membership: Any = None

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        self.watch.expect(not self.sink.committing, "a poll within a transaction")
        table = self.engine.table
        idle = not (table._undo or table._moves)
        self.watch.expect(idle or self.sink.failed, "streams are advanced and not committed across a poll")
        self.watch.expect(len(self.engine) <= table.capacity, "more streams than max_streams", len(self.engine))
        self.membership = None
        polled = super().poll(timeout_s, max_records)
        self.membership = polled.membership
        return polled


class WatchedSink(KafkaSink):
    """Sees that a commit goes with the poll just before it, and that none is tried again unrecovered."""

    watch: Watch
    source: WatchedSource
    committing = failed = False

    def commit(self, transaction: Transaction, membership: Any) -> Any:
        self.watch.expect(
            membership is not None and membership is self.source.membership, "a commit with another poll's membership"
        )
        self.committing, self.failed = True, True
        try:
            positions = super().commit(transaction, membership)
            self.failed = False
            return positions
        finally:
            self.committing = False


class WatchedChangelog(KafkaChangelog):
    """Counts restores."""

    watch: Watch

    def open(self, partition: int, position: int | None = None) -> bool:
        self.watch.restores += 1
        return super().open(partition, position)
