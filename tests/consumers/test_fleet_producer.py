"""The fleet as a producer: whole simulations one after the other, at a pace or not, until told to stop."""

import json
import time

from statestep.consumers.fleet import PERIOD_SECONDS, STEPS_PER_DAY, simulate
from statestep.consumers.fleet_producer import RUN_DAYS, produce_fleet
from statestep.consumers.ports import Message
from statestep.consumers.times import parse_time


def test_days_are_sent_whole_and_time_goes_on_between_simulations() -> None:
    """Past one simulation the next seed goes on: times rise by the period throughout, and no timestep is missing."""
    messages: list[Message] = []
    days = RUN_DAYS + 1
    assert produce_fleet(messages.extend, seed=5, pumps=1, days=days, speed=0.0) == days * STEPS_PER_DAY
    times = [parse_time(json.loads(message.value or b"")["ts"]) for message in messages]
    assert times == [(times[0] or 0) + step * PERIOD_SECONDS * 10**9 for step in range(days * STEPS_PER_DAY)]
    assert [message.timestamp_ms for message in messages] == [(time or 0) // 1_000_000 for time in times]
    second = [json.loads(message.value or b"")["flow_m3h"] for message in messages[RUN_DAYS * STEPS_PER_DAY :]]
    next_seed = simulate(pumps=1, days=1, seed=6).values[:, 0, 0].tolist()
    assert [f"{flow:.1f}" for flow in second] == [f"{flow:.1f}" for flow in next_seed]


def test_a_paced_fleet_reports_the_time_of_day_and_stops_when_told() -> None:
    """At a pace each reading says when it was sent; an endless fleet ends after `stopping`, all sent being flushed."""
    messages: list[Message] = []
    began = time.time_ns()
    sent = produce_fleet(messages.extend, seed=1, pumps=3, speed=30_000.0, stopping=lambda: len(messages) >= 60)
    assert sent == len(messages) >= 60
    stamps = [message.timestamp_ms or 0 for message in messages]
    assert began // 1_000_000 <= stamps[0] <= stamps[-1] <= time.time_ns() // 1_000_000
    assert stamps == sorted(stamps)
    assert stamps[-1] >= began // 1_000_000 + 19 * 10 - 5  # ms: the 20th timestep, each a hundredth of a second later
    assert [said(message) for message in messages] == stamps


def said(message: Message) -> int:
    """The time that a reading names, ms since the epoch."""
    when = parse_time(json.loads(message.value or b"")["ts"])
    assert when is not None
    return when // 1_000_000
