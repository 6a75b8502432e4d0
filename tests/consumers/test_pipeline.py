"""The apply path: every record is accounted for, streams advance in order, and a replay changes no bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestep.consumers.batch import Batch
from statestep.consumers.checkpoint import Progress
from statestep.consumers.codec import Decoder, Encoder, Fields
from statestep.consumers.pipeline import BadMessage, Pipeline, Policy, split_key, stream_key
from statestep.consumers.ports import Message, Record
from statestep.runtime import Engine, StepModel

from ..models import pump

MODEL = pump(period_seconds=60.0)
LIVE = {partition: Progress(0, 0, 0, 0, 0) for partition in range(3)}


def pipeline(
    model: StepModel = MODEL, *, policy: Policy = "dead-letter", stream: str | None = None, max_streams: int = 100
) -> Pipeline:
    decoder = Decoder(model.contract, Fields(stream=stream))
    return Pipeline(
        Engine(model, max_streams), decoder, Encoder(model.contract, model.fingerprint, "sensors"), policy=policy
    )


def reading(flow: float, pressure: float = 1.0, ts: float | None = None) -> bytes:
    return json.dumps({"flow": flow, "pressure": pressure} | ({} if ts is None else {"ts": ts})).encode()


def log(*values: bytes | None, keys: Sequence[bytes | None] = (b"k",), partition: int = 0) -> list[Record]:
    """Records of one partition, offsets from 0, keys in turn."""
    return [Record(partition, i, -1, keys[i % len(keys)], value) for i, value in enumerate(values)]


def apply(
    pipe: Pipeline, records: Sequence[Record], progress: dict[int, Progress] | None = None
) -> tuple[Batch, list[Message]]:
    batch = pipe.advance(records, pipe.decode(records), progress or LIVE)
    return batch, pipe.encode(batch)


def replaying(next_: int, records: Sequence[Record], partition: int) -> Progress:
    """Messages below `next_` were answered before, as far as there are any."""
    owed = sum(record.partition == partition and record.offset < next_ for record in records)
    return Progress(0, next_ if owed else 0, 0, 0, 0, owed=owed)


def documents(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [json.loads(message.value) for message in messages if not message.dead and message.value is not None]


GOOD = st.tuples(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32)).map(lambda xy: reading(*xy))
BAD = st.sampled_from([b"", b"{", b"[1]", b'{"flow": 1}', b"[1, 1e39]", b"[NaN, 1]", reading(3e38), b'["1", 2]'])
VALUES = st.one_of(GOOD, GOOD, GOOD, BAD, st.none())
RECORDS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from([b"a", b"b", b"c", None, b""]), VALUES), max_size=40
).map(lambda rows: numbered(rows))


def numbered(rows: Sequence[tuple[int, bytes | None, bytes | None]]) -> list[Record]:
    """Records with the next offset of their partition."""
    offsets: Counter[int] = Counter()
    records = []
    for partition, key, value in rows:
        records.append(Record(partition, offsets[partition], -1, key, value))
        offsets[partition] += 1
    return records


@given(RECORDS, st.lists(st.integers(0, 8), min_size=3, max_size=3))
def test_every_record_is_accounted_for(records: list[Record], resume: list[int]) -> None:
    """Consumed = predicted + refused + tombstones + replayed, message by message, and progress is the last offset."""
    progress = {partition: replaying(at, records, partition) for partition, at in enumerate(resume)}
    batch, messages = apply(pipeline(), records, progress)
    tally = batch.tally
    assert sum(tally.consumed.values()) == len(records)
    assert tally.consumed == Counter(record.partition for record in records)
    assert len(records) == tally.predicted + sum(tally.refused.values()) + tally.tombstones + tally.replayed
    assert len(documents(messages)) == tally.predicted
    assert sum(message.dead for message in messages) == sum(tally.refused.values())
    answered = Counter(
        (int(headers.get("statestep.source.partition") or headers["__streams.errors.partition"]),
         int(headers.get("statestep.source.offset") or headers["__streams.errors.offset"]))
        for headers in (dict(message.headers) for message in messages)
    )  # fmt: skip
    assert answered == Counter((r.partition, r.offset) for r in records if r.offset >= resume[r.partition])
    for partition, where in batch.progress.items():
        assert where.position == max(tally.consumed[partition], progress[partition].next)


@given(RECORDS, st.integers(1, 7))
def test_outputs_do_not_depend_on_how_records_are_cut_into_batches(records: list[Record], size: int) -> None:
    """One batch, or many: each stream's outputs are the same bytes in the same order, and so are all dead letters."""

    def by_stream(messages: Sequence[Message]) -> dict[tuple[bool, int, bytes | None], list[Message]]:
        found: dict[tuple[bool, int, bytes | None], list[Message]] = {}
        for message in messages:
            found.setdefault((message.dead, message.partition, message.key), []).append(message)
        return found

    _, whole = apply(pipeline(), records)
    cut, progress, pieces = pipeline(), dict(LIVE), []
    for begin in range(0, len(records), size):
        batch, messages = apply(cut, records[begin : begin + size], progress)
        cut.engine.commit()
        progress |= batch.progress
        pieces += messages
    assert by_stream(pieces) == by_stream(whole)


