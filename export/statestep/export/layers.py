"""Recurrent layers that torch lacks, called as `nn.LSTM` is: peephole and coupled LSTM, GRU with reset before,
layer-normalised LSTM.

They are ordinary torch modules, their weights named as those of `nn.LSTM`: with peephole weights of zero one is its
twin. In training they are a loop over time, the input's product taken out of it. Exported, those that ONNX has an
operator for become that operator; the layer-normalised one is spelt out in matrix products.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm, linear

from statestep.export import operators
from statestep.export.operators import Tensors

LSTM_TO_ONNX = (0, 3, 1, 2)  # i f g o → i o f c
COUPLED_TO_ONNX = (0, 2, 0, 1)  # i g o → i o f c, where f's rows are not looked at
GRU_TO_ONNX = (1, 0, 2)  # r z n → z r h
RECURRENT_GAIN = 0.1  # of layer normalisation, before training


class RecurrentLayers(nn.Module, ABC):
    """A stack of layers of one kind. `y, (h, c) = layers(x, (h0, c0))`; a kind with one state takes and gives it bare.

    x is [T, B, F] or, with `batch_first`, [B, T, F]; y is laid out alike; states are [L, B, H], zero where not given.
    """

    letters = "hc"  # the states' names
    lowered = False  # whether ONNX has no operator for it

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        for layer in range(num_layers):
            for name, shape in self._shapes(input_size if layer == 0 else hidden_size).items():
                self.register_parameter(f"{name}_l{layer}", nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as torch draws those of `nn.LSTM`."""
        limit = 1 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -limit, limit)

    def forward(self, x: Tensor, initial: Any = None) -> tuple[Tensor, Any]:
        """x and the states to start from → the top layer's hidden states, and every layer's states after the last."""
        if x.ndim != 3 or x.shape[2] != self.input_size:
            raise ValueError(f"x has shape {list(x.shape)}, it must be of three axes, the last {self.input_size} wide")
        z = x.transpose(0, 1) if self.batch_first else x  # [T, B, F]
        if initial is None:
            states: Tensors = (z.new_zeros(self.num_layers, z.shape[1], self.hidden_size),) * len(self.letters)
        else:
            states = (initial,) if len(self.letters) == 1 else tuple(initial)  # [L, B, H] each
        after = []
        for layer in range(self.num_layers):
            z, following = self.whole(layer, z, tuple(state[layer : layer + 1] for state in states))
            after.append(following)
            if layer + 1 < self.num_layers:
                z = dropout(z, self.dropout, self.training)
        final = tuple(torch.cat(column) for column in zip(*after, strict=True))  # [L, B, H] each
        return z.transpose(0, 1) if self.batch_first else z, final if len(final) > 1 else final[0]

    def whole(self, layer: int, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """One layer over z [T, B, F] from states [1, B, H] → its hidden states [T, B, H], and the states after."""
        carried = tuple(state[0] for state in states)
        hidden = []
        for given in self.product(layer, z).unbind(0):
            carried = self.row(layer, given, carried)
            hidden.append(carried[0])
        return torch.stack(hidden), tuple(state[None] for state in carried)

    def weight(self, name: str, layer: int) -> Tensor:
        """A weight by its name."""
        found: Tensor = getattr(self, f"{name}_l{layer}")
        return found

    def product(self, layer: int, z: Tensor) -> Tensor:
        """What the input adds to every gate: z [… , F] → [… , gates · H]."""
        return linear(z, self.weight("weight_ih", layer), self.weight("bias_ih", layer) if self.bias else None)

    def recurrent_product(self, layer: int, h: Tensor) -> Tensor:
        """What the hidden state adds to every gate: h [B, H] → [B, gates · H]."""
        return linear(h, self.weight("weight_hh", layer), self.weight("bias_hh", layer) if self.bias else None)

    @abstractmethod
    def row(self, layer: int, given: Tensor, states: Tensors) -> Tensors:
        """One timestep: the input's product [B, gates · H] and states [B, H] → the next states."""

    @abstractmethod
    def _shapes(self, inputs: int) -> dict[str, tuple[int, ...]]:
        """The weights of a layer that reads `inputs` columns, by name."""

    def _products(self, inputs: int, gates: int) -> dict[str, tuple[int, ...]]:
        """The weights of both products."""
        rows = gates * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, inputs), "weight_hh": (rows, self.hidden_size)}
        return shapes | ({"bias_ih": (rows,), "bias_hh": (rows,)} if self.bias else {})

    def _for_onnx(self, layer: int, order: tuple[int, ...], gates: int) -> tuple[Tensors, Tensors | None]:
        """Weights and biases of both products, their gates in ONNX's order."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        laid = tuple(operators.in_order(self.weight(name, layer), order, gates) for name in names)
        return laid[:2], laid[2:] or None


class _GatedLSTM(RecurrentLayers):
    """The LSTM with peepholes, coupled gates, or both. Gates in torch's order: i, f (unless coupled), g, o."""

    def __init__(self, *args: Any, peephole: bool, coupled: bool, **settings: Any):
        self.peephole = peephole
        self.coupled = coupled
        self.gates = 3 if coupled else 4
        super().__init__(*args, **settings)

    def row(self, layer: int, given: Tensor, states: Tensors) -> Tensors:
        """Gate by gate, as Gers and Schmidhuber (2000) have it: the output gate sees the new cell state."""
        h, c = states
        gates = (given + self.recurrent_product(layer, h)).chunk(self.gates, dim=-1)  # [B, H] each
        seen = self.weight("weight_peephole", layer).chunk(self.gates - 1) if self.peephole else ()  # [H] each
        i = torch.sigmoid(gates[0] + seen[0] * c if seen else gates[0])
        if self.coupled:
            f = 1 - i
        else:
            f = torch.sigmoid(gates[1] + seen[1] * c if seen else gates[1])
        c = f * c + i * torch.tanh(gates[-2])
        o = torch.sigmoid(gates[-1] + seen[-1] * c if seen else gates[-1])
        return o * torch.tanh(c), c

    def whole(self, layer: int, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """Exported, ONNX's LSTM with input P for the peepholes and input_forget for the coupling."""
        if not torch.onnx.is_in_onnx_export():
            return super().whole(layer, z, states)
        order = COUPLED_TO_ONNX if self.coupled else LSTM_TO_ONNX
        weights, biases = self._for_onnx(layer, order, self.gates)
        seen = None
        if self.peephole:
            held = self.weight("weight_peephole", layer)
            seen = operators.in_order(held, (0, 1, 0), 2) if self.coupled else operators.in_order(held, (0, 2, 1), 3)
        return operators.lstm(z, states, weights, biases, seen, coupled=self.coupled)

    def _shapes(self, inputs: int) -> dict[str, tuple[int, ...]]:
        # All gates see the cell state but g, which writes it.
        seen = {"weight_peephole": ((self.gates - 1) * self.hidden_size,)} if self.peephole else {}
        return self._products(inputs, self.gates) | seen


class PeepholeLSTM(_GatedLSTM):
    """An LSTM whose gates see the cell state: i and f the old one, o the new one, each unit its own (Gers 2000).

    `weight_peephole_l0` [3H] holds the gates' weights in the order i, f, o; with `coupled`, [2H] in the order i, o.

    >>> y, (h, c) = PeepholeLSTM(3, 8)(torch.zeros(5, 2, 3))
    >>> y.shape, c.shape
    (torch.Size([5, 2, 8]), torch.Size([1, 2, 8]))
    """

    def __init__(self, *args: Any, coupled: bool = False, **settings: Any):
        super().__init__(*args, peephole=True, coupled=coupled, **settings)


class CoupledLSTM(_GatedLSTM):
    """An LSTM that forgets as much as it takes in, f = 1 − i: a fourth fewer weights (Greff and others 2017, CIFG).

    Gates in the order i, g, o. With `peephole` it is `PeepholeLSTM(coupled=True)`.

    >>> CoupledLSTM(3, 8).weight_ih_l0.shape
    torch.Size([24, 3])
    """

    def __init__(self, *args: Any, peephole: bool = False, **settings: Any):
        super().__init__(*args, peephole=peephole, coupled=True, **settings)


class ResetBeforeGRU(RecurrentLayers):
    """The GRU as first published (Cho and others 2014): the reset gate acts on the state before the product.

    `nn.GRU` resets after it. Gates in torch's order r, z, n; `y, h = layers(x, h0)`.

    >>> y, h = ResetBeforeGRU(3, 8, 2)(torch.zeros(5, 2, 3))
    >>> h.shape
    torch.Size([2, 2, 8])
    """

    letters = "h"

    def row(self, layer: int, given: Tensor, states: Tensors) -> Tensors:
        """h' = (1 − z) · n + z · h, with n from the state that the reset gate lets through."""
        (h,) = states
        units = self.hidden_size
        r_hh, b_hh = self.weight("weight_hh", layer), self.weight("bias_hh", layer) if self.bias else None
        both = given[..., : 2 * units] + linear(h, r_hh[: 2 * units], None if b_hh is None else b_hh[: 2 * units])
        r, z = torch.sigmoid(both).chunk(2, dim=-1)  # [B, H] each
        let_through = linear(r * h, r_hh[2 * units :], None if b_hh is None else b_hh[2 * units :])
        n = torch.tanh(given[..., 2 * units :] + let_through)
        return ((1 - z) * n + z * h,)

    def whole(self, layer: int, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """Exported, ONNX's GRU with linear_before_reset = 0."""
        if not torch.onnx.is_in_onnx_export():
            return super().whole(layer, z, states)
        weights, biases = self._for_onnx(layer, GRU_TO_ONNX, 3)
        return operators.gru(z, states[0], weights, biases, reset_after=False)

    def _shapes(self, inputs: int) -> dict[str, tuple[int, ...]]:
        return self._products(inputs, 3)


class LayerNormLSTM(RecurrentLayers):
    """An LSTM with layer normalisation of both products and of the cell state's way out (Ba, Kiros, Hinton 2016).

        i, f, g, o = norm(W x) · a + norm(R h) · a' + b,   h' = σ(o) · tanh(norm(c') · a'' + b'')

    A norm is over all four gates of a timestep, as published. It steadies training where units are many or inputs are
    badly scaled. Without `bias` neither b is there.
    """

    lowered = True

    def reset_parameters(self) -> None:
        """Products as in `nn.LSTM`; gains 1, that of the recurrent product 0.1, and biases 0.

        A norm stretches a small state to full size, its rounding too: at a gain of 1 the untrained layer wanders
        apart from itself computed more finely. 0.1 (Cooijmans and others 2017) begins where it does not.
        """
        super().reset_parameters()
        for name, weight in self.named_parameters():
            if name.startswith("gain"):
                nn.init.constant_(weight, RECURRENT_GAIN if name.startswith("gain_hh") else 1.0)
            elif name.startswith("bias"):
                nn.init.zeros_(weight)

    def product(self, layer: int, z: Tensor) -> Tensor:
        """The input's product, normalised."""
        gain = self.weight("gain_ih", layer)
        bias = self.weight("bias", layer) if self.bias else None
        return layer_norm(linear(z, self.weight("weight_ih", layer)), gain.shape, gain, bias)

    def row(self, layer: int, given: Tensor, states: Tensors) -> Tensors:
        """Gates in torch's order i, f, g, o."""
        h, c = states
        gain = self.weight("gain_hh", layer)
        recurrent = layer_norm(linear(h, self.weight("weight_hh", layer)), gain.shape, gain)
        i, f, g, o = (given + recurrent).chunk(4, dim=-1)  # [B, H] each
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        gain = self.weight("gain_c", layer)
        shown = layer_norm(c, gain.shape, gain, self.weight("bias_c", layer) if self.bias else None)
        return torch.sigmoid(o) * torch.tanh(shown), c

    def _shapes(self, inputs: int) -> dict[str, tuple[int, ...]]:
        units, rows = self.hidden_size, 4 * self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (rows, inputs), "weight_hh": (rows, units)}
        shapes |= {"gain_ih": (rows,), "gain_hh": (rows,), "gain_c": (units,)}
        return shapes | ({"bias": (rows,), "bias_c": (units,)} if self.bias else {})
