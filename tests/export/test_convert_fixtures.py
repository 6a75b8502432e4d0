"""The models that Keras, tf2onnx and torch wrote, converted: each stepped gives what its own framework computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from statestep.runtime import StepModel

from .conversions import MODELS, Array, Case, Original, Outcome, fixtures, laid_out

CONVERTING = [case for case in fixtures() if not case.refused]
REFUSED = [case for case in fixtures() if case.refused]
TOLERANCE = 1e-5
Converted = Callable[[Case], Outcome]


def name(case: Case) -> str:
    return case.name


def stored(case: Case) -> dict[str, Array]:
    with np.load(MODELS / f"{case.name}.npz") as arrays:
        return dict(arrays)


def sequence_of(case: Case, arrays: dict[str, Array]) -> Array:
    """The stored readings as x [T, B, F]."""
    axes = case.inputs["x"]
    x = arrays["x"] if "F" in axes else arrays["x"][..., None]
    return np.ascontiguousarray(x.transpose([(axes + "F" * ("F" not in axes)).index(a) for a in "TBF"]), np.float32)


@pytest.mark.parametrize("case", CONVERTING, ids=name)
def test_stepped_it_gives_what_the_framework_computed(case: Case, converted: Converted) -> None:
    """Row by row, from the states that the framework began with, the model's outputs are the stored ones."""
    made = converted(case).made
    assert made is not None
    model, arrays = StepModel.load(made.model), stored(case)
    x = sequence_of(case, arrays)
    states = []
    for state, initial in zip(model.contract.states, model.initial_states(), strict=True):
        value = arrays.get(state.input)
        if value is None:
            value = np.stack([initial] * x.shape[1], axis=state.batch_axis)
        value = value.reshape([*state.shape[: state.batch_axis], x.shape[1], *state.shape[state.batch_axis :]])
        states.append(np.moveaxis(value, state.batch_axis, 0))
    rows = []
    for row in x:
        outputs, states = model.step(row, states)
        rows.append(outputs)
    for output in model.contract.outputs:
        truth = laid_out(arrays[output.name], case.outputs[output.name], *x.shape[:2])
        ours = np.stack([row[output.name] for row in rows])  # [T, B, …]
        np.testing.assert_allclose(ours if truth.ndim == ours.ndim else ours[-1], truth, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", CONVERTING, ids=name)
def test_no_output_is_lost(case: Case, converted: Converted) -> None:
    """Every output of the graph is one of the model, or a state that it gives back; there is at least one of each."""
    made = converted(case).made
    assert made is not None and made.report.passed
    outputs = [output.name for output in made.contract.outputs]
    given_back = [state.output for state in made.contract.states]
    assert set(case.outputs) <= {*outputs, *given_back} and outputs and given_back
    assert made.contract.producer is not None and made.contract.producer.endswith("(converted)")
    assert made.contract.memory is not None


def test_a_learned_first_state_is_declared(converted: Converted) -> None:
    """A stream of the network that begins in a learned state begins in it, not at zero."""
    case = next(case for case in CONVERTING if case.name == "torch_lstm_learned")
    made = converted(case).made
    assert made is not None
    held = {tuple(np.round(state.initial_value().ravel(), 5)) for state in made.contract.states}
    assert len(held) == 2 and (0.0,) * 5 not in held
    x = Original(case).readings(1, 1, 0)
    model = StepModel.load(made.model)
    zeros = [np.zeros_like(value)[None] for value in model.initial_states()]
    born = [value[None] for value in model.initial_states()]
    assert (model.step(x[0], zeros)[0]["y"] != model.step(x[0], born)[0]["y"]).any()


@pytest.mark.parametrize("case", REFUSED, ids=name)
def test_what_cannot_be_streamed_is_named(case: Case, converted: Converted) -> None:
    """The sentence names a node or an input of the graph, says what to do, and nothing has been written."""
    outcome = converted(case)
    assert outcome.made is None and outcome.files == []
    assert outcome.sentence.startswith(("node '", "input '")), outcome.sentence
    assert ": " in outcome.sentence or "; " in outcome.sentence
    assert outcome.sentence.count(". ") == 0 and len(outcome.sentence) < 300
