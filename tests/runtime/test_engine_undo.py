"""Nothing is final before a commit: rollback, drops, records written, and calls that fail half-way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from statestep.runtime import CLEAN, NO_TIME, CapacityError, Engine, state, waves

from ..models import pump
from .doubles import Double
from .histories import KEYS, bits, drawn, rows_of


def test_rollback_undoes_everything_since_the_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps, births, drops, writes and cleanings, with the table doubled meanwhile: the records have their old bits."""
    monkeypatch.setattr(state, "FIRST_ROWS", 2)
    engine = Engine(pump())
    x = np.ones((4, 2), np.float32)
    engine.advance(KEYS[:4], x, np.arange(4))
    engine.clean([KEYS[0]])
    engine.commit()
    before = bits(engine)
    engine.advance([KEYS[0], KEYS[0], KEYS[5], KEYS[6]], x, np.arange(4) + 100)  # two births, a growth
    engine.write([KEYS[1], KEYS[7]], engine.read([KEYS[0], KEYS[5]]))
    engine.drop([KEYS[2], KEYS[0]])
    engine.advance([KEYS[2], KEYS[8], KEYS[4]], x[:3])  # one of them was dropped: it starts anew
    engine.clean([KEYS[3], KEYS[8]])
    engine.drop([KEYS[4], b"never seen"])
    assert bits(engine) != before
    engine.rollback()
    assert bits(engine) == before
    engine.rollback()
    assert bits(engine) == before


def test_rollback_works_again_and_again() -> None:
    """However often what followed a commit is taken back, the next rollback comes back to the same bits."""
    keys, x, times = drawn(5, 60)
    engine = Engine(pump())
    engine.advance(keys[:20], x[:20], times[:20])
    engine.commit()
    before = bits(engine)
    for begin in (0, 10, 20, 0, 40):
        engine.advance(keys[begin : begin + 20], x[begin : begin + 20])
        engine.rollback()
        assert bits(engine) == before
    engine.advance(keys[:20], x[:20])
    engine.commit()
    after = bits(engine)
    engine.advance(keys, x)
    engine.rollback()
    assert bits(engine) == after != before


def test_commit_makes_it_final() -> None:
    """After a commit a rollback changes nothing, and a second commit neither."""
    engine = Engine(pump())
    keys, x, times = drawn(0, 40)
    engine.advance(keys, x, times)
    engine.drop([KEYS[0]])
    engine.commit()
    after = bits(engine)
    engine.rollback()
    engine.commit()
    engine.rollback()
    assert bits(engine) == after


def test_a_dropped_stream_starts_anew() -> None:
    """Its next observation finds the initial state, before and after the commit, in a slot used before or not."""
    x = np.array([[3.0, 4.0]], np.float32)
    first = rows_of(Engine(pump()).advance([b"a"], x))
    engine = Engine(pump(), max_streams=2)
    for commit in (False, True, True, True):
        assert rows_of(engine.advance([b"a"], x)) == first
        engine.advance([b"a"], 2 * x)
        engine.drop([b"a"])
        assert engine.keys() == []
        assert rows_of(engine.advance([b"a"], x)) == first
        engine.drop([b"a"])
        if commit:
            engine.commit()
        else:
            engine.rollback()
    assert engine.keys() == []


def test_slots_come_free_at_the_commit_and_not_before() -> None:
    """A table of two takes thousands of streams one after the other, if each is dropped and that is committed."""
    engine = Engine(Double(), max_streams=2)
    x = np.zeros((1, 2), np.float32)
    for number in range(2000):
        engine.advance([b"%d" % number], x)
        engine.drop([b"%d" % number])
        engine.commit()
    engine.advance([b"a", b"b"], np.zeros((2, 2), np.float32))
    engine.commit()
    engine.drop([b"a"])
    with pytest.raises(CapacityError):
        engine.advance([b"c"], x)  # a rollback would want the place of a again
    engine.commit()
    engine.advance([b"c"], x)
    assert sorted(engine.keys()) == [b"b", b"c"]


