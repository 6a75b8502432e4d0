"""Standardisation: constants, and each stream's own running statistics, against float64."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch

from statestep.export import PerStreamScaling, PooledScaling
from statestep.export.graph import sequence_graph, step_graph
from statestep.export.weights import reference_of

from . import reference
from .models import model, readings


def test_pooled_scaling_is_the_formula() -> None:
    """z = (x − mean) / std, the same for every stream."""
    scaling = PooledScaling(torch.tensor([10.0, -3.0]), torch.tensor([2.0, 0.5]))
    z = scaling.sequence(torch.tensor([[[14.0, -3.0], [8.0, -2.0]]])).z
    assert z.tolist() == [[[2.0, 0.0], [-1.0, 2.0]]]


@pytest.mark.parametrize(("level", "spread"), [(1e-3, 1e-6), (0.0, 1.0), (1e6, 1e3), (1e6, 2.0)])
def test_running_statistics_are_welfords_at_every_level(level: float, spread: float) -> None:
    """Mean and spread follow float64 past the memory and with a drift, even where float32 has three digits of noise."""
    noise = np.random.default_rng(3).standard_normal((3000, 1, 2))
    x = (level + spread * (noise + np.linspace(0, 5, 3000)[:, None, None])).astype(np.float32)  # [T, 1, F]
    scaled = PerStreamScaling(2, memory=500).sequence(torch.from_numpy(x))
    mean, variance = reference.running(x[:, 0].astype(np.float64), 500)
    std = np.sqrt(variance[5:])
    np.testing.assert_allclose(scaled.std[5:, 0].numpy(), std, rtol=1e-3)
    np.testing.assert_allclose(scaled.z[5:, 0].numpy(), (x[5:, 0] - mean[5:]) / std, atol=2e-3)


def test_the_first_row_is_the_mean() -> None:
    """A stream's first timestep has z = 0 exactly, whatever its level."""
    x = torch.tensor([[[1e-3, 1e6, 0.0, -7.0]]])
    assert PerStreamScaling(4).sequence(x).z.tolist() == [[[0.0, 0.0, 0.0, 0.0]]]


def test_a_stream_that_never_moves_stays_finite_and_then_is_far_out() -> None:
    """Constants have z = 0; the first movement after n of them is √n spreads out, not infinitely many."""
    x = torch.full((401, 1, 2), 5.0)
    x[:, :, 1] = 0.0
    x[400] = 6.0
    scaled = PerStreamScaling(2, memory=1000).sequence(x)
    assert (scaled.z[:400] == 0).all()
    np.testing.assert_allclose(scaled.z[400, 0].numpy(), 20.0, rtol=0.01)


def test_a_variance_decays_to_zero_and_not_to_denormals() -> None:
    """After one jump and a long rest the remembered variance is exactly 0, never a denormal number on the way."""
    scaling, x = PerStreamScaling(1, memory=4), torch.ones(600, 1, 1)
    x[0] = 0.0
    states = tuple(torch.zeros(1, 1) for _ in scaling.states)
    for row in x:
        _, states = scaling.step(row, states)
        assert states[3] == 0 or states[3] > 1e-37
    assert states[3] == 0


@pytest.mark.parametrize("scaling", [PooledScaling(torch.zeros(1), torch.full((1,), 1e-3)), PerStreamScaling(1)])
def test_absurd_readings_stay_finite(scaling: PooledScaling | PerStreamScaling) -> None:
    """Readings near the ends of float32 give finite numbers in every place."""
    x = torch.tensor([0.0, 3e38, -3e38, 1e-38, 1.0])[:, None, None]
    for tensor in scaling.sequence(x):
        assert torch.isfinite(tensor).all()


def test_a_sensor_that_is_off_is_divided_by_something_in_the_graph_too() -> None:
    """Exactly zero from its first timestep on: the exporter's optimizer must not take the floor for nothing.

    It takes a term of 1e-12 in a sum for zero, and 0/0 then gave a forecast of another feature that no check saw.
    """
    whole = model("lstm", scale="per-stream")
    x = readings(6, 3, seed=2)
    x[:3, 1, :2] = 0.0
    x[:, 2] = 0.0
    theirs = reference_of(whole)(x)
    session = ort.InferenceSession(sequence_graph(whole).SerializeToString(), providers=["CPUExecutionProvider"])
    ours = dict(zip(whole.outputs, session.run(list(whole.outputs), {"x": x}), strict=True))
    np.testing.assert_allclose(ours["prediction"], theirs["prediction"], rtol=1e-5, atol=1e-5)
    step = ort.InferenceSession(step_graph(whole).SerializeToString(), providers=["CPUExecutionProvider"])
    states = {s.input: v.numpy() for s, v in zip(whole.states, whole.initial_states(3), strict=True)}
    for t, row in enumerate(x):
        names = ["prediction", *(state.output for state in whole.states)]
        prediction, *after = step.run(names, {"x": row} | states)
        states = dict(zip(states, after, strict=True))
        np.testing.assert_allclose(prediction, theirs["prediction"][t], rtol=1e-5, atol=1e-5)
