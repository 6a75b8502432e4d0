"""The proof itself: it passes what is right, and names the first step and feature of what is not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from statestep.export import Check, DataError, Report, export_step, verify
from statestep.export.against import sequence_path
from statestep.export.horizon import in_words
from statestep.runtime import Contract, Engine, Feature, ModelError, Output, State, StepModel, stamp

from .models import Array, model, readings

WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "matplotlib", "onnxscript"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else find_spec(name, *rest)
from statestep.export.verify import verify
report = verify(sys.argv[1])
print(report.passed, [check.detail for check in report.checks if check.passed is None])
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GRU with its sequence form and its weights."""
    return export_step(model("gru"), tmp_path_factory.mktemp("verify") / "gru.onnx").model


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same from another seed."""
    return export_step(model("gru", seed=9), tmp_path_factory.mktemp("other") / "gru.onnx").model


def check(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def test_a_right_model_passes(path: Path) -> None:
    """Every check passes on drawn and on given data, and speeds are told."""
    streams = {"a": readings(150, 1)[:, 0].astype(np.float64), "b": readings(30, 1, seed=1)[:, 0]}
    streams["b"][7, 1] = np.nan  # passed by
    report = verify(path, streams)
    assert report.passed and not report.failures
    assert [check.passed for check in report.checks] == [True] * 4 + [None]
    assert "bit-equal" in check(report, "streaming = offline").detail
    assert [speed.batch for speed in report.speeds] == [1, 64, 1024]
    assert all(0 < speed.microseconds < 1e6 for speed in report.speeds)
    assert report.parity is not None and report.parity["steps"] == 1 + 2 + 200 + 64 + 48 + 20 + 150 + 29


def test_a_sequence_file_of_other_weights_is_found_out(path: Path, other: Path, tmp_path: Path) -> None:
    """The first step that differs is the first, and the feature is named with both numbers."""
    shutil.copy(path, tmp_path / "gru.onnx")
    shutil.copy(sequence_path(other), tmp_path / "gru.sequence.onnx")
    failed = check(verify(tmp_path / "gru.onnx"), "streaming = offline")
    assert failed.passed is False
    assert failed.detail.startswith("step 1, stream 1: prediction of 'flow' differs: ")


def test_weights_of_another_model_are_found_out(path: Path, other: Path, tmp_path: Path) -> None:
    """torch disagrees, at the first step."""
    for suffix in (".onnx", ".sequence.onnx"):
        shutil.copy(path.with_suffix(suffix), tmp_path / f"gru{suffix}")
    shutil.copy(other.with_suffix(".pt"), tmp_path / "gru.pt")
    report = verify(tmp_path / "gru.onnx")
    assert [failed.name for failed in report.failures] == ["torch agrees"]
    assert report.failures[0].detail.startswith("step 1, stream 1: prediction of 'flow' differs: ")


def test_a_missing_sequence_file_is_a_failure_unless_told_otherwise(path: Path, tmp_path: Path) -> None:
    """Silence would pass for proof."""
    shutil.copy(path, tmp_path / "gru.onnx")
    failed = check(verify(tmp_path / "gru.onnx"), "streaming = offline")
    assert failed.passed is False and "gru.sequence.onnx" in failed.detail
    report = verify(tmp_path / "gru.onnx", sequence=False)
    assert report.passed and "streaming = offline" not in [check.name for check in report.checks]
    assert check(report, "torch agrees").passed is None


def test_verify_needs_no_torch(path: Path) -> None:
    """In an interpreter where torch cannot be imported, all but torch's own check is done."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.startswith("True ['not checked: torch is not installed', 'forgets its past within "), done.stderr


def test_how_soon_a_model_forgets_is_told(path: Path, tmp_path: Path) -> None:
    """What the contract says is repeated; of a model that does not say it, it is measured, on the given data."""
    stored = StepModel.load(path).contract.memory
    assert stored is not None and stored["warm"] is not None
    assert verify(path).memory == stored
    bare = onnx.load(path)
    stamp(bare, replace(StepModel.load(path).contract, memory=None))
    onnx.save(bare, tmp_path / "gru.onnx")
    report = verify(tmp_path / "gru.onnx", {"a": readings(90, 1)[:, 0]}, sequence=False)
    assert report.memory is not None and report.memory["readings"] == "given"
    assert check(report, "memory") == Check("memory", None, in_words(report.memory))
    assert report.memory["warm"] < stored["warm"]  # drawn readings, of a model without ranges, are far from its own


