"""Graphs that are odd in their sizes, names and inputs, written by hand: each converts right or is refused."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx

from .conversions import Case
from .graphs_loops import loop_over_layers
from .net import FEATURES, OUT, UNITS, Net, X, Y, body_of

Axis = int | str | None


def sized(
    features: int = FEATURES,
    units: int = UNITS,
    steps: Axis = "T",
    streams: Axis = "B",
    *,
    batch_first: bool = False,
    last: bool = False,
    operator: str = "LSTM",
) -> bytes:
    """A recurrent layer and a head, of the sizes told."""
    net = Net()
    x = net.add("Transpose", "x", perm=[1, 0, 2]) if batch_first else "x"
    y, h, *_ = net.recurrent(operator, x, features, units)
    rows = net.add("Squeeze", h, net.constant([0])) if last else net.rows(y)
    if batch_first and not last:
        rows = net.add("Transpose", rows, perm=[1, 0, 2])
    net.head(rows, units)
    front = [streams, steps] if batch_first else [steps, streams]
    return net.model({"x": (*front, features)}, {"y": (streams, OUT) if last else (*front, OUT)})


def rewritten(change: Any, **settings: Any) -> bytes:
    """`sized`, then changed in place."""
    model = onnx.load_model_from_string(sized(**settings))
    change(model)
    return bytes(model.SerializeToString())


def without_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = ""


def as_before_ir4(model: onnx.ModelProto) -> None:
    """Weights are listed among the inputs."""
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def with_wrong_output(model: onnx.ModelProto) -> None:
    """The output's declared axes are in another order than it has."""
    shape = model.graph.output[0].type.tensor_type.shape
    for dim, size in zip(shape.dim, ("B", "T", ""), strict=True):
        dim.Clear()
        dim.dim_param = size


