"""Bringing partitions back: in slices, from what is committed, and never on the strength of one look."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from statestep.consumers import restore
from statestep.consumers.changelog import MARKER
from statestep.consumers.checkpoint import Policies, Stop
from statestep.consumers.memory import MemoryBroker, MemoryChangelog, MemorySource
from statestep.consumers.metrics import Metrics
from statestep.consumers.ports import Blocked, BrokerError, Committed, StateRecord
from statestep.consumers.transaction import Limits

from .runs import Clock, Crash, Crashing, Script, answers, expect_rebuilt, expect_whole, filled, marker_of, service

SLOW = Limits(0.0, 120, snapshot_interval_s=3600.0)


def cut(count: int = 120) -> MemoryBroker:
    """What a run leaves that answered everything and was killed with most states unwritten."""
    broker = filled(count)
    crashing = Crashing(broker, "poll", 3, False)
    with pytest.raises(Crash):
        service(broker, crashing, crashing, limits=SLOW).run()
    return broker


class Counting(MemoryChangelog):
    """Counts how often each partition is opened; `at_open` may change the world before that."""

    def __init__(self, broker: MemoryBroker, at_open: Any = None):
        super().__init__(broker)
        self.opened: list[int] = []
        self._at_open = at_open

    def open(self, partition: int, position: int | None = None) -> bool:
        self.opened.append(partition)
        if self._at_open is not None:
            self._at_open(self.opened)
        return super().open(partition, position)


class Dry(MemoryChangelog):
    """Gives nothing, and is never at its end."""

    def read(self, max_records: int) -> Sequence[StateRecord]:
        return []

    def finished(self, partition: int) -> bool:
        return False


def test_others_go_on_while_a_partition_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """States come back a slice at a time; between two slices records of partitions that run are answered."""
    monkeypatch.setattr(restore, "SLICE", 1)
    broker, registry, answered = filled(), CollectorRegistry(), []
    service(broker, MemorySource(broker, [0])).run()
    assert len(broker.changelog[0]) > 10
    before = len(broker.messages)

    def look() -> bool:
        if registry.get_sample_value("statestep_partitions_restoring", {"topic": "memory"}) == 1:
            answered.append(len(broker.messages))
        return False

    service(broker, metrics=Metrics(registry, "memory")).run(look)
    assert answered and answered[-1] > before, "nothing was answered meanwhile"
    expect_whole(broker)
    expect_rebuilt(broker)


@pytest.mark.parametrize("size", [1, 2, 20_000])
def test_the_size_of_slices_does_not_matter(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Whatever is read at a time, the states are the same, and so is what follows."""
    monkeypatch.setattr(restore, "SLICE", size)
    broker = cut()
    expect_rebuilt(broker)
    assert service(broker).run().replayed > 0
    for record in [r for log in filled(140).log for r in log]:
        if record.offset >= len(broker.log[record.partition]):
            broker.append(record.partition, record.key, record.value)
    service(broker).run()
    expect_whole(broker, count=140)


