"""Graphs that look back over a fixed number of rows, written by hand: convolutions, shifts, differences; and ahead."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .conversions import Case
from .net import FEATURES, OUT, UNITS, Net, X

BTF = {"x": ("B", "T", FEATURES)}
BTO = {"y": ("B", "T", OUT)}
END = np.iinfo(np.int64).max


def channels(net: Net, x: str = "x") -> str:
    """[T, B, F] → [B, F, T]."""
    return net.add("Transpose", x, perm=[1, 2, 0])


def back(net: Net, z: str, out: str = "y", units: int = UNITS) -> bytes:
    """[B, H, T] → a head at every timestep, and the model."""
    net.head(net.add("Transpose", z, perm=[2, 0, 1]), units, out=out)
    return net.model()


def conv(
    *, kernel: int = 3, dilation: int = 1, pads: Sequence[int] = (), groups: int = 1, stride: int = 1, auto: str = ""
) -> bytes:
    """One convolution over time, its padding among its attributes."""
    net = Net()
    settings: dict[str, Any] = {"auto_pad": auto} if auto else {"pads": list(pads or ((kernel - 1) * dilation, 0))}
    width = UNITS - UNITS % groups
    first = net.add("Conv", channels(net), net.weight(width, FEATURES, 1), net.weight(width))
    z = net.add(
        "Conv",
        first,
        net.weight(UNITS, width // groups, kernel),
        net.weight(UNITS),
        dilations=[dilation],
        strides=[stride],
        group=groups,
        **settings,
    )
    return back(net, net.add("Relu", z))


def padded(*, value: float = 0.0, mode: str = "constant", ahead: int = 0) -> bytes:
    """A node that pads on the left, and a convolution without padding behind it."""
    net = Net()
    fill = net.constant(value, "float32")
    z = net.add("Pad", channels(net), net.constant([0, 0, 2 - ahead, 0, 0, ahead]), fill, mode=mode)
    return back(net, net.add("Conv", z, net.weight(UNITS, FEATURES, 3)))


def chomped(cut: int = 2) -> bytes:
    """A convolution that is padded on both sides, its last rows cut off."""
    net = Net()
    z = net.add("Conv", channels(net), net.weight(UNITS, FEATURES, 3), pads=[cut, cut])
    return back(net, cut_off(net, z, 0, -cut, 2))


def cut_off(net: Net, z: str, first: int, last: int, axis: int, out: str | None = None) -> str:
    """z[first:last] along an axis."""
    return net.add("Slice", z, *(net.constant([bound]) for bound in (first, last, axis)), out=out)


def stack_of_convolutions() -> bytes:
    """Three convolutions, dilation 1, 2 and 4, each with a residual sum, and an LSTM over them."""
    net = Net()
    z = net.add("Conv", channels(net), net.weight(UNITS, FEATURES, 1))
    for dilation in (1, 2, 4):
        settings: dict[str, Any] = {"dilations": [dilation], "pads": [dilation, 0]}
        z = net.add("Add", z, net.add("Tanh", net.add("Conv", z, net.weight(UNITS, UNITS, 2), **settings)))
    y, *_ = net.recurrent("LSTM", net.add("Transpose", z, perm=[2, 0, 1]), UNITS)
    net.head(net.rows(y))
    return net.model()


def in_two_dimensions() -> bytes:
    """A convolution over time and features at once, as for a spectrogram."""
    net = Net()
    image = net.add("Unsqueeze", net.add("Transpose", "x", perm=[1, 0, 2]), net.constant([1]))  # [B, 1, T, F]
    z = net.add("Conv", image, net.weight(2, 1, 3, FEATURES), pads=[2, 1, 0, 1])  # [B, 2, T, F]
    flat = net.add("Reshape", net.add("Transpose", z, perm=[2, 0, 1, 3]), net.constant([0, 0, 2 * FEATURES]))
    net.head(flat, 2 * FEATURES)
    return net.model()


def shifted(rows: int = 1) -> bytes:
    """Each row beside the one before it, the first beside zeros: a Pad and a Slice."""
    net = Net()
    late = net.add("Pad", "x", net.constant([rows, 0, 0, 0, 0, 0]))
    both = net.add("Concat", "x", cut_off(net, late, 0, -rows, 0), axis=2)
    net.head(both, 2 * FEATURES)
    return net.model()


def differences() -> bytes:
    """x[t] − x[t − 1] from slices of one padded sequence, into a GRU."""
    net = Net()
    late = net.add("Pad", "x", net.constant([1, 0, 0, 0, 0, 0]))
    step = net.add("Sub", cut_off(net, late, 1, END, 0), cut_off(net, late, 0, -1, 0))
    y, *_ = net.recurrent("GRU", step)
    net.head(net.rows(y))
    return net.model()


def joined() -> bytes:
    """A shift that puts a row of zeros before the sequence and cuts its last, by Concat."""
    net = Net()
    zeros = net.add("Mul", cut_off(net, "x", 0, 1, 0), net.constant(0.0, "float32"))
    late = net.add("Concat", zeros, cut_off(net, "x", 0, -1, 0), axis=0)
    net.head(net.add("Concat", "x", late, axis=2), 2 * FEATURES)
    return net.model()


def next_row() -> bytes:
    """Each row beside the one behind it: it cannot have come yet."""
    net = Net()
    ahead = net.add("Pad", "x", net.constant([0, 0, 0, 1, 0, 0]))
    y, *_ = net.recurrent("GRU", net.add("Concat", "x", cut_off(net, ahead, 1, END, 0), axis=2), 2 * FEATURES)
    net.head(net.rows(y))
    return net.model()


def mixing(operator: str) -> bytes:
    """A GRU, then one operator along time."""
    net = Net()
    y, *_ = net.recurrent("GRU", "x")
    rows = net.rows(y)  # [T, B, H]
    time = net.constant([0])
    if operator == "mean":
        rows = net.add("Sub", rows, net.add("ReduceMean", rows, time))
    elif operator == "flip":
        bounds = [net.constant([bound]) for bound in (-1, -END, 0, -1)]
        rows = net.add("Slice", rows, *bounds)
    elif operator == "attention":
        by_stream = net.add("Transpose", rows, perm=[1, 0, 2])
        weights = net.add("MatMul", by_stream, net.add("Transpose", rows, perm=[1, 2, 0]))
        mixed = net.add("MatMul", net.add("Softmax", weights, axis=-1), by_stream)
        rows = net.add("Transpose", mixed, perm=[1, 0, 2])
    elif operator == "position":
        table = net.weight(500, 1, UNITS)
        steps = net.size("x", 0)
        rows = net.add("Add", rows, net.add("Slice", table, net.constant([0]), steps, net.constant([0])))
    elif operator == "cumsum":
        rows = net.add("CumSum", rows, net.constant(0))
    elif operator == "softmax":
        rows = net.add("Softmax", rows, axis=0)
    elif operator == "topk":
        best, _ = net.many("TopK", rows, net.constant([1]), count=2, axis=0)
        rows = net.add("Add", rows, best)
    elif operator == "pool":
        pooled = net.add("AveragePool", channels(net, rows), kernel_shape=[3], pads=[2, 0], count_include_pad=1)
        rows = net.add("Transpose", pooled, perm=[2, 0, 1])
    elif operator == "norm":
        rows = net.add("InstanceNormalization", channels(net, rows), net.weight(UNITS), net.weight(UNITS))
        rows = net.add("Transpose", rows, perm=[2, 0, 1])
    elif operator == "batch_mean":
        rows = net.add("Sub", rows, net.add("ReduceMean", rows, net.constant([1])))
    net.head(rows)
    return net.model()


def first_step() -> bytes:
    """A head on the first row's hidden state."""
    net = Net()
    y, *_ = net.recurrent("LSTM", "x")
    net.head(net.add("Gather", net.rows(y), net.constant(0), axis=0))
    return net.model(X, {"y": ("B", OUT)})


