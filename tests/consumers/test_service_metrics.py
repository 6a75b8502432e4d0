"""What Prometheus and the log are told of a run."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry

from statestep.consumers.changelog import MARKER
from statestep.consumers.memory import MemoryBroker, MemorySink
from statestep.consumers.metrics import Metrics
from statestep.consumers.transaction import Limits

from .runs import Clock, Crash, Crashing, Script, expect_whole, filled, marker_of, service


def test_metrics_say_what_the_run_did() -> None:
    """Every counter against the messages that came out, the lag at the end, and the state that is held."""
    broker = filled()
    registry = CollectorRegistry()
    run = service(broker, metrics=Metrics(registry, broker.topic, "pump"))
    summary = run.run()

    def sample(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"statestep_{name}", labels)

    topic = {"topic": "memory"}
    outputs = [m for m in broker.outputs if m.value is not None]
    for partition, log in enumerate(broker.log):
        place = topic | {"partition": str(partition)}
        assert sample("records_consumed_total", **place) == len(log)
        assert sample("consumer_lag_records", **place) == 0
        assert sample("consumer_committed_offset", **place) == sample("consumer_position_offset", **place) == len(log)
    assert sample("bytes_consumed_total", **topic) == sum(len(r.value or b"") for log in broker.log for r in log)
    assert sample("records_produced_total", **topic) == len(broker.outputs)
    assert sample("predictions_total", model="pump") == len(outputs) == summary.predicted
    assert sample("dead_letters_total", **topic, reason="malformed") == len(broker.dead_letters)
    assert sample("dead_letters_total", **topic, reason="empty") == 0
    assert sample("tombstones_total", **topic) == summary.tombstones
    anomalous = sum(json.loads(m.value or b"")["anomaly"] for m in outputs)
    assert sample("anomalies_total", model="pump") == anomalous == summary.anomalies
    assert sample("anomaly_score_count", model="pump") == len(outputs)
    assert sample("inference_steps_total", model="pump") == len(outputs)
    assert sample("streams") == run.pager.pages().streams(0)["streams"]
    assert sample("streams_capacity") == 1_000_000
    assert sample("partitions_assigned", **topic) == sample("partitions", **topic) == 3
    assert sample("rebalances_total", kind="assigned") == 1
    assert sample("up_state", statestep_up_state="running") == 1
    assert sample("end_to_end_latency_seconds_count", **topic) == len(outputs)
    flags = Counter(flag for m in outputs for flag in json.loads(m.value or b"")["flags"])
    assert sample("gaps_total", **topic) == flags["gap"] > 0
    assert sample("out_of_order_total", **topic) == flags["out_of_order"]


def test_what_is_replayed_is_counted_apart() -> None:
    """A restart's replay is consumed and replayed, and counts among neither predictions, dead letters nor anomalies."""
    broker = filled()
    crashing = Crashing(broker, "poll", 3, False)
    slow = Limits(0.0, 120, snapshot_interval_s=3600.0)
    with pytest.raises(Crash):
        service(broker, crashing, crashing, limits=slow).run()
    assert len(broker.messages) == 120
    owed = sum(seen.records for p in range(3) if (seen := marker_of(broker, p)))
    registry = CollectorRegistry()
    service(broker, metrics=Metrics(registry, "memory", "pump")).run()
    assert registry.get_sample_value("statestep_records_replayed_total", {"topic": "memory"}) == owed > 0
    for name in ("predictions", "anomalies"):
        assert registry.get_sample_value(f"statestep_{name}_total", {"model": "pump"}) == 0
    labels = {"topic": "memory", "reason": "malformed"}
    assert registry.get_sample_value("statestep_dead_letters_total", labels) == 0


