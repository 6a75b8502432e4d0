"""The engine: streams advance in order, in batches that do not matter, and nothing is final before a commit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from statestep.consumers.bench_model import lstm_step
from statestep.runtime import NO_TIME, Advanced, CapacityError, Engine, Model, StepModel, state

from ..models import detector, pump, smoother, smoother_contract, stamped
from .doubles import Double
from .reference import Array, DictEngine, lstm_sequence

KEYS = [b"pump-%d" % number for number in range(9)]


def drawn(seed: int, rows: int) -> tuple[list[bytes], Array, Array]:
    """Keys with many repeats, x [rows, 2] and times [rows] in no order."""
    rng = np.random.default_rng(seed)
    keys = [KEYS[i] for i in rng.integers(0, len(KEYS), rows)]
    return keys, rng.normal(0, 3, (rows, 2)).astype(np.float32), rng.integers(0, 10**12, rows)


def bits(engine: Engine) -> dict[bytes, tuple[bytes, ...]]:
    """Every record of an engine, so that equal means equal bit for bit."""
    keys = sorted(engine.keys())
    held, dirty = engine.read(keys), set(engine.dirty())
    columns = [*held.states, held.step, held.time, np.array([key in dirty for key in keys], bool)]
    return {key: tuple(column[i].tobytes() for column in columns) for i, key in enumerate(keys)}


def rows_of(out: Advanced) -> list[tuple[bytes, ...]]:
    """What a call gave, a row at a time, as bytes."""
    columns = [*out.outputs.values(), out.rejected, out.step, out.previous_time]
    return [tuple(column[i].tobytes() for column in columns) for i in range(len(out.step))]


@pytest.fixture(params=["double", "detector"])
def make_model(request: pytest.FixtureRequest) -> Callable[[], Model]:
    """A model in numpy, and a real one with states of three dtypes and two batch axes."""
    return Double if request.param == "double" else pump


@pytest.mark.parametrize(("features", "hidden", "layers"), [(1, 1, 1), (3, 8, 1), (8, 64, 1), (5, 16, 2)])
def test_a_stream_gives_what_the_equations_of_an_lstm_give(features: int, hidden: int, layers: int) -> None:
    """Stepped through the engine, each of three interleaved streams is within 1e-6 of a plain numpy LSTM."""
    data = lstm_step(features, hidden, layers, seed=hidden)
    x = np.random.default_rng(1).standard_normal((40, 3, features)).astype(np.float32)  # [T, S, F]
    engine = Engine(StepModel(data))
    out = engine.advance([b"a", b"b", b"c"] * 40, x.reshape(120, features))
    predicted = out.prediction.reshape(40, 3, features)
    for stream in range(3):
        np.testing.assert_allclose(predicted[:, stream], lstm_sequence(data, x[:, stream], layers), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_call_equals_its_rows_one_by_one(make_model: Callable[[], Model], seed: int) -> None:
    """Whatever repeats in a call, outputs, steps and records have the bits of stepping row by row."""
    keys, x, times = drawn(seed, 200)
    engine, reference = Engine(make_model()), DictEngine(make_model())
    out = engine.advance(keys, x, times)
    one_by_one = reference.advance(keys, x, times.tolist())
    for row, (outputs, rejected, step, previous) in zip(rows_of(out), one_by_one, strict=True):
        expected = [*outputs.values(), np.array(rejected), np.array(step), np.array(previous)]
        assert row == tuple(value.tobytes() for value in expected)
    assert out.waves == max(keys.count(key) for key in KEYS)
    assert {key: stream.step for key, stream in reference.streams.items()} == dict(
        zip(engine.keys(), engine.read(engine.keys()).step.tolist(), strict=True)
    )


@pytest.mark.parametrize("seed", range(5))
def test_it_does_not_matter_how_a_sequence_is_cut_into_calls(make_model: Callable[[], Model], seed: int) -> None:
    """One call, random calls, with commits or without: the same rows and the same records, bit for bit."""
    keys, x, times = drawn(seed, 150)
    whole = Engine(make_model())
    expected = rows_of(whole.advance(keys, x, times))
    rng, cut, found = np.random.default_rng(seed), Engine(make_model()), []
    edges = [0, *np.sort(rng.integers(0, 150, 20)).tolist(), 150]  # an empty call here and there
    for begin, end in pairwise(edges):
        found += rows_of(cut.advance(keys[begin:end], x[begin:end], times[begin:end]))
        if rng.random() < 0.5:
            cut.commit()
    assert found == expected
    assert bits(cut) == bits(whole)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_different_streams_in_a_call_does_not_matter(seed: int) -> None:
    """Rows shuffled so that each stream keeps its own order give each row the bits that it had."""
    keys, x, times = drawn(seed, 150)
    plain, shuffled = Engine(pump()), Engine(pump())
    expected = rows_of(plain.advance(keys, x, times))
    rank = np.random.default_rng(seed).permutation(len(KEYS))
    order = sorted(range(150), key=lambda row: rank[KEYS.index(keys[row])])  # stable: a stream after the other
    out = shuffled.advance([keys[row] for row in order], x[order], times[order])
    assert rows_of(out) == [expected[row] for row in order]
    assert bits(shuffled) == bits(plain)


def test_time_is_the_greatest_that_the_stream_has_seen() -> None:
    """A late row does not turn a stream's time back; each row tells the greatest time before it."""
    engine = Engine(Double())
    out = engine.advance([b"a"] * 4, np.zeros((4, 2), np.float32), np.array([5, 9, 7, 8]))
    assert out.previous_time.tolist() == [NO_TIME, 5, 9, 9]
    assert engine.read([b"a"]).time.tolist() == [9]
    out = engine.advance([b"a", b"b"], np.zeros((2, 2), np.float32))  # without times
    assert out.previous_time.tolist() == [9, NO_TIME]
    assert engine.read([b"a", b"b"]).time.tolist() == [9, NO_TIME]


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


