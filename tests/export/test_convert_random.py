"""Random small networks convert and are equal; with one node that mixes rows, anywhere, they are refused."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statestep.export.against import rounding
from statestep.export.histories import stepped
from statestep.runtime import StepModel

from .conversions import Case, Original, Outcome, outcome_of
from .graphs_loops import HIDDEN, births
from .graphs_windows import channels, cut_off
from .net import FEATURES, UNITS, Net, body_of

pytestmark = pytest.mark.usefixtures("quick")

LAYERS = ("LSTM", "GRU", "RNN", "scan", "conv", "dense", "norm", "residual", "shift", "squash")
MEMORY = {"LSTM", "GRU", "RNN", "scan", "conv", "shift"}
MIXTURES = ("mean", "largest", "sum", "flip", "softmax", "cumsum", "ahead", "first", "both_sides", "place", "streams")


def layer(net: Net, kind: str, rows: str, before: str) -> str:
    """One layer over rows [T, B, H], of the same shape; `before` are the rows that the last layer took."""
    if kind in ("LSTM", "GRU", "RNN"):
        y, *_ = net.recurrent(kind, rows, UNITS)
        return net.rows(y)
    if kind == "scan":
        inside = body_of(net)
        seen = inside.add("Gemm", "row", inside.weight(UNITS, UNITS), inside.weight(UNITS))
        kept = inside.add("MatMul", "h", inside.weight(UNITS, UNITS, scale=0.4))
        inside.add("Identity", inside.add("Tanh", inside.add("Add", seen, kept), out="next_h"), out="seen")
        body = inside.graph("body", {"h": HIDDEN, "row": HIDDEN}, {"next_h": HIDDEN, "seen": HIDDEN}, inner=True)
        return net.many("Scan", births(net), rows, count=2, body=body, num_scan_inputs=1)[1]
    if kind == "conv":
        z = net.add("Conv", channels(net, rows), net.weight(UNITS, UNITS, 3), pads=[4, 0], dilations=[2])
        return net.add("Transpose", z, perm=[2, 0, 1])
    if kind == "dense":
        return net.add("Tanh", net.head(rows, UNITS, UNITS, out=None))
    if kind == "norm":
        return net.add("LayerNormalization", rows, net.weight(UNITS), net.weight(UNITS))
    if kind == "residual":
        return net.add("Add", rows, before)
    if kind == "shift":
        late = net.add("Pad", rows, net.constant([1, 0, 0, 0, 0, 0]))
        return net.add("Sub", rows, cut_off(net, late, 0, -1, 0))
    return net.add("Sigmoid", rows)


def mixture(net: Net, kind: str, rows: str) -> str:
    """One node, or a few, by which a row hangs on rows that come later, on all of them, or on other streams."""
    time = net.constant([0])
    if kind in ("mean", "largest", "sum"):
        operator = {"mean": "ReduceMean", "largest": "ReduceMax", "sum": "ReduceSum"}[kind]
        return net.add("Sub", rows, net.add(operator, rows, time))
    if kind == "flip":
        return net.add("Slice", rows, *(net.constant([bound]) for bound in (-1, np.iinfo(np.int64).min, 0, -1)))
    if kind == "softmax":
        return net.add("Mul", rows, net.add("Softmax", rows, axis=0))
    if kind == "cumsum":
        return net.add("CumSum", rows, net.constant(0))
    if kind == "ahead":
        late = net.add("Pad", rows, net.constant([0, 0, 0, 1, 0, 0]))
        return net.add("Add", rows, cut_off(net, late, 1, np.iinfo(np.int64).max, 0))
    if kind == "first":
        return net.add("Add", rows, cut_off(net, rows, 0, 1, 0))
    if kind == "both_sides":
        z = net.add("Conv", channels(net, rows), net.weight(UNITS, UNITS, 3), pads=[1, 1])
        return net.add("Transpose", z, perm=[2, 0, 1])
    if kind == "place":
        table = net.weight(500, 1, UNITS)
        return net.add("Add", rows, net.add("Slice", table, net.constant([0]), net.size("x", 0), time))
    return net.add("Sub", rows, net.add("ReduceMean", rows, net.constant([1])))


def network(kinds: list[str], seed: int, mixed: tuple[int, str] | None = None) -> Case:
    """Layers one over another, and a head; `mixed` puts a mixture before the layer of that number."""
    net = Net(seed)
    rows = before = net.head("x", FEATURES, UNITS, out=None)
    for place, kind in enumerate([*kinds, ""]):
        if mixed is not None and place == mixed[0]:
            rows = mixture(net, mixed[1], rows)
        if kind:
            rows, before = layer(net, kind, rows, before), rows
    net.head(rows)
    data = net.model()
    return Case("hand_random", "", lambda: data)


def outcome(case: Case, folder: str) -> Outcome:
    (into := Path(folder) / "out").mkdir()
    return outcome_of(case, into)


stacks = st.lists(st.sampled_from(LAYERS), min_size=1, max_size=4).filter(lambda kinds: MEMORY.intersection(kinds))


@settings(max_examples=25)
@given(kinds=stacks, seed=st.integers(0, 99))
def test_random_stacks_convert_and_are_equal(kinds: list[str], seed: int) -> None:
    """Bit for bit, or where an operator rounds each row in its own way within 1e-5 of the largest number.

    Such a network may also let its rounding grow so far that it cannot be proven: then that is what is said.
    """
    case = network(kinds, seed)
    with tempfile.TemporaryDirectory() as folder:
        found = outcome(case, folder)
        if found.made is None:
            assert {"conv", "RNN"}.intersection(kinds) and "lets that grow" in found.sentence
            return
        original, model = Original(case), StepModel.load(found.made.model)
        x = original.readings(19, 3, seed)
        ours, truth = stepped(model, x)["y"], original.run(x)["y"]
        if rounding(onnx.load_model(str(found.made.sequence))):
            np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-5 * np.abs(truth).max())
        else:
            assert ours.tobytes() == truth.tobytes()


@settings(max_examples=60)
@given(kinds=stacks, kind=st.sampled_from(MIXTURES), seed=st.integers(0, 99), data=st.data())
def test_a_random_mixture_is_refused(kinds: list[str], kind: str, seed: int, data: st.DataObject) -> None:
    """Wherever it stands: nothing is written, and the sentence names a node."""
    place = data.draw(st.integers(0, len(kinds)))
    with tempfile.TemporaryDirectory() as folder:
        found = outcome(network(kinds, seed, (place, kind)), folder)
        assert found.made is None and found.files == []
        assert found.sentence.startswith("node '") and ": " in found.sentence