def test_snapshots_are_counted_and_their_age_is_told() -> None:
    """Dirty streams and the age of the longest-dirty one while it runs; both nothing at its end, all states written."""
    broker, registry, clock = filled(bad=False), CollectorRegistry(), Clock()
    found: list[tuple[float, float]] = []

    def value(name: str) -> float:
        return registry.get_sample_value(f"statestep_{name}") or 0.0

    source = Script(broker, {4: lambda s: found.append((value("dirty_streams"), value("snapshot_age_seconds")))}, 40)
    limits = Limits(0.0, 60, snapshot_interval_s=0.5)
    service(broker, source, limits=limits, metrics=Metrics(registry), clock=clock).run()
    assert (value("dirty_streams"), value("snapshot_age_seconds")) == (0.0, 0.0)
    assert found and found[0][0] > 0 and 0 < found[0][1] < 1.0
    states = [record for log in broker.changelog for record in log]
    assert value("snapshot_bytes_total") == sum(len(record.value or b"") for record in states)
    assert value("snapshots_total") == sum(record.key != MARKER for record in states)
    # Each transaction with a state of a partition has a marker of it; each opened one as it began.
    assert value("commits_total") >= max(sum(record.key == MARKER for record in log) for log in broker.changelog)


def test_transactions_that_failed_are_counted_whether_they_count_or_not() -> None:
    """The number of failures is that of the faults, and of those that count each is a commit too."""
    broker, registry = filled(), CollectorRegistry()
    sink = MemorySink(broker)
    for counts in (True, False, True):
        sink.fail_next(counts=counts)
    service(broker, sink=sink, metrics=Metrics(registry, "memory")).run()
    assert registry.get_sample_value("statestep_commit_failures_total") == 3
    sequences = [seen.sequence for p in range(3) if (seen := marker_of(broker, p))]
    assert (registry.get_sample_value("statestep_commits_total") or 0) >= max(sequences)
    assert registry.get_sample_value("statestep_records_produced_total", {"topic": "memory"}) == len(broker.outputs)
    expect_whole(broker)


def test_a_partition_that_is_gone_is_no_longer_reported() -> None:
    """Its new owner reports lag and offsets now; two members that both did would be added up."""
    broker, registry = filled(), CollectorRegistry()
    source = Script(broker, {8: lambda s: s.revoke(1)}, 10)
    service(broker, source, metrics=Metrics(registry, "memory", "pump")).run()
    for name, there in (
        ("consumer_lag_records", False),
        ("consumer_committed_offset", False),
        ("records_consumed_total", True),
    ):
        value = registry.get_sample_value(f"statestep_{name}", {"topic": "memory", "partition": "1"})
        assert (value is not None) == there


def test_a_failed_run_says_so() -> None:
    """The state is failed, and the exception is the caller's."""
    broker, registry = filled(), CollectorRegistry()
    crashing = Crashing(broker, "commit", 2, False)
    with pytest.raises(Crash):
        service(broker, crashing, crashing, metrics=Metrics(registry)).run()
    assert registry.get_sample_value("statestep_up_state", {"statestep_up_state": "failed"}) == 1


def test_a_producer_whose_clock_is_ahead_has_no_negative_latency() -> None:
    """A sum that falls would look like a restart to Prometheus."""
    broker, registry = MemoryBroker(1), CollectorRegistry()
    broker.append(0, b"k", b'{"flow": 1, "pressure": 2, "ts": "2200-01-01"}')
    service(broker, metrics=Metrics(registry, "memory")).run()
    assert registry.get_sample_value("statestep_end_to_end_latency_seconds_sum", {"topic": "memory"}) == 0.0


def test_partitions_are_logged_as_they_come_and_go(caplog: pytest.LogCaptureFixture) -> None:
    """One line each, with what is owned then, and one for each partition that is back."""
    caplog.set_level(logging.INFO, "statestep")
    broker = filled()
    service(broker, Script(broker, {30: lambda s: s.revoke(1)}, 31)).run()
    service(broker).run()
    assert "memory assigned: partitions 0, 1, 2; now 3" in caplog.text
    assert "memory revoked: partitions 1; now 2" in caplog.text
    assert "memory partition 2: 0 streams restored; going on at 0, replaying 0 messages" in caplog.text
    assert f"memory partition 2: 4 streams restored; going on at {len(broker.log[2])}" in caplog.text