class TestStop:
    """What would stop the service is looked at twice."""

    def test_what_is_still_so_at_the_second_look_stops(self) -> None:
        """Both are read anew: the committed offset, and the changelog from its beginning."""
        broker = cut()
        broker.offsets[1] = Committed(3, "")
        changelog = Counting(broker)
        with pytest.raises(Stop, match="memory partition 1: offset 3 is committed"):
            service(broker, MemorySource(broker, [1]), changelog=changelog).run()
        assert changelog.opened == [1, 1]

    def test_what_is_not_so_any_more_goes_on(self) -> None:
        """Another member's last transaction came between the answer for the offset and that of the changelog."""
        broker = cut()
        agreed = broker.offsets[1]

        def heal(opened: list[int]) -> None:
            if len(opened) == 2:
                broker.offsets[1] = agreed

        broker.offsets[1] = Committed(3, "")
        source = Script(broker, {}, 6)
        source._changes.clear()
        source.assign(1)
        looks = iter([Committed(3, ""), agreed])
        source.committed = lambda partition: next(looks)  # type: ignore[method-assign]
        changelog = Counting(broker, heal)
        service(broker, source, changelog=changelog).run()
        assert changelog.opened == [1, 1]
        expect_whole(broker)

    def test_a_corrupt_record_stops_and_is_named(self) -> None:
        """A bit that was turned is never used; nothing is answered."""
        broker = filled()
        service(broker).run()
        at, record = next((i, r) for i, r in enumerate(broker.changelog[2]) if r.key != MARKER and r.value)
        for i, other in enumerate(broker.changelog[2]):
            if other.key == record.key:  # the last one counts, so all of the stream's
                value = bytearray(other.value or b"x")
                value[len(value) // 2] ^= 4
                broker.changelog[2][i] = other._replace(value=bytes(value))
        count = len(broker.messages)
        with pytest.raises(Stop, match=rf"partition 2: record \d+ of changelog partition 2, stream {record.key[1:]!r}"):
            service(broker).run()
        assert len(broker.messages) == count
        assert at >= 0

    def test_a_corrupt_marker_stops(self) -> None:
        """Without a marker that can be believed nothing is."""
        broker = cut()
        broker.changelog[0] = [r._replace(value=b"{}") if r.key == MARKER else r for r in broker.changelog[0]]
        with pytest.raises(Stop, match="the marker of changelog partition 0 is damaged"):
            service(broker).run()


class TestBroker:
    """A broker that does not answer is waited for."""

    @pytest.mark.parametrize("question", ["identity", "committed", "bounds"])
    @pytest.mark.parametrize("times", [1, 3])
    def test_each_question_is_asked_again(self, question: str, times: int) -> None:
        """Nothing that was found out before the silence is lost: neither a marker nor a state."""
        broker, clock = cut(), Clock(0.3)
        source = MemorySource(broker)
        real, left = getattr(source, question), [times]

        def silent(*args: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                raise BrokerError("nobody answers")
            return real(*args)

        setattr(source, question, silent)
        if question == "bounds":
            broker.offsets.clear()  # going on by the marker alone: without it this would be a new application
        assert service(broker, source, clock=clock).run().replayed > 0
        expect_whole(broker)
        expect_rebuilt(broker)

    def test_a_changelog_that_does_not_move_is_given_up(self) -> None:
        """Longer than a transaction may hold it up, and the process ends, to be started again."""
        broker = cut()
        with pytest.raises(Blocked, match="restoring partition 0 has not moved for 40 s"):
            service(broker, changelog=Dry(broker), clock=Clock(0.5)).run()


def test_a_restore_that_is_cut_again_and_again_makes_progress() -> None:
    """Snapshots of replayed streams count: `redo` moves although no life is long enough for the whole replay."""
    broker = cut()
    redos = []
    for _ in range(60):
        seen = marker_of(broker, 0)
        assert seen is not None
        redos.append(seen.redo)
        if seen.redo == seen.next:
            break
        crashing = Crashing(broker, "commit", 2, True)
        with pytest.raises(Crash):
            service(broker, crashing, crashing, limits=Limits(0.0, 3, snapshot_interval_s=0.01)).run()
        expect_rebuilt(broker)
    assert redos == sorted(redos) and redos[-1] > redos[0]
    service(broker).run()
    expect_whole(broker)


def test_records_of_another_epoch_are_void() -> None:
    """After a cold start old states stay in the changelog until compaction; a stream that is new has step 1."""
    broker = filled(bad=False)
    service(broker).run()
    voided = marker_of(broker, 1)
    assert voided is not None
    broker.offsets[1] = Committed(0, "")
    service(broker, policies=Policies(offset_mismatch="cold")).run()
    again = [json.loads(m.value or b"") for (_, p, _), m in answers(broker.messages)[120:] if p == 1]
    first = [json.loads(m.value or b"") for (_, p, _), m in answers(broker.messages)[:120] if p == 1]
    assert again == first
    seen = marker_of(broker, 1)
    assert seen is not None and seen.epoch == voided.epoch + 1
