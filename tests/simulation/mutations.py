"""The list of mutations: each breaks one rule of exactly once, in the scenario that shows it.

K1 to K8 are the traps of kafka-python that `tests/broker/test_traps.py` knows by these names.

Not here, since another rule holds against them, so that nothing breaks:
- the changelog read before the committed offset: a transaction's records are all in the changelog before its offsets
  are sent, and the end that is read to is the high watermark; what still disagrees is looked at twice;
- a generation that is not that of the last join: the broker refuses it. Only a membership that was lost it would take;
- records taken of partitions that do not run: the client gives none of paused ones;
- a store believed without reading on: its sequence is not the committed one, and it is dropped at the first look;
- the outcome of a transaction looked up before `recover`: an offset that may still be committed is waited for;
- partitions of a doubt that others have written to: to have lost them in between has been heard before.
Not here, since the simulation does not have what they guard against: a commit that ends the next transaction (a slow
producer is replaced), a poll that spins on an error of a deserializer, a clock that is set back, a state directory
that is older than tombstones are kept, a machine that gives other bits. The tests of the adapters, of the store and
of `verify` have these.
"""

from __future__ import annotations

from .mishaps import (
    ABORT,
    ASLEEP,
    BUMP,
    CRASH,
    DRAINED,
    HANGS,
    IDLE,
    LEFT,
    OFFSETS,
    OVERTAKEN,
    PACED,
    PLAIN,
    POISON,
    QUIET,
    SILENT,
    TWICE,
    TWIN,
)
from .mutants import mutant
from .mutations_restore import RESTORES

HERE = "statestep.consumers."
SERVICE = f"{HERE}service:Service."
SINK = f"{HERE}kafka_sink:KafkaSink."
SOURCE = f"{HERE}kafka_source:KafkaSource."
PIPELINE = f"{HERE}pipeline:Pipeline."
CHECKPOINT = f"{HERE}checkpoint:"
RESTORE = f"{HERE}restore:"
ENGINE = "statestep.runtime.engine:Engine."
TABLE = "statestep.runtime.state:StateTable."
COMPOSE = f"{HERE}transaction:Composer.compose"
DELIVER = f"{HERE}kafka_delivery:deliver"

