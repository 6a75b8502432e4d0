"""What is measured for a detector: units, ranges, what the others say, how long a sensor may rest, the threshold."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from statestep.export import Budget, ExportError, Judging
from statestep.export.calibrate import LEAST_STILL, RIDGE, SPREAD_FLOOR, Calibrated, Past, calibrated
from statestep.export.detector import Detector, Forecasts
from statestep.export.rules import REACH
from statestep.export.series import block_of, blocks_of, series_of

from . import twin
from .detectors import Array, own_units, run_alone

NO_BUDGET = Budget(quantile=0.9)


def past(streams: dict[str, Array], prediction: Array | None = None, *, validation: float = 0.25) -> Past:
    """Streams (name → [T, F]) in one block, with forecasts [T, B, K], or the last value for one."""
    width = next(iter(streams.values())).shape[1]
    series, _ = series_of(streams, [f"s{column}" for column in range(width)], validation)
    block = block_of(series)
    return Past(block, block.x if prediction is None else prediction.astype(np.float32))


def measured(given: Past, *, targets: tuple[int, ...] | None = None, warm: int = 1, **how: Any) -> Calibrated:
    """A detector for it, about a mean of 0."""
    width = given.block.x.shape[-1]
    features = tuple(f"s{column}" for column in range(width))
    known = Forecasts(
        features=features, targets=tuple(range(width)) if targets is None else targets, mean=np.zeros(width)
    )
    return calibrated([given], known, Judging(**{"budget": NO_BUDGET} | how), warm=warm)


def mixed(rows: int, width: int, seed: int = 0) -> Array:
    """Readings [rows, F] that belong together, by two causes and some noise of their own."""
    rng = np.random.default_rng(seed)
    causes, weights = rng.standard_normal((rows, 2)), rng.standard_normal((2, width))
    return np.asarray(causes @ weights + 0.3 * rng.standard_normal((rows, width)))


def ridge(z: Array, column: int) -> Array:
    """The weights [F] of the others that say a column of z [rows, F] with the least error, and are small."""
    others = [other for other in range(z.shape[1]) if other != column]
    near = np.clip(z, -REACH, REACH)
    rows = np.concatenate([near[:, others], math.sqrt(RIDGE * len(z)) * np.eye(len(others))])
    wanted = np.concatenate([near[:, column], np.zeros(len(others))])
    weights = np.zeros(z.shape[1])
    weights[others] = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return weights


@pytest.mark.parametrize("width", [2, 5, 12])
def test_each_feature_is_said_by_the_others_as_a_ridge_regression_says_it(width: int) -> None:
    """All of them at once from one inverse, or one by one by least squares: the same weights, an own weight of 0."""
    x = mixed(400, width)
    x[7, 1] = 400  # further out than what tells of the others
    d = measured(past({"a": x})).detector
    z = x[1:300].astype(np.float32) / d.std  # the training part, but for its first row
    assert d.others is not None
    for column in range(width):
        np.testing.assert_allclose(d.others[:, column], ridge(z, column), atol=1e-6)
    assert (np.diag(d.others) == 0).all()


def test_two_features_that_are_one_say_each_other() -> None:
    """By 1 / (1 + ridge); a missing reading counts as a usual one, a 0. Of a lone feature they say its mean."""
    x = np.random.default_rng(0).standard_normal((400, 1)).repeat(2, axis=1)
    x -= x[1:300].mean(axis=0)
    d = measured(past({"a": x})).detector
    assert d.others is not None
    assert d.others[0, 1] == pytest.approx(1 / (1 + RIDGE), rel=1e-3) == pytest.approx(d.others[1, 0])
    holed = x.copy()
    holed[1:300:2, 0] = np.nan
    half = measured(past({"a": holed})).detector
    assert half.others is not None
    assert half.others[0, 1] == pytest.approx(0.5 / (0.5 + RIDGE), rel=0.1)
    assert half.others[1, 0] == pytest.approx(0.5 / (1 + RIDGE), rel=0.1)
    lone = measured(past({"a": x[:, :1]})).detector
    assert lone.others is not None and lone.others.tolist() == [[0.0]] and lone.evidence[1] == "level"
    assert d.evidence[1] == "others" and measured(past({"a": x[:, :1]}), others=False).detector.others is None
    assert measured(past({"a": x}), others=False).detector.others is None


@pytest.mark.parametrize("per_stream", [False, True], ids=["pooled", "per-stream"])
def test_evidence_is_one_on_average_where_it_was_measured(per_stream: bool) -> None:
    """Squared errors, and squared differences from what the others say, over the validation tails: usual is 1."""
    x = np.stack([mixed(1200, 4, seed=stream) for stream in range(3)], axis=1)  # [T, B, F]
    noise = 0.5 * np.random.default_rng(9).standard_normal((1200, 3, 4))
    given = past({str(stream): x[:, stream] for stream in range(3)}, np.concatenate([x[1:], x[-1:]]) + noise)
    z, std = own_units(given.block.x, memory=1200)
    units = (z, std) if per_stream else ()
    d = measured(replace(given, z=z, std=std) if per_stream else given, window=2000).detector
    plain = replace(d, low=None, high=None, still=None, alpha=1.0, threshold=math.inf)
    errors = replace(plain, others=None, others_spread=None)
    others = replace(plain, spread=np.full(4, 1e6))
    for detector in (errors, others):
        found = run_alone(detector, given.block.x, given.prediction, *units)
        logs = found["contribution"] * found["score"][..., None] * 4  # [T, B, F]
        squares = np.expm1(logs.astype(np.float64))[given.block.validation(1)]  # [rows, F]
        assert squares.mean(axis=0) == pytest.approx(1.0, rel=0.05 if not per_stream else 0.15)


def test_units_and_ranges_by_hand() -> None:
    """The training part gives units and what is usual, all rows the range, the tail the usual size of an error."""
    x = np.array([[9.0, 5], [1, 5], [-1, 5], [1, 5], [-1, 5], [1, 5], [4, 5], [-2, 5]])  # six for training
    d = measured(past({"a": x}, np.zeros((8, 1, 2))), others=False).detector
    assert d.std.tolist() == pytest.approx([math.sqrt(0.96), 5.0])  # a sensor that rests has its level for a unit
    assert d.spread.tolist() == pytest.approx([math.sqrt((16 + 4) / 2 / 0.96), 1.0])
    assert d.low is not None and d.high is not None and d.usual_low is not None and d.usual_high is not None
    assert [d.low[0], d.high[0]] == pytest.approx([-2 / d.std[0], 4 / d.std[0]])
    assert [d.usual_low[0], d.usual_high[0]] == pytest.approx([-1 / d.std[0], 1 / d.std[0]])
    assert (d.low[1], d.high[1]) == (1.0, 1.0)


def test_an_error_of_none_is_still_some() -> None:
    """A forecast that was exact on the tail is not held to less than a thousandth of the sensor's spread."""
    x = np.random.default_rng(0).standard_normal((200, 1))
    d = measured(past({"a": x}, np.concatenate([x[1:], x[-1:]])[:, None])).detector
    assert d.spread.tolist() == [SPREAD_FLOOR]


