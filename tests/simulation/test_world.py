"""The simulated world: faults befall a process where the schedule says, and a run is a function of its seed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import KafkaError, KafkaTimeoutError, ProducerFencedError
from kafka.structs import TopicPartition

from statestep.consumers.ports import Blocked

from .clients import POINTS, Clients
from .cluster import Cluster
from .world import Fault, Killed, Process, World

OUT = TopicPartition("out", 0)


class Play:
    """A world with one topic, where `write` commits one record, and a fault strikes once at one point."""

    def __init__(self, seed: int = 0, point: str = "", fault: Fault | None = None, nth: int = 1):
        self.world = World(seed, self._strike)
        self._plan = (point, nth)
        self._fault = fault
        self.cluster = Cluster(self.world)
        self.cluster.create("out")
        self.clients = Clients(self.world, self.cluster)
        self.steps: list[str] = []

    def _strike(self, process: Process, point: str, count: int) -> Fault | None:
        if (point, count) != self._plan:
            return None
        fault, self._fault = self._fault, None
        return fault

    def write(self, value: bytes = b"v", name: str = "id", **config: Any) -> None:
        producer = self.clients.KafkaProducer(transactional_id=name, transaction_timeout_ms=5_000, **config)
        producer.init_transactions()
        self.steps.append("init")
        producer.begin_transaction()
        future = producer.send("out", value=value, key=b"k", partition=0)
        producer.flush()
        assert future.succeeded()
        self.steps.append("flushed")
        producer.commit_transaction()
        self.steps.append("committed")

    def values(self) -> list[bytes | None]:
        return [entry.value for entry in self.cluster.read("out", 0)]


@pytest.mark.parametrize(
    ("point", "fault", "values"),
    [
        ("producer.init", "kill-before", []),
        ("producer.begin", "kill-after", []),
        ("producer.produce", "kill-after", []),
        ("producer.end:commit", "kill-before", []),
        ("producer.end:commit", "kill-after", [b"v"]),
    ],
)
def test_a_killed_process_is_gone_where_it_stood(point: str, fault: Any, values: list[bytes]) -> None:
    """What it had asked for has happened, nothing after that; what it left open is aborted in time."""
    play = Play(point=point, fault=Fault(fault))
    process = play.world.spawn("a", play.write)
    play.world.run(until=60.0)
    assert process.done
    assert "committed" not in play.steps
    assert play.values() == values
    assert play.cluster.partition(OUT).stable == play.cluster.partition(OUT).high
    assert play.world.counts[point][fault] == 1


def test_a_killed_process_changes_nothing_while_it_falls() -> None:
    """Its own `finally` blocks run, but a client call in them is one more `Killed`."""
    play = Play()
    seen: list[str] = []

    def service() -> None:
        producer = play.clients.KafkaProducer()
        try:
            play.world.sleep(100.0)
        finally:
            try:
                producer.send("out", value=b"v", key=b"k")
            except Killed:
                seen.append("killed")

    process = play.world.spawn("a", service)
    play.world.at(5.0, lambda: play.world.kill(process))
    play.world.run(until=200.0)
    assert seen == ["killed"]
    assert play.values() == []


def test_a_zombie_is_fenced_when_it_wakes() -> None:
    """A process that is paused before its commit finds that a successor has taken its transactional id."""
    play = Play(point="producer.end:commit", fault=Fault("pause-before", 30.0))
    errors: list[BaseException] = []

    def zombie() -> None:
        try:
            play.write(b"zombie")
        except ProducerFencedError as error:
            errors.append(error)

    play.world.spawn("zombie", zombie)
    play.world.at(10.0, lambda: play.world.spawn("b", lambda: play.write(b"successor")))
    play.world.run(until=60.0)
    assert play.values() == [b"successor"]
    assert len(errors) == 1
    assert play.world.counts["producer.end:commit"] == {"reached": 2, "pause-before": 1}


@pytest.mark.parametrize("kind", ["lost", "twice"])
def test_a_request_that_is_repeated_is_harmless_by_itself(kind: Any) -> None:
    """An answer that is lost makes the client ask again; the broker knows the batch and the outcome."""
    for point in ("producer.init", "producer.add_partitions", "producer.produce", "producer.end:commit"):
        play = Play(point=point, fault=Fault(kind, 2.0))
        play.world.call(play.write)
        play.world.run(until=20.0)
        assert play.values() == [b"v"], point


def test_a_late_end_of_a_transaction_ends_the_next(seed: int = 3) -> None:
    """KIP-890, which this client does not know: a copy that arrives late commits what was only begun."""
    play = Play(seed, "producer.end:commit", Fault("twice", 1.0))

    def service() -> None:
        producer = play.clients.KafkaProducer(transactional_id="id", linger_ms=0)
        producer.init_transactions()
        for value in (b"first", b"torn"):
            producer.begin_transaction()
            producer.send("out", value=value, key=b"k", partition=0)
            producer.flush()
            if value == b"first":
                producer.commit_transaction()
        play.world.sleep(30.0)

    process = play.world.spawn("a", service)
    play.world.run(until=20.0)
    assert play.values() == [b"first", b"torn"]
    play.world.kill(process)


@pytest.mark.parametrize(("kind", "committed"), [("silent", True), ("late", True)])
def test_a_call_without_an_answer_is_given_up_at_its_deadline(kind: Any, committed: bool) -> None:
    """`within` raises Blocked; what was asked for happens all the same, at once or later."""
    play = Play(point="producer.end:commit", fault=Fault(kind, 3.0))
    caught: list[float] = []

    def service() -> None:
        try:
            play.world.within(2.0, play.write)
        except Blocked:
            caught.append(play.world.now)
        play.world.sleep(10.0)

    play.world.spawn("a", service)
    play.world.run(until=30.0)
    assert caught and 2.0 <= caught[0] < 2.1
    assert "committed" not in play.steps
    assert (play.values() == [b"v"]) is committed


def test_without_a_deadline_silence_makes_a_producer_useless() -> None:
    """After the request timeout the client says that it does not know why, and nothing can be done with it."""
    play = Play(point="producer.end:commit", fault=Fault("silent"))
    with pytest.raises(KafkaError, match="unknown reasons"):
        play.world.call(play.write)


def test_what_goes_on_behind_a_deadline_ends_with_its_process() -> None:
    """A call that was given up still runs, until its process does not."""
    play = Play()
    steps: list[str] = []

    def endless() -> None:
        while True:
            play.world.sleep(1.0)
            steps.append("behind")

    def service() -> None:
        with pytest.raises(Blocked):
            play.world.within(2.5, endless)
        play.world.sleep(2.0)
        steps.append("end")

    play.world.spawn("a", service)
    play.world.run(until=30.0)
    assert steps == ["behind", "behind", "behind", "behind", "end"]


def test_an_outage_ends() -> None:
    """Requests wait for the broker; those with a time limit tell when it is over."""
    play = Play()
    play.world.outage(20.0)
    with pytest.raises(KafkaTimeoutError):
        play.world.call(lambda: play.clients.KafkaConsumer(bootstrap_timeout_ms=5_000))
    play.world.call(play.write)
    assert play.world.now > 20.0
    play.world.run(until=30.0)
    assert play.values() == [b"v"]


def test_one_process_can_be_cut_off() -> None:
    """Others go on meanwhile."""
    play = Play()
    first = play.world.spawn("a", lambda: play.write(b"a", "a"))
    play.world.cut_off(first, 10.0)
    play.world.spawn("b", lambda: play.write(b"b", "b"))
    play.world.run(until=5.0)
    assert play.values() == [b"b"]
    play.world.run(until=15.0)
    assert play.values() == [b"b", b"a"]


@pytest.mark.parametrize(("kind", "written"), [("expired", []), ("expired-sent", [b"v"])])
def test_a_batch_that_expires_may_have_been_written(kind: Any, written: list[bytes]) -> None:
    """K1: its future fails, and the transaction commits whatever there is."""
    play = Play(point="producer.produce", fault=Fault(kind))

    def service() -> None:
        producer = play.clients.KafkaProducer(transactional_id="id", delivery_timeout_ms=3_000)
        producer.init_transactions()
        producer.begin_transaction()
        future = producer.send("out", value=b"v", key=b"k", partition=0)
        producer.flush()
        assert isinstance(future.exception, KafkaTimeoutError)
        producer.commit_transaction()

    play.world.call(service)
    play.world.run(until=20.0)
    assert play.values() == written


def test_compaction_keeps_the_last_of_each_key() -> None:
    """Offsets stay, aborted records go, nothing after the last stable offset is touched; tombstones go when told."""
    play = Play()
    log = play.cluster.create("log", configs={"cleanup.policy": "compact"}).partitions[0]
    for key, value in [(b"a", b"1"), (b"b", b"1"), (b"a", b"2"), (b"b", None), (b"a", b"3")]:
        play.cluster.append("log", 0, key, value)
    log.compact(upto=4)
    assert [(e.offset, e.key, e.value) for e in play.cluster.read("log", 0)] == [
        (2, b"a", b"2"), (3, b"b", None), (4, b"a", b"3")
    ]  # fmt: skip
    log.compact(tombstones=True)
    assert [(e.offset, e.value) for e in play.cluster.read("log", 0)] == [(4, b"3")]
    assert (log.low, log.high) == (0, 5)


def told(seed: int) -> list[str]:
    """Everything that happens in a busy run with faults."""
    lines: list[str] = []
    play = Play(seed)
    chance = play.world.random

    def schedule(process: Process, point: str, count: int) -> Fault | None:
        kinds: list[Any] = ["kill-after", "pause-before", "lost", "late", "twice"]
        return Fault(chance.choice(kinds), 4.0) if chance.random() < 0.02 else None

    play.world.schedule = schedule
    play.world.trace = lines.append
    play.cluster.create("in", partitions=4)

    def member() -> None:
        consumer = play.clients.KafkaConsumer(
            group_id="g", auto_offset_reset="earliest", partition_assignment_strategy=(CooperativeStickyAssignor(),),
            session_timeout_ms=3_000, heartbeat_interval_ms=500,
        )  # fmt: skip
        consumer.subscribe(["in"])
        while True:
            for tp, records in consumer.poll(timeout_ms=200).items():
                lines.append(f"{play.world.now} got {tp} {[record.offset for record in records]}")

    def enduring() -> None:
        with suppress(KafkaError):
            member()

    def again(name: str) -> Callable[[Process], object]:
        return lambda _: play.world.spawn(name, enduring, 1.0, again(name))

    for name in "abc":
        play.world.spawn(name, enduring, on_exit=again(name))
    for number in range(100):
        play.world.at(number * 0.2, lambda number=number: play.cluster.append("in", number % 4, b"k", b"v"))  # type: ignore[misc]
    play.world.run(until=30.0)
    return lines


def test_a_run_is_a_function_of_its_seed() -> None:
    """The same seed tells the same, also in another process that hashes strings otherwise; another seed does not."""
    lines = told(5)
    assert len(lines) > 500
    assert told(5) == lines
    assert told(6) != lines
    root = Path(__file__).resolve().parents[2]
    code = "from tests.simulation.test_world import told; import zlib; print(zlib.crc32(repr(told(5)).encode()))"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        run = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert int(run.stdout) == zlib.crc32(repr(lines).encode())


def test_every_point_is_listed() -> None:
    """A schedule that walks over `POINTS` leaves none out: nothing in the clients names another."""
    named = set()
    for path in Path(__file__).parent.glob("*.py"):
        if not path.name.startswith("test_"):
            named |= set(re.findall(r'"((?:admin|consumer|producer)\.[a-z_:]+)"', path.read_text()))
    assert named == set(POINTS)
