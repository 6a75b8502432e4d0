"""The demo: alarms judged against known faults, a page that fits its console, and the real service underneath."""

import io
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from importlib.resources import files

import numpy as np
import pytest
from rich.console import Console

from statestep.consumers.alarms import CLEAR_STEPS, GRACE_STEPS, Alarm, AlarmLog, judge
from statestep.consumers.demo import Watch, run_demo
from statestep.consumers.demo_view import AlarmRow, View, live_page, progress_line
from statestep.consumers.fleet import SENSORS, START_NS, STEPS_PER_DAY, Fault, play, simulate
from statestep.consumers.http import PortInUse
from statestep.consumers.ports import Message
from statestep.runtime import Engine, StepModel

NAMES = ["pump-01", "pump-02"]
STUCK = Fault(pump=0, sensor=1, kind="stuck", start=300, end=360, size=0.0)


def console_of(width: int = 80, height: int = 24, *, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, height=height, force_terminal=terminal, _environ={})


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_an_alarm_lasts_until_an_hour_without_an_anomaly() -> None:
    """Anomalies less than `CLEAR_STEPS` apart are one alarm, with its first and last timestep and its peak."""
    log = AlarmLog()
    anomalous = {10: 1.5, 10 + CLEAR_STEPS - 1: 4.0, 200: 2.0}
    for step in range(300):
        log.see("a", step, anomalous.get(step, 0.1), step in anomalous)
    assert log.open == {}
    assert log.all() == [Alarm("a", 10, 10 + CLEAR_STEPS - 1, 4.0), Alarm("a", 200, 200, 2.0)]


def test_streams_have_alarms_of_their_own() -> None:
    """An anomaly of one stream neither raises nor prolongs another's alarm."""
    log = AlarmLog()
    for step in range(100):
        log.see("a", step, 2.0, step == 5)
        log.see("b", step, 0.5, False)
    assert [alarm.stream for alarm in log.all()] == ["a"]


@pytest.mark.parametrize(
    ("raised", "stream", "seen", "false"),
    [
        (STUCK.start - 1, "pump-01", False, True),
        (STUCK.start, "pump-01", True, False),
        (STUCK.end - 1, "pump-01", True, False),
        (STUCK.end, "pump-01", False, False),
        (STUCK.end + GRACE_STEPS - 1, "pump-01", False, False),
        (STUCK.end + GRACE_STEPS, "pump-01", False, True),
        (STUCK.start, "pump-02", False, True),
    ],
)
def test_a_fault_is_seen_only_while_it_lasts(raised: int, stream: str, seen: bool, false: bool) -> None:
    """An alarm of the right pump within the fault sees it, in the hour after counts for nothing, else is false."""
    verdict = judge([STUCK], [Alarm(stream, raised, raised, 2.0)], dict.fromkeys(NAMES, 2000), NAMES)
    assert (verdict.answers[0].alarm is not None, bool(verdict.false)) == (seen, false)
    assert verdict.recall()["stuck"] == (int(seen), 1)
    quiet = 2 * 2000 - (STUCK.end + GRACE_STEPS - STUCK.start)
    assert verdict.quiet_weeks == pytest.approx(quiet / (7 * STEPS_PER_DAY))


@pytest.mark.parametrize(
    ("known", "raised", "answers"), [(250, None, 0), (320, None, 0), (320, 310, 1), (360, None, 1)]
)
def test_a_fault_that_is_not_over_is_not_missed(known: int, raised: int | None, answers: int) -> None:
    """A demo that ends in the midst of a fault counts it only if it was seen."""
    alarms = [] if raised is None else [Alarm("pump-01", raised, raised, 2.0)]
    assert len(judge([STUCK], alarms, {"pump-01": known}, NAMES).answers) == answers


def test_playing_keeps_the_pace_and_loses_nothing() -> None:
    """At speed s, a portion holds exactly the timesteps that are due by s × elapsed; all portions hold all messages."""
    fleet, now = simulate(pumps=2, days=1, seed=1), [100.0]
    portions = play(fleet, 3000.0, clock=lambda: now[0])  # a timestep each tenth of a second
    assert len(next(portions)) == 2
    now[0] += 0.09
    assert next(portions) == []
    now[0] += 0.02
    first = list(fleet.messages())
    assert next(portions) == first[2:4]
    now[0] += 0.52
    assert next(portions) == first[4:14]
    now[0] += 1e6
    assert [reading for portion in portions for reading in portion] == first[14:]