MUTANTS = [
    # One apply path, and what a replay leaves out.
    mutant(
        "replayed streams are counted clean",
        "one apply path",
        CRASH,
        (
            f"{PIPELINE}_advance",
            "for i in np.flatnonzero(out.dirtied).tolist():",
            "for i in [i for i in np.flatnonzero(out.dirtied).tolist() if run[i].record.offset >= "
            "batch.before[run[i].record.partition].next]:",
        ),
    ),
    mutant(
        "outputs of a replay are sent again",
        "one apply path",
        CRASH,
        (
            f"{PIPELINE}_advance",
            "np.fromiter((r.offset >= answered[r.partition] for r, _ in run), bool, len(run))",
            "np.ones(len(run), bool)",
        ),
    ),
    mutant(
        "dead letters and tombstones of a replay are sent again",
        "one apply path",
        CRASH,
        (f"{PIPELINE}_suppressed", "return replayed", "return False"),
    ),
    mutant(
        "a replayed message that the record holds is applied again",
        "one apply path",
        CRASH,
        (f"{PIPELINE}_held", "replayed &= (slots", "replayed &= (slots < -1) & (slots"),
    ),
    mutant(
        "a record's own message is applied again",
        "one apply path",
        CRASH,
        (f"{PIPELINE}_held", "[slots] >= offsets", "[slots] > offsets"),
    ),
    # Dirtiness.
    mutant(
        "dirtiness is not in the undo log",
        "undo log",
        ABORT,
        (f"{TABLE}rollback", "self.scatter(slots, rows)", "self.scatter(slots, [*rows[:-1], self._slabs[-1][slots]])"),
    ),
    mutant(
        "a tombstone does not make its stream dirty",
        "undo log",
        PLAIN,
        (f"{PIPELINE}_end", "np.array([record.offset])).any():", "np.array([record.offset])).any() and False:"),
    ),
    mutant(
        "a stream that ended is dropped at once",
        "undo log",
        PLAIN,
        (
            f"{PIPELINE}_end",
            "if self.engine.end([stream], np.array([record.offset])).any():",
            "self.engine.drop([stream])\n    if False:",
        ),
    ),
    mutant(
        "streams are final before the commit",
        "commit first",
        ABORT,
        (f"{SERVICE}_turn", "if turn.transaction.offsets:", "self._engine.commit()\n    if turn.transaction.offsets:"),
    ),
    # What a transaction holds.
    mutant(
        "a transaction spans a poll",
        "no poll within",
        PLAIN,
        (
            f"{SERVICE}_turn",
            "positions = self._sink",
            "self._source.poll(0.0, 1)\n                positions = self._sink",
        ),
    ),
    mutant(
        "states alone go without offsets",
        "what is committed",
        PLAIN,
        (
            COMPOSE,
            "turn.after[partition], offsets[partition] = after, checkpoint.committed(marker)",
            "turn.after[partition] = after\n        if moved: offsets[partition] = checkpoint.committed(marker)",
        ),
    ),
    mutant(
        "states alone go without a marker",
        "what is committed",
        PLAIN,
        (
            COMPOSE,
            "self._states(partition, streams, forgotten, marker)",
            "self._states(partition, streams, forgotten, marker)[: None if moved else -1]",
        ),
    ),
    mutant(
        "the sequence is not raised",
        "sequences tell",
        PLAIN,
        (f"{CHECKPOINT}marked", "sequence=progress.sequence + 1", "sequence=progress.sequence"),
    ),
    mutant(
        "redo is next though streams are dirty",
        "what is committed",
        PLAIN,
        (COMPOSE, "left[0] if left else progress.position", "progress.position"),
        (f"{HERE}partitions:Partitions._check", "assert not waiting or", "assert True or"),
    ),
    mutant(
        "the records of a replay are not counted",
        "what is committed",
        CRASH,
        (f"{CHECKPOINT}marker", " + progress.owed", ""),
    ),
    mutant(
        "records are taken before the first marker counts",
        "what is committed",
        PLAIN,
        (f"{HERE}partitions:Partitions.adopt", "at_once = not (", "at_once = True or not ("),
    ),
    mutant(
        "no transaction without input",
        "snapshots",
        QUIET,
        (f"{SERVICE}_due", "self._buffer or self._partitions.unwritten() or", "self._buffer or"),
    ),
    mutant(
        "snapshots are never due",
        "snapshots",
        QUIET,
        (f"{CHECKPOINT}due", "return min(max(share, old), len(waiting), pace.records)", "return 0"),
    ),
    # Committing.
    mutant(
        "futures are not looked at (K1)",
        "acknowledged first",
        ABORT,
        (DELIVER, "if not future.succeeded()]", "if item.kind == 'state' and not future.succeeded()]"),
    ),
    mutant(
        "the commit comes before the futures (K2)",
        "acknowledged first",
        BUMP,
        (DELIVER, "producer.flush(timeout=timeout_s)", "pass"),
        (DELIVER, "if not future.succeeded()]", "if future.failed()]"),
        (
            f"{SINK}_commit",
            "future.value.offset + 1 for state, future in written",
            "future.value.offset + 1 for state, future in written if future.value",
        ),
    ),
    mutant(
        "a producer that failed is used again (K3)",
        "a new producer",
        OFFSETS,
        (f"{SINK}commit", "self._abandon()", "pass"),
        (
            f"{SINK}recover",
            "self._abandon()",
            "if self._producer is not None:\n        with suppress(KafkaError):\n"
            "            self._producer.abort_transaction()\n            return\n    self._abandon()",
        ),
    ),
    mutant(
        "no membership goes with the offsets",
        "membership",
        PLAIN,
        (
            f"{SINK}_commit",
            "offsets, membership)",
            "offsets, type(membership)(membership.group_id, -1, '', membership.group_instance_id))",
        ),
    ),
    mutant(
        "a membership that was lost is handed on (K4)",
        "membership",
        ASLEEP,
        (
            f"{SOURCE}_holds",
            "generation: int = membership.generation_id",
            "return True\n    generation = membership.generation_id",
        ),
    ),
    mutant(
        "a call has no deadline (K5)",
        "deadlines",
        HANGS,
        (f"{SINK}commit", "self._clients.within(\n", "(lambda _, call: call())(\n"),
    ),
    mutant(
        "a fenced instance goes on (K7)",
        "membership",
        TWIN,
        (f"{SOURCE}_silently_fenced", "return not", "return False and not"),
    ),
    mutant(
        "no seek back after an abort (K8)",
        "seek back",
        ABORT,
        (
            f"{SERVICE}_resolve",
            "for partition, progress in self._partitions.running.items():",
            "for partition, progress in {}.items():",
        ),
    ),
    mutant(
        "what failed is taken for committed",
        "sequences tell",
        ABORT,
        (f"{SERVICE}_resolve", "if committed == turn.transaction.offsets[p]]", "]"),
    ),
    mutant(
        "what failed is taken for aborted",
        "sequences tell",
        SILENT,
        (f"{SERVICE}_resolve", "if committed == turn.transaction.offsets[p]]", "if False]"),
        (f"{SERVICE}_resolve", "if committed == self._partitions.known.get(p)]", "]"),
    ),
    mutant(
        "offsets are compared instead of sequences",
        "sequences tell",
        IDLE,
        (
            f"{SERVICE}_resolve",
            "if committed == turn.transaction.offsets[p]]",
            "if committed and committed.offset == turn.transaction.offsets[p].offset]",
        ),
    ),
    mutant(
        "another's transaction is taken for one's own",
        "sequences tell",
        OVERTAKEN,
        (
            f"{SERVICE}_resolve",
            "if committed == turn.transaction.offsets[p]]",
            "if committed and [committed.offset, committed.metadata.split()[0]] == "
            "[(own := turn.transaction.offsets[p]).offset, own.metadata.split()[0]]]",
        ),
    ),
    mutant(
        "at-least-once sends outputs after the commit",
        "at-least-once",
        TWICE,
        (f"{SINK}_commit", "self._writer.write(transaction.messages)", "pass"),
        (
            f"{SINK}_commit",
            "producer.commit_transaction()",
            "producer.commit_transaction()\n        if self._writer is not None:\n"
            "            self._writer.write(transaction.messages)",
        ),
    ),
    # What decides states.
    mutant(
        "the wall clock decides",
        "no clock",
        PLAIN,
        (
            f"{PIPELINE}_advance",
            "(row.observation.time for row in run)",
            "(__import__('time').time_ns() for row in run)",
        ),
    ),
    mutant(
        "lateness is judged by the batch",
        "no clock",
        PLAIN,
        (f"{PIPELINE}_note", "out.previous_time[kept]", "np.maximum.accumulate(out.previous_time[kept])"),
    ),
    mutant(
        "a refused result changes its stream",
        "no clock",
        PLAIN,
        (
            f"{ENGINE}_run",
            "self.table.scatter(slots[good], [value[good] for value in following])",
            "self.table.scatter(slots, following)",
        ),
    ),
    mutant(
        "an undeliverable message is not applied",
        "poison",
        POISON,
        (
            f"{SERVICE}_turn",
            "decoded = self._pipeline.decode(records)",
            "from statestep.consumers.pipeline import UNDELIVERABLE\n        decoded = [UNDELIVERABLE if (r.partition, "
            "r.offset) in self._bounds.undeliverable else d for r, d in zip(records, self._pipeline.decode(records))]",
        ),
    ),
    mutant(
        "a refused transaction is tried as it is",
        "poison",
        POISON,
        (f"{HERE}bounds:Bounds.refused", "self.records = len(records) // 2", "pass"),
    ),
    mutant(
        "an event that is refused costs its answer",
        "poison",
        POISON,
        (f"{HERE}bounds:Bounds.refused", "first = 0 if", "first = 1 if"),
    ),
    mutant(
        "an event is told though its answer is not taken",
        "poison",
        POISON,
        (f"{PIPELINE}_leave_out", "found.keys() & notices.keys()", "set[int]()"),
    ),
    mutant(
        "the epoch is not raised on a cold start",
        "epochs",
        LEFT,
        (f"{CHECKPOINT}_begin", "epoch=found.epochs + 1", "epoch=max(found.epochs, 0)"),
    ),
    mutant(
        "states of another epoch are used",
        "epochs",
        LEFT,
        (f"{RESTORE}put", "np.flatnonzero(decoded.epochs == epoch)", "np.arange(len(decoded.keys))"),
    ),
    # Events.
    mutant(
        "a stream that ends leaves its event open",
        "events",
        PLAIN,
        (f"{PIPELINE}_end", "if self.teller.reads_records and", "if False and"),
    ),
    mutant(
        "an event is looked for once its stream has ended",
        "events",
        PLAIN,
        (
            f"{PIPELINE}_end",
            "self.engine.read([stream])",
            "(self.engine.end([stream], np.array([record.offset])), self.engine.read([stream]))[1]",
        ),
    ),
    mutant(
        "an event has another name at each timestep",
        "events",
        PLAIN,
        (f"{HERE}teller:Teller._event", "step - steps + 1", "step"),
    ),
    # How fast.
    mutant(
        "every state goes with every transaction",
        "snapshots",
        PACED,
        (f"{CHECKPOINT}due", "if pace.interval_s <= 0:", "if True:"),
    ),
    mutant(
        "a stop leaves streams dirty",
        "a clean stop",
        DRAINED,
        (f"{SERVICE}_finished", "self._buffer or self._partitions.unwritten())", "self._buffer)"),
    ),
    *RESTORES,
]
