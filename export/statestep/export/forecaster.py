"""The network: recurrent layers and a linear head that correct the last value.

    forecast[t+1] = x[t] + std · gain · head(h[t])

in the sensor's units; here is only what is learnt, `gain · head(h)`, in standard units. A network that had to say the
whole value would spend itself on copying its input, and on slow sensors it loses to the last value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch
from torch import Tensor, nn

from statestep.export import cells
from statestep.export.cells import Recurrent
from statestep.export.errors import ExportError
from statestep.export.layers import CoupledLSTM, LayerNormLSTM, PeepholeLSTM, ResetBeforeGRU
from statestep.export.recur import Tensors

PROJECTED = "lstm-projected"
CELLS: dict[str, Callable[..., Recurrent]] = {  # name → (inputs, hidden, layers, dropout=…) → layers of that kind
    "rnn": nn.RNN,
    "rnn-relu": partial(nn.RNN, nonlinearity="relu"),
    "lstm": nn.LSTM,
    PROJECTED: nn.LSTM,
    "lstm-peephole": PeepholeLSTM,
    "lstm-coupled": CoupledLSTM,
    "lstm-peephole-coupled": partial(PeepholeLSTM, coupled=True),
    "lstm-layernorm": LayerNormLSTM,
    "gru": nn.GRU,
    "gru-reset-before": ResetBeforeGRU,
}


@dataclass(frozen=True, slots=True)
class ForecasterConfig:
    """The size and kind of a `Forecaster`; `targets` are the columns of its input that it forecasts.

    `cell` is a name of `CELLS`, repeated over `layers`, or one for each layer, separated by commas. `projection` is
    the width that an lstm-projected layer puts out, half its hidden units where None.

    >>> ForecasterConfig(features=3, targets=(0, 2), cell="lstm,gru", hidden=16).kinds
    ('lstm', 'gru')
    """

    features: int
    targets: tuple[int, ...]
    cell: str = "lstm"
    hidden: int = 64
    layers: int = 1
    dropout: float = 0.0
    projection: int | None = None

    def __post_init__(self) -> None:
        kinds = kinds_of(self.cell, self.layers)
        for name in ("features", "hidden"):
            if getattr(self, name) < 1:
                raise ExportError(f"{name} is {getattr(self, name)}, it must be 1 or more")
        if not 0 <= self.dropout < 1:
            raise ExportError(f"dropout is {self.dropout}, it must be at least 0 and below 1")
        if not self.targets or not all(0 <= target < self.features for target in self.targets):
            raise ExportError(
                f"targets are the columns {list(self.targets)}, there must be one or more of 0…{self.features - 1}"
            )
        if self.projection is not None and PROJECTED not in kinds:
            raise ExportError(f"projection is {self.projection} and no layer is {PROJECTED}: leave it out")
        if PROJECTED in kinds and not 0 < self.projected < self.hidden:
            raise ExportError(
                f"projection is {self.projected}, it must be 1 or more and below the {self.hidden} hidden units"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The cell of each layer."""
        return kinds_of(self.cell, self.layers)

    @property
    def projected(self) -> int:
        """What an lstm-projected layer puts out."""
        return self.hidden // 2 if self.projection is None else self.projection


def kinds_of(cell: str, layers: int = 1) -> tuple[str, ...]:
    """The cell of each layer, from a name and a number of layers, or from a name for each; else an `ExportError`.

    >>> kinds_of("gru", 2), kinds_of("lstm, gru")
    (('gru', 'gru'), ('lstm', 'gru'))
    """
    named = tuple(name.strip() for name in cell.split(","))
    for name in named:
        if name not in CELLS:
            raise ExportError(f"cell is {name!r}, it must be one of {', '.join(CELLS)}")
    if layers < 1:
        raise ExportError(f"layers is {layers}, it must be 1 or more")
    if len(named) > 1 and layers not in (1, len(named)):
        raise ExportError(f"cell {cell!r} names {len(named)} layers and layers is {layers}: leave one of them out")
    return named if len(named) > 1 else named * layers


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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = _parts_of(config)
            self.rnn: nn.Module = parts[0] if len(parts) == 1 else nn.ModuleList(parts)
            self.dropout = nn.Dropout(config.dropout)
            self.head = nn.Linear(cells.width_of(parts[-1]), len(config.targets))
        self.register_buffer("gain", torch.ones(len(config.targets)))  # [K] the size of a usual change from row to row
        self.pairs = [
            cells.states_of(part, "" if len(parts) == 1 else f"layer{number}_") for number, part in enumerate(parts, 1)
        ]
        self.states = tuple(state for pairs in self.pairs for state in pairs)

    @property
    def parts(self) -> list[Recurrent]:
        """The recurrent layers from the input up: one module where all are of one kind, otherwise a module for each."""
        parts = self.rnn if isinstance(self.rnn, nn.ModuleList) else [self.rnn]
        return [part for part in parts if isinstance(part, cells.KINDS)]

    def forward(self, z: Tensor, states: Tensors | None = None) -> tuple[Tensor, Tensors]:
        """z [T, B, F] and states [L, B, H], zero where None → corrections [T, B, K] and the states after."""
        y, after = z, list[Tensor]()
        for number, (part, given) in enumerate(zip(self.parts, self._by_part(states), strict=True)):
            y, final = cells.run(part, self.dropout(y) if number else y, given)  # [T, B, H]
            after += final
        return self._correction(y), tuple(after)

    def step(self, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """z [B, F] and states [L, B, H] → correction [B, K] and the next states."""
        below, after = z, list[Tensor]()
        for part, given in zip(self.parts, self._by_part(states), strict=True):
            assert given is not None
            hidden, following = cells.step(part, below, given)
            below = hidden[-1][0]  # [B, H]
            after += following
        return self._correction(below), tuple(after)

    def sequence(self, z: Tensor) -> Tensor:
        """z [T, B, F] → corrections [T, B, K], from zero states; by torch's own layers where torch runs it."""
        if not torch.compiler.is_exporting():
            return self.forward(z)[0]
        for part in self.parts:
            z = cells.sequence(part, z)[-1]
        return self._correction(z)

    def _by_part(self, states: Tensors | None) -> list[Tensors | None]:
        """All states, as each part has its own."""
        rest = iter(states or ())
        return [None if states is None else tuple(next(rest) for _ in pairs) for pairs in self.pairs]

    def _correction(self, y: Tensor) -> Tensor:
        correction: Tensor = self.head(self.dropout(y)) * self.gain  # [… , K]
        return correction


def _parts_of(config: ForecasterConfig) -> list[Recurrent]:
    """The layers: one module of as many as there are where all are of one kind, otherwise a module for each."""
    kinds = config.kinds
    if len(set(kinds)) == 1:
        between = config.dropout if len(kinds) > 1 else 0.0  # torch warns where there is nothing between
        return [_part(config, kinds[0], config.features, len(kinds), between)]
    parts: list[Recurrent] = []
    for kind in kinds:
        parts.append(_part(config, kind, cells.width_of(parts[-1]) if parts else config.features, 1, 0.0))
    return parts


def _part(config: ForecasterConfig, kind: str, inputs: int, layers: int, between: float) -> Recurrent:
    settings = {"proj_size": config.projected} if kind == PROJECTED else {}
    return CELLS[kind](inputs, config.hidden, layers, dropout=between, **settings)
