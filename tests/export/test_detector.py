"""Detectors of every kind against their twin in numpy, and against readings that no sensor should give."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import helper

from statestep.export.compose import Ports, composed_sequence
from statestep.export.detector import COMBINES, RULES, Detector, Forecasts
from statestep.export.histories import stepped
from statestep.export.surgery import session
from statestep.runtime import NO_TIME, Engine

from ..models import graph
from . import twin
from .detectors import WARM, Array, detector, forecaster, own_units, run_alone, step_model, story

STEPS, STREAMS = 160, 3
COLUMNS = {  # width, and the columns that are forecast
    "all": (9, None),
    "some": (6, (2, 0, 5)),
    "permuted": (5, (4, 2, 0, 1, 3)),
    "one": (1, None),
}
EVIDENCE = {"all": ("others", "range", "stuck"), "error": ()}
# Rounding: logarithms of small numbers are as exact as 1 is, and a tail's scale divides what is left of them.
TOLERANCES = {"score": 1e-3, "severity": 1e-3, "contribution": 1e-3}


def made(columns: str, evidence: tuple[str, ...], **settings: Any) -> Detector:
    width, targets = COLUMNS[columns]
    return detector(width=width, targets=targets, evidence=evidence, **settings)


def holed(x: Array, seed: int = 1) -> Array:
    """x [T, B, F] with one reading in twenty missing, and three whole rows."""
    holes = np.asarray(np.random.default_rng(seed).random(x.shape)) < 0.05
    holes[100:103, 0] = True
    return np.asarray(np.where(holes, np.float32(np.nan), x))


def same(given: dict[str, Array], told: twin.Told) -> None:
    """Equal within rounding, and to the bit in what is no number, wherever no comparison was close."""
    assert told.sure.mean() > 0.8, "the twin is to be sure of nearly all"
    for role, value in given.items():
        mask = told.ranked if role == "score" else told.sure  # [T, B]
        mask = np.broadcast_to(mask.reshape(*mask.shape, *[1] * (value.ndim - 2)), value.shape)
        if role == "reason":
            mask = mask & told.reasoned
        ours, theirs = value[mask], told.outputs[role][mask]
        if value.dtype.kind == "f":
            tolerance = TOLERANCES.get(role, 1e-5)
            np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance, err_msg=role)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=role)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("per_stream", [False, True], ids=["pooled", "per-stream"])
@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("rule", RULES)
def test_every_output_is_the_twins(rule: str, combine: str, per_stream: bool, evidence: str, columns: str) -> None:
    """Over spikes, stuck stretches, other levels, calm and holes; in each cell events begin and end."""
    d = made(columns, EVIDENCE[evidence], rule=rule, combine=combine, per_stream=per_stream)
    x, prediction = story(d, STEPS, STREAMS, std=d.std, seed=4)
    units = own_units(x) if per_stream else ()
    x = holed(x)
    given = run_alone(d, x, prediction, *units)
    assert list(given) == [role for role, _, _ in d.outputs]
    same(given, twin.run(d, x, prediction, *units))
    assert (given["event"] == 1).any() and (given["event"] < 0).any()


@pytest.mark.parametrize("kind", EVIDENCE["all"])
def test_each_kind_of_evidence_speaks_alone(kind: str) -> None:
    """With one kind beside the error the outputs are the twin's, and it is the reason where it should be."""
    d = made("some", (kind,))
    x, prediction = story(d, STEPS, STREAMS, std=d.std, seed=4)
    x[60:80, :, 5] = x[60, :, 5] if kind == "stuck" else d.mean[5] + d.std[5] * np.float32(40)
    d = replace(d, still=np.full(6, 4.0)) if kind == "stuck" else d
    prediction[59:79, :, 2] = x[60:80, :, 5]  # it is expected
    given = run_alone(d, x, prediction)
    same(given, twin.run(d, x, prediction))
    assert d.evidence == ("error", kind)
    assert (given["reason"][70:79, :, 5] == 1).all() and set(given["reason"].ravel()) == {0, 1}


@pytest.mark.parametrize("every", [None, 7, 5_000_000])
@pytest.mark.parametrize("columns", ["all", "one"])
def test_behind_a_forecaster_every_output_is_the_twins(columns: str, every: int | None) -> None:
    """Stepped by the engine with event times, forecasts of a recurrence stand in for what is missing."""
    d = made(columns, EVIDENCE["all"], rule="likelihood", every=every)
    x, _ = story(d, STEPS, STREAMS, std=d.std, seed=4)
    x, times = holed(x), 1_000 + 300 * np.arange(STEPS)[:, None] + np.arange(STREAMS)  # [T, B]
    engine, keys, rows = Engine(step_model(d)), [b"a", b"b", b"c"], []
    for row, time in zip(x, times, strict=True):
        rows.append(engine.advance(keys, row, time).outputs)
    given = {role: np.stack([row[role] for row in rows]) for role, _, _ in d.outputs}
    held = np.zeros((STREAMS, d.width), np.float32)

    def recurrence(stream: int, row: Array) -> Array:
        held[stream] = np.float32(0.5) * (held[stream] + row.astype(np.float32))
        return np.array(held[stream][list(d.targets)])

    same(given, twin.run(d, x, recurrence, times=times))
    assert (given["since"] > 1_000).any() and (given["since"][given["event"] == 0] == NO_TIME).all()


