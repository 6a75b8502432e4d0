"""What a process that advances streams all day does with its model and its memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from statestep.consumers.pipeline import Array
from statestep.runtime import Model


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, which the next batch takes again.

    By default glibc hands it back once the top of the heap has twice its largest freed block, and the next batch
    faults it in anew, at a tenth of its cost. A freed block of 16 MiB lifts that bound (mallopt(3), under
    M_TRIM_THRESHOLD). Elsewhere this does nothing.
    """
    np.empty(16 << 20, np.uint8)


class TimedModel:
    """A model that reports how long each run takes; the engine itself reads no clock."""

    def __init__(self, model: Model, report: Callable[[float], None], clock: Callable[[], float] = time.perf_counter):
        self.contract = model.contract
        self.initial_states = model.initial_states
        self._step = model.step
        self._report = report
        self._clock = clock

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        """The model's own step, timed."""
        began = self._clock()
        result = self._step(x, states, times)
        self._report(self._clock() - began)
        return result
