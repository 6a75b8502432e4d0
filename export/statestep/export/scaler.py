"""The scaler that a network was trained behind: read as JSON, and put into a graph, so that raw readings go in and out.

    z = (x − mean) / std,   forecast = mean + std · y

Needs no torch. The same nodes serve a step, x [B, F], and a sequence, x [T, B, F].
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from statestep.export.compare import Array
from statestep.export.errors import ExportError
from statestep.export.surgery import Builder, renamed, sorted_nodes

LIMIT = 1e9  # standardised values are cut here, so that an absurd reading cannot become infinite inside the network


@dataclass(frozen=True, slots=True)
class Scaler:
    """Mean and standard deviation of each feature, float64 [F]."""

    mean: Array
    std: Array


def read_scaler(path: str | Path, features: Sequence[str]) -> Scaler:
    """Read {"mean": {feature: value}, "std": {feature: value}}, or lists in the order of the features."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"the scaler {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ExportError(f"the scaler {str(path)!r} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ExportError(f'the scaler {str(path)!r} must be an object with "mean" and "std"')
    return scaler_of(document.get("mean"), document.get("std"), features)


def scaler_of(mean: Any, std: Any, features: Sequence[str]) -> Scaler:
    """The scaling that a network was trained with; `mean` and `std` by feature, or lists in their order.

    >>> scaler_of({"flow": 5.0}, [2.0], ["flow"]).std.tolist()
    [2.0]
    """
    columns = []
    for what, values in (("mean", mean), ("std", std)):
        if isinstance(values, Mapping):
            values = [values.get(feature) for feature in features]
        if not isinstance(values, Sequence) or len(values) != len(features):
            raise ExportError(f"the scaler's {what} must have a number for each of the features {list(features)}")
        for feature, value in zip(features, values, strict=True):
            good = isinstance(value, int | float) and math.isfinite(value) and (what == "mean" or value > 0)
            if not good:
                raise ExportError(
                    f"the scaler's {what} of {feature!r} is {value!r}, it must be a finite number"
                    + (" above 0" if what == "std" else "")
                )
        columns.append(np.asarray(values, np.float64))  # [F]
    return Scaler(*columns)


def behind_scaler(
    model: ModelProto, scaler: Scaler, prediction: str | None, columns: Sequence[int], *, entrance: str = "x"
) -> ModelProto:
    """A copy of a graph that takes readings [… , F] raw at its input `entrance`, and standardises them first.

    `prediction` is the output that forecasts the features at `columns` in standard units, [… , K]; it leaves the
    copy in the sensors' own. None leaves all outputs as they are.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    inner = list(graph.node)
    del graph.node[:]
    builder = Builder(graph)
    builder.taken.update(name for node in inner for name in node.output)
    mean, std = (builder.constant(f"x/{name}", getattr(scaler, name), np.float32) for name in ("mean", "std"))
    low, high = (builder.constant("x/limit", limit, np.float32) for limit in (-LIMIT, LIMIT))
    x = entrance
    apart = builder.node("Sub", [x, mean], "x/apart")
    z = builder.node("Clip", [builder.node("Div", [apart, std], "x/wide"), low, high], "x/scaled")
    names = {x: z}
    if prediction is not None:
        names[prediction] = builder.name(f"{prediction}/scaled")
        own = [(f"{prediction}/{name}", getattr(scaler, name)[list(columns)]) for name in ("mean", "std")]
        mean, std = (builder.constant(name, value, np.float32) for name, value in own)
        spread = builder.node("Mul", [names[prediction], std], f"{prediction}/spread")
        graph.node.append(helper.make_node("Add", [spread, mean], [prediction], name=f"{prediction}/raw"))
    graph.node.extend(renamed(node, names) for node in inner)
    sorted_nodes(graph)
    return copy
