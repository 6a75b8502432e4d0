"""What a model file may not hold: each refusal is one sentence, made before onnxruntime has seen the file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from statestep.runtime import ModelError, StepModel, guard, tensors
from statestep.runtime.operators import OPERATORS, RANDOM, reason_against

from ..models import detector, smoother, smoother_contract, stamped

Change = Callable[[ModelProto], object]

NOBODY = [helper.make_tensor_value_info("k", TensorProto.FLOAT, None)]
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]


def refused(change: Change) -> str:
    """The sentence with which a smoother is refused once it has been changed; it begins with the file's name."""
    model = smoother()
    change(model)
    with pytest.raises(ModelError) as error:
        guard.parse(stamped(model, smoother_contract()), "m.onnx")
    sentence = str(error.value)
    assert sentence.isprintable()
    assert sentence.startswith("m.onnx: ")
    return sentence.removeprefix("m.onnx: ")


def node(operator: str, *inputs: str, domain: str = "", **attributes: Any) -> Change:
    """Adds a node that gives "k"."""
    return lambda model: model.graph.node.append(
        helper.make_node(operator, list(inputs or ("x",)), ["k"], domain=domain, **attributes)
    )


def weight(dims: list[int], data_type: int = TensorProto.FLOAT, **content: object) -> Change:
    """Adds an initialiser "w" as it is told, whether that makes sense or not."""
    tensor = TensorProto(name="w", data_type=data_type, dims=dims, **content)  # type: ignore[arg-type]
    return lambda model: model.graph.initializer.append(tensor)


def attribute(held: AttributeProto) -> Change:
    """Adds a Constant with one attribute."""
    return lambda model: model.graph.node.append(NodeProto(op_type="Constant", output=["k"], attribute=[held]))


def declared(info: onnx.ValueInfoProto) -> Change:
    return lambda model: model.graph.value_info.append(info)


def sparse(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.array([1.0], np.float32), "w")
    indices = numpy_helper.from_array(np.array([0], np.int64), "i")
    model.graph.sparse_initializer.append(onnx.SparseTensorProto(values=values, indices=indices, dims=[10**12]))


def function(*calls: str, name: str = "F", domain: str = "own") -> onnx.FunctionProto:
    """A function that calls others, one after another."""
    nodes = [helper.make_node(call, ["a"], ["b"], domain="" if call in OPERATORS else "own") for call in calls]
    return helper.make_function(domain, name, ["a"], ["b"], nodes, OPSETS)


def functions(*held: onnx.FunctionProto) -> Change:
    return lambda model: model.functions.extend(held)


def doubling(model: ModelProto) -> None:
    """Thirty functions, each of which calls the next one twice: a billion nodes in two kilobytes."""
    model.functions.extend(function(*[f"F{level + 1}"] * 2, name=f"F{level}") for level in range(30))
    model.functions.append(function("Relu", name="F30"))
    node("F0", domain="own")(model)


def nested(depth: int) -> Change:
    """A branch in a branch in a branch."""
    inner = helper.make_node("Identity", ["x"], ["k"])
    for _ in range(depth):
        branch = helper.make_graph([inner], "branch", [], NOBODY)
        inner = helper.make_node("If", ["c"], ["k"], then_branch=branch)
    return lambda model: model.graph.node.append(inner)


def opset(version: int) -> Change:
    return lambda model: model.opset_import[0].CopyFrom(helper.make_opsetid("", version))


def in_training(model: ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    node("Dropout", "x", "", "yes")(model)


def counting(model: ModelProto) -> None:
    """A Loop whose number of turns is a tensor without elements."""
    model.graph.initializer.append(numpy_helper.from_array(np.empty(0, np.int64), "turns"))
    body = helper.make_graph([helper.make_node("Identity", ["go"], ["go_on"])], "body", [], [])
    node("Loop", "turns", body=body)(model)


def branching(model: ModelProto) -> None:
    """An If in an If, whose condition is a constant without elements of the graph around."""
    none = numpy_helper.from_array(np.empty(0, np.bool_))
    model.graph.node.append(helper.make_node("Constant", [], ["none"], value=none))
    inner = helper.make_node("If", ["none"], ["k"], then_branch=helper.make_graph([], "then", [], []))
    node("If", "h", then_branch=helper.make_graph([inner], "outer", [], []))(model)


def addressed(model: ModelProto) -> None:
    """onnxruntime's own tag for weights that lie in memory: the offset is an address."""
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "4096"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)


