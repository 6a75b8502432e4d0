"""The network: recurrent layers and a linear head that correct the last value.

    forecast[t+1] = x[t] + std · gain · head(h[t])

in the sensor's units; here is only what is learnt, `gain · head(h)`, in standard units. A network that had to say the
whole value would spend itself on copying its input, and on slow sensors it loses to the last value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from statestep.export.errors import ExportError
from statestep.export.recur import Tensors, recur
from statestep.runtime import State

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


class Forecaster(nn.Module):
    """Untrained: weights as torch draws them, from a seed of their own, so that one seed gives one model.

    >>> Forecaster(ForecasterConfig(features=2, targets=(0,)), seed=1).states[0].shape
    (1, 64)
    """

    residual = True  # what it gives is added to the last value
    kind = "forecaster"
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
        names = ("h0", "c0") if config.cell == "lstm" else ("h0",)
        self.states = tuple(State(name, f"{name[0]}n", (config.layers, config.hidden), batch_axis=1) for name in names)

    def forward(self, z: Tensor, states: Tensors | None = None) -> tuple[Tensor, Tensors]:
        """z [T, B, F] and states [L, B, H], zero where None → corrections [T, B, K] and the states after."""
        packed = states if states is None or self.config.cell == "lstm" else states[0]
        y, after = self.rnn(z, packed)  # [T, B, H]
        return self._correction(y), after if self.config.cell == "lstm" else (after,)

    def step(self, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """z [B, F] and states [L, B, H] → correction [B, K] and the next states."""
        if self.config.cell == "rnn":
            after, h = self._tanh_step(z, states[0])
            return self._correction(h), (after,)
        correction, following = self(z[None], states)
        return correction[0], following

    def sequence(self, z: Tensor) -> Tensor:
        """z [T, B, F] → corrections [T, B, K], from zero states."""
        if self.config.cell == "rnn" and torch.compiler.is_exporting():
            # ONNX's RNN gives other bits for a single row than for many, so it is spelt out.
            def body(carry: Tensors, row: Tensors) -> tuple[Tensors, Tensors]:
                after, h = self._tanh_step(row[0], carry[0])
                return (after,), (h,)

            start = z.new_zeros(self.config.layers, z.shape[1], self.config.hidden)  # [L, B, H]
            _, (y,) = recur(body, (start,), (z,))
            return self._correction(y)
        correction: Tensor = self(z)[0]
        return correction

    def _tanh_step(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """h' = tanh(W z + b + R h + b'), layer upon layer: z [B, F], h [L, B, H] → h' [L, B, H], its top [B, H]."""
        below, after = z, []
        for layer, weights in enumerate(self.rnn.all_weights):
            w, r, b, b_r = weights
            below = torch.tanh(linear(below, w, b) + linear(h[layer], r, b_r))  # [B, H]
            after.append(below)
        return torch.stack(after), below

    def _correction(self, y: Tensor) -> Tensor:
        correction: Tensor = self.head(self.dropout(y)) * self.gain  # [… , K]
        return correction
