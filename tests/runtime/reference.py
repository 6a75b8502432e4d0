"""What the engine is held against: an LSTM timestep in plain numpy, and an engine that is a dict of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from statestep.runtime import NO_TIME, Model
from statestep.runtime.engine import NO_OFFSET

Array = np.ndarray[Any, Any]


def sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


def lstm_timestep(x: Array, h: Array, c: Array, w: Array, r: Array, b: Array) -> tuple[Array, Array]:
    """One timestep of one stream: x [F], h and c [H]; w [4H, F], r [4H, H], b [8H] in ONNX's order i, o, f, c.

    Source: the operator LSTM of https://onnx.ai/onnx/operators/onnx__LSTM.html, default activations, no peepholes.
    """
    wi, wo, wf, wc = np.split(w, 4)  # [H, F] each
    ri, ro, rf, rc = np.split(r, 4)  # [H, H] each
    bi, bo, bf, bc = np.split(b.reshape(2, -1).sum(axis=0), 4)  # [H] each, the biases of w and r added up
    i = sigmoid(wi @ x + ri @ h + bi)  # [H] how much of the candidate is let in
    o = sigmoid(wo @ x + ro @ h + bo)  # [H] how much of the cell is shown
    f = sigmoid(wf @ x + rf @ h + bf)  # [H] how much of the cell is kept
    g = np.tanh(wc @ x + rc @ h + bc)  # [H] the candidate
    c = f * c + i * g  # [H]
    h = o * np.tanh(c)  # [H]
    return h, c


def lstm_sequence(model: bytes, x: Array, layers: int) -> Array:
    """The predictions of `bench_model.lstm_step` over x [T, F], from its own weights: [T, F]."""
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load_model_from_string(model).graph.initializer}
    gates = [tuple(weights[f"{name}{layer}"][0] for name in "WRB") for layer in range(layers)]
    hidden = [(np.zeros(r.shape[1], np.float32), np.zeros(r.shape[1], np.float32)) for _, r, _ in gates]
    predictions = []
    for row in x:
        below = row
        for layer, (w, r, b) in enumerate(gates):
            hidden[layer] = lstm_timestep(below, *hidden[layer], w, r, b)
            below = hidden[layer][0]
        predictions.append(below @ weights["head"])
    return np.stack(predictions)  # [T, F]


class Stream:
    """What is remembered of one stream."""

    def __init__(self, states: list[Array]):
        self.states = states  # [*shape] each
        self.step = 0
        self.time = NO_TIME
        self.offset = NO_OFFSET
        self.dirty: int | None = None  # the offset of the first message since it was last clean

    def copy(self) -> Stream:
        """Another stream with the same bits."""
        twin = Stream([value.copy() for value in self.states])
        twin.step, twin.time, twin.offset, twin.dirty = self.step, self.time, self.offset, self.dirty
        return twin

    def bits(self) -> tuple[Any, ...]:
        """Everything, so that equal means equal bit for bit."""
        return [value.tobytes() for value in self.states], self.step, self.time, self.offset, self.dirty


class DictEngine:
    """The engine's semantics without its machinery: one row at a time, and a deep copy for `rollback`."""

    def __init__(self, model: Model):
        self.model = model
        self.streams: dict[bytes, Stream] = {}
        self.committed: dict[bytes, Stream] = {}

    def advance(
        self, keys: list[bytes], x: Array, times: list[int], offsets: list[int], anew: list[bool] | None = None
    ) -> list[tuple[dict[str, Array], bool, int, int, bool]]:
        """For each row: outputs, rejected, step, previous time, dirtied."""
        results = []
        begins = anew or [False] * len(keys)
        for key, row, time, offset, begin in zip(keys, x, times, offsets, begins, strict=True):
            stream = self.streams.get(key) or Stream(self.model.initial_states())
            before = self.model.initial_states() if begin else stream.states
            outputs, states = self.model.step(row[None], [value[None] for value in before])
            arrays = [*outputs.values(), *states]
            good = all(np.isfinite(value).all() for value in arrays if value.dtype.kind == "f")
            previous, dirtied = stream.time, good and stream.dirty is None
            if good:
                self.streams[key] = stream
                stream.states = [value[0].copy() for value in states]
                stream.step = 1 if begin else stream.step + 1
                stream.time = max(stream.time, time)
                stream.offset = offset
                stream.dirty = offset if stream.dirty is None else min(stream.dirty, offset)
            step = 0 if begin and not good else stream.step
            results.append(({n: value[0] for n, value in outputs.items()}, not good, step, previous, dirtied))
        return results

    def drop(self, keys: list[bytes]) -> None:
        for key in keys:
            self.streams.pop(key, None)

    def end(self, keys: list[bytes], offsets: list[int]) -> list[bool]:
        """As if they had never been, but for what is not durable yet; for each whether it was clean."""
        dirtied = []
        for key, offset in zip(keys, offsets, strict=True):
            found = self.streams.get(key)
            dirtied.append(found is not None and found.dirty is None)
            if found is not None:
                ended = self.streams[key] = Stream([value.copy() for value in self.model.initial_states()])
                ended.offset, ended.dirty = offset, offset if found.dirty is None else min(found.dirty, offset)
        return dirtied

    def clean(self, keys: list[bytes]) -> None:
        for key in keys:
            self.streams[key].dirty = None
        for key in keys:
            if key in self.streams and not self.streams[key].step:
                del self.streams[key]

    def commit(self) -> None:
        self.committed = {key: stream.copy() for key, stream in self.streams.items()}

    def rollback(self) -> None:
        self.streams = {key: stream.copy() for key, stream in self.committed.items()}
