"""Synthetic faults in readings that are known to be in order, to choose by what finds them. Needs no torch.

A fault strikes a number of features drawn evenly from one to all, each by its own sign and by a share of one severity:

    spike     a few timesteps off               stuck    the last reading goes on
    shift     another level                     noise    a burst of it
    drift     grows evenly, then is put right   torn     readings of another time: alone they look as ever, but the
                                                         features do not fit each other any more
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from statestep.export.compare import Array
from statestep.export.series import Block, Series, block_of, unit_of

KINDS = ("spike", "shift", "drift", "stuck", "noise", "torn")
LONGEST_SPIKE = 3  # timesteps
LENGTHS = (4, 60)  # timesteps of the other kinds, drawn evenly in their logarithm
SIZES = (2.0, 8.0)  # standard deviations of the tail
SHARES = (0.3, 1.0)  # of the size that strikes one of the features
QUIET = (80, 160)  # timesteps between two faults
RUN_IN = 512  # timesteps before the tail that bring a state up to it
WANTED = 150  # faults
MOST_LANES = 64


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong in one lane in the timesteps `start` to `end`, the last not included."""

    lane: int
    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Struck:
    """Validation tails behind their run-ins: one of each stream in order, and lanes with faults, maybe several."""

    clean: Block
    faulty: Block
    faults: tuple[Fault, ...]


def struck(series: Sequence[Series], *, seed: int = 0) -> Struck:
    """Put faults into the validation tails of streams, several times over where there are few.

    >>> x = np.random.default_rng(0).normal(size=(1000, 2)).astype(np.float32)
    >>> made = struck([Series("a", x, np.zeros(x.shape, bool), 600)])
    >>> made.clean.x.shape, len(made.faults) >= 150
    ((912, 1, 2), True)
    """
    rng = np.random.default_rng(seed)
    chosen = [series[i] for i in rng.permutation(len(series))[:MOST_LANES]]
    fits = sum(max((len(one.x) - one.cut) // (QUIET[1] + LENGTHS[1]), 1) for one in chosen)
    times = int(np.clip(-(-WANTED // fits), 1, max(MOST_LANES // len(chosen), 1)))
    clean = _tails(chosen)
    block = _tails([one for one in chosen for _ in range(times)])
    faulty, rows, cuts = block.x.copy(), block.rows.tolist(), block.cuts.tolist()
    faults = list[Fault]()
    kinds = [kind for kind in KINDS if kind != "torn" or faulty.shape[2] > 1]
    for lane, (begin, end) in enumerate(zip(cuts, rows, strict=True)):
        start = begin + int(rng.integers(min(QUIET[0], max((end - begin) // 4, 1))))
        while start < end - 1:
            kind = kinds[len(faults) % len(kinds)]
            stop = min(start + _length(kind, end - begin, rng), end)
            _strike(faulty[:, lane], block.x[begin:end, lane], kind, slice(start, stop), rng)
            faults.append(Fault(lane, start, stop, kind))
            start = stop + int(rng.integers(*QUIET))
    return Struck(clean, Block(faulty, block.missing, block.rows, block.cuts), tuple(faults))


def _tails(series: Sequence[Series]) -> Block:
    """Validation tails side by side, each behind its run-in."""
    begins = [max(one.cut - RUN_IN, 0) for one in series]
    return block_of([Series(s.name, s.x[b:], s.missing[b:], s.cut - b) for s, b in zip(series, begins, strict=True)])


def _length(kind: str, room: int, rng: np.random.Generator) -> int:
    if kind == "spike":
        return int(rng.integers(1, LONGEST_SPIKE, endpoint=True))
    longest = max(min(LENGTHS[1], room // 3), LENGTHS[0])
    return round(float(np.exp(rng.uniform(np.log(LENGTHS[0]), np.log(longest)))))


def _strike(x: Array, tail: Array, kind: str, span: slice, rng: np.random.Generator) -> None:
    """Change some features of x [T, F] over `span`, in place; `tail` [rows, F] says what is usual."""
    width, length = x.shape[1], span.stop - span.start
    unit, severity = unit_of(tail), rng.uniform(*SIZES)
    for k in rng.choice(width, size=int(rng.integers(1, width, endpoint=True)), replace=False):
        size = severity * rng.uniform(*SHARES) * unit[k] * rng.choice((-1, 1))
        if kind in ("spike", "shift"):
            x[span, k] += size
        elif kind == "drift":
            x[span, k] += size * np.arange(1, length + 1) / length
        elif kind == "stuck":
            x[span, k] = x[max(span.start - 1, 0), k]
        elif kind == "noise":
            x[span, k] += rng.normal(size=length) * size / 2
        else:
            other = int(rng.integers(0, max(len(tail) - length, 0), endpoint=True))
            x[span, k] = tail[other : other + length, k][:length]
