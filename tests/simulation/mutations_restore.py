"""Mutations of how partitions come, go and are brought back, and of what must stop them."""

from __future__ import annotations

from .mishaps import (
    ANEW,
    AWAY,
    BETWEEN,
    CORRUPTED,
    CRASH,
    DOUBT,
    EXPELLED,
    HOLE,
    HUSHED,
    LEAVE,
    LOOKS,
    LOST,
    MODEL,
    OPENED,
    PLAIN,
    RESET,
    SEMANTICS,
    SHORT,
    SLOW,
    STORE,
)
from .mutants import mutant

HERE = "statestep.consumers."
SERVICE = f"{HERE}service:Service."
SOURCE = f"{HERE}kafka_source:KafkaSource."
CHECKPOINT = f"{HERE}checkpoint:"
RESTORE = f"{HERE}restore:"
EXPIRY = f"{HERE}expiry:Expiry."
OPEN = f"{HERE}kafka_changelog:KafkaChangelog.open"

RESTORES = [
    # Rebalances.
    mutant(
        "revoked partitions are not told of",
        "changes are heard",
        LEAVE,
        (f"{SOURCE}_drain", 'tell("revoked", self._owned - partitions)', "pass"),
    ),
    mutant(
        "lost partitions are not told of",
        "changes are heard",
        LOST,
        (
            f"{SOURCE}_drain",
            'tell("lost", self._owned & partitions)\n            self._owned, self._generation',
            "self._owned, self._generation",
        ),
    ),
    mutant(
        "K18: who was expelled while joining goes on",
        "changes are heard",
        EXPELLED,
        (f"{HERE}kafka_source:_Assignor._missed_a_round", "return member != self._member or", "return"),
    ),
    mutant(
        "a partition that is nobody's is not looked for",
        "changes are heard",
        BETWEEN,
        (f"{SOURCE}poll", " and not self._place.look()", ""),
    ),
    mutant(
        "what waits of a lost partition is committed",
        "changes are heard",
        LEAVE,
        (f"{SERVICE}_forget", "if record.partition != partition]", "]"),
    ),
    mutant(
        "changes during a doubt are forgotten",
        "changes are heard",
        DOUBT,
        (
            f"{SERVICE}_resolve",
            "for change in turn.changes:\n        self._follow",
            "for change in []:\n        self._follow",
        ),
    ),
    # Restoring.
    mutant(
        "a replay starts at next",
        "restore order",
        CRASH,
        (f"{CHECKPOINT}_go_on", "position=seen.redo if seen.records else seen.next", "position=seen.next"),
        (f"{CHECKPOINT}_go_on", "owed=seen.records", "owed=0"),
    ),
    mutant(
        "the changelog is read to the last stable offset",
        "restore order",
        SLOW,
        (OPEN, "self._ends[partition] = end", "self._ends[partition] = self._consumer.end_offsets([tp])[tp]"),
    ),
    mutant(
        "offset and marker need not agree",
        "restore order",
        RESET,
        (f"{CHECKPOINT}_agreed", "if said is None:", "if True:"),
    ),
    mutant(
        "what was read of a partition before it is back is taken",
        "restore order",
        OPENED,
        (
            f"{SERVICE}_round",
            "        self._restore(now_s)\n",
            "        self._restore(now_s)\n        self._take(polled.records, now_s)\n",
        ),
        (f"{SERVICE}_round", "self._take(polled.records, now_s)  # before", "pass  # before"),
        (f"{SERVICE}_promote", " - turn.moved", ""),
    ),
    mutant(
        "the first look stops a partition",
        "restore order",
        LOOKS,
        (f"{RESTORE}Restorer._again", "if self._said.get(one.partition) == why:", "if True:"),
    ),
    mutant(
        "uncommitted input is read",
        "what is committed",
        PLAIN,
        (f"{SOURCE}__init__", 'isolation_level="read_committed"', 'isolation_level="read_uncommitted"'),
    ),
    mutant(
        "uncommitted states are read",
        "restore order",
        STORE,
        (
            f"{HERE}kafka_changelog:KafkaChangelog.__init__",
            'isolation_level="read_committed"',
            'isolation_level="read_uncommitted"',
        ),
    ),
    # The local store.
    mutant(
        "the store is written before the commit",
        "commit first",
        STORE,
        (
            f"{SERVICE}_turn",
            "if turn.transaction.offsets:",
            "self._spill.mirror(turn.transaction.states, {})\n    if turn.transaction.offsets:",
        ),
    ),
    mutant(
        "a store is believed whatever its sequence",
        "local store",
        AWAY,
        (OPEN, "self._ends[partition] = end", "self._ends[partition] = end if position is None else position"),
        (f"{CHECKPOINT}_agreed", "if said is None:", "if True:"),
    ),
    mutant(
        "dirty streams are spilled",
        "local store",
        STORE,
        (f"{HERE}spill:Spill._evict", "np.flatnonzero(table.column(DIRTY)[slots] == CLEAN)", "np.arange(len(keys))"),
    ),
    mutant(
        "a stream that waits in the store begins anew",
        "local store",
        STORE,
        (f"{HERE}spill:Spill.admit", "if self._waiting[partition] > 0}", "if False}"),
    ),
    mutant(
        "no room is kept for streams to come",
        "memory",
        STORE,
        (f"{HERE}partitions:Partitions.crowded", "if spills:", "if True:\n        return False\n    if spills:"),
    ),
    # Streams that are forgotten.
    mutant(
        "a stream is forgotten that a replay meets again",
        "forgetting is unseen",
        HUSHED,
        (f"{EXPIRY}take", "& (table.column(OFFSET)[slots] < redo)", ""),
    ),
    mutant(
        "a stream is forgotten that is dirty",
        "forgetting is unseen",
        HUSHED,
        (f"{EXPIRY}take", "if self._keeps_states:", "if False:"),
    ),
    mutant(
        "a stream is forgotten as soon as it has expired",
        "forgetting is unseen",
        HUSHED,
        (f"{EXPIRY}__init__", "LATE * engine.silence", "engine.silence"),
    ),
    mutant(
        "a stream is forgotten in the middle of an event",
        "forgetting is unseen",
        HUSHED,
        (f"{EXPIRY}take", "still &= self._engine.idle(slots)", ""),
    ),
    mutant(
        "an event does not outlive a new beginning",
        "forgetting is unseen",
        HUSHED,
        (
            "statestep.runtime.engine:Engine._after_silence",
            "expired & idle, reset | (expired & ~idle)",
            "expired, reset",
        ),
    ),
    # What must stop.
    mutant(
        "checksums are not checked",
        "no corrupt state",
        CORRUPTED,
        (f"{HERE}changelog:StateCodec.decode", "if crc == _RESIDUE and", "if"),
    ),
    mutant(
        "the messages of a replay are not counted",
        "the input is a log",
        HOLE,
        (f"{CHECKPOINT}Progress.applied", "if owed < 0 or (owed and replayed < len(offsets)):", "if False:"),
    ),
    mutant(
        "a replay begins where the input begins now",
        "the input is a log",
        SHORT,
        (f"{CHECKPOINT}_go_on", "if seen.redo < low else", "if False else"),
    ),
    mutant(
        "a topic of the same name is the same",
        "the input is a log",
        ANEW,
        (f"{CHECKPOINT}plan", "if seen.topic_id != found.identity.topic_id:", "if False:"),
    ),
    mutant(
        "states of another model are used",
        "same settings",
        MODEL,
        (f"{CHECKPOINT}plan", "if seen.model != found.model:", "if False:"),
    ),
    mutant(
        "a replay goes under other settings",
        "same settings",
        SEMANTICS,
        (f"{CHECKPOINT}plan", "if seen.semantics != found.semantics and", "if False and"),
    ),
]