@given(RECORDS, st.integers(0, 12))
def test_a_replay_builds_the_states_and_answers_nothing(records: list[Record], at: int) -> None:
    """What was answered before is applied in silence; what follows is answered with the bits of the first time."""
    progress = {partition: replaying(at, records, partition) for partition in range(3)}
    once, again = pipeline(), pipeline()
    _, first = apply(once, records)
    batch, second = apply(again, records, progress)
    offsets = [
        dict(m.headers).get("statestep.source.offset") or dict(m.headers)["__streams.errors.offset"] for m in first
    ]
    assert second == [message for message, offset in zip(first, offsets, strict=True) if int(offset) >= at]
    assert batch.tally.replayed == sum(record.offset < at for record in records)
    keys = sorted(once.engine.keys())
    assert sorted(again.engine.keys()) == keys
    assert batch.dirtied == apply(pipeline(), records)[0].dirtied
    held, held_again = once.engine.read(keys), again.engine.read(keys)
    assert [v.tobytes() for v in held.states] == [v.tobytes() for v in held_again.states]
    assert held.step.tolist() == held_again.step.tolist()


def test_outputs_are_what_the_engine_gives() -> None:
    """The numbers of a stream's documents are the engine's own, float32 for float32, step for step."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 2)).astype(np.float32)
    records = log(*(reading(float(a), float(b)) for a, b in x))
    _, messages = apply(pipeline(), records)
    engine = Engine(MODEL)
    for step, document in enumerate(documents(messages), 1):
        out = engine.advance([b"k"], x[step - 1 : step])
        assert document["step"] == step
        for role in ("prediction", "expected"):
            if role == "expected" and step == 1:
                assert document[role] is None
                continue
            found = np.array([document[role]["flow"], document[role]["pressure"]], np.float32)
            assert found.tobytes() == out[role][0].tobytes()
        assert np.float32(document["score"]) == out["score"][0]
        assert document["threshold"] == 2.0
        assert document["anomaly"] == bool(out["anomaly"][0])
        assert document["source"] == {"topic": "sensors", "partition": 0, "offset": step - 1}
    assert documents(messages)[0]["score"] == 0.0
    assert documents(messages)[0]["anomaly"] is False


def test_the_same_key_on_two_partitions_is_two_streams() -> None:
    """Each has its own steps and states; the engine's key tells them apart."""
    records = numbered([(0, b"k", reading(1)), (1, b"k", reading(9)), (0, b"k", reading(2)), (2, b"k", reading(1))])
    pipe = pipeline()
    _, messages = apply(pipe, records)
    assert [d["step"] for d in documents(messages)] == [1, 1, 2, 1]
    assert sorted(pipe.engine.keys()) == [b"0/k", b"1/k", b"2/k"]
    assert documents(messages)[0]["prediction"] == documents(messages)[3]["prediction"]


