"""What the page of streams shows: each stream's latest score, its event, and what the engine remembers of it.

Streams are never a metric's label, so this is where a person looks one up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from statestep.consumers.batch import Array, Batch
from statestep.consumers.codec import text
from statestep.consumers.pipeline import split_key, stream_key
from statestep.consumers.teller import Teller
from statestep.consumers.times import moment
from statestep.runtime import NO_TIME, Engine


class Board:
    """The latest score by engine slot, and the three questions asked of it. The caller holds the service's lock."""

    def __init__(self, engine: Engine, teller: Teller):
        self._engine, self._teller = engine, teller
        self._scores = np.empty(0, np.float32)  # [rows of the table], NaN where the model gives none
        self._loudest = np.empty(0, np.int64)  # [rows of the table] in an event, the column of the largest share; or −1

    def update(self, batch: Batch) -> None:
        """Note the scores of a batch; where a stream occurs again, the last one stays."""
        self._fit()
        for slots, scores in batch.scores:
            self._scores[slots] = scores
        for slots, columns in batch.loudest:
            self._loudest[slots] = columns

    def highest(self, count: int) -> list[dict[str, Any]]:
        """The streams with the highest scores, highest first."""
        keys, slots = self._live()
        return self._rows(keys, slots, -self._scores[slots], count)

    def stalest(self, count: int) -> list[dict[str, Any]]:
        """The streams whose greatest event time is furthest back, the oldest first."""
        keys, slots = self._live()
        times = self._engine.table.column("time")[slots]
        known = times != NO_TIME
        return self._rows([k for k, yes in zip(keys, known, strict=True) if yes], slots[known], times[known], count)

    def show(self, key: bytes, partitions: Iterable[int]) -> list[dict[str, Any]]:
        """The stream called `key`, once for each of `partitions` that it came on."""
        self._fit()
        table = self._engine.table
        streams = [stream for p in partitions if (stream := stream_key(p, key)) in table]
        rows = [self._row(stream, int(slot)) for stream, slot in zip(streams, table.slots(streams), strict=True)]
        return [row for row in rows if row["step"]]

    def forget(self, partition: int) -> None:
        """The streams of a partition were put there from what is durable: their slots have others' scores."""
        self._fit()
        held = self._engine.keys()
        keys = [key for key in held if split_key(key)[0] == partition]
        slots = self._engine.table.slots(keys)
        self._scores[slots], self._loudest[slots] = np.nan, -1

    def _live(self) -> tuple[list[bytes], Array]:
        """The streams that have not ended, and their slots."""
        self._fit()
        keys = self._engine.keys()
        slots = self._engine.table.slots(keys)  # [streams]
        alive = self._engine.table.column("step")[slots] > 0  # [streams]
        return [key for key, yes in zip(keys, alive.tolist(), strict=True) if yes], slots[alive]

    def _fit(self) -> None:
        """Grow with the table."""
        more = len(self._engine.table.column("step")) - len(self._scores)
        if more > 0:
            self._scores = np.concatenate([self._scores, np.full(more, np.nan, np.float32)])
            self._loudest = np.concatenate([self._loudest, np.full(more, -1)])

    def _rows(self, keys: list[bytes], slots: Array, order: Array, count: int) -> list[dict[str, Any]]:
        best = np.argsort(order, kind="stable")[:count].tolist()
        return [self._row(keys[i], int(slots[i])) for i in best]

    def _row(self, stream: bytes, slot: int) -> dict[str, Any]:
        partition, key = split_key(stream)
        when = moment(int(self._engine.table.column("time")[slot]))
        score = float(self._scores[slot])
        return {
            "stream": text(key),
            "partition": partition,
            "step": int(self._engine.table.column("step")[slot]),
            "ts": None if when is None else when.isoformat().replace("+00:00", "Z"),
            "score": None if np.isnan(score) else score,
            "event": self._event(stream, slot),
        }

    def _event(self, stream: bytes, slot: int) -> dict[str, Any] | None:
        """The event that a stream is in; the feature that is loudest is not known before a message has come."""
        if not self._teller.reads_records:
            return None
        event = self._teller.standing(*split_key(stream), self._engine.read([stream]))
        if event is None:
            return None
        told: dict[str, Any] = msgspec.to_builtins(event)
        del told["phase"]  # it is on
        return told | {"feature": self._teller.feature(int(self._loudest[slot]))}
