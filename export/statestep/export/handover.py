"""What a team hands over beside its module: the factory that makes it, its trained weights, the scaler it read by."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from statestep.export import scaler
from statestep.export.errors import ExportError, first_line
from statestep.export.scaling import PooledScaling


def load_module(factory: str) -> nn.Module:
    """Call `pkg.mod:factory`, found as Python started here would find it, for the untrained module.

    Raises `ExportError` where it cannot be imported or called, or gives something else.
    """
    place, colon, name = factory.partition(":")
    if not (place and colon and name):
        raise ExportError(f"the factory is {factory!r}, it must be written pkg.mod:name")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; a console script leaves it out
    try:
        found = getattr(importlib.import_module(place), name)
        module = found if isinstance(found, nn.Module) else found()
    except Exception as error:  # whatever a team's own code raises
        raise ExportError(f"the factory {factory!r} fails: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(module, nn.Module):
        raise ExportError(f"the factory {factory!r} gives a {type(module).__name__}, it must give a torch module")
    return module


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Put the weights at `path` into `module`. Nothing in the file is run.

    A .safetensors file can hold nothing but tensors and is preferred; any other is a state_dict or {"state_dict": …}
    saved by torch. Raises `ExportError` for what is neither, and where names or shapes are not the module's.
    """
    document = _read_safetensors(path) if Path(path).suffix == ".safetensors" else _read_torch(path)
    theirs = {name: tuple(getattr(value, "shape", ())) for name, value in document.items()}
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in sorted(ours | theirs):
        if ours.get(name) != theirs.get(name):
            raise ExportError(
                f"the weights {str(path)!r} do not fit the module: {name!r} is {_shape(theirs.get(name))} in the file "
                f"and {_shape(ours.get(name))} in the module"
            )
    module.load_state_dict(document)


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(Path(path).read_bytes())
    except OSError as error:
        raise ExportError(f"the weights {str(path)!r} cannot be read: {error.strerror}") from None
    except Exception as error:  # SafetensorError, and what torch says of shapes and types
        raise ExportError(f"the weights {str(path)!r} are not a safetensors file ({first_line(error)})") from None


def _read_torch(path: str | Path) -> dict[str, Any]:
    """A pickle, of which torch reads tensors and plain containers alone: whatever would run is refused."""
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ExportError(f"the weights {str(path)!r} cannot be read: {error.strerror}") from None
    except Exception:  # torch raises pickle's, zip's and its own errors for a file of another kind
        raise ExportError(
            f"the weights {str(path)!r} are not a torch state_dict; save them by torch.save(module.state_dict(), path)"
        ) from None
    if isinstance(document, dict) and isinstance(document.get("state_dict"), dict):
        document = document["state_dict"]
    if not isinstance(document, dict):
        raise ExportError(f"the weights {str(path)!r} hold a {type(document).__name__}, they must be a state_dict")
    return document


def read_scaler(path: str | Path, features: Sequence[str]) -> PooledScaling:
    """Read {"mean": {feature: value}, "std": {feature: value}}, or lists in the order of the features."""
    return _pooled(scaler.read_scaler(path, features))


def scaler_of(mean: Any, std: Any, features: Sequence[str]) -> PooledScaling:
    """The scaling that the module was trained with; `mean` and `std` by feature, or lists in their order.

    >>> scaler_of({"flow": 5.0}, [2.0], ["flow"]).std.tolist()
    [2.0]
    """
    return _pooled(scaler.scaler_of(mean, std, features))


def _pooled(found: scaler.Scaler) -> PooledScaling:
    return PooledScaling(torch.from_numpy(found.mean), torch.from_numpy(found.std))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
