"""The clock of a simulated world, its events, and processes that take turns in one thread.

A process is one greenlet, or more where it makes calls with a deadline; it runs until it waits, and then the earliest
event of the world goes on.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")
LATENCY_S = 0.003  # the longest that a healthy request takes
EPOCH_MS = 1_700_000_000_000  # the wall clock when the world begins


class Killed(BaseException):
    """The process has ended as by `kill -9`; it may not handle this."""


class Process:
    """One simulated process; `done` when it has ended, with what its target returned or raised."""

    def __init__(self, name: str):
        self.name = name
        self.dead = False
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.paused_until = 0.0
        self.cut_until = 0.0
        self.reached: Counter[str] = Counter()
        self.threads: list[Thread] = []


class Thread:
    """One of the threads of a process: the one that it began with, or a call with a deadline."""

    def __init__(self, process: Process):
        self.process = process
        self.turn = 0  # which wait it is in: a wake-up for an earlier one is void
        self.wakeable = False
        self.greenlet: greenlet | None = None


class Processes:
    """The clock, the events to come, and the processes."""

    def __init__(self, seed: int, blocked: type[Exception]):
        """`blocked` is what `within` raises at its deadline."""
        self.random = random.Random(seed)
        self.now = 0.0
        self.processes: list[Process] = []
        self.current: Thread | None = None
        self._blocked = blocked
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._hub: greenlet = getcurrent()
        self._down_until = 0.0
        self._alone_until = 0.0  # up to when a process that nobody interferes with may go on without a switch

    # The clock and events

    def clock(self) -> float:
        """Monotonic seconds."""
        return self.now

    def wall_ms(self) -> int:
        """Milliseconds since the epoch."""
        return EPOCH_MS + int(self.now * 1000)

    def at(self, time_s: float, do: Callable[[], object]) -> None:
        """Do something at a time, outside of all processes."""
        heapq.heappush(self._events, (max(time_s, self.now), next(self._order), do))

    def run(self, until: float | None = None, stop: Callable[[], bool] | None = None) -> None:
        """Let the world go on until a time (seconds), until `stop()` holds, or until nothing is left to happen.

        Raises whatever a process ended with that was neither a return nor its being killed.
        """
        self._hub = getcurrent()
        self._alone_until = until if until is not None and stop is None else 0.0
        events, stopped = self._events, False
        while events and not stopped:
            if until is not None and events[0][0] > until:
                break
            time_s, _, do = heapq.heappop(events)
            self.now = max(self.now, time_s)
            do()
            stopped = stop is not None and stop()
        if until is not None and not stopped:
            self.now = max(self.now, until)

    def call(self, target: Callable[[], T], name: str = "main") -> T:
        """Run `target` as a process to its end; what it returns."""
        process = self.spawn(name, target)
        self.run(stop=lambda: process.done)
        assert process.done, f"{name} waits for what never happens"
        result: T = process.result
        return result

    # Processes

    def spawn(
        self,
        name: str,
        target: Callable[[], Any],
        delay_s: float = 0.0,
        on_exit: Callable[[Process], object] | None = None,
    ) -> Process:
        """Start a process; `on_exit` is called, outside of all processes, when it has ended in whatever way."""
        process = Process(name)
        self.processes.append(process)

        def end() -> None:
            process.done = process.dead = True
            self._end_threads(process)
            if on_exit is not None:
                self.at(self.now, lambda: on_exit(process))

        def body() -> None:
            try:
                process.result = target()
            except Killed:
                pass
            except BaseException as error:
                process.error = error
            self.at(self.now, end)
            process.dead = True

        thread = self._thread(process, body)
        self.at(self.now + delay_s, lambda: self._resume(thread, 0))
        return process

    def _thread(self, process: Process, body: Callable[[], None]) -> Thread:
        thread = Thread(process)
        process.threads.append(thread)

        def run() -> None:
            body()
            process.threads.remove(thread)

        thread.greenlet = greenlet(run)
        return thread

    def kill(self, process: Process) -> None:
        """End a process as `kill -9` does; its requests that are on their way still arrive."""
        if process.dead:
            return
        if self.current is not None and self.current.process is process:
            process.dead = True
            self.at(self.now, lambda: self._end_threads(process))
            raise Killed
        if self.current is not None:
            self.at(self.now, lambda: self.kill(process))
            return
        process.dead = True
        self._end_threads(process)

    def _end_threads(self, process: Process) -> None:
        for thread in list(process.threads):
            if thread.greenlet:  # it has begun and not ended
                self._switch(thread, Killed())
            elif thread in process.threads:
                process.threads.remove(thread)
                process.done = True

    def pause(self, process: Process, seconds: float) -> None:
        """Stop a process, its client's I/O thread too, as SIGSTOP does; `sleep` notices."""
        process.paused_until = max(process.paused_until, self.now + seconds)

    def cut_off(self, process: Process, seconds: float) -> None:
        """Let no request of a process through."""
        process.cut_until = max(process.cut_until, self.now + seconds)

    def outage(self, seconds: float) -> None:
        """Let no request of anybody through."""
        self._down_until = max(self._down_until, self.now + seconds)

    def reachable_at(self, process: Process) -> float:
        """From when requests of a process get through."""
        return max(self._down_until, process.cut_until)

    def _resume(self, thread: Thread, turn: int) -> None:
        process = thread.process
        if process.dead or thread.turn != turn:
            return
        if process.paused_until > self.now:
            wake = process.paused_until + self.random.random() * LATENCY_S  # any of its threads may be the quickest
            self.at(wake, lambda: self._resume(thread, turn))
            return
        thread.turn += 1
        self._switch(thread)

    def _switch(self, thread: Thread, error: BaseException | None = None) -> None:
        assert thread.greenlet is not None
        thread.greenlet.parent = self._hub
        self.current = thread
        try:
            if error is None:
                thread.greenlet.switch()
            else:
                thread.greenlet.throw(error)
        finally:
            self.current = None
        process = thread.process
        if process.error is not None:
            failed, process.error = process.error, None
            raise failed

    def alive(self) -> Process:
        """The process that runs; `Killed` if it should not."""
        assert self.current is not None, "client calls are made by processes: use world.spawn or world.call"
        if self.current.process.dead:
            raise Killed
        return self.current.process

    def sleep(self, seconds: float, wakeable: bool = False) -> None:
        """Let the thread that runs wait, and others run; a `wakeable` wait ends early by `wake`."""
        process = self.alive()
        until = self.now + max(seconds, 0.0)
        others = self._events and self._events[0][0] <= until
        if not others and until <= self._alone_until and process.paused_until <= self.now:
            self.now = until
            return
        thread = self.current
        assert thread is not None
        turn = thread.turn
        self.at(until, lambda: self._resume(thread, turn))
        thread.wakeable = wakeable
        self._hub.switch()
        thread.wakeable = False
        if process.dead:
            raise Killed

    def wake(self, process: Process) -> None:
        """End the wakeable waits of a process."""
        for thread in process.threads:
            self._wake(thread)

    def _wake(self, thread: Thread) -> None:
        if thread.wakeable:
            thread.wakeable = False
            turn = thread.turn
            self.at(self.now, lambda: self._resume(thread, turn))

    def within(self, seconds: float, call: Callable[[], T]) -> T:
        """Run a call in a thread of its own; `Blocked` once it has taken `seconds`, and then it is left to itself."""
        process, waiting, until = self.alive(), self.current, self.now + seconds
        outcome: list[tuple[T | None, BaseException | None]] = []

        def body() -> None:
            try:
                outcome.append((call(), None))
            except BaseException as error:
                outcome.append((None, error))
            assert waiting is not None
            self._wake(waiting)

        thread = self._thread(process, body)
        self.at(self.now, lambda: self._resume(thread, 0))
        while not outcome and self.now < until:
            self.sleep(until - self.now, wakeable=True)
        if not outcome:
            raise self._blocked(f"a call of the Kafka client did not return within {seconds:g} s")
        result, error = outcome[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
