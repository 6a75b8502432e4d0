"""Any ONNX graph over sequences → a step model that is proven equal to it; one from elsewhere gets its contract.

A conversion reads the graph as hostile, finds out what its axes are, gives every node that walks along time its state
from outside, cuts the result down to one timestep, and proves it. No torch is needed. What cannot be proven is not
written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from statestep.export.against import sequence_path
from statestep.export.branches import without_branches
from statestep.export.carry import carried
from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.horizon import memory
from statestep.export.layout import layout_of
from statestep.export.lists import without_lists
from statestep.export.offline import offline_of
from statestep.export.probe import probe
from statestep.export.proof import Proof, blame, company, prove
from statestep.export.scaler import Scaler, behind_scaler
from statestep.export.stateful import Carried
from statestep.export.stepping import step_graph_of
from statestep.export.surgery import opset_of, prepared
from statestep.export.verify import Report, verify
from statestep.export.weigh import halved, rounded
from statestep.export.whole import LAYOUTS, Whole, dims_of, vocabulary
from statestep.runtime import Contract, Feature, ModelError, Output, StepModel, guard, stamp
from statestep.runtime.adapt import with_constants
from statestep.runtime.pairs import Named

WEIGHTS = ("fp32", "fp16")
FORECASTS = ("scaled", "raw")
PROOF_ROWS = 200  # of each given sequence; the last check goes over more of them
PROOF_STREAMS = 4


@dataclass(frozen=True, slots=True)
class Described:
    """What a graph cannot say of itself: what its columns are, which output forecasts the next row of which targets.

    With a `scaler` it reads standardised values; `forecasts` says whether its forecast is such too ("scaled") or in the
    sensors' own units ("raw").
    """

    name: str | None = None
    model_version: str = "1"
    features: tuple[str, ...] | None = None
    targets: tuple[str, ...] | None = None
    prediction: str | None = None
    period_seconds: float | None = None
    units: Mapping[str, str] | None = None
    author: str | None = None
    license: str | None = None
    description: str | None = None
    scaler: Scaler | None = None
    forecasts: str = "scaled"


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
    step = _as_step_model(raw, path, states, constants)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as folder:
            draft = Path(folder) / out.name
            if step is not None:
                done = _stamped(model, step, described, constants, weights, draft, data)
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
    whole = _whole(guard.parse(guard.read(path), str(path)), layout, states, constants, "fp32")
    probe(Whole(whole.model, whole.layout, plain=True))


def _as_step_model(
    raw: bytes, path: str | Path, states: Named | None, constants: Mapping[str, Any] | None
) -> StepModel | None:
    """The model, where it takes single timesteps and its own state already."""
    if _reads_sequences(guard.parse(raw, str(path)), states or {}, constants or {}):
        return None
    try:
        return StepModel(raw, name=str(path), states=states, constants=constants)
    except ModelError:
        if states is not None:
            raise
        return None


def _reads_sequences(model: ModelProto, states: Named, constants: Mapping[str, Any]) -> bool:
    """Whether an input has two free axes and one of features: batch and time."""
    for value in model.graph.input:
        sizes = [dim.dim_value for dim in dims_of(value)]
        if value.name not in {*states, *constants} and len(sizes) == 3 and sizes.count(0) == 2:
            return True
    return False


def _stamped(
    model: ModelProto,
    step: StepModel,
    described: Described,
    constants: Mapping[str, Any] | None,
    weights: str,
    draft: Path,
    data: Mapping[str, Array] | None,
) -> Converted:
    """A step model from elsewhere, its graph as it is, with the contract that was told or found."""
    model = with_constants(model, constants or {}, opset_of(model))
    if weights == "fp16":
        model = halved(model)
    features = described.features or step.contract.feature_names
    if len(features) != len(step.contract.features):
        raise ExportError(f"{len(features)} features are named, the model takes {len(step.contract.features)}")
    found = replace(
        step.contract,
        features=_features(features, described, data, [None] * len(features)),
        outputs=_with_roles([output.name for output in step.contract.outputs], features, described),
    )
    contract = _with_description(found, described, draft)
    contract, report = _written(_behind(model, contract, described), contract, draft, data, sequence=False)
    return Converted(draft, None, contract, report)


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
    original = _whole(model, layout, states, constants, weights)
    ready, axes = original.model, original.layout
    tags = probe(Whole(ready, axes, plain=True))
    work = carried(ready, axes, tags)
    graph = step_graph_of(work, tags)
    contract = _contract(original, work, described, draft, data)
    contract = replace(contract, input=graph.graph.input[0].name)
    stamp(graph, contract)
    try:
        step = StepModel(graph.SerializeToString(), name=contract.name)
    except ModelError as error:
        raise ExportError(blame(original, work, tags) or f"the step model does not run: {error}") from None
    proof = prove(original, work, step, tags, given=_given(data, axes.width, described.scaler), seed=seed)
    if sentence := company(graph, step):
        raise ExportError(sentence)
    whole = offline_of(ready, axes, tags)
    onnx.save(_behind(whole, contract, described), sequence_path(draft))
    if weights == "fp16":
        graph = halved(graph)
    apart = float(f"{proof.absolute:.2g}")
    contract = replace(
        contract, parity={"steps": proof.timesteps, "max_abs_difference": apart, "against": "the original graph"}
    )
    contract, report = _written(_behind(graph, contract, described), contract, draft, data, sequence=True)
    return Converted(draft, sequence_path(draft), contract, report, proof)


def _whole(
    model: ModelProto, layout: str | None, states: Named | None, constants: Mapping[str, Any] | None, weights: str
) -> Whole:
    """The graph made ready to be taken apart, its axes found out."""
    ready = prepared(with_constants(model, constants or {}, opset_of(model)))
    without_lists(ready.graph)
    if weights == "fp16":
        ready = rounded(ready)
    named = {name: pair if isinstance(pair, str) else pair[0] for name, pair in (states or {}).items()}
    axes = layout_of(ready, layout, named)
    while opened := without_branches(Whole(ready, axes, plain=True)):
        ready, axes = opened, layout_of(opened, layout, named)
    return Whole(ready, axes)


def _written(
    graph: ModelProto, contract: Contract, draft: Path, data: Mapping[str, Array] | None, *, sequence: bool
) -> tuple[Contract, Report]:
    """Write the step model at `draft` with its memory horizon, and check it as `statestep verify` will."""
    stamp(graph, contract)
    step = StepModel(graph.SerializeToString(), name=contract.name)
    contract = replace(contract, memory=memory(step, data))
    stamp(graph, contract)
    onnx.save(graph, draft)
    report = verify(draft, data, sequence=sequence)
    if not report.passed:
        failed = report.failures[0]
        raise ExportError(f"the converted model fails its proof ({failed.name}): {failed.detail}")
    return contract, report


def _behind(graph: ModelProto, contract: Contract, described: Described) -> ModelProto:
    """The graph with its owner's scaler in it, where there is one."""
    if described.scaler is None:
        return graph
    forecast = contract.output("prediction")
    name = None if forecast is None or described.forecasts == "raw" else forecast.name
    targets = () if forecast is None else forecast.features or contract.feature_names
    columns = [contract.feature_names.index(target) for target in targets]
    entrance = contract.input if any(value.name == contract.input for value in graph.graph.input) else "x"
    return behind_scaler(graph, described.scaler, name, columns, entrance=entrance)


