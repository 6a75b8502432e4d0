"""What befalls the runs of mutations: faults that come again and again, damage, and the scenarios made of them."""

from __future__ import annotations

import uuid
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from kafka.structs import OffsetAndMetadata, TopicPartition

from statestep.consumers.changelog import MARKER

from .feed import TOPIC
from .harness import Run
from .invariants import APP, CHANGELOG, RECORD
from .mutants import Happens, Scenario
from .world import Fault, Process

UNTIL_S = 10.0  # nothing befalls a run after it


def both(*happenings: Happens) -> Happens:
    """One thing and the other."""

    def happen(run: Run) -> None:
        for one in happenings:
            one(run)

    return happen


def strikes(kind: Any, point: str, every: int, seconds: float = 2.0, after_s: float = 1.0) -> Happens:
    """A fault at every so many-th time that anybody comes by a point."""

    def happen(run: Run) -> None:
        before, reached = run.world.schedule, [0]

        def schedule(process: Process, name: str, count: int) -> Fault | None:
            if name == point and after_s <= run.world.now < UNTIL_S:
                reached[0] += 1
                if reached[0] % every == 0:
                    return Fault(kind, seconds)
            return before(process, name, count) if before is not None else None

        run.world.schedule = schedule

    return happen


def kills(*times_s: float) -> Happens:
    """All processes die at these times."""

    def happen(run: Run) -> None:
        for time_s in times_s:
            run.world.at(time_s, lambda: _kill_all(run))

    return happen


def pauses(name: str, seconds: float, *times_s: float) -> Happens:
    """One process stands still at these times, perhaps for longer than the others wait for it."""
    return _at(times_s, name, lambda run: run.world.pause(run.alive[name], seconds))


def expelled(run: Run) -> None:
    """Process a stands still while it joins, b has all meanwhile and then stands still too: a is given it back."""
    before = run.world.schedule
    struck: list[str] = []

    def schedule(process: Process, name: str, count: int) -> Fault | None:
        if name == "consumer.join" and process.name == "a" and count > 1 and not struck:
            struck.append(name)
            run.world.at(run.world.now + 3.5, lambda: run.world.pause(run.alive["b"], 6.0))
            return Fault("pause-after", 5.0)
        return before(process, name, count) if before is not None else None

    run.world.schedule = schedule


def between(run: Run) -> None:
    """Process a dies between the two rounds of a rebalance, and comes back."""
    before = run.world.schedule
    struck: list[str] = []

    def schedule(process: Process, name: str, count: int) -> Fault | None:
        if name == "consumer.sync" and process.name == "a" and count > 1 and not struck:
            struck.append(name)
            return Fault("kill-after", 0.0)
        return before(process, name, count) if before is not None else None

    run.world.schedule = schedule


def overtaken(run: Run) -> None:
    """A transaction fails, and its process stands still before it can ask why; meanwhile the other one has the
    partition, commits a transaction of the same number and the same message, and stands still in its turn."""
    before = run.world.schedule
    struck: list[Process] = []
    story: list[tuple[str, Fault]] = [
        ("producer.produce", Fault("expired", 2.0)),
        ("producer.init", Fault("pause-before", 4.5)),
        ("producer.end:commit", Fault("pause-after", 6.0)),
    ]

    def schedule(process: Process, name: str, count: int) -> Fault | None:
        if run.world.now > 3.0 and len(struck) < len(story):
            point, fault = story[len(struck)]
            same = not struck or (process is struck[0]) == (len(struck) == 1)
            if name == point and same:
                struck.append(process)
                return fault
        return before(process, name, count) if before is not None else None

    run.world.schedule = schedule


def leaves(name: str, *times_s: float) -> Happens:
    """One process is asked to stop at these times, and comes again."""
    return _at(times_s, name, lambda run: run.sigterm(name))


def _at(times_s: Sequence[float], name: str, do: Happens) -> Happens:
    def now(run: Run) -> None:
        if name in run.alive:
            do(run)

    def happen(run: Run) -> None:
        for time_s in times_s:
            run.world.at(time_s, lambda: now(run))

    return happen


def lasts(run: Run, until_s: float) -> None:
    """The run does not end before, though all is answered."""
    unanswered = run.watch.unanswered
    run.watch.unanswered = lambda: 1 if run.world.now < until_s else unanswered()  # type: ignore[method-assign]


def _kill_all(run: Run) -> None:
    for process in list(run.alive.values()):
        if process.reached:  # it has begun
            run.world.kill(process)


