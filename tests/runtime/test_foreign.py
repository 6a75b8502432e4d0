"""Step models from elsewhere, shaped as others write them: silero, icefall, NeMo, transposed and one-step sequences.

Each double computes something that plain numpy can repeat, so that a swapped state or a wrong axis shows in numbers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from statestep.runtime import Engine, ModelError, State, StepModel

from ..models import Array, graph, smoother, smoother_contract, stamped

RNG_SEED = 5
UNITS, FEATURES = 4, 3


def node(operator: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def branch(name: str, value: float) -> onnx.GraphProto:
    """One arm of an If: a constant."""
    constant = helper.make_tensor(f"{name}_value", TensorProto.FLOAT, [], [value])
    inner = helper.make_node("Constant", [], [name], value=constant)
    return helper.make_graph([inner], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, [])])


def silero(width: int | str = FEATURES, sample_rate: Any = ()) -> onnx.ModelProto:
    """As silero-vad v5: input, state [2, B, 128], sr → output, stateN. The sample rate chooses a branch of an If.

    stateN = state / 2 + gain · mean(input), output = the sum of its second layer; gain is 1 at 16 kHz and 3 elsewhere.
    """
    return graph(
        [
            node("Equal", "sr rate", "is_16k"),
            node("If", "is_16k", "gain", then_branch=branch("one", 1.0), else_branch=branch("three", 3.0)),
            node("ReduceMean", "input columns", "level", keepdims=1),
            node("Mul", "level gain", "loud"),
            node("Mul", "state half", "kept"),
            node("Add", "kept loud", "stateN"),
            node("Gather", "stateN one_index", "top", axis=0),
            node("ReduceMean", "top columns", "output", keepdims=1),
        ],
        {
            "input": ("float32", [None, width]),
            "state": ("float32", [2, None, 128]),
            "sr": ("int64", list(sample_rate)),
        },
        {"output": ("float32", [None, 1]), "stateN": ("float32", [None, None, None])},
        {
            "half": np.array(0.5, np.float32),
            "rate": np.array(16000),
            "one_index": np.array(1),
            "columns": np.array([1]),
        },
    )


def loaded(model: onnx.ModelProto, **how: Any) -> StepModel:
    return StepModel(model.SerializeToString(), name="m.onnx", **how)


def refused(model: onnx.ModelProto, **how: Any) -> str:
    with pytest.raises(ModelError) as error:
        loaded(model, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def steps(model: StepModel, x: Array) -> dict[str, Array]:
    """x [T, B, F] through an engine."""
    engine = Engine(model)
    rows = [engine.advance([b"%d" % stream for stream in range(x.shape[1])], row).outputs for row in x]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def drawn(steps: int = 5, batch: int = 3, features: int = FEATURES) -> Array:
    return np.random.default_rng(RNG_SEED).normal(size=(steps, batch, features)).astype(np.float32)


@pytest.mark.parametrize(("rate", "gain"), [(16000, 1.0), (8000, 3.0)])
@pytest.mark.parametrize("states", [None, {"state": "stateN"}, {"state": ("stateN", 1)}], ids=str)
def test_a_model_like_silero_runs_with_its_sample_rate_fixed(rate: int, gain: float, states: Any) -> None:
    """State with the batch at axis 1, a scalar constant that chooses a branch: numpy gives the same numbers."""
    model = loaded(silero(), states=states, constants={"sr": rate})
    assert model.contract.states == (State("state", "stateN", (2, 128), batch_axis=1),)
    x = drawn()
    level = np.zeros(x.shape[1])
    for row, output in zip(x, steps(model, x)["output"], strict=True):
        level = level / 2 + gain * row.mean(axis=1)
        np.testing.assert_allclose(output[:, 0], level, rtol=1e-5, atol=1e-6)


def test_a_constant_is_folded_into_the_session() -> None:
    """Fixed before the session is made, it is no input of it, and the fingerprint stays that of the file."""
    data = silero().SerializeToString()
    model = StepModel(data, constants={"sr": 16000})
    assert {tensor.name for tensor in model._session.get_inputs()} == {"input", "state"}
    assert model.fingerprint == hashlib.sha256(data).hexdigest()


def test_a_width_that_the_graph_leaves_open_is_given() -> None:
    """silero's own file takes any number of samples: without a number it is refused, with one it runs."""
    sentence = refused(silero("samples"), constants={"sr": 16000})
    assert "a step takes [batch, features]: say how many features by features=N (--features N)" in sentence
    model = loaded(silero("samples"), constants={"sr": 16000}, features=576)
    assert model.contract.feature_names[-1] == "x575"
    assert steps(model, drawn(2, 3, 576))["output"].shape == (2, 3, 1)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_a_number_fills_a_fixed_shape(shape: tuple[int, ...]) -> None:
    """A constant input of any fixed shape takes one number, or a list of its shape."""
    model = graph(
        [node("ReduceSum", "k", "sum", keepdims=0), node("Add", "x h", "hn"), node("Mul", "hn sum", "y")],
        {"x": ("float32", ["B", 2]), "h": ("float32", ["B", 2]), "k": ("float32", list(shape))},
        {"y": ("float32", ["B", 2]), "hn": ("float32", ["B", 2])},
    )
    for value in (2, np.full(shape, 2.0).tolist()):
        found = steps(loaded(model, constants={"k": value}), np.ones((1, 1, 2), np.float32))
        assert found["y"].tolist() == [[[2.0 * np.prod(shape)] * 2]]


