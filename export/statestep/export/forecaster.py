"""The network: recurrent layers and a linear head that correct the last value.

    forecast[t+1] = x[t] + std · gain · head(h[t])

in the sensor's units; here is only what is learnt, `gain · head(h)`, in standard units. A network that had to say the
whole value would spend itself on copying its input, and on slow sensors it loses to the last value.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn

from statestep.export import cells
from statestep.export.errors import ExportError
from statestep.export.recur import Tensors

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@dataclass(frozen=True, slots=True)
class ForecasterConfig:
    """The size and kind of a `Forecaster`; `targets` are the columns of its input that it forecasts.

    >>> ForecasterConfig(features=3, targets=(0, 2), cell="gru", hidden=16).cell
    'gru'
    """

    features: int
    targets: tuple[int, ...]
    cell: str = "lstm"
    hidden: int = 64
    layers: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.cell not in CELLS:
            raise ExportError(f"cell is {self.cell!r}, it must be one of {list(CELLS)}")
        for name in ("features", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise ExportError(f"{name} is {getattr(self, name)}, it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ExportError(f"dropout is {self.dropout}, it must be at least 0 and below 1")
        if not self.targets or not all(0 <= target < self.features for target in self.targets):
            raise ExportError(
                f"targets are the columns {list(self.targets)}, there must be one or more of 0…{self.features - 1}"
            )


class Gives(Enum):
    """What a network's output is."""

    CORRECTION = "what is to be added to the last value, in standard deviations"
    VALUE = "the forecast in standard units"
    RAW_VALUE = "the forecast in the sensor's units"


class Forecaster(nn.Module):
    """Untrained: weights as torch draws them, from a seed of their own, so that one seed gives one model.

    >>> Forecaster(ForecasterConfig(features=2, targets=(0,)), seed=1).states[0].shape
    (1, 64)
    """

    gives = Gives.CORRECTION
    gain: Tensor

    def __init__(self, config: ForecasterConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.targets = config.targets
        between = config.dropout if config.layers > 1 else 0.0  # torch warns where there is nothing between
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.rnn = CELLS[config.cell](config.features, config.hidden, config.layers, dropout=between)
            self.dropout = nn.Dropout(config.dropout)
            self.head = nn.Linear(config.hidden, len(config.targets))
        self.register_buffer("gain", torch.ones(len(config.targets)))  # [K] the size of a usual change from row to row
        self.states = cells.states_of(self.rnn)

    def forward(self, z: Tensor, states: Tensors | None = None) -> tuple[Tensor, Tensors]:
        """z [T, B, F] and states [L, B, H], zero where None → corrections [T, B, K] and the states after."""
        packed = states if states is None or self.config.cell == "lstm" else states[0]
        y, after = self.rnn(z, packed)  # [T, B, H]
        return self._correction(y), after if self.config.cell == "lstm" else (after,)

    def step(self, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """z [B, F] and states [L, B, H] → correction [B, K] and the next states."""
        hidden, following = cells.step(self.rnn, z, states)
        return self._correction(hidden[-1])[0], following

    def sequence(self, z: Tensor) -> Tensor:
        """z [T, B, F] → corrections [T, B, K], from zero states; by torch's own layers where torch runs it."""
        exporting = torch.compiler.is_exporting()
        return self._correction(cells.sequence(self.rnn, z)[-1]) if exporting else self(z)[0]

    def _correction(self, y: Tensor) -> Tensor:
        correction: Tensor = self.head(self.dropout(y)) * self.gain  # [… , K]
        return correction
