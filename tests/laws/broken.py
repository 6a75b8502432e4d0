"""Models that each break a law, as models in the wild do: graphs over two sensors, and objects that only step like one.

The sound one is h' = h / 2 + x, y = h'. Every other differs from it in one thing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from statestep.runtime import Contract, Feature, Output, State, StepModel

from ..models import Array, graph, smoother_contract, stamped

CONTRACT = smoother_contract(name="broken", outputs=(Output("y", role="prediction", features=("a", "b")),))
RNN_UNITS = 32


def sound() -> StepModel:
    return _of(_node("Identity", ["next_h"], ["y"]))


def batch_mean() -> StepModel:
    """Normalises over the streams of the call, as a BatchNorm left in training does."""
    return _of(_node("ReduceMean", ["next_h", "rows"], ["mean"], keepdims=1), _node("Sub", ["next_h", "mean"], ["y"]))


def running_sum() -> StepModel:
    """Each row sees those above it in its call."""
    return _of(_node("CumSum", ["next_h", "first"], ["y"]))


def forgetful() -> StepModel:
    """Gives back the state that it was given, so that nothing is remembered."""
    nodes = [_node("Identity", ["h"], ["next_h"]), *_halved("z"), _node("Identity", ["z"], ["y"])]
    return _model(nodes)


def runaway() -> StepModel:
    """Divides by a reading that may be zero."""
    return _of(_node("Div", ["next_h", "zero"], ["y"]))


def rnn_operator() -> StepModel:
    """ONNX's RNN, whose kernel rounds a row that is alone in its call otherwise than one among others."""
    rng = np.random.default_rng(3)
    weights = {
        "W": rng.uniform(-0.5, 0.5, (1, RNN_UNITS, 2)).astype(np.float32),
        "R": rng.uniform(-0.3, 0.3, (1, RNN_UNITS, RNN_UNITS)).astype(np.float32),
        "first": np.array([0]),
    }
    nodes = [
        _node("Unsqueeze", ["x", "first"], ["z"]),
        _node("RNN", ["z", "W", "R", "", "", "h"], ["", "next_h"], hidden_size=RNN_UNITS),
        _node("Squeeze", ["next_h", "first"], ["y"]),
    ]
    made = graph(
        nodes,
        {"x": ("float32", ["B", 2]), "h": ("float32", [1, "B", RNN_UNITS])},
        {"y": ("float32", ["B", RNN_UNITS]), "next_h": ("float32", [1, "B", RNN_UNITS])},
        weights,
    )
    state = State("h", "next_h", (1, RNN_UNITS), batch_axis=1)
    return StepModel(stamped(made, Contract("broken", (Feature("a"), Feature("b")), (state,), (Output("y"),))))


class _Twin:
    """The sound model as an object, for what no graph can do."""

    def __init__(self) -> None:
        self.model = sound()

    @property
    def contract(self) -> Contract:
        return self.model.contract

    def initial_states(self) -> list[Array]:
        return self.model.initial_states()

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        return self.model.step(x, states, times)


class Counting(_Twin):
    """Keeps a memory of its own beside the states: how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        self.calls += 1
        outputs, following = super().step(x, states, times)
        return {"y": outputs["y"] + np.float32(self.calls)}, following


class WritingInPlace(_Twin):
    """Saves an array: the next state is written over the one that it was given."""

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        outputs, following = super().step(x, states, times)
        states[0][...] = following[0]
        return outputs, list(states)


class KeepingAside(_Twin):
    """Keeps the true state to itself and hands out a ticket for it, as servers do that number their sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[float, ...], Array] = {}

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        birth = np.zeros(2, np.float32)
        outputs, (following,) = super().step(x, [np.stack([self.kept.get(tuple(row), birth) for row in states[0]])])
        sums = [zlib.crc32(row.tobytes()) for row in following]
        tickets = np.array([[total >> 16, total & 0xFFFF] for total in sums], np.float32)  # [B, 2], exact
        for ticket, row in zip(tickets, following, strict=True):
            self.kept[tuple(ticket)] = row.copy()
        return outputs, [tickets]


def offline(x: Array) -> dict[str, Array]:
    """What the sound model gives for whole sequences: x [T, B, 2] → y [T, B, 2]."""
    h, rows = np.zeros_like(x[0]), []
    for row in x:
        h = h * np.float32(0.5) + row
        rows.append(h)
    return {"y": np.stack(rows)}


def _node(kind: str, inputs: list[str], outputs: list[str], **settings: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, outputs, **settings)


def _halved(into: str) -> list[onnx.NodeProto]:
    return [_node("Mul", ["h", "half"], ["kept"]), _node("Add", ["kept", "x"], [into])]


def _of(*nodes: onnx.NodeProto) -> StepModel:
    """h' = h / 2 + x, and what these nodes make of it."""
    return _model([*_halved("next_h"), *nodes])


def _model(nodes: list[onnx.NodeProto]) -> StepModel:
    weights = {
        "half": np.array(0.5, np.float32),
        "zero": np.array(0.0, np.float32),
        "rows": np.array([0]),
        "first": np.array(0),
    }
    rows = ("float32", ["B", 2])
    made = graph(nodes, {"x": rows, "h": rows}, {"y": rows, "next_h": rows}, weights)
    return StepModel(stamped(made, CONTRACT))
