"""Untrained LSTM step models of any size, made without torch: what `statestep bench` measures and tests step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from statestep.runtime import Contract, Feature, Output, State, stamp

OPSET = 18
IR_VERSION = 8  # the oldest that holds opset 18, so that every supported onnxruntime loads it


def lstm_step(features: int, hidden: int, layers: int = 1, *, seed: int = 0) -> bytes:
    """A step model x [B, features] → prediction [B, features] over `layers` LSTM nodes and a linear head.

    The weights are uniform in ±1/√hidden, as torch draws them, from `seed`.

    >>> from statestep.runtime import StepModel
    >>> StepModel(lstm_step(8, 64)).contract.states[0].shape
    (64,)
    """
    rng = np.random.default_rng(seed)
    bound = hidden**-0.5
    weights: dict[str, np.ndarray[Any, Any]] = {"axis": np.array([0], np.int64)}
    nodes, states = [], []
    below, width = "x", features
    for layer in range(layers):
        h, c, w, r, b = (f"{name}{layer}" for name in "hcWRB")
        for name, shape in ((w, (1, 4 * hidden, width)), (r, (1, 4 * hidden, hidden)), (b, (1, 8 * hidden))):
            weights[name] = rng.uniform(-bound, bound, shape).astype(np.float32)
        nodes += [
            *(helper.make_node("Unsqueeze", [name, "axis"], [f"{name}_seq"]) for name in (below, h, c)),
            helper.make_node(
                "LSTM",
                [f"{below}_seq", w, r, b, "", f"{h}_seq", f"{c}_seq"],
                ["", f"{h}_out", f"{c}_out"],  # without Y, which would be one more copy of Y_h
                hidden_size=hidden,
            ),
            *(helper.make_node("Squeeze", [f"{name}_out", "axis"], [f"next_{name}"]) for name in (h, c)),
        ]
        states += [State(h, f"next_{h}", (hidden,)), State(c, f"next_{c}", (hidden,))]
        below, width = f"next_{h}", hidden
    weights["head"] = rng.uniform(-bound, bound, (hidden, features)).astype(np.float32)
    nodes.append(helper.make_node("MatMul", [below, "head"], ["prediction"]))
    graph = helper.make_graph(
        nodes,
        "step",
        [_batched("x", features), *(_batched(state.input, hidden) for state in states)],
        [_batched("prediction", features), *(_batched(state.output, hidden) for state in states)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    names = tuple(f"s{column}" for column in range(features))
    contract = Contract(
        name=f"lstm-{features}-{hidden}x{layers}",
        features=tuple(Feature(name) for name in names),
        states=tuple(states),
        outputs=(Output("prediction", role="prediction", features=names),),
        producer="statestep bench (untrained)",
    )
    stamp(model, contract)
    return bytes(model.SerializeToString())


def _batched(name: str, size: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", size])
