"""Measures of scores and alarms: the numbers of independent programs, laws, and hand-counted events."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from statestep.export.measures import (
    Judged,
    alarms_per_week,
    auc_pr,
    events_of,
    judged,
    merged,
    paired_interval,
    vus_pr,
)

Array = np.ndarray[Any, Any]


def case(seed: int, rows: int, events: list[tuple[int, int]], levels: int | None = None) -> tuple[Array, Array]:
    """A label [T] with `events`, and a score [T] that is higher within them; of `levels` distinct values if given."""
    label = np.zeros(rows, bool)
    for start, end in events:
        label[start:end] = True
    score = np.random.default_rng(seed).random(rows) + 0.6 * label
    return label, score if levels is None else np.floor(score * levels)


# generate_curve(label.astype(int), score, buffer, "opt", 250)[7] of TSB_AD.evaluation.basic_metrics in TSB-AD 1.5
# (numpy 2.4.6), over the same labels and scores.
FROM_TSB_AD = {
    "events far apart": (case(1, 1200, [(200, 230), (700, 790)]), 100, 0.762627230186),
    "events whose slopes meet": (case(2, 900, [(300, 310), (325, 360), (420, 421), (600, 640)]), 100, 0.844147510591),
    "events at both ends": (case(3, 600, [(0, 12), (250, 251), (580, 600)]), 40, 0.642358702439),
    "a score of four levels": (case(4, 1000, [(100, 150), (160, 161), (500, 600)], levels=4), 31, 0.738796939035),
    "fewer rows than thresholds and buffer": (case(5, 60, [(3, 5), (30, 44)]), 100, 0.943725835122),
    "no buffer": (case(6, 500, [(60, 90), (91, 92), (300, 320)]), 0, 0.846642917360),
}


@pytest.mark.parametrize("name", FROM_TSB_AD)
def test_vus_pr_is_that_of_tsb_ad(name: str) -> None:
    """Published tables are made with TSB-AD: ours stand beside them only if the numbers are the same."""
    (label, score), buffer, theirs = FROM_TSB_AD[name]
    assert vus_pr(label, score, buffer) == pytest.approx(theirs, abs=1e-9)


def brute_force(label: Array, score: Array) -> float:
    """Average precision, one threshold at a time."""
    area, recall = 0.0, 0.0
    for threshold in sorted(set(score.tolist()), reverse=True):
        alarmed = [bool(value >= threshold) for value in score]
        true = sum(a and bool(b) for a, b in zip(alarmed, label, strict=True))
        area += (true / int(label.sum()) - recall) * true / sum(alarmed)
        recall = true / int(label.sum())
    return area


@pytest.mark.parametrize("seed", range(20))
def test_auc_pr_is_that_of_one_threshold_at_a_time(seed: int) -> None:
    """Also where many rows share a score, and whatever the share of labelled rows."""
    rng = np.random.default_rng(seed)
    label = rng.random(80) < rng.uniform(0.1, 0.9)
    score = rng.integers(0, rng.integers(1, 80), 80).astype(float)
    assert auc_pr(label, score) == pytest.approx(brute_force(label, score), abs=1e-12)


def test_rows_of_one_score_are_alarmed_together() -> None:
    """A score that says nothing is worth the base rate, in whichever order its rows come."""
    for label in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert auc_pr(label, [5.0] * 4) == 0.25


@pytest.mark.parametrize("transform", [np.exp, lambda s: 3 * s - 100, lambda s: s**3], ids=["exp", "linear", "cube"])
def test_only_the_order_of_scores_counts(transform: Callable[[Array], Array]) -> None:
    """A rising transform of the score changes neither area, to the bit."""
    label, score = case(7, 400, [(50, 80), (200, 204)], levels=40)
    assert auc_pr(label, transform(score)) == auc_pr(label, score)
    assert vus_pr(label, transform(score), 20) == vus_pr(label, score, 20)


def test_a_perfect_score_is_worth_one() -> None:
    """Whatever the values; for soft labels without a buffer only, for a buffer asks for alarms beside an event too."""
    label, _ = case(8, 500, [(60, 90), (400, 480)])
    score = np.where(label, 2.0, 1.0) + np.arange(500) / 1000
    assert auc_pr(label, score) == 1.0
    assert vus_pr(label, np.where(label, 1.0, 0.0), 0) == 1.0
    assert auc_pr(label, -score) < 0.2


def test_a_random_score_is_worth_about_the_base_rate() -> None:
    """Even for one long event, which the point-adjusted F1 would call found."""
    label, _ = case(9, 5000, [(1000, 1500)])
    luck = [auc_pr(label, np.random.default_rng(seed).random(5000)) for seed in range(20)]
    assert np.mean(luck) == pytest.approx(0.1, abs=0.01)
    assert vus_pr(label, np.random.default_rng(0).random(5000)) == pytest.approx(0.1, abs=0.03)


def test_a_near_alarm_is_worth_more() -> None:
    """The volume sees how far a false alarm is from the event; the area without a buffer does not."""
    label, _ = case(10, 1000, [(500, 520)])

    def worth(row: int, buffer: int) -> float:
        return vus_pr(label, np.isin(np.arange(1000), [row, 505, 506]).astype(float), buffer)

    assert worth(495, 100) > worth(470, 100) > worth(100, 100)
    assert worth(495, 0) == worth(100, 0)


@pytest.mark.parametrize("measure", [auc_pr, vus_pr])
def test_what_has_no_curve_is_refused(measure: Callable[[Any, Any], float]) -> None:
    """One sentence says which value is wrong."""
    for label, score, sentence in (
        ([0, 0, 0], [1, 2, 3], "label has no anomalous row among its 3"),
        ([1, 1, 1], [1, 2, 3], "label has no normal row among its 3"),
        ([], [], "label has no anomalous row among its 0"),
        ([0, 1, 0], [1, 2], r"label has 3 rows and score the shape \[2\]"),
        ([0, 1, 0], [1, np.nan, 3], "score is nan in row 1"),
        ([0, 1, 0], [1, 2, -np.inf], "score is -inf in row 2"),
        ([0, 0.5, 1], [1, 2, 3], "label has the value 0.5"),
        ([[0, 1]], [[1, 2]], r"label has the shape \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=sentence):
            measure(label, score)


def test_a_negative_buffer_is_refused() -> None:
    with pytest.raises(ValueError, match="buffer is -1 rows"):
        vus_pr([0, 1], [1, 2], -1)


@pytest.mark.parametrize(
    ("mask", "events"),
    [("", []), ("..", []), ("##", [(0, 2)]), ("#..##.#", [(0, 1), (3, 5), (6, 7)]), (".#.", [(1, 2)])],
)
def test_events_are_the_runs(mask: str, events: list[tuple[int, int]]) -> None:
    """Half-open, also at either end."""
    assert events_of(rows(mask)) == events


def test_events_closer_than_the_gap_are_joined() -> None:
    """Rows between them count, so a gap of 0 leaves those that touch apart; order and overlap do not matter."""
    events = [(0, 2), (4, 6), (9, 10)]
    assert [len(merged(events, gap)) for gap in (0, 2, 3, 4)] == [3, 3, 2, 1]
    assert merged([(9, 10), (0, 5), (1, 3), (4, 6)], 0) == [(0, 6), (9, 10)]
    assert merged([(0, 2), (2, 4)], 0) == [(0, 2), (2, 4)]
    assert merged([(0, 2), (2, 4)], 1) == [(0, 4)]
    assert merged([], 5) == []


def rows(drawn: str) -> Array:
    """`#` is True."""
    return np.array([mark == "#" for mark in drawn], bool)


@pytest.mark.parametrize(
    ("labels", "alarms", "tolerance", "expected"),
    [
        # two of three found, one alarm outside, and two alarms in one event are two true alarms
        (".###..###..##.", "..#...#.#.#...", 0, Judged(3, 2, 4, 3, [1, 0])),
        # an alarm that began before an event has found it at its first row
        ("...###...", "..##.....", 0, Judged(1, 1, 1, 1, [0])),
        # one alarm over two events finds both, and is one alarm
        (".##..##.", ".######.", 0, Judged(2, 2, 1, 1, [0, 0])),
        # half-open: the rows that touch an event are outside of it …
        ("..##..", ".#..#.", 0, Judged(1, 0, 2, 0, [])),
        # … and true with a tolerance, though the event is still not found
        ("..##..", ".#..#.", 1, Judged(1, 0, 2, 2, [])),
        ("..##....", "......#.", 2, Judged(1, 0, 1, 0, [])),
        ("##....##", "..#..#..", 5, Judged(2, 0, 2, 2, [])),
        ("......", ".#..#.", 3, Judged(0, 0, 2, 0, [])),
        (".##...", "......", 0, Judged(1, 0, 0, 0, [])),
    ],
)
def test_judged_by_hand(labels: str, alarms: str, tolerance: int, expected: Judged) -> None:
    """Counted by eye."""
    assert judged(rows(alarms), rows(labels), tolerance) == expected


def test_precision_recall_and_f1() -> None:
    """Of 3 events 2 are found, of 4 alarms 3 are true: their harmonic mean is 12/17."""
    told = Judged(events=3, found=2, alarms=4, true_alarms=3, delays=[1, 0])
    assert (told.precision, told.recall, told.outside) == (3 / 4, 2 / 3, 1)
    assert told.f1 == pytest.approx(12 / 17)


def test_what_cannot_be_told_is_none() -> None:
    """No alarm says nothing of precision, no label nothing of recall; yet to find none of the events is an F1 of 0."""
    silent, unlabelled, nothing = Judged(2, 0, 0, 0, []), Judged(0, 0, 3, 0, []), Judged(0, 0, 0, 0, [])
    assert (silent.precision, silent.recall, silent.f1) == (None, 0.0, 0.0)
    assert (unlabelled.precision, unlabelled.recall, unlabelled.f1) == (0.0, None, None)
    assert (nothing.precision, nothing.recall, nothing.f1) == (None, None, None)


def test_a_long_event_counts_once() -> None:
    """Random alarms that touch one long event have a low precision, where point-adjusting would give an F1 of 0.99."""
    label, _ = case(11, 10_000, [(2000, 7000)])
    told = judged(np.random.default_rng(0).random(10_000) < 0.01, label)
    assert told.recall == 1.0
    assert told.precision == pytest.approx(0.5, abs=0.1)


def test_alarms_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="alarms have 3 rows and labels 2"):
        judged([0, 1, 0], [0, 1])
    with pytest.raises(ValueError, match="tolerance is -1 rows"):
        judged([0, 1], [0, 1], -1)
    with pytest.raises(ValueError, match=r"alarms has the value 0\.7"):
        judged([0.7, 1], [0, 1])


def test_alarms_per_week() -> None:
    """A week of minutes has 10,080 rows."""
    assert alarms_per_week(7, 10_080, 60) == 7.0
    assert alarms_per_week(0, 5, 1.0) == 0.0
    for outside, period in ((0, 60.0), (10, 0.0), (10, math.nan)):
        with pytest.raises(ValueError, match="outside of labels"):
            alarms_per_week(1, outside, period)


def test_the_interval_is_that_of_theory() -> None:
    """Of 400 normal differences: the mean ± 1.96 standard errors, narrower for a lower level, the same by seed."""
    differences = np.random.default_rng(0).normal(0.3, 1.0, 400)
    error = differences.std() / np.sqrt(400)
    low, high = paired_interval(differences)
    assert (low, high) == pytest.approx(
        (differences.mean() - 1.96 * error, differences.mean() + 1.96 * error), abs=0.01
    )
    half = paired_interval(differences, level=0.5)
    assert low < half[0] < differences.mean() < half[1] < high
    assert paired_interval(differences) == (low, high) != paired_interval(differences, seed=1)


def test_a_shift_of_all_differences_shifts_the_interval() -> None:
    """And a change of their sign turns it around."""
    differences = np.array([0.1, -0.2, 0.4, 0.3])
    low, high = paired_interval(differences)
    assert paired_interval(differences + 1) == pytest.approx((low + 1, high + 1))
    assert paired_interval(-differences) == pytest.approx((-high, -low))


def test_an_interval_of_nothing_is_refused() -> None:
    for differences in ([], [0.5], [0.5, np.nan], [[0.1, 0.2]]):
        with pytest.raises(ValueError, match="differences are"):
            paired_interval(differences)
    for level, draws in ((0.0, 10), (1.0, 10), (0.9, 0)):
        with pytest.raises(ValueError, match="level is"):
            paired_interval([0.1, 0.2], level, draws)
