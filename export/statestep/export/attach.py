"""A detector for a step model that is finished already: measured on its own forecasts, and put behind its graphs.

Needs no torch. The forecasts are what the runtime gives when it steps the model over the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx

from statestep.export import histories
from statestep.export.calibrate import Judging, Past, calibrated
from statestep.export.compare import Array
from statestep.export.compose import Ports, composed, composed_sequence
from statestep.export.detector import Forecasts
from statestep.export.series import Block, blocks_of, enough, mean_of, series_of
from statestep.export.whole import dims_of
from statestep.runtime import Contract, StepModel, stamp

VALIDATION = 0.2  # share of each stream's rows, at its end, that the threshold is taken from


def attached(
    graph: onnx.ModelProto,
    sequence: onnx.ModelProto | None,
    contract: Contract,
    data: Mapping[str, Array],
    judging: Judging,
) -> tuple[onnx.ModelProto, onnx.ModelProto | None, Contract]:
    """The step graph, its sequence form and its contract, with a detector; as they were where none can be put there.

    None can be behind a model without a forecast of its features in float32, behind one that scores already, or where
    the sequence form answers for the last row alone. Raises `DataError` for data that nothing can be measured on.
    """
    found = contract.output("prediction")
    if found is None or found.batch_axis or contract.input_dtype != "float32" or contract.output("score") is not None:
        return graph, sequence, contract
    if sequence is not None:
        answer = next(value for value in sequence.graph.output if value.name == found.name)
        if len(dims_of(answer)) != 3:
            return graph, sequence, contract
    targets = tuple(contract.feature_names.index(name) for name in found.features or contract.feature_names)
    stamp(graph, contract)
    model = StepModel(graph.SerializeToString(), name=contract.name)
    series, _ = series_of(data, contract.feature_names, VALIDATION)
    blocks = blocks_of(series)
    enough(blocks, 1)
    pasts = [past_of(model, block) for block in blocks]
    known = Forecasts(features=contract.feature_names, targets=targets, mean=mean_of(series))
    done = calibrated(pasts, known, judging)
    ports = Ports(x=contract.input, prediction=found.name)
    made = composed(graph, done.detector, ports)
    whole = None
    if sequence is not None:
        whole = composed_sequence(sequence, done.detector, replace(ports, x=sequence.graph.input[0].name), made.names)
    return (
        made.graph,
        whole,
        replace(
            contract,
            states=(*contract.states, *made.states),
            outputs=(*contract.outputs, *made.outputs),
            missing="own-forecast",
            time_input=made.time,
            detector=done.told(),
        ),
    )


def past_of(model: StepModel, block: Block) -> Past:
    """A step model's forecasts over a block of streams."""
    prediction = model.contract.output("prediction")
    assert prediction is not None
    return Past(block, histories.stepped(model, block.x)[prediction.name])
