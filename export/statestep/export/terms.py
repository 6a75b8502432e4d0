"""Arithmetic on the tensors of a graph under construction, so that a formula reads as one.

    g = Terms(graph, "detector")
    smooth = 0.1 * g.term("x") + 0.9 * g.term("before")

Each operation adds a node. Numbers and arrays become constants, each once. All floats are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from onnx import GraphProto, TensorProto

from statestep.export.compare import Array
from statestep.export.stepping import VECTOR
from statestep.export.surgery import Builder

KINDS = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "bool": TensorProto.BOOL}


class Term:
    """A tensor, by its name in the graph of `Terms`."""

    __hash__ = None  # type: ignore[assignment]  # `==` makes a node
    __array_ufunc__ = None  # numpy leaves `array - term` to the term

    def __init__(self, graph: Terms, name: str):
        self.graph = graph
        self.name = name

    def __add__(self, other: Value) -> Term:
        return self.graph.node("Add", self, other)

    def __radd__(self, other: Value) -> Term:
        return self.graph.node("Add", other, self)

    def __sub__(self, other: Value) -> Term:
        return self.graph.node("Sub", self, other)

    def __rsub__(self, other: Value) -> Term:
        return self.graph.node("Sub", other, self)

    def __mul__(self, other: Value) -> Term:
        return self.graph.node("Mul", self, other)

    def __rmul__(self, other: Value) -> Term:
        return self.graph.node("Mul", other, self)

    def __rtruediv__(self, other: Value) -> Term:
        return self.graph.node("Div", other, self)

    def __truediv__(self, other: Value) -> Term:
        return self.graph.node("Div", self, other)

    def __matmul__(self, other: Value) -> Term:
        return self.graph.node("MatMul", self, other)

    def __gt__(self, other: Term | float) -> Term:
        return self.graph.node("Greater", self, other)

    def __ge__(self, other: Term | float) -> Term:
        return self.graph.node("GreaterOrEqual", self, other)

    def __lt__(self, other: Term | float) -> Term:
        return self.graph.node("Less", self, other)

    def __eq__(self, other: Value) -> Term:  # type: ignore[override]
        return self.graph.node("Equal", self, other)

    def __and__(self, other: Value) -> Term:
        return self.graph.node("And", self, other)

    def __or__(self, other: Value) -> Term:
        return self.graph.node("Or", self, other)

    def __invert__(self) -> Term:
        return self.graph.node("Not", self)


Value = Term | float | Array


class Terms:
    """A graph that is being built; `scope` begins the names of its tensors."""

    def __init__(self, graph: GraphProto, scope: str):
        self.builder = Builder(graph)
        self.scope = scope
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def term(self, name: str) -> Term:
        """The tensor of that name."""
        return Term(self, name)

    def node(self, op: str, *values: Value, **attributes: Any) -> Term:
        """The result of one operator; numbers among `values` take the dtype of float32."""
        names = [self.constant(value).name if not isinstance(value, Term) else value.name for value in values]
        return Term(self, self.builder.node(op, names, f"{self.scope}/{op.lower()}", **attributes))

    def constant(self, value: Value, dtype: Any = np.float32) -> Term:
        """A constant, made once however often it is asked for."""
        if isinstance(value, Term):
            return value
        held = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
        key = (held.dtype.str, held.shape, held.tobytes())
        if key not in self._constants:
            self._constants[key] = self.builder.constant(f"{self.scope}/constant", held, held.dtype)
        return Term(self, self._constants[key])

    def whole(self, value: int | Sequence[int]) -> Term:
        """A constant of int64."""
        return self.constant(cast(Any, value), np.int64)

    def where(self, condition: Term, one: Value, other: Value) -> Term:
        """`one` where the condition holds, else `other`."""
        return self.node("Where", condition, one, other)

    def largest(self, *values: Value) -> Term:
        """The larger, element by element."""
        return self.node("Max", *values)

    def smallest(self, *values: Value) -> Term:
        """The smaller, element by element."""
        return self.node("Min", *values)

    def clipped(self, value: Term, low: Value, high: Value) -> Term:
        """`value` within [low, high]."""
        return self.node("Min", self.node("Max", value, low), high)

    def cast(self, value: Term, dtype: str) -> Term:
        """`value` as another dtype."""
        return self.node("Cast", value, to=KINDS[dtype])

    def log1p(self, value: Term, width: int) -> Term:
        """log(1 + value) of [B, width] ≥ 0; `Log` rounds what is left beyond a row's whole vectors otherwise."""
        logs = self.node("Log", self._filled(value + 1.0, width, 1.0))
        return logs if width % VECTOR == 0 else self.columns(logs, range(width))

    def total(self, value: Term, width: int) -> Term:
        """The sum of each row: [B, width] → [B, 1]. The order of its additions hangs on the row's address otherwise."""
        return self.node("ReduceSum", self._filled(value, width, 0.0), self.whole([1]), keepdims=1)

    def mean(self, value: Term, width: int) -> Term:
        """The mean of each row: [B, width] → [B, 1]."""
        return self.total(value, width) / float(width)

    def _filled(self, value: Term, width: int, fill: float) -> Term:
        """Rows that are whole vectors: [B, width] → [B, width rounded up to a multiple of 16]."""
        rest = -width % VECTOR
        return value if rest == 0 else self.node("Pad", value, self.whole([0, 0, 0, rest]), fill)

    def most(self, value: Term) -> Term:
        """The largest of each row: [B, N] → [B, 1]."""
        return self.node("ReduceMax", value, self.whole([1]), keepdims=1)

    def highest(self, value: Term, count: int) -> Term:
        """The `count` largest of each row, falling: [B, N] → [B, count]."""
        names = [self.builder.name(f"{self.scope}/{what}") for what in ("highest", "places")]
        made, _ = self.builder.made("TopK", [value.name, self.whole([count]).name], f"{self.scope}/topk", axis=1)
        del made.output[:]
        made.output.extend(names)
        self.builder.graph.node.append(made)
        return Term(self, names[0])

    def joined(self, *values: Value) -> Term:
        """[B, N], [B, M] → [B, N + M]."""
        return self.node("Concat", *values, axis=1)

    def columns(self, value: Term, places: Sequence[int]) -> Term:
        """[B, N] → [B, len(places)], the columns at `places`."""
        return self.node("Gather", value, self.whole(list(places)), axis=1)

    def flat(self, value: Term) -> Term:
        """[B, 1] → [B]."""
        return self.node("Squeeze", value, self.whole([1]))