def with_open_width(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[2].Clear()


def renamed(names: dict[str, str]) -> Any:
    """Tensors under other names."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for tensors in (node.input, node.output):
                for place, name in enumerate(tensors):
                    tensors[place] = names.get(name, name)
        for value in (*model.graph.input, *model.graph.output):
            value.name = names.get(value.name, value.name)

    return change


def constant_output() -> bytes:
    """Beside its answers the graph gives a table that has no row for any stream."""
    net = Net()
    y, *_ = net.recurrent("LSTM", "x")
    net.head(net.rows(y))
    net.add("Identity", net.weight(5), out="table")
    return net.model(X, {**Y, "table": (5,)})


def total_output() -> bytes:
    """Beside its answers the graph gives one number for all of them."""
    net = Net()
    y, *_ = net.recurrent("LSTM", "x")
    net.add("ReduceMean", net.head(net.rows(y)), keepdims=0, out="loss")
    return net.model(X, {**Y, "loss": ()})


def readings_as_output() -> bytes:
    """The readings themselves are an output, under another name."""
    net = Net()
    y, *_ = net.recurrent("LSTM", "x")
    net.head(net.rows(y))
    net.add("Identity", "x", out="seen")
    return net.model(X, {**Y, "seen": ("T", "B", FEATURES)})


def state_as_output() -> bytes:
    """The last hidden state, once a layer, is all that is given."""
    net = Net()
    net.recurrent("LSTM", "x")
    net.nodes[0].output[1] = "h"
    return net.model(X, {"h": (1, "B", UNITS)})


def unbatched() -> bytes:
    """[T, F], for one stream: the graph makes its own batch of one."""
    net = Net()
    y, *_ = net.recurrent("LSTM", net.add("Unsqueeze", "x", net.constant([1])))
    net.head(net.add("Squeeze", y, net.constant([1, 2])))
    return net.model({"x": ("T", FEATURES)}, {"y": ("T", OUT)})


def images() -> bytes:
    """[B, T, 2, 3]."""
    net = Net()
    y, *_ = net.recurrent(
        "LSTM", net.add("Transpose", net.add("Reshape", "x", net.constant([0, 0, 6])), perm=[1, 0, 2]), 6
    )
    net.head(net.rows(y))
    return net.model({"x": ("B", "T", 2, 3)})


def one_column(dtype: str = "float32") -> bytes:
    """[B, T] of numbers."""
    net = Net()
    column = net.add("Transpose", net.add("Unsqueeze", net.cast("x", "float32"), net.constant([2])), perm=[1, 0, 2])
    y, *_ = net.recurrent("LSTM", column, 1)
    net.head(net.rows(y))
    return net.model({"x": (dtype, ("B", "T"))})


def inside_an_if(both: bool = True) -> bytes:
    """An LSTM in the branches of an If."""
    net = Net()
    parts = {}
    for key in ("then_branch", "else_branch"):
        inside = body_of(net)
        y, *_ = inside.recurrent("LSTM", "x")
        inside.add("Identity", y, out=key)
        parts[key] = inside.graph(key, {}, {key: ("T", 1, "B", UNITS)}, inner=True)
    some = net.add("Greater", net.add("Shape", "x", end=1), net.constant([0]))
    y = net.add("If", some, **parts)
    net.head(net.rows(y))
    return net.model()


def fixed_states() -> bytes:
    """Readings of one stream over ten timesteps, and states of one stream: nothing is free."""
    net = Net()
    y, h, c = net.recurrent("LSTM", "x", initial=["h0", "c0"])
    net.head(net.rows(y))
    net.add("Identity", h, out="hn")
    net.add("Identity", c, out="cn")
    state = (1, 1, UNITS)
    return net.model({"x": (10, 1, FEATURES), "h0": state, "c0": state}, {"y": (10, 1, OUT), "hn": state, "cn": state})


def thirty_seven_layers() -> bytes:
    """A Loop of as many rounds as a trial run has timesteps, and not along time."""
    return loop_over_layers(37)


def of_a_function() -> bytes:
    """A local function around the head."""
    model = onnx.load_model_from_string(sized())
    head = [model.graph.node[-2], model.graph.node[-1]]
    function = onnx.helper.make_function(
        "own",
        "Head",
        [head[0].input[0], head[0].input[1], head[1].input[1]],
        ["y"],
        head,
        [onnx.helper.make_opsetid("", 18)],
    )
    call = onnx.helper.make_node("Head", list(function.input), ["y"], name="head", domain="own")
    del model.graph.node[-2:]
    model.graph.node.append(call)
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid("own", 1))
    return bytes(model.SerializeToString())


def with_readings_as_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(model.graph.input[0])


def with_output_twice(model: onnx.ModelProto) -> None:
    model.graph.output.append(model.graph.output[0])


def without_output(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


def without_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.ClearField("shape")


def with_a_gap(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[1] = "nowhere"


def in_another_float(dtype: Any, kind: int) -> Any:
    """All of the graph in another kind of float."""

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                value = onnx.numpy_helper.to_array(tensor).astype(dtype)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = kind

    return change


def quantised(operator: str) -> bytes:
    """The readings are quantised as the graph runs."""
    net = Net()
    small, scale, zero = net.many("DynamicQuantizeLinear", "x", count=3)
    if operator == "MatMulInteger":
        weights = net.constant(np.arange(12).reshape(3, 4), "int32")
        whole = net.add("MatMulInteger", small, net.add("Cast", weights, to=onnx.TensorProto.UINT8), zero)
        z = net.add("Mul", net.cast(whole, "float32"), scale)
        y, *_ = net.recurrent("LSTM", z, 4)
    else:
        y, *_ = net.recurrent("LSTM", net.add("DequantizeLinear", small, scale, zero))
    net.head(net.rows(y))
    return net.model()


def _case(name: str, what: str, graph: Any, *arguments: Any, **settings: Any) -> Case:
    kept = {key: settings.pop(key) for key in ("inputs", "outputs", "refused", "settings", "batch") if key in settings}
    return Case(f"hand_{name}", what, partial(graph, *arguments, **settings), **kept)


BTF: dict[str, Any] = {"inputs": {"x": "BTF"}, "outputs": {"y": "BTO"}, "batch_first": True}
CASES = [
    _case("wide37", "37 features, 3 units", sized, 37, 3),
    _case("wide3", "3 features, 37 units", sized, 3, 37, **BTF),
    _case("wide41", "41 features, 4 units", sized, 41, 4),
    _case("wide4", "4 features, 41 units, the last row", sized, 4, 41, last=True, outputs={"y": "BO"}),
    _case("steps_are_units", "5 timesteps, 5 units, 5 features", sized, 5, 5, 5, **BTF),
    _case("all_alike", "4 timesteps of 4 streams, 4 features, 4 units", sized, 4, 4, 4, 4, **BTF),
    _case("steps37", "fixed at 37 timesteps", sized, steps=37),
    _case("steps2000", "fixed at 2,000 timesteps", sized, steps=2000),
    _case("steps1", "fixed at one timestep", sized, steps=1, refused="fixed at one timestep", **BTF),
    _case("streams3", "fixed at 3 streams", sized, streams=3),
    _case("streams1", "fixed at one stream", sized, streams=1, last=True, outputs={"y": "BO"}),
    _case(
        "fixed_states",
        "one stream of ten timesteps, with its states",
        fixed_states,
        inputs={"x": "TBF", "h0": "DBH", "c0": "DBH"},
        outputs={"y": "TBO", "hn": "DBH", "cn": "DBH"},
    ),
    _case("names_swapped", "axes called time and batch the wrong way round", sized, steps="batch", streams="time"),
    _case("names_alike", "both axes under one name", sized, steps="n", streams="n"),
    _case("names_none", "axes without names", sized, steps=None, streams=None),
    _case("names_odd", "axes called ? and -1", sized, steps="?", streams="-1"),
    _case("open_width", "readings of any width", rewritten, with_open_width, refused="how many readings"),
    _case("unnamed", "nodes without names", rewritten, without_names),
    _case("ir3", "weights among the inputs, as before IR 4", rewritten, as_before_ir4),
    _case("misdeclared", "output declared in another order of axes", rewritten, with_wrong_output),
    _case(
        "called_x",
        "output called x, input called y",
        rewritten,
        renamed({"x": "y", "y": "x"}),
        inputs={"y": "TBF"},
        outputs={"x": "TBO"},
    ),
    _case(
        "called_h0",
        "input called hn, output called h0",
        rewritten,
        renamed({"x": "hn", "y": "h0"}),
        inputs={"hn": "TBF"},
        outputs={"h0": "TBO"},
    ),
    _case(
        "called_paths",
        "names with / and :",
        rewritten,
        renamed({"x": "serving/x:0", "y": "StatefulCall/y:0"}),
        inputs={"serving/x:0": "TBF"},
        outputs={"StatefulCall/y:0": "TBO"},
    ),
    _case("constant_output", "an output that is a constant", constant_output, refused="output 'table'"),
    _case("total_output", "an output over all rows", total_output, refused="output 'loss'"),
    _case("readings_output", "the readings as an output", readings_as_output, outputs={"y": "TBO", "seen": "TBF"}),
    _case("state_output", "the last state as the only output", state_as_output, outputs={"h": "DBH"}),
    _case("unbatched", "[T, F], of one stream", unbatched, refused="where it is [time, feature]"),
    _case("images", "[B, T, 2, 3]", images, refused="input 'x'"),
    _case("column", "[B, T] of numbers", one_column, inputs={"x": "BT"}),
    _case("column64", "[B, T] of numbers in float64", one_column, "float64", inputs={"x": "BT"}),
    _case("if", "LSTM in the branches of an If", inside_an_if),
    _case("loop37", "Loop of 37 rounds, not along time", thirty_seven_layers),
    _case(
        "output_is_input",
        "the readings listed among the outputs",
        rewritten,
        with_readings_as_output,
        refused="is an input too",
    ),
    _case("output_twice", "an output that is listed twice", rewritten, with_output_twice, refused="listed twice"),
    _case("no_output", "no output", rewritten, without_output, refused="no output"),
    _case("no_shape", "an input of unknown shape", rewritten, without_shape, refused="does not say its shape"),
    _case(
        "float16",
        "all in float16",
        rewritten,
        in_another_float(np.float16, onnx.TensorProto.FLOAT16),
        refused="computes in float16",
    ),
    _case("function", "a local function", of_a_function),
    _case("quantised", "DynamicQuantizeLinear", quantised, "", refused="quantises as it runs"),
    _case("quantised_product", "MatMulInteger", quantised, "MatMulInteger", refused="quantises as it runs"),
]

# What is said of these is in part onnxruntime's, in other words from release to release: no table has them.
UNRUNNABLE = [
    _case("gap", "a node that reads what nothing gives", rewritten, with_a_gap, refused="onnxruntime cannot load"),
    _case(
        "double",
        "all in float64",
        rewritten,
        in_another_float(np.float64, onnx.TensorProto.DOUBLE),
        refused="export it in float32",
    ),
]
