"""A simulated world: one clock, one source of chance, processes that take turns, and faults at named points.

Everything runs in one thread. A process is a greenlet: it runs until it waits, and then the earliest event of the
world goes on. Whatever a process asks of the outside goes through `effect`, where the schedule decides: go on, die
before or after it takes effect, be paused while others run, never hear the answer, or have it arrive late. So a run
is a function of its seed and its schedule. An example, with the simulated cluster and clients:

    def faults(process: Process, point: str, count: int) -> Fault | None:   # `count` is from 1, by process and point
        if process.name == "a" and point == "producer.end:commit" and count == 2:
            return Fault("pause-before", 30.0)                               # the zombie
        return None

    world = World(seed=1, schedule=faults)
    cluster = Cluster(world)
    cluster.create("in", partitions=2)
    clients = Clients(world, cluster)                     # .KafkaConsumer, .KafkaProducer, .KafkaAdminClient: classes

    def service() -> int:                                 # any code that uses kafka-python's API
        producer = clients.KafkaProducer(transactional_id="a", transaction_timeout_ms=10_000)
        world.within(5.0, producer.init_transactions)     # the deadline runner; raises Blocked
        ...
        return 0

    a = world.spawn("a", service, on_exit=lambda process: world.spawn("a", service, delay_s=1.0))
    world.at(12.0, lambda: world.kill(a))                 # faults by the clock: kill, pause, cut off, outage
    world.at(20.0, lambda: world.cut_off(a, 5.0))
    world.at(30.0, lambda: world.outage(5.0))
    cluster.append("in", 0, key=b"k", value=b"v")         # the harness itself is no process and costs no time
    world.run(until=60.0)                                 # or stop=lambda: done(); raises what a process died of
    world.counts["producer.end:commit"]["reached"]        # and "kill-before", "pause-before", … by point
    cluster.read("out", 0)                                # what a reader of committed records sees

The adapters of `statestep.consumers` take all of it as `kafka_client.Clients(clients.KafkaConsumer,
clients.KafkaProducer, clients.KafkaAdminClient, world.clock, world.sleep, world.within)`; `world.wall_ms` is the wall
clock. `clients.POINTS` lists every point. What a process ends with other than by its end or by `Killed` is raised by
`run`, so a target catches what its service may end with. A killed process sees `Killed`, a BaseException, in the call
that it waits in, and in every client call that it makes after that, so that its own `finally` blocks change nothing
outside.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

from statestep.consumers import ports

from .processes import LATENCY_S, Killed, Process, Processes

__all__ = ["LATENCY_S", "Fault", "Killed", "NoAnswerError", "Process", "Schedule", "SilenceError", "World"]

T = TypeVar("T")
SILENCE_S = 30.0  # kafka-python's request_timeout_ms
RETRY_S = 0.1  # kafka-python's retry_backoff_ms


class NoAnswerError(Exception):
    """A request had no answer within the time that its caller gives it."""


class SilenceError(Exception):
    """A request had no answer within the time that the client gives any request; its connection is closed."""


class Fault(NamedTuple):
    """What befalls a process at a point.

    The kinds that every point knows: `kill-before` and `kill-after` the effect; `pause-before` and `pause-after`, for
    `seconds`; `lost`: it takes effect, the connection breaks, and the client asks again; `silent`: it takes effect and
    no answer ever comes; `late`: no answer comes, and it takes effect `seconds` later; `twice`: it is answered, and a
    second copy takes effect `seconds` later. `producer.produce` has more of its own, see `producer.py`.
    """

    kind: Literal[
        "kill-before", "kill-after", "pause-before", "pause-after", "lost", "silent", "late", "twice",
        "expired", "expired-sent", "out-of-order",
    ]  # fmt: skip
    seconds: float = 0.0


Schedule = Callable[[Process, str, int], Fault | None]


class World(Processes):
    """Processes, and all that they ask of the outside."""

    def __init__(self, seed: int, schedule: Schedule | None = None):
        super().__init__(seed, ports.Blocked)
        self.schedule = schedule
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.trace: Callable[[str], None] | None = None

    def decide(self, process: Process, point: str) -> Fault | None:
        """Count that a point was reached, and ask the schedule what is to happen there."""
        process.reached[point] += 1
        counts = self.counts[point]
        counts["reached"] += 1
        fault = self.schedule(process, point, process.reached[point]) if self.schedule is not None else None
        if self.trace is not None:
            self.trace(f"{self.now:.6f} {process.name} {point} {fault.kind if fault else ''}")
        if fault is not None:
            counts[fault.kind] += 1
        return fault

    def point(self, name: str) -> None:
        """A point without a request, where a process can only die or be paused."""
        process = self.alive()
        fault = self.decide(process, name)
        if fault is not None:
            self._suffer(process, fault, "kill-before", "pause-before")
            self._suffer(process, fault, "kill-after", "pause-after")

    def effect(
        self, point: str, does: Callable[[], T], timeout_s: float | None = None, silence_s: float = SILENCE_S
    ) -> T:
        """Ask something of the cluster, in the process that runs: `does()` is the whole effect, and happens at once.

        Raises `NoAnswerError` where no answer comes within `timeout_s`, during an outage too; `SilenceError` where
        the cluster has the request and does not answer for `silence_s`; and whatever `does` raises.
        """
        process = self.alive()
        return self.carry_out(self.decide(process, point), does, timeout_s, silence_s)

    def carry_out(
        self, fault: Fault | None, does: Callable[[], T], timeout_s: float | None = None, silence_s: float = SILENCE_S
    ) -> T:
        """The same, where the fault has been decided."""
        process = self.alive()
        give_up = None if timeout_s is None else self.now + timeout_s
        if fault is not None:
            self._suffer(process, fault, "kill-before", "pause-before")
        self.sleep(self.random.random() * LATENCY_S)
        self._reach(process, give_up)
        if fault is not None:
            if fault.kind in ("late", "twice"):
                self.at(self.now + fault.seconds, lambda: _ignore(does))
            if fault.kind == "silent":
                _ignore(does)
            if fault.kind in ("late", "silent"):
                self._hang(give_up, silence_s)
            if fault.kind == "lost":
                _ignore(does)
                self.sleep(RETRY_S)
                self._reach(process, give_up)
        result = does()
        if fault is not None:
            self._suffer(process, fault, "kill-after", "pause-after")
        return result

    def io(self, process: Process, delay_s: float, do: Callable[[], None]) -> None:
        """Do something in the client's I/O thread of a process: later if it is paused then, never if it is dead."""

        def event() -> None:
            if process.dead:
                return
            if process.paused_until > self.now:
                self.at(process.paused_until + self.random.random() * LATENCY_S, event)
                return
            do()

        self.at(self.now + delay_s, event)

    def io_effect(self, process: Process, point: str, does: Callable[[], None], fails: Callable[[], None]) -> None:
        """Ask something of the cluster from the I/O thread; `fails` is called there if the connection broke."""
        fault = self.decide(process, point)
        kind = None if fault is None else fault.kind
        seconds = 0.0 if fault is None else fault.seconds
        if kind == "kill-before":
            self.kill(process)
            return
        if kind == "pause-before":
            self.pause(process, seconds)
            self.io(process, 0.0, lambda: self._io_request(process, does, fails, None, 0.0))
            return
        self._io_request(process, does, fails, kind, seconds)

    def _io_request(
        self, process: Process, does: Callable[[], None], fails: Callable[[], None], kind: str | None, seconds: float
    ) -> None:
        if self.reachable_at(process) > self.now:
            self.io(process, RETRY_S, fails)
            return
        delay = self.random.random() * LATENCY_S
        if kind == "late":
            delay += seconds
        if kind in ("lost", "silent", "late"):
            self.io(process, LATENCY_S, fails)
        self.at(self.now + delay, does)  # a request that is on its way arrives, whatever becomes of its sender
        if kind == "twice":
            self.at(self.now + delay + seconds, does)
        if kind == "kill-after":
            self.at(self.now + delay, lambda: self.kill(process))
        if kind == "pause-after":
            self.at(self.now + delay, lambda: self.pause(process, seconds))

    def _suffer(self, process: Process, fault: Fault, kill: str, pause: str) -> None:
        if fault.kind == kill:
            self.kill(process)
        if fault.kind == pause:
            self.pause(process, fault.seconds)
            self.sleep(0.0)

    def _reach(self, process: Process, give_up: float | None) -> None:
        """Wait until requests get through."""
        while (until := self.reachable_at(process)) > self.now:
            if give_up is not None and until > give_up:
                self._hang(give_up)
            self.sleep(until - self.now + self.random.random() * RETRY_S)

    def _hang(self, give_up: float | None, silence_s: float = 1e9) -> None:
        """Wait for an answer that never comes."""
        silent = give_up is None or give_up > self.now + silence_s
        self.sleep(silence_s if silent or give_up is None else give_up - self.now)
        raise SilenceError if silent else NoAnswerError


def _ignore(does: Callable[[], object]) -> None:
    """Let a request take effect of which nobody hears the outcome."""
    try:
        does()
    except Exception:
        return
