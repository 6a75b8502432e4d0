"""Training: it beats the last value where there is something to learn, repeats itself, and takes any honest data."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from statestep.export import Budget, DataError, Epoch, ExportError, Fitted, Judging
from statestep.export.calibrate import WARM
from statestep.export.fit import fit
from statestep.export.forecaster import CELLS, Forecaster
from statestep.export.weights import reference_of

from . import twin
from .detectors import run_alone
from .models import Array, machine_temperature


def waves(rows: int, *, streams: int = 2, seed: int = 0, level: float = 20.0) -> dict[str, Array]:
    """Streams of two noisy sensors: a rhythm of 12 rows, and the same a quarter later."""
    rng = np.random.default_rng(seed)
    out = {}
    for stream in range(streams):
        t = np.arange(rows) + 5 * stream
        rhythm = np.stack([np.sin(2 * np.pi * t / 12), 3 * np.cos(2 * np.pi * t / 12)], axis=1)  # [T, 2]
        out[f"pump-{stream}"] = level + rhythm + 0.05 * rng.standard_normal((rows, 2))
    return out


def quick(streams: dict[str, Array], **settings: object) -> Fitted:
    """A fit of seconds: 8 units, a few epochs."""
    features = [f"s{k}" for k in range(next(iter(streams.values())).shape[1])]
    return fit(streams, features, **{"hidden": 8, "epochs": 4} | settings)  # type: ignore[arg-type]


def judged(fitted: Fitted, x: Array) -> dict[str, Array]:
    """What a fitted model and its detector make of x [T, B, F]: outputs by role, [T, B, …]."""
    given = reference_of(fitted.model)(x)
    units = (given["own_z"], given["own_std"]) if fitted.model.per_stream else ()
    judged: dict[str, Array] = run_alone(fitted.detector.detector, x, given["prediction"], *units)
    return given | judged


@pytest.mark.parametrize("cell", [*CELLS, "rnn-relu,lstm-projected,gru"])
def test_it_beats_the_last_value_on_a_rhythm(cell: str) -> None:
    """On a rhythm in noise every cell at least halves the last value's error, on every target."""
    fitted = quick(waves(600), cell=cell, hidden=16, epochs=15, learning_rate=0.02)
    assert fitted.errors.rmse < 0.5 * fitted.errors.last_value_rmse
    assert all(ours < 0.5 * last for ours, last in fitted.errors.by_target.values())
    assert fitted.errors.losing == []


def test_it_ends_no_worse_than_the_last_value_on_noise() -> None:
    """On a random walk there is nothing to learn, and the kept epoch is no worse than where training started."""
    walk = {"a": np.random.default_rng(2).standard_normal((400, 1)).cumsum(axis=0)}
    fitted = quick(walk, epochs=5, learning_rate=0.05)
    assert fitted.errors.rmse <= fitted.errors.last_value_rmse * (1 + 1e-6)


def test_a_training_that_streams_worse_than_it_was_judged_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state may grow over streams longer than the run-in of validation: then the last value is kept."""

    def flattering(network: Forecaster, *_: object) -> tuple[list[Epoch], int]:
        torch.nn.init.constant_(network.head.bias, 9.0)
        return [Epoch(1, 1, 0.5, 0.5, 0.5, 0.0)], 1

    monkeypatch.setattr("statestep.export.fit._train", flattering)
    fitted = fit(waves(300), ["a", "b"], hidden=4, epochs=1)
    assert fitted.best_epoch == 0
    assert fitted.errors.rmse == pytest.approx(fitted.errors.last_value_rmse, rel=1e-6)


def test_it_does_not_lose_on_the_machine_temperature() -> None:
    """On 600 rows of a slow real sensor it is no worse than the last value, its error 0.3 to 1.2 degrees."""
    fitted = quick({"machine": machine_temperature()}, hidden=16, epochs=20)
    ours, last = fitted.errors.by_target["s0"]
    assert ours <= last and 0.3 < ours < 1.2


def test_the_errors_are_those_of_the_streamed_model() -> None:
    """Reported errors equal those computed by hand from the model's own outputs over whole streams."""
    streams = waves(300, streams=1)
    fitted = quick(streams)
    x = streams["pump-0"].astype(np.float32)
    miss = x[240:] - reference_of(fitted.model)(x[:, None])["prediction"][239:-1, 0]  # the tail is a fifth of 300 rows
    change = x[240:] - x[239:-1]
    std = x[:240].astype(np.float64).std(axis=0)
    assert fitted.errors.rows == 60 and (fitted.rows_training, fitted.rows_validation) == (240, 60)
    assert fitted.errors.rmse == pytest.approx(math.sqrt(np.mean((miss / std) ** 2)), rel=1e-4)
    assert fitted.errors.last_value_rmse == pytest.approx(math.sqrt(np.mean((change / std) ** 2)), rel=1e-4)
    assert fitted.errors.by_target["s1"][0] == pytest.approx(
        math.sqrt(np.mean(miss[:, 1].astype(float) ** 2)), rel=1e-4
    )
    np.testing.assert_array_equal(fitted.example.seen, x[240:])
    np.testing.assert_allclose(fitted.example.expected, x[240:] - miss, rtol=1e-6)


