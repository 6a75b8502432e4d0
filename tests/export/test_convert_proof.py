"""The proof of a conversion is not optional: a step graph that is wrong anywhere raises, and nothing is written."""

from __future__ import annotations

import errno
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from statestep.export import ExportError
from statestep.export.convert import convert

from . import graphs
from .net import UNITS, Net

CONVERT = import_module("statestep.export.convert")


def stack() -> bytes:
    """An LSTM of as many units as another LSTM over it, and a head: states of one shape, four times."""
    net = Net(seed=3)
    low, *_ = net.recurrent("LSTM", "x")
    high, *_ = net.recurrent("LSTM", net.rows(low), UNITS)
    net.head(net.rows(high))
    return net.model()


def attempt(tmp_path: Path, data: bytes) -> None:
    source = tmp_path / "original.onnx"
    source.write_bytes(data)
    convert(source, tmp_path / "out" / "step.onnx")


def swap(graph: onnx.GraphProto, one: str, other: str) -> None:
    """Exchange two tensors wherever nodes read them."""
    names = {one: other, other: one}
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)


def leaves_as(graph: onnx.GraphProto, output: str, source: str) -> None:
    """Let an output be another tensor."""
    for node in graph.node:
        for place, name in enumerate(node.output):
            if name == output:
                node.output[place] = f"{output}/not"
    graph.node.append(onnx.helper.make_node("Identity", [source], [output], name="wrong"))


def not_given_back(graph: onnx.GraphProto) -> None:
    leaves_as(graph, "l2_hn", "l2_h0")


def swapped_within(graph: onnx.GraphProto) -> None:
    swap(graph, "l1_h0", "l1_c0")


def of_the_other_layer(graph: onnx.GraphProto) -> None:
    source = {node.name: node for node in graph.node if node.op_type == "LSTM"}
    first, _ = source.values()
    leaves_as(graph, "l2_hn", first.output[1])


def layers_swapped(graph: onnx.GraphProto) -> None:
    swap(graph, "l1_h0", "l2_h0")


def state_ignored(graph: onnx.GraphProto) -> None:
    """A layer starts at zero at every step, as if its state never came in."""
    graph.node.insert(0, onnx.helper.make_node("Sub", ["l1_c0", "l1_c0"], ["nothing"], name="nothing"))
    for node in graph.node:
        if node.op_type == "LSTM":
            node.input[6] = "nothing" if node.input[6] == "l1_c0" else node.input[6]


def weight_changed(graph: onnx.GraphProto) -> None:
    """One weight by a thousandth."""
    for tensor in graph.initializer:
        if list(tensor.dims) == [1, 4 * UNITS, UNITS]:
            value = onnx.numpy_helper.to_array(tensor).copy()
            value[0, 0, 0] += 1e-3
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
            return


def bias_lost(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "LSTM":
            node.input[3] = ""
            return


WRONGS = [not_given_back, swapped_within, of_the_other_layer, layers_swapped, state_ignored, weight_changed, bias_lost]


@pytest.mark.parametrize("wrong", WRONGS, ids=lambda wrong: wrong.__name__)
def test_a_wrong_step_graph_is_not_written(
    wrong: Callable[[onnx.GraphProto], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is changed in the step graph after it was made: the proof sees it."""
    right = CONVERT.step_graph_of

    def changed(*arguments: Any) -> onnx.ModelProto:
        made: onnx.ModelProto = right(*arguments)
        wrong(made.graph)
        return made

    monkeypatch.setattr(CONVERT, "step_graph_of", changed)
    with pytest.raises(ExportError):
        attempt(tmp_path, stack())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wrong_state_in_the_graph_that_is_cut_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph with its states outside is wrong already: step and sequence agree, but not with the original."""
    right = CONVERT.carried

    def changed(*arguments: Any) -> Any:
        made = right(*arguments)
        of_the_other_layer(made.model.graph)
        return made

    monkeypatch.setattr(CONVERT, "carried", changed)
    with pytest.raises(ExportError):
        attempt(tmp_path, stack())
    assert list((tmp_path / "out").iterdir()) == []


def test_a_wrong_birth_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The declared first state is part of what is proven."""
    states = import_module("statestep.export.stateful")
    right = states.initial_of

    def changed(*arguments: Any) -> Any:
        return right(*arguments) + np.float32(0.01)

    monkeypatch.setattr(import_module("statestep.export.walks"), "initial_of", changed)
    with pytest.raises(ExportError):
        attempt(tmp_path, graphs.begins_at(0.25, "GRU"))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_row_that_hangs_on_its_batch_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the padding of operators that round a row by its neighbours, nothing is written."""
    monkeypatch.setattr(import_module("statestep.export.stepping"), "VECTOR_TAILS", {})
    with pytest.raises(ExportError, match=r"\(Log\) rounds a row otherwise when others share its batch"):
        attempt(tmp_path, graphs.bent("Log"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_is_full_leaves_what_was_there(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while writing is a sentence, and the model of before stays with its sequence file."""
    out = tmp_path / "out"
    out.mkdir()
    before = {"step.onnx": b"the model before", "step.sequence.onnx": b"its sequence"}
    for name, data in before.items():
        (out / name).write_bytes(data)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, "No space left on device" if number == errno.ENOSPC else "Permission denied")

    monkeypatch.setattr(CONVERT.onnx, "save", full)
    with pytest.raises(ExportError, match=r"^the model cannot be written to '.*step\.onnx': (No space|Permission)"):
        attempt(tmp_path, stack())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_interruption_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of the last check: nothing of the new model lies in the folder."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CONVERT, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, stack())
    assert list((tmp_path / "out").iterdir()) == []
