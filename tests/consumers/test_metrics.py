"""Metrics: there from the start, right on any data, and never a stream as a label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from statestep.consumers.batch import Tally
from statestep.consumers.events import LEVELS
from statestep.consumers.metrics import (
    FEATURES,
    LATE_ROWS,
    OTHERS,
    REASONS,
    ROWS,
    SCORES,
    SECONDS_COARSE,
    SECONDS_FINE,
    STAGES,
    STATES,
    BatchHistogram,
    LateMean,
    Metrics,
)
from statestep.runtime import Contract, Feature, Output, State

from .judging import judge

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(registry: CollectorRegistry) -> Samples:
    """Every sample of a registry as Prometheus reads the page, by name and labels."""
    page = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


@pytest.mark.parametrize("bounds", [SECONDS_COARSE, SECONDS_FINE, ROWS, SCORES, (1.0,), (0.1, 1e-5 + 1, 1e6, 3e7)])
@given(
    data=st.lists(st.lists(st.floats(0, 1e8) | st.sampled_from(SECONDS_FINE + ROWS + SCORES), max_size=20), max_size=5)
)
def test_a_batch_counts_as_its_values_one_by_one(bounds: Sequence[float], data: list[list[float]]) -> None:
    """The page is that of prometheus_client's own histogram, to the last bucket, values on a bound included."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    batch = BatchHistogram("h", "Doc.", bounds)
    ours.register(batch)
    single = Histogram("h", "Doc.", buckets=bounds, registry=theirs)
    for values in data:
        batch.observe(np.array(values))
        for value in values:
            single.observe(value)
    found, expected = samples(ours), samples(theirs)
    expected = {key: value for key, value in expected.items() if not key[0].endswith("_created")}
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value) if key[0] == "h_sum" else value), key


def test_a_label_has_its_series_from_the_start() -> None:
    """Each known value with all buckets at 0; observations go to their own."""
    registry = CollectorRegistry()
    histogram = BatchHistogram("h", "Doc.", (1.0, 2.0), "stage", ("poll", "infer"))
    registry.register(histogram)
    histogram.observe([0.5, 3.0], "infer")
    found = samples(registry)
    assert len(found) == 2 * (3 + 2)
    assert found["h_count", (("stage", "poll"),)] == 0
    assert found["h_bucket", (("le", "1.0"), ("stage", "infer"))] == 1
    assert found["h_bucket", (("le", "+Inf"), ("stage", "infer"))] == 2
    assert found["h_sum", (("stage", "infer"),)] == 3.5


FAMILIES = {
    # ingest
    "records_consumed", "bytes_consumed", "records_produced", "dead_letters", "records_skipped", "tombstones",
    "records_replayed", "consumer_lag_records", "consumer_position_offset", "consumer_committed_offset",
    "partitions", "partitions_assigned", "partitions_restoring", "rebalances", "last_poll_timestamp_seconds",
    "last_record_timestamp_seconds", "commits", "commit_failures",
    # states
    "snapshots", "snapshot_bytes", "expired_streams", "dirty_streams", "snapshot_age_seconds", "spilled_streams",
    "store_failures",
    # latency
    "end_to_end_latency_seconds", "stage_duration_seconds",
    # batch
    "batch_streams", "batch_waves", "inference_steps", "inference_runs", "streams", "streams_capacity", "state_bytes",
    # model
    "predictions", "anomalies", "anomaly_score", "forecast_abs_error", "out_of_order", "gaps", "model", "build",
    "bridged_steps", "resets", "up_state", "events_begun", "events_ended", "events_undelivered",
    "false_alarm_budget_ratio", "prediction_status", "input_missing_values", "input_drift_score", "score_drift_score",
}  # fmt: skip


def test_every_family_is_there_from_the_start() -> None:
    """Under our prefix, with a help text; alerts on a counter that appears with its first count miss that count."""
    registry = CollectorRegistry()
    Metrics(registry, "sensors", "pump")
    families = {family.name: family for family in registry.collect()}
    assert set(families) == {f"statestep_{name}" for name in FAMILIES}
    assert all(family.documentation.endswith(".") for family in families.values())


def test_known_series_begin_at_zero() -> None:
    """Every reason of a refusal, every stage, every kind of rebalance, and all that has topic or model alone."""
    registry = CollectorRegistry()
    Metrics(registry, "sensors", "pump")
    found = samples(registry)
    topic, model = ("topic", "sensors"), ("model", "pump")
    for reason in REASONS:
        for name in ("dead_letters", "records_skipped"):
            assert found[f"statestep_{name}_total", (("reason", reason), topic)] == 0
    for stage in STAGES:
        assert found["statestep_stage_duration_seconds_count", (("stage", stage),)] == 0
    for kind in ("assigned", "revoked", "lost"):
        assert found["statestep_rebalances_total", (("kind", kind),)] == 0
    for name in ("bytes_consumed", "records_produced", "tombstones", "records_replayed", "events_undelivered"):
        assert found[f"statestep_{name}_total", (topic,)] == 0
    for name in ("predictions", "anomalies", "inference_steps", "inference_runs", "events_begun"):
        assert found[f"statestep_{name}_total", (model,)] == 0
    for level in LEVELS:
        assert found["statestep_events_ended_total", (("level", level), model)] == 0
    assert [found["statestep_up_state", (("statestep_up_state", state),)] for state in STATES] == [1, 0, 0, 0]
    assert not [name for name, _ in found if name.endswith("_created")]