def test_missing_readings_are_not_measured() -> None:
    """The usual size of an error, the range and the unit are those of what was read."""
    x = np.random.default_rng(0).standard_normal((400, 2))
    holed = x.copy()
    holed[::5, 1] = np.nan
    d = measured(past({"a": holed}, np.zeros((400, 1, 2)))).detector
    read = np.isfinite(holed[:, 1])
    train, tail = read & (np.arange(400) >= 1) & (np.arange(400) < 300), read & (np.arange(400) >= 300)
    assert d.std[1] == pytest.approx(x[train, 1].std(), rel=1e-5)
    assert d.spread[1] * d.std[1] == pytest.approx(math.sqrt(np.square(x[tail, 1]).mean()), rel=1e-5)
    assert d.high is not None and d.high[1] == pytest.approx(x[read, 1].max() / d.std[1], rel=1e-5)


def test_how_long_a_sensor_may_rest_by_hand() -> None:
    """Twice the longest that it did, a dozen timesteps at least, and for ever where it rests as a rule."""
    x = np.random.default_rng(0).standard_normal((200, 4))
    x[50:61, 1] = 3.0  # ten timesteps without a change
    x[50:80, 2] = np.nan  # says nothing of whether it moves
    x[20:90, 3] = 3.0  # more than a quarter of the stream
    d = measured(past({"a": x, "b": x[:150, [0, 0, 0, 0]]})).detector
    assert d.still is not None
    assert d.still.tolist() == [LEAST_STILL, 20, LEAST_STILL, math.inf]