REFUSED: dict[str, tuple[Change, str]] = {
    "custom domain": (node("Gelu", domain="com.microsoft"), "uses the operator 'Gelu' of 'com.microsoft'"),
    "python": (node("PyOp", domain="pyopmulti_1"), "only ONNX's own operators are run"),
    "unknown": (node("Nonsense"), "uses the operator 'Nonsense', which is not one that a step model may use"),
    "image": (node("ImageDecoder"), "uses the operator 'ImageDecoder', which is not one"),
    "text": (node("RegexFullMatch"), "uses the operator 'RegexFullMatch', which is not one"),
    "random": (node("RandomNormal"), "draws random numbers, so that no two runs agree"),
    "bernoulli": (node("Bernoulli"), "draws random numbers"),
    "quantised": (node("DynamicQuantizeLinear"), "one activation scale for the whole batch, so that a row's result"),
    "quantised lstm": (node("DynamicQuantizeLSTM", domain="com.microsoft"), "by convert --weights fp16"),
    "integers": (node("MatMulInteger"), "depends on its batch-mates"),
    "dropout computed": (node("Dropout", "x", "", "flag"), "uses Dropout in training mode, which draws random numbers"),
    "dropout": (in_training, "uses Dropout in training mode"),
    "batch statistics": (node("BatchNormalization", training_mode=1), "where a row depends on its batch-mates"),
    "absent input": (node("Min", "x", ""), "leaves out one of the inputs of the operator 'Min', which must be there"),
    "absent output": (
        lambda model: model.graph.node.append(helper.make_node("Split", ["x"], ["", "k"], num_outputs=2, axis=1)),
        "leaves out one of the outputs of the operator 'Split'",
    ),
    "empty condition": (counting, "gives the operator 'Loop' no single number in 'turns'"),
    "empty constant": (branching, "gives the operator 'If' no single number in 'none'"),
    "address": (addressed, "keeps weight 'w' outside the file"),
    "sparse": (sparse, "holds the sparse weight 'w'; store it dense"),
    "sparse attribute": (
        attribute(AttributeProto(name="sparse_value", type=AttributeProto.SPARSE_TENSOR, sparse_tensor={"dims": [9]})),
        "holds the sparse weight",
    ),
    "attribute's kind": (
        attribute(AttributeProto(name="tp", type=AttributeProto.TYPE_PROTO)),
        "holds the attribute 'tp' of a kind that no operator takes",
    ),
    "attribute without kind": (attribute(AttributeProto(name="value")), "holds the attribute 'value' of a kind"),
    "too few bytes": (weight([2], raw_data=b"1234"), "holds the weight 'w' with other bytes than its shape [2] says"),
    "too many": (weight([1], raw_data=b"12345678"), "other bytes than its shape [1] says; was the file damaged?"),
    "none": (weight([3]), "other bytes than its shape [3] says"),
    "wrong field": (weight([1], int32_data=[1]), "other bytes than its shape [1] says"),
    "two fields": (weight([1], raw_data=b"1234", float_data=[1.0]), "other bytes than its shape"),
    "part of a tensor": (weight([1], float_data=[1.0], segment={"begin": 0, "end": 9}), "other bytes than its shape"),
    "below zero": (
        weight([-1], raw_data=b""),
        "holds weight 'w' of the shape [-1]; a tensor may have 0 to 1,073,741,824 elements",
    ),
    "huge": (weight([2**40, 0], raw_data=b""), f"holds weight 'w' of the shape [{2**40}, 0]"),
    "many axes": (weight([1] * 17, float_data=[1.0]), "holds weight 'w' with 17 axes, 16 are allowed"),
    "strings": (weight([1], TensorProto.STRING, string_data=[b"a"]), "holds the weight 'w' of type STRING"),
    "no such type": (weight([1], 99, raw_data=b"1"), "holds the weight 'w' of type 99, which no step model needs"),
    "huge value": (
        declared(helper.make_tensor_value_info("k", 1, ["T", 2**20, 2**20])),
        "holds 'k' of the shape [0, 1048576, 1048576]; a tensor may have",
    ),
    "value's type": (declared(helper.make_tensor_value_info("k", TensorProto.STRING, [1])), "declares 'k' of a type"),
    "optional": (
        declared(helper.make_value_info("k", helper.make_optional_type_proto(helper.make_tensor_type_proto(1, [])))),
        "declares 'k' as no tensor",
    ),
    "old": (opset(6), "asks for version 6 of ONNX's operators, 7 is the oldest that is run"),
    "below all": (opset(-1), "asks for version -1 of ONNX's operators"),
    "no version": (lambda model: model.ClearField("opset_import"), "does not say which version of ONNX's operators"),
    "training": (lambda model: model.training_info.add(), "holds a training graph; export it for inference"),
    "deep": (nested(8), "has graphs nested 9 deep, 8 are allowed"),
    "recursive": (functions(function("F")), "holds the function 'F', which calls itself"),
    "in a circle": (functions(function("G"), function("F", name="G")), "calls itself"),
    "two of a name": (functions(function("Relu"), function("Tanh")), "holds two functions of one name"),
    "in disguise": (
        functions(function("Tanh", name="Relu", domain="")),
        "holds a function in the place of ONNX's own operator 'Relu'",
    ),
    "doubling": (doubling, "has 1,073,741,827 nodes, a model may have 100,000"),
    "in a function": (functions(function("Nonsense", name="F")), "uses the operator 'Nonsense' of 'own'"),
    "steers": (node("\x1b[2J\n" * 999), r"uses the operator '\x1b[2J\n\x1b[2J\n"),
}


