"""Any ONNX graph over sequences → a step model that is proven equal to it; one from elsewhere gets its contract.

A conversion reads the graph as hostile, finds out what its axes are, gives every node that walks along time its state
from outside, cuts the result down to one timestep, and proves it. No torch is needed. What cannot be proven is not
written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from statestep.export.against import rounding, sequence_path
from statestep.export.attach import attached
from statestep.export.branches import without_branches
from statestep.export.carry import carried
from statestep.export.compare import Array
from statestep.export.describe import FORECASTS, Described, behind, contract_of, told_of
from statestep.export.entrance import refuse_unfit
from statestep.export.errors import ExportError
from statestep.export.gaps import measure
from statestep.export.horizon import memory
from statestep.export.layout import layout_of
from statestep.export.lists import without_lists
from statestep.export.offline import offline_of
from statestep.export.probe import probe
from statestep.export.proof import GROWN, Proof, blame, company, prove, stepped
from statestep.export.readings import drawn as drawn_readings
from statestep.export.scaler import Scaler
from statestep.export.stepping import step_graph_of
from statestep.export.surgery import nodes_of, opset_of, prepared, session
from statestep.export.verify import Report, verify
from statestep.export.weigh import cost, halved, rounded
from statestep.export.whole import LAYOUTS, RECURRENT, Whole, dims_of, drawn
from statestep.runtime import Contract, ModelError, StepModel, guard, stamp
from statestep.runtime.adapt import one_by_one, with_constants
from statestep.runtime.model import tensor_of
from statestep.runtime.pairs import Named, detect

WEIGHTS = ("fp32", "fp16")
PROOF_ROWS = 200  # of each given sequence; the last check goes over more of them
PROOF_STREAMS = 4
COST_STEPS, COST_STREAMS = 200, 8  # of the readings that tell what float16 weights change


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written. A model that was a step model already has no `proof`, no `sequence`, and no `notes`."""

    model: Path
    sequence: Path | None
    contract: Contract
    report: Report
    proof: Proof | None = None
    weights_cost: float | None = None  # what float16 weights change, in units of each output's spread


def convert(
    path: str | Path,
    out: str | Path,
    described: Described | None = None,
    *,
    layout: str | None = None,
    states: Named | None = None,
    constants: Mapping[str, Any] | None = None,
    weights: str = "fp32",
    data: Mapping[str, Array] | None = None,
    seed: int = 0,
) -> Converted:
    """Write the step model of the graph at `path` to `out`, and the graph itself as `<name>.sequence.onnx`.

    `layout` says which axes an input has (BTF: batch, time, feature), where that cannot be told. `states` (input →
    output, or (output, batch axis)) and `constants` are for step models from elsewhere and for inputs that are no
    readings. `weights` "fp16" stores the weights in half the bytes, computed with as before. `data` (stream → readings
    [T, F]) is gone by beside random sequences drawn from `seed`.

    Raises `ModelError` for a file that is no ONNX model, `ExportError` for one that cannot be streamed or whose proof
    fails; then nothing has been written.
    """
    out, described = Path(out), described or Described()
    if out.suffix != ".onnx":
        raise ExportError(f"the model is to be written to {str(out)!r}, its name must end in .onnx")
    if weights not in WEIGHTS:
        raise ExportError(f"weights is {weights!r}, it must be one of {list(WEIGHTS)}")
    if described.forecasts not in FORECASTS:
        raise ExportError(f"forecasts is {described.forecasts!r}, it must be one of {list(FORECASTS)}")
    if layout is not None and layout not in LAYOUTS:
        raise ExportError(f"layout is {layout!r}, it must be one of {list(LAYOUTS)}")
    raw = guard.read(path)
    model = guard.parse(raw, str(path))
    step = _as_step_model(raw, model, path, states, constants, described)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as folder:
            draft = Path(folder) / out.name
            if step is not None:
                done = _stamped(model, step, described, states, constants, weights, draft, data)
            else:
                done = _converted(model, described, layout, states, constants, weights, draft, data, seed)
            for file in (sequence_path(draft), draft):
                if file.exists():
                    file.replace(out.parent / file.name)
    except OSError as error:
        raise ExportError(f"the model cannot be written to {str(out)!r}: {error.strerror}") from None
    return replace(done, model=out, sequence=None if done.sequence is None else sequence_path(out))


