"""Makes the demo's model, `statestep/consumers/models/pump.onnx`: the project's own `fit` on simulated healthy pumps.

    python export/make_demo_model.py        needs torch: pip install 'statestep[export]'

Streams of one day that begin at any hour, so that the network meets many beginnings: a stream that has just begun
must not raise an alarm. The threshold is taken from healthy fleets as the demo shows them. None of the seeds here is
used by `benchmarks/demo_recall.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from statestep.consumers.fleet import PERIOD_SECONDS, SENSORS, START_NS, simulate
from statestep.export.budget import Budget
from statestep.export.calibrate import Judging, Past, with_threshold
from statestep.export.compare import Array
from statestep.export.fit import Epoch, fit
from statestep.export.forecasts import past_of
from statestep.export.forms import StreamModel
from statestep.export.series import Series, block_of
from statestep.export.write import export_step

OUT = Path(__file__).parents[1] / "consumers" / "statestep" / "consumers" / "models" / "pump.onnx"
TRAINING_SEEDS = range(1, 241)
PUMPS = 6  # of each training fleet
HEALTHY_SEEDS = range(1001, 1041)  # for the threshold
WEEKS = 20  # of a pump between two false alarms
JUDGING = Judging(combine="max", budget=Budget(every=WEEKS * 7 * 24 * 3600 // PERIOD_SECONDS))
HIDDEN = 24
HOUR_NS = 3_600_000_000_000


def main() -> None:
    """Train, set the threshold, prove and write."""
    features = [sensor.name for sensor in SENSORS]
    fitted = fit(training_streams(TRAINING_SEEDS), features, hidden=HIDDEN, judging=JUDGING, on_epoch=show)
    for name, (ours, last) in fitted.errors.by_target.items():
        print(f"{name}: RMSE {ours:.4g}, last value {last:.4g}")
    healthy = [healthy_past(fitted.model, seed) for seed in HEALTHY_SEEDS]
    detector = with_threshold(fitted.detector.detector, healthy, JUDGING)
    exported = export_step(
        fitted.model,
        OUT,
        detector,
        ranges=fitted.ranges,
        units={sensor.name: sensor.unit for sensor in SENSORS},
        period_seconds=PERIOD_SECONDS,
        license="Apache-2.0",
        trained_on=f"simulated healthy pumps: {len(TRAINING_SEEDS)} fleets of {PUMPS} over a day",
        author="the statestep project",
        description="Forecasts a simulated pump's sensors five minutes ahead, and scores how far they are off.",
        data=healthy_streams(HEALTHY_SEEDS[0]),
    )
    assert exported.weights is not None
    exported.weights.unlink()  # the package holds no torch files
    print(f"{exported.model}: {detector.told()}")


def training_streams(seeds: Iterable[int]) -> dict[str, Array]:
    """A day of each pump of each healthy fleet, the fleets beginning at different hours: name → float32 [288, 3]."""
    streams: dict[str, Array] = {}
    for seed in seeds:
        fleet = simulate(PUMPS, days=1.0, seed=seed, faulty=False, start_ns=START_NS + seed % 24 * HOUR_NS)
        streams |= {f"{seed}/{key.decode()}": fleet.values[:, pump] for pump, key in enumerate(fleet.keys)}
    return streams


def healthy_streams(seed: int) -> dict[str, Array]:
    """A healthy fleet as the demo shows it, to prove the model on and to measure how soon it forgets."""
    fleet = simulate(seed=seed, faulty=False)
    return {key.decode(): fleet.values[:, pump] for pump, key in enumerate(fleet.keys)}


def healthy_past(model: StreamModel, seed: int) -> Past:
    """Forecasts for a whole healthy fleet, from its first timestep."""
    streams = healthy_streams(seed)
    return past_of(model, block_of([Series(name, x, np.isnan(x), 1) for name, x in streams.items()]))


def show(epoch: Epoch) -> None:
    """Progress."""
    print(f"epoch {epoch.number:3d}  RMSE {epoch.training_rmse:.4f}, validation {epoch.validation_rmse:.4f}")


if __name__ == "__main__":
    main()