@pytest.mark.parametrize(("change", "sentence"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused(change: Change, sentence: str) -> None:
    """Each thing that a file may not hold, with what it is and, where there is one, the way out."""
    found = refused(change)
    assert sentence in found
    assert len(found) < 400


def test_functions_of_the_files_own_are_run() -> None:
    """Exporters write them: they are allowed where all that they come to is allowed, and do what they say."""
    model = smoother()
    model.functions.append(function("G"))
    inner = helper.make_node("Neg", ["a"], ["b"])
    model.functions.append(helper.make_function("own", "G", ["a"], ["b"], [inner], OPSETS))
    model.opset_import.append(OPSETS[1])
    model.graph.node[1].input[1] = "turned"
    model.graph.node.insert(0, helper.make_node("F", ["x"], ["turned"], domain="own"))
    step = StepModel(stamped(model, smoother_contract()))
    outputs, _ = step.step(np.array([[1, 2]], np.float32), [np.zeros((1, 2), np.float32)])
    assert outputs["y"].tolist() == [[-1, -2]]


def test_what_exporters_write_and_nobody_runs_is_passed_by() -> None:
    """An operator set that no node uses (tf2onnx names one in every file), a Dropout and a norm that only infer."""
    model = smoother()
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 2))
    model.graph.initializer.append(numpy_helper.from_array(np.array(False), "no"))
    node("Dropout", "x", "", "no")(model)
    assert guard.parse(stamped(model, smoother_contract())).graph.node[-1].op_type == "Dropout"


def test_shapes_that_contradict_each_other_around_a_loop_are_refused() -> None:
    """onnxruntime trusts the rank that a Scan's body declares: a wrong one ends the process by a signal."""
    body = helper.make_graph(
        [helper.make_node("Add", ["carried", "row"], ["next"]), helper.make_node("Identity", ["next"], ["out"])],
        "body",
        [helper.make_tensor_value_info(name, 1, shape) for name, shape in (("carried", [2, 2, 2]), ("row", [2]))],
        [helper.make_tensor_value_info(name, 1, [2, 2, 2]) for name in ("next", "out")],
    )
    scan = helper.make_node("Scan", ["half", "x"], ["last", "all"], body=body, num_scan_inputs=1)
    assert "has shapes that contradict each other" in refused(lambda model: model.graph.node.append(scan))


