"""The engine: streams advance in order, in batches that do not matter; what is not finite changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from statestep.consumers.bench_model import lstm_step
from statestep.runtime import NO_TIME, Engine, Model, StepModel, waves

from ..models import pump, smoother, smoother_contract, stamped
from .doubles import Double
from .histories import KEYS, bits, drawn, rows_of
from .reference import Array, DictEngine, lstm_sequence


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
    offsets = np.arange(200) + 7
    out = engine.advance(keys, x, times, offsets)
    one_by_one = reference.advance(keys, x, times.tolist(), offsets.tolist())
    for row, (outputs, *told) in zip(rows_of(out), one_by_one, strict=True):
        expected = [*outputs.values(), *map(np.array, told)]
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


@pytest.mark.parametrize("rows_per_run", [1, 4, 1024])
@pytest.mark.parametrize("streams", [1, 8, 9, 50])
def test_it_does_not_matter_how_many_rows_a_run_holds(
    monkeypatch: pytest.MonkeyPatch, rows_per_run: int, streams: int
) -> None:
    """A wave is cut into runs that are small enough, of the same bits; waves and runs are counted apart."""
    keys = [b"%d" % number for number in range(streams)] + [b"0"] * 3
    x = np.random.default_rng(0).normal(size=(len(keys), 2)).astype(np.float32)
    whole = Engine(pump())
    expected = rows_of(whole.advance(keys, x))
    monkeypatch.setattr(waves, "ROWS_PER_RUN", rows_per_run)
    cut = Engine(pump())
    out = cut.advance(keys, x)
    assert rows_of(out) == expected
    assert bits(cut) == bits(whole)
    assert (out.waves, out.runs) == (4, -(-streams // rows_per_run) + 3)
    distinct = Engine(pump()).advance(keys[:streams], x[:streams])
    assert rows_of(distinct) == expected[:streams]
    assert (distinct.waves, distinct.runs) == (1, -(-streams // rows_per_run))


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


def test_a_stream_that_is_not_begun_leaves_its_place_to_the_next_call() -> None:
    """Before a commit too, since nothing must come back there. Rollback and commit leave no trace of it."""
    bad, good = np.full((1, 2), np.nan, np.float32), np.ones((1, 2), np.float32)
    engine = Engine(Double(), max_streams=2)
    engine.advance([b"a"], good)
    engine.commit()
    before = bits(engine)
    for end in (engine.rollback, engine.commit):
        for key in (b"b", b"c", b"d"):
            engine.advance([key], bad)
        engine.advance([b"c"], good)
        engine.advance([b"a"], good)
        end()
        assert engine.keys() == ([b"a"] if end == engine.rollback else [b"a", b"c"])
        assert end == engine.commit or bits(engine) == before
    engine.drop([b"a", b"c"])
    engine.commit()
    engine.advance([b"d", b"e"], np.ones((2, 2), np.float32))  # no place was lost, none is there twice
    assert len(set(engine.table.slots([b"d", b"e"]).tolist())) == 2


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
