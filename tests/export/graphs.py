"""Graphs with recurrent operators, written by hand: every attribute, and every way in which states come in."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .conversions import Case
from .net import FEATURES, OUT, UNITS, Net, X, Y

STATE = (1, "B", UNITS)
PIECEWISE = ["HardSigmoid", "Softsign", "Relu"]  # of an LSTM, in place of a sigmoid and two tanh


def one_layer(operator: str, **settings: Any) -> bytes:
    """One recurrent layer and a dense head at every timestep."""
    net = Net(opset=settings.pop("opset", 18))
    y, *_ = net.recurrent(operator, "x", **settings)
    net.head(net.rows(y))
    return net.model()


def two_layers(first: str, second: str) -> bytes:
    """One recurrent layer over another."""
    net = Net()
    low, *_ = net.recurrent(first, "x")
    high, *_ = net.recurrent(second, net.rows(low), UNITS)
    net.head(net.rows(high))
    return net.model()


def begins_at(value: float | None, operator: str = "LSTM") -> bytes:
    """States that begin at a constant, repeated for every stream; at random numbers where `value` is None."""
    net = Net()
    sizes = net.add("Concat", net.constant([1]), net.size("x", 1), net.constant([UNITS]), axis=0)
    starts = []
    for _ in range(1 + (operator == "LSTM")):
        one = net.weight(1, 1, UNITS) if value is None else net.constant(np.full((1, 1, UNITS), value), "float32")
        starts.append(net.add("Expand", one, sizes))
    y, *_ = net.recurrent(operator, "x", initial=starts)
    net.head(net.rows(y))
    return net.model()


def begins_at_readings() -> bytes:
    """A state that begins at the first row of the readings."""
    net = Net()
    first = net.add("Slice", "x", net.constant([0]), net.constant([1]), net.constant([0]))
    y, *_ = net.recurrent("GRU", "x", units=FEATURES, initial=[first])
    net.head(net.rows(y), FEATURES)
    return net.model()


def begins_unlike() -> bytes:
    """A batch of two whose streams begin in two states."""
    net = Net()
    y, *_ = net.recurrent("GRU", "x", initial=[net.weight(1, 2, UNITS)])
    net.head(net.rows(y))
    return net.model({"x": ("T", 2, FEATURES)})


def states_outside(*, given_back: bool, opset: int = 18) -> bytes:
    """States that are inputs of the graph, and outputs or not."""
    net, outputs = Net(opset=opset), dict(Y)
    y, h, c = net.recurrent("LSTM", "x", initial=["h0", "c0"])
    net.head(net.rows(y))
    if given_back:
        net.add("Identity", h, out="hn")
        net.add("Identity", c, out="cn")
        outputs |= {"hn": STATE, "cn": STATE}
    return net.model({**X, "h0": STATE, "c0": STATE}, outputs)


def lengths(*, outside: bool) -> bytes:
    """The lengths of the sequences: an input, or the whole length for every stream."""
    net, name = Net(), "lengths"
    inputs: dict[str, Any] = dict(X)
    if outside:
        inputs["lengths"] = ("int32", ("B",))
    else:
        name = net.add("Expand", net.cast(net.size("x", 0), "int32"), net.size("x", 1))
    y, *_ = net.recurrent("GRU", "x", lengths=name)
    net.head(net.rows(y))
    return net.model(inputs)


def lengths_of_readings() -> bytes:
    """Lengths that are counted from the readings: until the first column is zero for good."""
    net = Net()
    column = net.add("Gather", "x", net.constant(0), axis=2)
    there = net.cast(net.add("Greater", column, net.constant(0.0, "float32")), "int32")
    y, *_ = net.recurrent("GRU", "x", lengths=net.add("ReduceSum", there, net.constant([0]), keepdims=0))
    net.head(net.rows(y))
    return net.model()


def both_directions() -> bytes:
    """A bidirectional LSTM."""
    net = Net()
    y, *_ = net.recurrent("LSTM", "x", directions=2, direction="bidirectional")
    joined = net.add("Reshape", net.add("Transpose", y, perm=[0, 2, 1, 3]), net.constant([0, 0, 2 * UNITS]))
    net.head(joined, 2 * UNITS)
    return net.model()


def batch_first_operator() -> bytes:
    """ONNX's layout 1, which onnxruntime does not run."""
    net = Net()
    y, *_ = net.recurrent("GRU", "x", layout=1)
    net.head(net.add("Squeeze", y, net.constant([2])))
    return net.model({"x": ("B", "T", FEATURES)}, {"y": ("B", "T", OUT)})