@pytest.mark.parametrize(("rows_per_run", "fails_at"), [(1024, 1), (1024, 2), (1024, 3), (2, 2), (2, 4), (1, 3)])
@pytest.mark.parametrize("then", ["commit", "rollback", "again"])
def test_an_exception_in_the_midst_of_a_call_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, rows_per_run: int, fails_at: int, then: str
) -> None:
    """A model that raises at the k-th run leaves the records as they were, those of before the commit included."""
    monkeypatch.setattr(waves, "ROWS_PER_RUN", rows_per_run)
    model = Double()
    engine = Engine(model)
    engine.advance([b"a", b"b"], np.ones((2, 2), np.float32), np.array([1, 2]))
    engine.commit()
    committed = bits(engine)
    engine.advance([b"a", b"c"], np.ones((2, 2), np.float32), np.array([3, 4]))  # not committed
    before = bits(engine)
    keys, x, times = [b"a", b"d", b"a", b"b", b"a"], np.full((5, 2), 2, np.float32), np.arange(5) + 10
    model.calls, model.fails_at = 0, fails_at
    with pytest.raises(RuntimeError, match=f"call {fails_at} fails"):
        engine.advance(keys, x, times)
    assert bits(engine) == before
    if then == "commit":
        engine.commit()
        engine.rollback()
        assert bits(engine) == before
    elif then == "rollback":
        engine.rollback()
        assert bits(engine) == committed
    else:
        engine.advance(keys, x, times)
        untroubled = Engine(Double())
        for call in (([b"a", b"b"], [1, 2]), ([b"a", b"c"], [3, 4])):
            untroubled.advance(call[0], np.ones((2, 2), np.float32), np.array(call[1]))
        untroubled.advance(keys, x, times)
        assert bits(engine) == bits(untroubled)
        engine.rollback()
        assert bits(engine) == committed


def test_too_many_streams_are_refused_before_anything_changes() -> None:
    """The call that brings one stream too many advances none of its rows; the sentence names the limit."""
    engine = Engine(pump(), max_streams=3)
    x = np.ones((4, 2), np.float32)
    engine.advance([b"a", b"b"], x[:2])
    before = bits(engine)
    with pytest.raises(CapacityError, match="2 new streams and room for 1: max_streams is 3"):
        engine.advance([b"a", b"c", b"d", b"c"], x)
    assert bits(engine) == before
    with pytest.raises(CapacityError):
        engine.write([b"c", b"d"], engine.read([b"a", b"b"]))
    assert bits(engine) == before
    engine.advance([b"a", b"c", b"b", b"c"], x)
    assert len(engine) == 3


@pytest.mark.parametrize("capacity", [0, -1])
def test_an_engine_holds_at_least_one_stream(capacity: int) -> None:
    """A table without room is refused when it is made."""
    with pytest.raises(ValueError, match=f"at least one stream, max_streams is {capacity}"):
        Engine(Double(), max_streams=capacity)


class TestRecords:
    """`read`, `write`, `drop`, `dirty` and `clean`: what snapshots, spilling and revocation will stand on."""

    def test_a_written_stream_goes_on_as_the_one_that_was_read(self) -> None:
        """Records copied to another engine give the same bits from there on."""
        keys, x, times = drawn(3, 60)
        here, there = Engine(pump()), Engine(pump())
        here.advance(keys, x, times)
        there.write(here.keys(), here.read(here.keys()))
        assert rows_of(there.advance(keys, x, times)) == rows_of(here.advance(keys, x, times))

    def test_what_is_advanced_or_written_is_dirty_until_it_is_called_clean(self) -> None:
        """A clean stream is dirty again with its next step."""
        engine = Engine(Double())
        engine.advance([b"a", b"b"], np.ones((2, 2), np.float32))
        engine.write([b"c"], engine.read([b"a"]))
        assert engine.dirty() == [b"a", b"b", b"c"]
        engine.clean([b"a", b"c", b"a"])
        assert engine.dirty() == [b"b"]
        engine.commit()
        assert engine.dirty() == [b"b"]
        engine.advance([b"a"], np.ones((1, 2), np.float32))
        assert engine.dirty() == [b"a", b"b"]
        engine.rollback()
        assert engine.dirty() == [b"b"]

    def test_a_stream_that_is_not_there_is_named(self) -> None:
        """`read` and `clean` raise KeyError for it and change nothing; `drop` passes it by."""
        engine = Engine(Double())
        engine.advance([b"a"], np.ones((1, 2), np.float32))
        with pytest.raises(KeyError, match="pump-9"):
            engine.read([b"a", b"pump-9"])
        with pytest.raises(KeyError, match="pump-9"):
            engine.clean([b"a", b"pump-9"])
        engine.drop([b"pump-9"])
        assert engine.dirty() == [b"a"]

    def test_no_stream_at_all_is_fine(self) -> None:
        """Empty lists of keys read, write, clean and drop nothing."""
        engine = Engine(Double())
        held = engine.read([])
        assert [value.shape for value in held.states] == [(0, 2), (0,), (0, 1)]
        engine.write([], held)
        engine.clean([])
        engine.drop([])
        assert engine.keys() == []

    @pytest.mark.parametrize(
        ("change", "sentence"),
        [
            ({"step": np.zeros(1, np.int32)}, "'step' is int32"),
            ({"time": np.zeros(2, np.int64)}, r"'time' is int64 \[2\], it must be int64 \[1\]"),
            ({"states": [np.zeros((1, 2))]}, "shorter|'state level' is float64"),
        ],
    )
    def test_records_of_another_kind_are_refused(self, change: dict[str, Any], sentence: str) -> None:
        """The column is named, and no stream is born."""
        engine, donor = Engine(Double()), Engine(Double())
        donor.advance([b"a"], np.ones((1, 2), np.float32))
        with pytest.raises(ValueError, match=sentence):
            engine.write([b"a"], replace(donor.read([b"a"]), **change))
        assert len(engine) == 0

    def test_a_doubled_key_is_refused(self) -> None:
        """Of two records for one stream neither is the right one."""
        engine = Engine(Double())
        engine.advance([b"a", b"b"], np.ones((2, 2), np.float32))
        with pytest.raises(ValueError, match="a key is doubled"):
            engine.write([b"c", b"c"], engine.read([b"a", b"b"]))
        assert engine.keys() == [b"a", b"b"]


