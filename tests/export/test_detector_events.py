"""What a detector remembers: where an event begins and ends, how its threshold moves, and what dies away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from statestep.export.detector import RULES, Detector
from statestep.export.rules import GAIN, HIGHEST, LOWEST
from statestep.runtime import NO_TIME, Engine

from .detectors import Array, detector, run_alone, step_model

EDGE = 2.0  # a reading further from 0 is over the threshold
BASE = math.log(1 + EDGE**2)
NONE = int(NO_TIME)


def by_hand(**changes: Any) -> Detector:
    """One sensor about 0 that is forecast as 0; the score is log(1 + x²), without a memory."""
    one, zero = np.ones(1), np.zeros(1)
    settings: dict[str, Any] = {"mean": zero, "std": one, "spread": one, "usual_low": -3 * one, "usual_high": 3 * one}
    settings |= {"alpha": 1.0, "threshold": BASE, "every": None, "calm": 3, "warm": 2, "usual_score": math.inf}
    return detector(width=1, evidence=(), **settings | changes)


def told(d: Detector, x: Sequence[float], times: Sequence[int] | None = None) -> dict[str, Any]:
    """One stream through the engine: every output, [T]."""
    engine = Engine(step_model(d, keep=0.0))
    stamps = None if times is None else np.array(times)
    given = engine.advance([b"a"] * len(x), np.array(x, np.float32)[:, None], stamps)
    return {name: value.reshape(len(x)) for name, value in given.outputs.items()}


def test_an_event_from_its_begin_to_its_end() -> None:
    """It begins over the threshold, goes on through shorter calm, and its third calm timestep is its last."""
    #     warming | calm|        an event             | calm | another
    x = [9.0, 9.0, 1.0, 3.0, 1.0, 1.0, 3.0, -4.0, 1.0, 1.0, 1.0, 1.0, 3.0]
    given = told(by_hand(), x, times=[100 + 10 * t for t in range(13)])
    assert given["anomaly"].tolist() == [False] * 3 + [True, False, False, True, True] + [False] * 4 + [True]
    assert given["event"].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 7, -8, 0, 1]
    assert given["since"].tolist() == [NONE] * 3 + [130] * 8 + [NONE, 220]
    three, four = math.log(10) / BASE, math.log(17) / BASE
    np.testing.assert_allclose(given["severity"], [0] * 3 + [three] * 4 + [four] * 4 + [0, three], rtol=1e-6)
    np.testing.assert_allclose(given["score"][2:], np.log1p(np.square(x[2:])), rtol=1e-6)
    assert given["status"].tolist() == [0, 0] + [1] * 11


def test_without_times_an_event_began_at_no_time() -> None:
    """It is an event all the same."""
    given = told(by_hand(), [0, 0, 3, 3])
    assert given["event"].tolist() == [0, 0, 1, 2] and given["since"].tolist() == [NONE] * 4


@pytest.mark.parametrize("calm", [1, 2, 7])
def test_an_event_ends_after_exactly_so_much_calm(calm: int) -> None:
    """One calm timestep fewer, and it goes on."""
    d = by_hand(calm=calm)
    given = told(d, [0, 0, 3] + [0] * (calm - 1) + [3] + [0] * calm + [0, 3])
    assert given["event"].tolist() == [0, 0, *range(1, 2 * calm + 1), -(2 * calm + 1), 0, 1]


def test_a_missing_reading_leaves_an_event_as_it_is() -> None:
    """It says nothing: the score stays, and the event with it, be it over the threshold or in its calm."""
    given = told(by_hand(), [0, 0, 3, math.nan, math.nan, 0, math.nan, 0, 0])
    assert given["event"].tolist() == [0, 0, 1, 2, 3, 4, 5, 6, -7]
    assert (given["score"][3:5] == given["score"][2]).all() and given["expected"].tolist() == [0] * 9


def test_a_timestep_without_any_reading_is_neither_calm_nor_time_without_an_event() -> None:
    """An event goes on through them, however short the calm that ends it, and the threshold waits."""
    d = by_hand(calm=1, alpha=0.5, every=10)
    x = [0.0, 0.0, 0.0, 9.0, *[math.nan] * 30, 0.0, 0.0]
    given = told(d, x)
    assert given["event"][3:34].tolist() == list(range(1, 32))
    assert len(set(given["threshold"][4:35].tolist())) == 1
    assert given["threshold"][35] < given["threshold"][34]


def test_it_drifts_where_more_than_half_of_late_timesteps_are_odd() -> None:
    """Readings beyond the usual, each one in 500 of the share: it is over a half from the 347th on, until it falls."""
    d = by_hand(usual_low=np.full(1, -1.5), usual_high=np.full(1, 1.5))
    given = told(d, [1.7] * 350 + [0.0] * 10)
    share = [1 - 0.998**n for n in range(1, 351)]
    share += [share[-1] * 0.998**n for n in range(1, 11)]
    np.testing.assert_allclose(given["drift"], share, rtol=1e-4)
    assert given["status"].tolist() == [0, 0] + [1 + (now > 0.5) for now in share[2:]]
    assert given["status"][345:347].tolist() == [1, 2] and given["status"][-1] == 1
    assert not given["score_drift"].any()


def test_scores_drift_by_themselves() -> None:
    """A score above the calibration's tenth is odd, from when it is judged on, whatever the readings."""
    given = told(by_hand(usual_score=1.0), [1.9] * 360)
    assert not given["drift"].any() and not given["score_drift"][:2].any()
    np.testing.assert_allclose(given["score_drift"][2:], 1 - 0.998 ** np.arange(1, 359), rtol=1e-4)
    assert given["status"].tolist() == [0, 0] + [1] * 346 + [2] * 12


