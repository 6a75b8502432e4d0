"""Loading a step model: what is none is refused in one sentence, before any message is taken."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from statestep.runtime import Engine, ModelError, Output, State, StepModel

from ..models import detector, graph, smoother, smoother_contract, stamped


def refused(data: bytes) -> str:
    """The sentence with which a model is refused; it has one line and begins with the file's name."""
    with pytest.raises(ModelError) as error:
        StepModel(data, name="m.onnx")
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.startswith("m.onnx: ")
    return sentence


def test_a_whole_model_loads(tmp_path: Path) -> None:
    """Contract, opset and fingerprint are there, from a file as from bytes."""
    path = tmp_path / "pump.onnx"
    path.write_bytes(detector())
    model = StepModel.load(path)
    assert model.contract.name == "pump"
    assert model.opset == 18
    assert model.fingerprint == StepModel(detector()).fingerprint


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x00" * 64, b"PK\x03\x04 a zip", b'{"json": 1}'])
def test_what_is_not_onnx_is_refused(data: bytes) -> None:
    """An empty file, text, zeros, a zip: each is told to be no ONNX file."""
    assert "is not an ONNX file" in refused(data)


def test_a_truncated_file_is_refused_wherever_it_was_cut() -> None:
    """No cut crashes the process or goes unnoticed, not even one between graph and metadata."""
    data = detector()
    rng = np.random.default_rng(0)
    cuts = {*range(0, 64), *rng.integers(0, len(data), 150).tolist(), *range(len(data) - 64, len(data))}
    for cut in sorted(cuts):
        refused(data[:cut])
    whole = onnx.load_model_from_string(data)
    del whole.metadata_props[:]  # what a cut just before them would leave, and a valid graph
    assert "its contract is missing; was the file cut short?" in refused(whole.SerializeToString())


def test_a_damaged_file_is_refused_or_loads_whole(capfd: pytest.CaptureFixture[str]) -> None:
    """Bytes turned over anywhere never crash the process: the model is refused in one line, or still steps.

    Nothing is printed meanwhile: standard output may be where predictions go.
    """
    data, rng = bytearray(detector()), np.random.default_rng(1)
    outcomes = {"refused": 0, "loaded": 0}
    for place in rng.integers(0, len(data), 300).tolist():
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        try:
            model = StepModel(bytes(damaged), name="m.onnx")
        except ModelError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            x = np.zeros((1, len(model.contract.features)), model.contract.input_dtype)
            Engine(model).advance([b"a"], x)
            outcomes["loaded"] += 1
    assert min(outcomes.values()) > 20, outcomes
    assert capfd.readouterr() == ("", "")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file and a folder are told with the system's reason."""
    with pytest.raises(ModelError, match=r"gone\.onnx: cannot be read: No such file"):
        StepModel.load(tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        StepModel.load(tmp_path)


def external(name: str, location: str) -> onnx.TensorProto:
    """A tensor that says that its bytes are in another file."""
    tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1])
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    return tensor


@pytest.mark.parametrize("place", ["initializer", "sparse", "constant", "branch", "function"])
def test_weights_in_another_file_are_refused(place: str) -> None:
    """Wherever a graph can hold a tensor, one that names another file is found, and no file is opened."""
    model, weight = smoother(), external("w", "/etc/hostname")
    if place == "initializer":
        model.graph.initializer.append(weight)
    elif place == "sparse":
        indices = numpy_helper.from_array(np.array([0], np.int64), "i")
        model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=weight, indices=indices, dims=[4]))
    else:
        constant = helper.make_node("Constant", [], ["k"], value=weight)
        if place == "constant":
            model.graph.node.append(constant)
        elif place == "branch":
            inner = helper.make_graph([constant], "inner", [], [helper.make_tensor_value_info("k", 1, [1])])
            model.graph.node.append(helper.make_node("If", ["c"], ["k2"], then_branch=inner, else_branch=inner))
        else:
            opset = [helper.make_opsetid("", 18)]
            model.functions.append(helper.make_function("own", "F", [], ["k"], [constant], opset))
    assert "keeps weight 'w' outside the file" in refused(stamped(model, smoother_contract()))


def test_a_model_without_states_is_refused() -> None:
    """Without a state pair there is nothing to remember; the sentence lists what the graph has."""
    stateless = graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        {"x": ("float32", ["B", 2])},
        {"y": ("float32", ["B", 2])},
    )
    assert "has no state pair: inputs ['x'], outputs ['y']" in refused(stateless.SerializeToString())


def test_a_graph_that_onnxruntime_refuses_is_refused() -> None:
    """An operator with too few inputs, and a node whose input is nowhere."""
    for node in (helper.make_node("Gemm", ["x"], ["z"]), helper.make_node("Add", ["x", "nowhere"], ["z"])):
        model = smoother()
        model.graph.node.append(node)
        assert "onnxruntime cannot load it" in refused(stamped(model, smoother_contract()))


@pytest.mark.parametrize("tensor", ["x", "h"])
def test_a_fixed_batch_axis_is_refused(tensor: str) -> None:
    """Exporters freeze the batch to the example's 1: of the input or of a state, either is found at load."""
    model = smoother()
    for info in model.graph.input:
        if info.name == tensor:
            info.type.tensor_type.shape.dim[0].dim_value = 1
    data = stamped(model, smoother_contract())
    assert refused(data) == f"m.onnx: the batch axis of '{tensor}' is fixed at 1; export it with a free batch axis"


