"""Runs of the service over a memory broker, cut and scripted, and what a run that is never cut answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from statestep.consumers import checkpoint
from statestep.consumers.changelog import MARKER, Marker, StateCodec, decode_marker
from statestep.consumers.codec import Decoder, Fields, Observation, Refused
from statestep.consumers.memory import MemoryBroker, MemoryChangelog, MemorySink, MemorySource
from statestep.consumers.pipeline import stream_key
from statestep.consumers.ports import Message, Polled, StateRecord, Transaction
from statestep.consumers.restore import put
from statestep.consumers.service import Service
from statestep.consumers.transaction import Limits
from statestep.consumers.wiring import build
from statestep.runtime import Engine

from ..models import pump

MODEL = pump(period_seconds=60.0)
OTHER_MODEL = pump(seed=8)
SMALL = Limits(commit_interval_s=0.0, batch_records=7)
PARTITIONS = 3
Answer = tuple[bool, int, int]  # dead?, partition, offset: which record a message answers


def filled(count: int = 120, seed: int = 0, *, bad: bool = True) -> MemoryBroker:
    """Records of some streams over three partitions, tombstones and bad ones among them."""
    rng, broker = np.random.default_rng(seed), MemoryBroker(PARTITIONS)
    for number in range(count):
        flow, pressure = rng.normal(0, 2, 2)
        value: bytes | None = json.dumps({"flow": flow, "pressure": pressure, "ts": 60 * number}).encode()
        if bad and number % 11 == 5:
            value = b"{"
        if bad and number % 17 == 8:
            value = None
        broker.append(int(rng.integers(PARTITIONS)), b"k%d" % rng.integers(4), value)
    return broker


def service(
    broker: MemoryBroker, source: MemorySource | None = None, sink: MemorySink | None = None, **kw: Any
) -> Service:
    kw.setdefault("limits", SMALL)
    model, changelog = kw.pop("model", MODEL), kw.pop("changelog", None) or MemoryChangelog(broker)
    return build(model, source or MemorySource(broker), sink or MemorySink(broker), changelog, **kw)


def answers(messages: Sequence[Message]) -> list[tuple[Answer, Message]]:
    found = []
    for message in messages:
        headers = dict(message.headers)
        names = "__streams.errors." if message.dead else "statestep.source."
        place = (message.dead, int(headers[f"{names}partition"]), int(headers[f"{names}offset"]))
        found.append((place, message))
    return found


@cache
def whole(count: int, seed: int = 0) -> dict[Answer, Message]:
    """What a run that is never cut answers."""
    broker = filled(count, seed)
    service(broker).run()
    found = answers(broker.messages)
    assert len(dict(found)) == len(found)
    return dict(found)


def expect_whole(broker: MemoryBroker, count: int = 120) -> None:
    """Nothing is missing, nothing is foreign, nothing is doubled, and every answer has its bits."""
    expected, found = whole(count), answers(broker.messages)
    assert len(found) == len(dict(found)), "an answer is doubled"
    assert dict(found) == expected


def marker_of(broker: MemoryBroker, partition: int) -> Marker | None:
    """The partition's last marker."""
    values = [record.value for record in broker.changelog[partition] if record.key == MARKER]
    return decode_marker(values[-1]) if values and values[-1] is not None else None


def expect_rebuilt(broker: MemoryBroker) -> None:
    """The first invariant: the changelog, and the inputs from `redo` on, rebuild the streams as they are at `next`.

    The reference applies every input from the beginning, one by one, to an engine of its own. The committed offsets
    go with the markers.
    """
    decoder = Decoder(MODEL.contract, Fields())

    def apply(engine: Engine, partition: int, start: int, stop: int) -> None:
        for record in broker.log[partition][start:stop]:
            what, stream = decoder.decode(record), stream_key(partition, record.key or b"")
            if stream in engine.table and int(engine.read([stream]).offset[0]) >= record.offset:
                continue  # its snapshot is of a later moment
            if isinstance(what, Refused):
                continue
            if not isinstance(what, Observation):
                engine.drop([stream])
                continue
            x, refused = decoder.matrix([what])
            if refused[0] is None:
                engine.advance([stream], x, np.array([what.time]), np.array([record.offset]))

    for partition in range(len(broker.log)):
        seen = marker_of(broker, partition)
        if seen is None:
            assert partition not in broker.offsets
            continue
        assert broker.offsets[partition] == checkpoint.committed(seen)
        latest: dict[bytes, StateRecord] = {record.key: record for record in broker.changelog[partition]}
        del latest[MARKER]
        rebuilt, reference = Engine(MODEL), Engine(MODEL)
        records = [record for record in latest.values() if record.value is not None]
        put(rebuilt, StateCodec(MODEL.contract), records, seen.epoch)
        apply(rebuilt, partition, seen.redo, seen.next)
        apply(reference, partition, 0, seen.next)
        keys = sorted(reference.keys())
        assert sorted(rebuilt.keys()) == keys
        here, there = rebuilt.read(keys), reference.read(keys)
        assert [v.tobytes() for v in here.states] == [v.tobytes() for v in there.states]
        assert [here.step.tolist(), here.time.tolist(), here.offset.tolist()] == [
            there.step.tolist(),
            there.time.tolist(),
            there.offset.tolist(),
        ]


class Crash(BaseException):
    """What ends a process, in a test."""


class Crashing(MemorySource, MemorySink):
    """A source and a sink in one, that raises `Crash` before or after the k-th effect of a kind."""

    def __init__(self, broker: MemoryBroker, effect: str, at: int, after: bool):
        MemorySource.__init__(self, broker)
        MemorySink.__init__(self, broker)
        self._effect, self._left, self._after = effect, at, after

    def _do(self, effect: str, act: Callable[[], Any]) -> Any:
        self._left -= effect == self._effect
        due = effect == self._effect and self._left == 0
        if due and not self._after:
            raise Crash(effect)
        result = act()
        if due:
            raise Crash(effect)
        return result

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        result: Polled = self._do("poll", lambda: MemorySource.poll(self, timeout_s, max_records))
        return result

    def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        result: Mapping[int, int] = self._do("commit", lambda: MemorySink.commit(self, transaction, membership))
        return result

    def seek(self, partition: int, offset: int) -> None:
        self._do("seek", lambda: MemorySource.seek(self, partition, offset))

    def close(self) -> None:
        MemorySource.close(self)


class Script(MemorySource):
    """A source that, before the k-th poll, does what the script says."""

    def __init__(self, broker: MemoryBroker, script: Mapping[int, Callable[[Script], object]], polls: int):
        super().__init__(broker)
        self._script, self._polls, self.count = script, polls, 0
        self.timeouts: list[float] = []

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        self.timeouts.append(timeout_s)
        if act := self._script.get(self.count):
            act(self)
        self.count += 1
        return super().poll(timeout_s, max_records)

    @property
    def exhausted(self) -> bool:
        return self.count >= self._polls and super().exhausted


class Clock:
    """Time that passes by a little with each look, and by more when it is told so."""

    def __init__(self, step_s: float = 0.01):
        self.now_s, self._step_s = 1000.0, step_s

    def __call__(self) -> float:
        self.now_s += self._step_s
        return self.now_s
