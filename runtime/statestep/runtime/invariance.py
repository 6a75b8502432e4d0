"""Whether a row's results depend on its batch-mates: tried on this machine, with this model, before it is relied on.

A replay cuts the records into other batches than the first time. Where a row gives other bits in other company, it
gives other states, and what was told to the world cannot be rebuilt. Kernels that do so are known (int8 dynamic
quantisation, ONNX's RNN, a vectorised body whose last elements are done otherwise), but no list of them is complete.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from statestep.runtime.contract import Contract
from statestep.runtime.engine import Model
from statestep.runtime.state import Array, Slots
from statestep.runtime.waves import ROWS_PER_RUN

STEPS = 3  # timesteps from birth on; the first differs, for states are zero there as a rule
SMALL = (1, 2, 7)  # rows a call: the lone row, a pair, and a number that leaves a rest for every vector width
ROTATED_BY = 13  # rows, so that each gets another place in its call and in a vector
MISSING = 0.1  # the part of the readings that is missing where the contract lets them
ADVANCED = 0.75  # the part of the rows whose new state is kept, so that rows of all ages are together
LARGEST_TOKEN = 2**31 - 1  # what every integer input can hold


def rows_agree(model: Model, rows: int = 64, seed: int = 0) -> bool:
    """Whether each of `rows` random rows gives the same bits, outputs and states, in every company that is tried.

    They are stepped all in one call, and then again: in calls of few rows, in another order, and among as many others
    as a run of the engine may hold. False is a proof, True only says that nothing was found. It takes a few hundred
    calls, for a small model some tens of milliseconds. Readings lie about the features' ranges where the contract has
    them. Raises ValueError for fewer than two rows, and what the model raises.
    """
    if rows < 2:
        raise ValueError(f"rows are compared with each other, {rows} is too few: 2 or more")
    rng = np.random.default_rng(seed)
    companies = _companies(rows)
    states = [np.repeat(value[None], rows, axis=0) for value in model.initial_states()]  # [rows, *shape] each
    for _ in range(STEPS):
        x = _readings(model.contract, rows, rng)  # [rows, F]
        outputs, following = model.step(x, states)
        expected = [*outputs.values(), *following]
        for company in companies:
            outputs, found = model.step(x[company], [state[company] for state in states])
            if not all(map(_same, [*outputs.values(), *found], [value[company] for value in expected])):
                return False
        kept = _finite(following) & (rng.random(rows) < ADVANCED)  # [rows]; the engine rejects what is not finite
        for state, value in zip(states, following, strict=True):
            state[kept] = value[kept]
    return True


def _companies(rows: int) -> list[Slots]:
    """Which rows share a call, call by call.

    >>> [company.tolist() for company in _companies(3) if len(company) <= 3]
    [[0], [1], [2], [0, 1], [2], [0, 1, 2], [1, 2, 0]]
    """
    every = np.arange(rows)
    small = [every[i : i + size] for size in SMALL for i in range(0, rows, size)]
    return [*small, np.roll(every, -ROTATED_BY), np.resize(every, max(ROWS_PER_RUN, rows))]


def _readings(contract: Contract, rows: int, rng: np.random.Generator) -> Array:
    """Random observations [rows, F]: rows of very different size, about each feature's range or about 0."""
    low = np.array([-1.0 if f.min is None else f.min for f in contract.features])  # [F]
    high = np.array([1.0 if f.max is None else f.max for f in contract.features])  # [F]
    dtype = np.dtype(contract.input_dtype)
    if dtype.kind in "bi":  # such as a token, which must be one that a table holds
        least = np.clip(np.ceil(low), 0, LARGEST_TOKEN)
        whole: Array = rng.integers(least, np.clip(high, least, LARGEST_TOKEN), (rows, len(low)), endpoint=True)
        return whole.astype(dtype)
    scale = 10 ** rng.uniform(-1, 1, (rows, 1))  # [rows, 1]
    with np.errstate(over="ignore"):  # a range may be as wide as its dtype
        x = (low / 2 + high / 2) + (high / 2 - low / 2) * scale * rng.standard_normal((rows, len(low)))  # [rows, F]
    x = np.clip(x, np.finfo(dtype).min, np.finfo(dtype).max)
    if contract.missing == "own-forecast":
        x[rng.random(x.shape) < MISSING] = np.nan
    return x.astype(dtype)


def _same(one: Array, other: Array) -> bool:
    """Whether two arrays hold the same bits; every NaN is like every other, as no row with one counts."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.tobytes() == other.tobytes():
        return True
    if one.dtype.kind != "f":
        return False
    numbers, others = (np.where(np.isnan(value), np.nan, value).tobytes() for value in (one, other))
    return numbers == others


def _finite(states: Sequence[Array]) -> Array:
    """Which rows hold only finite numbers in every state: bool [rows]."""
    finite = [np.isfinite(state).all(axis=tuple(range(1, state.ndim))) for state in states]  # [rows] each
    every: Array = np.logical_and.reduce(finite)  # [rows]
    return every