@given(st.integers(0, 10**6), st.binary(max_size=10))
def test_a_streams_key_is_taken_apart_again(partition: int, key: bytes) -> None:
    """Whatever bytes the key holds, slashes and digits too."""
    assert split_key(stream_key(partition, key)) == (partition, key)


def test_a_tombstone_ends_its_stream_in_the_midst_of_a_batch() -> None:
    """What came before it counts, what comes after begins anew, others go on, and it is passed on in its place."""
    rows = [(b"a", reading(1)), (b"b", reading(2)), (b"a", None), (b"b", reading(3)), (b"a", reading(1)), (b"c", None)]
    records = numbered([(0, key, value) for key, value in rows])
    pipe = pipeline()
    batch, messages = apply(pipe, records)
    assert [(m.key, m.value is None) for m in messages] == [
        (b"a", False), (b"b", False), (b"a", True), (b"b", False), (b"a", False), (b"c", True),
    ]  # fmt: skip
    found = documents(messages)
    assert [d["step"] for d in found] == [1, 1, 2, 1]
    assert found[0]["prediction"] == found[3]["prediction"]
    assert batch.tally.tombstones == 2
    assert batch.tally.predicted == 4
    pipe.engine.rollback()
    assert pipe.engine.keys() == []


def test_where_a_field_names_streams_a_null_value_is_refused() -> None:
    """The record's key is no stream then, so nothing can end by it."""
    named = [json.dumps({"flow": 1, "pressure": 2, "pump": pump_}).encode() for pump_ in ("p", "q")]
    records = log(*named, None, keys=(b"p",))
    batch, messages = apply(pipeline(stream="pump"), records)
    assert [d["stream"] for d in documents(messages)] == ["p", "q"]
    assert batch.tally.refused == Counter({"empty": 1})
    assert [m.key for m in messages] == [b"p", b"q", b"p"]  # keyed by the stream; the dead letter by its record


def test_a_result_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    """The row is a dead letter with reason non-finite; its stream goes on as if it had not come."""
    spoilt, clean = pipeline(), pipeline()
    _, messages = apply(spoilt, log(reading(1), reading(2), reading(3e38), reading(3)))
    _, expected = apply(clean, log(reading(1), reading(2), reading(3)))
    assert [d["prediction"] for d in documents(messages)] == [d["prediction"] for d in documents(expected)]
    assert [d["step"] for d in documents(messages)] == [1, 2, 3]
    dead = dict(messages[-1].headers)
    assert (dead["__streams.errors.exception"], dead["__streams.errors.offset"]) == (b"non-finite", b"2")


def test_dead_letters_come_in_the_order_of_their_offsets() -> None:
    """Found at different stages, they are sent as they came, after the outputs."""
    bad = [b"[1, 1e39]", b"{", b'{"flow": 1}', reading(3e38), b"", b"[1]"]
    _, messages = apply(pipeline(), log(reading(1), *bad, reading(2)))
    assert [message.dead for message in messages] == [False, False] + [True] * 6
    assert [int(dict(m.headers)["__streams.errors.offset"]) for m in messages[2:]] == [1, 2, 3, 4, 5, 6]


def test_the_policy_skip_counts_and_says_nothing() -> None:
    """A refused record leaves no message, and is in the tally by its reason."""
    batch, messages = apply(pipeline(policy="skip"), log(reading(1), b"{", b"[1]", reading(2)))
    assert [message.dead for message in messages] == [False, False]
    assert batch.tally.refused == Counter({"malformed": 1, "wrong-shape": 1})


@pytest.mark.parametrize("bad", [b"{", b"[1]", b'{"flow": 1}', reading(3e38)])
def test_the_policy_fail_stops_with_the_place(bad: bytes) -> None:
    """Whatever stage finds it, the sentence has partition, offset, reason and the way out; a replayed one passes."""
    pipe = pipeline(policy="fail")
    with pytest.raises(BadMessage, match=r"partition 0, offset 1: .* \(.*\); --on-bad-message dead-letter would"):
        apply(pipe, log(reading(1), bad))
    pipe.engine.rollback()
    assert pipe.engine.keys() == []
    batch, _ = apply(pipe, log(reading(1), bad, reading(2)), {0: Progress(0, 2, 0, 0, 0, owed=2)})
    assert (batch.tally.replayed, batch.tally.predicted) == (2, 1)