def test_labels_are_few_and_known() -> None:
    """Only these, so that cardinality does not grow with the streams."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "sensors", "pump")
    metrics.partition(3)
    metrics.model_info.info({"model": "pump", "version": "1", "sha256": "ab"})
    metrics.expect(judge().contract)
    labels = {name for _, pairs in samples(registry) for name, _ in pairs}
    assert labels == {
        "topic", "partition", "reason", "kind", "stage", "model", "le", "statestep_up_state",
        "version", "sha256", "python", "onnxruntime", "kafka_client", "level", "status", "feature",
    }  # fmt: skip


def test_what_a_model_tells_has_its_series_from_the_start() -> None:
    """Its features, the words of its status, its budget; a model that tells nothing of it has none of them."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "sensors", "judge")
    bare = samples(registry)
    metrics.expect(Contract("m", (Feature("a"),), (State("h", "g", (1,)),), ()))
    assert samples(registry) == bare
    metrics.expect(judge().contract)
    new = samples(registry).keys() - bare.keys()
    model = ("model", "judge")
    assert new == {
        *(("statestep_prediction_status_total", (model, ("status", s))) for s in ("warming", "calibrated", "drifting")),
        *(("statestep_input_missing_values_total", (("feature", name), model)) for name in ("flow", "pressure")),
    }
    assert samples(registry)["statestep_false_alarm_budget_ratio", (model,)] == 1 / 500


@pytest.mark.parametrize("detector", [None, {}, {"every": None}, {"every": "week"}, {"every": 0}])
def test_no_budget_is_zero(detector: dict[str, Any] | None) -> None:
    """Whoever divides by it asks whether it is above 0."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "sensors", "m")
    metrics.budget.set(7)
    metrics.expect(Contract("m", (Feature("a"),), (State("h", "g", (1,)),), (), detector=detector))
    assert samples(registry)["statestep_false_alarm_budget_ratio", (("model", "m"),)] == 0


def test_features_beyond_the_first_share_a_series() -> None:
    """However wide a model is: what is missing of them is added up, of their drifts the greatest is told."""
    registry, names = CollectorRegistry(), tuple(f"f{n}" for n in range(FEATURES + 5))
    contract = Contract(
        "wide",
        tuple(map(Feature, names)),
        (State("h", "g", (1,)),),
        (Output("d", role="drift", features=names[1:]), Output("s", role="score_drift")),
        missing="own-forecast",
    )
    metrics = Metrics(registry, "sensors", "wide")
    metrics.expect(contract)
    tally = Tally()
    tally.missing.update({"f0": 2, f"f{FEATURES - 1}": 3, f"f{FEATURES}": 5, f"f{FEATURES + 4}": 7})
    drift = np.zeros((2, len(names) - 1), np.float32)
    drift[:, -3:] = [[0.25, 0.5, 0.0], [0.75, 0.25, 0.0]]
    drift[:, 0] = [0.5, 0.25]
    metrics.judged(tally, drift, np.array([0.25, 0.75], np.float32))
    found = samples(registry)

    def of(name: str, feature: str) -> float | None:
        return found.get((f"statestep_{name}", (("feature", feature), ("model", "wide"))))

    assert len({key for key in found if key[0] == "statestep_input_missing_values_total"}) == FEATURES + 1
    missing = [of("input_missing_values_total", name) for name in ("f0", "f1", f"f{FEATURES - 1}", OTHERS)]
    assert missing == [2, 0, 3, 12]
    assert [of("input_drift_score", name) for name in ("f0", "f1", OTHERS)] == [None, 0.375, 0.5]
    assert found["statestep_score_drift_score", (("model", "wide"),)] == 0.5


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=6))
def test_a_late_mean_forgets_by_rows_and_not_by_batches(sizes: list[int]) -> None:
    """Cut into whatever batches, rows of 1 after one row of 0 weigh the same; a thousand of them outweigh it."""
    whole, cut = LateMean(), LateMean()
    for mean in (whole, cut):
        mean.take(np.zeros((1, 1)))
    at_once = whole.take(np.ones((sum(sizes), 1)))[0]
    for size in sizes:
        (piecewise,) = cut.take(np.ones((size, 1)))
    assert piecewise == pytest.approx(at_once)
    assert at_once == pytest.approx(1 - np.exp(-sum(sizes) / LATE_ROWS))


def test_a_refusal_counts_under_its_policy() -> None:
    """A dead letter and a skipped record are two things; one that stops the service counts as neither."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "sensors", "pump")
    for policy, count in (("dead-letter", 2), ("skip", 3), ("fail", 5)):
        metrics.refused(policy, "empty", count)
    found = samples(registry)
    place = (("reason", "empty"), ("topic", "sensors"))
    assert found["statestep_dead_letters_total", place] == 2
    assert found["statestep_records_skipped_total", place] == 3


def test_a_partition_that_is_forgotten_keeps_its_counter() -> None:
    """Gauges of it go; what was consumed stays, and counts on if it comes back."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "sensors", "pump")
    place = (("partition", "3"), ("topic", "sensors"))
    for _ in range(2):
        consumed, lag, _, _ = metrics.partition(3)
        consumed.inc(2)
        lag.set(7)
        assert samples(registry)["statestep_consumer_lag_records", place] == 7
        metrics.forget(3)
        metrics.forget(9)  # never seen
        assert ("statestep_consumer_lag_records", place) not in samples(registry)
    assert samples(registry)["statestep_records_consumed_total", place] == 4


def test_two_services_of_one_process_have_a_registry_each() -> None:
    """Nothing is global: a test, or an embedder, may have as many as it likes."""
    first, second = CollectorRegistry(), CollectorRegistry()
    Metrics(first, "a", "m").tombstones.inc()
    Metrics(second, "a", "m")
    assert samples(first)["statestep_tombstones_total", (("topic", "a"),)] == 1
    assert samples(second)["statestep_tombstones_total", (("topic", "a"),)] == 0
