"""The local store as the only changelog that there is: what a run over files restores from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from statestep.consumers.changelog import MARKER
from statestep.consumers.ports import StateRecord
from statestep.consumers.store import Store

BLOCK_RECORDS = 4096


class StoreChangelog:
    """Gives each partition's states, then its marker."""

    def __init__(self, store: Store):
        """The store stays the caller's to close."""
        self._store = store
        self._open: dict[int, Iterator[StateRecord]] = {}
        self._finished: set[int] = set()

    def open(self, partition: int, position: int | None = None) -> bool:
        """Read all of it; `position` can only be the end, after which there is nothing."""
        if position not in (None, self._store.position(partition) or 0):
            return False
        self._finished.discard(partition)
        self._open[partition] = self._records(partition) if position is None else iter(())
        return True

    def read(self, max_records: int) -> Sequence[StateRecord]:
        """States of one open partition, its marker last."""
        for partition, waiting in self._open.items():
            if partition not in self._finished:
                found = list(islice(waiting, max_records))
                if len(found) < max_records:
                    self._finished.add(partition)
                return found
        return []

    def finished(self, partition: int) -> bool:
        """Whether the marker has been read."""
        return partition in self._finished

    def position(self, partition: int) -> int:
        """The end once everything was read, 0 before."""
        return (self._store.position(partition) or 0) if partition in self._finished else 0

    def shut(self, partition: int) -> None:
        """Read no more of a partition."""
        self._open.pop(partition, None)
        self._finished.discard(partition)

    def close(self) -> None:
        """The store is not closed with it."""
        self._open.clear()

    def _records(self, partition: int) -> Iterator[StateRecord]:
        after: bytes | None = None
        while block := self._store.load(partition, after, BLOCK_RECORDS):
            yield from block
            after = block[-1].key
        marker = self._store.marker(partition)
        if marker is not None:
            yield StateRecord(partition, MARKER, marker)
