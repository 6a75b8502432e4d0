"""Weights that come in a file: read from either format, and nothing in the file is ever run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from statestep.export import ExportError, load_weights


def test_weights_in_safetensors_are_loaded(tmp_path: Path) -> None:
    """The format that holds nothing but tensors gives the module the same bits."""
    trained, fresh = nn.GRU(3, 4), nn.GRU(3, 4)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "w.safetensors")
    load_weights(fresh, tmp_path / "w.safetensors")
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in fresh.state_dict().items())


def test_safetensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """Another shape, text under that name, a file cut short, no file: a sentence each."""
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(nn.GRU(3, 4).state_dict(), path)
    with pytest.raises(ExportError, match=r"'bias_hh_l0' is \[12\] in the file and \[15\] in the module"):
        load_weights(nn.GRU(3, 5), path)
    for data in (b"hello", path.read_bytes()[:-1], b"\xff" * 64, b""):
        path.write_bytes(data)
        with pytest.raises(ExportError, match=r"w\.safetensors' are not a safetensors file"):
            load_weights(nn.GRU(3, 4), path)
    with pytest.raises(ExportError, match=r"absent\.safetensors' cannot be read"):
        load_weights(nn.GRU(3, 4), tmp_path / "absent.safetensors")


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, inside: bool, zipped: bool) -> None:
    """In torch's zip as in its old format, bare or among weights: it is refused, and nothing has run."""
    sprung, trap = tmp_path / "sprung", Trap(tmp_path / "sprung")
    torch.save(
        {"state_dict": {"w": trap}} if inside else trap, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ExportError, match=r"w\.pt' are not a torch state_dict"):
        load_weights(nn.GRU(3, 4), tmp_path / "w.pt")
    assert not sprung.exists()
    torch.load(tmp_path / "w.pt", weights_only=False)  # the trap is one
    assert sprung.exists()