def _after_a_kill(damage: Callable[[Run, int], None]) -> Happens:
    """All die, and each partition is damaged before the next begin, where it has something to replay."""

    def happen(run: Run) -> None:
        def strike() -> None:
            waiting = {p: d.marker for p, d in enumerate(run.watch.durable) if d.marker is not None}
            found = [partition for partition, marker in waiting.items() if marker.records > 1]
            if run.alive and found:
                _kill_all(run)
                for partition in found:
                    damage(run, partition)
            elif run.world.now < UNTIL_S:
                run.world.at(run.world.now + 0.05, strike)

        run.world.at(4.0, strike)

    return happen


def _corrupted(run: Run, partition: int) -> None:
    for entry in run.cluster.read(CHANGELOG, partition):
        if entry.key not in (None, MARKER) and entry.value:
            entry.value = entry.value[:-5] + bytes([entry.value[-5] ^ 1]) + entry.value[-4:]


def _with_a_hole(run: Run, partition: int) -> None:
    marker, log = run.watch.durable[partition].marker, run.cluster.partition((TOPIC, partition))
    assert marker is not None
    records = run.feed.records[partition]
    gone = records[bisect_left(records, marker.redo)]
    log.entries = [entry for entry in log.entries if entry.offset != gone]


def _cut_short(run: Run, partition: int) -> None:
    marker = run.watch.durable[partition].marker
    assert marker is not None
    run.cluster.partition((TOPIC, partition)).delete_before(marker.redo + 1)


def _made_anew(run: Run, partition: int) -> None:
    run.cluster.topics[TOPIC].topic_id = uuid.UUID(int=partition, version=4)


def _reset(run: Run, partition: int) -> None:
    offsets: Any = run.cluster.group(APP).offsets
    tp = TopicPartition(TOPIC, partition)
    offsets[tp] = OffsetAndMetadata(offsets[tp].offset - 1, "", -1)


def _other(setting: str) -> Happens:
    """The next processes have another model or settings."""

    def change(run: Run, _: int) -> None:
        run.patch = lambda service: setattr(service._restorer, setting, "other")

    return _after_a_kill(change)


def counted(most: int) -> Happens:
    """No transaction has more states of a partition than this."""

    def happen(run: Run) -> None:
        def look(transaction: Any) -> None:
            for tp, log in transaction.partitions.items():
                if tp.topic == CHANGELOG:
                    states = len(log.open.get(transaction.producer_id, ())) - 1
                    run.watch.expect(states <= most, "more states than one transaction may hold", states)

        run.watch.on_commit = look

    return happen


def drained(run: Run) -> None:
    """Who is asked to stop leaves nothing to replay."""

    def look(process: Process) -> None:
        if run.alive.get("a") is process:
            run.world.at(run.world.now + 0.02, lambda: look(process))
        else:
            run.watch.expect(not run.watch.dirty(), "a stop by SIGTERM leaves something to replay", run.watch.dirty())

    def stop() -> None:
        if "a" in run.alive:
            process = run.alive["a"]
            run.sigterm("a")
            look(process)

    for time_s in (2.5, 5.0, 7.5, 10.0):
        run.world.at(time_s, stop)


def twin(run: Run) -> None:
    """Another process comes with the same instance id, while there is nothing to do: the first one ends."""

    def come() -> None:
        first = run.alive.get("a")
        run.start("a2", 0.0, again=False)
        run.world.at(20.0, lambda: run.watch.expect(first is None or first.dead, "one who was fenced goes on"))

    run.world.at(13.0, come)
    lasts(run, 21.0)


def hangs(run: Run) -> None:
    """The broker is gone for one process for good, in the middle of a commit: it goes on living."""
    before = run.world.schedule
    hung: list[Process] = []

    def schedule(process: Process, name: str, count: int) -> Fault | None:
        if not hung and name == "producer.end:commit" and run.world.now > 2.0:
            hung.append(process)
            run.world.cut_off(process, 1e6)
            polls = process.reached["consumer.poll"]
            run.world.at(run.world.now + 60.0, lambda: look(process, polls))
        return before(process, name, count) if before is not None else None

    def look(process: Process, polls: int) -> None:
        lives = process.dead or process.reached["consumer.poll"] > polls
        run.watch.expect(lives, "a process waits for ever")

    run.world.schedule = schedule
    lasts(run, 65.0)


def slow(run: Run) -> None:
    """What is decided takes long to be seen everywhere."""
    run.cluster.marker_delay_s = 1.5


