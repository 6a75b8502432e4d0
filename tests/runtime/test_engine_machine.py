"""Any history of calls: the engine and a dict of deep copies tell the same, bit for bit, at every moment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from statestep.runtime import Engine, engine, state

from .doubles import Double
from .reference import DictEngine, Stream

KEYS = [b"%c" % letter for letter in b"abcdef"]
NUMBERS = st.sampled_from([0.0, 1.0, -2.5, 0.1, 1e30, float("nan"), float("inf")])  # some of them not finite
OBSERVATION = st.tuples(st.sampled_from(KEYS), NUMBERS, NUMBERS, st.integers(-5, 5))
SOME_KEYS = st.lists(st.sampled_from(KEYS), max_size=6)


class EngineMachine(RuleBasedStateMachine):
    """Both engines are told the same; `agree` compares them after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Double()
        self.engine = Engine(self.model)
        self.reference = DictEngine(Double())

    @rule(rows=st.lists(OBSERVATION, max_size=12))
    def advance(self, rows: list[tuple[bytes, float, float, int]]) -> None:
        keys, x, times = self._arrays(rows)
        out = self.engine.advance(keys, x, times)
        expected = self.reference.advance(keys, x, times.tolist())
        for row, (outputs, rejected, step, previous) in enumerate(expected):
            assert (out.rejected[row], out.step[row], out.previous_time[row]) == (rejected, step, previous)
            if rejected:
                assert np.isnan(out["y"][row]).all()
            else:
                assert {n: v[row].tobytes() for n, v in out.outputs.items()} == {
                    n: v.tobytes() for n, v in outputs.items()
                }

    @rule(rows=st.lists(OBSERVATION, min_size=1, max_size=12), at=st.integers(1, 5))
    def advance_and_fail(self, rows: list[tuple[bytes, float, float, int]], at: int) -> None:
        keys, x, times = self._arrays(rows)
        times_of_each = [keys.count(key) for key in set(keys)]
        runs = sum(
            -(-sum(n > wave for n in times_of_each) // engine.ROWS_PER_RUN) for wave in range(max(times_of_each))
        )
        self.model.calls, self.model.fails_at = 0, min(at, runs)
        with pytest.raises(RuntimeError):
            self.engine.advance(keys, x, times)
        self.model.fails_at = None

    @rule(keys=SOME_KEYS)
    def drop(self, keys: list[bytes]) -> None:
        self.engine.drop(keys)
        self.reference.drop(keys)

    @rule(keys=SOME_KEYS)
    def clean(self, keys: list[bytes]) -> None:
        known = [key for key in keys if key in self.reference.streams]
        self.engine.clean(known)
        for key in known:
            self.reference.streams[key].dirty = False

    @rule(source=st.sampled_from(KEYS), copies=st.sets(st.sampled_from(KEYS), max_size=4))
    def write(self, source: bytes, copies: set[bytes]) -> None:
        if source not in self.reference.streams:
            return
        self.engine.write(sorted(copies), self.engine.read([source] * len(copies)))
        for key in copies:
            self.reference.streams[key] = self._dirty_copy(self.reference.streams[source])

    @rule()
    def commit(self) -> None:
        self.engine.commit()
        self.reference.commit()

    @rule()
    def rollback(self) -> None:
        self.engine.rollback()
        self.reference.rollback()

    @invariant()
    def agree(self) -> None:
        keys = sorted(self.engine.keys())
        assert keys == sorted(self.reference.streams)
        held, dirty = self.engine.read(keys), set(self.engine.dirty())
        for i, key in enumerate(keys):
            bits = ([v[i].tobytes() for v in held.states], held.step[i], held.time[i], key in dirty)
            assert bits == self.reference.streams[key].bits()

    @staticmethod
    def _arrays(rows: list[tuple[bytes, float, float, int]]) -> tuple[list[bytes], Any, Any]:
        x = np.array([row[1:3] for row in rows], np.float32).reshape(len(rows), 2)  # [N, 2]
        return [row[0] for row in rows], x, np.array([row[3] for row in rows], np.int64)

    @staticmethod
    def _dirty_copy(stream: Stream) -> Stream:
        twin = stream.copy()
        twin.dirty = True
        return twin


def test_any_history_of_calls_gives_what_the_dict_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, records, dirtiness and keys agree after every call; tables grow from two rows, runs hold three at most."""
    monkeypatch.setattr(state, "FIRST_ROWS", 2)
    monkeypatch.setattr(engine, "ROWS_PER_RUN", 3)
    run_state_machine_as_test(EngineMachine, settings=settings(max_examples=150, stateful_step_count=30))