def test_playing_without_a_pace_hands_out_bounded_portions() -> None:
    """At speed 0 nothing is waited for, and no portion grows without bound."""
    fleet = simulate(pumps=48, days=2, seed=1)
    sizes = [len(portion) for portion in play(fleet, 0.0)]
    assert sum(sizes) == 2 * STEPS_PER_DAY * 48
    assert max(sizes) < 4096 + 48
    assert 0 not in sizes[:-1]


def test_a_played_reading_carries_the_time_at_which_it_falls_due() -> None:
    """With a stamp, value and record have the clock's time, to the millisecond."""
    fleet = simulate(pumps=1, days=0.01, seed=1)
    reading = next(play(fleet, 300.0, stamp=lambda: START_NS + 1_234_567_890))[0]
    assert reading.time_ms == START_NS // 1_000_000 + 1234
    assert reading.value.startswith(b'{"ts":"2026-01-05T00:00:01.234')


def view_of(pumps: int, alarms: int) -> View:
    fault = Fault(0, 1, "drop-out", 300, 310, 0.0)
    rows = tuple(
        AlarmRow(
            Alarm("pump-213", 300 + i, 305 + i, 12345.6),
            i % 2 == 0,
            (0.1, 1.0, 12345.6),
            fault if i % 3 else None,
            "critical, pressure_bar 100%" if i % 2 == 0 else "",
        )
        for i in range(alarms)
    )
    url = "http://127.0.0.1:65535"
    return View(999_999, START_NS, 1400, 1440, 1_345_678, 123_456.7, 0, url, (0.3,) * pumps, rows, 120)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (160, 50), (100, 30)])
@pytest.mark.parametrize(("pumps", "alarms"), [(1, 0), (48, 50), (300, 7), (5000, 9)])
def test_the_page_fits_its_console(width: int, height: int, pumps: int, alarms: int) -> None:
    """Whatever the number of pumps and alarms, no line is cut or wrapped and no line is beyond the last."""
    console = console_of(width, height)
    console.print(live_page(view_of(pumps, alarms), width, height))
    lines = printed(console).removesuffix("\n").split("\n")
    assert len(lines) <= height
    assert all(len(line) <= width for line in lines)
    assert "…" not in printed(console)
    more = re.search(r" and (\d+) more", printed(console))
    assert printed(console).count("▂") + (int(more[1]) if more else 0) == pumps
    assert bool(more) == (pumps == 5000)
    if alarms:
        assert "drop-out, pressure_bar" in printed(console)
        assert "nothing: false alarm" in printed(console)
        assert ("critical, pressure_bar 100%" in printed(console)) == (width == 160)


def test_the_progress_line_is_one_line() -> None:
    """Without a terminal the same moment is told in one plain line."""
    assert progress_line(view_of(48, 3)) == (
        "Fri 09 Jan 20:40  day 4.9 of 5: 1,345,678 messages, 123,457 a second, 120 alarms raised, 2 still on"
    )


def test_the_demo_runs_the_fleet_through_the_service() -> None:
    """Every message is predicted; the drop-outs are seen; the summary says what the result holds, seed included."""
    console = console_of()
    result = run_demo(pumps=12, days=4.0, speed=0.0, seed=21, http_port=0, console=console)
    assert result.service.consumed == result.service.predicted == 12 * 4 * STEPS_PER_DAY
    assert result.service.refused == 0
    by_kind = result.verdict.recall()
    assert by_kind["drop-out"][1] > 0
    assert by_kind["drop-out"][0] == by_kind["drop-out"][1]
    assert len(result.verdict.false) <= 3
    seen, injected = (sum(counts[i] for counts in by_kind.values()) for i in (0, 1))
    assert injected == len(result.fleet.faults)
    text = printed(console)
    assert f"{seen} of {injected} injected faults seen" in text
    assert "…" not in text
    assert "--seed 21 shows the same fleet again" in text
    assert "day 0.0 of 4" in text


def test_the_demo_draws_a_live_page_on_a_terminal() -> None:
    """On a terminal the page stands on the other screen, and the summary on the usual one when it is left."""
    console = console_of(terminal=True)
    run_demo(pumps=3, days=1.0, speed=0.0, seed=3, http_port=0, console=console)
    page, _, after = printed(console).partition("\x1b[?1049l")
    assert "\x1b[?1049h" in page
    assert "every message advances its own pump" in page
    assert "injected faults seen" in after


