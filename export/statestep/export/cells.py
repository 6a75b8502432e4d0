"""What advances a recurrent layer, torch's own or one of `layers.py`: one timestep or a whole sequence, layer by layer.

Taken apart by layer, because a head may look at the hidden state of any of them, at any timestep. ONNX has operators
for LSTM and GRU that give the same bits stepped as in one call. Its RNN does not, where a call holds a single row, and
its LSTM knows neither projection nor layer normalisation: these cells are spelt out in matrix products, in both forms.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from statestep.export.errors import ExportError
from statestep.export.layers import RecurrentLayers
from statestep.export.recur import Tensors, recur
from statestep.runtime import State

Recurrent = nn.RNNBase | RecurrentLayers
KINDS = (nn.RNNBase, RecurrentLayers)  # for isinstance


def letters_of(rnn: Recurrent) -> str:
    """The names of a layer's states, the one that is its output first.

    >>> letters_of(nn.LSTM(3, 8)), letters_of(nn.GRU(3, 8))
    ('hc', 'h')
    """
    return rnn.letters if isinstance(rnn, RecurrentLayers) else "hc" if isinstance(rnn, nn.LSTM) else "h"


def width_of(rnn: Recurrent) -> int:
    """How many columns a layer puts out: its hidden units, or what they are projected on."""
    return getattr(rnn, "proj_size", 0) or rnn.hidden_size


def states_of(rnn: Recurrent, prefix: str = "") -> tuple[State, ...]:
    """The state pairs of a recurrent layer: h0 → hn and, of an LSTM, c0 → cn, [L, H] with the batch between.

    >>> [state.output for state in states_of(nn.LSTM(3, 8, 2), "encoder_")]
    ['encoder_hn', 'encoder_cn']
    """
    return tuple(
        State(f"{prefix}{letter}0", f"{prefix}{letter}n", (rnn.num_layers, width), batch_axis=1)
        for letter, width in zip(letters_of(rnn), (width_of(rnn), rnn.hidden_size), strict=False)
    )


def check(rnn: Recurrent, name: str) -> None:
    """Raise `ExportError` for a layer that cannot be stepped."""
    if getattr(rnn, "bidirectional", False):
        raise ExportError(f"layer {name!r} is bidirectional: it reads rows that have not come yet, so it cannot stream")


def packed(rnn: Recurrent, states: Tensors) -> Any:
    """States as the layer's own call takes them: a bare tensor where there is one."""
    return states if len(letters_of(rnn)) > 1 else states[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torch's notice, at the first projection, of which of its own libraries is not used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections")
        yield


def run(rnn: Recurrent, z: Tensor, states: Tensors | None) -> tuple[Tensor, Tensors]:
    """The layer's own call, which torch trains: z [T, B, F] and states [L, B, H] → y [T, B, H] and the states after."""
    with quiet():
        y, after = rnn(z, None if states is None else packed(rnn, states))
    return y, tuple(after) if len(letters_of(rnn)) > 1 else (after,)


def step(rnn: Recurrent, z: Tensor, states: Tensors) -> tuple[list[Tensor], Tensors]:
    """z [B, F] and states [L, B, H] → each layer's hidden state [1, B, H], and the next states [L, B, H]."""
    after: list[Tensors] = []
    below = z[None]  # [1, B, F]
    for layer in range(rnn.num_layers):
        here = tuple(state[layer : layer + 1] for state in states)  # [1, B, H] each
        if _lowered(rnn):
            following = tuple(state[None] for state in _row(rnn, layer, below[0], tuple(state[0] for state in here)))
        else:
            _, following = _whole(rnn, layer, below, here)
        after.append(following)
        below = following[0]
    return [following[0] for following in after], tuple(torch.cat(column) for column in zip(*after, strict=True))


def sequence(rnn: Recurrent, z: Tensor) -> list[Tensor]:
    """z [T, B, F] → each layer's hidden states [T, B, H], from zero states."""
    hidden: list[Tensor] = []
    below = z
    for layer in range(rnn.num_layers):
        # A tensor for each state: the exporter takes two names for one tensor as one.
        zero = tuple(z.new_zeros(1, z.shape[1], state.shape[1]) for state in states_of(rnn))
        below = _recurred(rnn, layer, below, zero) if _lowered(rnn) else _whole(rnn, layer, below, zero)[0]
        hidden.append(below)
    return hidden


def _lowered(rnn: Recurrent) -> bool:
    """Whether the layer is spelt out in matrix products."""
    if isinstance(rnn, RecurrentLayers):
        return rnn.lowered
    return isinstance(rnn, nn.RNN) or rnn.proj_size > 0


def _whole(rnn: Recurrent, layer: int, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
    """z [T, B, F] and states [1, B, H] → hidden states [T, B, H], and the states after, by an operator of ONNX.

    torch asks for the weights, bias, layers, dropout, training, bidirectional and batch_first.
    """
    if isinstance(rnn, RecurrentLayers):
        return rnn.whole(layer, z, states)
    weights: list[Tensor] = list(rnn.all_weights[layer])
    if isinstance(rnn, nn.LSTM):
        y, *after = torch.lstm(z, states, weights, rnn.bias, 1, 0.0, False, False, False)
    else:
        y, *after = torch.gru(z, states[0], weights, rnn.bias, 1, 0.0, False, False, False)
    return y, tuple(after)


def _recurred(rnn: Recurrent, layer: int, z: Tensor, states: Tensors) -> Tensor:
    """z [T, B, F] and states [1, B, H] → hidden states [T, B, H], row by row."""

    def body(carry: Tensors, row: Tensors) -> tuple[Tensors, Tensors]:
        following = _row(rnn, layer, row[0], carry)
        return following, following[:1]

    return recur(body, tuple(state[0] for state in states), (z,))[1][0]


def _row(rnn: Recurrent, layer: int, z: Tensor, states: Tensors) -> Tensors:
    """z [B, F] and states [B, H] → the next states, in matrix products."""
    if isinstance(rnn, RecurrentLayers):
        return rnn.row(layer, rnn.product(layer, z), states)
    w, r, *others = rnn.all_weights[layer]
    b, b_r = others[:2] if rnn.bias else (None, None)
    given = linear(z, w, b) + linear(states[0], r, b_r)  # [B, gates · H]
    if isinstance(rnn, nn.LSTM):  # with a projection, torch's last weight
        i, f, g, o = given.chunk(4, dim=-1)
        c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
        return linear(torch.sigmoid(o) * torch.tanh(c), others[-1]), c
    return (torch.relu(given) if getattr(rnn, "nonlinearity", "tanh") == "relu" else torch.tanh(given),)
