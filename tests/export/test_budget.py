"""How many false alarms are acceptable: what is read, and the thresholds that give so many of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from statestep.export import DataError, ExportError
from statestep.export.budget import QUANTILE, Budget, budget_of, threshold_for
from statestep.export.measures import events_of, merged

from .models import Array

NONSENSE = ["", "often", "1", "0", "1.5", "-0.5", "nan", "inf", "0/week", "-1/week", "1/fortnight", "1/WEEK", "1/5000"]
NONSENSE += ["0/100 rows", "1/week/day", "1.2.3/week", "./week", "1..5/500 rows"]
SCALE = 2.0
NOISE: dict[str, tuple[Callable[[np.random.Generator, int], Array], Callable[[float], float]]] = {
    # Scores without an anomaly, and the one that is reached once in so many rows.
    "exponential": (lambda rng, n: 1 + SCALE * rng.exponential(size=n), lambda every: 1 + SCALE * math.log(every)),
    "gumbel": (lambda rng, n: rng.gumbel(3, SCALE, n), lambda every: 3 - SCALE * math.log(-math.log(1 - 1 / every))),
}


@pytest.mark.parametrize(
    ("text", "every"),
    [
        ("1/week", 2016),
        (" 2 / weeks ", 1008),
        ("1/day", 288),
        ("0.5/day", 576),
        ("12/hours", None),
        ("6/hours", 2),
        ("1/month", 8766),
        ("1/year", 105_190),
        ("1/5000 rows", 5000),
        ("4/1000rows", 250),
        ("1/2 row", 2),
    ],
)
def test_a_number_of_alarms_in_a_time(text: str, every: int | None) -> None:
    """In timesteps of five minutes; more than one alarm in two timesteps is refused."""
    if every is None:
        with pytest.raises(ExportError, match=r"false alarms are '12/hours', which is one in 1 timesteps: allow fewer"):
            budget_of(text, 300.0)
        return
    assert budget_of(text, 300.0) == Budget(every)


def test_a_quantile_and_a_number_of_rows_need_no_period() -> None:
    """And a time needs one: who has none is told what else can be said."""
    assert budget_of("0.9999", None) == Budget(None, 0.9999)
    assert budget_of("1/300 rows", None) == Budget(300)
    assert Budget() == Budget(None, QUANTILE)
    with pytest.raises(ExportError, match=r"'1/week', and nobody said how long a timestep is.* a quantile \(0.999\)"):
        budget_of("1/week", None)


@pytest.mark.parametrize("text", NONSENSE)
def test_what_is_no_budget_is_refused_in_a_sentence(text: str) -> None:
    """With what was said, and what could be."""
    with pytest.raises(ExportError, match=r"must be a number of them in a time") as caught:
        budget_of(text, 300.0)
    assert repr(text) in str(caught.value) and "\n" not in str(caught.value)
    assert not isinstance(caught.value, DataError)


def test_without_a_number_the_threshold_is_a_quantile() -> None:
    """Of the scores of all streams together."""
    scores = [np.arange(0, 600, dtype=float), np.arange(600, 1001, dtype=float)]
    tail = threshold_for(scores, Budget(quantile=0.9), calm=5)
    assert (tail.threshold, tail.counted) == (900.0, True)


def events(scores: list[Array], level: float, calm: int) -> int:
    """How many there are over a level."""
    return sum(len(merged(events_of(each > level), calm)) for each in scores)


@pytest.mark.parametrize("calm", [1, 5, 20])
@pytest.mark.parametrize("kind", NOISE)
def test_a_counted_threshold_keeps_the_budget_and_no_lower_one_does(kind: str, calm: int) -> None:
    """On the scores that it was taken from: at the next level below there are more events than were asked for."""
    draw, _ = NOISE[kind]
    rng = np.random.default_rng(5)
    scores = [draw(rng, 4000) for _ in range(3)]
    tail = threshold_for(scores, Budget(every=600), calm)
    assert tail.counted and events(scores, tail.threshold, calm) <= 20
    below = np.quantile(np.concatenate(scores), (np.concatenate(scores) < tail.threshold).mean() - 0.0006)
    assert events(scores, float(below), calm) > 20


def test_what_follows_within_the_calm_is_the_same_event() -> None:
    """Bursts of three count once where the calm is longer than the gaps in them, thrice where it is not."""
    rng = np.random.default_rng(0)
    scores, heights = np.zeros(6000), 10 + rng.uniform(size=60)
    for burst, height in enumerate(heights):
        scores[100 * burst + np.array([0, 3, 6])] = height
    once, thrice = (threshold_for([scores], Budget(every=100), calm).threshold for calm in (5, 2))
    assert once < heights.min() and events([scores], once, 5) == 60
    assert np.quantile(heights, 0.6) < thrice and events([scores], thrice, 2) <= 60


@pytest.mark.parametrize("every", [500, 20_000])
@pytest.mark.parametrize("kind", NOISE)
def test_a_threshold_is_the_one_that_is_known(kind: str, every: int) -> None:
    """On 8000 rows of noise whose tail is known, counted and, from less than five events on, fitted: on average over
    drawings it is where it should be, within four standard errors."""
    draw, known = NOISE[kind]
    found, counted = [], set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        tail = threshold_for([draw(rng, 2000) for _ in range(4)], Budget(every), calm=1)
        found.append(tail.threshold)
        counted.add(tail.counted)
    assert counted == {every <= 1600}
    error = np.std(found) / math.sqrt(len(found))
    assert abs(np.mean(found) - known(every)) < 4 * error
    assert error < 0.3 * SCALE  # or this would say little


def test_new_noise_gives_about_as_many_events_as_were_asked_for() -> None:
    """A budget of one in 2000 rows, fitted to 4 × 2000: in 400,000 new rows of each of ten drawings about 200."""
    draw, _ = NOISE["exponential"]
    counts = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        tail = threshold_for([draw(rng, 2000) for _ in range(4)], Budget(2000), calm=10)
        assert not tail.counted and tail.scale == pytest.approx(SCALE, rel=0.6) and tail.over < tail.threshold
        counts.append(events([draw(rng, 400_000)], tail.threshold, 10))
    assert 100 < np.median(counts) < 300


@pytest.mark.parametrize("scores", [np.zeros(50), np.full(2, 7.5), np.array([3.0]), np.arange(40.0)])
def test_few_or_equal_scores_give_a_threshold_that_none_of_them_reaches(scores: Array) -> None:
    """Where nothing is known of a tail it is taken for a thin one."""
    tail = threshold_for([scores], Budget(every=10_000), calm=10)
    assert math.isfinite(tail.threshold) and tail.threshold > scores.max() - 1e-9 and not tail.counted
