"""The loop: poll, apply, send, flush, commit. All control flow of the service is here, and every effect is in order.

Delivery is at-least-once: outputs are acknowledged before offsets are committed, so after a crash some are sent
again, with the same bits. States are never lost: see `checkpoint`. Only raw records wait across polls; what was
advanced is sent and committed before the next one, so a partition can be taken away at any poll.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from statestep.consumers import checkpoint
from statestep.consumers.board import Board
from statestep.consumers.checkpoint import Progress
from statestep.consumers.http import Health, Pages
from statestep.consumers.metrics import Metrics
from statestep.consumers.pipeline import Batch, Pipeline, Policy, split_key
from statestep.consumers.ports import Change, CommitRefused, Record, Sink, Source
from statestep.runtime import NO_TIME, Engine, Model
from statestep.runtime.state import Array

log = logging.getLogger("statestep")

POLL_SECONDS = 0.2  # the longest a signal waits to be seen
LIVE_SECONDS = 180.0  # a loop that has not come round for longer is stuck; a flush alone may wait for 120 in an outage


@dataclass(frozen=True, slots=True)
class Limits:
    """When raw records are applied: after an interval, or once there are enough."""

    commit_interval_s: float = 0.1
    batch_records: int = 4096


@dataclass(slots=True)
class Summary:
    """What a run did."""

    consumed: int = 0
    predicted: int = 0
    refused: int = 0
    tombstones: int = 0
    replayed: int = 0
    anomalies: int = 0
    reasons: dict[str, int] = field(default_factory=dict)


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, which the next batch takes again.

    By default glibc hands it back once the top of the heap has twice its largest freed block, and the next batch
    faults it in anew, at a tenth of its cost. A freed block of 16 MiB lifts that bound (mallopt(3), under
    M_TRIM_THRESHOLD). Elsewhere this does nothing.
    """
    np.empty(16 << 20, np.uint8)


class TimedModel:
    """A model that reports how long each run takes; the engine itself reads no clock."""

    def __init__(self, model: Model, report: Callable[[float], None], clock: Callable[[], float] = time.perf_counter):
        self.contract = model.contract
        self.initial_states = model.initial_states
        self._step = model.step
        self._report = report
        self._clock = clock

    def step(self, x: Array, states: Sequence[Array]) -> tuple[dict[str, Array], list[Array]]:
        """The model's own step, timed."""
        began = self._clock()
        result = self._step(x, states)
        self._report(self._clock() - began)
        return result


