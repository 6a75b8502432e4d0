"""Runs of the service over a memory broker, cut and scripted, and what a run that is never cut answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from statestep.consumers.memory import MemoryBroker, MemorySink, MemorySource
from statestep.consumers.ports import Committed, Message, Polled
from statestep.consumers.service import Limits, Service
from statestep.consumers.wiring import build

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
    return build(kw.pop("model", MODEL), source or MemorySource(broker), sink or MemorySink(broker), **kw)


def answers(messages: Sequence[Message]) -> list[tuple[Answer, Message]]:
    found = []
    for message in messages:
        headers = dict(message.headers)
        names = "__streams.errors." if message.dead else "statestep.source."
        place = (message.dead, int(headers[f"{names}partition"]), int(headers[f"{names}offset"]))
        found.append((place, message))
    return found


@cache
def whole(count: int) -> dict[Answer, Message]:
    """What a run that is never cut answers."""
    broker = filled(count)
    service(broker).run()
    found = answers(broker.messages)
    assert len(dict(found)) == len(found)
    return dict(found)


def expect_whole(broker: MemoryBroker, count: int = 120, *, doubles: bool = True) -> None:
    """Nothing is missing, nothing is foreign, and every double has the bits of its twin."""
    expected, found = whole(count), answers(broker.messages)
    assert set(expected) == {place for place, _ in found}
    assert all(message == expected[place] for place, message in found)
    if not doubles:
        assert len(found) == len(expected)


class Crash(Exception):
    """What ends a process, in a test."""


class Crashing(MemorySource, MemorySink):
    """A source and a sink in one, that raises `Crash` before or after the k-th effect of a kind."""

    def __init__(self, broker: MemoryBroker, effect: str, at: int, after: bool):
        MemorySource.__init__(self, broker)
        self._pending = []
        self._failures = 0
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

    def send(self, messages: Sequence[Message]) -> None:
        self._do("send", lambda: MemorySink.send(self, messages))

    def flush(self) -> None:
        self._do("flush", lambda: MemorySink.flush(self))

    def commit(self, offsets: Mapping[int, Committed]) -> None:
        self._do("commit", lambda: MemorySource.commit(self, offsets))

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