BAD_CONSTANTS: list[tuple[dict[str, Any], str]] = [
    ({"rate": 16000}, "the constant 'rate' is no input of the graph, it has ['input', 'state', 'sr']"),
    ({"sr": 16000.5}, "the constant 'sr' is 16000.5, the input takes int64"),
    ({"sr": "16 kHz"}, "the constant 'sr' is '16 kHz', the input takes int64"),
    ({"sr": True}, "the constant 'sr' is True, the input takes int64"),
    ({"sr": float("nan")}, "the constant 'sr' is nan, the input takes int64"),
    ({"sr": 2**70}, f"the constant 'sr' is {2**70}, the input takes int64"),
    ({"sr": [[1], [2, 3]]}, "the constant 'sr' is [[1], [2, 3]], the input takes int64"),
    ({"sr": [16000, 8000]}, "the constant 'sr' has shape [2], the input has []"),
    ({}, "there are ['input', 'sr']; fix a constant by constants={name: value} (--set name=value)"),
]


@pytest.mark.parametrize(("constants", "sentence"), BAD_CONSTANTS, ids=[sentence for _, sentence in BAD_CONSTANTS])
def test_a_constant_that_does_not_fit_is_refused(constants: dict[str, Any], sentence: str) -> None:
    """A name that is no input, another dtype, another shape: told with the inputs that there are."""
    assert sentence in refused(silero(), constants=constants)


def icefall(time: int | str = 1) -> onnx.ModelProto:
    """As icefall's LSTM: x [N, 1, F], state0 and state1 [layers, N, U] → encoder_out [N, 1, U], new_state0, new_state1.

    new_state0 = state0 / 2 + mean(x), new_state1 = state1 + new_state0, encoder_out = new_state1's layer.
    """
    return graph(
        [
            node("ReduceMean", "x rest", "level", keepdims=1),
            node("Transpose", "level", "turned", perm=[1, 0, 2]),
            node("Mul", "state0 half", "kept"),
            node("Add", "kept turned", "new_state0"),
            node("Add", "state1 new_state0", "new_state1"),
            node("Transpose", "new_state1", "encoder_out", perm=[1, 0, 2]),
        ],
        {
            "x": ("float32", ["N", time, FEATURES]),
            "state0": ("float32", [1, "N", UNITS]),
            "state1": ("float32", [1, "N", UNITS]),
        },
        {
            "encoder_out": ("float32", ["N", time, UNITS]),
            "new_state0": ("float32", [1, "N", UNITS]),
            "new_state1": ("float32", [1, "N", UNITS]),
        },
        {"half": np.array(0.5, np.float32), "rest": np.array([1, 2])},
    )


@pytest.mark.parametrize("time", [1, "T"])
def test_a_model_like_icefall_takes_rows(time: int | str) -> None:
    """A time axis of one step, or of any length, is put there and taken away inside: [B, F] in, [B, U] out."""
    model = loaded(icefall(time))
    assert [(s.input, s.output, s.batch_axis) for s in model.contract.states] == [
        ("state0", "new_state0", 1),
        ("state1", "new_state1", 1),
    ]
    x = drawn()
    first = second = np.zeros(x.shape[1])
    for row, output in zip(x, steps(model, x)["encoder_out"], strict=True):
        first = first / 2 + row.mean(axis=1)
        second = second + first
        assert output.shape == (3, UNITS)
        np.testing.assert_allclose(output, np.repeat(second[:, None], UNITS, 1), rtol=1e-5, atol=1e-6)


def test_a_chunk_of_several_timesteps_is_refused() -> None:
    """Nine frames at once are not one timestep: no axis of the observation can be dropped."""
    sentence = refused(icefall(9))
    assert "input 'x' has shape ['N', 9, 3], a step takes [batch, features], or one timestep" in sentence