@pytest.mark.parametrize("judging", [Judging(budget=Budget(quantile=0.98)), Judging(0.3, "max", "likelihood", False)])
def test_a_detector_is_measured_on_the_parts_that_it_should_be(judging: Judging) -> None:
    """Units, ranges and usual readings are those of the training part; the usual size of an error, and the threshold,
    which is a quantile of the twin's scores, are those of the validation tail."""
    streams = waves(400, streams=1)
    fitted = quick(streams, judging=judging)
    x, d = streams["pump-0"].astype(np.float32), fitted.detector.detector
    prediction = reference_of(fitted.model)(x[:, None])["prediction"]  # [T, 1, K]
    mean, std = (getattr(x[:320].astype(np.float64), name)(axis=0) for name in ("mean", "std"))
    np.testing.assert_allclose(d.mean, mean)
    np.testing.assert_allclose(d.std, std, rtol=5e-3)  # without the first row, which no forecast was made for
    spread = np.sqrt(np.mean(((x[320:] - prediction[319:-1, 0]) / d.std) ** 2, axis=0))
    np.testing.assert_allclose(d.spread, spread, rtol=1e-4)
    z = (x - mean) / d.std
    least, most = np.quantile(z[1:320], [0.005, 0.995], axis=0)
    numbers = {"low": z[1:].min(axis=0), "high": z[1:].max(axis=0), "usual_low": least, "usual_high": most}
    for name, value in numbers.items():
        np.testing.assert_allclose(getattr(d, name), value, rtol=1e-4)
    assert (d.others is None) == (not judging.others) and (d.alpha, d.combine) == (judging.alpha, judging.combine)
    scores = twin.run(replace(d, threshold=math.inf), x[:, None], prediction).outputs["score"][320:, 0]
    quantile = float(np.quantile(scores, judging.budget.quantile))
    assert d.threshold == pytest.approx(max(quantile, math.log(2.0) if d.rule == "plain" else 1.0), rel=1e-3)
    assert fitted.detector.rows == 80 and d.every is None


def test_one_seed_gives_one_model() -> None:
    """The same seed gives the same bits, dropout included; another seed others; the global generator is left alone."""
    streams = waves(200)
    states: list[dict[str, torch.Tensor]] = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        expected = torch.rand(2)
        torch.manual_seed(len(states))
        states.append(quick(streams, seed=seed, dropout=0.2, layers=2, epochs=2).model.state_dict())
        assert torch.equal(torch.rand(2), expected)
    one, twin, other = states
    assert all(torch.equal(one[name], twin[name]) for name in one)
    assert not torch.equal(one["network.rnn.weight_hh_l0"], other["network.rnn.weight_hh_l0"])


def test_training_stops_early_and_tells_of_every_epoch() -> None:
    """After `patience` epochs without a better error it stops; the kept epoch is the best of those told."""
    told: list[Epoch] = []
    walk = {"a": np.random.default_rng(2).standard_normal((300, 1)).cumsum(axis=0)}
    fitted = quick(walk, epochs=50, patience=3, learning_rate=0.05, on_epoch=told.append)
    assert list(fitted.history) == told and [epoch.number for epoch in told] == list(range(1, len(told) + 1))
    assert len(told) == fitted.best_epoch + 3 < 50
    if fitted.best_epoch:
        assert told[fitted.best_epoch - 1].validation_rmse == min(epoch.validation_rmse for epoch in told)


def test_rows_that_are_not_finite_are_left_out() -> None:
    """A stream with infinities trains as the stream without those rows, and they are counted."""
    whole = waves(200, streams=1)["pump-0"]
    holed = np.insert(whole, [50, 120], -np.inf, axis=0)
    holed[51, 1] = np.inf  # was row 50
    fitted, plain = quick({"a": holed}), quick({"a": np.delete(whole, 50, axis=0)})
    assert fitted.rows_left_out == 3
    assert torch.equal(
        fitted.model.state_dict()["network.head.weight"], plain.model.state_dict()["network.head.weight"]
    )


