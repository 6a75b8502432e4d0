"""What a transaction did, for the metrics and for the summary of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from statestep.consumers.checkpoint import Progress
from statestep.consumers.metrics import Metrics
from statestep.consumers.pipeline import Policy
from statestep.consumers.transaction import Turn
from statestep.runtime import NO_TIME, Engine


@dataclass(slots=True)
class Summary:
    """What a run did."""

    consumed: int = 0
    predicted: int = 0
    refused: int = 0
    tombstones: int = 0
    replayed: int = 0
    anomalies: int = 0
    events: int = 0  # begun
    reasons: dict[str, int] = field(default_factory=dict)


def count(metrics: Metrics, total: Summary, turn: Turn, policy: Policy, engine: Engine) -> None:
    """Count a transaction that is durable."""
    batch, tally = turn.batch, turn.batch.tally
    if turn.transaction.offsets:
        metrics.commits.inc()
        metrics.snapshots.inc(len(turn.streams))
        metrics.snapshot_bytes.inc(sum(len(state.value or b"") for state in turn.transaction.states))
    for partition, committed in turn.transaction.offsets.items():
        metrics.partition(partition)[3].set(committed.offset)
    for partition, consumed in tally.consumed.items():
        metrics.partition(partition)[0].inc(consumed)
    metrics.bytes_consumed.inc(tally.bytes)
    metrics.replayed.inc(tally.replayed)
    metrics.tombstones.inc(tally.tombstones)
    metrics.produced.inc(tally.predicted + tally.tombstones)
    metrics.predictions.inc(tally.predicted)
    metrics.out_of_order.inc(tally.out_of_order)
    metrics.gaps.inc(tally.gaps)
    metrics.bridged.inc(tally.bridged)
    metrics.reset.inc(tally.reset)
    metrics.expired.inc(len(turn.forgotten))
    for reason, refused in tally.refused.items():
        metrics.refused(policy, reason, refused)
    metrics.steps.inc(sum(tally.rows))
    metrics.runs.inc(tally.runs)
    metrics.waves.inc(sum(tally.waves) - len(tally.waves))
    metrics.batch_streams.observe(tally.rows)
    metrics.streams.set(len(engine))
    metrics.state_bytes.set(engine.table.nbytes)
    anomalies = int(np.count_nonzero(batch.column("anomaly")))
    metrics.anomalies.inc(anomalies)
    metrics.scores.observe(batch.column("score"), metrics.model)
    metrics.errors.observe(batch.errors, metrics.model)
    metrics.judged(tally, batch.column("drift"), batch.column("score_drift"))
    times = np.concatenate(batch.event_times) if batch.event_times else np.empty(0, np.int64)
    times = times[times != NO_TIME]
    if times.size:
        # Clocks differ, and a sum that falls is taken for a restart.
        metrics.latency.observe(np.maximum(time.time() - times / 1e9, 0.0), metrics.topic)
        metrics.last_record.set(float(times.max()) / 1e9)
    total.consumed += sum(tally.consumed.values())
    total.predicted += tally.predicted
    total.refused += sum(tally.refused.values())
    total.tombstones += tally.tombstones
    total.replayed += tally.replayed
    total.anomalies += anomalies
    total.events += tally.begun
    for reason, refused in tally.refused.items():
        total.reasons[reason] = total.reasons.get(reason, 0) + refused


def standing(
    metrics: Metrics, running: Mapping[int, Progress], restoring: Sequence[int], ends: Mapping[int, int]
) -> list[int]:
    """Tell how far each partition is; those whose states are not all back: `restoring` and those that replay."""
    for partition, progress in running.items():
        _, lag, position, _ = metrics.partition(partition)
        position.set(progress.position)
        if partition in ends:
            lag.set(max(ends[partition] - progress.position, 0))
    back = sorted([*restoring, *(partition for partition, progress in running.items() if progress.restoring)])
    metrics.restoring.set(len(back))
    return back


@contextmanager
def timed(metrics: Metrics, stage: str) -> Iterator[None]:
    """Note how long a stage of the loop took."""
    began = time.perf_counter()
    yield
    metrics.stages.observe([time.perf_counter() - began], stage)
