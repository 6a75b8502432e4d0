"""Streams that fall silent: gaps that are bridged or reset, streams that are new ones, and those that are forgotten."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from statestep.consumers.changelog import STREAM
from statestep.consumers.config import ConfigError
from statestep.consumers.expiry import LATE
from statestep.consumers.memory import MemoryBroker
from statestep.consumers.metrics import Metrics
from statestep.consumers.transaction import Limits
from statestep.consumers.wiring import silence_for
from statestep.runtime import Silence, silence_of

from ..models import pump
from . import runs
from .judging import PERIOD_SECONDS, judge, reading
from .runs import MODEL, SMALL, Clock, marker_of

MINUTE = PERIOD_SECONDS * 10**9
AT_ONCE = Limits(0.0, 1, snapshot_interval_s=0.0)  # a message at a time, with its state


def run(broker: MemoryBroker, silence: Silence | None, limits: Limits = SMALL, **how: Any) -> list[dict[str, Any]]:
    """Every output, as it is read."""
    how = {"model": judge(), "silence": silence, "limits": limits, "clock": Clock(step_s=10.0)} | how
    runs.service(broker, **how).run()
    return [json.loads(m.value) for m in broker.messages if m.value and not (m.dead or m.event)]


def one_stream(readings: dict[int, float | None]) -> MemoryBroker:
    """Readings of one stream by their minute."""
    broker = MemoryBroker(1)
    for minute, flow in readings.items():
        broker.append(0, b"k", reading(flow, None if flow is None else 5.0, minute))
    return broker


def without(document: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in (*names, "source", "processed_at")}


def test_a_bridged_gap_is_as_if_empty_messages_had_come() -> None:
    """To the bit, an event that goes on through it included; the row that ends it says so."""
    rng = np.random.default_rng(1)
    readings: dict[int, float | None] = {minute: float(rng.normal(0, 0.3)) for minute in range(12)}
    readings |= {9: 30.0, 16: 0.1, 17: 25.0, 18: 0.2}
    empty = readings | dict.fromkeys(range(12, 16), None)
    bridged = run(one_stream(readings), Silence(MINUTE, ((4, "bridge"), (None, "hold"))))
    told = run(one_stream(dict(sorted(empty.items()))), None)
    told = [document for document in told if "missing" not in document["flags"]]
    assert [without(d, "flags") for d in bridged] == [without(d, "flags") for d in told]
    assert bridged[12]["flags"] == ["gap", "bridged"] and bridged[12]["step"] == 17
    assert bridged[12]["event"]["steps"] == 8, "an event was on"


@pytest.mark.parametrize("minutes", [1, 4])
def test_a_gap_is_bridged_up_to_the_length_that_was_measured(minutes: int) -> None:
    """One timestep more, and it is held: the next reading is the next timestep."""
    plan: Any = ((3, "bridge"), (None, "hold"))
    documents = run(one_stream({0: 0.0, 1: 0.1, 2 + minutes: 0.2}), Silence(MINUTE, plan))
    assert documents[-1]["step"] == (3 + minutes if minutes <= 3 else 3)


def test_a_reset_begins_anew_but_for_the_event_that_is_on() -> None:
    """The forecast is a new stream's and so is the status; the event keeps its name and ends, by steps that go on."""
    before: dict[int, float | None] = {**dict.fromkeys(range(6), 0.1), 6: 30.0}
    after: dict[int, float | None] = {20: 0.0, 21: 0.1, 22: 0.0, 23: 0.1}
    documents = run(one_stream(before | after), Silence(MINUTE, ((None, "reset"),)))
    fresh = run(one_stream(after), None)
    assert documents[7]["flags"] == ["gap", "reset"] and documents[7]["step"] == 8
    assert [d["expected"] for d in documents[7:]] == [d["expected"] for d in fresh]
    assert [d["status"] for d in documents[7:]] == ["warming"] * 3 + ["calibrated"]
    quiet = run(one_stream({0: 0.3, 1: 0.1, **after}), Silence(MINUTE, ((None, "reset"),)))
    for name in ("step", "expected", "prediction", "status"):  # without an event steps are counted anew
        assert [d[name] for d in quiet[2:]] == [d[name] for d in fresh], name
    longer = run(one_stream({**dict.fromkeys(range(9), 0.1), **after}), Silence(MINUTE, ((None, "reset"),)))
    moved = [d["threshold"] for d in longer[9:]]
    assert max(moved) < min(d["threshold"] for d in fresh), "the threshold has come down, and stays where it was"
    names = {d["event"]["id"] for d in documents if "event" in d}
    assert len(names) == 1 and documents[9]["event"]["phase"] == "end"


def test_a_stream_that_expired_is_a_new_one() -> None:
    """Its first message after that is its first timestep, to the bit; a moment earlier it went on."""
    late = run(one_stream({0: 0.3, 1: 0.1, 31: 0.2}), Silence(expire_ns=30 * MINUTE))
    assert [d["step"] for d in late] == [1, 2, 3]
    documents = run(one_stream({0: 0.3, 1: 0.1, 32: 0.2, 33: 0.1}), Silence(expire_ns=30 * MINUTE))
    fresh = run(one_stream({32: 0.2, 33: 0.1}), None)
    assert [without(d) for d in documents[2:]] == [without(d) for d in fresh]
    assert documents[2]["flags"] == []


