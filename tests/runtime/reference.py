"""What the engine is held against: an LSTM timestep in plain numpy, and an engine that is a dict of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from statestep.runtime import NO_TIME, Model
from statestep.runtime.engine import NO_OFFSET

Array = np.ndarray[Any, Any]
Plan = tuple[tuple[int | None, str], ...]  # up to so many missing timesteps, what is done


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

    def __init__(self, model: Model, period: int = 0, plan: Plan = ((None, "hold"),), expire: int | None = None):
        """The period and `expire` in ns; without a period there are no gaps."""
        self.model, self.period, self.plan, self.expire = model, period, plan, expire
        self.streams: dict[bytes, Stream] = {}
        self.committed: dict[bytes, Stream] = {}

    def advance(
        self, keys: list[bytes], x: Array, times: list[int], offsets: list[int]
    ) -> list[tuple[dict[str, Array], bool, int, int, int, bool, bool]]:
        """For each row: outputs, rejected, step, previous time, bridged, reset, dirtied."""
        results = []
        for key, row, time, offset in zip(keys, x, times, offsets, strict=True):
            known = self.streams.get(key) or Stream(self.model.initial_states())
            stream, bridged, reset = self.after_silence(known.copy(), time)
            previous, dirtied = stream.time, False
            outputs, states, good = self.step(stream, row, time)
            if good:
                dirtied = stream.dirty is None
                stream.states, stream.step = states, stream.step + 1
                stream.time = max(stream.time, time)
                stream.offset = offset
                stream.dirty = offset if stream.dirty is None else min(stream.dirty, offset)
                known = self.streams[key] = stream
            told = (bridged, reset) if good else (0, False)
            results.append((outputs, not good, known.step, previous, *told, dirtied))
        return results

    def step(self, stream: Stream, row: Array, time: int) -> tuple[dict[str, Array], list[Array], bool]:
        """One timestep: outputs, next states, and whether all of it is finite."""
        outputs, states = self.model.step(row[None], [value[None] for value in stream.states], np.array([time]))
        arrays = [*outputs.values(), *states]
        good = all(np.isfinite(value).all() for value in arrays if value.dtype.kind == "f")
        return {name: value[0] for name, value in outputs.items()}, [value[0].copy() for value in states], good

    def after_silence(self, stream: Stream, time: int) -> tuple[Stream, int, bool]:
        """The stream just before an observation, how many timesteps were bridged, whether it was reset."""
        if NO_TIME in (stream.time, time):
            return stream, 0, False
        elapsed, contract, born = time - stream.time, self.model.contract, self.model.initial_states()
        told = [any(o.state == s.input for o in contract.outputs) for s in contract.states]
        held = zip(stream.states, born, told, strict=True)
        idle = all((value == begin).all() for value, begin, is_told in held if is_told)
        if self.expire is not None and elapsed > self.expire:
            if idle:
                stream.states, stream.step, stream.time = born, 0, NO_TIME
                return stream, 0, False
            way, missing = "reset", 0
        elif not self.period or elapsed <= 1.5 * self.period:
            return stream, 0, False
        else:
            missing = round(elapsed / self.period) - 1
            way = next(way for up_to, way in self.plan if up_to is None or missing <= up_to)
        if way == "reset":
            kept = [is_told or s.lasting for is_told, s in zip(told, contract.states, strict=True)]
            pairs = zip(stream.states, born, kept, strict=True)
            stream.states = [value if lasts else begin for value, begin, lasts in pairs]
            stream.step = 0 if idle else stream.step
        if way != "bridge":
            return stream, 0, way == "reset"
        for number in range(1, missing + 1):
            _, states, good = self.step(
                stream, np.full(len(contract.features), np.nan, np.float32), stream.time + number * self.period
            )
            if not good:
                return stream, number - 1, False
            stream.states, stream.step = states, stream.step + 1
        return stream, missing, False

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
