"""Events in the answers: what a model puts out of them, said in words, for the rows that belong to one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from statestep.consumers.checkpoint import Progress
from statestep.consumers.codec import Decoder, Encoder, Fields
from statestep.consumers.events import event_id
from statestep.consumers.pipeline import Pipeline
from statestep.consumers.ports import Message, Record
from statestep.consumers.teller import NAMED
from statestep.export.detector import EVIDENCE, STATUS
from statestep.runtime import NO_TIME, Contract, Engine, Feature, Output, State, StepModel

from ..models import FEATURES, graph, stamped
from .judging import CALM, WARM, judge, reading, troubled

LIVE = {partition: Progress(0, 0, 0, 0, 0) for partition in range(3)}
ROLES = ("since", "severity", "contribution", "reason", "related", "expected", "score", "threshold", "status")


def pipeline(model: StepModel, *, events: bool = True) -> Pipeline:
    encoder = Encoder(model.contract, model.fingerprint, "sensors")
    return Pipeline(Engine(model), Decoder(model.contract, Fields()), encoder, events=events)


def answered(model: StepModel, records: Sequence[Record], *, events: bool = True) -> list[Message]:
    pipe = pipeline(model, events=events)
    return pipe.encode(pipe.advance(records, pipe.decode(records), LIVE))


def documents(messages: Sequence[Message], *, event: bool = False) -> list[dict[str, Any]]:
    return [json.loads(m.value) for m in messages if m.event == event and not m.dead and m.value is not None]


def log(*values: bytes | None, key: bytes = b"k", partition: int = 0, first: int = 0) -> list[Record]:
    return [Record(partition, first + i, 60_000 * i, key, value) for i, value in enumerate(values)]


CALM_ROWS = [reading(0.1 * (n % 3), 5 + 0.1 * (n % 2), n) for n in range(WARM + 2)]
SPIKE = [*CALM_ROWS, reading(20.0, 5.0, 10), *(reading(0.1 * (n % 3), 5.0, 11 + n) for n in range(14))]


def test_rows_of_an_event_tell_it_in_words() -> None:
    """Its first timestep begins it, its last ends it, rows outside tell nothing: numbers are the engine's own."""
    model = judge()
    found = documents(answered(model, log(*SPIKE)))
    rows = [json.loads(value) for value in SPIKE]
    x = np.array([[row["flow"], row["pressure"]] for row in rows], np.float32)
    times = np.array([row["ts"] * 10**9 for row in rows])
    out = Engine(model).advance([b"k"] * len(x), x, times)
    counts = out["event"].tolist()
    begin, end = counts.index(1), next(i for i, count in enumerate(counts) if count < 0)
    assert end - begin >= CALM
    for i, document in enumerate(found):
        assert ("event" in document) == ("why" in document) == (begin <= i <= end)
        if begin <= i <= end:
            severity = out["severity"][i].item()
            assert document["event"] == {
                "id": found[begin]["event"]["id"],
                "phase": {begin: "begin", end: "end"}.get(i, "on"),
                "since": found[begin]["ts"],
                "steps": i - begin + 1,
                "severity": severity,
                "level": "minor" if severity < 1.5 else "major" if severity < 3 else "critical",
            }
            for why in document["why"]:
                column = FEATURES.index(why["feature"])
                assert np.float32(why["share"]) == out["contribution"][i, column]
                assert why["reason"] == EVIDENCE[out["reason"][i, column]]
                assert why["seen"] == rows[i][why["feature"]]
                assert np.float32(why["related"]) == out["related"][i, column]
                assert why["expected"] == (document["expected"]["flow"] if why["feature"] == "flow" else None)
            shares = [why["share"] for why in document["why"]]
            assert shares == sorted(shares, reverse=True) and all(shares)
    assert [document["status"] for document in found[: WARM + 1]] == ["warming"] * WARM + ["calibrated"]
    assert found[begin]["why"][0]["feature"] == "flow"
    assert "outputs" not in found[0]


def test_the_rare_row_is_the_one_that_costs() -> None:
    """A row outside of any event is, but for its status, the document of a model that knows none."""
    with_roles = documents(answered(judge(), log(*CALM_ROWS)))
    without = documents(answered(judge(("event", "contribution", "reason", "related")), log(*CALM_ROWS)))
    assert [document | {"model": 0} for document in with_roles] == [document | {"model": 0} for document in without]


