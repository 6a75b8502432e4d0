"""What a trained forecaster says of streams, for its detector to be calibrated on, and how far it was off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from statestep.export.calibrate import Past
from statestep.export.compare import Array
from statestep.export.forms import OWN, StreamModel
from statestep.export.scaling import PooledScaling
from statestep.export.series import Block
from statestep.export.weights import reference_of


@dataclass(frozen=True, slots=True)
class Errors:
    """How far forecasts were off on the validation tails, row for row the same for model and last value."""

    rows: int
    rmse: float  # over all targets, in standard units where there is a scaling
    last_value_rmse: float
    by_target: dict[str, tuple[float, float]]  # target → (model's, last value's) in the sensor's units

    @property
    def losing(self) -> list[str]:
        """The targets that the last value would forecast better."""
        return [target for target, (ours, last) in self.by_target.items() if ours > last]


def past_of(model: StreamModel, block: Block) -> Past:
    """The model's forecasts over a block of streams, as torch computes them."""
    given = reference_of(model)(block.x)
    return Past(block, given["prediction"], given.get(OWN[0]), given.get(OWN[1]))


def errors_of(model: StreamModel, pasts: Sequence[Past], warm: int) -> Errors:
    """Compare the model with the last value on the validation tails."""
    targets = list(model.network.targets)
    ours, theirs, units = [], [], []
    for past in pasts:
        judged, x = past.block.validation(warm), past.block.x[..., targets].astype(np.float64)  # [T, B], [T, B, K]
        x[past.block.missing[..., targets]] = np.nan
        change, miss = np.zeros_like(x), np.zeros_like(x)
        change[1:] = x[1:] - x[:-1]
        miss[1:] = x[1:] - past.prediction[:-1]
        ours.append(miss[judged])
        theirs.append(change[judged])
        units.append(np.broadcast_to(_unit(model, past, targets), x.shape)[judged])
    model_miss, last_miss, unit = np.concatenate(ours), np.concatenate(theirs), np.concatenate(units)  # [rows, K]
    by_target = {name: (_rms(model_miss[:, k]), _rms(last_miss[:, k])) for k, name in enumerate(model.target_names)}
    return Errors(len(unit), _rms(model_miss / unit), _rms(last_miss / unit), by_target)


def _unit(model: StreamModel, past: Past, targets: list[int]) -> Array:
    """What an error is measured in: [… , K]."""
    if past.std is not None:
        return past.std[..., targets]
    if isinstance(model.scaling, PooledScaling):
        return model.scaling.std.double().numpy()[targets]
    return np.ones(len(targets))


def _rms(values: Array) -> float:
    count = max(int((~np.isnan(values)).sum()), 1)
    return float(np.sqrt(np.nansum(np.square(values)) / count))
