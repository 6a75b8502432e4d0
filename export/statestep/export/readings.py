"""Readings to step a model over: a user's own, made ready, or drawn within the ranges that its contract names."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from statestep.export.compare import Array
from statestep.export.errors import DataError
from statestep.runtime import Contract

KEPT = 0.9  # of a drawn reading's place in its range, from one timestep to the next
UNKNOWN = (-2.0, 2.0)  # the range of a feature whose own nobody noted; two standard deviations each way


def finite_rows(contract: Contract, data: Mapping[str, Array] | None) -> dict[str, Array]:
    """Each stream as [T, F] in the model's dtype, rows that are not finite left out. Raises `DataError`."""
    features = len(contract.features)
    streams = {}
    for name, x in (data or {}).items():
        if x.ndim != 2 or x.shape[1] != features:
            raise DataError(f"stream {name!r} has shape {list(x.shape)}, the model takes [T, {features}] readings")
        rows = np.ascontiguousarray(x, contract.input_dtype)
        rows = rows[np.isfinite(rows).all(axis=1)]
        if len(rows):
            streams[name] = rows
    return streams


def drawn(contract: Contract, steps: int, batch: int, rng: np.random.Generator) -> Array:
    """Readings that wander within each feature's range: a first-order autoregression, [T, B, F]."""
    ranges = [(f.min, f.max) if f.min is not None and f.max is not None else UNKNOWN for f in contract.features]
    low, high = np.array(ranges).T  # [F]
    noise = rng.standard_normal((steps, batch, len(ranges)))  # [T, B, F]
    wander = np.empty_like(noise)
    level = rng.standard_normal(noise.shape[1:])  # [B, F]
    for t in range(steps):
        level = KEPT * level + np.sqrt(1 - KEPT**2) * noise[t]
        wander[t] = level
    within = np.clip((low + high) / 2 + (high - low) / 4 * wander, low, high)  # beyond it may be no reading at all
    return np.ascontiguousarray(within, contract.input_dtype)
