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
import torch

from statestep.consumers.fleet import PERIOD_SECONDS, SENSORS, START_NS, simulate
from statestep.export.compare import Array
from statestep.export.fit import Epoch, fit
from statestep.export.forms import SequenceForm, StreamModel
from statestep.export.write import export_step

OUT = Path(__file__).parents[1] / "consumers" / "statestep" / "consumers" / "models" / "pump.onnx"
TRAINING_SEEDS = range(1, 241)
PUMPS = 6  # of each training fleet
HEALTHY_SEEDS = range(1001, 1041)  # for the threshold
QUANTILE = 0.99998  # of a healthy score: one timestep in 50,000, half a year of a pump
HIDDEN = 24
HOUR_NS = 3_600_000_000_000


def main() -> None:
    """Train, set the threshold, prove and write."""
    fitted = fit(training_streams(TRAINING_SEEDS), [sensor.name for sensor in SENSORS], hidden=HIDDEN, on_epoch=show)
    for name, (ours, last) in fitted.errors.by_target.items():
        print(f"{name}: RMSE {ours:.4g}, last value {last:.4g}")
    threshold = healthy_quantile(fitted.model, HEALTHY_SEEDS)
    assert fitted.model.scoring is not None
    fitted.model.scoring.threshold.fill_(threshold)
    exported = export_step(
        fitted.model,
        OUT,
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
    print(f"{exported.model}: threshold {threshold:.3f}")


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


def healthy_quantile(model: StreamModel, seeds: Iterable[int]) -> float:
    """The `QUANTILE` of the scores of whole healthy fleets, from their first timestep."""
    names = list(model.outputs)
    scores = []
    for seed in seeds:
        with torch.no_grad():
            outputs = SequenceForm(model)(torch.from_numpy(simulate(seed=seed, faulty=False).values))
        scores.append(outputs[names.index("score")].numpy())  # [T, P]
    return float(np.quantile(np.stack(scores), QUANTILE))


def show(epoch: Epoch) -> None:
    """Progress."""
    print(f"epoch {epoch.number:3d}  RMSE {epoch.training_rmse:.4f}, validation {epoch.validation_rmse:.4f}")


if __name__ == "__main__":
    main()