def last_but_one() -> bytes:
    """A head on the row before the last."""
    net = Net()
    y, *_ = net.recurrent("LSTM", "x")
    net.head(net.add("Gather", net.rows(y), net.constant(-2), axis=0))
    return net.model(X, {"y": ("B", OUT)})


def _case(name: str, what: str, graph: Any, *arguments: Any, refused: str = "", **settings: Any) -> Case:
    outputs = settings.pop("outputs", {"y": "TBO"})
    return Case(f"hand_{name}", what, partial(graph, *arguments, **settings), outputs=outputs, refused=refused)


CASES = [
    _case("conv", "causal convolution, padded by its attribute", conv),
    _case("conv_dilated", "the same, dilation 4", conv, dilation=4),
    _case("conv_groups", "the same, two groups", conv, groups=2),
    _case("conv_kernel1", "convolution of kernel 1 alone", conv, kernel=1, refused="nothing in the graph remembers"),
    _case("conv_both", "convolution padded on both sides", conv, pads=(1, 1), refused=" ahead "),
    _case("conv_same", "convolution with auto_pad SAME_UPPER", conv, auto="SAME_UPPER", refused=" ahead "),
    _case("conv_valid", "convolution without padding", conv, auto="VALID", refused="fewer than it takes"),
    _case("conv_stride", "convolution with a stride", conv, stride=2, refused="a stride along time"),
    _case("conv_ahead", "convolution padded on the right", conv, pads=(0, 2), refused=" ahead "),
    _case("conv_images", "convolution over time and features", in_two_dimensions),
    _case("conv_stack", "dilated convolutions with residual sums, and LSTM", stack_of_convolutions),
    _case("pad", "Pad on the left and a convolution", padded),
    _case("pad_value", "Pad with 1.5", padded, value=1.5),
    _case("pad_both", "Pad on both sides", padded, ahead=1, refused=" ahead "),
    _case("pad_edge", "Pad by repeating the first row", padded, mode="edge", refused="by mode 'edge'"),
    _case("chomp", "convolution padded on both sides, its end cut off", chomped),
    _case("chomp_little", "the same, cut by less than it looks ahead", chomped, 1, refused=" ahead "),
    _case("shift", "each row beside the one before", shifted),
    _case("shift3", "each row beside the third before", shifted, 3),
    _case("differences", "differences of neighbouring rows, and GRU", differences),
    _case("shift_joined", "a shift by Concat", joined, refused="another number of rows"),
    _case("shift_ahead", "each row beside the one behind", next_row, refused=" ahead "),
    _case("first", "head on the first row", first_step, refused="another row than the newest", outputs={"y": "BO"}),
    _case(
        "last_but_one", "head on the row before the last", last_but_one, refused="on a single row", outputs={"y": "BO"}
    ),
    *(
        _case(f"mix_{operator}", f"GRU and {what}", mixing, operator, refused=refused)
        for operator, what, refused in (
            ("mean", "the mean over time", "mean over the sequence"),
            ("flip", "the sequence turned round", "in another order"),
            ("attention", "attention over the sequence", "attention"),
            ("position", "a code of each row's place", "place in the sequence"),
            ("cumsum", "a sum along time", "sums along the sequence"),
            ("softmax", "softmax over time", "Softmax"),
            ("topk", "the largest over time", "TopK"),
            ("pool", "average pooling along time", "AveragePool"),
            ("norm", "InstanceNormalization along time", "InstanceNormalization"),
            ("batch_mean", "the mean over all streams", "other streams"),
        )
    ),
]