@pytest.mark.parametrize("fails_at", [1, 2, 3])
@pytest.mark.parametrize("then", ["commit", "rollback", "again"])
def test_an_exception_in_the_midst_of_a_call_changes_nothing(fails_at: int, then: str) -> None:
    """A model that raises at the k-th wave leaves the records as they were, those of before the commit included."""
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


@pytest.mark.parametrize("bad", [np.inf, -np.inf, 3e38])
def test_a_row_without_a_finite_result_changes_nothing(bad: float) -> None:
    """It is rejected with blank outputs; its stream goes on from what it had; its batch-mates have their usual bits."""
    model = pump()
    x = np.array([[1, 2], [3, 4], [5, bad], [7, 8], [9, 1]], np.float32)
    keys, times = [b"a", b"b", b"a", b"a", b"b"], np.arange(5) + 1
    engine, clean = Engine(model), Engine(model)
    engine.advance([b"a", b"b", b"c"], np.ones((3, 2), np.float32), np.zeros(3, np.int64))
    clean.advance([b"a", b"b", b"c"], np.ones((3, 2), np.float32), np.zeros(3, np.int64))
    out = engine.advance(keys, x, times)
    kept = [0, 1, 3, 4]
    expected = clean.advance([keys[i] for i in kept], x[kept], times[kept])
    assert out.rejected.tolist() == [False, False, True, False, False]
    assert [rows_of(out)[i] for i in kept] == rows_of(expected)
    assert bits(engine) == bits(clean)
    assert np.isnan(out.prediction[2]).all()
    assert np.isnan(out["score"][2])
    assert out["anomaly"][2] == np.False_
    assert out.step.tolist() == [2, 2, 2, 3, 3]


def test_a_call_of_rejected_rows_alone_changes_nothing() -> None:
    """Known streams keep their record, cleanness included; unknown ones are not begun, and take no place."""
    engine = Engine(Double(), max_streams=3)
    engine.advance([b"a"], np.ones((1, 2), np.float32), np.array([1]))
    engine.clean([b"a"])
    engine.commit()
    before = bits(engine)
    for _ in range(3):
        out = engine.advance([b"a", b"b", b"c"], np.full((3, 2), np.nan, np.float32), np.array([5, 6, 7]))
        assert out.rejected.all()
        assert out.step.tolist() == [1, 0, 0]
        assert bits(engine) == before
        engine.commit()
    assert len(engine) == 1
    assert engine.dirty() == []


def test_a_stream_begins_with_its_first_good_row() -> None:
    """Of a new stream whose first row is rejected, the second is the first timestep; rollback forgets it whole."""
    engine = Engine(Double())
    x = np.array([[np.nan, 0], [1, 1], [np.inf, 0]], np.float32)
    out = engine.advance([b"a", b"a", b"b"], x, np.array([9, 4, 5]))
    assert out.step.tolist() == [0, 1, 0]
    assert engine.keys() == [b"a"]
    assert engine.read([b"a"]).time.tolist() == [4]
    engine.rollback()
    assert engine.keys() == []


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


