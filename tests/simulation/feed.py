"""What a simulated application reads, the model that steps it, and what must come of every record: worked out here in
plain loops, record by record, when it is written.

The model folds every value into a 64-bit number, so that a record that is lost, doubled, late or of another stream
changes all that its stream gives from then on, and every machine and batch gives the same bits. The number decides as
well where an event begins and ends, whose length and beginning are states.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from statestep.runtime import NO_TIME, Contract, Feature, Output, Silence, State

from .cluster import Cluster
from .log import NewRecord
from .world import World

Array = np.ndarray[Any, Any]
A, B = 6364136223846793005, 1442695040888963407
ODD = 666  # the value for which the model gives no number
PERIOD_MS = 1000
TOPIC = "in"
NS_LAST = 1 << 63  # later than any time
WRITER = 1_000_000  # the first producer id of transactions in the input
LONG = 600  # bytes of a stream's name of which the topic of events takes nothing, where a run is poisoned
RESET_MS, EXPIRE_MS = 1000, 1200  # where streams fall silent: after how long they begin anew, and are new ones
SILENCE = Silence(400e6, ((1, "hold"), (None, "reset")), EXPIRE_MS * 1e6)  # more than 2.5 periods
BEGINS, ENDS = (8, 3), (4, 1)  # y modulo the first of each being the second, an event begins or ends
CONTRACT = Contract(
    "fold",
    (Feature("v"),),
    (
        State("h", "next_h", (1,), dtype="int64"),
        State("length", "next_length", (1,), dtype="int64"),
        State("began", "next_began", (1,), dtype="int64", initial=NO_TIME),
    ),
    (
        Output("y", role="prediction", features=("v",)),
        Output("event", role="event", state="length"),
        Output("since", role="since", state="began"),
    ),
    period_seconds=PERIOD_MS / 1000,
)


class Fold:
    """The model: h ← h·A + v·B + 1 modulo 2^64, y is 16 bits of h, and so are the beginnings and ends of events."""

    contract = CONTRACT

    def initial_states(self) -> list[Array]:
        """A new stream's h, and no event."""
        return [state.initial_value() for state in self.contract.states]

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        """x [B, 1], states [B, 1] each and times [B] → y [B, 1], event [B], since [B], and the next states."""
        v = x.astype(np.int64)  # [B, 1]
        h = states[0] * np.int64(A) + v * np.int64(B) + np.int64(1)  # [B, 1]
        bits, length = (h >> 40) & 0xFFFF, states[1]  # [B, 1]
        now = np.full_like(h, NO_TIME) if times is None else times[:, None]  # [B, 1]
        begins = (length == 0) & (bits % BEGINS[0] == BEGINS[1])
        ends = (length > 0) & (bits % ENDS[0] == ENDS[1])
        longer = np.where(begins | (length > 0), length + 1, 0)  # [B, 1]
        since = np.where(begins, now, states[2])  # [B, 1]
        y = np.where(v == ODD, np.float32(np.nan), bits.astype(np.float32))  # [B, 1]
        outputs = {"y": y, "event": np.where(ends, -longer, longer)[:, 0], "since": since[:, 0]}
        return outputs, [h, np.where(ends, 0, longer), np.where(ends, NO_TIME, since)]


class Remembered(NamedTuple):
    """What is remembered of a stream."""

    offset: int  # of the last message applied
    step: int
    time: int  # ns
    h: int
    length: int = 0  # of the event that it is in
    began: int = NO_TIME  # ns


class Told(NamedTuple):
    """What must be told of an event."""

    id: str
    phase: str
    steps: int
    since: int  # ns


class Answer(NamedTuple):
    """What must come of a record."""

    kind: str  # output, tombstone or dead
    key: bytes | None
    value: bytes | None  # of the record
    reason: str = ""  # of a dead letter
    step: int = 0
    y: float = 0.0
    flags: tuple[str, ...] = ()
    event: Told | None = None  # that the record belongs to, or that ends with its stream

    @property
    def notice(self) -> Told | None:
        """What the topic of events is told: a beginning or an end, of a stream whose name it takes."""
        told = self.event is not None and self.event.phase != "on" and len(self.key or b"") < LONG
        return self.event if told else None


