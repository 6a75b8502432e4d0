"""The scaler in a graph: the same nodes before a step and a sequence, the numbers those of numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from statestep.export import ExportError
from statestep.export.scaler import Scaler, behind_scaler, scaler_of

SCALER = Scaler(np.array([10.0, -3.0, 500.0]), np.array([2.0, 0.5, 80.0]))
WEIGHT = np.array([[0.5, 0.0], [0.0, 2.0], [1.0, -1.0]], np.float32)  # [F, K]


def network(shape: list[str | int]) -> onnx.ModelProto:
    """y = x · W: x [… , 3] → y [… , 2], and x itself as `seen`."""
    nodes = [helper.make_node("MatMul", ["x", "W"], ["y"]), helper.make_node("Identity", ["x"], ["seen"])]
    sizes = {"y": [*shape[:-1], 2], "seen": shape}
    out = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    graph = helper.make_graph(nodes, "g", [x], out, [numpy_helper.from_array(WEIGHT, "W")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(model)
    return list(ort.InferenceSession(model.SerializeToString()).run(["y", "seen"], {"x": x}))


@pytest.mark.parametrize("shape", [["B", 3], ["T", "B", 3]])
def test_raw_readings_go_in_and_come_out(shape: list[str | int]) -> None:
    """The network sees standard units; its forecast of features 0 and 2 leaves in the sensors'."""
    x = np.random.default_rng(3).normal(100, 50, (4, 3) if len(shape) == 2 else (5, 4, 3)).astype(np.float32)
    y, seen = run(behind_scaler(network(shape), SCALER, "y", (0, 2)), x)
    z = (x - SCALER.mean) / SCALER.std
    np.testing.assert_allclose(seen, z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y, SCALER.mean[[0, 2]] + SCALER.std[[0, 2]] * (z @ WEIGHT), rtol=1e-4, atol=1e-3)


def test_without_a_forecast_outputs_stay_as_they_are() -> None:
    """A classifier's probabilities are in no sensor's units."""
    x = np.ones((2, 3), np.float32)
    y, _ = run(behind_scaler(network(["B", 3]), SCALER, None, ()), x)
    np.testing.assert_allclose(y, ((x - SCALER.mean) / SCALER.std) @ WEIGHT, rtol=1e-5)


def test_an_absurd_reading_stays_finite() -> None:
    """The largest float32 becomes 1e9 standard deviations, not infinity."""
    x = np.full((1, 3), np.finfo(np.float32).max)
    _, seen = run(behind_scaler(network(["B", 3]), SCALER, None, ()), x)
    assert np.abs(seen).max() == np.float32(1e9)


def test_a_scaler_that_does_not_fit_is_refused() -> None:
    """The sentence names the feature and the value."""
    with pytest.raises(ExportError, match=r"std of 'flow' is 0, it must be a finite number above 0"):
        scaler_of({"flow": 1.0}, {"flow": 0}, ["flow"])
