"""How a call of the engine is cut: into waves with at most one row a stream, and these into runs of the model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from statestep.runtime.state import Slots

Rows = Slots | slice  # which rows of a call; the slice stands for neighbours, which need not be copied

# A larger batch is stepped in portions. Beyond it a run's states and gates leave the cache, and a row costs more.
ROWS_PER_RUN = 1024


def waves_of(slots: Slots) -> Iterator[Rows]:
    """Cut rows into waves: the k-th wave has the k-th occurrence of every stream, rows in order of arrival.

    >>> [wave.tolist() for wave in waves_of(np.array([7, 8, 7, 7]))]
    [[0, 1], [2], [3]]
    """
    n = len(slots)
    if n == 0:
        return
    ordered = np.sort(slots)
    if not np.count_nonzero(ordered[1:] == ordered[:-1]):  # the usual case, and sorting is the cheapest way to know
        yield slice(None)
        return
    order = np.argsort(slots, kind="stable")  # [N] rows, stream by stream, each in order of arrival
    grouped = slots[order]
    begins = np.flatnonzero(np.concatenate([[True], grouped[1:] != grouped[:-1]]))  # where each stream's run begins
    place = np.arange(n) - np.repeat(begins, np.diff(begins, append=n))  # [N] which occurrence of its stream
    wave_of = np.empty(n, np.int64)
    wave_of[order] = place
    by_wave = np.argsort(wave_of, kind="stable")  # [N]
    yield from np.split(by_wave, np.cumsum(np.bincount(place))[:-1])


def portions_of(wave: Rows, n: int) -> Iterator[Rows]:
    """Cut a wave of a call of `n` rows so that no run has more than `ROWS_PER_RUN`."""
    if isinstance(wave, slice):
        if n <= ROWS_PER_RUN:
            yield wave
        else:
            yield from (slice(i, min(i + ROWS_PER_RUN, n)) for i in range(0, n, ROWS_PER_RUN))
    else:
        yield from (wave[i : i + ROWS_PER_RUN] for i in range(0, len(wave), ROWS_PER_RUN))