@pytest.mark.parametrize("role", ROLES)
def test_any_role_may_be_absent(role: str) -> None:
    """What hangs on it is null or left out; all else is as it was, to the last bit."""
    whole = documents(answered(judge(), log(*SPIKE)))
    found = documents(answered(judge((role,)), log(*SPIKE)))
    assert len(found) == len(whole) and any("event" in document for document in found)
    for document, full in zip(found, whole, strict=True):
        assert ("event" in document) == ("event" in full)
        if "event" not in full:
            continue
        if role == "since":
            assert document["event"].pop("since") is None
            assert document["event"].pop("id") != full["event"].pop("id")  # it is made of what is known
            full["event"].pop("since")
        elif role == "severity":
            assert [document["event"].pop(name) for name in ("severity", "level")] == [None, None]
            full["event"] = {name: full["event"][name] for name in document["event"]}
        elif role == "contribution":
            assert document["why"] == []
            full["why"] = []
        elif role in ("reason", "related", "expected"):
            for mine, theirs in zip(document["why"], full["why"], strict=True):
                assert (mine.pop(role, None), theirs.pop(role) is not None or role == "expected") == (None, True)
        full = full | {role: None} if role in full else full
        assert {**document, "model": 0} == {**full, "model": 0}


def test_a_model_that_counts_no_events_tells_of_none() -> None:
    """Whatever else it has; nor does it send any."""
    messages = answered(judge(("event",)), log(*SPIKE, None))
    assert not [m for m in messages if m.event]
    assert all("event" not in document and "why" not in document for document in documents(messages))


def test_what_was_missing_is_null_and_flagged() -> None:
    """A null, a feature that is not there: the row is answered, its flags say so, and `seen` is null."""
    values = [
        *CALM_ROWS,
        reading(20.0, 5.0, 10),
        reading(None, 5.0, 11),
        b'{"pressure": 5.0, "ts": 720}',
        b'{"ts": 780}',
    ]
    found = documents(answered(judge(), log(*values)))
    assert [document["flags"] for document in found[-4:]] == [["gap"], ["missing"], ["missing"], ["missing"]]
    for document in found[-3:]:
        seen = {why["feature"]: why["seen"] for why in document["why"]}
        assert seen["flow"] is None
        assert document["event"]["phase"] == "on"
    assert found[-1]["expected"]["flow"] == pytest.approx(20.0)  # the last value stands in for itself


def test_out_of_order_gap_and_missing_are_told_together() -> None:
    """In this order, and a row without any has none."""
    values = [reading(0, 5, 0), reading(None, 5, 100), reading(0, None, 50), reading(0, 5, 101)]
    found = documents(answered(judge(), log(*values)))
    assert [document["flags"] for document in found] == [[], ["gap", "missing"], ["out_of_order", "missing"], []]


def test_at_most_five_features_are_named() -> None:
    """The loudest, by falling share; features that make nothing of the score are not among them."""
    names = tuple(f"f{n}" for n in range(9))
    shares = np.array([0.0, 0.3, 0.05, 0.2, 0.05, 0.25, 0.1, 0.05, 0.0], np.float32)
    found = documents(answered(counting(names, shares, 1), log(b"[0, 0, 0, 0, 0, 0, 0, 0, 0]")))
    named = [(why["feature"], why["share"]) for why in found[0]["why"]]
    assert [name for name, _ in named] == ["f1", "f5", "f3", "f6", "f2"]
    assert len(named) == NAMED
    few = documents(answered(counting(names[:3], shares[:3], 1), log(b"[0, 0, 0]")))
    assert [why["feature"] for why in few[0]["why"]] == ["f1", "f2"]


@pytest.mark.parametrize(("count", "phases"), [(1, ["begin"]), (2, []), (0, []), (-3, ["end"]), (-1, ["begin", "end"])])
def test_one_message_begins_an_event_and_one_ends_it(count: int, phases: list[str]) -> None:
    """Also where both are the same timestep; in between there is none."""
    messages = answered(counting(("a",), np.array([1], np.float32), count), log(b"[0]"))
    assert [document["phase"] for document in documents(messages, event=True)] == phases
    (document,) = documents(messages)
    assert document.get("event", {}).get("steps") == (abs(count) or None)
    assert document.get("event", {}).get("phase") == {1: "begin", 2: "on", -3: "end", -1: "end"}.get(count)


