"""The demo: a simulated fleet with faults through the real service, in memory and faster than real time.

`run_demo` plays the fleet's messages into a `MemoryBroker` at a pace, and reads the predictions that come out as any
other consumer of the output topic would. The service, the engine and the model are those of `statestep run`. All of it
runs in one thread: `MemorySource` asks for new messages at each poll, and the page is drawn then.
"""

from __future__ import annotations

import secrets
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import files
from types import FrameType
from zlib import crc32

import msgspec
from prometheus_client import CollectorRegistry
from rich.console import Console
from rich.live import Live

from statestep.consumers.alarms import Alarm, AlarmLog, Verdict, caused, judge
from statestep.consumers.demo_view import (
    RECENT_STEPS,
    AlarmRow,
    DemoResult,
    View,
    live_page,
    progress_line,
    summary_page,
)
from statestep.consumers.fleet import IDLE_SECONDS, Fleet, play, simulate
from statestep.consumers.http import DEFAULT_PORT, HttpServer, Pages, PortInUse
from statestep.consumers.memory import MemoryBroker, MemoryChangelog, MemorySink, MemorySource
from statestep.consumers.metrics import Metrics
from statestep.consumers.ports import Message
from statestep.consumers.wiring import build
from statestep.runtime import StepModel

PARTITIONS = 4
SPEED = 21_600.0  # simulated seconds a second: a day in four, the default fleet in twenty
DRAW_SECONDS = 0.125  # between two pages
LINE_SECONDS = 2.0  # between two lines
ALARMS_KEPT = 50  # for the page; a console has fewer lines


class Level(msgspec.Struct):
    """What the demo reads of an event."""

    level: str | None


class Part(msgspec.Struct):
    """And of what makes it."""

    feature: str
    share: float


class Output(msgspec.Struct):
    """What the demo reads of a prediction; `step` counts from 1."""

    stream: str
    step: int
    score: float
    threshold: float
    anomaly: bool
    event: Level | None = None
    why: list[Part] = []


class Watch:
    """Reads predictions: each pump's latest scores, and the alarms that they raise."""

    def __init__(self, fleet: Fleet):
        self.fleet = fleet
        self.names = [key.decode() for key in fleet.keys]
        self.log = AlarmLog()
        self.steps = dict.fromkeys(self.names, 0)  # timesteps seen of each stream
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=RECENT_STEPS) for name in self.names}
        self.told: dict[str, str] = {}  # of each stream, what its last event was
        self.predicted = 0
        self.dead_letters = 0
        self._decode = msgspec.json.Decoder(Output).decode

    def take(self, messages: Sequence[Message]) -> None:
        """Read messages in the order in which they came out."""
        for message in messages:
            if message.dead:
                self.dead_letters += 1
                continue
            assert message.value is not None, "a fleet sends no tombstones"
            output = self._decode(message.value)
            ratio = output.score / output.threshold
            self.log.see(output.stream, output.step - 1, ratio, output.anomaly)
            self.recent[output.stream].append(ratio)
            if output.event is not None and output.why:
                loudest = output.why[0]
                self.told[output.stream] = f"{output.event.level}, {loudest.feature} {loudest.share:.0%}"
            self.steps[output.stream] = output.step
            self.predicted += 1

    def verdict(self) -> Verdict:
        """The alarms so far against the faults so far."""
        return judge(self.fleet.faults, self.log.all(), self.steps, self.names)

    def view(self, seconds: float, url: str) -> View:
        """What to show, `seconds` after the start."""
        alarms = [*self.log.ended, *sorted(self.log.open.values(), key=lambda alarm: alarm.raised)]
        messages = self.predicted + self.dead_letters
        return View(
            seed=self.fleet.seed,
            start_ns=int(self.fleet.times[0]),
            step=max(max(self.steps.values()) - 1, 0),
            steps=len(self.fleet.times),
            messages=messages,
            per_second=messages / seconds if seconds > 0 else 0.0,
            dead_letters=self.dead_letters,
            url=url,
            ratios=tuple(recent[-1] if recent else 0.0 for recent in self.recent.values()),
            alarms=tuple(self._row(alarm) for alarm in alarms[: -ALARMS_KEPT - 1 : -1]),
            raised=len(alarms),
        )

    def _row(self, alarm: Alarm) -> AlarmRow:
        faults = self.fleet.faults
        fault = next((fault for fault in faults if caused(alarm, fault, self.names[fault.pump])), None)
        still = self.log.open.get(alarm.stream) is alarm
        told = self.told.get(alarm.stream, "") if still else ""
        return AlarmRow(alarm, still, tuple(self.recent[alarm.stream]), fault, told)


