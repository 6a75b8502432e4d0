"""The two pictures are PNG files of a size to look at, and show what they are given."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from statestep.export.fit import Epoch, Example
from statestep.export.plots import plot_forecast, plot_loss

HISTORY = [Epoch(n, 9, 1 / n, 1.1 / n, 1.1 / n, float(n)) for n in range(1, 7)]


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the PNG header."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


@pytest.mark.parametrize("best", [0, 6])
def test_the_loss_curve_is_drawn(tmp_path: Path, best: int) -> None:
    """With the kept epoch marked, and where none beat the last value."""
    plot_loss(tmp_path / "loss.png", HISTORY, best_epoch=best, last_value_rmse=0.4)
    assert size(tmp_path / "loss.png") == (960, 432)


@pytest.mark.parametrize(("targets", "rows"), [(1, 1), (3, 3), (9, 4)])
def test_up_to_four_targets_are_drawn_below_each_other(tmp_path: Path, targets: int, rows: int) -> None:
    """The picture grows by a panel for each of the first four targets."""
    seen = np.random.default_rng(0).standard_normal((50, targets)).astype(np.float32)
    example = Example("pump-1", tuple(f"s{k}" for k in range(targets)), seen, seen + 0.1)
    plot_forecast(tmp_path / "forecast.png", example)
    width, height = size(tmp_path / "forecast.png")
    assert width == 960 and abs(height - 120 * (1.2 + 1.9 * rows)) <= 1


def test_pictures_differ_where_the_numbers_do(tmp_path: Path) -> None:
    """What is drawn depends on what is given."""
    for name, scale in (("one.png", 1.0), ("two.png", 3.0)):
        example = Example("a", ("v",), np.ones((5, 1), np.float32), scale * np.ones((5, 1), np.float32))
        plot_forecast(tmp_path / name, example)
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