def test_an_event_raises_the_threshold_and_as_much_time_as_was_asked_for_lowers_it() -> None:
    """By a twentieth of the calibrated one; an event every ten timesteps keeps it where it is, to the bit."""
    every = 10
    steady = told(by_hand(every=every), ([0, 0, 9] + [0] * 9) + ([9] + [0] * 9) * 3)["threshold"]
    assert (steady[2::10] == steady[0]).all() and steady[0] == np.float32(BASE)
    x = [0, 0, 9] + [0] * 20
    given = told(by_hand(every=every), x)["threshold"] / BASE
    ticks = np.array([0, 0, 0, *range(9, -11, -1)])  # from the third timestep on it is judged
    np.testing.assert_allclose(given, 1 + GAIN * ticks / every, rtol=1e-6)
    assert given[3] - given[2 + every + 1] == pytest.approx(GAIN, rel=1e-4)


def test_the_threshold_keeps_its_bounds() -> None:
    """Half of the calibrated one, however calm; four times, however many events. Both are left again."""
    d = by_hand(every=10)
    calm = told(d, [0.0] * 160 + [9.0, 0.0])["threshold"] / BASE
    assert calm.min() == pytest.approx(LOWEST) and calm[110:161] == pytest.approx(LOWEST)
    assert calm[161] == pytest.approx(LOWEST + 0.9 * GAIN)
    wild = told(d, [0, 0] + [1e4, 0, 0, 0] * 110 + [0.0] * 10)["threshold"] / BASE
    assert wild.max() == pytest.approx(HIGHEST) and wild[-11] > HIGHEST - GAIN
    assert wild[-1] < wild[-11] - 0.8 * GAIN


def test_a_threshold_that_was_not_asked_to_move_stays() -> None:
    """With a quantile in place of a number of alarms there is nothing to keep to."""
    assert set(told(by_hand(), [0, 0] + [9, 0, 0, 0] * 30)["threshold"].tolist()) == {np.float32(BASE)}


