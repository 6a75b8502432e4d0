"""The results of a call of the engine, while its waves fill them in; and what is asked of rows of arrays. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from statestep.runtime.state import Array, Column
from statestep.runtime.waves import Rows


@dataclass(slots=True)
class Results:
    """One array for each thing that is told of a row."""

    outputs: dict[str, Array]
    rejected: Array  # bool [N]
    step: Array  # int64 [N]
    previous_time: Array  # int64 [N]
    bridged: Array  # int64 [N]
    reset: Array  # bool [N]
    dirtied: Array  # bool [N]

    @classmethod
    def empty(cls, n: int, like: dict[str, Array]) -> Results:
        """For n rows with outputs like these, yet to be put."""
        outputs = {name: np.empty((n, *value.shape[1:]), value.dtype) for name, value in like.items()}
        whole, yes = np.int64, np.bool_
        return cls(outputs, *(np.empty(n, dtype) for dtype in (yes, whole, whole, whole, yes, yes)))

    def put(self, rows: Rows, outputs: dict[str, Array], *rest: Array) -> None:
        """Set the results at `rows`; `rest` are the other fields in order."""
        for name, value in outputs.items():
            self.outputs[name][rows] = value
        whole = (self.rejected, self.step, self.previous_time, self.bridged, self.reset, self.dirtied)
        for field, value in zip(whole, rest, strict=True):
            field[rows] = value


def as_born(columns: Sequence[Column], values: Sequence[Array], n: int) -> Array:
    """Which of n records hold the initial value in all of these columns: bool [n]."""
    same = np.ones(n, bool)
    for column, value in zip(columns, values, strict=True):
        same &= (value == column.initial).reshape(n, -1).all(axis=1)
    return same


def finite(arrays: Sequence[Array], n: int) -> Array | None:
    """Which rows hold only finite numbers in every float array: bool [n], or None where all do."""
    bad = []
    for array in arrays:
        if array.dtype.kind == "f":
            whole = np.isfinite(array)  # [n, …]
            if np.count_nonzero(whole) < whole.size:  # the quickest way to ask whether all are
                bad.append(~whole.reshape(n, -1).all(axis=1))
    return ~np.logical_or.reduce(bad) if bad else None


def blanked(value: Array, rejected: Array) -> Array:
    """`value` with the rejected rows made NaN, or zero where its dtype has no NaN."""
    blank = value.copy()
    blank[rejected] = np.nan if value.dtype.kind == "f" else 0
    return blank
