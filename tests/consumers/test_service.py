"""The loop: partitions come and go, commits are refused, signals come, and every record is answered in order."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from statestep.consumers.memory import MemoryBroker, MemorySource
from statestep.consumers.pipeline import BadMessage
from statestep.consumers.report import Summary
from statestep.consumers.service import POLL_S
from statestep.consumers.transaction import Limits
from statestep.runtime import CapacityError

from .runs import SMALL, Clock, Script, expect_rebuilt, expect_whole, filled, marker_of, service


@pytest.mark.parametrize("limits", [SMALL, Limits(0.0, 1), Limits(0.0, 4096), Limits(0.05, 50)])
def test_the_size_of_batches_does_not_matter(limits: Limits) -> None:
    """Records one by one, by sevens or all at once: the same outputs, bit for bit, and everything committed."""
    broker = filled()
    summary = service(broker, limits=limits).run()
    expect_whole(broker)
    assert summary.consumed == 120
    assert summary.consumed == summary.predicted + summary.refused + summary.tombstones
    assert summary.reasons == {"malformed": summary.refused}
    assert {p: committed.offset for p, committed in broker.offsets.items()} == {
        p: len(log) for p, log in enumerate(broker.log)
    }


@pytest.mark.parametrize("lost", [False, True])
def test_partitions_that_go_and_come_back_go_on(lost: bool) -> None:
    """Revoked or lost in the midst, then assigned again: what is committed holds, states are replayed."""
    broker = filled()
    script = {
        4: lambda source: source.revoke(0, 2, lost=lost),
        8: lambda source: source.assign(2),
        10: lambda source: source.revoke(1, lost=lost),
        11: lambda source: (source.assign(0), source.assign(1)),
        13: lambda source: (source.revoke(2), source.assign(2)),
    }
    service(broker, Script(broker, script, 14)).run()
    expect_whole(broker)


def test_records_of_a_partition_that_is_gone_are_forgotten() -> None:
    """What waited in the buffer is neither applied nor committed, and the service does not spin once it was due."""
    broker, clock = filled(), Clock()

    def be_late(source: Script) -> None:
        clock.now_s += 100.0

    source = Script(broker, {4: lambda s: s.revoke(0, 1, 2), 5: be_late}, 8)
    run = service(broker, source, limits=Limits(commit_interval_s=50.0, batch_records=5000), clock=clock)
    summary = run.run()
    assert summary == Summary()
    assert broker.messages == []
    assert source.timeouts[-2:] == [POLL_S, POLL_S]
    assert run.pager.pages().streams(5)["streams"] == 0
    service(broker).run()
    expect_whole(broker)


def test_two_members_share_a_topic() -> None:
    """Each with its own partitions, one taking over the other's: together they answer everything once."""
    broker = filled()
    service(broker, MemorySource(broker, partitions=[0, 2])).run()
    service(broker, MemorySource(broker, partitions=[1])).run()
    expect_whole(broker)


def test_a_bad_message_under_the_policy_fail_stops_before_its_batch() -> None:
    """Nothing of the batch is answered or committed, and the engine is as it was."""
    broker = MemoryBroker(1)
    for value in (b"[1, 2]", b"[3, 4]", b"{"):
        broker.append(0, b"k", value)
    run = service(broker, policy="fail")
    with pytest.raises(BadMessage, match="partition 0, offset 2"):
        run.run()
    assert broker.messages == []
    assert (broker.offsets[0].offset, run.pager.pages().streams(0)["streams"]) == (0, 0)


def test_streams_that_ended_make_room_for_others() -> None:
    """A table of two takes any number of streams, if each is ended by a tombstone before the third begins."""
    broker = MemoryBroker(1)
    for number in range(10):
        broker.append(0, b"%d" % number, b"[1, 2]")
        broker.append(0, b"%d" % number, None)
    summary = service(broker, max_streams=2, limits=Limits(0.0, 3)).run()
    assert (summary.predicted, summary.tombstones) == (10, 10)
    assert {json.loads(m.value)["step"] for m in broker.outputs if m.value is not None} == {1}


