"""Lines, bands and words as SVG, from pixels alone. A line has at most two points a column, and loses no extreme."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise

import numpy as np

from statestep.export.compare import Array


def thinned(x: Array, y: Array, cuts: Array | None = None) -> Iterator[tuple[Array, Array]]:
    """The stretches of a line through x, y [T] in pixels, thinned to the extremes of each column of pixels.

    x does not fall. A line is broken where y is NaN throughout a column, and before each row of `cuts`.

    >>> [[part.tolist() for part in parts] for parts in thinned(np.arange(8) / 4, np.array([0, 9, 1, 2, 3, 3, 3, 3.0]))]
    [[[0.0, 0.25, 1.0], [0.0, 9.0, 3.0]]]
    """
    edges = [0, *([] if cuts is None else cuts.tolist()), len(x)]
    for start, end in pairwise(edges):
        here, there = x[start:end], y[start:end]
        if len(here) > 2 * (here[-1] - here[0] + 1):
            column = np.floor(here).astype(np.int64)
            first = np.flatnonzero(np.diff(column, prepend=column[0] - 1))  # [C] where each column begins
            low = np.minimum.reduceat(np.where(np.isnan(there), np.inf, there), first)  # [C]
            high = np.maximum.reduceat(np.where(np.isnan(there), -np.inf, there), first)
            place = np.repeat(np.arange(len(first)), np.diff(first, append=len(here)))  # [T]
            keep = _first_of(there == low[place], place) | _first_of(there == high[place], place)
            keep[first[~np.isfinite(low)]] = True  # a column without a value breaks the line
            here, there = here[keep], there[keep]
        there_are = np.flatnonzero(np.diff(np.isnan(there).astype(np.int8), prepend=1, append=1))
        for begin, stop in there_are.reshape(-1, 2):
            yield here[begin:stop], there[begin:stop]


def _first_of(hit: Array, place: Array) -> Array:
    """Of the rows that hit, [T], the first of each column."""
    rows = np.flatnonzero(hit)
    kept = np.zeros(len(hit), bool)
    kept[rows[np.unique(place[rows], return_index=True)[1]]] = True
    return kept


def path(stretches: Iterable[tuple[Array, Array]]) -> str:
    """The `d` of a path: moves relative to the point before, in tenths of a pixel; what is level is one line.

    >>> path(iter([(np.array([0.0, 1.0, 2.0, 3.0]), np.array([5.0, 5.0, 5.0, 4.5]))]))
    'M0 5l2 0l1-.5'
    """
    found = []
    for x, y in stretches:
        points = np.rint(10 * np.stack([x, y], axis=1)).astype(np.int64)  # [N, 2] tenths
        level = np.zeros(len(points), bool)
        level[1:-1] = (points[1:-1, 1] == points[:-2, 1]) & (points[1:-1, 1] == points[2:, 1])
        points = points[~level]
        (left, top), *moves = points[:1].tolist() + np.diff(points, axis=0).tolist()
        found.append(f"M{tenths(left)} {tenths(top)}" + "".join(map(_move, moves or [[0, 0]])))
    return "".join(found)


def _move(by: Sequence[int]) -> str:
    across, down = tenths(by[0]), tenths(by[1])
    return f"l{across}{down}" if down.startswith("-") else f"l{across} {down}"


def tenths(count: int) -> str:
    """Tenths of a pixel in as few characters as SVG allows.

    >>> [tenths(count) for count in (20, 5, -15)]
    ['2', '.5', '-1.5']
    """
    text = f"{count / 10:g}"
    return text.replace("0.", ".", 1) if abs(count) < 10 and count else text


def line(d: str, kind: str, **more: str) -> str:
    """A path of a class; `more` are attributes of a name like data_y."""
    told = "".join(f' {name.replace("_", "-")}="{escape(value)}"' for name, value in more.items())
    return f'<path class="{kind}" d="{d}"{told}/>' if d else ""


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    """A rectangle; its title shows where the pointer rests."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">{inner}</rect>'


def text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    """Words at a place."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'


def hair(x1: float, y1: float, x2: float, y2: float, kind: str = "hair") -> str:
    """A thin straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def circle(x: float, y: float, kind: str) -> str:
    """A dot."""
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