def test_a_file_of_another_kind_in_disguise_is_read_as_what_was_checked() -> None:
    """onnxruntime tells its own format by bytes 4 to 8, which an ONNX file can have as well."""
    model = smoother()
    model.ClearField("ir_version")
    stamped(model, smoother_contract())
    model.ClearField("producer_name")
    disguised = b"\x12\x06xxORTM" + model.SerializeToString() + b"\x08\x08"  # producer, the graph, the IR version
    assert disguised[4:8] == b"ORTM"
    assert guard.parse(disguised).producer_name == "xxORTM"
    assert StepModel(disguised).contract.name == "smoother"


def test_protobuf_nested_without_end_is_no_crash() -> None:
    """Messages in messages, deeper than any parser's stack: told to be no ONNX file."""
    data = b""
    for tag in (b"\x0a", b"\x32", b"\x2a") * 5_000:  # a node in a graph in an attribute in a node
        data = tag + _varint(len(data)) + data
    with pytest.raises(ModelError, match="is not an ONNX file"):
        guard.parse(b"\x3a" + _varint(len(data)) + data)


def test_a_name_that_is_not_utf_8_is_refused() -> None:
    """protobuf hands it on as bytes, which nothing that looks at names expects."""
    data = stamped(smoother(), smoother_contract()).replace(b"kept", b"\xff\xfept")
    with pytest.raises(ModelError, match=r"holds a name that is not UTF-8, b'\\xff\\xfept'; was the file damaged"):
        guard.parse(data)


def _varint(number: int) -> bytes:
    done = bytearray()
    while number > 127:
        done.append(number & 127 | 128)
        number >>= 7
    return bytes([*done, number])


def test_a_file_is_read_once_and_held_to_its_pin(tmp_path: Path) -> None:
    """The SHA-256 in any case of letters lets it pass; another is told with both."""
    path = tmp_path / "m.onnx"
    path.write_bytes(data := detector())
    digest = hashlib.sha256(data).hexdigest()
    assert guard.read(path) == guard.read(path, digest) == guard.read(path, digest.upper()) == data
    with pytest.raises(ModelError) as error:
        guard.read(path, "0" * 64)
    assert str(error.value) == (
        f"{path}: has the SHA-256 {digest}, yet {'0' * 64} is pinned; "
        "put the pinned file back, or pin this one if the change is meant"
    )


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    """A sparse file of a gibibyte and a byte takes no memory, nor does a device without an end."""
    path = tmp_path / "m.onnx"
    with path.open("wb") as file:
        file.truncate(guard.MAX_BYTES + 1)
    with pytest.raises(ModelError, match=r"has 1,073,741,825 bytes, a model may have 1,073,741,824"):
        guard.read(path)


def test_the_operators_are_onnxs_and_are_not_refused_elsewhere() -> None:
    """Each that is allowed exists under that name, and none of them is random or quantised as it runs."""
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    old = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    assert old >= OPERATORS
    assert len(OPERATORS & known) > 140
    assert not [operator for operator in OPERATORS if reason_against(operator)]
    assert known >= RANDOM


@pytest.mark.parametrize("element", sorted(tensors.ELEMENTS))
@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 1, 2)])
def test_weights_of_every_type_and_shape_are_taken(element: int, raw: bool, shape: tuple[int, ...]) -> None:
    """Raw or in its type's own field, a scalar, without elements, with several axes."""
    values = [1] * math.prod(shape)
    content = np.ones(shape, helper.tensor_dtype_to_np_dtype(element)).tobytes() if raw else values
    tensor = helper.make_tensor("w", element, shape, content, raw=raw)
    model = smoother()
    model.graph.initializer.append(tensor)
    assert guard.parse(stamped(model, smoother_contract())).graph.initializer[-1].name == "w"
