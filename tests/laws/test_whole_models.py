"""All laws on models as people have them: exported with scaling and detector, or converted from other tools' graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from statestep.export import Judging, export_step, laws_of
from statestep.export.against import sequence_path
from statestep.export.convert import convert
from statestep.export.histories import stepped
from statestep.runtime import StepModel

from ..export.models import detector_of, model, readings

KINDS = [
    ("lstm", 2, "per-stream", "likelihood"),
    ("gru", 1, "pooled", "conformal"),
    ("lstm,rnn", 1, "per-stream", "plain"),
]
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "models"
CONVERTED = ["keras_gru", "legacy_lstm2", "legacy_rnn", "torch_tcn_chomped"]  # a Loop, LSTMs, and two that round


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with everything that `statestep fit` gives it."""
    cell, layers, scale, rule = request.param
    made = model(cell, layers, scale=scale, hidden=24)
    detector = detector_of(made, Judging(rule=rule))
    return export_step(made, tmp_path_factory.mktemp("whole") / "model.onnx", detector).model


def test_an_exported_model_keeps_all_laws(exported: Path) -> None:
    """On drawn readings and on given ones, torch's law among them, for the weights lie beside it."""
    data = {str(stream): readings(80, 3, seed=2)[:, stream] for stream in range(3)}
    found = laws_of(exported, data, seed=1)
    assert len(found) == 8 and str(found[-1]) == "agrees with torch"
    for law in found:
        law()


@pytest.mark.parametrize("steps", [1, 2, 60])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_any_session_gives_the_same(exported: Path, steps: int, batch: int) -> None:
    """Stepped = the sequence file as anybody runs it, with onnxruntime's default settings and threads."""
    x = readings(steps, batch, seed=steps * batch)
    session = ort.InferenceSession(sequence_path(exported), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    ours = stepped(StepModel.load(exported), x)
    assert sorted(ours) == sorted(names)
    for name, whole in zip(names, session.run(names, {"x": x}), strict=True):
        assert ours[name].tobytes() == np.ascontiguousarray(whole).tobytes(), name


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_model_keeps_all_laws(name: str, tmp_path: Path) -> None:
    """Within 1e-5 standard deviations of its sequence where the original holds RNN or Conv, to the bit elsewhere."""
    for law in laws_of(convert(FIXTURES / f"{name}.onnx", tmp_path / "model.onnx").model, seed=1):
        law()
