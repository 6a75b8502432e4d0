"""The loop: poll, restore, apply, commit. All control flow of the service is here, and every effect is in order.

Only raw records wait across polls: what was advanced is committed before the next one, or taken back. A transaction
holds answers, a slice of the states that are older in the changelog than in memory, markers and offsets; nothing
becomes the streams' own before it is known to count. `checkpoint` has the words, `restore` the way back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

from statestep.consumers import checkpoint
from statestep.consumers.batch import Batch
from statestep.consumers.bounds import Bounds
from statestep.consumers.changelog import StateCodec
from statestep.consumers.checkpoint import Policies
from statestep.consumers.metrics import Metrics
from statestep.consumers.pages import Pager
from statestep.consumers.partitions import Partitions
from statestep.consumers.pipeline import Pipeline, Policy, split_key
from statestep.consumers.ports import (
    Blocked,
    BrokerError,
    Change,
    Changelog,
    Identity,
    Record,
    Rejected,
    Sink,
    Source,
    Undecided,
)
from statestep.consumers.report import Summary, count, standing, timed
from statestep.consumers.restore import Restored, Restorer, answers, looked_at
from statestep.consumers.spill import Spill
from statestep.consumers.store import Store, StoreError
from statestep.consumers.timed import keep_freed_memory
from statestep.consumers.transaction import Composer, Limits, Turn

log = logging.getLogger("statestep")

POLL_S = 0.2  # the longest a signal waits to be seen
STARTS = 5  # tries to make the sink ready, each with a deadline of its own
RETRY_S = 1.0  # between two tries to find out what became of a transaction
LOOK_S = 600.0  # between two looks at whether the input is still the log it was


class Service:
    """One source, one sink and one engine, run by one thread; `pages` may be asked from any."""

    def __init__(
        self,
        source: Source,
        sink: Sink,
        changelog: Changelog,
        pipeline: Pipeline,
        metrics: Metrics,
        *,
        model: str,
        writer: str,
        semantics: str = "",
        policies: Policies | None = None,
        start: Callable[[int], int] | None = None,
        limits: Limits | None = None,
        policy: Policy = "dead-letter",
        store: Store | None = None,
        on_batch: Callable[[Batch], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`model` is the fingerprint, `semantics` a hash of all that decides states, `start` gives the offset where a
        new application begins in a partition, by default the first one kept. `store` is a local copy of the changelog.
        `writer` is a name that no other start of a service has.
        """
        self._source, self._sink = source, sink
        self._pipeline, self._engine = pipeline, pipeline.engine
        self._metrics = metrics
        self._limits = limits or Limits()
        self._policy = policy
        self._on_batch, self._clock = on_batch, clock
        self._lock = Lock()  # held while streams change, and while a page looks at them
        self._codec = StateCodec(self._engine.model.contract)
        self._restorer = Restorer(
            source,
            changelog,
            self._engine,
            self._codec,
            semantics=semantics,
            model=model,
            policies=policies or Policies(),
            start=start or (lambda partition: source.bounds(partition)[0]),
            lock=self._lock,
        )
        self._composer = Composer(
            self._engine, self._codec, writer, keeps_states=sink.keeps_states, semantics=semantics, model=model
        )
        self._spill = Spill(self._engine, self._codec, store, metrics)
        self._restorer.store = store
        self._partitions = Partitions(keeps_states=sink.keeps_states)
        self._identity = Identity("", source.partitions, True)
        self._buffer: list[Record] = []
        # Half of the table is for dirty streams.
        room = self._limits.batch_records if store is None else max(self._engine.table.capacity // 2, 1)
        self._bounds = Bounds(min(self._limits.batch_records, room), self._limits.batch_bytes)
        self._doubt: Turn | None = None
        self._turned_s = self._retry_s = self._looked_s = clock()
        self._due_s = float("inf")
        self._draining_s: float | None = None
        self._settled = True  # whether the last poll was of a group at rest
        self.pager = Pager(pipeline, self._lock, clock)
        self.summary = Summary()
        metrics.capacity.set(self._engine.table.capacity)
        keep_freed_memory()

    def run(self, stopping: Callable[[], bool] = lambda: False) -> Summary:
        """Serve until `stopping` or until the source is exhausted; what was taken by then is finished and committed.

        Any exception leaves what is durable as it was committed last: a new `Service` goes on from there.
        """
        self._metrics.up.state("running")
        try:
            self._begin(stopping)
            while not self._round(stopping()):
                pass
            return self.summary
        except BaseException:
            self._engine.rollback()
            self._metrics.up.state("failed")
            raise

    def _begin(self, stopping: Callable[[], bool]) -> None:
        """Make the sink ready; a node of the broker that is just coming or going is waited for a while."""
        for left in reversed(range(STARTS)):
            try:
                self._sink.recover()
                return
            except BrokerError:
                if not left or stopping():
                    raise

    def _round(self, last: bool) -> bool:
        """Once around the loop; whether it was the last time."""
        now_s = self._clock()
        self.pager.looped(now_s)
        if last and self._draining_s is None:
            self._draining_s = now_s
            self._metrics.up.state("draining")
            for partition in self._restorer.partitions():
                self._restorer.drop(partition)
        with timed(self._metrics, "poll"):
            polled = self._source.poll(self._patience(now_s), max(self._bounds.records - len(self._buffer), 1))
        self._metrics.last_poll.set(time.time())
        self._settled = polled.membership is not None
        now_s = self._clock()
        if self._spill.lost:
            self._store_lost(now_s)
        if self._doubt is not None:
            self._doubt.changes += polled.changes
            if polled.membership is not None and now_s >= self._retry_s:
                self._resolve(self._doubt, now_s)
        else:
            for change in polled.changes:
                self._follow(change, now_s)
            self._take(polled.records, now_s)  # before others are back, which go on elsewhere than they were read
            self._restore(now_s)
            if polled.membership is not None and self._due(now_s):
                self._turn(polled.membership, now_s)
        self._report(now_s)
        return self._finished(now_s)

    def _finished(self, now_s: float) -> bool:
        """Whether the loop has come to its end: asked to stop, or nothing more to read, and all of it durable."""
        if self._draining_s is None:
            if not self._source.exhausted or self._restorer or self._partitions.opening:
                return False
        elif now_s - self._draining_s > self._limits.drain_s:
            log.warning("stopping with states to write: the next start replays a little")
            return True
        return not (self._doubt or self._buffer or self._partitions.unwritten())

    def _patience(self, now_s: float) -> float:
        """How long the poll may wait."""
        if not self._settled:  # nothing can be committed before the group has come to rest
            return POLL_S
        busy = self._draining_s is not None or self._restorer.busy(now_s) or self._partitions.opening
        if busy and self._doubt is None:
            return 0.0
        due_s = self._due_s if self._doubt is None else self._retry_s
        return min(max(due_s - now_s, 0.0), POLL_S)

    def _take(self, records: Sequence[Record], now_s: float) -> None:
        """Keep the records of partitions that are running; what is polled while stopping is left to the next start."""
        if self._draining_s is not None:
            return
        self._buffer += [record for record in records if record.partition in self._partitions.running]
        if not (self._buffer or self._partitions.unwritten()):  # they may have gone with their partitions
            self._due_s = float("inf")
        elif self._due_s == float("inf"):
            self._due_s = max(now_s, self._turned_s) + self._limits.commit_interval_s

    def _due(self, now_s: float) -> bool:
        if not (self._buffer or self._partitions.unwritten() or self._partitions.opening):
            return False
        hurry = self._draining_s is not None or bool(self._partitions.opening) or self._source.exhausted
        return hurry or len(self._buffer) >= self._bounds.records or now_s >= self._due_s

    # Partitions that come and go.

    def _follow(self, change: Change, now_s: float) -> None:
        """Take over or let go of partitions. Nothing is uncommitted here, so letting go is forgetting."""
        self._metrics.rebalances.labels(change.kind).inc()
        for partition in change.partitions:
            self._forget(partition)
            if change.kind == "assigned" and self._draining_s is None:
                self._restorer.begin(partition, now_s)
        self.pager.joined |= change.kind == "assigned"
        if change.partitions:
            names = ", ".join(str(partition) for partition in sorted(change.partitions))
            owned = len(self._partitions.running) + len(self._partitions.opening) + len(self._restorer.partitions())
            log.info("%s %s: partitions %s; now %d", self._source.topic, change.kind, names, owned)
            self._metrics.assigned.set(owned)

    def _forget(self, partition: int) -> None:
        self._restorer.drop(partition)
        self._buffer = [record for record in self._buffer if record.partition != partition]
        self._bounds.forget(partition)
        self._partitions.drop(partition)
        with self._lock:
            streams = self._engine.keys()
            self._engine.drop([stream for stream in streams if split_key(stream)[0] == partition])
            self._engine.commit()
        self._spill.forget(partition)
        self._metrics.forget(partition)

    def _restore(self, now_s: float) -> None:
        """One slice of every restore; what is back goes on, or waits for its first marker."""
        try:
            for back in self._restorer.step(now_s):
                self._adopt(back)
        except StoreError as error:
            self._spill.fail(error)
        except Blocked:
            if answers(self._source):
                raise

    def _adopt(self, back: Restored) -> None:
        partition, progress = back.partition, back.plan.progress
        self._identity = back.identity
        self._spill.keep(partition, back.spilled, progress.epoch)
        self.pager.restored(partition)
        log.info(
            "%s partition %d: %d streams restored%s; going on at %d, replaying %d messages",
            *(self._source.topic, partition, back.streams),
            *(f" and {back.spilled} left in the local store" if back.spilled else "", progress.next, progress.owed),
        )
        if self._partitions.adopt(back):
            self._source.seek(partition, progress.position)

    def _store_lost(self, now_s: float) -> None:
        """The local store is gone: what only it held comes from the changelog again."""
        self._restorer.store = None
        for partition in {*self._spill.clear(), *self._restorer.partitions()}:
            self._again(partition, now_s)

    def _again(self, partition: int, now_s: float) -> None:
        """Bring a partition back from what is durable, as if it had just been assigned."""
        self._source.pause(partition)
        self._forget(partition)
        self._restorer.begin(partition, now_s)

    def _turn(self, membership: Any, now_s: float) -> None:
        """Apply what was taken, and make it durable:

        1. decode, advance the streams in memory, encode;
        2. choose which dirty streams' states go along, and mark every partition that moves;
        3. commit it all;
        4. make it the streams' own.
        """
        records = self._bounds.cut(self._buffer)
        with timed(self._metrics, "decode"):
            decoded = self._pipeline.decode(records)
        # Step 1.
        with self._lock, timed(self._metrics, "advance"):
            if not self._spill.admit(records, decoded):
                return
            batch = self._pipeline.advance(records, decoded, self._partitions.running)
        with timed(self._metrics, "encode"):
            messages = self._pipeline.encode(batch, self._bounds.undeliverable)
        # Step 2.
        spills, most = self._spill.store is not None, self._limits.batch_records
        turn = self._composer.compose(
            records,
            batch,
            messages,
            running=self._partitions.running,
            opening=self._partitions.opening,
            waiting=self._partitions.waiting,
            identity=self._identity,
            elapsed_s=now_s - self._turned_s,
            now_s=now_s,
            pace=self._limits.pace(
                self._codec.size * max(len(self._partitions.running), 1),
                at_once=not self._identity.is_log or self._partitions.crowded(batch, self._engine, spills, most),
                ending=self._draining_s is not None or self._source.exhausted,
                searching=self._bounds.searching,
                idle=not records,
            ),
        )
        # Step 3.
        positions: Mapping[int, int] = {}
        if turn.transaction.offsets:
            try:
                with timed(self._metrics, "commit"):
                    positions = self._sink.commit(turn.transaction, membership)
            except (Undecided, Blocked) as error:
                if isinstance(error, Blocked) and answers(self._source):
                    raise
                self._doubted(turn, error, now_s)
                return
        # Step 4.
        self._promote(turn, positions, now_s)

    def _promote(self, turn: Turn, positions: Mapping[int, int], now_s: float) -> None:
        """What a transaction holds is durable: it becomes the streams' own, here and in the local store."""
        with self._lock:
            self._engine.clean(turn.streams)
            self._engine.drop(turn.forgotten)
            self._engine.commit()
            self.pager.board.update(turn.batch)
        for partition in set(self._partitions.promote(turn, now_s)) - turn.moved:
            self._source.seek(partition, self._partitions.running[partition].position)
        self._spill.mirror(turn.transaction.states, positions)
        self._buffer = self._buffer[len(turn.records) :]
        self._bounds.taken(self._partitions.running)
        self._turned_s, self._due_s = now_s, float("inf")
        count(self._metrics, self.summary, turn, self._policy, self._engine)
        if self._on_batch is not None:
            self._on_batch(turn.batch)

    # What became of a transaction that failed.

    def _doubted(self, turn: Turn, error: Exception, now_s: float) -> None:
        log.warning("%s: a transaction failed, looking what became of it: %s", self._source.topic, error)
        self._metrics.commit_failures.inc()
        turn.refused = isinstance(error, Rejected)
        self._doubt, self._retry_s = turn, now_s

    def _resolve(self, turn: Turn, now_s: float) -> None:
        """Find out whether a transaction counts: by what is committed for the partitions that are still ours."""
        self._retry_s = now_s + RETRY_S  # unless it is found out now
        try:
            if not turn.recovered:
                self._sink.recover()
                turn.recovered = True
            found = {p: self._source.committed(p) for p in turn.transaction.offsets if p not in turn.moved}
        except BrokerError as error:
            log.warning("%s: still not known what became of a transaction: %s", self._source.topic, error)
            return
        except Blocked:
            if answers(self._source):
                raise
            return
        counts = [p for p, committed in found.items() if committed == turn.transaction.offsets[p]]
        void = [p for p, committed in found.items() if committed == self._partitions.known.get(p)]
        self._doubt = None
        if found and len(counts) == len(found):
            self._promote(turn, {}, now_s)
        else:
            self._take_back(turn, now_s)
        for change in turn.changes:
            self._follow(change, now_s)
        if len(counts) < len(found):
            for partition in found.keys() - set(void):  # someone else has written
                self._again(partition, now_s)
        # The client reads on from where it was, so every partition is put back to where its streams are.
        self._buffer = []
        for partition, progress in self._partitions.running.items():
            self._source.seek(partition, progress.position)

    def _take_back(self, turn: Turn, now_s: float) -> None:
        with self._lock:
            self._engine.rollback()
        self._turned_s, self._due_s = now_s, float("inf")
        if turn.refused:
            self._bounds.refused(turn.records, turn.transaction.messages, self._codec.size)

    def _report(self, now_s: float) -> None:
        """Lag and progress for the metrics and pages, and now and then a look at the input itself."""
        running = self._partitions.running
        back = sorted([*self._partitions.opening, *self._restorer.partitions()])
        restoring = standing(self._metrics, running, back, self._source.high_watermarks())
        self._metrics.dirty.set(self._partitions.dirty())
        self._metrics.snapshot_age.set(checkpoint.oldest(self._partitions.waiting, now_s))
        self.pager.tell(sorted(running), restoring, self._settled, bool(self._doubt), self._draining_s is not None)
        if now_s - self._looked_s > LOOK_S and running:
            self._looked_s, self._identity = now_s, looked_at(self._source, self._identity)