def test_ctrl_c_ends_the_demo_with_a_summary() -> None:
    """SIGINT stops a slow demo within seconds; what was taken by then is accounted for; the handler is put back."""
    before = signal.getsignal(signal.SIGINT)
    main, console = os.getpid(), console_of()

    def press_once_served() -> None:
        while "messages" not in printed(console):
            time.sleep(0.01)
        os.kill(main, signal.SIGINT)

    thread = threading.Thread(target=press_once_served)
    thread.start()
    result = run_demo(pumps=2, days=5.0, speed=3000.0, seed=1, http_port=0, console=console)  # 144 s if let
    thread.join()
    assert result.interrupted
    assert result.seconds < 30
    assert result.service.consumed == result.service.predicted < 2 * 5 * STEPS_PER_DAY
    assert "ended early" in printed(console)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_demo_serves_its_metrics() -> None:
    """While it runs, Prometheus finds its counters at the port that the demo was given."""
    pages: list[str] = []

    class Looking(io.StringIO):
        """A terminal that, once the page names a URL, asks there as a person would."""

        def write(self, text: str) -> int:
            if not pages and (named := re.search(r"metrics at (http://\S+/metrics)", text)):
                pages.append(urllib.request.urlopen(named[1], timeout=5).read().decode())
            return super().write(text)

    console = Console(file=Looking(), width=80, height=24, force_terminal=True, _environ={})
    run_demo(pumps=2, days=1.0, speed=0.0, seed=1, http_port=0, console=console)
    assert "statestep_predictions_total" in pages[0]


def test_a_port_that_was_named_and_is_taken_is_an_error() -> None:
    """Only a port that nobody asked for is replaced by a free one."""
    holder = socket.create_server(("127.0.0.1", 0))
    with holder, pytest.raises(PortInUse, match="--http-port"):
        run_demo(pumps=1, days=1.0, speed=0.0, seed=1, http_port=holder.getsockname()[1], console=console_of())


def test_the_watch_reads_what_any_consumer_would() -> None:
    """Scores are in thresholds, steps count from 0, dead letters are counted and not read."""
    watch = Watch(simulate(pumps=1, days=1, seed=1))
    value = b'{"stream":"pump-01","step":3,"score":9.0,"threshold":4.5,"anomaly":true,"flags":[]}'
    watch.take([Message(False, 0, b"pump-01", value, ()), Message(True, 0, b"pump-01", b"junk", ())])
    assert watch.log.open == {"pump-01": Alarm("pump-01", 2, 2, 2.0)}
    event = (
        b'"event":{"id":"ab","level":"major"},"why":[{"feature":"motor_c","share":0.75},{"feature":"x","share":0.25}]'
    )
    watch.take([Message(False, 0, b"pump-01", value.replace(b'"flags":[]', event).replace(b":3,", b":4,"), ())])
    assert watch.view(1.0, "").alarms[0].told == "major, motor_c 75%"
    watch = Watch(simulate(pumps=1, days=1, seed=1))
    watch.take([Message(False, 0, b"pump-01", value, ()), Message(True, 0, b"pump-01", b"junk", ())])
    view = watch.view(2.0, "http://127.0.0.1:1")
    assert view.alarms[0].told == ""
    assert (view.messages, view.per_second, view.dead_letters, view.ratios) == (2, 1.0, 1, (2.0,))


def test_the_model_in_the_package_is_the_fleets() -> None:
    """Its features are the sensors, in order and unit; a stream that has just begun gets a finite, quiet score."""
    model = StepModel.load(str(files("statestep.consumers") / "models" / "pump.onnx"))
    assert [(feature.name, feature.unit) for feature in model.contract.features] == [(s.name, s.unit) for s in SENSORS]
    assert model.contract.period_seconds == 300
    fleet = simulate(pumps=200, days=0.5, seed=77, faulty=False)
    engine = Engine(model)
    scores = np.array([engine.advance(fleet.keys, x)["score"] for x in fleet.values])  # [T, P]
    assert np.isfinite(scores).all()
    assert not scores[0].any()
    assert (scores[:12] > 2 * engine.advance(fleet.keys, fleet.values[-1])["threshold"]).mean() < 0.001