def test_a_stream_that_expires_in_an_event_is_told_its_end() -> None:
    """It is reset, and not a new one, until the event is over."""
    documents = run(one_stream({**dict.fromkeys(range(6), 0.1), 6: 30.0, 99: 0.0, 100: 0.0, 101: 0.0}),
                    Silence(expire_ns=30 * MINUTE))  # fmt: skip
    assert [d["event"]["phase"] for d in documents[6:]] == ["begin", "on", "on", "end"]
    assert len({d["event"]["id"] for d in documents[6:]}) == 1


def churn(streams: int, alive: int, minutes: int) -> MemoryBroker:
    """A few streams that go on, and others that come once each, one a minute."""
    broker = MemoryBroker(1)
    for minute in range(minutes):
        for number in range(alive):
            broker.append(0, b"alive%d" % number, reading(0.1, 5.0, minute))
        if minute < streams:
            broker.append(0, b"once%d" % minute, reading(0.1, 5.0, minute))
    return broker


def test_what_expired_is_forgotten_in_memory_and_in_the_changelog() -> None:
    """After twice the time: a tombstone in the transaction in which it goes; it is counted; the others stay."""
    broker, registry = churn(30, 6, 60), CollectorRegistry()
    metrics = Metrics(registry, "t", "judge")
    service = runs.service(
        broker, model=judge(), silence=Silence(expire_ns=5 * MINUTE), limits=AT_ONCE, clock=Clock(10.0), metrics=metrics
    )
    service.run()
    latest = {r.key: r.value for r in broker.changelog[0]}
    kept = {key.removeprefix(STREAM) for key, value in latest.items() if value is not None and key.startswith(STREAM)}
    assert kept == {b"alive%d" % number for number in range(6)}
    streams = service._engine.keys()
    held = {key.partition(b"/")[2] for key in streams}
    assert held == kept
    assert registry.get_sample_value("statestep_expired_streams_total", {"topic": "t"}) == 30
    assert LATE == 2


@pytest.mark.parametrize("limits", [AT_ONCE, SMALL, Limits(0.0, 7, snapshot_interval_s=100.0)])
def test_forgetting_is_not_seen_in_any_answer(limits: Limits) -> None:
    """Streams that come again, also a little late: outputs are those of a run that forgets nothing, to the bit."""

    def feed() -> MemoryBroker:
        rng, broker = np.random.default_rng(3), MemoryBroker(1)
        for minute in range(300):
            for number in range(6):
                broker.append(0, b"alive%d" % number, reading(float(rng.normal()), 5.0, minute))
            late = int(rng.integers(0, 5))
            broker.append(0, b"now and then%d" % rng.integers(12), reading(float(rng.normal()), 5.0, minute - late))
        return broker

    silence, forgetful, other = Silence(expire_ns=5 * MINUTE), feed(), feed()
    registry = CollectorRegistry()
    found = run(forgetful, silence, limits, metrics=Metrics(registry, "t", "judge"))
    service = runs.service(other, model=judge(), silence=silence, limits=limits)
    service._composer.expiry.look = lambda now_s: None  # type: ignore[method-assign]
    service.run()
    wanted = [json.loads(m.value) for m in other.messages if m.value and not m.event]
    assert [without(d) for d in found] == [without(d) for d in wanted]
    assert (registry.get_sample_value("statestep_expired_streams_total", {"topic": "t"}) or 0) > 20


def test_one_sensor_whose_clock_is_ahead_makes_nobody_forgotten() -> None:
    """Nine tenths of the streams say what is now."""
    broker = churn(0, 20, 5)
    broker.append(0, b"alive7", reading(0.1, 5.0, 10**6))
    for number in range(20):
        broker.append(0, b"alive%d" % number, reading(0.1, 5.0, 6))
    documents = run(broker, Silence(expire_ns=5 * MINUTE), AT_ONCE)
    assert [d["step"] for d in documents[-20:] if d["stream"] != "alive7"] == [6] * 19


def test_a_setting_that_decides_states_is_in_the_hash() -> None:
    """States of another plan are replayed under it by nobody's leave."""

    def of(silence: Silence | None) -> str:
        broker = one_stream({0: 0.1, 1: 0.2})
        run(broker, silence)
        seen = marker_of(broker, 0)
        assert seen is not None
        return seen.semantics

    plans: list[Silence | None] = [None, Silence(MINUTE, ((None, "reset"),)), Silence(expire_ns=MINUTE * 5)]
    assert len({of(silence) for silence in plans}) == 3
    assert of(Silence(expire_ns=MINUTE * 5)) == of(plans[2])


def test_what_a_model_cannot_do_is_refused() -> None:
    """In one sentence that names the setting, its value and the way out."""
    with pytest.raises(ConfigError, match=r"--on-gap is bridge: .* takes no missing readings.*hold it, or reset"):
        silence_for(MODEL, "bridge", None)
    with pytest.raises(ConfigError, match="--expire-after is 'soon': it must be a time such as 12h, 7d or 2w"):
        silence_for(MODEL, "measured", "soon")
    with pytest.raises(ConfigError, match=r"--on-gap is reset: .* names no period, so a gap cannot be told"):
        silence_for(pump(period_seconds=None), "reset", None)
    with pytest.raises(ConfigError, match="--expire-after is 90s, and judge has a timestep every 60 s, so that each"):
        silence_for(judge(), "measured", "90s")
    with pytest.raises(ValueError, match="on_gap is 'guess'"):
        silence_of(MODEL.contract, on_gap="guess")
    assert silence_for(MODEL, "measured", None) is silence_for(MODEL, "hold", None) is None
    expiring = silence_for(judge(), "reset", "7d")
    assert expiring is not None and expiring.expire_ns == 7 * 86_400 * 10**9
