"""One simulated run of the real service, by its seed: processes, their faults, and what became of them.

outcome = run_seed(17)                                  # the fault is drawn, or aimed, by the seed
outcome = run_seed(17, directed="pause-before:producer.end:commit")
outcome.failures                                        # empty, or one sentence each
"""

from __future__ import annotations

import logging
import random
import shutil
import tempfile
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry

from statestep.consumers.changelog import StateCodec
from statestep.consumers.codec import Decoder, Encoder, Fields
from statestep.consumers.kafka_client import Clients as KafkaClients
from statestep.consumers.kafka_topics import prepare_topics
from statestep.consumers.metrics import BatchHistogram, Metrics
from statestep.consumers.pipeline import Pipeline
from statestep.consumers.ports import Blocked, BrokerError, Fenced, Undecided
from statestep.consumers.service import Service
from statestep.consumers.store import Store
from statestep.consumers.transaction import Limits
from statestep.consumers.wiring import STOP_SECONDS
from statestep.runtime import Engine

from .clients import Clients
from .cluster import Cluster
from .feed import SILENCE, TOPIC, Feed, Fold
from .invariants import APP, CHANGELOG, DEAD, EVENTS, OUTPUT, Watch
from .log import Partition
from .plans import plan
from .schedules import Schedule, aim
from .watched import WatchedChangelog, WatchedSink, WatchedSource
from .world import Process, World

FEED_S = 9.0  # records are written
HEAL_S = 12.0  # faults befall the run
BOUND_S = 70.0  # then everything is answered within so long,
CLEAN_S = 40.0  # and no later than this `redo` is `next`;
EXIT_S = 20.0  # from SIGTERM to the end of all processes
RESTARTS_MAX = 80
LOOK_S = 3.0  # of static members, so that they look while faults still befall the run
MEMORY = Path("/dev/shm")


@dataclass
class Outcome:
    """What became of a run."""

    seed: int
    directed: str | None
    failures: list[str]
    commits: int
    rebuilt: int
    restores: int
    restarts: int
    seconds: float  # simulated
    points: dict[str, Counter[str]]  # how often each was reached, and what happened there
    ends: Counter[str]  # of processes, by the exception
    struck: bool  # whether what it aimed at came to pass
    trace: list[str] = field(default_factory=list)


