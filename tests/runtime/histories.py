"""Calls to make of an engine, and its records and results as bytes, so that equal means equal bit for bit."""

from __future__ import annotations

import numpy as np

from statestep.runtime import Advanced, Engine

from .reference import Array

KEYS = [b"pump-%d" % number for number in range(9)]


def drawn(seed: int, rows: int) -> tuple[list[bytes], Array, Array]:
    """Keys with many repeats, x [rows, 2] and times [rows] in no order."""
    rng = np.random.default_rng(seed)
    keys = [KEYS[i] for i in rng.integers(0, len(KEYS), rows)]
    return keys, rng.normal(0, 3, (rows, 2)).astype(np.float32), rng.integers(0, 10**12, rows)


def bits(engine: Engine) -> dict[bytes, tuple[bytes, ...]]:
    """Every record of an engine, so that equal means equal bit for bit."""
    keys = sorted(engine.keys())
    held = engine.read(keys)
    columns = [*held.states, held.step, held.time, held.offset, engine.first_dirty(keys)]
    return {key: tuple(column[i].tobytes() for column in columns) for i, key in enumerate(keys)}


def rows_of(out: Advanced) -> list[tuple[bytes, ...]]:
    """What a call gave, a row at a time, as bytes."""
    columns = [*out.outputs.values(), out.rejected, out.step, out.previous_time, out.bridged, out.reset, out.dirtied]
    return [tuple(column[i].tobytes() for column in columns) for i in range(len(out.step))]