class Service:
    """One source, one sink and one engine, run by one thread; `pages` may be asked from any."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        pipeline: Pipeline,
        metrics: Metrics,
        fingerprint: str,
        *,
        start: Callable[[int], int] | None = None,
        limits: Limits | None = None,
        policy: Policy = "dead-letter",
        on_batch: Callable[[Batch], None] | None = None,
    ):
        """`start` gives the offset where a new application begins in a partition; by default the first one kept."""
        self._source = source
        self._sink = sink
        self._pipeline = pipeline
        self._engine: Engine = pipeline.engine
        self._metrics = metrics
        self._fingerprint = fingerprint
        self._start = start or (lambda partition: source.bounds(partition)[0])
        self._limits = limits or Limits()
        self._policy = policy
        self._on_batch = on_batch
        self._progress: dict[int, Progress] = {}
        self._owed: dict[int, Progress] = {}  # commits that were refused, to be tried again after the next poll
        self._buffer: list[Record] = []
        self._board = Board(self._engine)
        self._lock = Lock()  # held while streams change, and while a page looks at them
        self._joined = False
        self._draining = False
        self._looped_at = time.monotonic()
        self._due_at = float("inf")
        self.summary = Summary()
        metrics.capacity.set(self._engine.table.capacity)
        keep_freed_memory()

    def run(self, stopping: Callable[[], bool] = lambda: False) -> Summary:
        """Serve until `stopping` or until the source is exhausted; what was taken by then is finished and committed.

        Any exception leaves offsets where they were committed last: a new `Service` goes on from there.
        """
        self._metrics.up.state("running")
        try:
            while True:
                self._looped_at = time.monotonic()
                last = stopping()
                if last and not self._draining:
                    self._draining = True
                    self._metrics.up.state("draining")
                self._take(0.0 if last else self._patience())
                last = last or self._source.exhausted
                full = len(self._buffer) >= self._limits.batch_records
                if self._buffer and (last or full or time.monotonic() >= self._due_at):
                    self._turn()
                self._report_lag()
                if last and not self._buffer:
                    return self.summary
        except BaseException:
            self._engine.rollback()
            self._metrics.up.state("failed")
            raise

    def _patience(self) -> float:
        if not self._buffer:
            return POLL_SECONDS
        return min(max(self._due_at - time.monotonic(), 0.0), POLL_SECONDS)

    def _take(self, timeout_s: float) -> None:
        """Poll once: follow the changes, then keep the records of what is still owned."""
        room = self._limits.batch_records - len(self._buffer)
        with self._timed("poll"):
            polled = self._source.poll(timeout_s, room)
        self._metrics.last_poll.set(time.time())
        lost = {p for change in polled.changes if change.kind == "lost" for p in change.partitions}
        self._commit({p: progress for p, progress in self._owed.items() if p not in lost})
        for change in polled.changes:
            self._follow(change)
        records = polled.records
        if polled.changes:
            records = [record for record in records if record.partition in self._progress]
        if records and not self._buffer:
            self._due_at = time.monotonic() + self._limits.commit_interval_s
        self._buffer += records

    def _follow(self, change: Change) -> None:
        """Take over or let go of partitions. Nothing is uncommitted here, so letting go is forgetting."""
        self._metrics.rebalances.labels(change.kind).inc()
        gone = set(change.partitions)
        self._buffer = [record for record in self._buffer if record.partition not in gone]
        with self._lock:
            streams = self._engine.keys()
            self._engine.drop([stream for stream in streams if split_key(stream)[0] in gone])
            self._engine.commit()
        for partition in change.partitions:
            self._progress.pop(partition, None)
            self._owed.pop(partition, None)
            self._metrics.forget(partition)
            if change.kind == "assigned":
                self._restore(partition)
        if change.kind == "assigned":
            self._joined = True
        if change.partitions:
            names = ", ".join(str(partition) for partition in sorted(change.partitions))
            log.info("%s %s: partitions %s; now %d", self._source.topic, change.kind, names, len(self._progress))
        self._metrics.assigned.set(len(self._progress))

    def _restore(self, partition: int) -> None:
        """Find where a partition goes on, and read on from where its streams began."""
        committed = self._source.committed(partition)
        start = self._start(partition) if committed is None else 0
        bounds, count = self._source.bounds(partition), self._source.partitions
        if partition >= count:
            raise checkpoint.PartitionsChanged(
                f"partition {partition} of {self._source.topic} was added while the {count} before it were being "
                "read, so its keys have moved away from their states; a new --app-id begins anew"
            )
        plan = checkpoint.restore(committed, bounds, start, count, self._fingerprint)
        if plan.warning:
            log.warning("%s partition %d: %s", self._source.topic, partition, plan.warning)
        if plan.truncated:
            self._metrics.truncated.inc()
        if plan.commit:
            self._commit({partition: plan.progress})
        if plan.progress.restoring:
            count = plan.progress.resume - plan.progress.next
            log.info("%s partition %d: replaying %d records to restore states", self._source.topic, partition, count)
        self._progress[partition] = plan.progress
        self._source.seek(partition, plan.progress.next)

    def _turn(self) -> None:
        """Apply what was taken, and make it durable in this order:

        1. decode, advance the streams in memory, encode;
        2. send outputs and dead letters;
        3. flush: every one of them is acknowledged;
        4. commit the offsets;
        5. call the new states the streams' own.
        """
        records, self._buffer = self._buffer, []
        with self._timed("decode"):
            decoded = self._pipeline.decode(records)
        # Step 1.
        with self._lock, self._timed("advance"):
            batch = self._pipeline.advance(records, decoded, self._progress)
            self._board.update(batch)
        with self._timed("encode"):
            messages = self._pipeline.encode(batch)
        # Steps 2 and 3.
        with self._timed("produce"):
            self._sink.send(messages)
            self._sink.flush()
        # Step 4.
        moved = {p: progress for p, progress in batch.progress.items() if progress != self._progress[p]}
        with self._timed("commit"):
            self._commit({p: progress for p, progress in moved.items() if not progress.restoring})
        # Step 5.
        with self._lock:
            self._engine.commit()
            self._progress = batch.progress
        self._count(batch)
        if self._on_batch is not None:
            self._on_batch(batch)

    def _commit(self, progress: dict[int, Progress]) -> None:
        if not progress:
            return
        count = self._source.partitions
        notes = {p: checkpoint.note(where, count, self._fingerprint) for p, where in progress.items()}
        try:
            self._source.commit(notes)
        except CommitRefused as refused:
            # The outputs stand. Whoever owns the partitions next sends them again, with the same bits, unless the
            # group has settled by the next poll and takes the offsets then.
            log.warning("%s: offsets not committed yet: %s", self._source.topic, refused)
            self._metrics.commit_failures.inc()
            self._owed |= progress
            return
        for partition in progress:
            self._owed.pop(partition, None)
        self._metrics.commits.inc()
        for partition, committed in notes.items():
            self._metrics.partition(partition)[3].set(committed.offset)

    def _count(self, batch: Batch) -> None:
        """Tell the metrics and the summary what a batch did."""
        tally, metrics = batch.tally, self._metrics
        for partition, count in tally.consumed.items():
            metrics.partition(partition)[0].inc(count)
        metrics.bytes_consumed.inc(tally.bytes)
        metrics.replayed.inc(tally.replayed)
        metrics.tombstones.inc(tally.tombstones)
        metrics.produced.inc(tally.predicted + tally.tombstones)
        metrics.predictions.inc(tally.predicted)
        metrics.out_of_order.inc(tally.out_of_order)
        metrics.gaps.inc(tally.gaps)
        for reason, count in tally.refused.items():
            metrics.refused(self._policy, reason, count)
        metrics.steps.inc(sum(tally.rows))
        metrics.runs.inc(tally.runs)
        metrics.waves.inc(sum(tally.waves) - len(tally.waves))
        metrics.batch_streams.observe(tally.rows)
        metrics.streams.set(len(self._engine))
        metrics.state_bytes.set(self._engine.table.nbytes)
        anomalies = int(np.count_nonzero(batch.column("anomaly")))
        metrics.anomalies.inc(anomalies)
        metrics.scores.observe(batch.column("score"), metrics.model)
        metrics.errors.observe(batch.errors, metrics.model)
        times = np.concatenate(batch.event_times) if batch.event_times else np.empty(0, np.int64)
        times = times[times != NO_TIME]
        if times.size:
            # Clocks differ, and a sum that falls is taken for a restart.
            metrics.latency.observe(np.maximum(time.time() - times / 1e9, 0.0), metrics.topic)
            metrics.last_record.set(float(times.max()) / 1e9)
        total = self.summary
        total.consumed += sum(tally.consumed.values())
        total.predicted += tally.predicted
        total.refused += sum(tally.refused.values())
        total.tombstones += tally.tombstones
        total.replayed += tally.replayed
        total.anomalies += anomalies
        for reason, count in tally.refused.items():
            total.reasons[reason] = total.reasons.get(reason, 0) + count

    def _report_lag(self) -> None:
        ends = self._source.high_watermarks()
        for partition, progress in self._progress.items():
            _, lag, position, _ = self._metrics.partition(partition)
            position.set(progress.next)
            if partition in ends:
                lag.set(max(ends[partition] - progress.next, 0))
        self._metrics.restoring.set(sum(progress.restoring for progress in self._progress.values()))

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._metrics.stages.observe([time.perf_counter() - began], stage)

    # What the HTTP server asks, from its own threads.

    def pages(self) -> Pages:
        """The service as the HTTP server shows it."""
        return Pages(self._health, self._streams, self._stream)

    def _health(self) -> Health:
        silent = time.monotonic() - self._looped_at
        live = silent < LIVE_SECONDS
        restoring = [p for p, progress in list(self._progress.items()) if progress.restoring]
        if not live:
            reason = f"the loop has not come round for {silent:.0f} s"
        elif self._draining:
            reason = "finishing, then stopping"
        elif not self._joined:
            reason = "waiting for partitions"
        elif restoring:
            reason = f"replaying history of partitions {sorted(restoring)}"
        else:
            reason = "serving"
        return Health(live, live and reason == "serving", reason)

    def _streams(self, count: int) -> dict[str, Any]:
        with self._lock:
            return {
                "streams": len(self._engine),
                "highest_scores": self._board.highest(count),
                "stalest": self._board.stalest(count),
            }

    def _stream(self, key: bytes) -> list[dict[str, Any]]:
        with self._lock:
            return self._board.show(key, sorted(self._progress))
