"""Step models that exist already, states told by hand, constants, and weights in half the bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from statestep.export import ExportError
from statestep.export.convert import convert
from statestep.export.describe import Described
from statestep.export.histories import stepped
from statestep.export.laws import company_does_not_matter
from statestep.export.scaler import scaler_of
from statestep.runtime import Engine, ModelError, StepModel

from . import graphs, graphs_odd
from .conversions import Case, Original
from .net import FEATURES, OUT, UNITS, Net

pytestmark = pytest.mark.usefixtures("quick")

RNG = np.random.default_rng
READINGS = RNG(0).standard_normal((9, 4, FEATURES)).astype(np.float32)  # [T, B, F]


def step_model(kind: str = "rows", opset: int = 18) -> bytes:
    """Step models as others write them: of rows (icefall), of sequences of one row (silero), with a constant."""
    net = Net(opset=opset)
    inputs: dict[str, Any] = {"x": ("B", FEATURES), "state0": (1, "B", UNITS), "state1": (1, "B", UNITS)}
    x = "x"
    if kind == "one_row":
        inputs["x"] = ("B", 1, FEATURES)
        x = net.add("Transpose", "x", perm=[1, 0, 2])
    else:
        x = net.add("Unsqueeze", "x", net.constant([0]))
    if kind == "scaled":
        inputs["gain"] = ()
        x = net.add("Mul", x, "gain")
    y, h, c = net.recurrent("LSTM", x, initial=["state0", "state1"])
    net.add("Identity", h, out="new_state0")
    net.add("Identity", c, out="new_state1")
    rows = net.rows(y)  # [1, B, H]
    if kind == "one_row":
        net.head(net.add("Transpose", rows, perm=[1, 0, 2]))
        shape: Any = ("B", 1, OUT)
    elif kind == "batch_second":
        net.add("Transpose", net.head(net.add("Squeeze", rows, net.constant([0])), out=None), perm=[1, 0], out="y")
        shape = (OUT, "B")
    else:
        net.head(net.add("Squeeze", rows, net.constant([0])))
        shape = ("B", OUT)
    state = (1, "B", UNITS)
    return net.model(inputs, {"y": shape, "new_state0": state, "new_state1": state})


def written(tmp_path: Path, data: bytes, **settings: Any) -> Any:
    tmp_path.mkdir(exist_ok=True)
    source = tmp_path / "original.onnx"
    source.write_bytes(data)
    return convert(source, tmp_path / "out" / "step.onnx", **settings)


@pytest.mark.parametrize("kind", ["rows", "one_row", "scaled", "batch_second"])
def test_a_step_model_gets_a_contract_and_computes_as_before(kind: str, tmp_path: Path) -> None:
    """What is written loads by its contract alone, and gives the bits of the original loaded by what was said of it."""
    constants = {"gain": 0.5} if kind == "scaled" else None
    data = step_model(kind)
    made = written(tmp_path, data, constants=constants, described=Described(features=("a", "b", "c"), author="us"))
    assert made.proof is None and made.sequence is None and made.report.passed
    model = StepModel.load(made.model)
    assert model.contract.feature_names == ("a", "b", "c") and model.contract.author == "us"
    theirs = stepped(StepModel(data, constants=constants), READINGS)
    ours = stepped(model, READINGS)
    assert ours["y"].shape == (9, 4, OUT)
    assert ours["y"].tobytes() == theirs["y"].tobytes()
    assert sorted(path.name for path in made.model.parent.iterdir()) == ["step.onnx"]


def test_the_scaler_of_a_step_model_goes_into_its_graph(tmp_path: Path) -> None:
    """Raw readings into the written model are standardised readings into the original."""
    scaler = scaler_of([1.0, -2.0, 3.0], [2.0, 0.5, 4.0], ("a", "b", "c"))
    about = Described(features=("a", "b", "c"), scaler=scaler)
    made = written(tmp_path, step_model("one_row"), described=about)
    raw = (READINGS * np.float32(scaler.std) + np.float32(scaler.mean)).astype(np.float32)
    theirs = stepped(StepModel(step_model("one_row")), READINGS)
    np.testing.assert_allclose(stepped(StepModel.load(made.model), raw)["y"], theirs["y"], rtol=0, atol=1e-5)


def test_a_pair_that_could_be_two_is_refused_and_settled_by_hand(tmp_path: Path) -> None:
    """A state that fits two outputs is an error that lists them; told, it converts."""
    net = Net()
    net.add("Add", "x", net.add("Mul", "a", net.constant(0.5, "float32")), out="next_a")
    net.add("Sub", "x", "a", out="new_a")
    shape = ("B", FEATURES)
    data = net.model({"x": shape, "a": shape}, {"next_a": shape, "new_a": shape})
    with pytest.raises(ModelError, match=r"could pair with any of \['next_a', 'new_a'\]"):
        written(tmp_path, data)
    made = written(tmp_path, data, states={"a": "next_a"})
    assert [(state.input, state.output) for state in made.contract.states] == [("a", "next_a")]


def odd_states(fixed: bool = False) -> bytes:
    """A sequence graph whose states have names that say nothing of their pairs."""
    net = Net()
    y, h, c = net.recurrent("LSTM", "x", initial=["p", "q"])
    net.head(net.rows(y))
    net.add("Identity", h, out="r")
    net.add("Identity", c, out="s")
    state = (1, 1 if fixed else "B", UNITS)
    steps, streams = (6, 1) if fixed else ("T", "B")
    return net.model(
        {"x": (steps, streams, FEATURES), "p": state, "q": state},
        {"y": (steps, streams, OUT), "r": state, "s": state},
    )


@pytest.mark.parametrize("fixed", [False, True], ids=["free", "fixed"])
def test_states_of_a_sequence_graph_are_told_by_hand(fixed: bool, tmp_path: Path) -> None:
    """Told, each pair is a state of the step model; the hidden state is no answer any more."""
    made = written(tmp_path, odd_states(fixed), states={"p": "r", "q": ("s", 1)})
    assert [(state.input, state.output) for state in made.contract.states] == [("p", "r"), ("q", "s")]
    assert [output.name for output in made.contract.outputs] == ["y"]


BAD_STATES: list[tuple[dict[str, Any], str]] = [
    ({"z": "r"}, "state 'z' is no input of the graph, it has: ['x', 'p', 'q']"),
    ({"p": "z"}, "state 'p': the graph has no output 'z', it has ['y', 'r', 's']"),
    ({"p": ("r", 3)}, "state 'p' has 3 axes, none of them is 3: count them from 0"),
]


@pytest.mark.parametrize(("states", "sentence"), BAD_STATES, ids=str)
def test_states_that_are_not_there_are_refused(states: Any, sentence: str, tmp_path: Path) -> None:
    """What is told by hand must be in the graph."""
    with pytest.raises(ExportError) as error:
        written(tmp_path, odd_states(), states=states)
    assert str(error.value) == sentence


def test_a_swapped_pair_is_not_proven(tmp_path: Path) -> None:
    """h told as the following c, and c as the following h: the stepped model is another, and nothing is written."""
    with pytest.raises(ExportError):
        written(tmp_path, odd_states(), states={"p": "s", "q": "r"})
    assert list((tmp_path / "out").iterdir()) == []


def test_an_input_that_is_no_reading_is_set(tmp_path: Path) -> None:
    """A gain of a sequence graph: without a value it is refused by name, with one it is a weight."""
    net = Net()
    y, *_ = net.recurrent("LSTM", net.add("Mul", "x", "gain"))
    net.head(net.rows(y))
    data = net.model({"x": ("T", "B", FEATURES), "gain": ()})
    with pytest.raises(ExportError, match=r"^input 'gain' of shape \[\] .*--set gain=value"):
        written(tmp_path, data)
    made = written(tmp_path, data, constants={"gain": 0.5})
    assert [feature.name for feature in made.contract.features] == ["x0", "x1", "x2"]


@pytest.mark.parametrize("wanted", ["TBF", "BTF"])
def test_a_layout_is_told_by_hand(wanted: str, tmp_path: Path) -> None:
    """The right one converts, the wrong one is refused: it is checked like one that was found."""
    if wanted == "TBF":
        assert written(tmp_path, graphs.one_layer("LSTM"), layout=wanted).proof.exact
    else:
        with pytest.raises(ExportError):
            written(tmp_path, graphs.one_layer("LSTM"), layout=wanted)


def wide(operator: str = "LSTM") -> bytes:
    """A network whose weights are most of its file."""
    return graphs_odd.sized(8, 48, operator=operator)


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_weights_in_half_the_bytes(operator: str, tmp_path: Path) -> None:
    """The file has about half the size, computes the bits of the graph with rounded weights, and tells the cost."""
    data = wide(operator)
    full = written(tmp_path / "full", data)
    half = written(tmp_path / "half", data, weights="fp16")
    assert half.model.stat().st_size < 0.62 * full.model.stat().st_size
    assert full.weights_cost is None and 1e-5 < half.weights_cost < 1e-2

    whole = onnx.load_model_from_string(data)
    for tensor in whole.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) >= 256:
            value = onnx.numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    original = Original(Case("hand_half", "", whole.SerializeToString))
    x = original.readings(30, 5, seed=3)
    model = StepModel.load(half.model)
    ours, truth = stepped(model, x)["y"], original.run(x)["y"]
    if operator == "RNN":  # which rounds each row in its own way
        np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-6)
    else:
        assert ours.tobytes() == truth.tobytes()
    company_does_not_matter(model, RNG(1).standard_normal((3, 64, 8)).astype(np.float32))


def test_half_weights_are_whole_again_once_they_are_loaded(tmp_path: Path) -> None:
    """onnxruntime folds the casts as it loads the file, so that a step computes with ready float32 weights."""
    made = written(tmp_path, wide(), weights="fp16")
    kinds = {t.data_type for t in onnx.load(made.model).graph.initializer if np.prod(t.dims) >= 256}
    assert kinds == {onnx.TensorProto.FLOAT16}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(made.model, options, providers=["CPUExecutionProvider"])
    assert all(node.op_type != "Cast" for node in onnx.load(tmp_path / "optimised.onnx").graph.node)


def test_half_weights_of_a_step_model(tmp_path: Path) -> None:
    """A step model from elsewhere is halved as well, and says what that cost."""
    net = Net()
    y, h, c = net.recurrent("LSTM", net.add("Unsqueeze", "x", net.constant([0])), units=48, initial=["h0", "c0"])
    net.add("Identity", h, out="hn")
    net.add("Identity", c, out="cn")
    net.head(net.add("Squeeze", y, net.constant([0, 1])), 48)
    state = (1, "B", 48)
    data = net.model({"x": ("B", FEATURES), "h0": state, "c0": state}, {"y": ("B", OUT), "hn": state, "cn": state})
    made = written(tmp_path, data, weights="fp16")
    assert made.model.stat().st_size < 0.7 * len(data) and 0 < made.weights_cost < 1e-2
    x = READINGS
    np.testing.assert_allclose(
        stepped(StepModel.load(made.model), x)["y"], stepped(StepModel(data), x)["y"], rtol=0, atol=5e-3
    )


def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    """It would become infinite."""

    def large(model: onnx.ModelProto) -> None:
        value = onnx.numpy_helper.to_array(model.graph.initializer[1]).copy()
        value[0, 0, 0] = 1e6
        model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(value, "held_1"))

    data = graphs_odd.rewritten(large, features=8, units=48)
    with pytest.raises(ExportError, match=r"^weight 'held_1' holds 1e\+06, beyond the 65,504 .*fp32"):
        written(tmp_path, data, weights="fp16")


def test_a_network_that_lets_rounding_grow_is_refused(tmp_path: Path) -> None:
    """A vanilla RNN with large weights is chaotic: two ways to round part within a few rows; the sentence says so."""
    net = Net()
    w, r = net.weight(1, 48, FEATURES), net.weight(1, 48, 48, scale=2.0)
    y, _ = net.many("RNN", "x", w, r, count=2, hidden_size=48)
    net.head(net.rows(y), 48)
    with pytest.raises(ExportError, match=r"RNN rounds each row in its own way, and the network lets that grow; train"):
        written(tmp_path, net.model())


def spoken(answer: str) -> bytes:
    """Tokens into an embedding and a GRU; answered by a row, by one number, by a table, or by a choice."""
    net = Net()
    y, *_ = net.recurrent("GRU", net.add("Gather", net.weight(7, FEATURES), "x"))
    every = net.head(net.rows(y), out="y" if answer == "rows" else None)
    shapes: dict[str, Any] = {"rows": ("T", "B", OUT), "number": ("T", "B"), "table": ("T", "B", 1, OUT)}
    shapes["choice"] = ("int64", ("T", "B"))
    if answer == "number":
        net.add("ReduceSum", every, net.constant([2]), keepdims=0, out="y")
    elif answer == "table":
        net.add("Unsqueeze", every, net.constant([2]), out="y")
    elif answer == "choice":
        net.add("ArgMax", every, axis=2, keepdims=0, out="y")
    return net.model({"x": ("int64", ("T", "B"))}, {"y": shapes[answer]})


@pytest.mark.parametrize("answer", ["rows", "number", "table", "choice"])
def test_a_token_that_no_table_holds_is_refused_alone(answer: str, tmp_path: Path) -> None:
    """Its row is rejected and its stream keeps what it remembered; the rows beside it are as if it were not there."""
    made = written(tmp_path, spoken(answer))
    assert (made.contract.features[0].min, made.contract.features[0].max) == (0, 6)
    model = StepModel.load(made.model)
    engine, apart = Engine(model), Engine(model)
    keys = [b"a", b"b", b"c", b"d", b"e"]
    first = np.array([[0.0], [1], [2], [3], [6]], np.float32)
    engine.advance(keys, first)
    apart.advance(keys, first)
    second = np.array([[5.0], [7], [-1], [np.nan], [4]], np.float32)
    given = engine.advance(keys, second)
    assert given.rejected.tolist() == [False, True, True, True, False]
    assert given.step.tolist() == [2, 1, 1, 1, 2]
    alone = apart.advance([b"a", b"e"], second[[0, 4]])
    assert given["y"][[0, 4]].tobytes() == alone["y"].tobytes()
    after = engine.advance([b"b"], np.array([[4.0]], np.float32))
    assert after["y"].tobytes() == apart.advance([b"b"], np.array([[4.0]], np.float32))["y"].tobytes()
