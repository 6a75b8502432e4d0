"""What is measured on data, not learnt: standard units, the spread of a forecast's error, the score's threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from statestep.export.forms import Scoring, SequenceForm, StreamModel
from statestep.export.scaling import NoScaling, PerStreamScaling, PooledScaling
from statestep.export.series import Block, Series, enough

CONSTANT = 1e-6  # a feature whose spread is below this share of its level does not move
SPREAD_FLOOR = 1e-3  # standard deviations; a forecast is never held to more than a thousandth of the spread
QUANTILE = 0.999  # of the validation scores; what lies above is an anomaly
LEAST_THRESHOLD = 1.0  # the score of an error that is usual in training
WARM = 30  # timesteps until a stream's own spread means something


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


def pooled_scaling(series: Sequence[Series]) -> PooledScaling:
    """Mean and standard deviation of each feature over all training parts.

    A feature that does not move gets its level for a standard deviation (1 at level 0): nothing is known of its spread.
    """
    x = np.concatenate([one.x[: one.cut] for one in series]).astype(np.float64)  # [rows, F]
    mean, std = x.mean(axis=0), x.std(axis=0)
    level = np.where(mean == 0, 1.0, np.abs(mean))
    std = np.where(std <= CONSTANT * np.abs(mean), level, std)  # [F]
    return PooledScaling(torch.from_numpy(mean), torch.from_numpy(std))


def warm_of(model: StreamModel) -> int:
    """How many timesteps of a stream pass before its errors are judged."""
    return WARM if isinstance(model.scaling, PerStreamScaling) else 1


def scored(model: StreamModel, blocks: Sequence[Block]) -> tuple[StreamModel, Errors]:
    """Give `model` its score: spread from the training parts, threshold from the validation tails."""
    warm = warm_of(model)
    enough(blocks, warm)
    misses = [_misses(model, block) for block in blocks]  # (miss, std) [T, B, K] each
    in_units = torch.cat([(m / s)[b.training(warm)] for (m, s), b in zip(misses, blocks, strict=True)])  # [rows, K]
    floor = SPREAD_FLOOR * _unit(model, blocks, warm)  # [K]
    scoring = Scoring(torch.maximum(in_units.double().square().mean(0).sqrt(), floor), LEAST_THRESHOLD, warm=warm)
    tail = torch.cat(
        [scoring.sequence(m, s)[..., 0][b.validation(warm)] for (m, s), b in zip(misses, blocks, strict=True)]
    )
    scoring.threshold.fill_(max(float(np.quantile(tail.double().numpy(), QUANTILE)), LEAST_THRESHOLD))
    complete = StreamModel(model.network, model.scaling, scoring, features=model.features)
    return complete, _errors(complete, blocks, misses, warm)


def _unit(model: StreamModel, blocks: Sequence[Block], warm: int) -> Tensor:
    """A standard deviation of each target in the units that the scaling leads to: 1, where there is a scaling."""
    if not isinstance(model.scaling, NoScaling):
        return torch.ones(len(model.target_names), dtype=torch.float64)
    seen = torch.cat([model.targets(block.x)[block.training(warm)] for block in blocks]).double()  # [rows, K]
    return seen.std(0, unbiased=False).clamp(min=torch.finfo(torch.float32).tiny)


def _misses(model: StreamModel, block: Block) -> tuple[Tensor, Tensor]:
    """x − expected and the standard unit that it is judged in, each [T, B, K]."""
    with torch.no_grad():
        _, expected = SequenceForm(model)(block.x)[:2]
        std = model.targets(model.scaling.sequence(block.x).std)
    return model.targets(block.x) - expected, std.expand_as(expected)


def _errors(model: StreamModel, blocks: Sequence[Block], misses: Sequence[tuple[Tensor, Tensor]], warm: int) -> Errors:
    ours, theirs, units = [], [], []
    for (miss, std), block in zip(misses, blocks, strict=True):
        change = torch.zeros_like(miss)
        change[1:] = model.targets(block.x[1:] - block.x[:-1])
        judged = block.validation(warm)  # [T, B]
        ours.append(miss[judged])
        theirs.append(change[judged])
        units.append(std[judged])
    model_miss, last_miss, unit = torch.cat(ours).double(), torch.cat(theirs).double(), torch.cat(units)  # [rows, K]
    by_target = {name: (_rms(model_miss[:, k]), _rms(last_miss[:, k])) for k, name in enumerate(model.target_names)}
    return Errors(len(unit), _rms(model_miss / unit), _rms(last_miss / unit), by_target)


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())