@pytest.mark.parametrize("opset", [11, 18])
@pytest.mark.parametrize("shape", [(1, "N", 2), ("N", 2, 1), ("N", 1, 2)], ids=str)
def test_the_time_axis_may_stand_anywhere(shape: tuple[Any, ...], opset: int) -> None:
    """Sequences first, last or between: the contract says where the batch of each output is afterwards."""
    batch = shape.index("N")
    model = graph(
        [node("Mul", "h half", "kept"), node("Add", "kept x", "h_out"), node("Identity", "h_out", "y")],
        {"x": ("float32", list(shape)), "h_in": ("float32", list(shape))},
        {"y": ("float32", list(shape)), "h_out": ("float32", list(shape))},
        {"half": np.array(0.5, np.float32)},
    )
    model.graph.node[0].input[0] = "h_in"
    model.opset_import[0].version = opset
    found = loaded(model)
    assert found.contract.states[0].batch_axis == batch
    x = drawn(3, 5, 2)
    expected = np.zeros((5, 2))
    for row, output in zip(x, steps(found, x)["y"], strict=True):
        expected = expected / 2 + row
        np.testing.assert_allclose(output, expected, rtol=1e-6)


def nemo() -> onnx.ModelProto:
    """As NeMo's cache-aware encoder, at one frame: audio_signal [B, F, 1], length [B], and caches with their length.

    The cache shifts in the newest frame and the encoder gives its mean, scaled by `length`, which it is given a row.
    """
    return graph(
        [
            node("Concat", "cache_last_time audio_signal", "longer", axis=2),
            node("Slice", "longer one big two", "cache_last_time_next"),
            node("Add", "cache_last_channel_len one_each", "cache_last_channel_next_len"),
            node("ReduceMean", "cache_last_time_next rest", "mean", keepdims=0),
            node("Cast", "length", "scale", to=TensorProto.FLOAT),
            node("Mul", "mean scale", "outputs"),
            node("Identity", "cache_last_channel_next_len", "encoded_lengths"),
        ],
        {
            "audio_signal": ("float32", ["audio_signal_dynamic_axes_1", FEATURES, 1]),
            "length": ("int64", ["length_dynamic_axes_1"]),
            "cache_last_time": ("float32", ["cache_last_time_dynamic_axes_1", FEATURES, 4]),
            "cache_last_channel_len": ("int64", ["cache_last_channel_len_dynamic_axes_1"]),
        },
        {
            "outputs": ("float32", ["outputs_dynamic_axes_1"]),
            "encoded_lengths": ("int64", ["encoded_lengths_dynamic_axes_1"]),
            "cache_last_time_next": ("float32", ["cache_last_time_next_dynamic_axes_1", FEATURES, 4]),
            "cache_last_channel_next_len": ("int64", ["cache_last_channel_next_len_dynamic_axes_1"]),
        },
        {
            "one": np.array([1]),
            "big": np.array([1 << 40]),
            "two": np.array([2]),
            "one_each": np.array(1),
            "rest": np.array([1, 2]),
        },
    )


def test_a_model_like_nemo_runs_with_a_length_for_each_row() -> None:
    """A cache and a counter are states; a constant with the batch's axis is filled for as many rows as there are."""
    model = loaded(nemo(), constants={"length": 2})
    assert [state.input for state in model.contract.states] == ["cache_last_time", "cache_last_channel_len"]
    assert model.contract.states[1].dtype == "int64"
    x = drawn(6)
    found = steps(model, x)
    assert found["encoded_lengths"][:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    cache = np.zeros((3, FEATURES, 4))
    for row, output in zip(x, found["outputs"], strict=True):
        cache = np.concatenate([cache, row[..., None]], axis=2)[:, :, 1:]
        np.testing.assert_allclose(output, 2 * cache.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)


def test_a_file_of_the_oldest_format_takes_constants_too() -> None:
    """Before format 4 every weight is listed as an input: they are not asked for, and not offered as constants."""
    model = silero()
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(w.name, w.data_type, list(w.dims)) for w in model.graph.initializer
    )
    assert steps(loaded(model, constants={"sr": 16000}), drawn())["output"].shape == (5, 3, 1)
    assert "it has ['input', 'state', 'sr']" in refused(model, constants={"half": 1})


def test_a_fixed_batch_is_refused_with_the_way_out() -> None:
    """A state that was exported for one stream holds one stream: it cannot be batched."""
    model = silero()
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_value = 1
    sentence = refused(model, constants={"sr": 16000})
    assert (
        "state 'state' has shape [2, 1, 128], with no free axis for the batch; export it with a free batch" in sentence
    )


def test_features_of_a_model_with_a_contract_stay_its_own() -> None:
    """What a contract says is not overruled by a flag."""
    with pytest.raises(ModelError, match="its contract names its features; leave features"):
        StepModel(stamped(smoother(), smoother_contract()), features=["a", "b"])


def test_weights_and_names_are_left_as_they_were() -> None:
    """The change of the graph is made on a copy: the file's own bytes give the same model again."""
    model = icefall()
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "x_with_time"))
    before = model.SerializeToString()
    assert steps(loaded(model), drawn())["encoder_out"].shape == (5, 3, UNITS)
    assert model.SerializeToString() == before
