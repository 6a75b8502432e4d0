"""What Prometheus sees. One object over one registry; every label value is bound once, never a stream among them.

Latencies and scores are counted a batch at a time: observing message by message would cost as much as the model.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Info, disable_created_metrics
from prometheus_client.metrics_core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from statestep.consumers.batch import Tally
from statestep.consumers.events import LEVELS
from statestep.consumers.teller import STATUS, words
from statestep.runtime import Contract

PREFIX = "statestep"
STAGES = ("poll", "decode", "advance", "infer", "encode", "commit")
STATES = ("starting", "running", "draining", "failed")
REASONS = (
    "empty", "too-large", "malformed", "wrong-type", "wrong-shape", "non-finite", "out-of-range",
    "missing-feature", "no-key", "key-too-large", "bad-time", "undeliverable",
)  # fmt: skip

SECONDS_COARSE = tuple(0.0005 * 2**n for n in range(16))  # 0.5 ms to 16 s: from a message's making to its output
SECONDS_FINE = tuple(0.000025 * 2**n for n in range(17))  # 25 µs to 1.6 s: one stage of one batch
ROWS = tuple(float(2**n) for n in range(13))  # 1 to 4096
SCORES = tuple(0.01 * 10 ** (n / 2) for n in range(13))  # 0.01 to 10,000, two a decade
FEATURES = 64  # that have series of their own
OTHERS = "other"  # what the rest of them is called
LATE_ROWS = 1000  # over about as many a drift is averaged: a batch may hold a single stream


class BatchHistogram(Collector):
    """A classic histogram that takes a whole array at once, with at most one label.

    >>> seconds = BatchHistogram("seconds", "How long.", (1.0, 2.0))
    >>> seconds.observe(np.array([0.5, 1.5, 9.0]))
    >>> [sample.value for sample in next(iter(seconds.collect())).samples][:4]
    [1.0, 2.0, 3.0, 3.0]
    """

    def __init__(
        self, name: str, doc: str, bounds: Sequence[float], label: str | None = None, known: Iterable[str] = ("",)
    ):
        self._name = name
        self._doc = doc
        self._bounds = np.array(bounds)
        self._label = label
        self._counts = {value: np.zeros(len(bounds) + 1, np.int64) for value in known}  # [bounds + 1]
        self._sums = dict.fromkeys(known, 0.0)

    def observe(self, values: np.ndarray[tuple[int], np.dtype[np.floating]] | Sequence[float], label: str = "") -> None:
        """Count `values`."""
        places = np.searchsorted(self._bounds, values, side="left")
        self._counts[label] += np.bincount(places, minlength=len(self._bounds) + 1)
        self._sums[label] += float(np.sum(values))

    def collect(self) -> Iterator[Metric]:
        """The family as Prometheus reads it."""
        family = HistogramMetricFamily(self._name, self._doc, labels=[self._label] if self._label else None)
        limits = [*map(floatToGoString, self._bounds.tolist()), "+Inf"]
        for value, counts in self._counts.items():
            buckets = list(zip(limits, np.cumsum(counts).astype(float).tolist(), strict=True))
            family.add_metric([value] if self._label else [], buckets, self._sums[value])
        yield family


class LateMean:
    """Means over about the latest `LATE_ROWS` rows, whatever the size of the batches.

    >>> mean = LateMean()
    >>> mean.take(np.array([[0.5, 0.25]]))
    [0.5, 0.25]
    >>> mean.take(np.zeros((1, 2)))[0] > 0.499, mean.take(np.zeros((9000, 2)))[0] < 0.001
    (True, True)
    """

    def __init__(self) -> None:
        self._mean: np.ndarray[Any, Any] | None = None  # [K]

    def take(self, rows: np.ndarray[Any, Any]) -> list[float]:
        """Take `rows` [n, K], n ≥ 1; the means [K] after them."""
        here = rows.mean(axis=0, dtype=np.float64)
        before = here if self._mean is None else self._mean
        self._mean = before + (here - before) * -math.expm1(-len(rows) / LATE_ROWS)
        return [float(mean) for mean in self._mean]


class _Maker:
    """Makes metrics of one registry, under our prefix."""

    def __init__(self, registry: CollectorRegistry):
        self._registry = registry

    def counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(name, doc, labels, namespace=PREFIX, registry=self._registry)

    def gauge(self, name: str, doc: str, *labels: str) -> Gauge:
        return Gauge(name, doc, labels, namespace=PREFIX, registry=self._registry)

    def histogram(self, name: str, doc: str, bounds: Sequence[float], label: str | None, *known: str) -> BatchHistogram:
        made = BatchHistogram(f"{PREFIX}_{name}", doc, bounds, label, known or ("",))
        self._registry.register(made)
        return made


class Metrics:
    """Every metric of the service. `topic` and `model` are the values of the labels of these names."""

    def __init__(self, registry: CollectorRegistry, topic: str = "", model: str = ""):
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series beside every counter
        self.registry = registry
        self.topic = topic
        self.model = model

        make = _Maker(registry)
        self._make_records(make)
        self._make_durations(make)
        self._make_engine(make)
        self._make_predictions(make)
        self._make_judgements(make)
        self._make_states(make)
        self._make_process(registry)
        self._by_partition: dict[int, tuple[Counter, Gauge, Gauge, Gauge]] = {}

    def _make_records(self, make: _Maker) -> None:
        counter, gauge = make.counter, make.gauge
        topic = self.topic
        self._consumed = counter("records_consumed", "Records taken from the input.", "topic", "partition")
        self.bytes_consumed = counter("bytes_consumed", "Bytes of their values.", "topic").labels(topic)
        self.produced = counter("records_produced", "Outputs that were acknowledged.", "topic").labels(topic)
        self._dead = counter("dead_letters", "Records set aside, by reason.", "topic", "reason")
        self._skipped = counter("records_skipped", "Records refused and passed by.", "topic", "reason")
        self.tombstones = counter("tombstones", "Null values, each of which ended a stream.", "topic").labels(topic)
        self.replayed = counter(
            "records_replayed", "Records applied again to restore states, outputs suppressed.", "topic"
        ).labels(topic)
        self._lag = gauge("consumer_lag_records", "Records written and not yet applied.", "topic", "partition")
        self._position = gauge("consumer_position_offset", "Offset of the next record to apply.", "topic", "partition")
        self._committed = gauge("consumer_committed_offset", "Offset committed last.", "topic", "partition")
        self.partitions = gauge("partitions", "Partitions of the input, whoever owns them.", "topic").labels(topic)
        self.assigned = gauge("partitions_assigned", "Partitions owned.", "topic").labels(topic)
        self.restoring = gauge("partitions_restoring", "Partitions whose states are being replayed.", "topic").labels(
            topic
        )
        self.rebalances = counter("rebalances", "Times that partitions came or went.", "kind")
        self.last_poll = gauge("last_poll_timestamp_seconds", "When the input was last asked.")
        self.last_record = gauge(
            "last_record_timestamp_seconds", "Greatest event time of the last batch.", "topic"
        ).labels(topic)
        self._by_reason = {
            policy: {reason: family.labels(topic, reason) for reason in REASONS}
            for policy, family in (("dead-letter", self._dead), ("skip", self._skipped))
        }
        for kind in ("assigned", "revoked", "lost"):
            self.rebalances.labels(kind)

    def _make_durations(self, make: _Maker) -> None:
        histogram = make.histogram
        topic = self.topic
        self.latency = histogram(
            "end_to_end_latency_seconds", "Event time to acknowledged output.", SECONDS_COARSE, "topic", topic
        )
        self.stages = histogram(
            "stage_duration_seconds", "Time a batch spends in a stage.", SECONDS_FINE, "stage", *STAGES
        )

    def _make_engine(self, make: _Maker) -> None:
        counter, gauge, histogram = make.counter, make.gauge, make.histogram
        model = self.model
        self.batch_streams = histogram("batch_streams", "Rows of one call of the engine.", ROWS, None)
        self.waves = counter("batch_waves", "Waves beyond the first, since a stream occurred again in a batch.")
        self.steps = counter("inference_steps", "Timesteps applied.", "model").labels(model)
        self.runs = counter("inference_runs", "Runs of the model.", "model").labels(model)
        self.streams = gauge("streams", "Streams remembered.")
        self.capacity = gauge("streams_capacity", "Streams that can be remembered.")
        self.state_bytes = gauge("state_bytes", "Bytes that states take in memory.")

    def _make_predictions(self, make: _Maker) -> None:
        counter, histogram = make.counter, make.histogram
        topic, model = self.topic, self.model
        self.predictions = counter("predictions", "Predictions made.", "model").labels(model)
        self.anomalies = counter("anomalies", "Predictions whose score was over the threshold.", "model").labels(model)
        self.scores = histogram("anomaly_score", "Anomaly scores.", SCORES, "model", model)
        self.errors = histogram(
            "forecast_abs_error", "Forecast errors, in the features' units.", SCORES, "model", model
        )
        self.out_of_order = counter("out_of_order", "Records older than their stream.", "topic").labels(topic)
        self.gaps = counter("gaps", "Records more than 1.5 periods after their stream.", "topic").labels(topic)
        self.bridged = counter("bridged_steps", "Timesteps without readings that bridged gaps.", "topic").labels(topic)
        self.reset = counter("resets", "Streams whose states began anew after a gap.", "topic").labels(topic)
        self.expired = counter("expired_streams", "Streams forgotten after a long silence.", "topic").labels(topic)

    def _make_judgements(self, make: _Maker) -> None:
        counter, gauge = make.counter, make.gauge
        model = self.model
        self._begun = counter("events_begun", "Events that began.", "model").labels(model)
        self._ended = counter("events_ended", "Events that ended, by how severe they had become.", "model", "level")
        self._untold = counter(
            "events_undelivered", "Beginnings and ends of events that no broker took.", "topic"
        ).labels(self.topic)
        self.budget = gauge(
            "false_alarm_budget_ratio",
            "False alarms a timestep that the threshold allows; 0 if unknown.",
            "model",
        ).labels(model)
        self._status = counter("prediction_status", "Predictions, by what the model says of itself.", "model", "status")
        self._missing = counter(
            "input_missing_values", "Readings that were missing and stood in for.", "model", "feature"
        )
        self._drift = gauge(
            "input_drift_score", "Share of late readings not as in training, over late rows.", "model", "feature"
        )
        self._score_drift = gauge(
            "score_drift_score", "Share of late scores not as in training, over late rows.", "model"
        )
        for level in LEVELS:
            self._ended.labels(model, level)
        self._labels: dict[str, str] = {}  # by feature
        self._drifting: tuple[str, ...] = ()  # the features that the model tells the drift of
        self._late, self._late_scores = LateMean(), LateMean()

    def _make_states(self, make: _Maker) -> None:
        counter, gauge = make.counter, make.gauge
        self.commits = counter("commits", "Transactions that count.")
        self.commit_failures = counter("commit_failures", "Transactions that failed, or of which nothing was heard.")
        self.snapshots = counter("snapshots", "States of streams written to the changelog.")
        self.snapshot_bytes = counter("snapshot_bytes", "Bytes of these, markers included.")
        self.dirty = gauge("dirty_streams", "Streams whose state in the changelog is older than in memory.")
        self.snapshot_age = gauge(
            "snapshot_age_seconds", "How long the longest of them has waited: what a restore replays."
        )
        self.spilled = gauge("spilled_streams", "Streams that only the local store holds.")
        self.store_failures = counter("store_failures", "Times that the local store was given up.")

    def _make_process(self, registry: CollectorRegistry) -> None:
        self.model_info = Info("model", "The model in use.", namespace=PREFIX, registry=registry)
        build = Info("build", "What runs it.", namespace=PREFIX, registry=registry)
        build.info(
            {
                "version": version("statestep"),
                "python": platform.python_version(),
                "onnxruntime": version("onnxruntime"),
                "kafka_client": version("kafka-python"),
            }
        )
        self.up = Enum("up_state", "What the service is doing.", namespace=PREFIX, registry=registry, states=STATES)

    def expect(self, contract: Contract) -> None:
        """Have the series of a model from the start: of its features, of what it says of itself, of its budget."""
        names = contract.feature_names
        self._labels = {name: name if place < FEATURES else OTHERS for place, name in enumerate(names)}
        if contract.missing == "own-forecast":
            for label in self._labels.values():
                self._missing.labels(self.model, label)
        if contract.output("status") is not None:
            for status in words(contract, "status", STATUS):
                self._status.labels(self.model, status)
        if (drift := contract.output("drift")) is not None:
            self._drifting = drift.features or names
        every = (contract.detector or {}).get("every")
        self.budget.set(1 / every if isinstance(every, int | float) and every > 0 else 0.0)

    def judged(self, tally: Tally, drift: np.ndarray[Any, Any], score_drift: np.ndarray[Any, Any]) -> None:
        """Count what a model says of a batch: `drift` [n, K] and `score_drift` [n] of its rows, empty if it has none.

        Features beyond the first `FEATURES` share a series: counts are added up, of drifts the greatest is told.
        """
        model = self.model
        self._begun.inc(tally.begun)
        self._untold.inc(tally.untold)
        for level, events in tally.ended.items():
            self._ended.labels(model, level).inc(events)
        for status, rows in tally.statuses.items():
            self._status.labels(model, status).inc(rows)
        for feature, missing in tally.missing.items():
            self._missing.labels(model, self._labels.get(feature, OTHERS)).inc(missing)
        if drift.size:
            means: dict[str, float] = {}
            for feature, mean in zip(self._drifting, self._late.take(drift), strict=False):
                label = self._labels[feature]
                means[label] = max(mean, means.get(label, 0.0))
            for label, mean in means.items():
                self._drift.labels(model, label).set(mean)
        if score_drift.size:
            self._score_drift.labels(model).set(self._late_scores.take(score_drift[:, None])[0])

    def refused(self, policy: str, reason: str, count: int) -> None:
        """Count refused records under the policy that they met."""
        if policy in self._by_reason:
            self._by_reason[policy][reason].inc(count)

    def partition(self, partition: int) -> tuple[Counter, Gauge, Gauge, Gauge]:
        """The series of one partition: consumed, lag, position, committed."""
        if partition not in self._by_partition:
            names = (self.topic, str(partition))
            series = (self._consumed, self._lag, self._position, self._committed)
            consumed, lag, position, committed = (family.labels(*names) for family in series)
            assert isinstance(consumed, Counter)
            assert isinstance(lag, Gauge) and isinstance(position, Gauge) and isinstance(committed, Gauge)
            self._by_partition[partition] = (consumed, lag, position, committed)
        return self._by_partition[partition]

    def forget(self, partition: int) -> None:
        """Stop reporting a partition that another member reports now."""
        if self._by_partition.pop(partition, None):
            for family in (self._lag, self._position, self._committed):
                family.remove(self.topic, str(partition))