def test_a_state_without_a_batch_axis_is_refused() -> None:
    """A scalar cannot hold a value for each stream."""
    model = smoother()
    model.graph.input[1].type.tensor_type.shape.ClearField("dim")
    contract = smoother_contract(states=(State("h", "next_h", ()),))
    assert "its contract has state 'h' as float32 [] with batch axis 0" in refused(stamped(model, contract))


def test_a_graph_that_ignores_the_batch_is_refused() -> None:
    """Shapes that a graph declares may be wrong: an output of one row for every batch is found by stepping two."""
    model = smoother()
    del model.graph.node[-1]
    model.graph.node.append(helper.make_node("ReduceSum", ["next_h", "rows"], ["y"], keepdims=1))
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "rows"))
    assert "output 'y' is float32 [1, 2] for 2 streams, it must be [2, 2]" in refused(
        stamped(model, smoother_contract())
    )


def test_a_state_that_changes_its_size_is_refused() -> None:
    """A state that leaves with another shape than it came in could not be kept."""
    model = smoother()
    model.graph.node.append(helper.make_node("Concat", ["next_h", "x"], ["grown"], axis=1))
    model.graph.output.append(helper.make_tensor_value_info("grown", TensorProto.FLOAT, ["B", None]))
    contract = smoother_contract(states=(State("h", "grown", (2,)),))
    assert "state 'grown' is float32 [2, 4] for 2 streams, it must be float32 [2, 2]" in refused(
        stamped(model, contract)
    )


AT_ODDS: list[tuple[dict[str, Any], str]] = [
    ({"input": "z"}, "its contract names the inputs ['h', 'z'], its graph has ['h', 'x']"),
    ({"states": (State("g", "next_h", (2,)),)}, "names the inputs ['g', 'x']"),
    ({"states": (State("h", "gone", (2,)),)}, "its contract names the outputs ['gone'], its graph has"),
    ({"outputs": (Output("z"),)}, "its contract names the outputs ['z']"),
    ({"states": (State("h", "next_h", (3,)),)}, "its contract has state 'h' as float32 [3] with batch axis 0"),
    ({"states": (State("h", "next_h", (2, 1)),)}, "its contract has state 'h' as float32 [2, 1]"),
    ({"states": (State("h", "next_h", (2,), dtype="float64"),)}, "its contract has state 'h' as float64 [2]"),
    ({"states": (State("h", "next_h", (2,), batch_axis=1),)}, "the batch axis of 'h' is fixed at 2"),
    ({"input_dtype": "float64"}, "its contract has 2 features of float64, its input 'x' is float32"),
    ({"outputs": (Output("y", batch_axis=2),)}, "cannot step 2 streams at once"),
    ({"outputs": (Output("y", role="score"),)}, "output 'y' is float32 [2, 2] for 2 streams, it must be [2]"),
    ({"outputs": (Output("y", role="prediction", features=("a",)),)}, "it must be [2, 1]"),
]


@pytest.mark.parametrize(("change", "sentence"), AT_ODDS, ids=[sentence for _, sentence in AT_ODDS])
def test_a_contract_at_odds_with_its_graph_is_refused(change: dict[str, Any], sentence: str) -> None:
    """Names, shapes, dtypes, axes and the shapes that roles ask for are held against what the graph is."""
    assert sentence in refused(stamped(smoother(), smoother_contract(**change)))


def test_a_contract_of_another_version_is_refused_with_its_file() -> None:
    """A model of a later release is not run by guesswork: the sentence names the file, the version, the way out."""
    model = smoother()
    document = json.loads(smoother_contract().to_json()) | {"version": 2}
    onnx.helper.set_model_props(model, {"statestep.contract": json.dumps(document)})
    assert "has version 2, this release reads version 1: upgrade statestep" in refused(model.SerializeToString())


def test_a_step_keeps_nothing_and_writes_into_nothing() -> None:
    """The same call gives the same bits again, and the arrays that went in are as they were."""
    model = StepModel(detector())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2)).astype(np.float32)
    states = [np.stack([value] * 3) for value in model.initial_states()]
    for array in (x, *states):
        array.setflags(write=False)
    first, again = model.step(x, states), model.step(x, states)
    for (outputs, following), (outputs2, following2) in ((first, again),):
        assert {n: v.tobytes() for n, v in outputs.items()} == {n: v.tobytes() for n, v in outputs2.items()}
        assert [v.tobytes() for v in following] == [v.tobytes() for v in following2]


def test_a_rows_bits_do_not_depend_on_its_batch() -> None:
    """Stepped alone or among others, in any order and memory layout, a row gives the same bits."""
    model = StepModel(detector())
    rng = np.random.default_rng(2)
    rows = 37
    x = rng.normal(size=(rows, 2)).astype(np.float32)
    states = [
        rng.normal(size=(rows, *v.shape)).astype(v.dtype) if v.dtype.kind == "f" else np.stack([v] * rows)
        for v in model.initial_states()
    ]
    outputs, following = model.step(x, states)
    turned, _ = model.step(np.asfortranarray(x)[::-1], [np.asfortranarray(v)[::-1] for v in states])
    for name, value in outputs.items():
        assert turned[name][::-1].tobytes() == value.tobytes()
    for row in range(rows):
        alone, next_alone = model.step(x[row : row + 1], [v[row : row + 1] for v in states])
        assert all(alone[name][0].tobytes() == value[row].tobytes() for name, value in outputs.items())
        assert all(a[0].tobytes() == v[row].tobytes() for a, v in zip(next_alone, following, strict=True))


def test_two_models_of_one_file_have_one_fingerprint() -> None:
    """The fingerprint is the SHA-256 of the bytes, and nothing else."""
    data = detector()
    assert StepModel(data).fingerprint == StepModel(data, name="other").fingerprint == hashlib.sha256(data).hexdigest()
