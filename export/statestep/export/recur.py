"""One recurrence over the first axis: an ONNX Scan where the graph is exported, a plain loop where torch runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._higher_order_ops.scan import scan

Tensors = tuple[Tensor, ...]


def recur(
    body: Callable[[Tensors, Tensors], tuple[Tensors, Tensors]], carry: Tensors, xs: Tensors
) -> tuple[Tensors, Tensors]:
    """carry, y[t] = body(carry, x[t]) for t = 0 … T−1 → the last carry and each y, [T, …].

    >>> total, sums = recur(lambda c, x: ((c[0] + x[0],), (c[0] + x[0],)), (torch.zeros(1),), (torch.ones(3, 1),))
    >>> sums[0].flatten().tolist()
    [1.0, 2.0, 3.0]
    """
    if torch.compiler.is_exporting():
        # What leaves a Scan's body must be a tensor of its own: the exporter merges two names for one.
        def separate(carried: Tensors, row: Tensors) -> tuple[Tensors, Tensors]:
            following, ys = body(carried, row)
            return tuple(tensor.clone() for tensor in following), tuple(tensor.clone() for tensor in ys)

        last, gathered = scan(separate, carry, xs)
        return tuple(last), tuple(gathered)
    rows = []
    for row in zip(*xs, strict=True):
        carry, ys = body(carry, row)
        rows.append(ys)
    return carry, tuple(torch.stack(column) for column in zip(*rows, strict=True))