def run_demo(
    *,
    pumps: int = 48,
    days: float = 5.0,
    speed: float = SPEED,
    seed: int | None = None,
    http_port: int | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Show a fleet of `pumps` over `days` at `speed` simulated seconds a second (0: as fast as it goes).

    On a terminal it draws a live page, elsewhere a line now and then; Ctrl-C ends it early, with the summary so far.
    `seed` is drawn where it is None, and printed. Metrics are served on `http_port`; None takes the usual one, or a
    free one where that is taken. Raises ValueError for an empty fleet and `PortInUse` for a taken `http_port`.
    """
    console = console or Console()
    fleet = simulate(pumps, days, seed=secrets.randbelow(1_000_000) if seed is None else seed)
    watch, broker = Watch(fleet), MemoryBroker(PARTITIONS, "sensors")
    portions = play(fleet, speed)

    def feed() -> bool:
        watch.take(broker.messages)
        broker.messages.clear()
        tick()
        portion = next(portions, None)
        for key, value, time_ms in portion or ():
            broker.append(crc32(key) % PARTITIONS, key, value, time_ms)
        if portion == []:
            time.sleep(IDLE_SECONDS)
        return portion is not None

    model = StepModel.load(str(files("statestep.consumers") / "models" / "pump.onnx"))
    metrics = Metrics(CollectorRegistry(), broker.topic, model.contract.name)
    service = build(
        model, MemorySource(broker, feed=feed), MemorySink(broker), MemoryChangelog(broker), metrics=metrics
    )
    server = _serve(metrics.registry, service.pager.pages(), http_port)
    began = time.monotonic()
    try:
        with (
            _display(console, lambda: watch.view(time.monotonic() - began, server.url)) as tick,
            _interruptible() as interrupted,
        ):
            service.run(interrupted)
    finally:
        server.close()
    watch.take(broker.messages)
    seconds = time.monotonic() - began
    result = DemoResult(fleet, watch.verdict(), service.summary, seconds, interrupted())
    console.print(summary_page(result), soft_wrap=not console.is_terminal)
    return result


def _serve(registry: CollectorRegistry, pages: Pages, port: int | None) -> HttpServer:
    if port is not None:
        return HttpServer(registry, pages, port=port)
    try:
        return HttpServer(registry, pages, port=DEFAULT_PORT)
    except PortInUse:  # nobody named that port, so nobody waits at it
        return HttpServer(registry, pages, port=0)


@contextmanager
def _display(console: Console, view: Callable[[], View]) -> Iterator[Callable[[], None]]:
    """What to call whenever there is time: it draws the page, or prints a line, when one is due."""
    if not console.is_terminal:
        yield _every(LINE_SECONDS, lambda: console.print(progress_line(view()), soft_wrap=True, highlight=False))
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        yield _every(DRAW_SECONDS, lambda: live.update(live_page(view(), *console.size), refresh=True))


def _every(seconds: float, act: Callable[[], None]) -> Callable[[], None]:
    """`act`, but at most once in `seconds`."""
    due = time.monotonic()

    def tick() -> None:
        nonlocal due
        if time.monotonic() >= due:
            act()
            due = time.monotonic() + seconds

    return tick


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. The first one asks for an end; a second one, while that is waited for, forces it."""
    pressed = False

    def press(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(number, before)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
