"""The panels of a report's pictures, one function each: a score, a feature's readings, the shares of the score."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from statestep.export.axes import Along, Scale, number, silences
from statestep.export.backtest import Backtest, Stream, Verdict
from statestep.export.chart import circle, hair, line, path, rect, tenths, text, thinned
from statestep.export.compare import Array
from statestep.export.detector import BESIDE
from statestep.export.findings import Why, of_feature, ratio_of
from statestep.export.words import REASONS, percent

TITLE = 19.0  # pixels above a panel
STRIP = 30.0  # height of the shares
COLUMN = 3.0  # pixels of a column of them
HIGHEST, NEAR_HIGHEST = 3.6, 1.8  # thresholds that a score's axis reaches at least: all severities can be read off
SEVERITIES = ((1.0, "threshold"), (1.5, "major 1.5×"), (3.0, "critical 3×"))


@dataclass(frozen=True, slots=True)
class View:
    """Rows [start, end) of a stream, and where they are drawn."""

    stream: Stream
    along: Along
    start: int
    end: int
    x: Scale

    @classmethod
    def of(cls, stream: Stream, start: int, end: int, left: float, right: float) -> View:
        """The rows between two pixels."""
        along = Along.of(len(stream.x), stream.times)
        return cls(stream, along, start, end, along.scale(start, end, left, right))

    def path(self, y: Scale, values: Array) -> str:
        """The `d` of a line through values [T] of the whole stream."""
        rows = slice(self.start, self.end)
        cuts = silences(self.along, self.x, self.start, self.end)
        return path(thinned(self.x(self.along.at[rows]), y(values[rows].astype(np.float64)), cuts))

    def bands(self, spans: Iterable[tuple[int, int, str]], y: float, height: float, kind: str) -> str:
        """Rectangles over rows [a, b), each with a title, as far as they are in view."""
        found = []
        for a, b, title in spans:
            if a < self.end and b > self.start:
                left, width = self.along.band(max(a, self.start), min(b, self.end), self.x)
                found.append(rect(left, y, width, height, kind, title))
        return "".join(found)

    def axis(self, top: float, bottom: float, apart: float) -> str:
        """Hairlines from top to bottom at round times, and the times below."""
        found = []
        for place, said in self.along.ticks(self.x, apart):
            x = float(self.x(place))
            found += [hair(x, top, x, bottom), text(x, bottom + 13, said, "tick", "middle")]
        return "".join(found)


def score(
    view: View, verdict: Verdict, y: float, height: float, name: str = "", title: str = "score", *, near: bool = False
) -> str:
    """A panel with a score and its threshold: linear below the threshold, logarithmic above.

    `name` tells a baseline's from the model's own, which has severities beside it unless it is seen from near.
    """
    levels, prefix = not (name or near), f"{name}: " if name else ""
    top, bottom = y + TITLE, y + TITLE + height
    values = verdict.outputs["score"].astype(np.float64)
    threshold = verdict.outputs["threshold"].astype(np.float64)
    rows = slice(view.start, view.end)
    usual = max(float(np.nanmedian(threshold[rows])), 1e-9) if np.isfinite(threshold[rows]).any() else 1.0
    highest = max(float(np.nanmax(np.append(values[rows], 0.0))), (NEAR_HIGHEST if near else HIGHEST) * usual)
    scale = Scale(0.0, highest * 1.02, bottom, top, bend=usual)
    found = [text(view.x.start, y + TITLE - 6, title, "title")]
    found += [
        hair(view.x.start, y_, view.x.stop, y_) + text(view.x.start - 6, y_ + 3.5, number(value), "tick", "end")
        for value, y_ in ((value, float(scale(value))) for value in scale.ticks(18 if levels else 15))
    ]
    if levels:
        for ratio, said in SEVERITIES:
            y_ = float(scale(ratio * usual))
            found.append(hair(view.x.stop, y_, view.x.stop + 4, y_, "mark-line"))
            found.append(text(view.x.stop + 7, y_ + 3.5, said, "tick"))
    over = np.where(ratio_of(verdict) > 1, values, np.nan)
    told = _told(scale)
    found.append(line(view.path(scale, threshold), "threshold", data_name=f"{prefix}threshold", data_y=told))
    found.append(line(view.path(scale, values), "score", data_name=f"{prefix}score", data_y=told))
    found.append(line(view.path(scale, over), "over"))
    return "".join(found)


def reading(
    found: Backtest,
    view: View,
    verdict: Verdict,
    y: float,
    height: float,
    column: int,
    rank: int | None,
    why: Why | None = None,
) -> str:
    """A panel with a feature's readings, and the forecast for each over it; `rank` is its place in the strip.

    Where there is a `why`, the title says it, the row where it shows most is marked, and the line is that of what the
    reading is set against: the other features' word, the forecast, or that and the edges of training.
    """
    top, bottom = y + TITLE, y + TITLE + height
    feature, rows = found.contract.features[column], slice(view.start, view.end)
    seen = view.stream.x[:, column].astype(np.float64)
    role = "related" if why is not None and why.reason in BESIDE else "expected"
    expected = of_feature(found.contract, verdict.outputs, role, column)
    low, high = _range(seen[rows], None if expected is None else expected[rows], everything=why is not None)
    room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.05
    scale = Scale(low - room, high + room, bottom, top)
    title = feature.name + (f", {feature.unit}" if feature.unit else "")
    if why is not None:
        share = f"{percent(why.share)} of the score, " if len(found.contract.features) > 1 else ""
        title += f": {share}{REASONS.get(why.reason or '', 'unusual')}"
    x = view.x.start
    parts = [] if rank is None else [rect(x, y + TITLE - 14, 8, 8, f"c{rank}")]
    parts.append(text(x + (0 if rank is None else 12), y + TITLE - 6, short(title), "title"))
    for value in scale.ticks(24):
        y_ = float(scale(value))
        parts.append(hair(x, y_, view.x.stop, y_) + text(x - 6, y_ + 3.5, number(value), "tick", "end"))
    if why is not None and why.reason == "range":
        edges = [edge for edge in (feature.min, feature.max) if edge is not None and low - room < edge < high + room]
        parts += [hair(x, float(scale(edge)), view.x.stop, float(scale(edge)), "edge") for edge in edges]
    told = _told(scale)
    if expected is not None:
        after_birth = np.where(np.arange(len(expected)) > 0, expected, np.nan)  # at its birth it had no forecast
        parts.append(line(view.path(scale, after_birth), "expected", data_name=f"{feature.name} expected", data_y=told))
    finite = np.where(np.isfinite(seen), seen, np.nan)
    parts.append(line(view.path(scale, finite), "seen", data_name=feature.name, data_y=told))
    if why is not None and why.seen is not None and why.expected is not None:
        at, seen_y, said_y = (float(v) for v in (view.x(view.along.at[why.row]), scale(why.seen), scale(why.expected)))
        parts.append(hair(at, seen_y, at, said_y, "miss"))
        parts += [circle(at, said_y, "miss-expected"), circle(at, seen_y, "miss-seen")]
    return "".join(parts)


def _range(seen: Array, expected: Array | None, *, everything: bool) -> tuple[float, float]:
    """Between which values a panel lies: what was seen, and `everything` that was expected or what is not far off."""
    there = seen[np.isfinite(seen)]
    said = np.array([]) if expected is None else expected[np.isfinite(expected)]
    if there.size and said.size and not everything and (reach := float(np.ptp(there))):
        said = np.clip(said, there.min() - reach, there.max() + reach)
    both = np.concatenate([there, said])
    return (float(both.min()), float(both.max())) if both.size else (0.0, 1.0)


def strip(found: Backtest, view: View, verdict: Verdict, y: float, columns: Sequence[int]) -> str:
    """Shares of the score, stacked: the leading features and all others; faint where no alarm is."""
    names = found.contract.feature_names
    shares = [of_feature(found.contract, verdict.outputs, "contribution", column) for column in columns]
    known = np.stack([np.zeros(len(verdict.alarmed)) if s is None else np.nan_to_num(s) for s in shares], axis=1)
    total = known.sum(axis=1)
    known = np.where((total > 0)[:, None], np.column_stack([known, np.maximum(1 - total, 0)]), 0.0)  # [T, shown + 1]
    pixels = view.x(view.along.at)
    column = ((pixels - view.x.start) // COLUMN).astype(np.int64)  # [T]
    count = int(column.max()) + 1
    alarmed = np.bincount(column, verdict.alarmed, count) > 0  # [C]
    weight = np.where(alarmed[column], verdict.alarmed, 1.0)  # [T] where an alarm is, only its rows count
    rows = np.maximum(np.bincount(column, weight, count), 1e-9)
    mean = np.stack([np.bincount(column, weight * s, count) / rows for s in known.T])  # [shown + 1, C]
    edges = np.rint(10 * STRIP * np.cumsum(np.vstack([np.zeros(count), mean]), axis=0)).astype(int)
    bottom, parts, x = y + TITLE + STRIP, [], view.x.start
    for place in range(len(mean)):
        kind = f"c{place}" if place < len(columns) else "rest"
        for faint in (False, True):
            there = np.flatnonzero((alarmed != faint) & (edges[place + 1] > edges[place]))
            bars = "".join(
                f"M{tenths(round(10 * (x + COLUMN * c)))} {tenths(round(10 * bottom) - int(edges[place, c]))}"
                f"h{COLUMN:g}v{tenths(int(edges[place, c] - edges[place + 1, c]))}h-{COLUMN:g}z"
                for c in there.tolist()
            )
            parts.append(line(bars, f"{kind} faint" if faint else kind))
    parts.append(text(x, y + TITLE - 6, "share of the score", "title"))
    at = x + 118.0
    for place, said in enumerate(
        [*(names[k] for k in columns), *(["all others"] if len(names) > len(columns) else [])]
    ):
        said = short(said, 24)
        parts.append(rect(at, y + TITLE - 14, 8, 8, f"c{place}" if place < len(columns) else "rest"))
        parts.append(text(at + 11, y + TITLE - 6, said, "tick"))
        at += 30 + 6.2 * len(said)
    return "".join(parts)


def short(said: str, most: int = 60) -> str:
    """The beginning of what is too long for its place."""
    return said if len(said) <= most else said[: most - 1] + "…"


def _told(scale: Scale) -> str:
    return json.dumps([round(v, 6) for v in scale[:4]] + ([] if scale.bend is None else [round(scale.bend, 6)]))
