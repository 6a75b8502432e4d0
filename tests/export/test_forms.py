"""The two forms of a stream model in torch: against each other, and against the whole computation in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from statestep.export import Forecaster, ForecasterConfig, NoScaling, StreamModel
from statestep.export.forms import SequenceForm, StepForm
from statestep.export.weights import reference_of

from . import reference
from .models import ALPHA, FEATURES, MEAN, MEMORY, SPREAD, STD, THRESHOLD, WARM, Array, model, readings

TARGETS = [0, 2]


def stepped(stream_model: StreamModel, x: Array) -> dict[str, Array]:
    """x [T, B, F] through the step form in torch: outputs [T, B, …]."""
    form, states, rows = StepForm(stream_model).eval(), stream_model.initial_states(x.shape[1]), []
    with torch.no_grad():
        for row in torch.from_numpy(x):
            given = form(row, *states)
            rows.append(given[: len(stream_model.outputs)])
            states = given[len(stream_model.outputs) :]
    return {
        name: torch.stack(column).numpy()
        for name, column in zip(stream_model.outputs, zip(*rows, strict=True), strict=True)
    }


def in_numpy(stream_model: StreamModel, x: Array, *, cell: str, scale: str) -> dict[str, Array]:
    """One stream x [T, F] through everything, in float64: prediction, expected [T, K] and score [T]."""
    network = stream_model.network
    assert isinstance(network, Forecaster)
    mean, std = np.array(MEAN), np.array(STD)
    if scale == "per-stream":
        mean, variance = reference.running(x, MEMORY)
        std = np.maximum(np.sqrt(variance), 1e-6 * np.abs(mean) + 1e-12)
    hidden = reference.hidden_states(cell, reference.layers_of(network.rnn), (x - mean) / std)  # [T, H]
    head = network.head.weight.detach().double().numpy(), network.head.bias.detach().double().numpy()
    unit = np.broadcast_to(std, x.shape)[:, TARGETS]  # [T, K]
    prediction = x[:, TARGETS] + unit * (hidden @ head[0].T + head[1])
    expected = np.concatenate([np.zeros((1, 2)), prediction[:-1]])
    warm = 1 if scale == "pooled" else WARM
    score = reference.scores(x[:, TARGETS], expected, unit * np.array(SPREAD), warm=warm, alpha=ALPHA)
    return {"prediction": prediction, "expected": expected, "score": score}


@pytest.mark.parametrize("cell", list(reference.STEPS))
@pytest.mark.parametrize("scale", ["pooled", "per-stream"])
def test_both_forms_are_the_formulas(cell: str, scale: str) -> None:
    """Prediction, expected and score of every stream equal the float64 computation, in both forms."""
    made, x = model(cell, 2, scale=scale), readings(90, 3)
    for given in (stepped(made, x), reference_of(made)(x)):
        for stream in range(3):
            truth = in_numpy(made, x[:, stream].astype(np.float64), cell=cell, scale=scale)
            unit = np.array(STD)[TARGETS]
            for name in ("prediction", "expected"):
                np.testing.assert_allclose(given[name][:, stream] / unit, truth[name] / unit, atol=2e-4)
            np.testing.assert_allclose(given["score"][:, stream], truth["score"], rtol=1e-3, atol=1e-3)


def test_the_first_step_expects_nothing_and_scores_nothing() -> None:
    """At a stream's birth expected and score are 0 and there is no anomaly; one step later the score judges."""
    x = readings(2, 4)
    x[1] += 1e4  # far from any forecast
    given = stepped(model(), x)
    assert (given["expected"][0] == 0).all() and (given["score"][0] == 0).all() and not given["anomaly"][0].any()
    assert (given["score"][1] > THRESHOLD).all() and given["anomaly"][1].all()
    np.testing.assert_array_equal(given["expected"][1], given["prediction"][0])
    assert (given["threshold"] == np.float32(THRESHOLD)).all()


def test_a_streams_own_spread_must_be_known_before_it_is_judged() -> None:
    """With per-stream scaling the score stays 0 for the first WARM timesteps."""
    given = stepped(model(scale="per-stream"), readings(WARM + 5, 2))
    assert (given["score"][:WARM] == 0).all() and (given["score"][WARM:] > 0).all()


def test_the_score_decays_to_zero_and_not_to_denormals() -> None:
    """After one shock and thousands of perfect forecasts the smoothed error is exactly 0."""
    made = model()
    assert made.scoring is not None
    miss = torch.zeros(1200, 1, 2)
    miss[3] = 100.0
    scores = made.scoring.sequence(miss, torch.ones(2))[:, 0, 0]
    assert scores[3] > 1 and scores[900] == 0
    assert ((scores == 0) | (scores > 1e-37)).all()


def test_without_scoring_there_are_forecasts_only() -> None:
    """A model without data behind it says what it expects, and no more."""
    network = Forecaster(ForecasterConfig(3, (1,), hidden=4), seed=2)
    made = StreamModel(network, NoScaling(), None, features=FEATURES)
    assert made.outputs == ("prediction", "expected")
    assert [state.input for state in made.states] == ["h0", "c0", "forecast"]
    x = torch.from_numpy(readings(3, 2))
    prediction, expected = SequenceForm(made)(x)
    torch.testing.assert_close(expected[1:], prediction[:-1], atol=0, rtol=0)


def test_one_seed_is_one_model_and_leaves_the_global_generator_alone() -> None:
    """Seeds decide the weights; torch's own random numbers go on as if no forecaster had been made."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, twin, other = (model(seed=seed).state_dict() for seed in (4, 4, 5))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], twin[name]) for name in one)
    assert not torch.equal(one["network.head.weight"], other["network.head.weight"])
