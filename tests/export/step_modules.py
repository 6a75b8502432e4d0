"""Modules as teams write them in step form, forward(x, *states) → (y, *new_states), with their formulas in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from statestep.runtime import State

from .reference import sigmoid

Array = np.ndarray[Any, np.dtype[np.float64]]
Weights = dict[str, Array]
UNITS = 6


class MinGRU(nn.Module):
    """The minimal GRU of Feng and others (2024): gate and candidate see the input only."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, UNITS)
        self.candidate = nn.Linear(3, UNITS)
        self.head = nn.Linear(UNITS, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.sigmoid(self.gate(x))
        h = (1 - z) * h + z * self.candidate(x)
        return self.head(h), h


def min_gru(x: Array, states: list[Array], w: Weights) -> tuple[Array, list[Array]]:
    z = sigmoid(w["gate.weight"] @ x + w["gate.bias"])
    candidate = w["candidate.weight"] @ x + w["candidate.bias"]
    h = (1 - z) * states[0] + z * candidate
    return w["head.weight"] @ h + w["head.bias"], [h]


class ScalarLSTM(nn.Module):
    """The sLSTM of xLSTM (Beck and others 2024): exponential gates, a normaliser n and a stabiliser m."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(3, 4 * UNITS)
        self.r = nn.Linear(UNITS, 4 * UNITS, bias=False)
        self.head = nn.Linear(UNITS, 3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        i, f, z, o = (self.w(x) + self.r(h)).chunk(4, dim=-1)
        largest = torch.maximum(f + m, i)
        i, f = torch.exp(i - largest), torch.exp(f + m - largest)
        c = f * c + i * torch.tanh(z)
        n = f * n + i
        h = torch.sigmoid(o) * c / n
        return self.head(h), h, c, n, largest


def scalar_lstm(x: Array, states: list[Array], w: Weights) -> tuple[Array, list[Array]]:
    """Unstabilised: m is the logarithm of what the others are divided by."""
    h, c, n, m = states
    zi, zf, zz, zo = np.split(w["w.weight"] @ x + w["w.bias"] + w["r.weight"] @ h, 4)
    c = np.exp(zf) * c * np.exp(m) + np.exp(zi) * np.tanh(zz)
    n = np.exp(zf) * n * np.exp(m) + np.exp(zi)
    h = sigmoid(zo) * c / n
    m = np.maximum(zf + m, zi)
    return w["head.weight"] @ h + w["head.bias"], [h, c / np.exp(m), n / np.exp(m), m]


class DiagonalSSM(nn.Module):
    """A diagonal state-space layer, two state channels a unit, with the input passed on: h' = a ⊙ h + B x."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.randn(2, UNITS))
        self.into = nn.Linear(3, 2 * UNITS, bias=False)
        self.head = nn.Linear(2 * UNITS, 3, bias=False)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.exp(-torch.exp(self.rate)) * h + self.into(x).reshape(-1, 2, UNITS)
        return self.head(h.flatten(1)) + x, h


def diagonal_ssm(x: Array, states: list[Array], w: Weights) -> tuple[Array, list[Array]]:
    h = np.exp(-np.exp(w["rate"])) * states[0] + (w["into.weight"] @ x).reshape(2, UNITS)
    return w["head.weight"] @ h.ravel() + x, [h]


class Cells(nn.Module):
    """torch's single cells by hand: an LSTMCell, a GRUCell without biases above it, both seen by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.LSTMCell(3, UNITS)
        self.high = nn.GRUCell(UNITS, UNITS, bias=False)
        self.head = nn.Linear(2 * UNITS, 3)

    def forward(self, x: Tensor, h: Tensor, c: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        h, c = self.low(x, (h, c))
        g = self.high(h, g)
        return self.head(torch.cat([h, g], dim=-1)), h, c, g


def cells(x: Array, states: list[Array], w: Weights) -> tuple[Array, list[Array]]:
    h, c, g = states
    zi, zf, zg, zo = np.split(w["low.weight_ih"] @ x + w["low.bias_ih"] + w["low.weight_hh"] @ h + w["low.bias_hh"], 4)
    c = sigmoid(zf) * c + sigmoid(zi) * np.tanh(zg)
    h = sigmoid(zo) * np.tanh(c)
    xr, xz, xn = np.split(w["high.weight_ih"] @ h, 3)
    hr, hz, hn = np.split(w["high.weight_hh"] @ g, 3)
    z = sigmoid(xz + hz)
    g = (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * g
    return w["head.weight"] @ np.concatenate([h, g]) + w["head.bias"], [h, c, g]


class Kind(NamedTuple):
    """A module, the states that it names, and its numpy twin."""

    module: Callable[[], nn.Module]
    states: tuple[State, ...]
    twin: Callable[[Array, list[Array], Weights], tuple[Array, list[Array]]]


def _pairs(letters: str, shape: tuple[int, ...] = (UNITS,)) -> tuple[State, ...]:
    return tuple(State(f"{letter}0", f"{letter}n", shape) for letter in letters)


KINDS = {
    "mingru": Kind(MinGRU, _pairs("h"), min_gru),
    "slstm": Kind(ScalarLSTM, _pairs("hcnm"), scalar_lstm),
    "ssm": Kind(DiagonalSSM, _pairs("h", (2, UNITS)), diagonal_ssm),
    "cells": Kind(Cells, _pairs("hcg"), cells),
}


def made(kind: str) -> nn.Module:
    """The module, its weights from a seed."""
    torch.manual_seed(4)
    return KINDS[kind].module().eval()


def weights_of(module: nn.Module) -> Weights:
    return {name: weight.detach().double().numpy() for name, weight in module.named_parameters()}