@pytest.mark.parametrize(
    ("keys", "x", "times", "kind", "sentence"),
    [
        ([b"a"], np.zeros((1, 2)), None, TypeError, "x must be an array of float32, it is float64"),
        ([b"a"], np.zeros((1, 2), ">f4"), None, TypeError, "it is >f4"),
        ([b"a"], [[0.0, 0.0]], None, TypeError, "it is list"),
        ([b"a"], np.zeros((1, 3), np.float32), None, ValueError, r"need \[1, 2\]"),
        ([b"a"], np.zeros(2, np.float32), None, ValueError, r"x has shape \[2\]"),
        ([b"a", b"b"], np.zeros((1, 2), np.float32), None, ValueError, r"2 keys of 2 features need \[2, 2\]"),
        ([], np.zeros((1, 2), np.float32), None, ValueError, r"need \[0, 2\]"),
        (b"ab", np.zeros((2, 2), np.float32), None, TypeError, "it is the one key b'ab'"),
        (["a"], np.zeros((1, 2), np.float32), None, TypeError, "must be bytes"),
        ([b"a"], np.zeros((1, 2), np.float32), np.zeros(1), TypeError, "times must be an array of int64"),
        ([b"a"], np.zeros((1, 2), np.float32), [0], TypeError, "it is list"),
        ([b"a"], np.zeros((1, 2), np.float32), np.zeros(2, np.int64), ValueError, r"1 keys need \[1\]"),
    ],
)
def test_arrays_of_another_kind_are_refused(
    keys: list[bytes], x: Array, times: Array | None, kind: type[Exception], sentence: str
) -> None:
    """Another dtype or shape is told by name, and no stream is born of it."""
    engine = Engine(Double())
    with pytest.raises(kind, match=sentence):
        engine.advance(keys, x, times)
    assert len(engine) == 0


def test_an_empty_call_gives_empty_arrays_of_the_usual_shapes() -> None:
    """No rows in, no rows out, with the columns and dtypes that a row would have."""
    engine = Engine(pump())
    out = engine.advance([], np.zeros((0, 2), np.float32), np.zeros(0, np.int64))
    assert out.prediction.shape == (0, 2)
    assert {name: value.shape for name, value in out.outputs.items()} == {
        "prediction": (0, 2),
        "expected": (0, 2),
        "score": (0,),
        "threshold": (0,),
        "anomaly": (0,),
    }
    assert out["anomaly"].dtype == bool
    assert [len(a) for a in (out.rejected, out.step, out.previous_time, out.slots)] == [0, 0, 0, 0]
    assert out.waves == 0
    assert len(engine) == 0


@pytest.mark.parametrize("repeats", [1, 2])
def test_results_are_the_callers_own(repeats: int) -> None:
    """Writing into every array that a call gave, or that it was given, changes neither records nor a rollback."""
    engine = Engine(pump())
    keys = KEYS * repeats
    x = np.ones((len(keys), 2), np.float32)
    times = np.arange(len(keys))
    engine.advance(keys, x, times)
    engine.commit()
    before = bits(engine)
    out = engine.advance(keys, x, times)
    after = bits(engine)
    for array in (*out.outputs.values(), out.rejected, out.step, out.previous_time, out.slots, x, times):
        array[...] = np.zeros((), array.dtype)
    held = engine.read(KEYS)
    for array in (*held.states, held.step, held.time):
        array[...] = np.zeros((), array.dtype)
    assert bits(engine) == after
    engine.rollback()
    assert bits(engine) == before


def test_roles_find_outputs_and_a_model_without_a_prediction_says_so() -> None:
    """`prediction` is the output with that role; where none has it, the KeyError lists what there is."""
    out = Engine(pump()).advance([b"a"], np.ones((1, 2), np.float32))
    assert out.prediction is out["prediction"]
    assert out.role("flags") is None
    bare = StepModel(smoother().SerializeToString())
    with pytest.raises(KeyError, match="it has \\['y'\\]"):
        _ = Engine(bare).advance([b"a"], np.ones((1, 2), np.float32)).prediction


@pytest.mark.parametrize("name", ["step", "time", "dirty"])
def test_a_state_may_be_called_like_a_column_of_the_engine(name: str) -> None:
    """The engine's own columns are not the model's states, whatever these are called."""
    contract = smoother_contract(name, f"next_{name}")
    engine = Engine(StepModel(stamped(smoother(name, f"next_{name}"), contract)))
    out = engine.advance([b"a", b"a"], np.ones((2, 2), np.float32), np.array([3, 4]))
    assert out.prediction.tolist() == [[1, 1], [1.5, 1.5]]
    held = engine.read([b"a"])
    assert held.states[0].tolist() == [[1.5, 1.5]]
    assert (held.step.tolist(), held.time.tolist()) == ([2], [4])
    assert engine.dirty() == [b"a"]


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


def test_two_models_of_one_file_have_one_fingerprint() -> None:
    """The fingerprint is the SHA-256 of the bytes, and nothing else."""
    data = detector()
    assert StepModel(data).fingerprint == StepModel(data, name="other").fingerprint == hashlib.sha256(data).hexdigest()
