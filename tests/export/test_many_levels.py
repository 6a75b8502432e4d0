"""`--scale per-stream` on 5,000 sensors whose levels lie between a thousandth and a million."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from statestep.export import export_step
from statestep.export.budget import Budget
from statestep.export.calibrate import Judging
from statestep.export.fit import fit
from statestep.runtime import Engine, StepModel

SENSORS, SHAPES, STEPS = 5000, 50, 150
FAULT = slice(130, 142)
Array = np.ndarray[Any, Any]


def drawn(streams: int, steps: int, seed: int) -> Array:
    """Two related features about 0 with a spread of about 1: [T, B, 2]."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((steps, streams, 2))
    x = np.empty_like(noise)
    now = rng.standard_normal((streams, 2))
    for t in range(steps):
        now = 0.8 * now + 0.6 * noise[t]
        x[t] = now
    x[..., 1] = 0.8 * x[..., 0] + 0.6 * x[..., 1]
    return x


def judged(model: StepModel, x: Array) -> dict[str, Array]:
    """Score and event of every timestep, [T, B]."""
    engine, keys = Engine(model), [b"%d" % stream for stream in range(x.shape[1])]
    rows = []
    for row in x.astype(np.float32):
        rows.append(engine.advance(keys, row))
        engine.commit()
    return {role: np.stack([row[role] for row in rows]) for role in ("score", "event")}


def test_a_sensors_level_and_spread_decide_nothing(tmp_path: Path) -> None:
    """Sensors that differ in nothing else have the same scores, but for float32's noise, and all faults are found."""
    training = {f"s{i}": 20.0 + 3.0 * x for i, x in enumerate(drawn(40, 500, 1).swapaxes(0, 1))}
    how = Judging(budget=Budget(every=2000))
    fitted = fit(training, ["a", "b"], hidden=8, epochs=4, scale="per-stream", judging=how)
    path = tmp_path / "many.onnx"
    export_step(fitted.model, path, fitted.detector, ranges=fitted.ranges)
    model = StepModel.load(path)
    rng = np.random.default_rng(2)
    shapes = drawn(SHAPES, STEPS, 3)  # [T, shapes, 2]
    shapes[FAULT, :, 0] += 15.0
    shape = rng.integers(0, SHAPES, SENSORS)  # [S] which of them a sensor follows
    level = 10.0 ** rng.uniform(-3, 6, (SENSORS, 2)) * rng.choice([-1, 1], (SENSORS, 2))  # [S, 2]
    spread = np.abs(level) * 10.0 ** rng.uniform(-2, 0, (SENSORS, 2))  # [S, 2]
    given = judged(model, level + spread * shapes[:, shape])
    wanted = judged(model, shapes)
    assert np.isfinite(given["score"]).all()
    off = np.abs(given["score"] - wanted["score"][:, shape]) / np.maximum(wanted["score"][:, shape], 0.1)  # [T, S]
    print("scores differ by", np.quantile(off, [0.5, 0.99, 1.0]))
    assert off.max() < 1e-3
    assert (np.abs(given["event"][FAULT]).max(axis=0) > 0).all(), "a fault was not found"
    early = given["event"][: FAULT.start] == 1  # [t, S] false alarms
    by_level = [early[:, here].mean() for here in np.array_split(np.argsort(np.abs(level[:, 0])), 9)]
    print("false alarms a timestep, from the lowest levels to the highest:", by_level)
    assert max(by_level) < 4 / 2000
