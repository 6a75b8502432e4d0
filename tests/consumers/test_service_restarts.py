"""Restarts: wherever a run is cut and taken up again, the outputs are those of a run that was never cut."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from statestep.consumers.checkpoint import Policies, Stop
from statestep.consumers.memory import MemoryBroker, MemorySink, MemorySource
from statestep.consumers.ports import Committed, Identity, Polled, Rejected, Transaction, Undecided
from statestep.consumers.report import Summary
from statestep.consumers.store import Store
from statestep.consumers.transaction import Limits

from .runs import (
    MODEL,
    OTHER_MODEL,
    SMALL,
    Clock,
    Crash,
    Crashing,
    Script,
    answers,
    expect_rebuilt,
    expect_whole,
    filled,
    marker_of,
    service,
    whole,
)

SLOW = Limits(0.0, 7, snapshot_interval_s=3600.0)  # next to no snapshots: a restart replays


@pytest.mark.parametrize("effect", ["poll", "commit", "seek"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("limits", [SMALL, SLOW])
def test_a_run_cut_anywhere_goes_on_with_the_same_bits(effect: str, after: bool, at: int, limits: Limits) -> None:
    """Killed before or after any effect and started anew: nothing is missing, and nothing is doubled."""
    broker = filled()
    crashing = Crashing(broker, effect, at, after)
    try:
        service(broker, crashing, crashing, limits=limits).run()
    except Crash:
        expect_rebuilt(broker)
    else:
        assert effect == "seek" and at > 3, "the run was not cut"
    answered = len(broker.messages)
    summary = service(broker, limits=limits).run()
    expect_whole(broker)
    expect_rebuilt(broker)
    assert summary.predicted + summary.refused + summary.tombstones == 120 - answered


class Life(MemorySource, MemorySink):
    """One process's source and sink, to which anything may happen, as a seed has it."""

    def __init__(self, broker: MemoryBroker, draw: random.Random, clock: Clock, cursed: set[tuple[int, int]]):
        MemorySource.__init__(self, broker)
        MemorySink.__init__(self, broker)
        self._draw, self._clock, self._cursed = draw, clock, cursed

    def close(self) -> None:
        MemorySource.close(self)

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        luck = self._draw.random()
        if luck < 0.03:
            raise Crash
        if luck < 0.06:
            self.revoke(self._draw.randrange(3), lost=self._draw.random() < 0.5)
        if luck < 0.12:
            self.assign(*[p for p in range(3) if self.broker.owner.get(p) is not self][:1])
        if luck < 0.15:
            self.unsettle()
        self._clock.now_s += self._draw.choice([0, 0.05, 1.0])
        return MemorySource.poll(self, timeout_s, max_records)

    def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        luck = self._draw.random()
        if luck < 0.04:
            raise Crash
        if luck < 0.15:
            self.fail_next(Undecided("nothing was heard"), counts=luck > 0.10)
        for (dead, partition, offset), message in answers(transaction.messages):
            if (partition, offset) in self._cursed and (not dead or (offset % 2 and message.value)):
                raise Rejected("too large")
        positions = MemorySink.commit(self, transaction, membership)
        if self._draw.random() < 0.1:  # each time would take too long
            expect_rebuilt(self.broker)
        if luck > 0.96:
            raise Crash
        return positions


