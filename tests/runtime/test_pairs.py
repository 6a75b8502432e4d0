"""Step models without a contract: their states told by name, shape and dtype, and refused where that is not sure."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from statestep.runtime import ContractError, Output, State, StepModel, detect
from statestep.runtime.contract import CONTRACT_KEY
from statestep.runtime.pairs import Tensor

from ..models import detector


def tensors(**shapes: tuple[Any, ...]) -> list[Tensor]:
    return [Tensor(name, shape, "float32") for name, shape in shapes.items()]


@pytest.mark.parametrize(
    ("state", "output"),
    [
        ("h0", "hn"),
        ("c0", "cn"),
        ("h_0", "h_n"),
        ("state", "stateN"),
        ("state0", "new_state0"),
        ("past_h", "present_h"),
        ("past", "present"),
        ("cache", "cache_next"),
        ("h", "next_h"),
        ("h_in", "h_out"),
        ("hidden", "hidden_out"),
        ("h", "hn"),
        ("prev_h", "next_h"),
        ("prev_state", "state"),
        ("state_in", "state_out"),
        ("in_state", "out_state"),
        ("states", "out_states"),
        ("input_states_1", "output_states_1"),
        ("past_key_values.0.key", "present.0.key"),
        ("cache_last_channel", "cache_last_channel_next"),
        ("cache_last_channel_len", "cache_last_channel_next_len"),
        ("cached_key_0", "new_cached_key_0"),
        ("r1i", "r1o"),
    ],
)
def test_pairs_are_told_by_the_names_that_tools_give(state: str, output: str) -> None:
    """Each way of naming a state on its way in and out is known."""
    shape = ("B", 8)
    found = detect("m", tensors(x=("B", 3), **{state: shape}), tensors(y=("B", 1), **{output: shape}))
    assert found.states == (State(state, output, (8,)),)
    assert found.input == "x"
    assert [feature.name for feature in found.features] == ["x0", "x1", "x2"]
    assert found.outputs == (Output("y"),)


def test_the_batch_is_the_one_free_dimension() -> None:
    """torch's [layers, batch, units] has it at axis 1, whatever the dimension is called."""
    found = detect("m", tensors(x=(None, 3), h0=(2, "n", 8)), tensors(y=("n", 3), hn=(2, "m", 8)))
    assert found.states == (State("h0", "hn", (2, 8), batch_axis=1),)


def test_a_pair_by_hand_needs_no_such_name() -> None:
    """What is named settles the pair and its batch axis; the other states are still found."""
    inputs = tensors(x=("B", 3), a=("B", 4), h0=("B", 2))
    outputs = tensors(y=("B", 3), b=("B", 4), hn=("B", 2))
    found = detect("m", inputs, outputs, named={"a": ("b", 0)})
    assert found.states == (State("a", "b", (4,)), State("h0", "hn", (2,)))


XY = {"x": ("B", 3)}, {"y": ("B", 3)}


@pytest.mark.parametrize(
    ("inputs", "outputs", "named", "sentence"),
    [
        ({}, {}, None, "has no state pair: inputs .*'x'.*, outputs .*'y'.*; a step model takes each state in"),
        ({"h0": ("B", 2)}, {"hn": ("B", 3)}, None, "has no state pair"),
        ({"h0": ("B", 2)}, {"hn": ("B", 2, 1)}, None, "has no state pair"),
        ({"h0": ("B", 2)}, {"hn": ("B", 2), "h_n": ("B", 2)}, None, r"'h0' could pair with any of \['hn', 'h_n'\]"),
        ({"h0": ("B", 2), "z": ("B", 2)}, {"hn": ("B", 2)}, None, r"there are \['x', 'z'\]"),
        ({"h0": (1, 2)}, {"hn": (1, 2)}, None, r"\[1, 2\], with no free axis for the batch"),
        ({"h0": ("B", "U")}, {"hn": ("B", "U")}, None, "beside the batch, axis 0, axis 1 is free too"),
        (
            {"h0": ("S", "U")},
            {"hn": ("S", "U")},
            None,
            r"which of the axes \[0, 1\] is the batch cannot be told; say it",
        ),
        ({"h0": (None, None)}, {"hn": (None, None)}, None, r"\(--state h0=hn:AXIS\)"),
        ({"h0": ("B", 2), "h": ("B", 2)}, {"hn": ("B", 2)}, None, r"'hn' could be the state of any of \['h0', 'h'\]"),
        (
            {"a": ("B", 2)},
            {"b": ("B", 2)},
            None,
            r"gives it out \(h0 → hn\); 'x' has .* \['y'\]; 'a' has the shape of \['b'\]",
        ),
        (
            {"h0": ("B", 2), "sr": ()},
            {"hn": ("B", 2)},
            None,
            r"\['x', 'sr'\]; fix a constant by .*\(--set name=value\)",
        ),
        (
            {"past_key_values.0.key": ("B", 4, "past", 8)},
            {"present.0.key": ("B", 4, "past + 1", 8)},
            None,
            "axis 2 is free too",
        ),
        ({"a": ("B", 2)}, {"b": ("B", 2)}, {"a": ("c", 0)}, "'a': the graph has no output 'c', it has"),
        ({"a": ("B", 2)}, {"b": ("B", 2)}, {"q": ("b", 0)}, "the graph has no input 'q', it has"),
        ({"a": ("B", 2)}, {"b": ("B", 2)}, {"a": ("b", 1)}, "axis 1 cannot be its batch axis"),
        ({"a": ("B", 2)}, {"b": ("B", 2)}, {"a": ("b", 5)}, "axis 5 cannot be its batch axis"),
        ({"a": ("B", 2)}, {"b": ("B", 2)}, {"a": ("b", -1)}, "axis -1 cannot be its batch axis"),
    ],
)
def test_a_guess_that_is_not_sure_is_refused(
    inputs: dict[str, Any], outputs: dict[str, Any], named: dict[str, tuple[str, int]] | None, sentence: str
) -> None:
    """No pair, two candidates, no free batch axis, names that are not there: the sentence lists what there is."""
    with pytest.raises(ContractError, match=sentence):
        detect("m", tensors(**XY[0], **inputs), tensors(**XY[1], **outputs), named=named)


