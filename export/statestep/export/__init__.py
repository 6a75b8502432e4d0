"""From torch to step models: train a forecaster or lift a module, write it as ONNX, and prove what was written.

`verify` and the errors need no torch; the names that do are imported when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from statestep.export.errors import DataError, ExportError
from statestep.export.verify import Check, Report, Speed, verify

if TYPE_CHECKING:
    from statestep.export.forecaster import Forecaster, ForecasterConfig
    from statestep.export.forms import Scoring, StreamModel
    from statestep.export.scaling import NoScaling, PerStreamScaling, PooledScaling
    from statestep.export.weights import load, save
    from statestep.export.write import Exported, export_step

_NEEDS_TORCH = {
    "Exported": "write",
    "Forecaster": "forecaster",
    "ForecasterConfig": "forecaster",
    "NoScaling": "scaling",
    "PerStreamScaling": "scaling",
    "PooledScaling": "scaling",
    "Scoring": "forms",
    "StreamModel": "forms",
    "export_step": "write",
    "load": "weights",
    "save": "weights",
}

__all__ = [
    "Check",
    "DataError",
    "ExportError",
    "Exported",
    "Forecaster",
    "ForecasterConfig",
    "NoScaling",
    "PerStreamScaling",
    "PooledScaling",
    "Report",
    "Scoring",
    "Speed",
    "StreamModel",
    "export_step",
    "load",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
