"""Small step models written node by node, so that tests know what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from statestep.runtime import Contract, Feature, Output, State, StepModel, stamp

Array = np.ndarray[Any, Any]
Tensors = dict[str, tuple[str, list[Any]]]  # name → (dtype, shape)

FEATURES = ("flow", "pressure")
UNITS = 4
THRESHOLD = 2.0
DTYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}

# The shape of every tensor of `detector`, the batch axis where it stands.
DETECTOR_INPUTS: Tensors = {
    "x": ("float32", ["B", 2]),
    "h0": ("float32", [1, "B", UNITS]),
    "c0": ("float32", [1, "B", UNITS]),
    "forecast": ("float32", ["B", 2]),
    "error": ("float32", ["B", 1]),
    "seen": ("int64", ["B", 1]),
    "alarmed": ("bool", ["B"]),
}
DETECTOR_OUTPUTS: Tensors = {
    "prediction": ("float32", ["B", 2]),
    "expected": ("float32", ["B", 2]),
    "score": ("float32", ["B"]),
    "threshold": ("float32", ["B"]),
    "anomaly": ("bool", ["B"]),
    "hn": ("float32", [1, "B", UNITS]),
    "cn": ("float32", [1, "B", UNITS]),
    "next_forecast": ("float32", ["B", 2]),
    "next_error": ("float32", ["B", 1]),
    "next_seen": ("int64", ["B", 1]),
    "next_alarmed": ("bool", ["B"]),
}
DETECTOR_STATES = (
    State("h0", "hn", (1, UNITS), batch_axis=1),
    State("c0", "cn", (1, UNITS), batch_axis=1),
    State("forecast", "next_forecast", (2,)),
    State("error", "next_error", (1,)),
    State("seen", "next_seen", (1,), dtype="int64", initial=0),
    State("alarmed", "next_alarmed", (), dtype="bool", initial=False),
)
DETECTOR_ROLES = ("prediction", "expected", "score", "threshold", "anomaly")


def detector(*, seed: int = 7, name: str = "pump", others: bool = False, **contract: Any) -> bytes:
    """A whole detector: an LSTM that corrects the last value, the forecast that it made, a smoothed squared error.

    Its states have the batch at axis 0 and 1, and float32, int64 and bool elements. A NaN is replaced by the forecast,
    which matters only under a contract whose `missing` is "own-forecast". `others` gives two outputs without a role.
    """
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> Array:
        return rng.uniform(-0.5, 0.5, shape).astype(np.float32)

    weights = {
        "W": drawn(1, 4 * UNITS, 2),
        "R": drawn(1, 4 * UNITS, UNITS),
        "b": drawn(1, 8 * UNITS),
        "head": drawn(UNITS, 2),
        "keep": np.array(0.9, np.float32),
        "take": np.array(0.1, np.float32),
        "nothing": np.array(0.0, np.float32),
        "zero": np.array(0, np.int64),
        "one": np.array(1, np.int64),
        "first": np.array([0], np.int64),
        "second": np.array([1], np.int64),
    }
    threshold = numpy_helper.from_array(np.array([THRESHOLD], np.float32))
    node = helper.make_node
    nodes = [
        node("IsNaN", ["x"], ["absent"]),
        node("Where", ["absent", "forecast", "x"], ["seen_x"]),
        node("Unsqueeze", ["seen_x", "first"], ["sequence"]),
        node("LSTM", ["sequence", "W", "R", "b", "", "h0", "c0"], ["", "hn", "cn"], hidden_size=UNITS),
        node("Squeeze", ["hn", "first"], ["top"]),
        node("MatMul", ["top", "head"], ["correction"]),
        node("Add", ["seen_x", "correction"], ["prediction"]),
        node("Identity", ["prediction"], ["next_forecast"]),
        node("Identity", ["forecast"], ["expected"]),
        node("Sub", ["seen_x", "forecast"], ["miss"]),
        node("Mul", ["miss", "miss"], ["squared"]),
        node("ReduceMax", ["squared", "second"], ["largest"], keepdims=1),
        node("Greater", ["seen", "zero"], ["has_forecast"]),
        node("Where", ["has_forecast", "largest", "nothing"], ["judged"]),
        node("Mul", ["error", "keep"], ["kept"]),
        node("Mul", ["judged", "take"], ["taken"]),
        node("Add", ["kept", "taken"], ["next_error"]),
        node("Squeeze", ["next_error", "second"], ["score"]),
        node("Shape", ["score"], ["rows"]),
        node("ConstantOfShape", ["rows"], ["threshold"], value=threshold),
        node("Greater", ["score", "threshold"], ["anomaly"]),
        node("Add", ["seen", "one"], ["next_seen"]),
        node("Or", ["alarmed", "anomaly"], ["next_alarmed"]),
    ]
    outputs = DETECTOR_OUTPUTS
    if others:
        nodes.append(node("Identity", ["top"], ["hidden"]))
        nodes.append(node("Identity", ["next_seen"], ["count"]))
        outputs = outputs | {"hidden": ("float32", ["B", UNITS]), "count": ("int64", ["B", 1])}
    settings: dict[str, Any] = {"name": name, "states": DETECTOR_STATES} | contract
    settings.setdefault("features", tuple(Feature(feature) for feature in FEATURES))
    settings.setdefault(
        "outputs",
        tuple(Output(role, role=role) for role in DETECTOR_ROLES)
        + ((Output("hidden"), Output("count")) if others else ()),
    )
    return stamped(graph(nodes, DETECTOR_INPUTS, outputs, weights), Contract(**settings))


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Tensors,
    outputs: Tensors,
    weights: dict[str, Array] | None = None,
) -> onnx.ModelProto:
    """A model of opset 18."""
    made = helper.make_graph(
        list(nodes),
        "step",
        [helper.make_tensor_value_info(n, DTYPES[dtype], shape) for n, (dtype, shape) in inputs.items()],
        [helper.make_tensor_value_info(n, DTYPES[dtype], shape) for n, (dtype, shape) in outputs.items()],
        [numpy_helper.from_array(value, n) for n, value in (weights or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def stamped(model: onnx.ModelProto, contract: Contract) -> bytes:
    """The bytes of a model that carries `contract`."""
    stamp(model, contract)
    return bytes(model.SerializeToString())


def smoother(state: str = "h", following: str = "next_h") -> onnx.ModelProto:
    """The simplest recurrence, h ← h/2 + x over two columns, y = h: exact in binary for small whole numbers."""
    return graph(
        [
            helper.make_node("Mul", [state, "half"], ["kept"]),
            helper.make_node("Add", ["kept", "x"], [following]),
            helper.make_node("Identity", [following], ["y"]),
        ],
        {"x": ("float32", ["B", 2]), state: ("float32", ["B", 2])},
        {"y": ("float32", ["B", 2]), following: ("float32", ["B", 2])},
        {"half": np.array(0.5, np.float32)},
    )


def smoother_contract(state: str = "h", following: str = "next_h", **changes: Any) -> Contract:
    """The contract of `smoother`, with `changes`."""
    settings: dict[str, Any] = {
        "name": "smoother",
        "features": (Feature("a"), Feature("b")),
        "states": (State(state, following, (2,)),),
        "outputs": (Output("y", role="prediction"),),
    }
    return Contract(**settings | changes)


def pump(**contract: Any) -> StepModel:
    """`detector`, loaded."""
    return StepModel(detector(**contract))
