"""Streams that memory has no room for: they wait in the local store and come back on their next message.

The store mirrors what is committed, so a clean stream can leave memory at any time: its record there has the same
bits. Nothing here raises: a store that fails is given up, and the service restores what only it had.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Mapping, Sequence

import numpy as np

from statestep.consumers.changelog import STREAM, Corrupt, StateCodec
from statestep.consumers.codec import Refused
from statestep.consumers.metrics import Metrics
from statestep.consumers.pipeline import Decoded, split_key, stream_key
from statestep.consumers.ports import Record, StateRecord
from statestep.consumers.restore import put
from statestep.consumers.store import Store, StoreError
from statestep.runtime import CLEAN, Engine
from statestep.runtime.engine import DIRTY, TIME

log = logging.getLogger("statestep")

SHARE = 16  # of the table's rows one in so many is cleared at a time, since looking for the stalest costs a sort


class Spill:
    """The local store as the service uses it; without one every question has its simple answer."""

    def __init__(self, engine: Engine, codec: StateCodec, store: Store | None, metrics: Metrics):
        self.store = store
        self.lost = False  # whether the store has failed and the service does not know yet
        self._engine = engine
        self._codec = codec
        self._metrics = metrics
        self._waiting: Counter[int] = Counter()  # by partition: streams that only the store holds
        self._epochs: dict[int, int] = {}

    def keep(self, partition: int, streams: int, epoch: int) -> None:
        """A partition is back, `streams` of it only in the store."""
        self._waiting[partition] = streams
        self._epochs[partition] = epoch

    def forget(self, partition: int) -> None:
        """A partition is no longer ours; the store keeps what it knows of it, for it may come again."""
        self._waiting.pop(partition, None)
        self._epochs.pop(partition, None)

    def clear(self) -> list[int]:
        """After a failure: the partitions of which only the store had streams, of which it has none any more."""
        self.lost = False
        return [partition for partition, streams in self._waiting.items() if streams > 0]

    def fail(self, error: Exception) -> None:
        """Give the store up."""
        log.warning("the local store is given up, states come from the changelog alone: %s", error)
        self._metrics.store_failures.inc()
        store, self.store, self.lost = self.store, None, True
        try:
            if store is not None:
                store.close()
        except StoreError:
            pass

    def mirror(self, states: Sequence[StateRecord], positions: Mapping[int, int]) -> None:
        """Write what was just committed; where the changelog stands after it may be unknown of some partitions.

        The store then stays where it was: what lies behind is read once more, and is the same.
        """
        if self.store is None or not states:
            return
        try:
            partitions = {state.partition for state in states}
            self.store.apply(states, {p: positions.get(p, self.store.position(p) or 0) for p in partitions})
        except StoreError as error:
            self.fail(error)
        self._metrics.spilled.set(self._waiting.total())

    def admit(self, records: Sequence[Record], decoded: Sequence[Decoded]) -> bool:
        """Make room for the streams of these records and bring back those that wait; False if the store failed.

        Nothing may be uncommitted in the engine.
        """
        if self.lost:  # the service does not know yet which streams are missing
            return False
        if self.store is None:
            return True
        named = [
            (r.partition, what.key) for r, what in zip(records, decoded, strict=True) if not isinstance(what, Refused)
        ]
        streams = {stream_key(partition, key): (partition, key) for partition, key in named}
        missing = [place for stream, place in streams.items() if stream not in self._engine.table]
        if not missing:
            return True
        try:
            room = self._engine.table.capacity - len(self._engine)
            if len(missing) > room:
                self._evict(len(missing) - room, streams.keys())
            for partition in {partition for partition, _ in missing if self._waiting[partition] > 0}:
                keys = [STREAM + key for p, key in missing if p == partition]
                found = self.store.fetch(partition, keys)
                back = [StateRecord(partition, key, value) for key, value in found.items()]
                self._waiting[partition] -= put(self._engine, self._codec, back, self._epochs[partition])
        except (StoreError, Corrupt) as error:
            self.fail(error)
            return False
        return True

    def _evict(self, count: int, needed: Container[bytes]) -> None:
        """Let the streams leave that were silent for longest, by event time; dirty and needed ones stay."""
        table = self._engine.table
        streams = self._engine.keys()
        keys = [stream for stream in streams if stream not in needed]
        slots = table.slots(keys)  # [n]
        clean = np.flatnonzero(table.column(DIRTY)[slots] == CLEAN)  # [m]
        order = clean[np.argsort(table.column(TIME)[slots[clean]], kind="stable")]  # [m]
        leaving = [keys[i] for i in order[: max(count, table.capacity // SHARE)].tolist()]
        self._engine.drop(leaving)
        self._engine.commit()
        self._waiting.update(split_key(key)[0] for key in leaving)