def counting(names: tuple[str, ...], shares: np.ndarray[Any, Any], count: int) -> StepModel:
    """A model of any origin, whose every row has the same event and shares, and whose numbers nobody has words for."""
    constant = helper.make_node
    nodes = [
        constant("Identity", ["h"], ["g"]),
        constant("Expand", ["counts", "rows"], ["event"]),
        constant("Expand", ["parts", "shape"], ["share"]),
        constant("Shape", ["x"], ["shape"]),
        constant("Shape", ["h"], ["both"]),
        constant("Gather", ["both", "first"], ["rows"], axis=0),
        constant("Expand", ["sevens", "rows"], ["odd"]),
        constant("Expand", ["reasons", "shape"], ["why"]),
    ]
    weights = {
        "counts": np.array([count]),
        "parts": shares[None],
        "first": np.array([0]),
        "sevens": np.array([7]),
        "reasons": np.full((1, len(names)), 9),
    }
    row, each = ("float32", ["B", len(names)]), ("int64", ["B"])
    made = graph(
        nodes,
        {"x": row, "h": ("float32", ["B", 1])},
        {"event": each, "share": row, "odd": each, "why": ("int64", ["B", len(names)]), "g": ("float32", ["B", 1])},
        weights,
    )
    outputs = (
        Output("event", role="event"),
        Output("share", role="contribution"),
        Output("odd", role="status"),
        Output("why", role="reason"),
    )
    return StepModel(
        stamped(
            made, Contract("c", tuple(map(Feature, names)), (State("h", "g", (1,)),), outputs, missing="own-forecast")
        )
    )


def test_numbers_without_words_are_null() -> None:
    """A status and a reason that the contract does not name; the rest of the answer is as ever."""
    found = documents(answered(counting(("a",), np.array([1], np.float32), 1), log(b"[0]")))
    assert found[0]["status"] is None
    assert found[0]["why"] == [{"feature": "a", "share": 1.0, "reason": None, "seen": 0.0, "expected": None}]


def test_the_messages_of_an_event_are_those_of_its_first_and_last_row() -> None:
    """Beside the outputs, in order, keyed by the stream: the same numbers, and the record that they came with."""
    messages = answered(judge(), log(*SPIKE, key=b"pump-\xff", partition=2))
    rows = {document["event"]["phase"]: document for document in documents(messages) if "event" in document}
    told = [message for message in messages if message.event]
    assert [(m.key, m.partition, m.dead) for m in told] == [(b"pump-\xff", 2, False)] * 2
    for message, phase in zip(told, ("begin", "end"), strict=True):
        row, notice = rows[phase], json.loads(message.value or b"")
        assert list(notice) == [
            "id", "stream", "phase", "ts", "since", "steps", "severity", "level", "score", "threshold", "why", "model",
            "source",
        ]  # fmt: skip
        shared = ("stream", "ts", "score", "threshold", "why", "model", "source")
        assert {name: notice[name] for name in shared} == {name: row[name] for name in shared}
        assert {name: notice[name] for name in row["event"]} == row["event"]
        source = row["source"]
        assert message.headers == (
            ("statestep.source.topic", b"sensors"),
            ("statestep.source.partition", b"2"),
            ("statestep.source.offset", b"%d" % source["offset"]),
        )
    assert not [message for message in answered(judge(), log(*SPIKE), events=False) if message.event]


@given(st.integers(1, 7))
def test_events_do_not_depend_on_how_records_are_cut_into_batches(size: int) -> None:
    """In one batch or in many, each stream's events are the same bytes in the same order."""
    records = [record for partition in troubled(150).log for record in partition]

    def by_stream(messages: Sequence[Message]) -> dict[Any, list[Message]]:
        found: dict[Any, list[Message]] = {}
        for message in messages:
            if message.event:
                found.setdefault((message.partition, message.key), []).append(message)
        return found

    cut, progress, pieces = pipeline(judge()), dict(LIVE), []
    for begin in range(0, len(records), size):
        part = records[begin : begin + size]
        batch = cut.advance(part, cut.decode(part), progress)
        pieces += cut.encode(batch)
        cut.engine.commit()
        progress |= batch.progress
    whole = by_stream(answered(judge(), records))
    assert whole and by_stream(pieces) == whole