@pytest.mark.parametrize(
    ("times", "flags"),
    [
        ((0, 60, 120), ([], [], [])),
        ((0, 60, 59), ([], [], ["out_of_order"])),
        ((0, 60, 60), ([], [], [])),
        ((100, 40, 101), ([], ["out_of_order"], [])),  # late by the greatest time, not by the last
        ((0, 90, 180), ([], [], [])),  # 1.5 periods are no gap yet
        ((0, 90.001, 180), ([], ["gap"], [])),
        ((0, 60, None, 121), ([], [], [], [])),  # without a time there is nothing to judge
        ((None, 60, 200), ([], [], ["gap"])),
        ((0, 3600, 30), ([], ["gap"], ["out_of_order"])),
    ],
)
def test_lateness_and_gaps_are_flagged_and_counted(
    times: tuple[float | None, ...], flags: tuple[list[str], ...]
) -> None:
    """By event time against the stream's greatest, with a period of 60 s; every record is applied all the same."""
    batch, messages = apply(pipeline(), log(*(reading(1, ts=ts) for ts in times)))
    assert [d["flags"] for d in documents(messages)] == list(flags)
    counted = Counter(flag for row in flags for flag in row)
    assert (batch.tally.out_of_order, batch.tally.gaps) == (counted["out_of_order"], counted["gap"])
    assert [d["step"] for d in documents(messages)] == list(range(1, len(times) + 1))


def test_without_a_period_there_are_no_gaps() -> None:
    """A model that does not know its period judges lateness alone."""
    batch, _ = apply(pipeline(pump()), log(reading(1, ts=0), reading(1, ts=10**9), reading(1, ts=5)))
    assert (batch.tally.out_of_order, batch.tally.gaps) == (1, 0)


def test_extreme_times_are_judged_without_overflow() -> None:
    """From the first nanosecond that can be told to the last is a gap, and back is late."""
    _, messages = apply(pipeline(), log(*(reading(1, ts=ts) for ts in (-9_223_372_036, 9_223_372_036, -9_223_372_036))))
    assert [d["flags"] for d in documents(messages)] == [[], ["gap"], ["out_of_order"]]
    assert documents(messages)[0]["ts"] == "1677-09-21T00:12:44Z"


def test_outputs_without_a_role_have_a_place_of_their_own() -> None:
    """They are in the document under `outputs`, with their shape."""
    model = pump(others=True)
    _, messages = apply(pipeline(model), log(reading(1), reading(2)))
    outputs = [d["outputs"] for d in documents(messages)]
    assert [o["count"] for o in outputs] == [[1], [2]]
    assert len(outputs[0]["hidden"]) == 4
    out = Engine(model).advance([b"k"], np.array([[1, 1]], np.float32))
    assert np.array(outputs[0]["hidden"], np.float32).tobytes() == out["hidden"][0].tobytes()
    assert "outputs" not in documents(apply(pipeline(), log(reading(1)))[1])[0]


def test_the_tally_has_what_the_metrics_need() -> None:
    """Bytes, rows and waves of each call, scores of all applied rows, errors of those that had a forecast."""
    records = log(*(reading(n) for n in range(6)), keys=(b"a", b"b", b"a"))
    batch, _ = apply(pipeline(), records, {0: Progress(0, 2, 0, 0, 0, owed=2)})
    assert batch.tally.bytes == sum(len(record.value or b"") for record in records)
    assert (batch.tally.rows, batch.tally.waves) == ([6], [4])
    assert [len(slots) for slots, _ in batch.scores] == [6]
    assert len(batch.column("score")) == 4
    assert len(batch.errors) == 4 * 2  # of the four live rows none is its stream's first; two features each
    first, _ = apply(pipeline(), records)
    assert len(first.errors) == 4 * 2
    assert first.column("nothing of the kind").size == 0


