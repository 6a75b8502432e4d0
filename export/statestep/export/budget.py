"""How many false alarms are acceptable, and the threshold that gives so many. Pure numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.measures import events_of, merged

SECONDS = {
    "hour": 3600,
    "day": 86_400,
    "week": 604_800,
    "month": 2_629_746,
    "year": 31_556_952,
}
DEFAULT = "1/week"
QUANTILE = 0.999  # of the scores, where no budget can be told in timesteps
COUNTED = 5  # events that the budget must allow for their number to be counted; a rarer one needs a fitted tail
PEAKS = 30  # events whose heights the tail is fitted to
LEAST_SCALE = 1e-3
STEPS = 200  # thresholds that are tried


@dataclass(frozen=True, slots=True)
class Budget:
    """Either one false alarm a stream in `every` timesteps, or a `quantile` of the scores."""

    every: int | None = None
    quantile: float = QUANTILE


@dataclass(frozen=True, slots=True)
class Tail:
    """A threshold, and how it was found: `counted`, or by an exponential tail over `over` with that `scale`."""

    threshold: float
    counted: bool
    over: float = math.nan
    scale: float = math.nan


def budget_of(text: str, period_seconds: float | None) -> Budget:
    """Read "1/week", "2 / month", "1/5000 rows" or a quantile such as "0.999".

    Without a period what is told by the calendar cannot be told in timesteps: an `ExportError` says so.

    >>> budget_of("1/week", 300.0).every, budget_of("0.9999", None).quantile
    (2016, 0.9999)
    """
    if found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*([a-z]+)\s*", text):
        count, unit = float(found[1]), found[2].removesuffix("s")
        if unit in SECONDS and count > 0:
            if period_seconds is None:
                raise ExportError(
                    f"false alarms are to be {text!r}, and nobody said how long a timestep is: name the time's column "
                    "or the period, or give a number of rows (1/5000 rows) or a quantile (0.999)"
                )
            return Budget(_every(SECONDS[unit] / period_seconds / count, text))
    elif found := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*/\s*([0-9]+)\s*rows?\s*", text):
        if float(found[1]) > 0:
            return Budget(_every(int(found[2]) / float(found[1]), text))
    else:
        try:
            quantile = float(text)
        except ValueError:
            quantile = 0.0
        if 0 < quantile < 1:
            return Budget(None, quantile)
    raise ExportError(
        f"false alarms are {text!r}, it must be a number of them in a time (1/week, 2/month), in rows (1/5000 rows), "
        "or a quantile of the scores (0.999)"
    )


def _every(steps: float, text: str) -> int:
    if steps < 2:
        raise ExportError(f"false alarms are {text!r}, which is one in {steps:.2g} timesteps: allow fewer")
    return round(steps)


def threshold_for(scores: Sequence[Array], budget: Budget, calm: int) -> Tail:
    """The lowest threshold that keeps the budget on `scores`, each [rows] of one stream without an anomaly.

    Events are counted as the detector counts them: what follows within `calm` timesteps belongs to the same. Where the
    rows are too few for the budget to be counted, the heights of the highest events are taken for exponential, as
    those of any thin tail are in the end (Pickands 1975), and the line is drawn on.
    """
    every = np.concatenate(scores)
    if budget.every is None:
        return Tail(float(np.quantile(every, budget.quantile)), True)
    allowed = len(every) / budget.every
    levels = np.unique(np.quantile(every, 1 - np.geomspace(1 / len(every), 0.5, STEPS)))[::-1]  # falling
    counts = [_heights(scores, level, calm).size for level in levels]
    if allowed >= COUNTED:
        kept = next((i for i, count in enumerate(counts) if count > allowed), len(levels)) - 1
        return Tail(float(levels[max(kept, 0)]), True)
    place = next((i for i, count in enumerate(counts) if count >= PEAKS), int(np.argmax(counts)))
    over = float(levels[place])
    heights = _heights(scores, over, calm)
    scale = max(float((heights - over).mean()) if heights.size else 0.0, LEAST_SCALE)
    return Tail(over + scale * math.log(max(heights.size, 1) / allowed), False, over, scale)


def _heights(scores: Sequence[Array], level: float, calm: int) -> Array:
    """The highest score of each event over `level`: [events]."""
    events = [(each, event) for each in scores for event in merged(events_of(each > level), calm)]
    return np.array([each[begin:end].max() for each, (begin, end) in events])