def along_the_batch() -> bytes:
    """An LSTM that was given [batch, time, feature] where it takes [time, batch, feature]; told so by the names."""
    net = Net()
    y, *_ = net.recurrent("LSTM", "x")
    net.head(net.rows(y))
    return net.model({"x": ("batch", "time", FEATURES)}, {"y": ("batch", "time", OUT)})


def two_inputs() -> bytes:
    """Two inputs of readings, one of them float64 and without a feature axis."""
    net = Net()
    column = net.add("Unsqueeze", net.cast("load", "float32"), net.constant([2]))
    y, *_ = net.recurrent("GRU", net.add("Concat", "x", column, axis=2), FEATURES + 1)
    net.head(net.rows(y))
    return net.model({**X, "load": ("float64", ("T", "B"))})


def two_axes_orders() -> bytes:
    """Two inputs, one batch first and one time first."""
    net = Net()
    y, *_ = net.recurrent(
        "GRU", net.add("Concat", net.add("Transpose", "x", perm=[1, 0, 2]), "z", axis=2), FEATURES + 2
    )
    net.head(net.rows(y))
    return net.model({"x": ("B", "T", FEATURES), "z": ("T", "B", 2)})


def in_float64() -> bytes:
    """Readings and heads in float64 around an LSTM in float32."""
    net = Net()
    y, *_ = net.recurrent("LSTM", net.cast("x", "float32"))
    wide = net.cast(net.rows(y), "float64")
    net.add("MatMul", wide, net.weight(UNITS, OUT, dtype="float64"), out="y")
    return net.model({"x": ("float64", ("T", "B", FEATURES))}, {"y": ("float64", ("T", "B", OUT))})


def tokens() -> bytes:
    """An embedding of whole numbers."""
    net = Net()
    y, *_ = net.recurrent("GRU", net.add("Gather", net.weight(7, FEATURES), "x"))
    net.head(net.rows(y))
    return net.model({"x": ("int64", ("T", "B"))})


def residual() -> bytes:
    """LayerNormalization, LSTM, a residual sum, and the readings themselves beside it."""
    net = Net()
    z = net.add("LayerNormalization", net.head("x", FEATURES, UNITS, None), net.weight(UNITS), net.weight(UNITS))
    y, *_ = net.recurrent("LSTM", z, UNITS)
    both = net.add("Concat", net.add("Add", net.rows(y), z), "x", axis=-1)
    net.head(both, UNITS + FEATURES)
    return net.model()


def bent(operator: str) -> bytes:
    """A head through an operator whose vector code rounds otherwise than its scalar code."""
    net = Net()
    y, *_ = net.recurrent("GRU", "x")
    low = net.head(net.rows(y), out=None)
    net.add(operator, net.add("Add", net.add("Abs", low), net.constant(0.1, "float32")), out="y")
    return net.model()


def heads() -> bytes:
    """One head a timestep, one for the last, one of all rows side by side, one of whole numbers, and a flag."""
    net = Net()
    y, h, _ = net.recurrent("LSTM", "x")
    every = net.head(net.rows(y))
    net.head(net.add("Squeeze", h, net.constant([0])), out="last")
    net.add("Reshape", every, net.constant([-1, OUT]), out="flat")
    net.add("ArgMax", every, axis=2, keepdims=0, out="kind")
    net.add("Greater", every, net.constant(0.0, "float32"), out="high")
    return net.model(
        X,
        {
            **Y,
            "last": ("B", OUT),
            "flat": (None, OUT),
            "kind": ("int64", ("T", "B")),
            "high": ("bool", ("T", "B", OUT)),
        },
    )


def regrouped(*, flat: bool) -> bytes:
    """Units in two groups for a while, beside the streams or beside streams and timesteps, and back."""
    net = Net()
    y, *_ = net.recurrent("LSTM", "x")
    pairs = net.add("Reshape", net.rows(y), net.constant([-1, 2] if flat else [0, -1, 2]))
    bent = net.add("Tanh", net.add("MatMul", pairs, net.weight(2, 2)))
    sizes = net.add("Concat", net.size("x", 0), net.size("x", 1), net.constant([UNITS]), axis=0)
    net.head(net.add("Reshape", bent, sizes))
    return net.model()


def stateless() -> bytes:
    """Dense layers only."""
    net = Net()
    net.head(net.add("Tanh", net.head("x", FEATURES, UNITS, None)))
    return net.model()


def _case(name: str, what: str, graph: Any, *arguments: Any, refused: str = "", **settings: Any) -> Case:
    shapes = {key: settings.pop(key) for key in ("inputs", "outputs", "settings", "tokens") if key in settings}
    return Case(f"hand_{name}", what, partial(graph, *arguments, **settings), refused=refused, **shapes)


