"""Any history of calls: the engine and a dict of deep copies tell the same, bit for bit, at every moment."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from statestep.runtime import Engine, Silence, engine, state, waves

from .doubles import Double, Serene
from .reference import DictEngine

KEYS = [b"%c" % letter for letter in b"abcdef"]
NUMBERS = st.sampled_from([0.0, 1.0, -2.5, 0.1, 1e30, float("nan"), float("inf")])  # some of them not finite
TIMES = st.one_of(st.integers(-5, 5), st.integers(-300, 300))
OBSERVATION = st.tuples(st.sampled_from(KEYS), NUMBERS, NUMBERS, TIMES)
Row = tuple[bytes, float, float, int]
SOME_KEYS = st.lists(st.sampled_from(KEYS), max_size=6)


class EngineMachine(RuleBasedStateMachine):
    """Both engines are told the same; `agree` compares them after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.engine, self.reference = self.made()
        self.written = 0  # messages in the log

    def made(self) -> tuple[Double, Engine, DictEngine]:
        model = Double()
        return model, Engine(model), DictEngine(Double())

    @rule(rows=st.lists(OBSERVATION, max_size=12))
    def advance(self, rows: list[Row]) -> None:
        keys, x, times = self._arrays(rows)
        offsets = self._places(len(rows))
        out = self.engine.advance(keys, x, times, offsets)
        expected = self.reference.advance(keys, x, times.tolist(), offsets.tolist())
        for row, (outputs, *told) in enumerate(expected):
            fields = (out.rejected, out.step, out.previous_time, out.bridged, out.reset, out.dirtied)
            assert [field[row] for field in fields] == told
            rejected = told[0]
            if rejected:
                assert np.isnan(out["y"][row]).all()
            else:
                assert {n: v[row].tobytes() for n, v in out.outputs.items()} == {
                    n: v.tobytes() for n, v in outputs.items()
                }

    @rule(rows=st.lists(OBSERVATION, min_size=1, max_size=12), at=st.integers(1, 5))
    def advance_and_fail(self, rows: list[Row], at: int) -> None:
        keys, x, times = self._arrays(rows)
        times_of_each = [keys.count(key) for key in set(keys)]
        runs = sum(-(-sum(n > wave for n in times_of_each) // waves.ROWS_PER_RUN) for wave in range(max(times_of_each)))
        self.model.calls, self.model.fails_at = 0, min(at, runs)
        with pytest.raises(RuntimeError):
            self.engine.advance(keys, x, times, self._places(len(rows)))
        self.model.fails_at = None

    @rule(keys=SOME_KEYS)
    def drop(self, keys: list[bytes]) -> None:
        self.engine.drop(keys)
        self.reference.drop(keys)

    @rule(keys=SOME_KEYS)
    def clean(self, keys: list[bytes]) -> None:
        known = [key for key in keys if key in self.reference.streams]
        self.engine.clean(known)
        self.reference.clean(known)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4, unique=True))
    def end(self, keys: list[bytes]) -> None:
        offsets = self._places(len(keys))
        assert self.engine.end(keys, offsets).tolist() == self.reference.end(keys, offsets.tolist())

    @rule(source=st.sampled_from(KEYS), copies=st.sets(st.sampled_from(KEYS), max_size=4), clean=st.booleans())
    def write(self, source: bytes, copies: set[bytes], clean: bool) -> None:
        if source not in self.reference.streams:
            return
        self.engine.write(sorted(copies), self.engine.read([source] * len(copies)), clean=clean)
        copied = self.reference.streams[source].copy()
        copied.dirty = None if clean else copied.offset
        for key in copies:
            self.reference.streams[key] = copied.copy()

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
        held, first = self.engine.read(keys), self.engine.first_dirty(keys).tolist()
        for i, key in enumerate(keys):
            dirty = None if first[i] == engine.CLEAN else first[i]
            bits = ([v[i].tobytes() for v in held.states], held.step[i], held.time[i], held.offset[i], dirty)
            assert bits == self.reference.streams[key].bits()
        assert sorted(self.engine.dirty()) == [key for key in keys if self.reference.streams[key].dirty is not None]

    @staticmethod
    def _arrays(rows: list[Row]) -> tuple[list[bytes], Any, Any]:
        x = np.array([row[1:3] for row in rows], np.float32).reshape(len(rows), 2)  # [N, 2]
        return [row[0] for row in rows], x, np.array([row[3] for row in rows], np.int64)

    def _places(self, count: int) -> Any:
        """The next offsets of the log."""
        self.written += count
        return np.arange(self.written - count, self.written)  # [count]


class SilenceMachine(EngineMachine):
    """The same where streams are silent: short gaps are bridged, longer ones reset, and long silence ends a stream."""

    PLAN = ((1, "hold"), (6, "bridge"), (40, "reset"), (None, "hold"))

    def made(self) -> tuple[Double, Engine, DictEngine]:
        model = Serene()
        silence = Silence(2.0, self.PLAN, 150.0)
        return model, Engine(model, silence=silence), DictEngine(Serene(), 2, self.PLAN, 150)

    @rule()
    def advance_and_fail(self) -> None:  # how many runs a call takes hangs on what is bridged
        self.engine.rollback()
        self.reference.rollback()


@pytest.mark.parametrize("machine", [EngineMachine, SilenceMachine])
def test_any_history_of_calls_gives_what_the_dict_gives(
    machine: type[EngineMachine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, records, dirtiness and keys agree after every call; tables grow from two rows, runs hold three at most."""
    monkeypatch.setattr(state, "FIRST_ROWS", 2)
    monkeypatch.setattr(waves, "ROWS_PER_RUN", 3)
    run_state_machine_as_test(machine, settings=settings(max_examples=150, stateful_step_count=30))
