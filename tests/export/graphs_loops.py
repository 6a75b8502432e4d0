"""Graphs in which a Loop or a Scan walks along time, written by hand; and some where it walks along other things."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .conversions import Case
from .net import FEATURES, UNITS, Net, X, Y, body_of

ROW = {"row": ("B", FEATURES)}
HIDDEN = ("B", UNITS)


def births(net: Net, value: Any = 0.0, dtype: str = "float32", width: int = UNITS) -> str:
    """A state's value for every stream, [B, H]."""
    sizes = net.add("Concat", net.size("x", 1), net.constant([width]), axis=0)
    return net.add("Expand", net.constant(value, dtype), sizes)


def cell(net: Net, row: str, h: str, out: str | None = None) -> str:
    """tanh(row·W + h·R + b), [B, H]."""
    seen = net.add("Gemm", row, net.weight(FEATURES, UNITS), net.weight(UNITS))
    return net.add("Tanh", net.add("Add", seen, net.add("MatMul", h, net.weight(UNITS, UNITS))), out=out)


def scan(*, axis: int = 0, backwards: bool = False, out_axis: int = 0) -> bytes:
    """A Scan whose body is a vanilla cell."""
    net = Net()
    inside = body_of(net)
    inside.add("Identity", cell(inside, "row", "h", out="next_h"), out="seen")
    body = inside.graph("body", {"h": HIDDEN, **ROW}, {"next_h": HIDDEN, "seen": HIDDEN}, inner=True)
    x = "x" if axis == 0 else net.add("Transpose", "x", perm=[1, 0, 2])
    _, y = net.many(
        "Scan",
        births(net),
        x,
        count=2,
        body=body,
        num_scan_inputs=1,
        scan_input_axes=[axis],
        scan_output_axes=[out_axis],
        scan_input_directions=[int(backwards)],
        scan_output_directions=[int(backwards)],
    )
    net.head(y if out_axis == 0 else net.add("Transpose", y, perm=[1, 0, 2]))
    return net.model()


def scan_of_many() -> bytes:
    """A Scan with three states: float32 [B, H], float64 [B] and int64 [B, 1], and two gathered outputs."""
    net = Net()
    inside = body_of(net)
    h = cell(inside, "row", "h", out="next_h")
    total = inside.add("ReduceSum", inside.cast(h, "float64"), inside.constant([1]), keepdims=0)
    kept = inside.add("Mul", "mean", inside.constant(0.75, "float64"))
    inside.add("Add", kept, inside.add("Mul", total, inside.constant(0.25, "float64")), out="next_mean")
    high = inside.add(
        "Greater", inside.add("Gather", "row", inside.constant([0]), axis=1), inside.constant(0.0, "float32")
    )
    inside.add("Add", "count", inside.cast(high, "int64"), out="next_count")
    inside.add("Identity", h, out="seen")
    inside.add("Identity", "next_mean", out="means")
    inside.add("Identity", "next_count", out="counts")
    mean, count = ("float64", ("B",)), ("int64", ("B", 1))
    body = inside.graph(
        "body",
        {"h": HIDDEN, "mean": mean, "count": count, **ROW},
        {"next_h": HIDDEN, "next_mean": mean, "next_count": count, "seen": HIDDEN, "means": mean, "counts": count},
        inner=True,
    )
    starts = [
        births(net, 0.5),
        net.add("Expand", net.constant(2.0, "float64"), net.size("x", 1)),
        births(net, 3, "int64", 1),
    ]
    *_, y, means, counts = net.many("Scan", *starts, "x", count=6, body=body, num_scan_inputs=1)
    net.head(y)
    net.add("Identity", means, out="means_of")
    net.add("Identity", counts, out="counts_of")
    return net.model(X, {**Y, "means_of": ("float64", ("T", "B")), "counts_of": ("int64", ("T", "B", 1))})


def loop(*, branch: bool = False, trips: str = "counted", place: bool = False, state: str = "float32") -> bytes:
    """A Loop that reads row by row by its own counter, with a counter of its own beside it.

    `branch` puts the step into the branches of an If, by the sign of the batch's counter; `place` adds the row's place
    in the sequence to what it answers; `trips` "open" leaves the number of rounds to the condition.
    """
    net = Net()
    steps = net.add("Squeeze", net.size("x", 0), net.constant([0]))
    inside = body_of(net)
    row = inside.add("Gather", "x", "own", axis=0)
    inside.add("Add", "own", inside.constant(1), out="next_own")
    if branch:
        one, two = body_of(net), body_of(net)
        cell(one, row, "h", out="one")
        two.add("Relu", cell(two, row, "h"), out="two")
        even = inside.add("Equal", inside.add("Mul", "own", inside.constant(0)), inside.constant(0))
        graphs = {"then_branch": one, "else_branch": two}
        outs = {"then_branch": "one", "else_branch": "two"}
        parts = {key: graph.graph(key, {}, {outs[key]: HIDDEN}, inner=True) for key, graph in graphs.items()}
        inside.add("If", even, out="next_h", **parts)
    else:
        inside.add(
            "Cast", cell(inside, row, inside.cast("h", "float32")), to=11 if state == "float64" else 1, out="next_h"
        )
    seen = inside.cast("next_h", "float32")
    if place:
        seen = inside.add("Add", seen, inside.cast("number", "float32"))
    inside.add("Identity", seen, out="seen")
    inside.add("Less", "next_own", steps, out="go_on")
    held = (state, HIDDEN)
    body = inside.graph(
        "body",
        {"number": ("int64", ()), "still": ("bool", ()), "own": ("int64", ()), "h": held},
        {"go_on": ("bool", ()), "next_own": ("int64", ()), "next_h": held, "seen": HIDDEN},
        inner=True,
    )
    limit = steps if trips == "counted" else ""
    true = net.constant(True, "bool")
    start = births(net, 0.0, state)
    _, _, y = net.many("Loop", limit, true, net.constant(0), start, count=3, body=body, name="walk:0/loop")
    net.head(y)
    return net.model()


