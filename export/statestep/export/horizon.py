"""The memory horizon: by how many timesteps a model has forgotten how its stream began. Needs no torch.

Streams with different pasts get the same readings from some moment on. N(eps) is the timestep from which on their
outputs agree within eps, for good: it counts only where it held over the last quarter of what was watched, or where
all states had become the same bits, after which nothing can part them. The pasts are a stream's birth, states that
other streams had reached at several ages, and states drawn within the range of those. Counters that stop at a cap and
forecasts kept for the next timestep are states like any other, and are forgotten like any other.

Gaps are in standard deviations: of the readings for an output in their units, of the output itself for one of its own
kind. A score is measured in its threshold, where the model gives one: what matters of it is on which side it lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from statestep.export.compare import Array, Outputs, units
from statestep.export.readings import drawn, finite_rows
from statestep.runtime import Contract, StepModel

EPS = {"0.01": 1e-2, "0.0001": 1e-4}
EQUAL = "equal"  # to the bit
SEQUENCES = 4  # of readings that are watched
AGES = (1, 4, 16, 64, 256, 256, 256, 256)  # timesteps after which the states of other streams are taken
DRAWN = 7  # states drawn within the range of those
STARTS = 1 + len(AGES) + DRAWN
HELD = 0.75  # of what was watched; agreement that began later may be chance
LEAST, MOST = 256, 4096  # timesteps watched
WORK = 1e11  # bytes of the model × rows × timesteps: about two seconds
CHUNK = 64  # timesteps between two looks at whether all states are the same
ENOUGH = 512  # timesteps, of which the first eighth alone saw a gap: a detector's counters go their own ways for ever
POINTS = 32  # of the curve
LARGEST = 1e30  # of a gap, for a model that runs away: JSON knows no infinity


class Watched(NamedTuple):
    """What became of streams with different pasts over T timesteps of the same readings."""

    gaps: dict[str, Array]  # by output [T], in its unit: the largest of all sequences and elements
    same: dict[str, Array]  # by output, bool [T]: equal to the bit
    settled: bool  # whether all states were the same at the end


def memory(
    model: StepModel, sequences: Mapping[str, Array] | None = None, *, limit: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """Measure how soon `model` forgets: the document for its contract's `memory`.

    `sequences` (stream → [T, F]) are real readings to walk over; without them readings are drawn within the ranges
    that the contract names. `limit` is the number of timesteps to watch at most; by default 4,096, fewer for a large
    model, but at least 256. The same seed gives the same document. Raises `DataError` for readings of another shape.

    {"steps": watched, "starts", "sequences", "readings": "given" | "drawn", "warm": N(1e-2) | null,
    "forgets": {"0.01": N | null, "0.0001": …, "equal": …}, "outputs": {name: the same}, "curve": {"steps", "gap"}}.
    `forgets`, `warm` and the curve are the largest of prediction and score, or of all outputs of a model without them.
    Null means: none found within `steps`.
    """
    rng = np.random.default_rng(seed)
    contract = model.contract
    readings = _readings(contract, sequences, rng)
    if limit is None:
        limit = int(np.clip(WORK / (model.size * SEQUENCES * STARTS), LEAST, MOST))
    past = readings(max(AGES), SEQUENCES * len(AGES))  # [256, Q·8, F]
    outputs, reached = _reached(model, past)
    watched = watch(model, _starts(model, reached, rng), readings(limit, SEQUENCES), _units(contract, past, outputs))
    steps = len(next(iter(watched.gaps.values())))
    found = {name: _found(watched, name) for name in watched.gaps}
    judged = judged_of(contract, found)
    forgets = {eps: _latest([found[name][eps] for name in judged]) for eps in (*EPS, EQUAL)}
    return {
        "steps": steps,
        "starts": STARTS,
        "sequences": SEQUENCES,
        "readings": "given" if sequences else "drawn",
        "warm": forgets["0.01"],
        "forgets": forgets,
        "outputs": found,
        "curve": _curve(np.max([watched.gaps[name] for name in judged], axis=0)),
    }


def in_words(memory: Mapping[str, Any]) -> str:
    """A memory document in a sentence.

    >>> in_words({"steps": 512, "forgets": {"0.01": 37, "0.0001": 80, "equal": None}})
    'forgets its past within 37 steps to 1e-2, within 80 to 1e-4, not within 512 to the bit'
    """
    names = {"0.01": "1e-2", "0.0001": "1e-4", EQUAL: "the bit"}
    forgets = memory.get("forgets", {})
    watched = memory.get("steps")
    parts: list[str] = []
    for eps, name in names.items():
        if eps in forgets:
            steps, word = forgets[eps], " steps" * (not parts)
            parts.append(f"within {steps:,}{word} to {name}" if steps else f"not within {watched:,}{word} to {name}")
    return f"forgets its past {', '.join(parts)}" if parts else "nobody measured how soon it forgets"


def watch(model: StepModel, starts: Sequence[Array], x: Array, unit: Mapping[str, Array]) -> Watched:
    """Step streams from `starts` (for each state [Q, S, *shape]) over x [T, Q, F], the same for all S of a sequence.

    `unit` has for each output what its gaps are measured in. Ends early once all states are the same, or once nothing
    but the first eighth of at least `ENOUGH` timesteps has parted prediction and score.
    """
    sequences, pasts = starts[0].shape[:2]
    states = [start.reshape(sequences * pasts, *start.shape[2:]) for start in starts]  # [Q·S, *shape]
    gaps: dict[str, list[Array]] = {}
    same: dict[str, list[Array]] = {}
    settled = False
    for begin in range(0, len(x), CHUNK):
        rows: list[Outputs] = []
        for row in x[begin : begin + CHUNK]:
            outputs, states = model.step(np.repeat(row, pasts, axis=0), states)
            rows.append(outputs)
        for name in rows[0]:
            values = np.stack([outputs[name] for outputs in rows])
            values = values.reshape(len(rows), sequences, pasts, -1)  # [C, Q, S, K]
            gaps.setdefault(name, []).append(_apart(values, unit[name]))
            same.setdefault(name, []).append(_alike(values))
        settled = all(_alike(state.reshape(1, sequences, pasts, -1)).all() for state in states)
        if settled or _long_agreed({name: np.concatenate(gaps[name]) for name in judged_of(model.contract, gaps)}):
            break
    return Watched(
        {name: np.concatenate(parts) for name, parts in gaps.items()},
        {name: np.concatenate(parts) for name, parts in same.items()},
        settled,
    )


def judged_of(contract: Contract, outputs: Iterable[str]) -> list[str]:
    """The outputs by which a model is said to forget: prediction and score, or all where it has neither."""
    return [output.name for output in contract.outputs if output.role in ("prediction", "score")] or list(outputs)


def _long_agreed(gaps: Mapping[str, Array]) -> bool:
    """Whether all gaps [T] have been below the least eps since the first eighth."""
    for gap in gaps.values():
        parted = np.flatnonzero(gap > min(EPS.values()))
        if len(gap) < ENOUGH or (len(parted) and parted[-1] >= len(gap) / 8):
            return False
    return True


def _readings(
    contract: Contract, sequences: Mapping[str, Array] | None, rng: np.random.Generator
) -> Callable[[int, int], Array]:
    """What gives readings [T, B, F]: drawn, or stretches of the given streams from random places, end to end."""
    streams = finite_rows(contract, sequences)
    if not streams:
        return lambda steps, batch: drawn(contract, steps, batch, rng)
    rows = np.concatenate(list(streams.values()))  # [N, F]
    return lambda steps, batch: rows[(np.arange(steps)[:, None] + rng.integers(0, len(rows), batch)) % len(rows)]


def _reached(model: StepModel, x: Array) -> tuple[Outputs, dict[int, list[Array]]]:
    """Streams from their birth over x [T, B, F]: their outputs [T, B, …], and their states [B, *shape] at each age."""
    states = [np.stack([value] * x.shape[1]) for value in model.initial_states()]
    rows, reached = [], {}
    for age, row in enumerate(x, 1):
        outputs, states = model.step(row, states)
        rows.append(outputs)
        if age in AGES:
            reached[age] = states
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}, reached


def _starts(model: StepModel, reached: Mapping[int, list[Array]], rng: np.random.Generator) -> list[Array]:
    """For each state [Q, S, *shape]: of a birth, of other streams at all ages, and drawn within the range of those."""
    starts = []
    lenders = rng.integers(0, SEQUENCES * len(AGES), (SEQUENCES, DRAWN))  # [Q, DRAWN] streams, the same for all states
    for place, born in enumerate(model.initial_states()):
        by_age = {age: states[place] for age, states in reached.items()}  # [Q·8, *shape] each
        own = np.stack([by_age[age][i :: len(AGES)] for i, age in enumerate(AGES)], axis=1)  # [Q, 8, *shape]
        if born.dtype.kind == "f":
            every = np.stack([born, *np.concatenate(list(by_age.values()))]).astype(np.float64)
            most = min(LARGEST, float(np.finfo(born.dtype).max))
            every = np.nan_to_num(every).clip(-most, most)  # of a model that runs away
            low, high = every.min(axis=0), every.max(axis=0)
            free = low + (high - low) * rng.random((SEQUENCES, DRAWN, *born.shape))  # [Q, DRAWN, *shape]
        else:  # a counter or a flag: between two that occur may lie one that cannot
            free = by_age[max(AGES)][lenders]
        births = np.broadcast_to(born, (SEQUENCES, 1, *born.shape))
        starts.append(np.concatenate([births, own, free.astype(born.dtype)], axis=1))
    return starts


def _units(contract: Contract, x: Array, outputs: Outputs) -> dict[str, Array]:
    """What the gaps of each output are measured in, from streams that went their way: [K] or []."""
    with np.errstate(all="ignore"):  # a model that runs away has no spread
        found = units(contract, [x], [outputs])
        for name, value in outputs.items():
            if value.dtype.kind != "f":
                found[name] = np.array(1.0)  # any difference is a whole one
            elif name not in found:
                spread = value.astype(np.float64).reshape(len(x) * x.shape[1], -1).std(axis=0)  # [K]
                found[name] = np.maximum(spread, np.finfo(np.float32).tiny)
        score, threshold = contract.output("score"), contract.output("threshold")
        if score is not None and threshold is not None:
            usual = float(np.median(np.abs(outputs[threshold.name])))
            found[score.name] = np.array(usual) if usual > 0 else found[score.name]
    return {name: np.where(np.isfinite(unit), unit, 1.0) for name, unit in found.items()}


def _apart(values: Array, unit: Array) -> Array:
    """[C, Q, S, K] → [C]: the largest gap between two pasts, in units; not a number counts as a gap without end."""
    wide = values.astype(np.float64)
    with np.errstate(all="ignore"):
        gap = (wide.max(axis=2) - wide.min(axis=2)) / unit  # [C, Q, K]
    return np.asarray(np.nan_to_num(gap, nan=LARGEST, posinf=LARGEST).clip(max=LARGEST).max(axis=(1, 2)))


def _alike(values: Array) -> Array:
    """[C, Q, S, K] → bool [C]: whether all S of each sequence have the same bits."""
    bits = np.ascontiguousarray(values).view(np.dtype(f"V{values.dtype.itemsize}"))
    return np.asarray((bits == bits[:, :, :1]).all(axis=(1, 2, 3)))


def _found(watched: Watched, name: str) -> dict[str, int | None]:
    """N(eps) of one output for every eps, and to the bit."""
    apart = {eps: watched.gaps[name] > value for eps, value in EPS.items()} | {EQUAL: ~watched.same[name]}
    return {eps: _from_when(parted, watched.settled) for eps, parted in apart.items()}


def _from_when(parted: Array, settled: bool) -> int | None:
    """The timestep, counted from 1, from which on nothing is parted; None where that did not hold long enough.

    >>> _from_when(np.array([True, False, True, False, False, False, False, False, False, False]), False)
    4
    """
    last = int(np.flatnonzero(parted)[-1]) + 1 if parted.any() else 0
    return last + 1 if settled or last < HELD * len(parted) else None


def _latest(steps: Sequence[int | None]) -> int | None:
    known = [step for step in steps if step is not None]
    return max(known) if len(known) == len(steps) else None


def _curve(gap: Array) -> dict[str, list[Any]]:
    """gap [T] at timesteps spaced evenly in their logarithm: at each the largest from then on, as N(eps) counts."""
    ahead = np.maximum.accumulate(gap[::-1])[::-1]  # [T]
    steps = np.unique(np.geomspace(1, len(gap), POINTS).round().astype(int))
    return {"steps": steps.tolist(), "gap": [float(f"{value:.3g}") for value in ahead[steps - 1]]}