PLAIN = Scenario()
HUSHED = Scenario({"silent": True, "keys": 10, "partitions": 1, "gap_s": 0.04}, happens=kills(3.5, 5.0, 6.5, 8.0))
QUIET = Scenario({"snapshot_s": 0.1, "keys": 3, "partitions": 1}, feed_s=1.5, calm_s=0.5, clean_s=0.5)
CRASH = Scenario(happens=kills(2.0, 3.5, 5.0, 6.5, 8.0))
ABORT = Scenario(happens=strikes("expired", "producer.produce", 9))
BUMP = Scenario(happens=strikes("out-of-order", "producer.produce", 9))
IDLE = Scenario({"gap_s": 0.6, "snapshot_s": 1.0}, happens=strikes("expired", "producer.produce", 9))
SILENT = Scenario(happens=strikes("silent", "producer.end:commit", 9))
OFFSETS = Scenario(
    {"partitions": 3, "processes": 2, "transaction_ms": 10_000, "records": 3},
    happens=strikes("pause-before", "producer.offsets", 25, 4.0),
)
LOST = Scenario({"processes": 3, "partitions": 3}, happens=pauses("a", 6.0, 3.0, 6.0), seeds=range(1, 31))
ASLEEP = Scenario({"processes": 2, "gap_s": 0.03}, happens=pauses("a", 3.0, 1.0, 4.5, 8.0), seeds=range(1, 41))
DOUBT = Scenario({"processes": 2}, happens=both(strikes("silent", "producer.end:commit", 9), leaves("b", 3.0, 6.0)))
EXPELLED = Scenario({"processes": 2}, happens=both(leaves("b", 2.0), expelled))
BETWEEN = Scenario({"static": True, "processes": 2}, happens=both(between, leaves("b", 2.0)), bound_s=30.0)
OPENED = Scenario(
    {"processes": 2, "gap_s": 0.03},
    happens=both(strikes("silent", "producer.end:commit", 1, after_s=0.0), leaves("b", 1.0)),
    seeds=range(1, 31),
)
OVERTAKEN = Scenario(
    {"store": True, "store_kept": 1.0, "processes": 2, "partitions": 1, "records": 1, "keys": 10, "snapshot_s": 0.3},
    happens=overtaken,
    bound_s=40.0,
    seeds=range(1, 41),
)
LEAVE = Scenario({"processes": 2}, happens=leaves("b", 3.0, 6.0))
LOOKS = Scenario({"processes": 2}, happens=both(strikes("pause-after", "consumer.committed", 3, 6.0), kills(3.0, 6.0)))
SLOW = Scenario({"processes": 2}, happens=both(slow, leaves("b", 2.0, 4.0, 6.0, 8.0)))
TWICE = Scenario({"exactly_once": False}, happens=strikes("kill-after", "producer.end:commit", 9))
STORE = Scenario(
    {"store": True, "store_kept": 1.0, "max_streams": 8, "keys": 10, "records": 3},
    happens=both(strikes("expired", "producer.produce", 9), kills(3.0, 6.0)),
)
AWAY = Scenario(
    {"store": True, "store_kept": 1.0, "processes": 2}, happens=both(leaves("b", 2.0, 6.0), leaves("a", 4.0, 8.0))
)
POISON = Scenario({"poisoned": True, "records": 40, "snapshot_s": 0.3}, feed_s=12.0)
LEFT = Scenario({"leftovers": True}, happens=kills(3.0, 6.0))
PACED = Scenario({"snapshot_bytes": 2 * RECORD.size, "partitions": 1}, happens=counted(2))
DRAINED = Scenario({"snapshot_s": 9.0, "keys": 10}, happens=drained, feed_s=12.0)
TWIN = Scenario({"static": True, "partitions": 1}, happens=twin)
HANGS = Scenario({"processes": 2}, happens=hangs, bound_s=90.0)
CORRUPTED = Scenario(happens=_after_a_kill(_corrupted), says="its checksum does not match")
HOLE = Scenario(happens=_after_a_kill(_with_a_hole), says="than were applied before")
SHORT = Scenario(bound_s=6.0, happens=_after_a_kill(_cut_short), says="are kept only from")
ANEW = Scenario(happens=_after_a_kill(_made_anew), says="was deleted and made anew")
RESET = Scenario(happens=_after_a_kill(_reset), says="choose by --on-offset-mismatch")
MODEL = Scenario(happens=_other("_model"), says="the states were made by model")
SEMANTICS = Scenario(happens=_other("_semantics"), says="decides states has changed")