def test_one_stream_too_many_stops_the_service_and_loses_nothing() -> None:
    """What was answered before is committed; the batch with the stream too many is not; more room goes on."""
    broker = MemoryBroker(1)
    for number in range(4):
        broker.append(0, b"%d" % number, b"[1, 2]")
    with pytest.raises(CapacityError, match="max_streams is 3"):
        service(broker, max_streams=3, limits=Limits(0.0, 2)).run()
    assert [json.loads(m.value or b"")["stream"] for m in broker.outputs] == ["0", "1"]
    assert broker.offsets[0].offset == 2
    service(broker, max_streams=4).run()
    assert [json.loads(m.value or b"")["stream"] for m in broker.outputs] == ["0", "1", "2", "3"]


# One transaction for all, and next to no states with it, nor any time for them after the signal.
HASTY = Limits(5.0, 120, snapshot_interval_s=36_000.0, snapshot_bytes=1, drain_s=0.0)


class TestStopping:
    """A signal ends the loop in order."""

    def test_what_was_taken_is_finished(self) -> None:
        """Records that wait for others are applied, answered and committed at once."""
        broker = filled()
        run = service(broker, limits=Limits(commit_interval_s=3600.0, batch_records=10_000))
        summary = run.run(told_after(2))
        assert summary.consumed == 120
        expect_whole(broker)
        assert {p: c.offset for p, c in broker.offsets.items()} == {p: len(log) for p, log in enumerate(broker.log)}

    def test_a_service_that_is_told_before_it_began_ends(self) -> None:
        """Nothing is owned yet, so there is nothing to finish; nothing is lost for the next one."""
        broker = filled()
        service(broker).run(lambda: True)
        service(broker).run()
        expect_whole(broker)

    def test_the_states_are_written_so_that_the_next_start_has_nothing_to_replay(self) -> None:
        """However long the snapshot interval: the signal has all states written, a few at a time, up to redo = next."""
        broker = filled(bad=False)
        limits = Limits(0.0, 7, snapshot_interval_s=36_000.0, snapshot_bytes=300)
        service(broker, Script(broker, {}, 10_000), limits=limits, clock=Clock()).run(told_after(20))
        for partition in range(3):
            seen = marker_of(broker, partition)
            assert seen is not None
            assert (seen.redo, seen.records) == (seen.next, 0)
        expect_rebuilt(broker)
        assert service(broker).run().replayed == 0
        expect_whole_without_bad(broker)

    def test_what_is_not_written_in_time_is_left_to_the_next_start(self, caplog: pytest.LogCaptureFixture) -> None:
        """The bound is kept even if states are left, with a warning, and the next start replays them."""
        broker = filled(bad=False)
        service(broker, Script(broker, {}, 10_000), limits=HASTY, clock=Clock()).run(told_after(1))
        assert "stopping with states to write" in caplog.text
        expect_rebuilt(broker)
        assert service(broker).run().replayed > 0
        expect_whole_without_bad(broker)

    def test_in_the_midst_of_a_replay_nothing_is_answered(self) -> None:
        """The offset stays where answers end, states that were replayed are kept, and the next start does the rest."""
        broker = filled(bad=False)
        service(broker, Script(broker, {}, 10_000), limits=HASTY, clock=Clock()).run(told_after(1))
        offsets, count = {p: c.offset for p, c in broker.offsets.items()}, len(broker.messages)
        assert count == 120
        summary = service(broker).run(told_after(6))
        assert 0 < summary.replayed < 120
        assert ({p: c.offset for p, c in broker.offsets.items()}, len(broker.messages)) == (offsets, count)
        expect_rebuilt(broker)
        service(broker).run()
        expect_whole_without_bad(broker)


def told_after(rounds: int) -> Callable[[], bool]:
    """A signal that comes after so many rounds of the loop."""
    count = iter(range(1_000_000))
    return lambda: next(count) > rounds


def expect_whole_without_bad(broker: MemoryBroker) -> None:
    """As `expect_whole`, for records none of which is bad."""
    other = filled(bad=False)
    service(other).run()
    assert sorted(broker.messages, key=str) == sorted(other.messages, key=str)
