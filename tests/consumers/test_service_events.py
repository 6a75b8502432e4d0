"""Events through the service: their messages count exactly when the answers do, whatever befalls a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from statestep.consumers.memory import MemoryBroker, MemorySink
from statestep.consumers.metrics import Metrics
from statestep.consumers.pipeline import BadMessage
from statestep.consumers.ports import Message, Rejected, Transaction
from statestep.consumers.service import Service
from statestep.consumers.transaction import Limits

from . import runs
from .judging import PARTITIONS, judge, reading, troubled
from .runs import SMALL, Crash, Crashing, Script

SLOW = Limits(0.0, 7, snapshot_interval_s=3600.0)  # next to no snapshots: a restart replays
COUNT = 400
Place = tuple[str, int, int]  # topic, partition and offset of the record that a message goes with


def service(broker: MemoryBroker, *parts: Any, **kw: Any) -> Service:
    settings: dict[str, Any] = {"model": judge(), "events": True} | kw
    return runs.service(broker, *parts, **settings)


def placed(messages: list[Message]) -> list[tuple[Place, Message]]:
    """Each message with what it goes with; an event's is told from the answer to the same record."""
    found = []
    for message in messages:
        names = "__streams.errors." if message.dead else "statestep.source."
        headers = dict(message.headers)
        topic = "dead" if message.dead else "event" if message.event else "output"
        found.append(((topic, int(headers[f"{names}partition"]), int(headers[f"{names}offset"])), message))
    return found


@cache
def whole() -> dict[Place, Message]:
    """What a run that is never cut sends."""
    broker = troubled(COUNT)
    service(broker).run()
    found = placed(broker.messages)
    assert len(dict(found)) == len(found)
    return dict(found)


def expect_whole(broker: MemoryBroker) -> None:
    found = placed(broker.messages)
    assert len(found) == len(dict(found)), "a message is doubled"
    assert dict(found) == whole()


def events(messages: Mapping[Place, Message] | None = None) -> list[dict[str, Any]]:
    return [json.loads(m.value or b"") for m in (messages or whole()).values() if m.event]


def test_every_event_has_a_beginning_and_most_have_an_end() -> None:
    """Each begins once and ends at most once, after it began; the rows in between bear its name, and no others do."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for message in whole().values():
        document = json.loads(message.value) if message.value and not (message.dead or message.event) else {}
        if "event" in document:
            rows.setdefault(document["event"]["id"], []).append(document)
    begun = {e["id"]: e for e in events() if e["phase"] == "begin"}
    ended = {e["id"]: e for e in events() if e["phase"] == "end"}
    assert len(begun) + len(ended) == len(events())
    assert begun.keys() == rows.keys() > ended.keys()
    assert len(ended) > 3 and sum("ended" in e for e in ended.values()) > 1
    for name, documents in rows.items():
        assert [d["event"]["steps"] for d in documents] == list(range(1, len(documents) + 1))
        assert begun[name]["source"] == documents[0]["source"]
        assert {d["event"]["since"] for d in documents} == {begun[name]["since"]} == {documents[0]["ts"]}
        if name in ended and "ended" not in ended[name]:
            assert ended[name]["source"] == documents[-1]["source"]
            assert [d["event"]["phase"] for d in documents][-1] == "end"
        elif name in ended:
            assert (ended[name]["steps"], ended[name]["severity"]) == (
                documents[-1]["event"]["steps"],
                documents[-1]["event"]["severity"],
            )


@pytest.mark.parametrize("effect", ["poll", "commit"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 3, 5, 9, 20])
@pytest.mark.parametrize("limits", [SMALL, SLOW], ids=["small", "slow"])
def test_a_run_cut_anywhere_tells_each_event_once(effect: str, after: bool, at: int, limits: Limits) -> None:
    """Killed before or after any effect and started anew, in the middle of events too: the same bytes, none twice."""
    broker = troubled(COUNT)
    crashing = Crashing(broker, effect, at, after)
    with pytest.raises(Crash):
        service(broker, crashing, crashing, limits=limits).run()
    service(broker, limits=limits).run()
    expect_whole(broker)


@pytest.mark.parametrize("counts", [True, False])
def test_transactions_of_which_nothing_is_heard_tell_no_event_twice(counts: bool) -> None:
    """Those that count are not sent again, those that do not are taken back with all that they held."""
    broker = troubled(COUNT)
    sink = MemorySink(broker)
    script = {n: (lambda s: sink.fail_next(counts=counts)) for n in range(3, 90, 3)}
    service(broker, Script(broker, script, 100), sink).run()
    expect_whole(broker)


def test_a_partition_that_moves_in_the_middle_of_an_event_keeps_its_name() -> None:
    """Another process takes the stream over from its durable state: the event goes on, and ends, under its name."""
    broker = troubled(COUNT)
    first = Script(broker, {20: lambda s: s.revoke(*range(PARTITIONS))}, 21)
    service(broker, first).run()
    half = len(broker.events)
    still_on = {e["id"] for e in map(json.loads, (m.value or b"" for m in broker.events)) if e["phase"] == "begin"}
    still_on -= {e["id"] for e in map(json.loads, (m.value or b"" for m in broker.events)) if e["phase"] == "end"}
    assert still_on
    service(broker).run()
    assert len(broker.events) > half
    expect_whole(broker)


class Choosy(MemorySink):
    """Refuses any transaction with a message of which `refuses` is true."""

    def __init__(self, broker: MemoryBroker, refuses: Callable[[Place, Message], bool]):
        super().__init__(broker)
        self._refuses = refuses

    def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        for place, message in placed(list(transaction.messages)):
            if self._refuses(place, message):
                raise Rejected("the message is too large")
        return super().commit(transaction, membership)


class TestRefused:
    """A message that no broker takes, where a record has two."""

    BEGIN = next(place for place, m in whole().items() if m.event and b'"phase":"begin"' in (m.value or b""))
    ENDED = next(place for place, m in whole().items() if m.event and b'"ended":true' in (m.value or b""))

    @pytest.mark.parametrize("at", [BEGIN, ENDED])
    def test_an_event_that_is_refused_costs_no_answer(self, at: Place) -> None:
        """The output is there, as is all else; that the event was not told is counted."""
        broker, registry = troubled(COUNT), CollectorRegistry()
        sink = Choosy(broker, lambda place, message: place == at)
        service(broker, sink=sink, metrics=Metrics(registry, "memory", "judge")).run()
        assert dict(placed(broker.messages)) == {place: m for place, m in whole().items() if place != at}
        assert registry.get_sample_value("statestep_events_undelivered_total", {"topic": "memory"}) == 1
        labels = {"topic": "memory", "reason": "undeliverable"}
        assert registry.get_sample_value("statestep_dead_letters_total", labels) == 0

    def test_an_answer_that_is_refused_is_a_dead_letter_and_its_event_is_not_told(self) -> None:
        """Which of the two was refused cannot be known, so the event goes first; the stream has advanced anyway."""
        broker, output = troubled(COUNT), ("output", *self.BEGIN[1:])
        service(broker, sink=Choosy(broker, lambda place, message: place == output)).run()
        found, dead = dict(placed(broker.messages)), ("dead", *self.BEGIN[1:])
        assert dict(found[dead].headers)["__streams.errors.exception"] == b"undeliverable"
        gone = {output, self.BEGIN}
        assert {p: m for p, m in found.items() if p != dead} == {p: m for p, m in whole().items() if p not in gone}

    def test_under_fail_it_stops(self) -> None:
        """Never silent: the sentence says that it is the event's message which no broker takes."""
        broker = troubled(COUNT)
        for partition, log in enumerate(broker.log):  # a message that cannot be read would stop it sooner
            broker.log[partition] = [r if r.value != b"{" else r._replace(value=reading(0.0)) for r in log]
        sink = Choosy(broker, lambda place, message: message.event)
        with pytest.raises(BadMessage, match="no broker takes what tells that an event begins or ends with it"):
            service(broker, sink=sink, policy="fail").run()
        assert not broker.events


