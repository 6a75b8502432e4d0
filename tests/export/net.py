"""ONNX graphs written node by node, with random weights from a seed: what a graph computes, its own test says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
Shape = Sequence[int | str | None]

KINDS = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "bool": TensorProto.BOOL,
}
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FEATURES, UNITS, OUT = 3, 4, 2
X: Mapping[str, Shape] = {"x": ("T", "B", FEATURES)}
Y: Mapping[str, Shape] = {"y": ("T", "B", OUT)}


class Net:
    """A graph that is being written. Nodes are numbered by their operator, tensors named by their nodes."""

    def __init__(self, seed: int = 0, opset: int = 18, prefix: str = ""):
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.held: list[onnx.TensorProto] = []

    def weight(self, *shape: int, dtype: str = "float32", scale: float = 0.6) -> str:
        """Random numbers within ±`scale`."""
        return self.constant(self.rng.uniform(-scale, scale, shape), dtype)

    def constant(self, value: Any, dtype: str = "int64") -> str:
        """An initialiser."""
        name = f"held_{len(self.held)}"
        self.held.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def add(
        self, operator: str, *inputs: str, out: str | None = None, name: str | None = None, **attributes: Any
    ) -> str:
        """A node with one output."""
        return self.many(operator, *inputs, count=1, out=None if out is None else [out], name=name, **attributes)[0]

    def many(
        self,
        operator: str,
        *inputs: str,
        count: int,
        out: Sequence[str] | None = None,
        name: str | None = None,
        **attributes: Any,
    ) -> list[str]:
        """A node with several outputs."""
        label = f"{self.prefix}{operator.lower()}_{len(self.nodes)}" if name is None else name
        outputs = list(out) if out is not None else [f"{label}_{len(self.nodes)}_out{place}" for place in range(count)]
        self.nodes.append(helper.make_node(operator, list(inputs), outputs, name=label, **attributes))
        return outputs

    def recurrent(
        self,
        operator: str,
        x: str,
        inputs: int = FEATURES,
        units: int = UNITS,
        *,
        initial: Sequence[str] = (),
        lengths: str = "",
        peephole: bool = False,
        bias: bool = True,
        directions: int = 1,
        **attributes: Any,
    ) -> list[str]:
        """LSTM, GRU or RNN over x [T, B, F]: Y [T, D, B, H], Y_h [D, B, H] and, of an LSTM, Y_c."""
        gates, both = GATES[operator], operator == "LSTM"
        w = self.weight(directions, gates * units, inputs)
        r = self.weight(directions, gates * units, units, scale=1.2 / np.sqrt(units))
        b = self.weight(directions, 2 * gates * units) if bias else ""
        p = [self.weight(directions, 3 * units)] if peephole else []
        states = [*initial, *[""] * (1 + both - len(initial))]
        given = [x, w, r, b, lengths, *states, *p]
        return self.many(operator, *given, count=2 + both, hidden_size=units, **attributes)

    def rows(self, y: str) -> str:
        """Y [T, 1, B, H] without the axis of directions."""
        if self.opset < 13:  # axes were no input yet
            return self.add("Squeeze", y, axes=[1])
        return self.add("Squeeze", y, self.constant([1]))

    def cast(self, tensor: str, dtype: str) -> str:
        """A tensor in another dtype."""
        return self.add("Cast", tensor, to=KINDS[dtype])

    def size(self, tensor: str, axis: int) -> str:
        """How long an axis is, [1]."""
        return self.add("Gather", self.add("Shape", tensor), self.constant([axis]))

    def head(self, rows: str, units: int = UNITS, width: int = OUT, out: str | None = "y") -> str:
        """A dense layer [… , H] → [… , O]."""
        product = self.add("MatMul", rows, self.weight(units, width))
        return self.add("Add", product, self.weight(width), out=out)

    def graph(
        self, name: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any], *, inner: bool = False
    ) -> onnx.GraphProto:
        """What was written so far as a graph; `inner` leaves the initialisers to the graph around it."""
        return helper.make_graph(
            self.nodes,
            name,
            [info(key, shape) for key, shape in inputs.items()],
            [info(key, shape) for key, shape in outputs.items()],
            [] if inner else self.held,
        )

    def model(self, inputs: Mapping[str, Any] = X, outputs: Mapping[str, Any] = Y) -> bytes:
        """The bytes of the model."""
        graph = self.graph("net", inputs, outputs)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return bytes(made.SerializeToString())


def info(name: str, shape: Any) -> onnx.ValueInfoProto:
    """A tensor's declaration; `shape` may be (dtype, shape), or a dtype alone for an unknown shape."""
    if isinstance(shape, str):
        return helper.make_tensor_value_info(name, KINDS[shape], None)
    kind, sizes = shape if len(shape) == 2 and shape[0] in KINDS else ("float32", shape)
    return helper.make_tensor_value_info(name, KINDS[kind], list(sizes))


def body_of(net: Net) -> Net:
    """A net for the body of a loop, which sees the initialisers of the net around it."""
    inside = Net(opset=net.opset, prefix=f"{net.prefix}in_{len(net.nodes)}_")
    inside.rng, inside.held = net.rng, net.held
    return inside
