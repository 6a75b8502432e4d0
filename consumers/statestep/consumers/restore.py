"""Bringing partitions back, a slice at a time, while the others go on.

For each partition, in this order: ask for the committed offset; read the changelog up to its end, as it was after that
answer; decide by `checkpoint.plan`; put the states into the engine. What comes then, the replay of messages since
`redo`, is the service's normal path.

Where there is a local store, the changelog is read into it, from where it left off, and states that the engine has no
room for stay there. Otherwise they wait in memory for the marker, which comes last.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np

from statestep.consumers import checkpoint
from statestep.consumers.changelog import MARKER, Corrupt, Marker, StateCodec, decode_marker
from statestep.consumers.checkpoint import Found, Plan, Policies, Stop
from statestep.consumers.pipeline import stream_key
from statestep.consumers.ports import Blocked, BrokerError, Changelog, Committed, Identity, Source, StateRecord
from statestep.consumers.store import Store
from statestep.runtime import Engine, Records

log = logging.getLogger("statestep")

SLICE = 20_000  # records handled at a time: some tens of milliseconds
RETRY_S = 1.0  # after the broker did not answer
STUCK_S = 40.0  # without progress; longer, by 30 s, than the transaction timeout that may hold a reader up


class Restored(NamedTuple):
    """A partition whose states are back."""

    partition: int
    plan: Plan
    committed: Committed | None  # what was found for the group
    identity: Identity
    streams: int  # how many are in the engine
    spilled: int  # how many stayed in the local store


@dataclass(slots=True)
class _Restoring:
    """One partition on its way back."""

    partition: int
    committed: Committed | None = None
    opened: bool = False
    values: dict[bytes, StateRecord] = field(default_factory=dict)  # without a store: the latest record by key
    plan: Plan | None = None
    identity: Identity | None = None
    after: bytes | None = None  # the last key that was taken from the store
    streams: int = 0
    moved_s: float = 0.0  # when there was progress last


class Restorer:
    """The partitions that are being brought back. It changes the engine only by clean rows, which are committed."""

    def __init__(
        self,
        source: Source,
        changelog: Changelog,
        engine: Engine,
        codec: StateCodec,
        *,
        semantics: str,
        model: str,
        policies: Policies,
        start: Callable[[int], int],
        lock: AbstractContextManager[object],
    ):
        """`lock` is held while the engine changes; `start` gives where a new application begins in a partition."""
        self._source = source
        self._changelog = changelog
        self._engine = engine
        self._codec = codec
        self._semantics = semantics
        self._model = model
        self._policies = policies
        self._start = start
        self._lock = lock
        self._restoring: dict[int, _Restoring] = {}
        self._said: dict[int, str] = {}  # why a partition would stop, to be seen twice before it does
        self._retry_s = 0.0
        self.store: Store | None = None

    def __bool__(self) -> bool:
        return bool(self._restoring)

    def busy(self, now_s: float) -> bool:
        """Whether there is work now, and not only once a silent broker is asked again."""
        return bool(self._restoring) and now_s >= self._retry_s

    def partitions(self) -> list[int]:
        """Which are being brought back."""
        return sorted(self._restoring)

    def begin(self, partition: int, now_s: float) -> None:
        """Bring a partition back, from the start. Raises `Stop` for one that was added since the source was made."""
        if partition >= self._source.partitions:
            raise Stop(
                f"partition {partition} of {self._source.topic} was added while the {self._source.partitions} before "
                "it were being read, so its keys have moved away from their states; a new --app-id begins anew"
            )
        self.drop(partition)
        self._restoring[partition] = _Restoring(partition, moved_s=now_s)

    def drop(self, partition: int) -> None:
        """Leave a partition to others."""
        found = self._restoring.pop(partition, None)
        if found is not None and found.opened:
            self._changelog.shut(partition)

    def step(self, now_s: float) -> list[Restored]:
        """One slice of work; the partitions that are back with it. Nothing may be uncommitted in the engine.

        Raises `Stop` where a person has to decide, `Blocked` where nothing moves.
        """
        if now_s < self._retry_s:
            return []
        try:
            self._open(now_s)
            self._read(now_s)
        except BrokerError as error:
            log.warning("restoring partitions %s waits: %s", self.partitions(), error)
            self._retry_s = now_s + RETRY_S
            return []
        back: list[Restored] = []
        identity = cache(self._source.identity)  # once for all that are decided now: it is a connection of its own
        for one in list(self._restoring.values()):
            if one.opened and one.plan is None and self._changelog.finished(one.partition):
                self._decide(one, identity, now_s)
            if one.plan is not None and (restored := self._load(one, now_s)):
                back.append(restored)
        for restored in back:
            self.drop(restored.partition)
            self._said.pop(restored.partition, None)
        return back

    def _open(self, now_s: float) -> None:
        for one in self._restoring.values():
            if one.opened:
                continue
            # The committed offset first: what the changelog holds after it is at least as new.
            one.committed = self._source.committed(one.partition)
            position = None
            if self.store is not None:
                position = self.store.position(one.partition) if self.store.usable(one.partition) else None
            if position is None or not self._changelog.open(one.partition, position):
                if self.store is not None:
                    self.store.forget(one.partition)
                self._changelog.open(one.partition)
            one.opened, one.moved_s = True, now_s

    def _read(self, now_s: float) -> None:
        reading = {p: one for p, one in self._restoring.items() if one.opened and one.plan is None}
        if not reading:
            return
        before = {partition: self._changelog.position(partition) for partition in reading}
        records = [record for record in self._changelog.read(SLICE) if record.partition in reading]
        positions = {partition: self._changelog.position(partition) for partition in reading}
        if self.store is not None:
            self.store.apply(records, positions)
        else:
            for record in records:
                reading[record.partition].values[record.key] = record
        for partition, one in reading.items():
            if positions[partition] != before[partition]:
                one.moved_s = now_s
            elif now_s - one.moved_s > STUCK_S and not self._changelog.finished(partition):
                raise Blocked(f"restoring partition {partition} has not moved for {STUCK_S:g} s")

    def _decide(self, one: _Restoring, identity: Callable[[], Identity], now_s: float) -> None:
        """Find out how the partition goes on. What would stop it must be seen twice: another may just have had it."""
        try:
            one.identity = identity()
            marker = self._marker(one)
            found = Found(
                one.committed,
                marker,
                self._epochs(one) if marker is None else marker.epoch,
                self._source.bounds(one.partition),
                one.identity,
                self._semantics,
                self._model,
            )
            one.plan = checkpoint.plan(found, self._policies, lambda: self._start(one.partition))
        except BrokerError as error:
            log.warning("restoring partition %d waits: %s", one.partition, error)
            self._retry_s = now_s + RETRY_S
            return
        except (Stop, Corrupt) as error:
            self._again(one, str(error), now_s)
            return
        one.values.pop(MARKER, None)  # not before: the broker may not have answered, and all of this comes again
        for warning in one.plan.warnings:
            log.warning("%s partition %d: %s", self._source.topic, one.partition, warning)

    def _again(self, one: _Restoring, why: str, now_s: float) -> None:
        if self._said.get(one.partition) == why:
            raise Stop(f"{self._source.topic} partition {one.partition}: {why}")
        self._said[one.partition] = why
        self.begin(one.partition, now_s)
        if self.store is not None:  # perhaps it is only the copy that is wrong
            self.store.forget(one.partition)

    def _marker(self, one: _Restoring) -> Marker | None:
        if self.store is not None:
            value = self.store.marker(one.partition)
        else:
            record = one.values.get(MARKER)
            value = None if record is None else record.value
        return None if value is None else decode_marker(value, f"the marker of changelog partition {one.partition}")

    def _epochs(self, one: _Restoring) -> int:
        """The highest epoch of any record, where there is no marker to tell."""
        highest = -1
        after: bytes | None = None
        waiting = iter([record for record in one.values.values() if record.value is not None])
        while True:
            if self.store is not None:
                records = self.store.load(one.partition, after, SLICE)
            else:
                records = list(islice(waiting, SLICE))
            if not records:
                return highest
            after = records[-1].key
            decoded = self._codec.decode(records)
            highest = max([highest, *decoded.epochs.tolist(), *(other.epoch for other in decoded.foreign)])

    def _load(self, one: _Restoring, now_s: float) -> Restored | None:
        """Put a slice of states into the engine; the result once all that fit are there."""
        assert one.plan is not None and one.identity is not None
        if not one.plan.cold:
            try:
                if self._slice(one, one.plan.progress.epoch):
                    return None
            except Corrupt as error:
                one.plan = None
                self._again(one, str(error), now_s)
                return None
        spilled = 0 if self.store is None or one.plan.cold else self.store.count(one.partition) - one.streams
        return Restored(one.partition, one.plan, one.committed, one.identity, one.streams, spilled)

    def _slice(self, one: _Restoring, epoch: int) -> bool:
        """Whether there was anything left to put into the engine, and room for it."""
        if self.store is not None:
            room = self._engine.table.capacity // 2 - len(self._engine)  # the other half is for the streams to come
            if room <= 0:
                return False
            records = self.store.load(one.partition, one.after, min(SLICE, room))
            one.after = records[-1].key if records else one.after
        else:
            keys = list(islice(one.values, SLICE))
            records = [record for key in keys if (record := one.values.pop(key)).value is not None]
            if not keys:
                return False
        with self._lock:
            one.streams += put(self._engine, self._codec, records, epoch)
        return bool(records) or bool(one.values)


def put(engine: Engine, codec: StateCodec, records: list[StateRecord], epoch: int) -> int:
    """Set streams to what their records of this epoch say, clean; how many there were. Raises `Corrupt` or `Stop`."""
    decoded = codec.decode(records)
    for other in decoded.foreign:
        if other.epoch == epoch:
            raise Corrupt(f"{other}, which is the present one")
    good = np.flatnonzero(decoded.epochs == epoch)  # [n]
    keys = [stream_key(int(decoded.partitions[i]), decoded.keys[i]) for i in good.tolist()]
    held = decoded.records
    states = [state[good] for state in held.states]
    engine.write(keys, Records(states, held.step[good], held.time[good], held.offset[good]), clean=True)
    engine.commit()
    return len(keys)


def looked_at(source: Source, known: Identity) -> Identity:
    """What the input is by now; as known where the broker does not answer. Raises `Stop` if it is another log."""
    try:
        seen = source.identity()
    except BrokerError:
        return known
    if (seen.topic_id, seen.partitions) != (known.topic_id, known.partitions):
        raise Stop(
            f"{source.topic} has other partitions, or was made anew, since the service started: stop every process of "
            "the application and start them again, which tells what can be done"
        )
    if known.is_log and not seen.is_log:
        log.warning("%s is compacted, so every state is written with every transaction", source.topic)
    return seen


def answers(source: Source) -> bool:
    """Whether the broker can be reached at all."""
    try:
        source.identity()
    except BrokerError:
        return False
    return True