def test_nobody_asks_for_events_and_none_are_sent() -> None:
    """Outputs tell them all the same."""
    broker = troubled(COUNT)
    service(broker, events=False).run()
    assert dict(placed(broker.messages)) == {place: m for place, m in whole().items() if not m.event}


def test_a_model_without_events_is_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever asks for events of one that counts none is warned, for the topic would stay empty in silence."""
    service(MemoryBroker(1))
    assert caplog.text == ""
    service(MemoryBroker(1), events=False, model=runs.MODEL)
    assert caplog.text == ""
    service(MemoryBroker(1), model=runs.MODEL)
    assert "pump: the model tells of no events, so none will be sent" in caplog.text


def test_metrics_say_what_the_model_said() -> None:
    """Counters against the messages that came out, gauges against what the model puts out at the end."""
    broker, registry = troubled(COUNT), CollectorRegistry()
    summary = service(broker, metrics=Metrics(registry, "memory", "judge"), limits=Limits(0.0, 4096)).run()

    def sample(name: str, **labels: str) -> float:
        value = registry.get_sample_value(f"statestep_{name}", {"model": "judge"} | labels)
        assert value is not None, name
        return value

    ends = [e["level"] for e in events() if e["phase"] == "end"]
    assert sample("events_begun_total") == len(events()) - len(ends) == summary.events > 0
    for level in ("minor", "major", "critical"):
        assert sample("events_ended_total", level=level) == ends.count(level)
    outputs = [json.loads(m.value) for p, m in whole().items() if p[0] == "output" and m.value]
    for status in ("warming", "calibrated", "drifting"):
        rows = sum(document["status"] == status for document in outputs)
        assert sample("prediction_status_total", status=status) == rows
    missing = sum("missing" in document["flags"] for document in outputs)
    assert sample("input_missing_values_total", feature="pressure") == missing > 0
    assert sample("input_missing_values_total", feature="flow") == 0
    assert sample("false_alarm_budget_ratio") == 1 / 500
    assert 0 < sample("input_drift_score", feature="flow") < 0.2
    assert 0 < sample("score_drift_score") < 0.5


def test_the_page_shows_the_event_that_a_stream_is_in() -> None:
    """As its last answer told it, beside the score; its loudest feature too, which a restart does not know at first."""
    broker = troubled(COUNT)
    run = service(broker)
    run.run()
    last: dict[tuple[int, str], dict[str, Any]] = {}
    for message in broker.outputs:
        document = json.loads(message.value) if message.value else {}
        last[message.partition, (message.key or b"").decode()] = document
    told = {place: d["event"] for place, d in last.items() if d.get("event", {"phase": "end"})["phase"] != "end"}
    assert told
    shown = run.pager.pages().streams(100)["highest_scores"]
    found = {(row["partition"], row["stream"]): row["event"] for row in shown if row["event"]}
    assert found.keys() == told.keys()
    for place, event in found.items():
        assert event.pop("feature") == last[place]["why"][0]["feature"]
        assert event == {name: value for name, value in told[place].items() if name != "phase"}
    again = service(broker)
    again.run()
    back = {(row["partition"], row["stream"]): row["event"] for row in again.pager.pages().streams(100)["stalest"]}
    assert {place: event for place, event in back.items() if event} == {
        p: e | {"feature": None} for p, e in found.items()
    }
    place = next(iter(told))
    assert again.pager.pages().stream(place[1].encode())[0].keys() == shown[0].keys()
