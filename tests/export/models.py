"""Small untrained stream models, from seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from statestep.export import Forecaster, ForecasterConfig, Judging, PerStreamScaling, PooledScaling, StreamModel
from statestep.export.calibrate import Calibrated, calibrated
from statestep.export.detector import Forecasts
from statestep.export.forecasts import past_of
from statestep.export.scaling import Scaling
from statestep.export.series import blocks_of, series_of

DATA = Path(__file__).resolve().parents[1] / "data"
FEATURES = ("flow", "pressure", "speed")
MEAN, STD = [10.0, -3.0, 500.0], [2.0, 0.5, 80.0]
HOW = Judging(alpha=0.1)
MEMORY = 40  # of per-stream scaling; small, so that short sequences outlast it

Array = np.ndarray[Any, Any]


def model(cell: str = "lstm", layers: int = 1, *, scale: str = "pooled", hidden: int = 8, seed: int = 0) -> StreamModel:
    """Flow and speed forecast from flow, pressure and speed."""
    config = ForecasterConfig(len(FEATURES), (0, 2), cell, hidden, layers)
    scaling: Scaling = PerStreamScaling(len(FEATURES), MEMORY)
    if scale == "pooled":
        scaling = PooledScaling(torch.tensor(MEAN), torch.tensor(STD))
    return StreamModel(Forecaster(config, seed=seed), scaling, features=FEATURES)


def readings(steps: int, batch: int, seed: int = 0) -> Array:
    """Raw readings of those features: float32 [T, B, F]."""
    noise = np.random.default_rng(seed).standard_normal((steps, batch, len(FEATURES)))
    return (np.array(MEAN) + np.array(STD) * noise).astype(np.float32)


def detector_of(stream_model: StreamModel, how: Judging = HOW, *, warm: int = 5) -> Calibrated:
    """A detector for such a model, calibrated on such readings."""
    x = readings(300, 3, seed=6)
    series, _ = series_of({str(stream): x[:, stream] for stream in range(3)}, FEATURES, 0.3)
    known = Forecasts(features=FEATURES, targets=stream_model.network.targets, mean=np.array(MEAN))
    pasts = [past_of(stream_model, block) for block in blocks_of(series)]
    return calibrated(pasts, known, how, warm=warm)


def machine_temperature() -> Array:
    """The slice of the machine temperature series: float64 [600, 1]."""
    return np.loadtxt(DATA / "machine_temperature.csv", delimiter=",", skiprows=1, usecols=1)[:, None]