def test_windows_are_compared_with_streaming(path: Path) -> None:
    """The reported gap is that of windows run by hand, in standard deviations of the data."""
    x = readings(120, 1)[:, 0]
    detail = check(verify(path, {"a": x}, window=6), "windows of 6").detail
    steps, unit = StepModel.load(path), x.astype(np.float64).std(axis=0)[[0, 2]]

    def run(rows: Array) -> Array:
        engine = Engine(steps)
        return np.concatenate([engine.advance([b"a"], row[None]).prediction for row in rows])

    streamed = run(x)
    gaps = np.stack([run(x[end - 5 : end + 1])[-1] - streamed[end] for end in range(6, 120)]) / unit
    rms = f"{np.sqrt(np.mean(gaps**2)):.2g}"
    assert detail == f"differ from streaming by {rms} standard deviations (RMS), {np.abs(gaps).max():.2g} at most"
    assert float(rms) > 1e-3


def test_a_window_longer_than_the_data_is_told(path: Path) -> None:
    """Nothing is compared and the check says why."""
    told = check(verify(path, {"a": readings(20, 1)[:, 0]}, window=50), "windows of 50")
    assert told.passed is None and "longest stream has 20 rows" in told.detail
    with pytest.raises(DataError, match="window is 0"):
        verify(path, window=0)


def test_data_of_another_shape_is_refused(path: Path) -> None:
    """The stream and both shapes are named."""
    with pytest.raises(DataError, match=r"stream 'a' has shape \[5, 2\], the model takes \[T, 3\]"):
        verify(path, {"a": np.zeros((5, 2))})


def test_a_broken_sequence_file_is_named(path: Path, tmp_path: Path) -> None:
    """The error is of the sequence file, not of the step model."""
    shutil.copy(path, tmp_path / "gru.onnx")
    (tmp_path / "gru.sequence.onnx").write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"gru\.sequence\.onnx: is not an ONNX file"):
        verify(tmp_path / "gru.onnx")


def written(nodes: list[onnx.NodeProto], weights: dict[str, Array], path: Path) -> Path:
    """A step model x [B, 2], h0 [B, 2] → y [B, 2], hn [B, 2] of these nodes."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2]) for name in ("x", "h0", "y", "hn")]
    initialisers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "step", tensors[:2], tensors[2:], initialisers)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    features = (Feature("flow"), Feature("speed"))
    outputs = (Output("y", role="prediction", features=("flow", "speed")),)
    stamp(made, Contract("hand-made", features, (State("h0", "hn", (2,)),), outputs))
    onnx.save(made, path)
    return path


def test_a_model_that_looks_at_its_batch_mates_is_found_out(tmp_path: Path) -> None:
    """A graph that subtracts the batch's mean gives other numbers in company."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "axis"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
        helper.make_node("Add", ["h0", "x"], ["hn"]),
    ]
    path = written(nodes, {"axis": np.array([0])}, tmp_path / "mean.onnx")
    report = verify(path, sequence=False)
    failed = check(report, "batches do not matter")
    assert failed.passed is False and not report.passed
    assert failed.detail.startswith("step 1, stream 1: y of 'flow' differs: ") and "in a batch of 2" in failed.detail


def test_numbers_that_are_not_finite_are_found_out(tmp_path: Path) -> None:
    """A state that doubles until it overflows is caught at its step."""
    nodes = [
        helper.make_node("Mul", ["h0", "two"], ["doubled"]),
        helper.make_node("Add", ["doubled", "one"], ["hn"]),
        helper.make_node("Add", ["hn", "x"], ["y"]),
    ]
    weights = {"two": np.array(2, np.float32), "one": np.array(1, np.float32)}
    failed = check(verify(written(nodes, weights, tmp_path / "twice.onnx"), sequence=False), "finite outputs")
    assert failed.passed is False
    assert failed.detail == "step 128, stream 1: y of 'flow' is not a finite number"