@pytest.mark.parametrize("rule", ["plain", "likelihood", "conformal"])
def test_the_threshold_is_a_quantile_of_the_tails_scores(rule: str) -> None:
    """Of the twin's, with nothing over it yet; the past that streams begin with is spread over the plain scores."""
    x = np.stack([mixed(400, 3, seed=stream) for stream in range(2)], axis=1)  # [T, B, F]
    given = past({"a": x[:, 0], "b": x[:, 1]}, 0.7 * x)
    found = measured(given, rule=rule, window=50, warm=7, combine="max")
    d = found.detector
    mask = given.block.validation(7)  # [T, B]

    def scores(of: Detector) -> Array:
        told = twin.run(replace(of, threshold=math.inf), given.block.x, given.prediction).outputs["score"]
        return np.concatenate([told[mask[:, stream], stream] for stream in range(2)])

    floor = math.log(2) if rule == "plain" else 1.0
    assert d.threshold == pytest.approx(max(np.quantile(scores(d), 0.9), floor), rel=1e-3)
    plain = scores(replace(d, rule="plain", past=None))
    assert d.past is not None
    np.testing.assert_allclose(np.sort(d.past), np.quantile(plain, (np.arange(50) + 0.5) / 50), rtol=1e-4)
    assert d.usual_score == pytest.approx(np.quantile(plain, 0.9), rel=1e-4)
    assert (found.rows, d.warm, d.calm) == (200, 7, round(1 / d.alpha))


def test_a_budget_in_timesteps_moves_the_threshold_and_is_told() -> None:
    """A quantile is told too, and no tail where events were counted; settings that cannot be are refused."""
    given = past({"a": mixed(2000, 3)})
    every = measured(given, budget=Budget(every=50))
    assert every.detector.every == 50 and every.told()["tail"] is None and every.told()["quantile"] is None
    rare = measured(given, budget=Budget(every=5000)).told()
    assert set(rare["tail"]) == {"over", "scale"} and rare["threshold"] > every.told()["threshold"]
    assert measured(given).told()["quantile"] == 0.9
    with pytest.raises(ExportError, match="alpha is 0, it must be above 0 and at most 1"):
        measured(given, alpha=0)


def test_blocks_of_unlike_lengths_are_measured_as_one() -> None:
    """A stream that is padded beside a longer one counts as it would by itself."""
    streams = {"long": mixed(900, 3), "short": mixed(500, 3, seed=1), "tiny": mixed(60, 3, seed=2)}
    series, _ = series_of(streams, ["s0", "s1", "s2"], 0.25)
    known = Forecasts(features=("s0", "s1", "s2"), targets=(0, 1, 2), mean=np.zeros(3))
    apart = [Past(block_of([one]), block_of([one]).x) for one in series]
    together = [Past(block, block.x) for block in blocks_of(series)]
    assert len(together) < len(apart)
    one, other = (calibrated(pasts, known, Judging(budget=NO_BUDGET)).detector for pasts in (apart, together))
    for name in ("std", "spread", "others", "others_spread", "low", "high", "still", "threshold"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5, err_msg=name)
