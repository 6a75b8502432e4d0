"""From a stream model to files: the step model with its contract, its sequence form and its weights, proven first.

Everything is written into a folder beside the target, verified there, and only then moved to its name, the step
model last: a failed proof, or a crash, leaves what was there before.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import torch

from statestep.export.against import sequence_path
from statestep.export.calibrate import Calibrated
from statestep.export.compare import Array
from statestep.export.compose import Composed, Ports, composed, composed_sequence
from statestep.export.detector import Forecasts
from statestep.export.errors import ExportError
from statestep.export.forecaster import Forecaster
from statestep.export.forms import OWN, StreamModel
from statestep.export.gaps import measure
from statestep.export.graph import sequence_graph, step_graph
from statestep.export.scaling import PooledScaling
from statestep.export.verify import Report, verify
from statestep.export.weights import reference_of, save
from statestep.runtime import Contract, Feature, Output, StepModel, stamp


@dataclass(frozen=True, slots=True)
class Exported:
    """The files that were written. A lifted module's weights stay its team's own: `weights` is None."""

    model: Path
    sequence: Path
    weights: Path | None
    contract: Contract
    report: Report


def export_step(
    model: StreamModel,
    out: str | Path,
    detector: Calibrated | None = None,
    *,
    name: str | None = None,
    model_version: str = "1",
    ranges: Mapping[str, tuple[float, float]] | None = None,
    units: Mapping[str, str] | None = None,
    period_seconds: float | None = None,
    license: str | None = None,
    trained_on: str | None = None,
    author: str | None = None,
    description: str | None = None,
    data: Mapping[str, Array] | None = None,
) -> Exported:
    """Write `model` to `out` (`<name>.onnx`), `<name>.sequence.onnx` and, for a `Forecaster`, `<name>.pt`.

    With a `detector` behind it, it scores and alarms too.

    `ranges` has the least and greatest reading seen of each feature and `units` their units, for the contract;
    `data` (stream → [T, F]) is checked along with drawn sequences, and how soon the model forgets is measured on it.
    The other settings go into the contract as they are. Raises `ExportError` where `out` cannot be written or the proof
    fails; then nothing has been written.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise ExportError(f"the model is to be written to {str(out)!r}, its name must end in .onnx")
    if strangers := sorted(set(units or {}) - set(model.features)):
        raise ExportError(f"there is a unit for {strangers[0]!r}, the features are {list(model.features)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as folder:
            known = _known(model) if detector is None else detector.detector
            ports = Ports(own=OWN if model.per_stream else None)
            made = composed(step_graph(model), known, ports)
            sequence = composed_sequence(sequence_graph(model), known, ports, made.names)
            contract = replace(
                contract_of(model, made, ranges=ranges or {}, units=units or {}),
                name=name or out.stem,
                model_version=model_version,
                period_seconds=period_seconds,
                detector=None if detector is None else detector.told(),
                license=license,
                trained_on=trained_on,
                author=author,
                description=description,
            )
            return _write(model, made.graph, sequence, contract, Path(folder) / out.name, out, data)
    except OSError as error:
        raise ExportError(f"the model cannot be written to {str(out)!r}: {error.strerror}") from None


def contract_of(
    model: StreamModel,
    made: Composed,
    *,
    ranges: Mapping[str, tuple[float, float]],
    units: Mapping[str, str],
) -> Contract:
    """What the step model's tensors mean."""
    features = []
    for feature in model.features:
        low, high = ranges.get(feature, (None, None))
        features.append(Feature(feature, units.get(feature), low, high))
    return Contract(
        name="model",
        features=tuple(features),
        states=(*model.states, *made.states),
        outputs=(Output("prediction", role="prediction", features=model.target_names), *made.outputs),
        missing="own-forecast",
        time_input=made.time,
        producer=f"statestep {version('statestep')} (torch {torch.__version__.partition('+')[0]})",
    )


def _known(model: StreamModel) -> Forecasts:
    """What is known of a model without a detector: that readings lie about its scaler's mean, or about 0."""
    scaling = model.scaling
    mean = scaling.mean.double().numpy() if isinstance(scaling, PooledScaling) else np.zeros(len(model.features))
    return Forecasts(features=model.features, targets=model.network.targets, mean=mean)


def _write(
    model: StreamModel,
    graph: onnx.ModelProto,
    sequence: onnx.ModelProto,
    contract: Contract,
    draft: Path,
    out: Path,
    data: Mapping[str, Array] | None,
) -> Exported:
    """Write at `draft`, prove it there, move it to `out`."""
    stamp(graph, contract)
    onnx.save(graph, draft)
    onnx.save(sequence, sequence_path(draft))
    report = verify(draft, data, torch_model=reference_of(model))
    if not report.passed:
        failed = report.failures[0]
        raise ExportError(f"the exported model fails its proof ({failed.name}): {failed.detail}")
    gaps = None
    if data and contract.period_seconds is not None:  # without a period nobody can tell that a stream was silent
        gaps = measure(StepModel(graph.SerializeToString(), name=contract.name), data)
    contract = replace(contract, parity=report.parity, memory=report.memory, gaps=gaps)
    stamp(graph, contract)  # the proof goes into the metadata; the graph that was proven stays as it is
    onnx.save(graph, draft)
    names = [sequence_path(draft), draft]
    weights = None
    if isinstance(model.network, Forecaster):
        weights = out.with_suffix(".pt")
        save(model, draft.with_suffix(".pt"))
        names.insert(0, draft.with_suffix(".pt"))
    for path in names:
        path.replace(out.parent / path.name)
    return Exported(out, sequence_path(out), weights, contract, report)