def test_a_missing_value_has_no_forecast_error() -> None:
    """Under own-forecast the row is applied, and its NaN does not get into the metrics; nor does an overflow."""
    model = pump(missing="own-forecast")
    records = log(reading(1), b'{"flow": null, "pressure": 1}', b'{"pressure": 1}')
    batch, messages = apply(pipeline(model), records)
    assert batch.tally.predicted == 3
    assert len(batch.errors) == 2
    assert np.isfinite(batch.errors).all()
    assert np.isfinite(documents(messages)[2]["prediction"]["flow"])


def test_an_empty_batch_is_nothing() -> None:
    """No records, no messages, no change of progress."""
    batch, messages = apply(pipeline(), [])
    assert messages == []
    assert (batch.progress, batch.dirtied) == ({}, {})
    assert batch.errors.size == 0


def test_the_first_message_of_a_clean_stream_makes_it_dirty() -> None:
    """By partition and in order: where a replay has to begin for each; a refused message makes nothing dirty."""
    rows = [
        (b"a", b"{"),
        (b"a", reading(1)),
        (b"b", b"{"),
        (b"b", reading(2)),
        (b"a", reading(3)),
        (b"b", None),
    ]
    pipe = pipeline()
    batch, _ = apply(pipe, numbered([(1, key, value) for key, value in rows]))
    assert batch.dirtied == {1: [(1, b"1/a"), (3, b"1/b")]}
    pipe.engine.clean([b"1/a"])
    after = [(1, b"a", reading(3e38)), (1, b"a", None), (1, b"b", reading(1))]
    pipe.engine.commit()
    later = [record._replace(offset=record.offset + 6) for record in numbered(after)]
    batch, _ = apply(pipe, later, {1: Progress(0, 6, 6, 0, 0)})
    assert batch.dirtied == {1: [(7, b"1/a")]}, "b was dirty already"
    assert pipe.engine.first_dirty([b"1/a", b"1/b"]).tolist() == [7, 3]


def test_a_replay_passes_over_what_a_state_holds_already() -> None:
    """Snapshots are fuzzy: of each stream only what came after its own is applied, tombstones alike."""
    whole = log(reading(1), reading(2), reading(3), None, reading(4), reading(5), keys=(b"a",))
    once, again = pipeline(), pipeline()
    apply(once, whole[:5])
    again.engine.write(once.engine.keys(), once.engine.read(once.engine.keys()), clean=True)
    again.engine.commit()
    apply(once, whole[5:], {0: Progress(0, 5, 5, 0, 0)})
    batch, messages = apply(again, whole, {0: Progress(0, 6, 0, 0, 0, owed=6)})
    assert (messages, batch.tally.replayed) == ([], 6)
    assert batch.dirtied == {0: [(5, b"0/a")]}
    held, expected = again.engine.read([b"0/a"]), once.engine.read([b"0/a"])
    assert [v.tobytes() for v in held.states] == [v.tobytes() for v in expected.states]
    assert (held.step.tolist(), held.offset.tolist()) == ([2], [5])


def test_an_answer_that_no_broker_takes_becomes_a_dead_letter_and_at_last_a_bare_one() -> None:
    """Its stream advances all the same; the dead letter keeps the record, or, refused again, only its place."""
    records = [Record(0, i, -1, b"k", reading(i), (("trace", b"7"),)) for i in range(3)]
    plain, plain_messages = apply(pipeline(), records)
    for times, kept in ((1, True), (2, False)):
        pipe = pipeline()
        batch = pipe.advance(records, pipe.decode(records), LIVE)
        messages = pipe.encode(batch, {(0, 1): times})
        assert messages[:2] == [plain_messages[0], plain_messages[2]]
        assert messages[2].dead and len(messages) == 3
        headers = dict(messages[2].headers)
        assert headers["__streams.errors.offset"] == b"1"
        assert headers["__streams.errors.exception"] == b"undeliverable"
        assert (messages[2].value == records[1].value, "trace" in headers) == (kept, kept)
        assert (batch.tally.predicted, batch.tally.refused["undeliverable"]) == (plain.tally.predicted - 1, 1)
