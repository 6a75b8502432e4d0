"""The two forms of a stream model in torch: against each other, and against the whole computation in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from statestep.export import Forecaster, ForecasterConfig, NoScaling, StreamModel
from statestep.export.forms import StepForm
from statestep.export.weights import reference_of

from . import reference
from .models import FEATURES, MEAN, MEMORY, STD, Array, model, readings

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
    """One stream x [T, F] through everything, in float64: prediction [T, K], and its own z and std [T, F]."""
    network = stream_model.network
    assert isinstance(network, Forecaster)
    mean, std = np.array(MEAN), np.array(STD)
    if scale == "per-stream":
        mean, variance = reference.running(x, MEMORY)
        std = np.maximum(np.sqrt(variance), 1e-6 * np.abs(mean) + 1e-12)
    z = (x - mean) / std
    hidden = reference.hidden_states(cell, reference.layers_of(network.rnn), z)  # [T, H]
    head = network.head.weight.detach().double().numpy(), network.head.bias.detach().double().numpy()
    unit = np.broadcast_to(std, x.shape)[:, TARGETS]  # [T, K]
    prediction = x[:, TARGETS] + unit * (hidden @ head[0].T + head[1])
    return {"prediction": prediction} | ({"own_z": z, "own_std": std} if scale == "per-stream" else {})


@pytest.mark.parametrize("cell", list(reference.STEPS))
@pytest.mark.parametrize("scale", ["pooled", "per-stream"])
def test_both_forms_are_the_formulas(cell: str, scale: str) -> None:
    """Every output of every stream equals the float64 computation, in both forms."""
    made, x = model(cell, 2, scale=scale), readings(90, 3)
    units = {"prediction": np.array(STD)[TARGETS], "own_z": np.ones(3), "own_std": np.array(STD)}
    for given in (stepped(made, x), reference_of(made)(x)):
        for stream in range(3):
            truth = in_numpy(made, x[:, stream].astype(np.float64), cell=cell, scale=scale)
            assert list(given) == list(truth)
            for name, unit in units.items():
                if name in truth:
                    np.testing.assert_allclose(given[name][:, stream] / unit, truth[name] / unit, atol=2e-4)


def test_a_stream_model_forecasts_and_no_more() -> None:
    """What is expected, scored and judged is the detector's; a stream's own units are given to it."""
    made = StreamModel(Forecaster(ForecasterConfig(3, (1,), hidden=4), seed=2), NoScaling(), features=FEATURES)
    assert made.outputs == ("prediction",) and not made.per_stream
    assert [state.input for state in made.states] == ["h0", "c0"]
    own = model(scale="per-stream")
    assert own.outputs == ("prediction", "own_z", "own_std") and own.per_stream
    assert [state.input for state in own.states] == ["h0", "c0", "count", "mean", "mean_rest", "variance"]


def test_one_seed_is_one_model_and_leaves_the_global_generator_alone() -> None:
    """Seeds decide the weights; torch's own random numbers go on as if no forecaster had been made."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, twin, other = (model(seed=seed).state_dict() for seed in (4, 4, 5))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], twin[name]) for name in one)
    assert not torch.equal(one["network.head.weight"], other["network.head.weight"])