def test_a_stream_that_ends_in_an_event_ends_it() -> None:
    """One message more, with what its last row told of it and nothing of a score; one without ends in silence."""
    begun = SPIKE[: WARM + 4]
    messages = answered(
        judge(), [*log(*begun), Record(0, 99, 1_800_000, b"k", None), Record(0, 100, -1, b"calm", None)]
    )
    last = documents(messages)[-1]
    assert last["event"]["phase"] == "on"
    *_, notice = documents(messages, event=True)
    assert notice == {
        **last["event"], "phase": "end", "ended": True, "stream": "k", "ts": "1970-01-01T00:30:00Z",
        "score": None, "threshold": None, "why": [], "model": last["model"],
        "source": {"topic": "sensors", "partition": 0, "offset": 99},
    }  # fmt: skip
    assert [message.value is None for message in messages if not message.event][-2:] == [True, True]
    assert len([message for message in messages if message.event]) == 2
    calm = answered(judge(), log(*CALM_ROWS, None))
    assert not [message for message in calm if message.event]
    silent = answered(judge(held=False), log(*begun, None))  # the contract does not say where the state is
    assert [document["phase"] for document in documents(silent, event=True)] == ["begin"]


def test_a_stream_that_begins_anew_has_events_of_other_names() -> None:
    """After a tombstone its timesteps count from 1 again, and times go on."""
    later = [reading(json.loads(v)["flow"], json.loads(v)["pressure"], json.loads(v)["ts"] // 60 + 500) for v in SPIKE]
    found = documents(answered(judge(), log(*SPIKE, None, *later)), event=True)
    assert [document["phase"] for document in found] == ["begin", "end"] * 2
    assert len({document["id"] for document in found}) == 2


def test_an_id_names_one_event_and_no_other() -> None:
    """It is a digest of where it began, which anybody can work out: topic, partition, key, timestep and time."""
    event = ("sensors", 3, b"pump-07", 17, 5)
    place = b"sensors\x003\x0017\x005\x00pump-07"
    assert event_id(*event) == blake2b(place, digest_size=8).hexdigest()
    others = [("sensor", 3, b"pump-07", 17, 5), ("sensors", 4, b"pump-07", 17, 5), ("sensors", 3, b"pump-08", 17, 5)]
    others += [
        ("sensors", 3, b"pump-07", 18, 5),
        ("sensors", 3, b"pump-07", 17, 6),
        ("sensors", 3, b"pump-07", 17, NO_TIME),
    ]
    others += [("sensors", 3, b"", 17, 5), ("sensors", 31, b"pump-07", 7, 5)]
    assert len({event_id(*other) for other in (event, *others)}) == 1 + len(others)


def test_an_id_in_a_document_is_of_its_beginning() -> None:
    """Of the timestep and the time at which it began, whichever row tells it."""
    found = documents(answered(judge(), log(*SPIKE, partition=1)))
    within = [document for document in found if "event" in document]
    since = datetime.fromisoformat(within[0]["ts"])
    name = event_id("sensors", 1, b"k", within[0]["step"], int(since.astimezone(UTC).timestamp()) * 10**9)
    assert {document["event"]["id"] for document in within} == {name}


def test_the_tally_counts_events_readings_and_statuses() -> None:
    """Begun, ended by their level, missing by feature, rows by status: of live rows alone."""
    values = [*SPIKE, reading(None, None, 40), reading(None, 5.0, 41)]
    records = [*log(*values), *log(*SPIKE[:-14], None, key=b"ends", first=len(values))]
    pipe = pipeline(judge())
    tally = pipe.advance(records, pipe.decode(records), LIVE).tally
    assert (tally.begun, sum(tally.ended.values())) == (2, 2)
    assert set(tally.ended) <= {"minor", "major", "critical"}
    assert dict(tally.missing) == {"flow": 2, "pressure": 1}
    assert dict(tally.statuses) == {"warming": 2 * WARM, "calibrated": len(records) - 1 - 2 * WARM}
    assert set(tally.statuses) <= set(STATUS)
    again = pipeline(judge())
    replayed = again.advance(records, again.decode(records), {0: Progress(0, len(records), 0, 0, 0, owed=len(records))})
    assert (replayed.tally.begun, replayed.tally.ended, replayed.tally.missing, replayed.tally.statuses) == (
        0,
        {},
        {},
        {},
    )
    assert again.encode(replayed) == []
