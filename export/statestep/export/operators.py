"""ONNX's own LSTM and GRU, written into the graph where torch's exporter has no way to ask for them.

torch knows no peephole weights, no coupled gates and no GRU whose reset gate acts before the product. These functions
put ONNX's operator into the exported graph by name. They work only while a graph is exported: elsewhere the layers of
`layers.py` compute the same in torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]


def in_order(weights: Tensor, order: Sequence[int], blocks: int) -> Tensor:
    """The gates' blocks of rows, of which there are `blocks`, in another order.

    >>> in_order(torch.tensor([1, 1, 2, 2, 3, 3]), (2, 0, 1), 3).tolist()
    [3, 3, 1, 1, 2, 2]
    """
    rows = weights.shape[0] // blocks
    # Slices, for the optimizer that folds them into plain initialisers passes by a Split.
    return torch.cat([weights[block * rows : (block + 1) * rows] for block in order])


def lstm(
    z: Tensor,
    states: Tensors,
    weights: Tensors,
    biases: Tensors | None,
    peephole: Tensor | None = None,
    *,
    coupled: bool = False,
) -> tuple[Tensor, Tensors]:
    """z [T, B, F] and (h, c) [1, B, H] → hidden states [T, B, H], and (h, c) [1, B, H] after the last row.

    `weights` are W [4H, F] and R [4H, H] and `biases` two [4H], their gates in ONNX's order i, o, f, c; `peephole` [3H]
    in the order i, o, f. `coupled`: f = 1 − i, whatever the forget gate's rows hold.
    """
    inputs = [*_inputs(z, weights, biases), *states, None if peephole is None else peephole[None]]
    attributes = {"input_forget": 1} if coupled else {}
    y, h, c = _recurrence("LSTM", inputs if peephole is not None else inputs[:-1], attributes, states)
    return y, (h, c)


def gru(z: Tensor, h: Tensor, weights: Tensors, biases: Tensors | None, *, reset_after: bool) -> tuple[Tensor, Tensors]:
    """z [T, B, F] and h [1, B, H] → hidden states [T, B, H], and (h,) [1, B, H]; the gates' order is z, r, h."""
    inputs = [*_inputs(z, weights, biases), h]
    y, following = _recurrence("GRU", inputs, {"linear_before_reset": int(reset_after)}, (h,))
    return y, (following,)


def _inputs(z: Tensor, weights: Tensors, biases: Tensors | None) -> list[Tensor | None]:
    """X, W, R, B and sequence_lens, as both operators take them."""
    w, r = weights
    return [z, w[None], r[None], None if biases is None else torch.cat(biases)[None], None]


def _recurrence(
    operator: str, inputs: Sequence[Tensor | None], attributes: dict[str, int], states: Tensors
) -> list[Tensor]:
    """The node: Y [T, B, H], without the axis of directions, and each final state [1, B, H]."""
    z, h = inputs[0], states[0]
    assert z is not None
    steps, batch, units = z.shape[0], z.shape[1], h.shape[-1]
    y, *after = torch.onnx.ops.symbolic_multi_out(
        operator,
        inputs,
        {"hidden_size": int(units), **attributes},
        dtypes=[z.dtype] * (1 + len(states)),
        shapes=[(steps, 1, batch, units), *[(1, batch, units)] * len(states)],
    )
    return [y.squeeze(1), *after]