@pytest.mark.parametrize("targets", [(0,), (1, 0)], ids=["not forecast", "forecast"])
def test_a_sensor_rests_on_over_missing_readings(targets: tuple[int, ...]) -> None:
    """They are not counted, and what stands in for them is no move: the fifth reading without one is odd."""
    d = detector(
        width=2, targets=targets, evidence=("stuck",), spread=np.full(len(targets), 1e3), still=np.full(2, 4.0)
    )
    x = np.arange(20, dtype=np.float32).repeat(2).reshape(20, 1, 2)
    x[5:, :, 1] = 5  # and from here on it rests
    x[8:10, :, 1] = np.nan
    told = run_alone(d, x, np.full((20, 1, len(targets)), 5.5, np.float32))["reason"][:, 0]
    stuck = d.evidence.index("stuck")
    assert (told[:, 0] != stuck).all()
    assert [t for t in range(20) if told[t, 1] == stuck and t not in (8, 9)] == list(range(12, 20))


def denormal(value: Array) -> bool:
    """Whether any number is one of those below 1e-38, which processors are slow with."""
    return bool(((value != 0) & (np.abs(value) < np.finfo(np.float32).tiny)).any())


def dying(d: Detector, steps: int) -> dict[str, Array]:
    """All states after so many timesteps of nothing to say, from 1e-29; none of them may be denormal on the way."""
    model = step_model(d, keep=0.0)
    states = [state.initial_value()[None] for state in model.contract.states]
    states = [np.full_like(state, 1e-29) if state.dtype == np.float32 else state for state in states]
    names = [state.input for state in model.contract.states]
    for step in range(steps):
        _, states = model.step(np.zeros((1, d.width), np.float32), states)
        found = [n for n, state in zip(names, states, strict=True) if state.dtype == np.float32 and denormal(state)]
        assert not found, f"{found} after {step + 1}"
    return dict(zip(names, states, strict=True))


@pytest.mark.parametrize("per_stream", [False, True], ids=["pooled", "per-stream"])
@pytest.mark.parametrize("rule", RULES)
def test_what_dies_away_ends_at_nothing_and_is_never_denormal(rule: str, per_stream: bool) -> None:
    """What is smoothed and past scores end at 0; a stream's usual error is a unit, and stays above it."""
    past = np.full(8, 1e-29)
    d = detector(rule, evidence=("others",), per_stream=per_stream, window=8, past=past, mean=np.zeros(3))
    held = dying(d, 600)
    assert not held["error"].any() and not held["usual_apart"].any()
    assert rule == "plain" or not held["scores"][0, : 2 if rule == "likelihood" else None].any()
    assert not per_stream or (held["usual_error"] > 0).all()


def test_shares_of_drift_die_away() -> None:
    """They are slow: from 1e-29 to nothing it takes a thousand timesteps and some more."""
    assert not dying(by_hand(), 1200)["outside"].any()


def test_a_stream_that_rests_while_it_warms_is_judged_by_its_own_errors_later() -> None:
    """Forecast exactly at first, then moving: its unit grows to what its errors are, and the alarm ends."""
    d = detector(width=1, evidence=(), per_stream=True, window=64, warm=20, mean=np.zeros(1))
    rng = np.random.default_rng(0)
    x, prediction = np.full((1500, 1, 1), 20, np.float32), np.full((1500, 1, 1), 20, np.float32)
    x[40:] += rng.standard_normal((1460, 1, 1)).astype(np.float32)
    prediction[39:-1] = x[40:] + 0.5 * rng.standard_normal((1460, 1, 1)).astype(np.float32)
    given = run_alone(d, x, prediction, x - 20, np.ones_like(x))
    assert given["anomaly"][45:60].all()
    assert given["anomaly"][-500:].mean() < 0.2


def test_a_burst_of_errors_does_not_become_usual() -> None:
    """The unit of a stream widens slowly: what is far off soon after is an anomaly too, and calm is none."""
    d = detector(width=1, evidence=(), per_stream=True, window=64, warm=20, threshold=2.0, every=None)
    x = (0.5 * np.random.default_rng(1).standard_normal((400, 1, 1))).astype(np.float32)
    x[200:204] = 50
    x[290:292] = 8
    given = run_alone(d, x, np.zeros_like(x), x, np.ones_like(x))["anomaly"][:, 0]
    assert given[200:204].all() and given[291]
    assert not given[50:200].any() and not given[260:290].any() and not given[330:].any()