class History:
    """All messages that were applied to one stream, in order; None ends it."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.states: list[Remembered | None] = []

    def before(self, offset: int) -> Remembered | None:
        """What is remembered before the message at an offset is applied."""
        index = bisect_right(self.offsets, offset - 1)
        return self.states[index - 1] if index else None

    def between(self, low: int, high: int) -> list[Remembered | None]:
        """What each message at an offset from `low` to below `high` left."""
        return self.states[bisect_right(self.offsets, low - 1) : bisect_right(self.offsets, high - 1)]


class Feed:
    """The input topic: writes records of all kinds, and knows what must come of them."""

    def __init__(
        self, world: World, cluster: Cluster, chance: random.Random, partitions: int, keys: int, poisoned: bool,
        silent: bool,
    ):  # fmt: skip
        """`poisoned`: some records are too large for the output, and a stream's name for the topic of events. `silent`:
        times are the clock's, none later than a stream may be silent, and now and then one is silent for longer."""
        self._world, self._cluster, self._chance = world, cluster, chance
        self._keys = [b"stream-%d" % number for number in range(keys)]
        if poisoned:
            self._keys[-1] += b"-" * LONG
        self._clock_ms = dict.fromkeys(self._keys, world.wall_ms())
        self._last: dict[tuple[int, bytes], bytes] = {}
        self._writers = WRITER
        self._poisoned, self.silent = poisoned, silent
        self._asleep = dict.fromkeys(self._keys, 0.0)  # until when a stream is silent
        self._latest: list[list[tuple[int, int]]] = [[] for _ in range(partitions)]  # (offset, greatest time by then)
        self.answers: list[dict[int, Answer]] = [{} for _ in range(partitions)]  # by partition and offset
        self.records: list[list[int]] = [[] for _ in range(partitions)]  # offsets of all that readers see, rising
        self.streams: list[dict[bytes, History]] = [{} for _ in range(partitions)]

    def write(self, partition: int) -> None:
        """One record, or a few in a transaction, which may be aborted."""
        chance, log = self._chance, self._cluster.partition((TOPIC, partition))
        if chance.random() > 0.05:
            key, value, headers = self._record(partition)
            self._expect(partition, log.high, key, value, bool(headers))
            self._cluster.append(TOPIC, partition, key, value, headers)
            return
        self._writers += 1
        committed, writer = chance.random() < 0.6, self._writers
        for sequence in range(chance.randrange(3)):
            key, value, _ = self._record(partition)
            if committed:
                self._expect(partition, log.high, key, value, False)
            now_ms = self._world.wall_ms()
            record = NewRecord(key, value, (), now_ms)
            log.append([record], now_ms, producer_id=writer, epoch=0, sequence=sequence, transactional=True)
        end = self._world.now + chance.choice((0.0, 0.0, 0.3, 2.0))  # until then readers wait here
        self._world.at(end, lambda: log.mark(writer, 0, committed, self._world.wall_ms()))

    def _record(self, partition: int) -> tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]:
        chance, key = self._chance, self._chance.choice(self._awake())
        draw = chance.random()
        if draw < 0.04:
            return key, None, []
        if draw < 0.10:
            odd = (b"{", b"", b'{"v": null}', b'{"v": "high"}', b"[1, 2]", b'{"v": 1, "ts": "noon"}')
            return key, chance.choice(odd), []
        if draw < 0.11:
            return None, b'{"v": 1}', []
        if draw < 0.15 and (partition, key) in self._last and not self.silent:
            return key, self._last[partition, key], []  # a duplicate, which is applied as any other
        jump = chance.choices((PERIOD_MS, -3 * PERIOD_MS, 5 * PERIOD_MS, 86_400_000, -86_400_000), (90, 4, 4, 1, 1))[0]
        self._clock_ms[key] += jump
        if self.silent:
            self._clock_ms[key] = self._world.wall_ms() - (chance.randrange(EXPIRE_MS) if draw < 0.3 else 0)
        number = ODD if chance.random() < 0.02 else chance.randrange(1 << 20)
        value = json.dumps({"v": number, "ts": self._clock_ms[key]}).encode()
        self._last[partition, key] = value
        return key, value, [("note", b"x" * 4000)] if self._poisoned and chance.random() < 0.02 else []

    def _expect(self, partition: int, offset: int, key: bytes | None, value: bytes | None, large: bool) -> None:
        """Work out what must come of a record."""
        self.records[partition].append(offset)
        self.answers[partition][offset] = self._answer(partition, offset, key, value, large)

    def _answer(self, partition: int, offset: int, key: bytes | None, value: bytes | None, large: bool) -> Answer:
        if value is None:
            assert key is not None
            history, event = self.streams[partition].get(key), None
            if history is not None and (last := history.states[-1]) is not None:
                if last.length:
                    event = told(partition, key, last.step, last.length, last.began)._replace(phase="end")
                history.offsets.append(offset)
                history.states.append(None)
            return Answer("tombstone", key, None, event=event)
        reason, v, time = judged(key, value)
        if reason:
            return Answer("dead", key, value, reason)
        assert key is not None
        known = self.streams[partition].get(key)
        before = known.states[-1] if known is not None else None
        after, y, flags, count, since = applied(before, offset, v, time, self.silent)
        if v == ODD:
            return Answer("dead", key, value, "non-finite")
        history = self.streams[partition].setdefault(key, History())
        history.offsets.append(offset)
        history.states.append(after)
        latest = self._latest[partition]
        latest.append((offset, max(time, latest[-1][1]) if latest else time))
        event = told(partition, key, after.step, count, since) if count else None
        if large:
            return Answer("dead", key, value, "undeliverable", event=event)
        return Answer("output", key, value, "", after.step, y, flags, event)

    def forgettable(self, partition: int, state: Remembered, end: int) -> bool:
        """Whether a stream's state may be gone once the messages below `end` are applied: nothing hangs on it."""
        known = bisect_right(self._latest[partition], (end - 1, NS_LAST))
        if not self.silent or state.length or not known:
            return False
        return self._latest[partition][known - 1][1] - state.time > 2 * EXPIRE_MS * 1_000_000

    def _awake(self) -> list[bytes]:
        """The streams that are not silent, all where none is awake; now and then one falls silent."""
        now, chance = self._world.now, self._chance
        if self.silent and chance.random() < 0.08:
            self._asleep[chance.choice(self._keys)] = now + chance.uniform(0.5, 6.0)
        return [key for key in self._keys if self._asleep[key] <= now] or self._keys