@pytest.mark.parametrize("shape", [("B",), ("B", "F"), ("B", 3, 2), ("B", "T", "F"), (1, 1, 3), ("B", 1, 3, 1)])
def test_the_observation_is_a_row_of_features(shape: tuple[Any, ...]) -> None:
    """An input of another rank, or of unknown width, is no observation."""
    with pytest.raises(ContractError, match="a step takes \\[batch, features\\]"):
        detect("m", tensors(x=shape, h0=("B", 2)), tensors(y=("B", 3), hn=("B", 2)))


def test_a_model_without_a_contract_runs_as_with_one() -> None:
    """Stripped of its metadata the detector's LSTM states and others are found again, and step to the same bits."""
    whole = StepModel(detector())
    model = onnx.load_model_from_string(detector())
    del model.metadata_props[:]
    bare = StepModel(
        model.SerializeToString(),
        states={
            "forecast": ("next_forecast", 0),
            "error": ("next_error", 0),
            "seen": ("next_seen", 0),
            "alarmed": ("next_alarmed", 0),
        },
    )
    assert {s.input: s for s in bare.contract.states} == {s.input: s for s in whole.contract.states}
    assert CONTRACT_KEY not in {entry.key for entry in model.metadata_props}
    x = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    states = [np.stack([value] * 3) for value in whole.initial_states()]
    outputs, _ = whole.step(x, states)
    again, _ = bare.step(x, states)
    assert {n: v.tobytes() for n, v in outputs.items()} == {n: again[n].tobytes() for n in outputs}


def test_the_observation_is_never_guessed_to_be_a_state() -> None:
    """A forecast called next_x, shaped like x, is an output: taken for a state, the model would have no observation."""
    found = detect("m", tensors(x=("B", 3), h0=("B", 8)), tensors(next_x=("B", 3), hn=("B", 8)))
    assert (found.input, [state.input for state in found.states]) == ("x", ["h0"])
    assert found.outputs == (Output("next_x"),)


def test_of_several_free_axes_the_batch_is_the_one_called_as_in_x() -> None:
    """Where a state's other axes are fixed only in the other tensors' names, the symbol decides, for outputs too."""
    inputs = tensors(x=("batch", 3), h0=(2, "batch", 8))
    found = detect("m", inputs, tensors(y=("K", "batch"), hn=(2, "batch", 8)))
    assert found.outputs == (Output("y", batch_axis=1),)


def test_a_pair_by_hand_may_leave_the_axis_to_the_shape() -> None:
    """The output alone is enough where one axis is free."""
    found = detect("m", tensors(x=("B", 3), a=(2, "B", 4)), tensors(y=("B", 3), b=(2, "B", 4)), named={"a": "b"})
    assert found.states == (State("a", "b", (2, 4), batch_axis=1),)


def test_features_are_named_or_counted_by_hand() -> None:
    """Names come in the columns' order; a number is enough where the graph leaves the width open."""
    states = {"h0": ("B", 8)}, {"hn": ("B", 8)}
    wide = tensors(x=("B", "F"), **states[0]), tensors(y=("B", 1), **states[1])
    assert detect("m", *wide, features=2).feature_names == ("x0", "x1")
    fixed = tensors(x=("B", 2), **states[0]), tensors(y=("B", 1), **states[1])
    assert detect("m", *fixed, features=["flow", "level"]).feature_names == ("flow", "level")
    with pytest.raises(ContractError, match="3 features are named, input 'x' has 2"):
        detect("m", *fixed, features=3)


@pytest.mark.parametrize("width", [0, (1 << 20) + 1, 1 << 31])
def test_an_absurd_width_is_refused(width: int) -> None:
    """Every feature gets a name: billions, as a damaged file may claim, would fill the memory."""
    with pytest.raises(ContractError, match=r"features, a step takes 1 to 1,048,576"):
        detect("m", tensors(x=("B", width), h0=("B", 8)), tensors(y=("B", 1), hn=("B", 8)))
    with pytest.raises(ContractError, match=r"features, a step takes 1 to 1,048,576"):
        detect("m", tensors(x=("B", "F"), h0=("B", 8)), tensors(y=("B", 1), hn=("B", 8)), features=width)
