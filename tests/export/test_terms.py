"""The arithmetic that graphs are built of: numbers are numpy's, and a row's do not depend on the rows beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import GraphProto, TensorProto, helper

from statestep.export.surgery import OPSET
from statestep.export.terms import Term, Terms
from statestep.runtime import session_options

from .models import Array

WIDTHS = (1, 3, 5, 7, 16, 19, 33, 100)
ROWS = 37
FOLDS: dict[str, tuple[Callable[[Terms, Term, int], Term], Callable[[Array], Array]]] = {
    "log1p": (lambda g, x, width: g.log1p(x, width), np.log1p),
    "total": (lambda g, x, width: g.total(x, width), lambda x: x.sum(axis=1, keepdims=True)),
    "mean": (lambda g, x, width: g.mean(x, width), lambda x: x.mean(axis=1, keepdims=True)),
}


def session(make: Callable[[Terms, Term], Term], width: int, offset: int) -> ort.InferenceSession:
    """x [B, offset + width] → y, made of the last `width` columns: a Slice leaves rows at any address."""
    graph = GraphProto(name="terms")
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", offset + width]))
    g = Terms(graph, "test")
    x = g.term("x")
    if offset:
        x = g.node("Slice", x, g.whole([offset]), g.whole([offset + width]), g.whole([1]))
    g.builder.output(make(g, x).name, "y", TensorProto.FLOAT, ["B", None])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    return ort.InferenceSession(made.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])


def run(runner: ort.InferenceSession, x: Array) -> Array:
    return np.asarray(runner.run(["y"], {"x": x})[0])


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", FOLDS)
def test_a_row_is_the_same_in_every_batch(name: str, width: int, offset: int) -> None:
    """Alone, at every place of a batch, and in a smaller batch it has the same bits; and they are numpy's numbers."""
    make, truth = FOLDS[name]
    runner = session(lambda g, x: make(g, x, width), width, offset)
    x = np.random.default_rng(width).exponential(3.0, (ROWS, offset + width)).astype(np.float32)
    whole = run(runner, x)
    np.testing.assert_allclose(whole, truth(x[:, offset:].astype(np.float64)), rtol=1e-6, atol=1e-6)
    for row in range(ROWS):
        assert run(runner, x[row : row + 1]).tobytes() == whole[row].tobytes(), row
    for begin, end in ((0, 2), (5, 12), (20, ROWS)):
        assert run(runner, x[begin:end]).tobytes() == whole[begin:end].tobytes()
    shuffled = np.random.default_rng(1).permutation(ROWS)
    assert run(runner, x[shuffled]).tobytes() == whole[shuffled].tobytes()


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: 2.0 * a + b,
    "-": lambda a, b: 1.0 - a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: 3.0 / a / b,
}


@pytest.mark.parametrize("op", BINARY)
def test_operators_are_those_of_numbers(op: str) -> None:
    """From either side, with numbers and with arrays."""
    x = np.random.default_rng(0).uniform(0.5, 2.0, (4, 3)).astype(np.float32)
    other = np.array([1.5, -2.0, 0.25], np.float32)
    runner = session(lambda g, x: BINARY[op](x, g.constant(other)), 3, 0)
    np.testing.assert_allclose(run(runner, x), BINARY[op](x, other), rtol=1e-6)


def test_comparisons_and_choices_are_numpys() -> None:
    """Greater, less, equal, and, or, not; where, largest, smallest, clipped; a NaN is equal to nothing."""
    x = np.array([[-2.0, 0.0, 1.0, 3.0, np.nan]], np.float32)

    def make(g: Terms, x: Term) -> Term:
        inside = (x > -1.0) & (x < 2.0) | (x == 3.0)
        return g.where(inside & ~(x >= 1.0), g.largest(x, 0.5), g.smallest(g.clipped(x, -1.0, 2.0), 1.5))

    assert run(session(make, 5, 0), x)[0, :4].tolist() == [-1.0, 0.5, 1.0, 1.5]


def test_columns_are_picked_joined_and_ranked() -> None:
    """By their places, side by side, the largest first; of each row by itself."""
    x = np.array([[3, 1, 2, 5], [0, 9, 8, 7]], np.float32)

    def make(g: Terms, x: Term) -> Term:
        return g.joined(g.columns(x, [2, 0]), g.highest(x, 3), g.most(x))

    assert run(session(make, 4, 0), x).tolist() == [[2, 3, 5, 3, 2, 5], [8, 0, 9, 8, 7, 9]]


def test_a_constant_is_written_once() -> None:
    """However often it is asked for; numbers of another shape or dtype are others."""
    graph = GraphProto(name="terms")
    g = Terms(graph, "test")
    names = [g.constant(1.0).name, g.constant(1.0).name, g.constant(np.ones(1)).name, g.whole(1).name, g.whole(1).name]
    assert names[0] == names[1] and names[3] == names[4] and len(set(names)) == 3 == len(graph.initializer)