def trial(
    path: str | Path,
    *,
    layout: str | None = None,
    states: Named | None = None,
    constants: Mapping[str, Any] | None = None,
) -> None:
    """Run the graph at `path` as `convert` does first, for a process that may die of it; nothing comes of it."""
    whole = _whole(guard.parse(guard.read(path), str(path)), layout, states, constants)
    probe(Whole(whole.model, whole.layout, plain=True))


def _as_step_model(
    raw: bytes,
    model: ModelProto,
    path: str | Path,
    states: Named | None,
    constants: Mapping[str, Any] | None,
    described: Described,
) -> StepModel | None:
    """The model, where it takes single timesteps and its own state already."""
    kept = {*(states or {}), *(constants or {})}
    sizes = [[dim.dim_value for dim in dims_of(v)] for v in model.graph.input if v.name not in kept]
    if any(len(dims) == 3 and dims.count(0) in (0, 2) for dims in sizes):  # batch and time are free, or nothing is
        return None
    try:
        return StepModel(raw, name=str(path), states=states, constants=constants, features=described.features)
    except ModelError:
        if states is not None or (not _walks(model) and len(sizes) > 1):
            raise
        return None


def _walks(model: ModelProto) -> bool:
    """Whether anything in a graph could walk along time, or look back."""
    return any(node.op_type in (*RECURRENT, "Loop", "Scan", "Conv", "Pad") for node in nodes_of(model.graph))


def _stamped(
    model: ModelProto,
    step: StepModel,
    described: Described,
    states: Named | None,
    constants: Mapping[str, Any] | None,
    weights: str,
    draft: Path,
    data: Mapping[str, Array] | None,
) -> Converted:
    """A step model from elsewhere, its graph as it is, with the contract that was told or found.

    One that takes sequences of one timestep becomes one that takes rows, as it does whenever it is loaded.
    """
    opset = opset_of(model)
    model = with_constants(model, constants or {}, opset)
    ready = session(model)
    inputs, outputs = map(tensor_of, ready.get_inputs()), map(tensor_of, ready.get_outputs())
    found, entering, leaving = step.contract, list(inputs), list(outputs)
    if any(tensor.name == found.input and len(tensor.shape) != 2 for tensor in entering):
        guess = detect(found.name, entering, leaving, named=states, features=described.features)
        if stepwise := one_by_one(model, guess, entering, leaving, opset):
            model, found = stepwise
    contract = told_of(replace(found, name=described.name or draft.stem), described, data)
    change = None
    if weights == "fp16":
        model, change = _in_half(model, contract)
    graph = behind(model, contract, described)
    if described.judging is not None and data:
        graph, _, contract = attached(graph, None, contract, data, described.judging)
    contract, report = _written(graph, contract, draft, data, sequence=False)
    return Converted(draft, None, contract, report, weights_cost=change)


def _in_half(model: ModelProto, contract: Contract) -> tuple[ModelProto, float]:
    """A step model with its weights in float16, and what that changes in its outputs."""
    less = rounded(model)
    answers = []
    for each in (model, less):
        stamp(each, contract)
        step = StepModel(each.SerializeToString(), name=contract.name)
        answers.append(stepped(step, drawn_readings(contract, COST_STEPS, COST_STREAMS, np.random.default_rng(0)))[0])
    return halved(less), cost(*answers)


