"""What becomes of each recurrent cell in an ONNX graph: the operators, and how to find them there."""

from __future__ import annotations

from typing import Any

import onnx

LSTM = {"op": "LSTM", "P": False, "input_forget": 0}
NODES: dict[str, dict[str, Any]] = {  # what becomes of a cell, where ONNX has an operator for it
    "lstm": LSTM,
    "lstm-peephole": LSTM | {"P": True},
    "lstm-coupled": LSTM | {"input_forget": 1},
    "lstm-peephole-coupled": LSTM | {"P": True, "input_forget": 1},
    "gru": {"op": "GRU", "linear_before_reset": 1},
    "gru-reset-before": {"op": "GRU", "linear_before_reset": 0},
}


def nodes(graph: onnx.ModelProto) -> list[dict[str, Any]]:
    """The recurrent nodes, as `NODES` tells them."""
    found = []
    for node in graph.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes.get("direction", b"forward") == b"forward" and not attributes.get("layout", 0)
        if node.op_type == "LSTM":
            peephole = len(node.input) > 7 and node.input[7] != ""
            found.append({"op": "LSTM", "P": peephole, "input_forget": attributes.get("input_forget", 0)})
        elif node.op_type == "GRU":
            found.append({"op": "GRU", "linear_before_reset": attributes.get("linear_before_reset", 0)})
        assert node.op_type != "RNN", "the operator that rounds a single row in its own way"
    return found
