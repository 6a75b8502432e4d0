"""What is written: one file that holds everything, its contract, and nothing at all where the proof fails."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from statestep.export import Exported, ExportError, Forecaster, ForecasterConfig, NoScaling, StreamModel, export_step
from statestep.export.weights import load, reference_of
from statestep.runtime import StepModel

from .models import FEATURES, detector_of, model, readings

RANGES = {"flow": (4.0, 16.0), "pressure": (-5.0, -1.0), "speed": (200.0, 800.0)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A two-layer LSTM with a detector and everything that a contract may say."""
    return export_step(
        model("lstm", 2),
        tmp_path_factory.mktemp("write") / "pump.onnx",
        detector_of(model("lstm", 2)),
        model_version="7",
        ranges=RANGES,
        units={"flow": "l/s"},
        period_seconds=300,
        license="Apache-2.0",
        trained_on="pumps.csv",
        author="A. Team",
        description="Forecasts flow and speed.",
    )


def test_the_contract_says_what_the_tensors_mean(exported: Exported) -> None:
    """The written file, read by the runtime, has names, ranges, states, roles and the proof."""
    contract = StepModel.load(exported.model).contract
    assert contract == exported.contract
    assert (contract.name, contract.model_version, contract.period_seconds) == ("pump", "7", 300)
    assert contract.feature_names == FEATURES
    assert [(f.min, f.max) for f in contract.features] == list(RANGES.values())
    assert contract.features[0].unit == "l/s" and contract.features[1].unit is None
    assert [(s.input, s.output, s.shape, s.batch_axis) for s in contract.states] == [
        ("h0", "hn", (2, 8), 1),
        ("c0", "cn", (2, 8), 1),
        ("forecast", "next_forecast", (2,), 0),
        ("last", "next_last", (3,), 0),
        *((s.input, s.output, s.shape, 0) for s in detector_of(model("lstm", 2)).detector.states[2:]),
    ]
    assert [(o.name, o.features) for o in contract.outputs] == [
        ("prediction", ("flow", "speed")),
        ("expected", ("flow", "speed")),
        *((name, None) for name in ("score", "threshold", "anomaly")),
        *((name, FEATURES) for name in ("contribution", "reason", "related")),
        *((name, None) for name in ("event", "since", "severity", "status")),
        ("drift", FEATURES),
        ("score_drift", None),
    ]
    assert all(output.role == output.name for output in contract.outputs)
    assert (contract.time_input, contract.missing) == ("time", "own-forecast")
    assert (contract.author, contract.description) == ("A. Team", "Forecasts flow and speed.")
    assert contract.memory is not None and contract.warm_after == contract.memory["forgets"]["0.01"]
    # α of 0.1 alone takes 44 steps from 1 to 1e-2, and a mean over 256 timesteps takes 1179.
    assert 40 < contract.memory["outputs"]["score"]["0.01"] < 2000
    assert contract.producer is not None and contract.producer.startswith("statestep 0.")
    assert f"torch {torch.__version__.partition('+')[0]}" in contract.producer
    assert contract.parity is not None and contract.parity["steps"] > 300
    assert 0 <= contract.parity["max_abs_difference"] < 1e-2  # the speed's standard deviation is 80


def test_the_contract_says_how_the_detector_judges(exported: Exported) -> None:
    """Its evidence by the numbers that `reason` gives, its settings, and what its threshold was taken from."""
    detector, told = detector_of(model("lstm", 2)), exported.contract.detector
    assert told == detector.told() == StepModel.load(exported.model).contract.detector
    assert told is not None and told["evidence"] == ["error", "others", "range", "stuck"]
    assert told["status"] == ["warming", "calibrated", "drifting"]
    assert (told["alpha"], told["combine"], told["rule"], told["scale"]) == (0.1, "mean", "plain", "pooled")
    assert told["threshold"] == pytest.approx(detector.detector.threshold, rel=1e-5)
    assert (told["rows"], told["calm"], told["warm"], told["every"]) == (3 * 90, 10, 5, None)