OUTSIDE = {"x": "TBF", "h0": "DBH", "c0": "DBH"}
CASES = [
    _case("lstm", "LSTM", one_layer, "LSTM"),
    _case("lstm_no_bias", "LSTM without biases", one_layer, "LSTM", bias=False),
    _case("lstm_peephole", "LSTM with peephole weights", one_layer, "LSTM", peephole=True),
    _case("lstm_coupled", "LSTM with coupled gates", one_layer, "LSTM", input_forget=1),
    _case("lstm_both", "LSTM with both", one_layer, "LSTM", peephole=True, input_forget=1),
    _case("lstm_clip", "LSTM with a clip", one_layer, "LSTM", clip=0.4),
    _case("lstm_piecewise", "LSTM with other activations", one_layer, "LSTM", activations=PIECEWISE),
    _case("gru_after", "GRU, reset after the product", one_layer, "GRU", linear_before_reset=1),
    _case("gru_before", "GRU, reset before it", one_layer, "GRU"),
    _case("rnn_tanh", "RNN, tanh", one_layer, "RNN"),
    _case("rnn_relu", "RNN, relu", one_layer, "RNN", activations=["Relu"]),
    _case("rnn_no_bias", "RNN without biases", one_layer, "RNN", bias=False),
    _case("rnn_clip", "RNN with a clip", one_layer, "RNN", clip=0.4, refused="clip"),
    _case("rnn_softsign", "RNN, softsign", one_layer, "RNN", activations=["Softsign"], refused="activation Softsign"),
    *(
        _case(f"opset{opset}", f"LSTM, opset {opset}", states_outside, given_back=False, opset=opset, inputs=OUTSIDE)
        for opset in (9, 11, 13, 15)
    ),
    _case("lstm_gru", "GRU over an LSTM", two_layers, "LSTM", "GRU"),
    _case("gru_rnn", "RNN over a GRU", two_layers, "GRU", "RNN"),
    _case("from_zero", "LSTM that begins at constant zeros", begins_at, 0.0),
    _case("from_number", "GRU that begins at 0.25", begins_at, 0.25, "GRU"),
    _case("from_learned", "LSTM that begins in a learned state", begins_at, None),
    _case("from_readings", "GRU that begins at the first reading", begins_at_readings, refused="is computed from the"),
    _case("from_unlike", "streams that begin unlike", begins_unlike, refused="from another state"),
    _case(
        "states_given_back",
        "states as inputs and outputs",
        states_outside,
        given_back=True,
        inputs=OUTSIDE,
        outputs={"y": "TBO", "hn": "DBH", "cn": "DBH"},
    ),
    _case("states_taken", "states as inputs alone", states_outside, given_back=False, inputs=OUTSIDE),
    _case("lengths_constant", "GRU with lengths, all whole", lengths, outside=False),
    _case("lengths_outside", "GRU, lengths as an input", lengths, outside=True, inputs={"x": "TBF", "lengths": "B"}),
    _case("lengths_computed", "GRU, lengths counted in the readings", lengths_of_readings, refused="without a mask"),
    _case("reverse", "LSTM from the end", one_layer, "LSTM", direction="reverse", refused="is reverse"),
    _case("bidirectional", "bidirectional LSTM", both_directions, refused="is bidirectional"),
    _case("layout1", "GRU of ONNX's layout 1", batch_first_operator, refused="layout 0"),
    _case(
        "along_batch",
        "LSTM whose axes' names are mistaken",
        along_the_batch,
        inputs={"x": "TBF"},
    ),
    _case("two_inputs", "two inputs of readings", two_inputs, inputs={"x": "TBF", "load": "TB"}),
    _case("two_orders", "batch first and time first", two_axes_orders, inputs={"x": "BTF", "z": "TBF"}),
    _case("float64", "LSTM, readings in float64", in_float64),
    _case("tokens", "Embedding and GRU", tokens, inputs={"x": "TB"}, tokens=7),
    _case("residual", "LayerNormalization, LSTM, a residual sum", residual),
    *(
        _case(op.lower(), f"GRU, a head through {op}", bent, op)
        for op in ("Log", "Softplus", "Sin", "Cos", "Atan", "Mish")
    ),
    _case(
        "heads",
        "five heads, of rows, the last row, whole numbers and flags",
        heads,
        outputs={"y": "TBO", "last": "BO", "flat": "RO", "kind": "TB", "high": "TBO"},
    ),
    _case("regrouped", "units in groups beside the streams, and back", regrouped, flat=False),
    _case("regrouped_flat", "units in groups beside streams and timesteps, and back", regrouped, flat=True),
    _case("stateless", "dense layers only", stateless, refused="nothing in the graph remembers"),
]
