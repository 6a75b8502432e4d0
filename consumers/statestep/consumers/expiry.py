"""Streams that have been silent for long are forgotten, in memory and in the changelog, since device ids churn.

A stream that was silent for longer than `--expire-after` is a new one at its next message, by event time alone
(`runtime.silence`). So its record is of no use, and can go. It goes after twice that time, so that a message that is
late by up to once that time still finds it; and only if no message from `redo` on is its own, so that a replay never
meets one. What `now` is, nine tenths of a partition's streams tell: a sensor whose clock is ahead moves nothing.
"""

from __future__ import annotations

import numpy as np

from statestep.consumers.pipeline import split_key
from statestep.runtime import CLEAN, NO_TIME, Engine
from statestep.runtime.engine import DIRTY, OFFSET, TIME
from statestep.runtime.silence import FOREVER

LOOK_S = 60.0  # between two looks at all streams, at most
LATE = 2.0  # times the silence that ends a stream, after which it is forgotten
AHEAD = 0.1  # share of the streams whose event time may lie ahead of what is taken for now
MOST = 4096  # streams of a partition in one transaction


class Expiry:
    """Finds the streams to forget; whoever asks forgets them, once that is durable."""

    def __init__(self, engine: Engine, *, keeps_states: bool):
        """`keeps_states` tells whether states are durable at all: else no stream is ever clean."""
        self._engine = engine
        self._keeps_states = keeps_states
        self._after_ns = FOREVER if engine.silence is None else LATE * engine.silence.expire_ns
        self._look_s = min(LOOK_S, self._after_ns / 1e9 / 20)
        self._looked_s = -FOREVER
        self._silent: dict[int, list[tuple[bytes, int]]] = {}  # by partition: (stream, event time)

    def look(self, now_s: float) -> None:
        """Look at all streams, if that is due; `now_s` is on the service's own clock."""
        if self._after_ns == FOREVER or now_s - self._looked_s < self._look_s:
            return
        self._looked_s, self._silent = now_s, {}
        streams = self._engine.keys()
        times = self._engine.table.column(TIME)[self._engine.table.slots(streams)]  # [streams]
        known = times[times != NO_TIME]
        if not (known.size and (known < known.max() - self._after_ns).any()):
            return
        owners = np.fromiter((split_key(stream)[0] for stream in streams), np.int64, len(streams))  # [streams]
        for partition in np.unique(owners).tolist():
            here = np.flatnonzero((owners == partition) & (times != NO_TIME))  # [n]
            if not here.size:
                continue
            now = np.quantile(times[here], 1 - AHEAD, method="lower")
            old = here[times[here].astype(np.float64) < float(now) - self._after_ns]
            self._silent[partition] = [(streams[i], int(times[i])) for i in old.tolist()]

    def take(self, partition: int, redo: int) -> list[bytes]:
        """Streams of a partition that may be forgotten with a transaction after which a replay begins at `redo`."""
        found = self._silent.get(partition, [])
        some, self._silent[partition] = found[:MOST], found[MOST:]
        table = self._engine.table
        some = [(stream, time) for stream, time in some if stream in table]
        if not some:
            return []
        slots = table.slots([stream for stream, _ in some])  # [n]
        still = table.column(TIME)[slots] == np.array([time for _, time in some])  # [n]
        still &= self._engine.idle(slots)
        if self._keeps_states:
            still &= (table.column(DIRTY)[slots] == CLEAN) & (table.column(OFFSET)[slots] < redo)
        return [stream for (stream, _), yes in zip(some, still.tolist(), strict=True) if yes]