def test_without_a_detector_a_model_tells_what_it_expected() -> None:
    """The mean before there is a forecast, then the forecast that was made a timestep before."""
    known = Forecasts(features=("a", "b"), targets=(1,), mean=np.array([3.0, -2.0]))
    x = np.array([[[1, 2]], [[np.nan, np.nan]], [[5, np.nan]]], np.float32)  # [T, B, F]
    given = stepped(step_model(known), x)
    assert given["expected"][:, 0, 0].tolist() == [-2.0, 1.0, 1.0]  # h is 1, then (1 + 1) / 2, then again
    assert list(given) == ["prediction", "expected"]


def test_a_sequence_graph_may_have_inner_tensors_of_an_outputs_name() -> None:
    """A node's, or a weight's: the detector's outputs have the names that the step form gave them."""
    d, sizes = detector(width=2), ["T", "B", 2]
    nodes = [
        helper.make_node("Add", ["x", "score"], ["event"]),
        helper.make_node("Identity", ["event"], ["prediction"]),
    ]
    whole = graph(
        nodes, {"x": ("float32", sizes)}, {"prediction": ("float32", sizes)}, {"score": np.ones(2, np.float32)}
    )
    names = {role: role for role, _, _ in d.outputs}
    x, _ = story(d, STEPS, STREAMS)
    run = session(composed_sequence(whole, d, Ports(), names)).run(["prediction", *names], {"x": x})
    assert (run[0] == x + 1).all()
    alone = run_alone(d, x, x + 1)
    assert all((found == alone[name]).all() for name, found in zip(names, run[1:], strict=True))


def test_what_has_warmed_is_judged_and_not_before() -> None:
    """Until `warm` timesteps have been seen there is no score and no anomaly; from the next on there are both."""
    d = detector(combine="max", warm=WARM)
    x = np.full((WARM + 3, 2, 3), 1e4, np.float32)  # far from all forecasts
    given = run_alone(d, x, np.zeros_like(x))
    assert (given["score"][:WARM] == 0).all() and not given["anomaly"][:WARM].any()
    assert (given["score"][WARM:] > 1).all() and given["anomaly"][WARM:].all()
    assert (given["status"] == (np.arange(WARM + 3) >= WARM)[:, None]).all()


def absurd(width: int, level: float) -> dict[str, Array]:
    """Readings [T, B, F] that no sensor should give."""
    rng, steps = np.random.default_rng(3), 90
    drawn = rng.uniform(-level, level, (steps, 2, width))
    alone = np.where(np.arange(steps)[:, None, None] % 30 == 20, level, 0.0) * np.ones((1, 2, width))
    return {
        "drawn": drawn,
        "from end to end": np.where(np.arange(steps)[:, None, None] % 2, level, -level) * np.ones((1, 2, width)),
        "one now and then": alone,
        "constant": np.full((steps, 2, width), level),
        "missing": np.where(rng.uniform(size=(steps, 2, 1)) < 0.6, np.nan, drawn),  # whole rows, the first too
    }


def finite(outputs: dict[str, Array], what: str) -> None:
    for role, value in outputs.items():
        assert np.isfinite(value).all(), f"{role} of {what}"


@pytest.mark.parametrize("per_stream", [False, True], ids=["pooled", "per-stream"])
@pytest.mark.parametrize("level", [0.0, 1e-38, 1e-9, 1e9, 3e38])
@pytest.mark.parametrize("rule", RULES)
def test_finite_readings_give_finite_numbers(rule: str, level: float, per_stream: bool) -> None:
    """However small, large or constant they are, to a detector in common units and to one that was made for them."""
    usual = detector(rule, "top", width=5, per_stream=per_stream)
    scale = np.float32(min(max(level, 1e-30), 1e30))
    for d in (usual, replace(usual, mean=usual.mean * scale, std=usual.std * scale)):
        for what, x in absurd(5, level).items():
            x = x.astype(np.float32)
            prediction = np.nan_to_num(np.random.default_rng(1).permuted(x, axis=0))
            units = own_units(np.clip(np.nan_to_num(x), -1e18, 1e18)) if per_stream else ()
            finite(run_alone(d, x, prediction, *units), f"{what} at {level:g}")


@pytest.mark.parametrize("rule", RULES)
def test_five_hundred_features_give_finite_numbers(rule: str) -> None:
    """And shares that sum up to one wherever there is a score."""
    d = detector(rule, "top", width=500)
    x, prediction = story(d, 60, 2, std=d.std)
    given = run_alone(d, x, prediction)
    finite(given, "500 features")
    np.testing.assert_allclose(given["contribution"].sum(axis=-1)[WARM:], 1.0, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_a_stepped_state_is_finite_too(rule: str) -> None:
    """The engine turns no row away: neither outputs nor states are anything but numbers."""
    d = detector(rule, width=5)
    for what, x in absurd(5, 3e37).items():
        engine = Engine(step_model(d))
        for row in x.astype(np.float32):
            assert not engine.advance([b"a", b"b"], row).rejected.any(), what


def test_the_forecaster_of_these_tests_is_what_it_says() -> None:
    """h ← keep · (h + x): after a 1 and nothing more, h falls by half each timestep."""
    assert forecaster(1, (0,)).graph.node[0].op_type == "Add"
    d = detector(width=1, evidence=())
    x = np.zeros((4, 1, 1), np.float32)
    x[0] = 1
    assert stepped(step_model(d), x)["prediction"][:, 0, 0].tolist() == [0.5, 0.25, 0.125, 0.0625]
    assert math.isclose(float(d.threshold), 1.3)
