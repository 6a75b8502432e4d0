"""The torch weights beside a step model (`<name>.pt`): what is needed to build the same stream model again.

They hold numbers and plain settings only, and are read with `weights_only=True`: nothing in the file is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from statestep.export.compare import Array, Outputs
from statestep.export.errors import ExportError, first_line
from statestep.export.forecaster import Forecaster, ForecasterConfig
from statestep.export.forms import SequenceForm, StreamModel
from statestep.export.scaling import NoScaling, PerStreamScaling, PooledScaling, Scaling

FORMAT = 2  # 1 held a score too


def save(model: StreamModel, path: str | Path) -> None:
    """Write the weights of a model whose network is a `Forecaster`."""
    assert isinstance(model.network, Forecaster)
    document = {
        "format": FORMAT,
        "network": asdict(model.network.config),
        "scaling": {"kind": model.scaling.kind, "memory": getattr(model.scaling, "memory", None)},
        "features": list(model.features),
        "weights": model.state_dict(),
    }
    torch.save(document, path)


def load(path: str | Path) -> StreamModel:
    """Build the stream model that `save` wrote. Anything else is an `ExportError`."""
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
        if document["format"] != FORMAT:
            raise ExportError(f"{path}: has format {document['format']!r}, this release reads {FORMAT}")
        model = _build(document)
        model.load_state_dict(document["weights"])
    except ExportError:
        raise
    except Exception as error:  # torch raises pickle's, zip's and its own errors for a file of another kind
        raise ExportError(f"{path}: is not the weights of a statestep model ({first_line(error)})") from None
    return model.eval()


def reference_of(model: StreamModel) -> Callable[[Array], Outputs]:
    """The model as torch runs it, x [T, B, F] → outputs by name [T, B, …]: what `verify` compares forecasts with."""
    form = SequenceForm(model).eval()

    def run(x: Array) -> Outputs:
        with torch.no_grad():
            outputs = form(torch.from_numpy(np.ascontiguousarray(x, np.float32)))
        return {name: value.numpy() for name, value in zip(model.outputs, outputs, strict=True)}

    return run


def _build(document: dict[str, Any]) -> StreamModel:
    """The model with the shapes of the document's weights, its numbers yet to be loaded."""
    settings = document["network"]
    config = ForecasterConfig(**settings | {"targets": tuple(settings["targets"])})
    return StreamModel(Forecaster(config), _scaling(document["scaling"], config), features=tuple(document["features"]))


def _scaling(settings: dict[str, Any], config: ForecasterConfig) -> Scaling:
    if settings["kind"] == PerStreamScaling.kind:
        return PerStreamScaling(config.features, settings["memory"])
    if settings["kind"] == PooledScaling.kind:
        return PooledScaling(torch.zeros(config.features), torch.ones(config.features))
    return NoScaling()