def judged(key: bytes | None, value: bytes) -> tuple[str, int, int]:
    """Why a record is refused, or its number and time (ns)."""
    if not value:
        return "empty", 0, 0
    if value == b"{":
        return "malformed", 0, 0
    found: Any = json.loads(value)
    if isinstance(found, list):
        return "wrong-shape", 0, 0
    if isinstance(found["v"], str):
        return "wrong-type", 0, 0
    if key is None:
        return "no-key", 0, 0
    if found["v"] is None:
        return "missing-feature", 0, 0
    if found.get("ts") == "noon":
        return "bad-time", 0, 0
    return "", found["v"], found["ts"] * 1_000_000


def told(partition: int, key: bytes, step: int, count: int, since: int) -> Told:
    """An event as of a stream's timestep; `count` is its length so far, below 0 at its end."""
    steps = abs(count)
    place = b"%s\0%d\0%d\0%d\0%s" % (TOPIC.encode(), partition, step - steps + 1, since, key)
    phase = "end" if count < 0 else "begin" if count == 1 else "on"
    return Told(blake2b(place, digest_size=8).hexdigest(), phase, steps, since)


def applied(
    before: Remembered | None, offset: int, v: int, time: int, silent: bool
) -> tuple[Remembered, float, tuple[str, ...], int, int]:
    """One step of one stream: what is remembered after it, output, flags, and of its event length and beginning."""
    if silent and before is not None and not before.length and time - before.time > EXPIRE_MS * 1_000_000:
        before = None
    h, step, greatest = (0, 0, NO_TIME) if before is None else (before.h, before.step, before.time)
    length, began = (0, NO_TIME) if before is None else (before.length, before.began)
    reset = silent and before is not None and time - greatest > RESET_MS * 1_000_000
    if reset:
        h, step = 0, step if length else 0
    h = (h * A + v * B + 1) % (1 << 64)
    flags: tuple[str, ...] = ()
    if greatest != NO_TIME:
        flags = ("out_of_order",) * (time < greatest) + ("gap",) * (time - greatest > 1.5 * PERIOD_MS * 1e6)
    flags += ("reset",) * reset
    signed, bits = h - (1 << 64) if h >= 1 << 63 else h, h >> 40 & 0xFFFF
    count, since = 0, NO_TIME
    if length:
        count, since = length + 1, began
        if bits % ENDS[0] == ENDS[1]:
            count = -count
    elif bits % BEGINS[0] == BEGINS[1]:
        count, since = 1, time
    held = (count, since) if count > 0 else (0, NO_TIME)
    return Remembered(offset, step + 1, max(greatest, time), signed, *held), float(bits), flags, count, since
