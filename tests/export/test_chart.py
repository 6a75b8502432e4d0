"""What is drawn is where it belongs: scales go back and forth, axes are round, thinned lines lose no extreme."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestep.export.axes import Along, Scale, moment, silences
from statestep.export.chart import path, thinned

from .backtests import BEGIN_NS, Array

DAY_NS = 86_400 * 10**9


def drawn(d: str) -> list[Array]:
    """The points of a path's stretches, [N, 2] each, back from its `d`."""
    found = []
    for part in d.split("M")[1:]:
        pairs = [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) ?(-?[\d.]+)", part)]
        assert f"{part.count('l') + 1}" == f"{len(pairs)}", part
        found.append(np.cumsum(np.array(pairs), axis=0))
    return found


@given(st.integers(0, 2**32), st.integers(1, 4000), st.floats(0, 0.9), st.integers(1, 60))
def test_a_thinned_line_keeps_every_columns_extremes(seed: int, rows: int, holes: float, width: int) -> None:
    """However many rows there are: at most two points a column, and no value that was not there."""
    rng = np.random.default_rng(seed)
    x, y = np.sort(rng.uniform(0, width, rows)), rng.standard_cauchy(rows)
    y[rng.random(rows) < holes] = np.nan
    parts = list(thinned(x, y))
    there = ~np.isnan(y)
    assert bool(parts) == there.any()
    if not parts:
        return
    left, kept = (np.concatenate([part[axis] for part in parts]) for axis in (0, 1))
    assert (np.diff(left) >= 0).all() and set(zip(left, kept, strict=True)) <= set(zip(x, y, strict=True))
    if rows > 2 * (x[-1] - x[0] + 1):
        assert len(left) <= 2 * (width + 1)
        for column in np.unique(np.floor(x[there])):
            mine, all_of_it = kept[np.floor(left) == column], y[there & (np.floor(x) == column)]
            assert (mine.min(), mine.max()) == (all_of_it.min(), all_of_it.max())
    else:
        np.testing.assert_array_equal(kept, y[there])


def test_a_spike_in_a_long_series_is_seen() -> None:
    """One row of 25,000 that is far off, and where it was."""
    y = np.zeros(25_000)
    y[17_321] = -80.0
    (points,) = drawn(path(thinned(np.linspace(0, 970, len(y)), y)))
    assert points[:, 1].min() == -80 and abs(points[points[:, 1].argmin(), 0] - 17_321 / 25_000 * 970) < 1
    assert len(points) < 10, "what is level is one line"


def test_a_long_hole_breaks_a_thinned_line() -> None:
    """A column without a value is no bridge; one with some is no hole."""
    x, y = np.arange(5000) / 50, np.ones(5000)
    y[1000:1500], y[3000:3040] = np.nan, np.nan
    (before, _), (after, _) = thinned(x, y)
    assert before[-1] < 20 and after[0] >= 30


@given(st.dictionaries(st.integers(-5000, 5000), st.integers(-30, 30), min_size=1, max_size=30))
def test_a_path_goes_through_its_points(tenths: dict[int, int]) -> None:
    """Exactly, though moves are relative and what is level is left out; points between are rounded to a tenth."""
    x, y = np.array(sorted(tenths)) / 10, np.array([tenths[key] for key in sorted(tenths)]) / 10
    (found,) = drawn(path([(x + 0.04, y - 0.04)]))
    np.testing.assert_allclose(np.interp(x, found[:, 0], found[:, 1]), y, atol=1e-9)
    assert len(found) <= max(len(x), 2)


def test_a_line_is_broken_where_nothing_was_heard() -> None:
    """A silence is no level; a short one, of which there may be thousands, is passed over."""
    times = BEGIN_NS + np.r_[np.arange(100), 200, np.arange(203, 300)] * 300 * 10**9
    along = Along.of(len(times), times)
    wide = along.scale(0, len(times), 0.0, 900.0)
    cuts = silences(along, wide, 0, len(times))
    assert cuts.tolist() == [100]
    assert len(list(thinned(wide(along.at), np.zeros(len(times)), cuts))) == 2
    assert silences(along, along.scale(0, len(times), 0.0, 5.0), 0, len(times)).size == 0


@pytest.mark.parametrize("bend", [None, 2.0])
def test_a_scale_keeps_order_and_edges(bend: float | None) -> None:
    """Also where it turns logarithmic; what is not there stays so, what lies outside is at the edge."""
    scale = Scale(0.0, 50.0, 200.0, 0.0, bend)
    values = np.linspace(0, 50, 500)
    assert (np.diff(scale(values)) < 0).all()
    assert scale(np.array([0.0, 50.0, 99.0, np.nan])).tolist()[:3] == [200.0, 0.0, 0.0]
    assert np.isnan(scale(np.array([np.nan])))
    ticks = scale.ticks(15)
    assert len(ticks) >= 4 and (np.diff(scale(np.array(ticks))) <= -15 + 1e-6).all()
    if bend:
        gaps = np.diff(scale(np.array([0.0, 1.0, 2.0, 2.01])))
        assert gaps[0] == pytest.approx(gaps[1]) and gaps[2] == pytest.approx(gaps[1] / 100, rel=0.01)


@pytest.mark.parametrize(
    ("step_seconds", "rows", "first"),
    [
        (0.001, 500, "00.100"),
        (0.1, 50, "22:15:01"),
        (1, 120, "22:15:15"),
        (300, 288, "11-15"),
        (300, 22_695, "2023-11-20"),
        (86_400, 3000, "2024-01"),
        (86_400 * 31, 500, "2030-01"),
    ],
)
def test_time_axes_are_round(step_seconds: float, rows: int, first: str) -> None:
    """From milliseconds to decades: some ticks, each at the moment that it is called, none too near another."""
    times = BEGIN_NS + (np.arange(rows) * step_seconds * 1e9).astype(np.int64)
    along = Along.of(rows, times)
    assert along.timed and along.step == pytest.approx(step_seconds)
    scale = along.scale(0, rows, 0.0, 970.0)
    ticks = along.ticks(scale, 76)
    assert first in [said for _, said in ticks] and 3 <= len(ticks) <= 14
    assert (np.diff(scale(np.array([place for place, _ in ticks]))) >= 65).all()
    for place, said in ticks:
        text = str(np.datetime64(round(place * 1000), "ms"))
        assert re.fullmatch(r"(-01)?T?[0:.]*", text.rpartition(said)[2]) and said in text


def test_a_clock_that_was_put_back_stands_still() -> None:
    """An hour that came twice keeps the axis; times in disorder are of no use, nor are some that are absent."""
    rows = np.arange(1000)
    autumn = BEGIN_NS + np.where(rows < 500, rows, rows - 12) * 300 * 10**9
    along = Along.of(1000, autumn)
    assert along.timed and (np.diff(along.at) >= 0).all() and along.at[-1] == autumn[-1] / 1e9
    for useless in (autumn[::-1], np.full(1000, BEGIN_NS), np.where(rows == 3, np.iinfo(np.int64).min, autumn)):
        assert not Along.of(1000, useless).timed
    assert moment(autumn, 0) == "2023-11-14 22:15" and moment(BEGIN_NS + rows * 10**6, 1) == "2023-11-14 22:15:00.001"


def test_a_band_is_never_too_narrow_to_be_seen() -> None:
    """One row in a hundred thousand, also the last."""
    along = Along.of(100_000, None)
    scale = along.scale(0, 100_000, 60.0, 1000.0)
    for row in (0, 50_000, 99_999):
        left, width = along.band(row, row + 1, scale)
        assert width == 1.5 and 60 <= left <= 1000 - 1.5