def test_missing_readings_are_neither_learnt_nor_judged() -> None:
    """A tenth of one sensor is NaN: no row is left out, and forecasts still halve the last value's error."""
    streams = waves(600)
    for seed, x in enumerate(streams.values()):
        x[np.random.default_rng(seed).random(len(x)) < 0.1, 1] = np.nan
    fitted = quick(streams, hidden=16, epochs=15, learning_rate=0.02)
    assert (fitted.rows_left_out, fitted.rows_training, fitted.rows_validation) == (0, 960, 240)
    assert all(ours < 0.5 * last for ours, last in fitted.errors.by_target.values())
    numbers = (
        getattr(fitted.detector.detector, name) for name in ("mean", "std", "spread", "low", "high", "threshold")
    )
    assert all(np.isfinite(value).all() for value in numbers)


def test_some_features_can_be_forecast_from_all() -> None:
    """Targets are named and forecast in their own order; ranges are those of the training part."""
    streams = waves(120, streams=1)
    fitted = quick(streams, targets=["s1"])
    assert fitted.model.target_names == ("s1",) and list(fitted.errors.by_target) == ["s1"]
    low, high = fitted.ranges["s0"]
    part = streams["pump-0"][:96, 0].astype(np.float32)
    assert (low, high) == (float(part.min()), float(part.max()))


@pytest.mark.parametrize("level", [1e-3, 1.0, 1e6])
def test_a_streams_own_scale_works_at_every_level(level: float) -> None:
    """Per stream, pumps of very different levels learn together, and stay finite from the first row on."""
    streams = {
        "small": 1e-3 * level * waves(400, streams=1)["pump-0"],
        "large": 1e3 * level * waves(400, streams=1, seed=1)["pump-0"],
    }
    fitted = quick(streams, scale="per-stream", hidden=16, epochs=12, learning_rate=0.02)
    assert fitted.errors.rmse < 0.7 * fitted.errors.last_value_rmse
    for x in streams.values():
        given = judged(fitted, x[:, None].astype(np.float32))
        assert all(np.isfinite(value).all() for value in given.values())
        assert (given["score"][:WARM] == 0).all() and (given["score"][WARM:] > 0).all()


def test_constant_features_give_a_model() -> None:
    """A sensor that never moves is forecast exactly, and a small move of it is an anomaly at once."""
    x = waves(300, streams=1)["pump-0"]
    x[:, 1] = 7.0
    fitted = quick({"a": x})
    assert fitted.errors.by_target["s1"][1] == 0
    moved = x[:, None].astype(np.float32)
    moved[250:, 0, 1] = 8.0
    assert bool(judged(fitted, moved)["anomaly"][250, 0])


def test_streams_of_any_length_train_together() -> None:
    """Three rows are enough to take part; one or two rows are left out and counted."""
    streams = {name: waves(rows, streams=1)["pump-0"] for name, rows in (("a", 1500), ("b", 3), ("c", 2), ("d", 1))}
    fitted = quick(streams, epochs=1)
    assert fitted.rows_left_out == 3 and fitted.rows_training + fitted.rows_validation == 1503


@pytest.mark.parametrize(
    ("streams", "settings", "words"),
    [
        ({"a": np.zeros((2, 1))}, {}, "none of the 1 streams has 3 rows"),
        ({"a": np.full((50, 1), np.nan)}, {}, "none of the 1 streams has 3 rows"),
        ({}, {}, "none of the 0 streams"),
        ({"a": np.zeros((50, 2))}, {}, r"stream 'a' has readings of shape \[50, 2\], 1 features need"),
        ({"a": np.zeros((20, 1))}, {"scale": "per-stream"}, "longest stream has 20 rows.*or use pooled scaling"),
        ({"a": np.zeros((50, 1))}, {"validation": 1.0}, "validation is 1.0"),
    ],
)
def test_data_that_cannot_be_fitted_gives_one_sentence(
    streams: dict[str, Array], settings: dict[str, object], words: str
) -> None:
    """Too little, nothing finite, another shape: each is named."""
    with pytest.raises(DataError, match=words) as caught:
        fit(streams, ["s0"], **settings)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cell": "transformer"}, "cell is 'transformer', it must be one of"),
        ({"scale": "none"}, "scale is 'none'"),
        ({"hidden": 0}, "hidden is 0"),
        ({"layers": 0}, "layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"targets": ["s7"]}, "target 's7' is not among the features"),
    ],
)
def test_settings_that_cannot_be_used_give_one_sentence(settings: dict[str, object], words: str) -> None:
    """The setting and its value are named."""
    with pytest.raises(ExportError, match=words):
        fit(waves(50), ["s0", "s1"], **settings)  # type: ignore[arg-type]