def _converted(
    model: ModelProto,
    described: Described,
    layout: str | None,
    states: Named | None,
    constants: Mapping[str, Any] | None,
    weights: str,
    draft: Path,
    data: Mapping[str, Array] | None,
    seed: int,
) -> Converted:
    """A graph over sequences, cut down to one timestep and proven against itself."""
    original, change = _whole(model, layout, states, constants), None
    if weights == "fp16":
        original, change = _rounded(original, seed)
    ready, axes = original.model, original.layout
    tags = probe(Whole(ready, axes, plain=True))
    work = carried(ready, axes, tags)
    graph = step_graph_of(work, tags)
    contract = contract_of(original, work, described, described.name or draft.stem, data)
    contract = replace(contract, input=graph.graph.input[0].name)
    stamp(graph, contract)
    try:
        step = StepModel(graph.SerializeToString(), name=contract.name)
    except ModelError as error:
        raise ExportError(blame(original, work, tags) or f"the step model does not run: {error}") from None
    proof = prove(original, work, step, tags, given=_given(data, axes.width, described.scaler), seed=seed)
    if sentence := company(graph, step):
        raise ExportError(sentence)
    if weights == "fp16":
        graph = halved(graph)
    apart = float(f"{proof.absolute:.2g}")
    contract = replace(
        contract, parity={"steps": proof.timesteps, "max_abs_difference": apart, "against": "the original graph"}
    )
    whole, graph = behind(offline_of(ready, axes, tags), contract, described), behind(graph, contract, described)
    if described.judging is not None and data:
        graph, judged, contract = attached(graph, whole, contract, data, described.judging)
        whole = judged or whole
    onnx.save(whole, sequence_path(draft))
    contract, report = _written(graph, contract, draft, data, sequence=True)
    return Converted(draft, sequence_path(draft), contract, report, proof, change)


def _rounded(full: Whole, seed: int) -> tuple[Whole, float]:
    """The graph with weights that float16 can hold, and what that changes in its outputs."""
    less = Whole(rounded(full.model), full.layout)
    steps, streams = full.layout.steps or COST_STEPS, full.layout.streams or COST_STREAMS
    x = drawn(full.model, full.layout, steps, streams, seed)
    return less, cost(full.run(x), less.run(x))


def _whole(model: ModelProto, layout: str | None, states: Named | None, constants: Mapping[str, Any] | None) -> Whole:
    """The graph made ready to be taken apart, its axes found out."""
    ready = prepared(with_constants(model, constants or {}, opset_of(model)))
    refuse_unfit(ready)
    without_lists(ready.graph)
    axes = layout_of(ready, layout, states)
    while opened := without_branches(Whole(ready, axes, plain=True)):
        ready, axes = opened, layout_of(opened, layout, states)
    return Whole(ready, axes)


def _written(
    graph: ModelProto, contract: Contract, draft: Path, data: Mapping[str, Array] | None, *, sequence: bool
) -> tuple[Contract, Report]:
    """Write the step model at `draft` with its memory horizon, and check it as `statestep verify` will."""
    stamp(graph, contract)
    step = StepModel(graph.SerializeToString(), name=contract.name)
    gaps = measure(step, data) if data and contract.period_seconds is not None else None
    contract = replace(contract, memory=memory(step, data), gaps=gaps)
    stamp(graph, contract)
    onnx.save(graph, draft)
    report = verify(draft, data, sequence=sequence)
    if not report.passed:
        failed = report.failures[0]
        found = rounding(onnx.load(sequence_path(draft))) if failed.name == "streaming = offline" else ()
        grown = f": {GROWN.format(', '.join(found))}" if found else ""
        raise ExportError(f"the converted model fails its proof ({failed.name}: {failed.detail}){grown}")
    return contract, report


def _given(data: Mapping[str, Array] | None, width: int, scaler: Scaler | None) -> list[Array]:
    """The beginnings of the given streams as the network reads them, as sequences [T, 1, F]."""
    found = []
    for rows in list((data or {}).values())[:PROOF_STREAMS]:
        if rows.ndim == 2 and rows.shape[1] == width:
            whole = np.ascontiguousarray(rows if scaler is None else (rows - scaler.mean) / scaler.std, np.float32)
            found.append(whole[np.isfinite(whole).all(axis=1)][:PROOF_ROWS, None])
    return [x for x in found if len(x)]
