"""Scales and axes: where a value, a time or a row is drawn, in pixels, and what is written beside it. Pure numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from statestep.export.compare import Array
from statestep.runtime import NO_TIME

SILENT = 5  # usual steps without a row: there a line is broken
LEAST_BREAK = 3.0  # pixels; a shorter silence cannot be seen
FORWARD = 0.9  # of the rows may not be earlier than one before them
LEAST_BAND = 1.5  # pixels, so that a short event is seen in a long series
MINUTE, HOUR, DAY = 60, 3600, 86_400
STEPS = (
    *(0.001, 0.01, 0.1, 1, 5, 15, 30),
    *(
        MINUTE,
        5 * MINUTE,
        15 * MINUTE,
        30 * MINUTE,
        HOUR,
        3 * HOUR,
        6 * HOUR,
        12 * HOUR,
        DAY,
        2 * DAY,
        7 * DAY,
        14 * DAY,
    ),
)  # of time, in seconds


class Scale(NamedTuple):
    """From values to pixels: `low` is drawn at `start`, `high` at `stop`; above `bend`, where given, by the logarithm.

    >>> scale = Scale(0.0, 4.0, 100.0, 0.0)
    >>> float(scale(1.0)), scale.ticks(30.0)
    (75.0, [0.0, 2.0, 4.0])
    """

    low: float
    high: float
    start: float
    stop: float
    bend: float | None = None

    def __call__(self, values: Array | float) -> Array:
        """Values, NaN among them, as pixels; what lies outside is drawn at the edge."""
        low, high = self._bent(np.array([self.low, self.high]))
        share = (self._bent(np.clip(values, self.low, self.high)) - low) / (high - low)
        return np.asarray(self.start + share * (self.stop - self.start))

    def ticks(self, apart: float) -> list[float]:
        """Round values that stand `apart` pixels from each other, or more."""
        if self.bend is not None:
            decades = range(-3, math.ceil(math.log10(self.high)) + 1)
            round_ones = [0.0, *(float(f"{m}e{k}") for k in decades for m in (1, 2, 5))]
        else:
            least = (self.high - self.low) * apart / abs(self.stop - self.start)
            power = 10.0 ** math.floor(math.log10(least))
            step = next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            round_ones = [float(f"{n * step:.12g}") for n in range(first, last + 1)]
        kept: list[float] = []
        for value in round_ones:
            far = not kept or abs(float(self(value)) - float(self(kept[-1]))) >= apart * (1 - 1e-9)
            if self.low <= value <= self.high and far:
                kept.append(value)
        return kept

    def _bent(self, values: Array) -> Array:
        if self.bend is None:
            return np.asarray(values, np.float64)
        share = np.asarray(values, np.float64) / self.bend
        return np.where(share <= 1, share, 1 + np.log(np.maximum(share, 1)))


@dataclass(frozen=True, slots=True)
class Along:
    """The places of a stream's rows along the horizontal axis: their times, or their numbers where time does not tell.

    >>> Along.of(3, None).at.tolist()
    [0.0, 1.0, 2.0]
    """

    at: Array  # float64 [T], not falling: seconds since the epoch, or rows
    timed: bool
    step: float  # the usual distance of two rows

    @classmethod
    def of(cls, rows: int, times: Array | None) -> Self:
        """Of `rows` rows with `times` (int64 [T] ns), of no use where one is absent or they do not run forward.

        A clock that was put back, as in autumn, stands still until its old time is reached.
        """
        if times is not None and rows > 1 and (times != NO_TIME).all():
            latest = np.maximum.accumulate(times)
            apart = np.diff(latest)
            if (latest == times).mean() > FORWARD and (apart > 0).any():
                return cls(latest / 1e9, True, float(np.median(apart[apart > 0])) / 1e9)
        return cls(np.arange(rows, dtype=np.float64), False, 1.0)

    def scale(self, start: int, end: int, left: float, right: float) -> Scale:
        """For rows [start, end): half a step of room on either side."""
        return Scale(float(self.at[start]) - self.step / 2, float(self.at[end - 1]) + self.step / 2, left, right)

    def band(self, start: int, end: int, scale: Scale) -> tuple[float, float]:
        """Left edge and width in pixels of rows [start, end), never too narrow to be seen."""
        left, right = scale(np.array([self.at[start] - self.step / 2, self.at[end - 1] + self.step / 2])).tolist()
        width = max(right - left, LEAST_BAND)
        return min(left, max(scale.start, scale.stop) - width), width

    def ticks(self, scale: Scale, apart: float) -> list[tuple[float, str]]:
        """Places and what is written there, `apart` pixels from each other or more."""
        if not self.timed:
            return [(value, f"{value:,.0f}") for value in scale.ticks(apart) if value == round(value)]
        least = (scale.high - scale.low) * apart / abs(scale.stop - scale.start)
        if step := next((step for step in STEPS if step >= least), None):
            return [(place, _written(place, step)) for place in _multiples(scale, step)]
        months = max(math.ceil(least / (31 * DAY)), 1)
        step = next((m for m in (1, 2, 3, 6, 12) if m >= months), 12 * math.ceil(months / 12))
        first, last = (int(np.datetime64(int(edge), "s").astype("M8[M]").astype(int)) for edge in scale[:2])
        found = [
            (float(np.datetime64(month, "M").astype("M8[s]").astype(int)), month) for month in range(first, last + 1)
        ]
        return [
            (place, str(np.datetime64(month, "M")))
            for place, month in found
            if month % step == 0 and place >= scale.low
        ]


def moment(times: Array | None, row: int) -> str:
    """When a row was, as exactly as is needed; its number where nobody knows.

    >>> moment(None, 1200), moment(np.array([1_767_571_200 * 10**9]), 0)
    ('row 1,200', '2026-01-05 00:00')
    """
    if times is None or times[row] == NO_TIME:
        return f"row {row:,}"
    text = str(np.datetime64(int(times[row]), "ns").astype("M8[ms]")).replace("T", " ")
    return text.removesuffix(".000").removesuffix(":00")


def _multiples(scale: Scale, step: float) -> list[float]:
    """Multiples of a step of time within the scale; weeks begin on Monday."""
    origin = 4 * DAY if step % (7 * DAY) == 0 else 0
    first = math.ceil((scale.low - origin) / step) * step + origin
    return [float(place) for place in np.arange(first, scale.high, step)]


def _written(place: float, step: float) -> str:
    text = str(np.datetime64(round(place * 1000), "ms"))  # 2026-01-05T00:00:00.000
    if step >= DAY:
        return text[:10]
    if step >= MINUTE:
        return text[5:10] if place % DAY == 0 else text[11:16]
    return text[11:19] if step >= 1 else text[17:]


def silences(along: Along, scale: Scale, start: int, end: int) -> Array:
    """Before which of rows [start, end) nothing was heard for long: int64, counted from `start`."""
    apart = np.diff(along.at[start:end])
    pixels = abs(scale.stop - scale.start) / (scale.high - scale.low)
    return np.flatnonzero(apart > max(SILENT * along.step, LEAST_BREAK / pixels)) + 1


def number(value: float) -> str:
    """A value in about four digits.

    >>> [number(value) for value in (98.0989, 0.00012345, 1234567.0, 0.5)]
    ['98.1', '0.0001234', '1,234,567', '0.5']
    """
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"
    return f"{value:.3g}" if abs(value) >= 0.1 else f"{value:.4g}"
