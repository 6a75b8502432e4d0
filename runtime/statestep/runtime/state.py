"""Every stream's memory: one contiguous slab for each state tensor, a row for each stream, and an undo log.

The table knows nothing of models. Its columns are arrays of one dtype and shape a row; the engine adds its own
(`step`, `time`, `dirty`) to the model's states. Between two commits each row that is written is saved once, as
it was, so `rollback` restores every touched stream bit for bit. The slabs grow by doubling, up to `capacity`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Slots = np.ndarray[tuple[int], np.dtype[np.int64]]

FIRST_ROWS = 1024  # rows that an empty table makes room for


class CapacityError(RuntimeError):
    """More streams than `max_streams`. Raised before anything has changed."""


class Column(NamedTuple):
    """What one slab holds: the value that a new stream's row starts with gives its dtype and shape."""

    name: str
    initial: Array  # [*shape]


class StateTable:
    """Rows by key, with commit and rollback. Not thread-safe.

    >>> table = StateTable([Column("h", np.zeros(2, np.float32))], capacity=10)
    >>> slots = table.admit([b"a"])
    >>> table.scatter(slots, [np.array([[1, 2]], np.float32)])
    >>> table.rollback(); len(table)
    0
    """

    def __init__(self, columns: Sequence[Column], capacity: int):
        if capacity < 1:
            raise ValueError(f"a table holds at least one stream, max_streams is {capacity}")
        self.columns = list(columns)
        self.capacity = capacity
        rows = min(FIRST_ROWS, capacity)
        self._slabs = [np.empty((rows, *c.initial.shape), c.initial.dtype) for c in self.columns]  # [rows, *shape]
        self._saved = np.zeros(rows, bool)  # [rows]: whether the undo log holds the row already
        self._index: dict[bytes, int] = {}
        self._free: list[int] = []  # slots given back, to be used before new ones
        self._used = 0  # slots ever handed out
        self._undo: list[tuple[Slots, list[Array]]] = []  # rows as they were at the last commit
        self._marked = 0  # entries of the undo log whose rows are marked in `_saved`
        self._moves: list[tuple[bool, bytes, int]] = []  # (created?, key, slot), in order

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        return key in self._index

    @property
    def nbytes(self) -> int:
        """Bytes held by the slabs."""
        return sum(slab.nbytes for slab in self._slabs)

    def keys(self) -> list[bytes]:
        """The streams that have a row."""
        return list(self._index)

    def slots(self, keys: Sequence[bytes]) -> Slots:
        """The slot of each key, -1 where it has none."""
        return np.fromiter(map(self._index.get, keys, repeat(-1)), np.int64, len(keys))  # [N]

    def admit(self, keys: Sequence[bytes]) -> Slots:
        """The slot of each key; a new one gets a row with the initial values. May raise `CapacityError`."""
        try:
            return np.fromiter(map(self._index.__getitem__, keys), np.int64, len(keys))  # [N]
        except KeyError:  # the rare case: looking for it first would cost every call
            self._create([key for key in dict.fromkeys(keys) if key not in self._index])
            return self.slots(keys)

    def gather(self, slots: Slots) -> list[Array]:
        """A copy of the rows at `slots`: one array [n, *shape] for each column."""
        return [slab.take(slots, axis=0) for slab in self._slabs]

    def scatter(self, slots: Slots, rows: Sequence[Array]) -> None:
        """Write rows to `slots`, which must be distinct: with a doubled slot only the last row would stay."""
        for slab, row in zip(self._slabs, rows, strict=True):
            slab[slots] = row

    def save(self, slots: Slots, rows: Sequence[Array]) -> None:
        """Note in the undo log that the rows at `slots` (distinct) are now `rows`, unless it knows them already."""
        for earlier, _ in self._undo[self._marked :]:  # put off until now: often there is one entry between commits
            self._saved[earlier] = True
        self._marked = len(self._undo)
        saved = self._saved[slots] if self._undo else np.zeros(0, bool)  # [n]
        known = np.count_nonzero(saved)
        if not known:
            self._undo.append((slots, list(rows)))
        elif known < len(slots):
            self._undo.append((slots[~saved], [row[~saved] for row in rows]))

    def column(self, name: str) -> Array:
        """A view of one slab. Only the slots of live streams mean anything in it."""
        return self._slabs[[column.name for column in self.columns].index(name)]  # [rows, *shape]

    def drop(self, keys: Iterable[bytes]) -> None:
        """Forget streams; a key without a row is passed by. Their slots come free at the next commit."""
        for key in keys:
            slot = self._index.pop(key, None)
            if slot is not None:
                self._moves.append((False, key, slot))

    def commit(self) -> None:
        """Make everything since the last commit final."""
        self._forget()
        self._free += [slot for created, _, slot in self._moves if not created]
        self._moves.clear()

    def rollback(self) -> None:
        """Put back every row, birth and drop since the last commit."""
        self.rewind(0)
        for slots, rows in self._undo:
            self.scatter(slots, rows)
        self._forget()

    def _forget(self) -> None:
        """Empty the undo log."""
        for slots, _ in self._undo[: self._marked]:
            self._saved[slots] = False
        self._undo.clear()
        self._marked = 0

    def mark(self) -> int:
        """Where `rewind` can come back to."""
        return len(self._moves)

    def born_since(self, mark: int) -> list[bytes]:
        """The streams that got a row after `mark`."""
        return [key for created, key, _ in self._moves[mark:] if created]

    def unbear(self, keys: Sequence[bytes], mark: int) -> None:
        """Take back some of the births since `mark`. Their slots are free at once: nothing was there to come back."""
        gone = set(keys)
        self._moves[mark:] = [move for move in self._moves[mark:] if move[1] not in gone]
        self._free += [self._index.pop(key) for key in keys]

    def rewind(self, mark: int) -> None:
        """Take back the births and drops since `mark`, the last first. Rows are left as they are."""
        while len(self._moves) > mark:
            created, key, slot = self._moves.pop()
            if created:
                del self._index[key]
                self._free.append(slot)
            else:
                self._index[key] = slot

    def _create(self, keys: list[bytes]) -> None:
        if not all(isinstance(key, bytes) for key in keys):
            raise TypeError("a stream's key must be bytes")
        spare = len(self._free) + self.capacity - self._used
        if len(keys) > spare:
            raise CapacityError(
                f"{len(keys)} new streams and room for {spare}: max_streams is {self.capacity}, raise it"
            )
        reused = min(len(self._free), len(keys))
        fresh = range(self._used, self._used + len(keys) - reused)
        self._grow(fresh.stop)  # memory may run out here, so nothing has changed before
        self._used = fresh.stop
        slots = np.fromiter((*(self._free.pop() for _ in range(reused)), *fresh), np.int64, len(keys))  # [new]
        for slab, column in zip(self._slabs, self.columns, strict=True):
            slab[slots] = column.initial
        for key, slot in zip(keys, slots.tolist(), strict=True):
            self._index[key] = slot
            self._moves.append((True, key, slot))

    def _grow(self, rows: int) -> None:
        held = len(self._saved)
        if rows <= held:
            return
        wanted = min(self.capacity, max(rows, 2 * held))
        self._slabs = [_enlarged(slab, wanted) for slab in self._slabs]
        self._saved = np.concatenate([self._saved, np.zeros(wanted - held, bool)])


def _enlarged(slab: Array, rows: int) -> Array:
    larger = np.empty((rows, *slab.shape[1:]), slab.dtype)  # [rows, *shape]
    larger[: len(slab)] = slab
    return larger
