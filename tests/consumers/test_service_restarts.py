"""Restarts: wherever a run is cut and taken up again, the outputs are those of a run that was never cut."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from statestep.consumers.checkpoint import PartitionsChanged
from statestep.consumers.memory import MemorySink
from statestep.consumers.metrics import Metrics
from statestep.consumers.ports import BrokerError, Committed
from statestep.consumers.service import Summary

from .runs import (
    MODEL,
    OTHER_MODEL,
    Crash,
    Crashing,
    Script,
    answers,
    expect_whole,
    filled,
    service,
)


@pytest.mark.parametrize("effect", ["poll", "send", "flush", "commit"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 9, 14])
def test_a_run_cut_anywhere_goes_on_with_the_same_bits(effect: str, after: bool, at: int) -> None:
    """Killed before or after any effect and started anew: nothing is missing, and doubles are identical."""
    broker = filled()
    crashing = Crashing(broker, effect, at, after)
    with pytest.raises(Crash):
        service(broker, crashing, crashing).run()
    summary = service(broker).run()
    expect_whole(broker)
    assert summary.replayed + summary.predicted + summary.refused + summary.tombstones == 120


@given(
    st.lists(
        st.tuples(st.sampled_from(["poll", "send", "flush", "commit"]), st.integers(1, 6), st.booleans()), max_size=6
    )
)
@settings(max_examples=60)
def test_any_number_of_crashes_changes_nothing(crashes: list[tuple[str, int, bool]]) -> None:
    """Crash after crash, then a quiet run: the answers are those of a run that was never cut."""
    broker = filled(40)
    for effect, at, after in crashes:
        crashing = Crashing(broker, effect, at, after)
        try:
            service(broker, crashing, crashing).run()
        except Crash:
            continue
    service(broker).run()
    expect_whole(broker, count=40)


def test_an_output_that_is_not_acknowledged_is_not_committed() -> None:
    """When a flush fails the offsets stay, the error is the broker's, and the next run answers what was lost."""
    broker = filled()
    sink = MemorySink(broker)
    sink.fail_next()
    with pytest.raises(BrokerError, match="not acknowledged"):
        service(broker, sink=sink).run()
    assert all(committed.offset == 0 for committed in broker.offsets.values())
    assert broker.messages == []
    service(broker).run()
    expect_whole(broker, doubles=False)


def test_a_restart_with_nothing_new_answers_nothing() -> None:
    """States are rebuilt by replay, in silence; the next record goes on from them."""
    broker = filled()
    service(broker).run()
    count, offsets = len(broker.messages), dict(broker.offsets)
    summary = service(broker).run()
    assert (len(broker.messages), broker.offsets) == (count, offsets)
    assert summary == Summary(consumed=120, replayed=120)
    more = filled(140)
    for log, known in zip(more.log, broker.log, strict=True):
        for record in log[len(known) :]:
            broker.append(record.partition, record.key, record.value)
    service(broker).run()
    expect_whole(broker, doubles=False, count=140)


def test_history_that_is_gone_is_told_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Replay starts at the oldest record that is kept, with a warning and a metric; no other partition is touched."""
    broker = filled(bad=False)
    service(broker).run()
    broker.delete_before(2, 4)
    metrics = Metrics(CollectorRegistry())
    summary = service(broker, metrics=metrics).run()
    assert summary.replayed == 120 - 4
    assert "partition 2: history from 0 on is kept only from 4" in caplog.text
    assert "partition 1" not in caplog.text
    assert metrics.registry.get_sample_value("statestep_restores_truncated_total", {"topic": ""}) == 1


def test_records_deleted_before_they_were_read_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Retention overtakes a slow reader: its streams start anew at the oldest record, and the loss is in the log."""
    broker = filled(bad=False)
    source = Script(broker, {4: lambda s: s.broker.delete_before(2, 30)}, 6)
    summary = service(broker, source).run()
    assert "is outside of what is kept, 30 to" in caplog.text
    assert summary.predicted < 120
    assert broker.offsets[2].offset == len(broker.log[2])
    assert json.loads(broker.offsets[2].metadata)["first"] == 30


def test_another_model_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Its states are another's history replayed; the log says which model applied it."""
    broker = filled(bad=False)
    service(broker).run()
    service(broker, model=OTHER_MODEL).run()
    assert (
        f"was applied by model {MODEL.fingerprint[:12]}, it is now replayed by {OTHER_MODEL.fingerprint[:12]}"
        in caplog.text
    )


def test_a_topic_with_more_partitions_than_before_stops_the_service() -> None:
    """Keys have moved away from their states: nothing is answered on a guess."""
    broker = filled()
    service(broker).run()
    count = len(broker.messages)
    broker.log.append([])
    broker.first_kept.append(0)
    with pytest.raises(PartitionsChanged, match="had 3 partitions when its streams began and has 4 now"):
        service(broker).run()
    assert len(broker.messages) == count


class TestStart:
    """Where an application that has committed nothing begins."""

    def test_at_the_first_record_that_is_kept(self) -> None:
        """By default history is read from its beginning, which retention may have moved."""
        broker = filled(bad=False)
        broker.delete_before(1, 5)
        summary = service(broker).run()
        assert summary.predicted == 115

    def test_where_it_is_told(self) -> None:
        """The starting point is written down before anything is read, so a crash begins there again."""
        broker = filled(bad=False)
        crashing = Crashing(broker, "flush", 1, False)
        with pytest.raises(Crash):
            service(broker, crashing, crashing, start=lambda partition: 7).run()
        assert {p: c.offset for p, c in broker.offsets.items()} == {0: 7, 1: 7, 2: 7}
        service(broker, start=lambda partition: pytest.fail("it was asked for a start once more")).run()
        assert min(offset for (_, _, offset), _ in answers(broker.messages)) == 7
        assert len(broker.messages) == 120 - 3 * 7

    def test_an_offset_that_another_tool_set_begins_a_history(self, caplog: pytest.LogCaptureFixture) -> None:
        """Streams start anew there, with a warning, and a restart replays from there and no further."""
        broker = filled(bad=False)
        broker.offsets = {0: Committed(10, ""), 1: Committed(0, ""), 2: Committed(3, "x")}
        service(broker).run()
        assert "partition 0: the committed offset 10 was set by another tool" in caplog.text
        first = next(m for (_, p, o), m in answers(broker.messages) if (p, o) == (0, 10))
        assert json.loads(first.value or b"")["step"] == 1
        assert service(broker).run().replayed == 120 - 13
