"""The models that the laws are held to: every cell at every depth, mixed stacks, and modules of a team's own.

Each is exported without a detector, which is held to the laws in `test_detectors.py`, and without the proof that
`export_step` makes: that is what the laws are here to show.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx

from statestep.export import CELLS, Forecaster, StreamModel, scaler_of
from statestep.export.against import SequenceFile, sequence_path
from statestep.export.compare import Outputs
from statestep.export.compose import Ports, composed, composed_sequence
from statestep.export.detector import Forecasts
from statestep.export.graph import sequence_graph, step_graph
from statestep.export.laws import Reference
from statestep.export.lift import lift
from statestep.export.weights import reference_of
from statestep.export.write import contract_of
from statestep.runtime import StepModel, stamp

from ..export import reference
from ..export.models import FEATURES, MEAN, STD, Array, model, readings
from ..export.step_modules import KINDS, made, weights_of

UNITS = 12
SEED = 5  # of the weights
STEPS, BATCHES = (1, 2, 50), (1, 2, 7, 64)
X = readings(max(STEPS), max(BATCHES), seed=8)  # [T, B, F]; every case is its beginning

STACKS = [f"{cell} x{layers}" for cell in CELLS for layers in (1, 2, 3)]
MIXED = ["lstm,gru", "rnn,lstm-peephole", "gru-reset-before,lstm-layernorm,lstm"]
MODULES = list(KINDS)
NAMES = [*STACKS, *MIXED, *MODULES]


class Specimen(NamedTuple):
    """A model as the runtime has it, and the three things that it must be equal to."""

    step: StepModel
    offline: SequenceFile
    torch: Reference
    numpy: Outputs  # float64: the prediction over X [T, B, K]
    path: Path


def specimen(name: str, folder: Path) -> Specimen:
    """One of `NAMES`, exported into `folder`."""
    stream_model = _stream_model(name)
    path, ports = folder / "model.onnx", Ports()
    known = Forecasts(features=FEATURES, targets=stream_model.network.targets, mean=np.array(MEAN))
    made = composed(step_graph(stream_model), known, ports)
    stamp(made.graph, replace(contract_of(stream_model, made, ranges={}, units={}), name=name))
    onnx.save(made.graph, path)
    names = {output.role or "": output.name for output in made.outputs}
    onnx.save(composed_sequence(sequence_graph(stream_model), known, ports, names), sequence_path(path))
    z = (X.astype(np.float64) - MEAN) / STD  # [T, B, F]
    columns = list(stream_model.network.targets)
    corrected = np.stack([_in_numpy(name, stream_model, z[:, stream]) for stream in range(z.shape[1])], axis=1)
    base = np.array(MEAN)[columns] if name in MODULES else X[..., columns].astype(np.float64)
    truth = base + np.array(STD)[columns] * corrected  # [T, B, K]
    offline = SequenceFile.load(sequence_path(path))
    return Specimen(StepModel.load(path), offline, reference_of(stream_model), {"prediction": truth}, path)


def _stream_model(name: str) -> StreamModel:
    """In the sensors' units."""
    if name in MODULES:
        scaler = scaler_of(MEAN, STD, FEATURES)
        return lift(made(name), features=FEATURES, states=KINDS[name].states, scaler=scaler).model
    cell, _, layers = name.partition(" x")
    return model(cell, int(layers or 1), hidden=UNITS, seed=SEED)


def _in_numpy(name: str, stream_model: StreamModel, z: Array) -> Array:
    """One stream z [T, F] in standard units through the network, in float64: [T, K]."""
    if name in MODULES:
        return _module_in_numpy(name, z)
    network = stream_model.network
    assert isinstance(network, Forecaster)
    below = z
    if len(network.parts) == 1:
        below = reference.hidden_states(network.config.kinds[0], reference.layers_of(network.rnn), below)  # [T, H]
    else:
        for cell, part in zip(network.config.kinds, network.parts, strict=True):
            below = reference.hidden_states(cell, reference.layers_of(part), below)
    weight, bias = (value.detach().double().numpy() for value in (network.head.weight, network.head.bias))
    return np.asarray(below @ weight.T + bias)


def _module_in_numpy(name: str, z: Array) -> Array:
    weights, states, given = weights_of(made(name)), [np.zeros(state.shape) for state in KINDS[name].states], []
    for row in z:
        forecast, states = KINDS[name].twin(row, states, weights)
        given.append(forecast)
    return np.stack(given)