def test_without_a_detector_a_model_says_what_it_expects(tmp_path: Path) -> None:
    """And no more: there is nothing to tell of a detector, and no time to be given."""
    contract = export_step(model("gru"), tmp_path / "plain.onnx").contract
    assert [output.role for output in contract.outputs] == ["prediction", "expected"]
    assert [state.input for state in contract.states] == ["h0", "forecast", "last"]
    assert (contract.time_input, contract.detector, contract.missing) == (None, None, "own-forecast")
    assert contract.states[1].initial == [10.0, 500.0] and contract.states[2].initial == [10.0, -3.0, 500.0]


def test_one_file_holds_everything(exported: Exported) -> None:
    """Opset 18, no external data, and the recurrent weights are initialisers of the LSTM nodes themselves."""
    for path in (exported.model, exported.sequence):
        graph = onnx.load(path, load_external_data=False)
        assert max(opset.version for opset in graph.opset_import if opset.domain == "") >= 18
        assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in graph.graph.initializer)
        weights = {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer}
        lstms = [node for node in graph.graph.node if node.op_type == "LSTM"]
        assert [[weights[name] for name in node.input[1:3]] for node in lstms] == [
            [[1, 32, 3], [1, 32, 8]],
            [[1, 32, 8], [1, 32, 8]],
        ]
        assert str(Path.home()).encode() not in path.read_bytes()


def test_the_folder_has_three_files_and_no_leavings(exported: Exported) -> None:
    """Nothing of the drafts stays behind."""
    assert sorted(path.name for path in exported.model.parent.iterdir()) == [
        "pump.onnx",
        "pump.pt",
        "pump.sequence.onnx",
    ]


def test_the_weights_build_the_same_model_again(exported: Exported) -> None:
    """torch gives the same bits from the saved weights as from the model that was saved."""
    assert exported.weights is not None
    x = readings(20, 3)
    one, again = reference_of(model("lstm", 2))(x), reference_of(load(exported.weights))(x)
    assert all(np.array_equal(one[name], again[name]) for name in one)


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    """One sentence, whatever the file is."""
    torch.save({"something": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("other.pt", "text.pt", "absent.pt"):
        with pytest.raises(ExportError, match=f"{name}: is not the weights of a statestep model"):
            load(tmp_path / name)


def test_the_same_model_gives_the_same_fingerprint(exported: Exported, tmp_path: Path) -> None:
    """Exporting twice writes the same bytes."""
    again = export_step(
        model("lstm", 2),
        tmp_path / "pump.onnx",
        detector_of(model("lstm", 2)),
        model_version="7",
        ranges=RANGES,
        units={"flow": "l/s"},
        period_seconds=300,
        license="Apache-2.0",
        trained_on="pumps.csv",
        author="A. Team",
        description="Forecasts flow and speed.",
    )
    assert again.model.read_bytes() == exported.model.read_bytes()
    assert again.sequence.read_bytes() == exported.sequence.read_bytes()


def test_a_failed_proof_leaves_what_was_there(tmp_path: Path) -> None:
    """A model that gives NaN is refused with the place; the older file under the name stays, and nothing joins it."""
    network = Forecaster(ForecasterConfig(3, (0, 1, 2), hidden=4))
    torch.nn.init.constant_(network.head.bias, float("nan"))
    broken = StreamModel(network, NoScaling(), features=FEATURES)
    (tmp_path / "model.onnx").write_bytes(b"older")
    with pytest.raises(ExportError, match=r"finite outputs.*step 1, stream 1: prediction of 'flow' is not a finite"):
        export_step(broken, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"older"


def test_a_unit_of_no_feature_is_refused(tmp_path: Path) -> None:
    """A misspelt name would lose its unit in silence."""
    with pytest.raises(
        ExportError, match=r"there is a unit for 'flaw', the features are \['flow', 'pressure', 'speed'"
    ):
        export_step(model(), tmp_path / "model.onnx", units={"flaw": "l/s"})


def test_a_name_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    """The sentence names the file."""
    with pytest.raises(ExportError, match=r"model\.pt.*must end in \.onnx"):
        export_step(model(), tmp_path / "model.pt")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A file where a folder should be gives one sentence."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written to"):
        export_step(model(), tmp_path / "file" / "model.onnx")