def live(seed: int, lives: int, count: int, folder: Path | None) -> None:
    """Lives with accidents, each with limits of its own, then a quiet one; the judge at the end."""
    draw, broker, clock = random.Random(seed), filled(count, seed), Clock()
    cursed = {(draw.randrange(3), draw.randrange(count // 3)) for _ in range(3)}
    for number in range(lives + 1):
        quiet = number == lives
        limits = Limits(
            draw.choice([0.0, 0.05]),
            draw.choice([1, 7, 30]),
            draw.choice([0.0, 0.3, 10.0]),
            draw.choice([500, 100_000]),
        )
        life = Life(broker, draw, clock, cursed)
        source, sink = (MemorySource(broker), MemorySink(broker)) if quiet else (life, life)
        store, room = None, 1000
        if folder is not None:
            if draw.random() < 0.2:  # another machine, or an empty disk
                Store.discard(folder)
            store, room = Store.open(folder, "test"), draw.choice([6, 8, 1000])
        stop = iter(range(draw.randrange(5, 60)))
        try:
            service(broker, source, sink, limits=limits, clock=clock, store=store, max_streams=room).run(
                lambda quiet=quiet, stop=stop: not quiet and next(stop, None) is None  # type: ignore[misc]
            )
        except Crash:
            pass
        finally:
            if store is not None:
                store.close()
    expect_rebuilt(broker)
    expected, found = whole(count, seed), answers(broker.messages)
    places = Counter((partition, offset) for (_, partition, offset), _ in found)
    assert places == Counter((p, o) for p, log in enumerate(broker.log) for o in range(len(log))), "missing or doubled"
    for place, message in found:
        if place[1:] in cursed:
            assert place[0] or message == expected[place]
        else:
            assert message == expected[place]


@given(st.integers(0, 2**32), st.integers(1, 12))
@settings(max_examples=50)
def test_whatever_happens_the_answers_are_those_of_a_quiet_run(seed: int, lives: int) -> None:
    """Crashes, lost news, moves, refusals, other limits: each record is answered once, bit for bit.

    What is durable rebuilds the states at any time between, too.
    """
    note(f"seed {seed}, {lives} lives")
    live(seed, lives, 80, None)


@pytest.mark.parametrize("seed", range(20))
def test_with_a_local_store_and_little_memory_too(seed: int, tmp_path: Path) -> None:
    """As above, while streams leave memory for the store and come back, and the store itself is lost at times."""
    live(seed, 6, 80, tmp_path / "store")


def test_an_output_that_is_not_acknowledged_is_not_committed() -> None:
    """A transaction that fails leaves nothing behind; the same run answers its records once it may."""
    broker = filled()
    sink = MemorySink(broker)
    for _ in range(4):
        sink.fail_next()
    service(broker, sink=sink).run()
    expect_whole(broker)
    expect_rebuilt(broker)


def test_a_restart_with_nothing_new_answers_nothing() -> None:
    """States are read back, and the next record goes on from them."""
    broker = filled()
    service(broker).run()
    count, offsets = len(broker.messages), dict(broker.offsets)
    assert service(broker).run() == Summary()
    assert (len(broker.messages), broker.offsets) == (count, offsets)
    more = filled(140)
    for log, known in zip(more.log, broker.log, strict=True):
        for record in log[len(known) :]:
            broker.append(record.partition, record.key, record.value)
    assert service(broker).run().consumed == 20
    expect_whole(broker, count=140)


def cut_short(broker: MemoryBroker, polls: int = 6) -> None:
    """A run that is killed with states unwritten."""
    crashing = Crashing(broker, "poll", polls, True)
    with pytest.raises(Crash):
        service(broker, crashing, crashing, limits=SLOW).run()


def test_a_replay_that_changes_nothing_is_over_for_good() -> None:
    """Where only refused messages are replayed no stream becomes dirty; the next restart replays none of them."""
    broker, one_by_one = MemoryBroker(1), Limits(0.0, 1, snapshot_interval_s=0.0)
    for value in (b'{"flow": 1, "pressure": 2}', b"{", b"{"):
        broker.append(0, b"pump", value)
    limits = Limits(0.0, 7, snapshot_interval_s=3600.0)
    for crash, how in (
        (Crashing(broker, "commit", 2, after=True), limits),
        (Crashing(broker, "commit", 1, True), one_by_one),
    ):
        with pytest.raises(Crash):
            service(broker, crash, crash, limits=how).run()
    between = marker_of(broker, 0)
    assert between is not None and (between.redo, between.next, between.records) == (1, 3, 2)
    service(broker).run()
    after = marker_of(broker, 0)
    assert after is not None and (after.redo, after.next, after.records) == (3, 3, 0)


def test_history_that_is_gone_stops_the_service_unless_it_is_told_otherwise() -> None:
    """Messages from `redo` on were deleted: nothing is guessed; `cold` starts that partition's streams anew."""
    broker = filled(bad=False)
    cut_short(broker)
    seen = marker_of(broker, 0)
    assert seen is not None and seen.redo < seen.next
    broker.delete_before(0, seen.redo + 1)
    count = len(broker.messages)
    with pytest.raises(Stop, match=f"messages from {seen.redo} on are kept only from {seen.redo + 1}"):
        service(broker).run()
    assert len(broker.messages) == count
    service(broker, policies=Policies(offset_mismatch="cold")).run()
    again = marker_of(broker, 0)
    assert again is not None and (again.epoch, again.next) == (seen.epoch + 1, len(broker.log[0]))
    first = next(m for (_, p, o), m in answers(broker.messages[count:]) if p == 0)
    assert json.loads(first.value or b"")["step"] == 1


def test_records_deleted_before_they_were_read_stop_the_service() -> None:
    """Retention overtakes a slow reader: what is lost was never answered, so a person has to know."""
    broker = filled(bad=False)
    source = Script(broker, {6: lambda s: s.broker.delete_before(2, 30)}, 9)
    with pytest.raises(Stop, match="partition 2: messages from 0 on are kept only from 30"):
        service(broker, source).run()
    service(broker, policies=Policies(offset_mismatch="skip")).run()
    places = {(p, o) for (_, p, o), _ in answers(broker.messages)}
    assert {o for p, o in places if p == 2} == set(range(30, len(broker.log[2])))


def test_another_model_is_refused_or_starts_cold() -> None:
    """Its streams would go on from states that another made: a person decides, and old records are void then."""
    broker = filled(bad=False)
    service(broker).run()
    count = len(broker.messages)
    with pytest.raises(
        Stop, match=f"made by model {MODEL.fingerprint[:12]} and this is {OTHER_MODEL.fingerprint[:12]}"
    ):
        service(broker, model=OTHER_MODEL).run()
    service(broker, model=OTHER_MODEL, policies=Policies(model_change="cold")).run()
    assert len(broker.messages) == count
    for partition in range(3):
        key = broker.log[partition][0].key
        broker.append(partition, key, b"[1, 2]")
    service(broker, model=OTHER_MODEL).run()
    assert [json.loads(m.value or b"")["step"] for m in broker.outputs[count:]] == [1, 1, 1]


def test_a_topic_with_more_partitions_than_before_stops_the_service() -> None:
    """Keys have moved away from their states: nothing is answered on a guess."""
    broker = filled()
    service(broker).run()
    count = len(broker.messages)
    for held in (broker.log, broker.changelog):
        held.append([])
    broker.first_kept.append(0)
    broker.identity = Identity("memory", 4, True)
    with pytest.raises(Stop, match="had 3 partitions when its streams began and has 4 now"):
        service(broker).run()
    assert len(broker.messages) == count


class TestStart:
    """Where an application that has committed nothing begins."""

    def test_at_the_first_record_that_is_kept(self) -> None:
        """By default history is read from its beginning, which retention may have moved."""
        broker = filled(bad=False)
        broker.delete_before(1, 5)
        assert service(broker).run().predicted == 115

    def test_where_it_is_told(self) -> None:
        """The starting point is written down before anything is read, so a crash begins there again."""
        broker = filled(bad=False)
        crashing = Crashing(broker, "commit", 2, False)
        with pytest.raises(Crash):
            service(broker, crashing, crashing, start=lambda partition: 7).run()
        assert {p: c.offset for p, c in broker.offsets.items()} == {0: 7, 1: 7, 2: 7}
        assert broker.messages == []
        service(broker, start=lambda partition: pytest.fail("it was asked for a start once more")).run()
        assert min(offset for (_, _, offset), _ in answers(broker.messages)) == 7
        assert len(broker.messages) == 120 - 3 * 7

    def test_an_offset_that_another_tool_set_stops_the_service(self) -> None:
        """There are no states to go with it; told so, streams start anew there."""
        broker = filled(bad=False)
        broker.offsets = {0: Committed(10, ""), 1: Committed(0, ""), 2: Committed(3, "x")}
        with pytest.raises(Stop, match="partition 0: offset 10 is committed, but there are no states to go with it"):
            service(broker).run()
        service(broker, policies=Policies(offset_mismatch="cold")).run()
        first = next(m for (_, p, o), m in answers(broker.messages) if (p, o) == (0, 10))
        assert json.loads(first.value or b"")["step"] == 1
        assert len(broker.messages) == 120 - 13