def _given(data: Mapping[str, Array] | None, width: int, scaler: Scaler | None) -> list[Array]:
    """The beginnings of the given streams as the network reads them, as sequences [T, 1, F]."""
    found = []
    for rows in list((data or {}).values())[:PROOF_STREAMS]:
        if rows.ndim == 2 and rows.shape[1] == width:
            whole = np.ascontiguousarray(rows if scaler is None else (rows - scaler.mean) / scaler.std, np.float32)
            found.append(whole[np.isfinite(whole).all(axis=1)][:PROOF_ROWS, None])
    return [x for x in found if len(x)]


def _features(
    names: Sequence[str], described: Described, data: Mapping[str, Array] | None, sizes: Sequence[int | None]
) -> tuple[Feature, ...]:
    """Each column with its unit and its range: of the table that it is looked up in, or of the given readings."""
    given = [rows for rows in (data or {}).values() if rows.ndim == 2 and rows.shape[1] == len(names) and len(rows)]
    found = []
    for column, (name, size) in enumerate(zip(names, sizes, strict=True)):
        low, high = (None, None) if size is None else (0.0, size - 1.0)
        if size is None and given:
            seen = np.concatenate([rows[:, column] for rows in given])
            seen = seen[np.isfinite(seen)]
            low, high = (float(seen.min()), float(seen.max())) if len(seen) else (None, None)
        found.append(Feature(name, (described.units or {}).get(name), low, high))
    return tuple(found)


def _contract(
    original: Whole, work: Carried, described: Described, draft: Path, data: Mapping[str, Array] | None
) -> Contract:
    """What the tensors of the step model mean, as far as the graph and its owner say."""
    width = original.layout.width
    features = described.features or tuple(f"x{column}" for column in range(width))
    if len(features) != width:
        raise ExportError(f"{len(features)} features are named, the graph takes {width} readings a timestep")
    sizes = [size for e in original.layout.entries for size in [vocabulary(original.model, e)] * e.width]
    states = {state.output for state in work.states}
    names = [value.name for value in work.model.graph.output if value.name not in states]
    contract = Contract(
        name=described.name or draft.stem,
        features=_features(features, described, data, sizes),
        states=tuple(work.states),
        outputs=_with_roles(names, features, described),
    )
    return _with_description(contract, described, draft)


def _with_roles(names: Sequence[str], features: Sequence[str], described: Described) -> tuple[Output, ...]:
    """The outputs, the forecast among them where its owner names it or its targets."""
    prediction = described.prediction
    if prediction is None and described.targets is not None:
        if len(names) != 1:
            raise ExportError(
                f"targets are named and the model has the outputs {list(names)}: say which forecasts them"
            )
        prediction = names[0]
    if prediction is not None and prediction not in names:
        raise ExportError(f"the prediction is to be {prediction!r}, the model has the outputs {list(names)}")
    targets = described.targets or tuple(features)
    if unknown := sorted(set(targets) - set(features)):
        raise ExportError(f"target {unknown[0]!r} is no feature, these are: {list(features)}")
    return tuple(
        Output(name, role="prediction", features=targets) if name == prediction else Output(name) for name in names
    )


def _with_description(contract: Contract, described: Described, draft: Path) -> Contract:
    return replace(
        contract,
        name=described.name or draft.stem,
        model_version=described.model_version,
        period_seconds=described.period_seconds,
        author=described.author,
        license=described.license,
        description=described.description,
        producer=f"statestep {version('statestep')} (converted)",
    )
