"""Detectors of every kind over small forecasters, and readings that give them something to find. From seeds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from onnx import ModelProto, helper

from statestep.export.compose import Composed, Ports, alone, composed
from statestep.export.detector import Detector, Forecasts
from statestep.export.surgery import session
from statestep.runtime import Contract, Feature, Output, State, StepModel

from ..models import graph, stamped

Array = np.ndarray[Any, Any]

WINDOW, WARM, CALM, EVERY = 40, 5, 6, 40  # small, so that short sequences outlast them
THRESHOLDS = {"plain": 1.3, "likelihood": 1.2, "conformal": 1.6}


def detector(
    rule: str = "plain",
    combine: str = "mean",
    *,
    width: int = 3,
    targets: tuple[int, ...] | None = None,
    per_stream: bool = False,
    evidence: tuple[str, ...] = ("others", "range", "stuck"),
    **changes: Any,
) -> Detector:
    """A detector of `width` features about `mean`, `std`, with these kinds of evidence beside the error."""
    rng = np.random.default_rng(width)
    targets = tuple(range(width)) if targets is None else targets
    made = Detector(
        features=tuple(f"s{column}" for column in range(width)),
        targets=targets,
        mean=rng.uniform(-20, 20, width),
        std=rng.uniform(0.5, 5, width),
        spread=rng.uniform(0.2, 0.4, len(targets)),
        per_stream=per_stream,
        usual_low=rng.uniform(-2.2, -1.8, width),
        usual_high=rng.uniform(1.8, 2.2, width),
        combine=combine,
        rule=rule,
        window=WINDOW,
        past=rng.permutation(np.linspace(0.2, 1.6, WINDOW)),
        usual_score=0.9,
        threshold=THRESHOLDS[rule],
        every=EVERY,
        calm=CALM,
        warm=WARM,
    )
    weights = rng.uniform(-0.4, 0.4, (width, width)) / max(width - 1, 1)
    np.fill_diagonal(weights, 0.0)
    kinds = {
        "others": {"others": weights, "others_spread": rng.uniform(0.8, 1.2, width)},
        "range": {"low": rng.uniform(-4, -3, width), "high": rng.uniform(3, 4, width)},
        "stuck": {"still": np.where(np.arange(width) % 3 == 2, np.inf, 4.0)},
    }
    chosen = {name: value for kind in evidence for name, value in kinds[kind].items()}
    return replace(made, **chosen | changes)


def story(d: Forecasts, steps: int, batch: int, *, std: Array | None = None, seed: int = 0) -> tuple[Array, Array]:
    """Readings x [T, B, F] with spikes, stuck stretches, a level shift and calm, and forecasts [T, B, K] of the next.

    The forecasts know the signal beneath, and nothing of what befalls it. Units are `std` [F].
    """
    rng = np.random.default_rng(seed)
    std = np.ones(d.width) if std is None else std
    level = np.zeros((batch, d.width))
    z = np.empty((steps + 1, batch, d.width))
    for t in range(steps + 1):
        level = 0.8 * level + 0.5 * rng.standard_normal(level.shape)
        z[t] = level
    noise = np.where(rng.uniform(size=(steps // 20 + 1, batch, 1)) < 0.2, 0.02, 0.25).repeat(20, axis=0)[:steps]  # calm
    expected = (z[1:] + noise * rng.standard_normal((steps, batch, d.width)))[..., list(d.targets)]  # [T, B, K]
    z = z[:-1]
    for b in range(batch):
        for _ in range(max(steps // 60, 1)):
            column, begin = rng.integers(d.width), int(rng.integers(10, steps))
            z[begin, b, column] += rng.choice([-1, 1]) * rng.uniform(6, 15)  # a spike
            column, begin, rows = rng.integers(d.width), int(rng.integers(10, steps)), int(rng.integers(4, 12))
            z[begin : begin + rows, b, column] = z[begin, b, column]  # a sensor that rests
        begin, rows = int(rng.integers(steps // 4, steps // 2)), steps // 8
        z[begin : begin + rows, b] += rng.uniform(1, 3, d.width)  # another level
    mean = d.mean.astype(np.float64)
    x = (mean + std * z).astype(np.float32)
    return x, (mean + std * 0)[list(d.targets)].astype(np.float32) + (std[list(d.targets)] * expected).astype(
        np.float32
    )


def own_units(x: Array, memory: int = 40) -> tuple[Array, Array]:
    """Each stream's readings in units of its own, and the unit, as a forecaster's graph gives them: [T, B, F] each."""
    n = np.minimum(np.arange(1, len(x) + 1), memory)
    mean, variance = np.zeros(x.shape[1:]), np.zeros(x.shape[1:])
    z, std = np.empty(x.shape, np.float32), np.empty(x.shape, np.float32)
    for t, row in enumerate(x.astype(np.float64)):
        delta = row - mean
        mean = mean + delta / n[t]
        variance = variance + (delta * (row - mean) - variance) / n[t]
        std[t] = np.maximum(np.sqrt(variance), 1e-6 * np.abs(mean) + 1e-12)
        z[t] = (row - mean) / std[t]
    return z, std


def run_alone(d: Forecasts, x: Array, prediction: Array, z: Array | None = None, std: Array | None = None) -> Any:
    """The detector by itself over sequences: its outputs by role, [T, B, …]."""
    feeds = {"x": x, "prediction": prediction} | ({} if z is None or std is None else {"z": z, "std": std})
    names = [role for role, _, _ in d.outputs]
    return dict(zip(names, session(alone(d)).run(names, feeds), strict=True))


@cache
def forecaster(width: int, targets: tuple[int, ...], keep: float = 0.5, per_stream: bool = False) -> ModelProto:
    """h ← keep · (h + x), and h is the forecast; `own` units, if there are any, are x / 2 and 2."""
    row, some = ("float32", ["B", width]), ("float32", ["B", len(targets)])
    nodes = [
        helper.make_node("Add", ["h", "x"], ["sum"]),
        helper.make_node("Mul", ["sum", "keep"], ["next_h"]),
        helper.make_node("Gather", ["next_h", "targets"], ["prediction"], axis=1),
    ]
    outputs = {"prediction": some, "next_h": row}
    if per_stream:
        nodes += [
            helper.make_node("Div", ["x", "two"], ["own_z"]),
            helper.make_node("Shape", ["x"], ["size"]),
            helper.make_node("Expand", ["two", "size"], ["own_std"]),
        ]
        outputs |= {"own_z": row, "own_std": row}
    weights = {
        "keep": np.array(keep, np.float32),
        "targets": np.array(targets),
        "two": np.array(2.0, np.float32),
    }
    return graph(nodes, {"x": row, "h": row}, outputs, weights)


def step_model(d: Forecasts, keep: float = 0.5) -> StepModel:
    """The detector behind that forecaster."""
    per_stream = isinstance(d, Detector) and d.per_stream
    made = composed(
        forecaster(d.width, d.targets, keep, per_stream), d, Ports(own=("own_z", "own_std") if per_stream else None)
    )
    return loaded(made, d, (State("h", "next_h", (d.width,)),))


def loaded(made: Composed, d: Forecasts, states: tuple[State, ...]) -> StepModel:
    """A composed graph as a step model; `states` are the forecaster's."""
    outputs = (Output("prediction", role="prediction", features=tuple(d.features[k] for k in d.targets)), *made.outputs)
    features = tuple(Feature(name) for name in d.features)
    contract = Contract(
        "detector", features, (*states, *made.states), outputs, missing="own-forecast", time_input=made.time
    )
    return StepModel(stamped(made.graph, contract))
