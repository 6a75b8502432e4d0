"""Models with detectors and labelled streams to test them on; and backtests made up, of any size at no cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from statestep.export.backtest import BASELINES, MODEL, Backtest, Row, Stream, Verdict
from statestep.export.budget import Budget, Tail
from statestep.export.calibrate import Calibrated
from statestep.export.compose import Ports, composed
from statestep.export.detector import EVIDENCE
from statestep.runtime import Contract, Feature, Output, State, StepModel

from ..models import stamped
from .detectors import detector, forecaster, story

Array = np.ndarray[Any, Any]
PERIOD = 300.0
BEGIN_NS = 1_700_000_100 * 10**9


def model_bytes(width: int = 3, **contract: Any) -> bytes:
    """A step model with a detector, as `convert` would write it."""
    d = detector(width=width, alpha=0.3)
    made = composed(forecaster(d.width, d.targets), d, Ports())
    told = Calibrated(d, Tail(d.threshold, True), 500, Budget(d.every)).told()
    settings: dict[str, Any] = {
        "name": "plant",
        "features": tuple(Feature(name) for name in d.features),
        "states": (State("h", "next_h", (d.width,)), *made.states),
        "outputs": (Output("prediction", role="prediction", features=d.features), *made.outputs),
        "missing": "own-forecast",
        "time_input": made.time,
        "period_seconds": PERIOD,
        "detector": told,
    }
    return stamped(made.graph, Contract(**settings | contract))


def model(width: int = 3, **contract: Any) -> StepModel:
    """The same, loaded."""
    return StepModel(model_bytes(width, **contract))


def labelled(width: int = 3, steps: int = 400, count: int = 2, *, holes: bool = False) -> list[Stream]:
    """Streams in which much happens, of different lengths, with times and two labelled events each."""
    x, _ = story(detector(width=width), steps, count, seed=width)  # [T, B, F]
    if holes:
        gone = np.random.default_rng(1).random(x.shape) < 0.05
        x = np.where(gone, np.float32(np.nan), x)
    found = []
    for place in range(count):
        rows = steps - 37 * place
        times = BEGIN_NS + np.arange(rows) * int(PERIOD * 1e9)
        labels = np.zeros(rows, bool)
        labels[steps // 4 : steps // 4 + 40] = labels[-60:-30] = True
        found.append(Stream(f"plant-{place + 1}", x[:rows, place], times, labels))
    return found


def made_up(
    rows: int = 2000,
    width: int = 3,
    streams: int = 1,
    events: int = 5,
    labels: int = 2,
    *,
    names: tuple[str, ...] = (),
    seed: int = 0,
    begin: int = 0,
) -> Backtest:
    """A backtest that nobody ran: noise, with `events` events a stream of which the first ones lie in labels."""
    rng = np.random.default_rng(seed)
    features = names or tuple(f"m{k:02d}" for k in range(width))
    roles = (("score", None), ("threshold", None), ("event", None), ("expected", features), ("reason", features))
    outputs = tuple(Output(role, role=role, features=of) for role, of in (*roles, ("contribution", features)))
    base = model(1).contract
    contract = replace(
        base,
        name="made up",
        features=tuple(Feature(name, min=-3.0, max=3.0) for name in features),
        states=(State("h", "next_h", (1,)),),
        outputs=outputs,
        detector=dict(base.detector or {}) | {"evidence": list(EVIDENCE)},
    )
    made, verdicts = [], dict[str, list[Verdict]]((name, []) for name in (MODEL, *BASELINES))
    for place in range(streams):
        marked = np.zeros(rows, bool)
        for start in _places(rows, events)[:labels]:
            marked[start - 4 : start + 6] = True
        x = rng.standard_normal((rows, width)).astype(np.float32)
        made.append(Stream(f"stream {place}", x, BEGIN_NS + np.arange(rows) * int(PERIOD * 1e9), marked))
        for name in verdicts:
            verdicts[name].append(Verdict(_outputs(x, events if name == MODEL else 1, rng), begin))
    table = tuple(Row(name, 0.5, 0.4, labels, labels, events, 0.4, 1.0, 4.0, 1, 2.0) for name in verdicts)
    return Backtest(contract, "ab" * 32, tuple(made), {n: tuple(v) for n, v in verdicts.items()}, table, PERIOD, "rows")


def _places(rows: int, events: int) -> list[int]:
    return [int(start) for start in np.linspace(20, rows - 40, max(events, 1))][:events]


def _outputs(x: Array, events: int, rng: np.random.Generator) -> dict[str, Array]:
    rows, width = x.shape
    count, score = np.zeros(rows, np.int64), rng.uniform(0, 1.9, rows)
    for start in _places(rows, events):
        count[start : start + 8] = np.arange(1, 9)
        count[start + 7] *= -1
        score[start : start + 4] = rng.uniform(2.1, 9.0, 4)
    shares = rng.dirichlet(np.ones(width), rows)
    return {
        "score": score.astype(np.float32),
        "threshold": np.full(rows, 2.0, np.float32),
        "event": count,
        "expected": (x + rng.standard_normal(x.shape)).astype(np.float32),
        "reason": rng.integers(0, len(EVIDENCE), x.shape),
        "contribution": shares.astype(np.float32),
    }