class TestEnds:
    """`end`: what a tombstone does, until that too is durable."""

    def test_an_ended_stream_stays_until_it_is_called_clean(self) -> None:
        """With the initial values and step 0, at the tombstone's place; called clean, it is gone."""
        engine = Engine(pump())
        x = np.array([[3.0, 4.0]], np.float32)
        first = rows_of(engine.advance([b"a"], x, offsets=np.array([5])))
        assert engine.end([b"a", b"nobody"], np.array([6, 7])).tolist() == [False, False]
        held = engine.read([b"a"])
        assert [v[0].tobytes() for v in held.states] == [v.tobytes() for v in engine.model.initial_states()]
        assert (held.step[0], held.time[0], held.offset[0]) == (0, NO_TIME, 6)
        assert engine.first_dirty([b"a"]).tolist() == [5]
        again = rows_of(engine.advance([b"a"], x, offsets=np.array([8])))
        assert [row[:-1] for row in again] == [row[:-1] for row in first]  # but it was dirty already
        engine.end([b"a"], np.array([9]))
        engine.clean([b"a"])
        assert engine.keys() == []
        engine.rollback()
        assert engine.keys() == []

    def test_a_clean_stream_becomes_dirty_by_its_end(self) -> None:
        """From the tombstone's place on, and that is told; a rollback makes it alive and clean again."""
        engine = Engine(pump())
        engine.advance([b"a"], np.ones((1, 2), np.float32), offsets=np.array([5]))
        engine.clean([b"a"])
        engine.commit()
        before = bits(engine)
        assert engine.end([b"a"], np.array([6])).tolist() == [True]
        assert engine.first_dirty([b"a"]).tolist() == [6]
        engine.clean([b"a"])
        assert engine.keys() == []
        engine.rollback()
        assert bits(engine) == before
        assert engine.dirty() == []

    def test_an_end_that_was_called_clean_is_taken_back_with_the_rest(self) -> None:
        """A commit between: the rollback comes back to an ended stream that is still dirty."""
        engine = Engine(pump())
        engine.advance([b"a"], np.ones((1, 2), np.float32), offsets=np.array([5]))
        engine.end([b"a"], np.array([6]))
        engine.commit()
        before = bits(engine)
        engine.clean([b"a"])
        engine.advance([b"a"], np.ones((1, 2), np.float32), offsets=np.array([7]))
        engine.rollback()
        assert bits(engine) == before
        assert engine.first_dirty([b"a"]).tolist() == [5]


class TestFirstDirty:
    """Where a replay would have to begin for a stream."""

    def test_it_is_the_first_message_since_the_stream_was_clean(self) -> None:
        """Told in `dirtied` by just that row, though the stream occurs again in the call, or was rejected before."""
        engine = Engine(Double())
        x = np.array([[np.inf, 0], [1, 1], [2, 2], [3, 3]], np.float32)
        out = engine.advance([b"a", b"a", b"b", b"a"], x, offsets=np.array([3, 4, 5, 6]))
        assert out.dirtied.tolist() == [False, True, True, False]
        assert engine.first_dirty([b"a", b"b"]).tolist() == [4, 5]
        assert engine.read([b"a", b"b"]).offset.tolist() == [6, 5]
        engine.clean([b"a"])
        out = engine.advance([b"a", b"b"], x[1:3], offsets=np.array([7, 8]))
        assert out.dirtied.tolist() == [True, False]
        assert engine.first_dirty([b"a", b"b"]).tolist() == [7, 5]

    def test_what_was_read_back_is_written_clean(self) -> None:
        """And dirty from its own offset on if it is not said to be durable."""
        engine, donor = Engine(Double()), Engine(Double())
        donor.advance([b"a"], np.ones((1, 2), np.float32), offsets=np.array([9]))
        engine.write([b"a"], donor.read([b"a"]), clean=True)
        engine.write([b"b"], donor.read([b"a"]))
        assert engine.first_dirty([b"a", b"b"]).tolist() == [CLEAN, 9]
        assert engine.dirty() == [b"b"]