class Run:
    """One run. `eager`: what it aims at strikes whoever comes by first."""

    def __init__(
        self,
        seed: int,
        directed: str | None,
        patch: Callable[[Service], object] | None,
        trace: bool,
        eager: bool = False,
    ):
        self.seed, self.patch = seed, patch
        self.chance = random.Random(f"run {seed} ")
        self.plan = plan(seed, self.chance, directed)
        p = self.plan
        aims = aim(self.chance, p.directed, HEAL_S, eager) if p.directed else []
        self.schedule = Schedule(random.Random(f"faults {seed}"), HEAL_S, 0.0 if eager else p.rate, aims)
        self.world = World(seed, self.schedule)
        self.schedule.now = self.world.clock
        self.lines: deque[str] = deque(maxlen=200_000)
        if trace:
            self.world.trace = self.lines.append
        self.cluster = Cluster(self.world)
        self.cluster.abort_check_s = 1.0
        self.cluster.create(TOPIC, p.partitions)
        for topic, size in ((OUTPUT, "3000"), (EVENTS, "1200")):
            self.cluster.create(topic, p.partitions, {"max.message.bytes": size} if p.poisoned else {})
        clients = Clients(self.world, self.cluster)
        self.clients = KafkaClients(
            clients.KafkaConsumer,
            clients.KafkaProducer,
            clients.KafkaAdminClient,
            self.world.clock,
            self.world.sleep,
            self.world.within,
        )
        self.feed = Feed(
            self.world, self.cluster, random.Random(f"feed {seed}"), p.partitions, p.keys, p.poisoned, p.silent
        )
        self.watch = Watch(self.world, self.cluster, self.feed, p.partitions, p.exactly_once)
        self.alive: dict[str, Process] = {}
        self.stopping: set[str] = set()
        self.finishing = False
        self.starts = self.restarts = 0
        self.ends: Counter[str] = Counter()
        self.model = Fold()

    def note(self, what: str) -> None:
        """A line of the trace."""
        if self.world.trace is not None:
            self.world.trace(f"{self.world.now:.6f} *** {what}")

    # Processes

    def start(self, name: str, delay_s: float, again: bool = True) -> None:
        """Start a process, and start it again whenever it ends, until the end."""
        self.stopping.discard(name)

        def ended(process: Process) -> None:
            self.note(f"{name} has ended")
            if self.alive.get(name) is process:
                del self.alive[name]
            if not self.plan.store_kept or self.chance.random() >= self.plan.store_kept:
                shutil.rmtree(self.directory / name, ignore_errors=True)
            if again and not self.finishing:
                self.restarts += 1
                self.start(name, self.chance.uniform(0.2, 2.5))

        self.alive[name] = self.world.spawn(name, lambda: self.live(name), delay_s, ended)

    def live(self, name: str) -> None:
        """The life of a process: what `statestep run` does, with its exit codes."""
        try:
            with ExitStack() as stack:
                self.service(name, stack).run(lambda: name in self.stopping)
        except (Fenced, Blocked, BrokerError, Undecided) as error:
            self.ends[type(error).__name__] += 1
            self.note(f"{name} ends: {type(error).__name__}: {error}")
        except Exception as error:
            self.ends[type(error).__name__] += 1
            where = traceback.format_exception(error)[-6:]
            self.watch.expect(False, f"{name} failed: {type(error).__name__}: {error}\n{''.join(where)}")

    def service(self, name: str, stack: ExitStack) -> Service:
        """A service over the simulated clients, as `wiring` makes it over the real ones."""
        self.starts += 1
        p, clients = self.plan, self.clients
        properties = {"bootstrap_servers": ["simulated"]}
        instance = f"instance-{name[0]}" if p.static else None
        counts = prepare_topics(properties, APP, TOPIC, [OUTPUT, DEAD, EVENTS], create=True, clients=clients)
        source = WatchedSource(
            TOPIC, APP, properties, counts[TOPIC], instance_id=instance, session_timeout_ms=p.session_ms,
            max_poll_interval_ms=p.poll_ms, look_s=LOOK_S, clients=clients,
        )  # fmt: skip
        stack.callback(source.close)
        sink = WatchedSink(
            TOPIC, APP, properties, OUTPUT, DEAD, counts, events=EVENTS, instance_id=instance,
            guarantee="exactly-once" if p.exactly_once else "at-least-once", transaction_timeout_ms=p.transaction_ms,
            transactional_id=None if p.static else f"{APP}-{name}-{self.world.random.getrandbits(64):x}",
            clients=clients,
        )  # fmt: skip
        stack.callback(sink.close)
        changelog = WatchedChangelog(APP, properties, clients=clients)
        stack.callback(changelog.close)
        store = None
        if p.store:
            store = Store.open(self.directory / name, APP, clock=lambda: self.world.wall_ms() / 1000)
            stack.callback(store.close)
        model = self.model
        pipeline = Pipeline(
            Engine(model, p.max_streams, SILENCE if p.silent else None), Decoder(model.contract, Fields()),
            Encoder(model.contract, "f0", TOPIC), events=True,
        )  # fmt: skip
        source.watch = sink.watch = changelog.watch = self.watch
        source.engine, source.sink, sink.source = pipeline.engine, sink, source
        service = Service(
            source, sink, changelog, pipeline, uncounted(), model="f0", semantics="5e", writer=f"{name}-{self.starts}",
            limits=Limits(p.commit_s, p.records, p.snapshot_s, p.snapshot_bytes), store=store, clock=self.world.clock,
        )  # fmt: skip
        if self.patch is not None:
            self.patch(service)
        return service

    # What happens by the clock

    def arrange(self) -> None:
        """Records, faults, retention and compaction, each at its time."""
        world, chance, p = self.world, self.chance, self.plan
        if p.leftovers:
            self.leave_states()
        for number in range(p.processes):
            late = chance.random() < 0.3 and number > 0
            self.start("abc"[number], chance.uniform(3.0, 10.0) if late else chance.uniform(0.0, 0.3))
        time_s = 0.0
        while time_s < FEED_S:
            world.at(time_s, partial(self.feed.write, chance.randrange(p.partitions)))
            time_s += chance.expovariate(1 / p.gap_s) if chance.random() < 0.97 else 1.5
        for _ in range(p.clocked):
            world.at(chance.uniform(0.5, HEAL_S), self.befall)
        for _ in range(1 if p.directed else chance.randrange(3)):  # rebalances by those who leave and come back
            world.at(chance.uniform(2.0, FEED_S), self.sigterm_one)
        for number in range(8):
            world.at(number * 3.0 + chance.random(), self.keep_house)

    def leave_states(self) -> None:
        """States of another application's time, under another epoch and without a marker: void."""
        self.cluster.create(CHANGELOG, self.plan.partitions, {"cleanup.policy": "compact"})
        engine, codec, keys = Engine(self.model, 10), StateCodec(self.model.contract), [b"stream-0", b"stream-1"]
        engine.advance(keys, np.ones((2, 1), np.float32), None, np.array([3, 4]))
        for number in range(self.plan.partitions):
            for record in codec.encode(number, keys, engine.read(keys), 2):
                self.cluster.append(CHANGELOG, number, record.key, record.value)

    def befall(self) -> None:
        """One fault, now."""
        chance, world = self.chance, self.world
        begun = sorted(name for name, process in self.alive.items() if process.reached)
        if not begun:
            return
        process = self.alive[chance.choice(begun)]
        kind = chance.choice(("kill", "kill", "pause", "pause", "cut", "outage", "restart"))
        seconds = chance.choice((1.0, 4.0, 8.0, 14.0))
        self.note(f"{kind} {process.name} {seconds}")
        if kind == "kill":
            world.kill(process)
        elif kind == "pause":
            world.pause(process, seconds)
        elif kind == "cut":
            world.cut_off(process, seconds)
        else:
            world.outage(seconds if kind == "outage" else 0.5)

    def sigterm_one(self) -> None:
        """Ask a process to stop; it starts again later."""
        if self.alive:
            self.sigterm(self.chance.choice(sorted(self.alive)))

    def sigterm(self, name: str) -> None:
        """A process that does not end within ten seconds of the signal ends itself, as `wiring` has it."""
        self.note(f"SIGTERM {name}")
        self.stopping.add(name)
        process = self.alive[name]
        self.world.at(self.world.now + STOP_SECONDS, lambda: self.world.kill(process))

    def keep_house(self) -> None:
        """Retention, up to where a restore may still have to replay; compaction, below a moving segment."""
        for number, durable in enumerate(self.watch.durable):
            if durable.marker is not None and self.chance.random() < 0.5:
                self.cluster.partition((TOPIC, number)).delete_before(durable.marker.redo)
            topic = self.cluster.topics.get(CHANGELOG)
            if topic is not None and self.chance.random() < 0.7:
                log: Partition = topic.partitions[number]
                log.compact(upto=self.chance.choice((log.high, max(log.high - 20, 0))))

    # The whole

    def go(self) -> Outcome:
        """Run to the end."""
        world, watch = self.world, self.watch
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as directory:
            self.directory = Path(directory)
            self.arrange()
            try:
                self.phase(HEAL_S, lambda: False)
                # To find an answer that is too large among others takes a handful of transactions, of a second each.
                bound_s = BOUND_S * (2 if self.plan.poisoned else 1)
                self.until_none(watch.unanswered, bound_s, "records are not answered in time")
                if not watch.failures:
                    self.end()
            finally:
                for process in list(world.processes):
                    if not process.dead:
                        world.kill(process)
        counts = {point: Counter(found) for point, found in world.counts.items()}
        return Outcome(
            self.seed, self.plan.directed, watch.failures, watch.commits, watch.rebuilt, watch.restores, self.restarts,
            world.now, counts, self.ends, bool(self.schedule.struck), list(self.lines),
        )  # fmt: skip

    def phase(self, until_s: float, done: Callable[[], bool]) -> None:
        """Let the world go on, up to a time, until all is done, or until something failed."""
        world, watch = self.world, self.watch
        while world.now < until_s and not watch.failures and not done():
            world.run(until=min(world.now + 0.5, until_s))
            if not watch.expect(self.restarts < RESTARTS_MAX, "processes end again and again", self.ends):
                return

    def until_none(self, left: Callable[[], object], bound_s: float, failure: str) -> None:
        """Wait until nothing is `left`."""
        self.phase(self.world.now + bound_s, lambda: not left())
        self.watch.expect(not left(), failure, left())

    def end(self) -> None:
        """Everything is answered: nothing stays dirty, be it by waiting or by SIGTERM, and nobody hangs."""
        world, watch, p = self.world, self.watch, self.plan
        if not p.sigterm or world.now < HEAL_S + 4.0:
            self.until_none(watch.dirty, CLEAN_S, "states are not written though nothing comes")
        if watch.failures:
            return
        self.finishing = True
        for name in sorted(self.alive):
            self.sigterm(name)
        self.phase(world.now + EXIT_S, lambda: not self.alive)
        watch.expect(not self.alive, "processes do not end", sorted(self.alive))
        world.run(until=world.now + 10.0)  # what was under way has come by then
        watch.look_at_logs()


@cache
def uncounted() -> Metrics:
    """Metrics for all runs, whose histograms stand still: nothing hangs on them, and they took a third of a run."""
    metrics = Metrics(CollectorRegistry(), TOPIC, "fold")
    for found in vars(metrics).values():
        if isinstance(found, BatchHistogram):
            found.observe = lambda values, label="": None  # type: ignore[method-assign]
    return metrics


@contextmanager
def quiet(note: Callable[[str], None] | None) -> Iterator[None]:
    """Keep the service's warnings out of the log, or put them into the trace."""
    logger = logging.getLogger("statestep")
    before = logger.level, logger.propagate

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if note is not None:
                note(record.getMessage())

    handler = Handler()
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO if note is not None else logging.CRITICAL)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def run_seed(
    seed: int,
    *,
    directed: str | None = None,
    service_patch: Callable[[Service], object] | None = None,
    trace: bool = False,
) -> Outcome:
    """Run a seed. `directed` is `kind:point`, see `schedules`; `service_patch` is called with every service made."""
    for eager in (False, True):
        run = Run(seed, directed, service_patch, trace, eager)
        with quiet(run.note if trace else None):
            outcome = run.go()
        if outcome.struck or outcome.directed is None or outcome.failures:
            break
    return outcome
