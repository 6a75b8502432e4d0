"""False alarms against the budget, and faults found, on the simulated fleet: from `fit` through the engine.

    python benchmarks/detection/fleet.py [--false-alarms 1/week] [--days 28] [--pumps 40] [--weeks 20] [--streams 200]

A healthy fleet of `--pumps` over `--days` is what is fitted and calibrated on. Then `--streams` other healthy pumps run
for `--weeks`: their events are all false alarms. Then as many faulty ones do: a fault is found where an event begins
while it lasts. Needs torch.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from statestep.consumers.fleet import KINDS, PERIOD_SECONDS, SENSORS, Fleet, simulate
from statestep.export import Judging, budget_of, export_step
from statestep.export.fit import fit
from statestep.runtime import Engine, StepModel

WEEK_STEPS = 7 * 24 * 3600 // PERIOD_SECONDS
TRAINING_SEED, CLEAN_SEED, FAULTY_SEED = 7, 70_001, 70_002

Array = np.ndarray[Any, Any]


def begun(model: StepModel, fleet: Fleet) -> Array:
    """Where events begin: bool [T, P]."""
    engine, found = Engine(model), []
    for x, time in zip(fleet.values, fleet.times.tolist(), strict=True):
        out = engine.advance(fleet.keys, x, np.full(len(x), time))
        engine.commit()
        found.append(out["event"] == 1)
    return np.stack(found)


def main() -> None:
    """Fit, run, print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--false-alarms", default="1/week")
    parser.add_argument("--days", type=float, default=28)
    parser.add_argument("--pumps", type=int, default=40)
    parser.add_argument("--weeks", type=int, default=20)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--scale", default="pooled")
    parser.add_argument("--combine", default="mean")
    parser.add_argument("--rule", default="plain")
    given = parser.parse_args()
    judging = Judging(
        combine=given.combine, rule=given.rule, budget=budget_of(given.false_alarms, float(PERIOD_SECONDS))
    )
    training = simulate(given.pumps, days=given.days, seed=TRAINING_SEED, faulty=False)
    streams = {key.decode(): training.values[:, pump] for pump, key in enumerate(training.keys)}
    names = [sensor.name for sensor in SENSORS]
    fitted = fit(streams, names, hidden=32, epochs=20, scale=given.scale, judging=judging)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fleet.onnx"
        export_step(fitted.model, path, fitted.detector, ranges=fitted.ranges, period_seconds=PERIOD_SECONDS)
        model = StepModel.load(path)
    assert judging.budget.every is not None
    asked = WEEK_STEPS / judging.budget.every
    events = begun(model, simulate(given.streams, days=7 * given.weeks, seed=CLEAN_SEED, faulty=False))  # [T, P]
    weekly = events.reshape(given.weeks, WEEK_STEPS, -1).sum(axis=1)  # [weeks, P]
    told = fitted.detector.told()
    print(
        f"budget {asked:.3g} a stream-week, threshold {told['threshold']}, "
        f"{'from a fitted tail' if told['tail'] else 'counted'}"
    )
    print(f"on {given.streams} clean streams over {given.weeks} weeks: {weekly.mean():.3g} false alarms a stream-week,")
    print(
        f"{weekly.mean() / asked:.2f} of the budget; first week {weekly[0].mean():.3g}, last {weekly[-1].mean():.3g};"
    )
    by_stream = weekly.mean(axis=0)
    print(f"the streams' own rates: median {np.median(by_stream):.3g}, highest {by_stream.max():.3g}\n")
    faulty = simulate(given.streams, days=7 * given.weeks, seed=FAULTY_SEED)
    events = begun(model, faulty)
    delays: dict[str, list[float]] = defaultdict(list)
    for fault in faulty.faults:
        hits = np.flatnonzero(events[fault.start : fault.end, fault.pump])
        delays[fault.kind].append(float(hits[0]) if len(hits) else np.nan)
    print("| fault | injected | found | median delay |\n| --- | ---: | ---: | ---: |")
    for kind in KINDS:
        found = np.array(delays[kind])
        seen = found[~np.isnan(found)]
        delay = f"{np.median(seen) * PERIOD_SECONDS / 60:.0f} min" if len(seen) else "–"
        print(f"| {kind} | {len(found)} | {len(seen)} ({len(seen) / max(len(found), 1):.0%}) | {delay} |")


if __name__ == "__main__":
    main()
