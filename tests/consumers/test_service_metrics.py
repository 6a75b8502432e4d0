"""What Prometheus and the log are told of a run."""

from __future__ import annotations

import json
import logging
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry

from statestep.consumers.memory import MemoryBroker
from statestep.consumers.metrics import Metrics

from .runs import (
    Crash,
    Crashing,
    Script,
    filled,
    service,
)


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
    assert sample("streams") == run.pages().streams(0)["streams"]
    assert sample("streams_capacity") == 1_000_000
    assert sample("partitions_assigned", **topic) == 3
    assert sample("rebalances_total", kind="assigned") == 1
    assert sample("up_state", statestep_up_state="running") == 1
    assert sample("end_to_end_latency_seconds_count", **topic) == len(outputs)
    flags = Counter(flag for m in outputs for flag in json.loads(m.value or b"")["flags"])
    assert sample("gaps_total", **topic) == flags["gap"] > 0
    assert sample("out_of_order_total", **topic) == flags["out_of_order"]


def test_what_is_replayed_is_counted_apart() -> None:
    """A restart's replay is consumed and replayed, and counts among neither predictions, dead letters nor anomalies."""
    broker = filled()
    service(broker).run()
    registry = CollectorRegistry()
    service(broker, metrics=Metrics(registry, "memory", "pump")).run()
    assert registry.get_sample_value("statestep_records_replayed_total", {"topic": "memory"}) == 120
    for name in ("predictions", "anomalies"):
        assert registry.get_sample_value(f"statestep_{name}_total", {"model": "pump"}) == 0
    labels = {"topic": "memory", "reason": "malformed"}
    assert registry.get_sample_value("statestep_dead_letters_total", labels) == 0
    # A commit for each partition whose replay has ended, and none on the way there.
    assert registry.get_sample_value("statestep_commits_total") == 3


def test_a_partition_that_is_gone_is_no_longer_reported() -> None:
    """Its new owner reports lag and offsets now; two members that both did would be added up."""
    broker, registry = filled(), CollectorRegistry()
    source = Script(broker, {6: lambda s: s.revoke(1)}, 8)
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
    crashing = Crashing(broker, "flush", 2, False)
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
    """One line each, with what is owned then, and one for each replay with its length."""
    caplog.set_level(logging.INFO, "statestep")
    broker = filled()
    service(broker).run()
    service(broker, Script(broker, {30: lambda s: s.revoke(1)}, 31)).run()
    assert "memory assigned: partitions 0, 1, 2; now 3" in caplog.text
    assert "memory revoked: partitions 1; now 2" in caplog.text
    assert f"memory partition 2: replaying {len(broker.log[2])} records to restore states" in caplog.text
