"""What a graph cannot say of itself, told by its owner: names, units and roles, which make its tensors a contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
from onnx import ModelProto

from statestep.export.calibrate import Judging
from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.scaler import Scaler, behind_scaler
from statestep.export.stateful import Carried
from statestep.export.whole import Whole, vocabulary
from statestep.runtime import Contract, Feature, Output

FORECASTS = ("scaled", "raw")


@dataclass(frozen=True, slots=True)
class Described:
    """What a graph cannot say of itself: what its columns are, which output forecasts the next row of which targets.

    With a `scaler` it reads standardised values; `forecasts` says whether its forecast is such too ("scaled") or in the
    sensors' own units ("raw").

    With `judging`, a forecast and data there is a detector behind it.
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
    judging: Judging | None = None  # how a detector is to judge its forecasts; None: there is to be none


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


def contract_of(
    original: Whole, work: Carried, described: Described, name: str, data: Mapping[str, Array] | None
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
        name=name,
        features=_features(features, described, data, sizes),
        states=tuple(work.states),
        outputs=_with_roles([Output(output) for output in names], features, described),
    )
    return _with_description(contract, described)


def told_of(found: Contract, described: Described, data: Mapping[str, Array] | None) -> Contract:
    """The contract that was found for a step model from elsewhere, with what its owner says."""
    features = described.features or found.feature_names
    if len(features) != len(found.features):
        raise ExportError(f"{len(features)} features are named, the model takes {len(found.features)}")
    contract = replace(
        found,
        features=_features(features, described, data, [None] * len(features)),
        outputs=_with_roles(found.outputs, features, described),
    )
    return _with_description(contract, described)


def _with_roles(outputs: Sequence[Output], features: Sequence[str], described: Described) -> tuple[Output, ...]:
    """The outputs, the forecast among them where its owner names it or its targets."""
    names = [output.name for output in outputs]
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
        replace(output, role="prediction", features=targets) if output.name == prediction else output
        for output in outputs
    )


def _with_description(contract: Contract, described: Described) -> Contract:
    return replace(
        contract,
        name=described.name or contract.name,
        model_version=described.model_version,
        period_seconds=described.period_seconds,
        author=described.author,
        license=described.license,
        description=described.description,
        producer=f"statestep {version('statestep')} (converted)",
    )


def behind(graph: ModelProto, contract: Contract, described: Described) -> ModelProto:
    """The graph with its owner's scaler in it, where there is one."""
    if described.scaler is None:
        return graph
    forecast = contract.output("prediction")
    name = None if forecast is None or described.forecasts == "raw" else forecast.name
    targets = () if forecast is None else forecast.features or contract.feature_names
    columns = [contract.feature_names.index(target) for target in targets]
    entrance = contract.input if any(value.name == contract.input for value in graph.graph.input) else "x"
    return behind_scaler(graph, described.scaler, name, columns, entrance=entrance)
