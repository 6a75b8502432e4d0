"""The partitions that this process has: how far each is, which of its streams are dirty, what is committed for it.

Only what is durable is kept here; a transaction is applied to it once it is known to count.
"""

from __future__ import annotations

from collections import deque

from statestep.consumers.batch import Batch
from statestep.consumers.checkpoint import Dirty, Progress
from statestep.consumers.ports import Committed
from statestep.consumers.restore import Restored
from statestep.consumers.transaction import Turn
from statestep.runtime import Engine
from statestep.runtime.engine import STEP


class Partitions:
    """By partition number."""

    def __init__(self, *, keeps_states: bool):
        """`keeps_states` tells whether states are durable at all; otherwise no stream counts as dirty."""
        self.running: dict[int, Progress] = {}
        self.opening: dict[int, Progress] = {}  # restored, but a marker is to be written before anything is read
        self.waiting: dict[int, deque[Dirty]] = {}  # the dirty streams of each of these, the longest dirty first
        self.known: dict[int, Committed | None] = {}  # what is committed for the group, as far as is known
        self._keeps_states = keeps_states

    def dirty(self) -> int:
        """How many streams are dirty."""
        return sum(map(len, self.waiting.values()))

    def unwritten(self) -> bool:
        """Whether a transaction without messages would leave a restart less to replay."""
        unmarked = any(not self.waiting[p] and progress.unmarked for p, progress in self.running.items())
        return unmarked or any(self.waiting.values())

    def crowded(self, batch: Batch, engine: Engine, spills: bool, records: int) -> bool:
        """Whether dirty streams leave too little room for others: only clean ones can leave memory, or be forgotten.

        `spills` tells whether clean ones can wait elsewhere, `records` how many streams the next batch may bring.
        """
        table, fresh = engine.table, batch.dirtied.values()
        if spills:
            return self.dirty() + sum(map(len, fresh)) > table.capacity // 2
        if len(table) + records <= table.capacity:
            return False
        dirty = [stream for waiting in self.waiting.values() for _, _, stream in waiting]
        dirty += [stream for dirtied in fresh for _, stream in dirtied]
        return bool((table.column(STEP)[table.slots(dirty)] == 0).any())  # some have ended

    def adopt(self, back: Restored) -> bool:
        """Take over a partition whose states are back; whether its records may come at once."""
        self.known[back.partition] = back.committed
        self.waiting[back.partition] = deque()
        at_once = not (back.plan.commit and self._keeps_states)
        (self.running if at_once else self.opening)[back.partition] = back.plan.progress
        return at_once

    def drop(self, partition: int) -> None:
        """Forget a partition."""
        for held in (self.running, self.opening, self.waiting, self.known):
            held.pop(partition, None)

    def promote(self, turn: Turn, now_s: float) -> list[int]:
        """A transaction counts; gives the partitions that it opened, whose records may come now."""
        for partition, progress in turn.after.items():
            waiting = self.waiting[partition]
            for _ in range(turn.written.get(partition, 0)):
                waiting.popleft()
            if self._keeps_states:
                dirtied = turn.batch.dirtied.get(partition, [])[turn.fresh.get(partition, 0) :]
                waiting.extend(Dirty(offset, now_s, stream) for offset, stream in dirtied)
            self._check(partition, progress)
        self.running |= turn.after
        self.known |= turn.transaction.offsets
        opened, self.opening = list(self.opening), {}
        return opened

    def _check(self, partition: int, progress: Progress) -> None:
        """Invariants that are cheap enough to hold on to always."""
        before, waiting = self.running.get(partition) or self.opening[partition], self.waiting[partition]
        assert before.sequence <= progress.sequence <= before.sequence + 1, (before, progress)
        assert before.redo <= progress.redo and before.next <= progress.next, (before, progress)
        assert not waiting or progress.redo <= waiting[0].first, (progress, waiting[0])
