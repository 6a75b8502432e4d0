"""`statestep convert` as a person meets it: what it prints, what it writes, and one sentence for each refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from statestep.consumers.cli import app
from statestep.runtime import StepModel

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def convert(name: str, *more: str) -> tuple[int, str, str]:
    """The exit code, what was printed, and the error's sentence."""
    source = name if name.endswith(".onnx") else str(FIXTURES / f"{name}.onnx")
    done = CliRunner().invoke(app, ["convert", source, "--out", "m.onnx", *more])
    return done.exit_code, " ".join(done.stdout.split()), " ".join(done.stderr.split())


def test_a_graph_of_keras_becomes_a_step_model() -> None:
    """Its states and its proof are printed, its sequence form lies beside it, and the contract says what was told."""
    code, printed, _ = convert(
        "keras_gru", "--features", "a,b,c", "--unit", "b=bar", "--author", "us", "--license", "MIT"
    )
    assert code == 0
    assert "states lifted: loop1_s1 → next_loop1_s1" in printed
    assert "stepped = original: within" in printed
    assert "name it by --prediction" in printed
    assert Path("m.sequence.onnx").exists()
    contract = StepModel.load("m.onnx").contract
    assert [feature.unit for feature in contract.features] == [None, "bar", None]
    assert (contract.author, contract.license) == ("us", "MIT")
    assert contract.parity is not None and contract.parity["against"] == "the original graph"
    assert CliRunner().invoke(app, ["verify", "m.onnx"]).exit_code == 0


def test_a_scaler_goes_into_the_graph() -> None:
    """Raw readings in, a raw forecast out: the numbers of the original behind numpy's scaling."""
    mean, std = np.array([10.0, 20.0, 30.0]), np.array([2.0, 4.0, 8.0])
    Path("scaler.json").write_text(json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    code, _, said = convert("torch_lstm2", "--features", "a,b,c", "--targets", "c,a", "--scaler", "scaler.json")
    assert code == 0, said
    assert convert("torch_lstm2", "--features", "a,b,c", "--out", "plain.onnx")[0] == 0
    z = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)  # [B, F]
    x = (z * std + mean).astype(np.float32)
    raw, plain = StepModel.load("m.onnx"), StepModel.load("plain.onnx")
    states = [np.stack([state] * 4) for state in raw.initial_states()]
    expected = next(iter(plain.step(z, states)[0].values())) * std[[2, 0]] + mean[[2, 0]]  # [B, K]
    np.testing.assert_allclose(raw.step(x, states)[0]["y"], expected, rtol=1e-5)


def test_what_looks_ahead_is_refused_by_name() -> None:
    """Exit 3, the node and the way out, and nothing is written."""
    code, _, said = convert("torch_bidirectional")
    assert code == 3
    assert "node 'node_lstm__2' (LSTM) is bidirectional" in said and "only reads forward" in said
    assert not list(Path().glob("*.onnx"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data", "d.csv"), "--data is read by the features' names: give them by --features"),
        (("--scaler", "s.json"), "--scaler is read by the features' names"),
        (("--unit", "a=bar"), "--unit is read by the features' names"),
        (("--set", "rate"), "--set is 'rate': it must be name=value"),
        (("--out", "m.bin"), "--out is 'm.bin': its name must end in .onnx"),
    ],
)
def test_a_flag_that_cannot_be_used_is_told(flags: tuple[str, ...], words: str) -> None:
    """Exit 2, before anything is run."""
    code, _, said = convert("keras_lstm", *flags)
    assert (code, words in said) == (2, True), said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--features", "a,b"), "2 features are named, the graph takes 3 readings a timestep"),
        (("--features", "a,b,c", "--targets", "d"), "target 'd' is no feature"),
        (("--prediction", "z"), "the prediction is to be 'z', the model has the outputs"),
        (("--set", "rate=1"), "the constant 'rate' is no input of the graph"),
    ],
)
def test_what_does_not_fit_the_graph_is_told(flags: tuple[str, ...], words: str) -> None:
    """Exit 3, and nothing is written."""
    code, _, said = convert("keras_lstm", *flags)
    assert (code, words in said) == (3, True), said
    assert not list(Path().glob("*.onnx"))


def test_a_file_that_is_no_model_is_told() -> None:
    """Exit 3, one sentence."""
    Path("noise.onnx").write_bytes(b"\x00\x01 no model \xff" * 50)
    code, _, said = convert("noise.onnx")
    assert code == 3 and said.startswith("error: noise.onnx: ")


ENDLESS = """
from statestep.consumers import cli, first_load
first_load.Limits.__new__.__defaults__ = (1.0, 2 << 30)
cli.main()
"""


def test_a_graph_without_an_end_is_stopped_in_a_child() -> None:
    """A sequence graph whose Loop never ends loads well; its first run happens in a fork, which is stopped.

    In a process of its own: this one may have threads, and then nothing is forked.
    """
    Path("endless.onnx").write_bytes(endless().SerializeToString())
    command = [sys.executable, "-c", ENDLESS, "convert", "endless.onnx", "--out", "m.onnx", "--layout", "BTF"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "endless.onnx: was not loaded within 1 s" in " ".join(done.stderr.split())


def endless() -> onnx.ModelProto:
    """x [B, T, 2] → y = x + 0 · (a Loop that goes on for ever)."""
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Neg", ["carried"], ["turned"])],
        "body",
        [value("turn", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("carried", 1, ["B", "T", 2])],
        [value("go_on", TensorProto.BOOL, []), value("turned", 1, ["B", "T", 2])],
    )
    nodes = [helper.make_node("Loop", ["", "always", "x"], ["y"], body=body)]
    shape: list[str | int | None] = ["batch", "time", 2]
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, shape)], [value("y", 1, shape)], [numpy_helper.from_array(np.array(True), "always")]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_what_half_weights_cost_is_told() -> None:
    """With --weights fp16 what the rounding changes is printed, in units of the outputs' spread."""
    code, printed, said = convert("keras_lstm", "--weights", "fp16")
    assert code == 0, said
    assert "weights in float16: outputs change by 0 of their spread at most" in printed  # none of 1,024 bytes is in it
    assert "weights in float16" not in convert("keras_lstm")[1]
