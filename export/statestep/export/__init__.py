"""From torch to step models: train a forecaster or lift a module, write it as ONNX, and prove what was written.

`verify`, the laws and the errors need no torch; the other names are imported when they are first asked for. Two
functions are found in the modules that bear their names: `statestep.export.fit.fit` and `statestep.export.lift.lift`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from statestep.export.budget import Budget, budget_of
from statestep.export.calibrate import Calibrated, Judging
from statestep.export.detector import Detector
from statestep.export.errors import DataError, ExportError
from statestep.export.laws import (
    LawBroken,
    agrees_with,
    company_does_not_matter,
    cuts_do_not_matter,
    order_does_not_matter,
    outputs_are_finite,
    restored_goes_on,
    rollback_is_an_identity,
    streaming_is_offline,
)
from statestep.export.suite import Law, check_model, laws_of
from statestep.export.verify import Check, Report, Speed, verify

if TYPE_CHECKING:
    from statestep.export.fit import Epoch, Example, Fitted
    from statestep.export.forecaster import CELLS, Forecaster, ForecasterConfig
    from statestep.export.forecasts import Errors
    from statestep.export.forms import StreamModel
    from statestep.export.handover import load_module, load_weights, read_scaler, scaler_of
    from statestep.export.layers import CoupledLSTM, LayerNormLSTM, PeepholeLSTM, ResetBeforeGRU
    from statestep.export.lift import LiftedModel
    from statestep.export.scaling import NoScaling, PerStreamScaling, PooledScaling
    from statestep.export.weights import load, save
    from statestep.export.write import Exported, export_step

_NEEDS_TORCH = {
    "CELLS": "forecaster",
    "CoupledLSTM": "layers",
    "Epoch": "fit",
    "Errors": "forecasts",
    "Example": "fit",
    "Exported": "write",
    "Fitted": "fit",
    "Forecaster": "forecaster",
    "ForecasterConfig": "forecaster",
    "LayerNormLSTM": "layers",
    "LiftedModel": "lift",
    "NoScaling": "scaling",
    "PeepholeLSTM": "layers",
    "PerStreamScaling": "scaling",
    "PooledScaling": "scaling",
    "ResetBeforeGRU": "layers",
    "StreamModel": "forms",
    "export_step": "write",
    "load": "weights",
    "load_module": "handover",
    "load_weights": "handover",
    "read_scaler": "handover",
    "save": "weights",
    "scaler_of": "handover",
}

__all__ = [
    "CELLS",
    "Budget",
    "Calibrated",
    "Check",
    "CoupledLSTM",
    "DataError",
    "Detector",
    "Epoch",
    "Errors",
    "Example",
    "ExportError",
    "Exported",
    "Fitted",
    "Forecaster",
    "ForecasterConfig",
    "Judging",
    "Law",
    "LawBroken",
    "LayerNormLSTM",
    "LiftedModel",
    "NoScaling",
    "PeepholeLSTM",
    "PerStreamScaling",
    "PooledScaling",
    "Report",
    "ResetBeforeGRU",
    "Speed",
    "StreamModel",
    "agrees_with",
    "budget_of",
    "check_model",
    "company_does_not_matter",
    "cuts_do_not_matter",
    "export_step",
    "laws_of",
    "load",
    "load_module",
    "load_weights",
    "order_does_not_matter",
    "outputs_are_finite",
    "read_scaler",
    "restored_goes_on",
    "rollback_is_an_identity",
    "save",
    "scaler_of",
    "streaming_is_offline",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
