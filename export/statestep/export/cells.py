"""What advances a recurrent layer: `nn.LSTM`, `nn.GRU` and `nn.RNN`, one timestep or a whole sequence, layer by layer.

Taken apart by layer, because a head may look at the hidden state of any of them, at any timestep. ONNX has an operator
for LSTM and GRU that gives the same bits stepped as in one call. Its RNN does not, where a call holds a single row, so
that cell is spelt out in matrix products, in both forms.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from statestep.export.errors import ExportError
from statestep.export.recur import Tensors, recur
from statestep.runtime import State


def states_of(rnn: nn.RNNBase, prefix: str = "") -> tuple[State, ...]:
    """The state pairs of a recurrent layer: h0 → hn and, of an LSTM, c0 → cn, [L, H] with the batch between.

    >>> [state.output for state in states_of(nn.LSTM(3, 8, 2), "encoder_")]
    ['encoder_hn', 'encoder_cn']
    """
    return tuple(
        State(f"{prefix}{letter}0", f"{prefix}{letter}n", (rnn.num_layers, rnn.hidden_size), batch_axis=1)
        for letter in ("hc" if isinstance(rnn, nn.LSTM) else "h")
    )


def check(rnn: nn.RNNBase, name: str) -> None:
    """Raise `ExportError` for a layer that cannot be stepped."""
    if rnn.bidirectional:
        raise ExportError(f"layer {name!r} is bidirectional: it reads rows that have not come yet, so it cannot stream")
    if rnn.proj_size:
        raise ExportError(f"layer {name!r} has proj_size {rnn.proj_size}, which ONNX's LSTM lacks: train it without")


def step(rnn: nn.RNNBase, z: Tensor, states: Tensors) -> tuple[list[Tensor], Tensors]:
    """z [B, F] and states [L, B, H] → each layer's hidden state [1, B, H], and the next states [L, B, H]."""
    hidden: list[Tensor] = []
    cells: list[Tensor] = []
    below = z[None]  # [1, B, F]
    for layer in range(rnn.num_layers):
        here = slice(layer, layer + 1)
        if isinstance(rnn, nn.LSTM):
            _, below, cell = torch.lstm(below, (states[0][here], states[1][here]), *_call(rnn, layer))
            cells.append(cell)
        elif isinstance(rnn, nn.GRU):
            _, below = torch.gru(below, states[0][here], *_call(rnn, layer))
        else:
            below = _simple(rnn, layer, below[0], states[0][layer])[None]
        hidden.append(below)
    return hidden, (torch.cat(hidden), torch.cat(cells)) if cells else (torch.cat(hidden),)


def sequence(rnn: nn.RNNBase, z: Tensor) -> list[Tensor]:
    """z [T, B, F] → each layer's hidden states [T, B, H], from zero states."""
    zero = z.new_zeros(1, z.shape[1], rnn.hidden_size)  # [1, B, H]
    hidden: list[Tensor] = []
    below = z
    for layer in range(rnn.num_layers):
        if isinstance(rnn, nn.LSTM):
            below = torch.lstm(below, (zero, zero.clone()), *_call(rnn, layer))[0]
        elif isinstance(rnn, nn.GRU):
            below = torch.gru(below, zero, *_call(rnn, layer))[0]
        else:
            below = _simple_sequence(rnn, layer, below, zero[0])
        hidden.append(below)
    return hidden


def _call(rnn: nn.RNNBase, layer: int) -> tuple[list[Tensor], bool, int, float, bool, bool, bool]:
    """torch's arguments for one layer: weights, bias, layers, dropout, training, bidirectional, batch_first."""
    return list(rnn.all_weights[layer]), bool(rnn.bias), 1, 0.0, False, False, False


def _simple(rnn: nn.RNNBase, layer: int, z: Tensor, h: Tensor) -> Tensor:
    """h' = tanh(W z + b + R h + b'), or relu: z [B, F], h [B, H]."""
    w, r, *biases = rnn.all_weights[layer]
    b, b_r = biases or (None, None)
    return _bend(rnn, linear(z, w, b) + linear(h, r, b_r))


def _simple_sequence(rnn: nn.RNNBase, layer: int, z: Tensor, zero: Tensor) -> Tensor:
    def body(carry: Tensors, row: Tensors) -> tuple[Tensors, Tensors]:
        h = _simple(rnn, layer, row[0], carry[0])
        return (h,), (h,)

    return recur(body, (zero,), (z,))[1][0]


def _bend(rnn: nn.RNNBase, value: Tensor) -> Tensor:
    return torch.relu(value) if getattr(rnn, "nonlinearity", "tanh") == "relu" else torch.tanh(value)