def loop_over_layers(rounds: int = 3) -> bytes:
    """A Loop that goes so many times over the same rows, and an LSTM behind it."""
    net = Net()
    inside = body_of(net)
    inside.add("Tanh", inside.add("MatMul", "z", inside.weight(FEATURES, FEATURES)), out="next_z")
    inside.add("Identity", "still", out="go_on")
    rows = ("T", "B", FEATURES)
    body = inside.graph(
        "body",
        {"number": ("int64", ()), "still": ("bool", ()), "z": rows},
        {"go_on": ("bool", ()), "next_z": rows},
        inner=True,
    )
    z = net.add("Loop", net.constant(rounds), net.constant(True, "bool"), "x", body=body)
    y, *_ = net.recurrent("LSTM", z)
    net.head(net.rows(y))
    return net.model()


def attention_in_a_loop() -> bytes:
    """A Loop whose every round looks at the mean of the whole sequence."""
    net = Net()
    mean = net.add("ReduceMean", "x", net.constant([0]), keepdims=0)
    steps = net.add("Squeeze", net.size("x", 0), net.constant([0]))
    inside = body_of(net)
    row = inside.add("Add", inside.add("Gather", "x", "number", axis=0), mean)
    inside.add("Identity", cell(inside, row, "h", out="next_h"), out="seen")
    inside.add("Identity", "still", out="go_on")
    body = inside.graph(
        "body",
        {"number": ("int64", ()), "still": ("bool", ()), "h": HIDDEN},
        {"go_on": ("bool", ()), "next_h": HIDDEN, "seen": HIDDEN},
        inner=True,
    )
    _, y = net.many("Loop", steps, net.constant(True, "bool"), births(net), count=2, body=body)
    net.head(y)
    return net.model()


def carries_the_batch() -> bytes:
    """A Scan whose state is the sum over all streams."""
    net = Net()
    inside = body_of(net)
    inside.add("Add", "total", inside.add("ReduceSum", "row", inside.constant([0]), keepdims=0), out="next_total")
    inside.add("Add", "row", "next_total", out="seen")
    shape = (FEATURES,)
    body = inside.graph("body", {"total": shape, **ROW}, {"next_total": shape, "seen": ("B", FEATURES)}, inner=True)
    start = net.constant(np.zeros(FEATURES), "float32")
    _, y = net.many("Scan", start, "x", count=2, body=body, num_scan_inputs=1)
    net.head(y, FEATURES)
    return net.model()


def _case(name: str, what: str, graph: Any, refused: str = "", outputs: Any = None, **settings: Any) -> Case:
    return Case(f"hand_{name}", what, partial(graph, **settings), outputs=outputs or {"y": "TBO"}, refused=refused)


CASES = [
    _case("scan", "Scan along axis 0", scan),
    _case("scan_axis1", "Scan along axis 1, batch first, gathered at axis 1", scan, axis=1, out_axis=1),
    _case("scan_backwards", "Scan from the end", scan, "from its end", backwards=True),
    _case(
        "scan_states",
        "Scan with states in float32, float64 and int64",
        scan_of_many,
        outputs={"y": "TBO", "means_of": "TB", "counts_of": "TBO"},
    ),
    _case("loop", "Loop with a counter of its own", loop),
    _case("loop_open", "Loop that ends by its condition", loop, trips="open"),
    _case("loop_if", "Loop with an If around its step", loop, branch=True),
    _case("loop_float64", "Loop that carries its state in float64", loop, state="float64"),
    _case("loop_place", "Loop that answers with a row's place in the sequence", loop, "place", place=True),
    _case("loop_layers", "Loop over layers, not along time, and LSTM", loop_over_layers),
    _case("loop_mean", "Loop that sees the mean of the sequence", attention_in_a_loop, "mean over the sequence"),
    _case("scan_batch", "Scan that carries a sum over all streams", carries_the_batch, "no axis of its own"),
]
