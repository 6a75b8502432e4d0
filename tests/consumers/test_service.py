"""The loop: partitions come and go, commits are refused, signals come, and every record is answered in order."""

from __future__ import annotations

import json
import time

import pytest
from prometheus_client import CollectorRegistry

from statestep.consumers.memory import MemoryBroker, MemorySource
from statestep.consumers.metrics import Metrics
from statestep.consumers.pipeline import BadMessage
from statestep.consumers.ports import Committed
from statestep.consumers.service import POLL_SECONDS, Limits, Summary
from statestep.runtime import CapacityError

from .runs import (
    SMALL,
    Script,
    expect_whole,
    filled,
    service,
)


@pytest.mark.parametrize("limits", [SMALL, Limits(0.0, 1), Limits(0.0, 4096), Limits(0.05, 50)])
def test_the_size_of_batches_does_not_matter(limits: Limits) -> None:
    """Records one by one, by sevens or all at once: the same outputs, bit for bit, and everything committed."""
    broker = filled()
    summary = service(broker, limits=limits).run()
    expect_whole(broker, doubles=False)
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
    expect_whole(broker, doubles=False)


def test_records_of_a_partition_that_is_gone_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waited in the buffer is neither applied nor committed, and the service does not spin once it was due."""
    broker, now = filled(), [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def be_late(source: Script) -> None:
        now[0] += 100.0

    source = Script(broker, {3: lambda s: s.revoke(0, 1, 2), 4: be_late}, 7)
    run = service(broker, source, limits=Limits(commit_interval_s=50.0, batch_records=5000))
    summary = run.run()
    assert summary == Summary()
    assert broker.messages == []
    assert source.timeouts[-2:] == [POLL_SECONDS, POLL_SECONDS]
    assert run.pages().streams(5)["streams"] == 0
    service(broker).run()
    expect_whole(broker, doubles=False)


def test_two_members_share_a_topic() -> None:
    """Each with its own partitions, one taking over the other's: together they answer everything once."""
    broker = filled()
    service(broker, MemorySource(broker, partitions=[0, 2])).run()
    service(broker, MemorySource(broker, partitions=[1])).run()
    expect_whole(broker, doubles=False)


def test_a_refused_commit_is_tried_again() -> None:
    """The group has moved on for a moment: outputs stand, the run goes on, the offsets are committed at last."""
    broker = filled()
    source = MemorySource(broker)
    source.refuse_next(4)
    metrics = Metrics(CollectorRegistry())
    service(broker, source, metrics=metrics).run()
    expect_whole(broker, doubles=False)
    assert metrics.registry.get_sample_value("statestep_commit_failures_total") == 4
    assert {p: c.offset for p, c in broker.offsets.items()} == {p: len(log) for p, log in enumerate(broker.log)}


def test_a_refused_commit_of_a_partition_that_is_lost_is_not_tried_again() -> None:
    """Its next owner may be further by then: what is committed stays as it was before the refusal."""
    broker = filled()
    kept: dict[int, Committed] = {}
    script = {
        2: lambda source: (kept.update(broker.offsets), source.refuse_next()),
        3: lambda source: source.revoke(0, 1, 2, lost=True),
    }
    service(broker, Script(broker, script, 5)).run()
    assert broker.offsets == kept
    assert max(committed.offset for committed in kept.values()) > 0


def test_a_bad_message_under_the_policy_fail_stops_before_its_batch() -> None:
    """Nothing of the batch is answered or committed, and the engine is as it was."""
    broker = MemoryBroker(1)
    for value in (b"[1, 2]", b"[3, 4]", b"{"):
        broker.append(0, b"k", value)
    with pytest.raises(BadMessage, match="partition 0, offset 2"):
        service(broker, policy="fail").run()
    assert broker.messages == []
    assert broker.offsets[0].offset == 0


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


class TestStopping:
    """A signal ends the loop in order."""

    def test_what_was_taken_is_finished(self) -> None:
        """Records that wait for others are applied, answered and committed at once."""
        broker = filled()
        polls: list[int] = []

        def stopping() -> bool:
            polls.append(1)
            return len(polls) > 2

        run = service(broker, limits=Limits(commit_interval_s=3600.0, batch_records=10_000))
        summary = run.run(stopping)
        assert summary.consumed == 120
        expect_whole(broker, doubles=False)
        assert {p: c.offset for p, c in broker.offsets.items()} == {p: len(log) for p, log in enumerate(broker.log)}

    def test_a_service_that_is_told_before_it_began_ends(self) -> None:
        """Nothing is owned yet, so there is nothing to finish; nothing is lost for the next one."""
        broker = filled()
        service(broker).run(lambda: True)
        service(broker).run()
        expect_whole(broker, doubles=False)

    def test_in_the_midst_of_a_replay_nothing_is_committed(self) -> None:
        """The offset stays where answers end, and the next start replays again."""
        broker = filled(bad=False)
        service(broker).run()
        offsets, count = dict(broker.offsets), len(broker.messages)
        polls: list[int] = []

        def stopping() -> bool:
            polls.append(1)
            return len(polls) > 3

        summary = service(broker).run(stopping)
        assert 0 < summary.replayed < 120
        assert (broker.offsets, len(broker.messages)) == (offsets, count)
