"""What the page of streams shows: each stream's latest score beside what the engine remembers of it.

Streams are never a metric's label, so this is where a person looks one up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from statestep.consumers.codec import text
from statestep.consumers.pipeline import Batch, split_key
from statestep.consumers.times import moment
from statestep.runtime import NO_TIME, Engine


class Board:
    """The latest score by engine slot, and the three questions asked of it. The caller holds the service's lock."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._scores = np.zeros(0, np.float32)  # [rows of the table]

    def update(self, batch: Batch) -> None:
        """Note the scores of a batch; where a stream occurs again, the last one stays."""
        rows = len(self._engine.table.column("step"))
        if rows > len(self._scores):
            self._scores = np.concatenate([self._scores, np.zeros(rows - len(self._scores), np.float32)])
        for slots, scores in zip(batch.slots, batch.columns.get("score", []), strict=False):
            self._scores[slots] = scores

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

    def show(self, key: bytes) -> list[dict[str, Any]]:
        """The stream called `key`, once for each partition that it came on."""
        keys, slots = self._live()
        places = [i for i, stream in enumerate(keys) if split_key(stream)[1] == key]
        return [self._row(keys[i], int(slots[i])) for i in places]

    def _live(self) -> tuple[list[bytes], np.ndarray[Any, np.dtype[np.int64]]]:
        keys = self._engine.keys()
        slots = self._engine.table.slots(keys)  # [streams]
        if len(self._scores) < (rows := len(self._engine.table.column("step"))):
            self._scores = np.concatenate([self._scores, np.zeros(rows - len(self._scores), np.float32)])
        return keys, slots

    def _rows(
        self, keys: list[bytes], slots: np.ndarray[Any, Any], order: np.ndarray[Any, Any], count: int
    ) -> list[dict[str, Any]]:
        best = np.argsort(order, kind="stable")[:count].tolist()
        return [self._row(keys[i], int(slots[i])) for i in best]

    def _row(self, stream: bytes, slot: int) -> dict[str, Any]:
        partition, key = split_key(stream)
        when = moment(int(self._engine.table.column("time")[slot]))
        return {
            "stream": text(key),
            "partition": partition,
            "step": int(self._engine.table.column("step")[slot]),
            "ts": None if when is None else when.isoformat().replace("+00:00", "Z"),
            "score": float(self._scores[slot]),
        }
