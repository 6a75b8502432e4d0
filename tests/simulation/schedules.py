"""Which faults befall a simulated run: by chance at every point, one at a point that is aimed at, and by the clock."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .clients import POINTS
from .world import Fault, Process

UNUSED = {  # no adapter comes by here
    "admin.delete_topics", "admin.delete_records", "admin.create_partitions", "consumer.commit", "producer.end:abort",
}  # fmt: skip
REACHED = tuple(point for point in POINTS if point not in UNUSED)
RARE = {"admin.remove_group_members"}  # what only few runs come by is aimed at by none
LOCAL = {  # no request is made, so a process can only die there or be paused
    "consumer.poll", "consumer.group_metadata", "consumer.close", "producer.begin", "producer.send", "producer.flush",
}  # fmt: skip
OFTEN = {"consumer.poll": 60, "consumer.fetch": 60, "consumer.group_metadata": 60, "producer.send": 10}
SELDOM = (".connect", ".metadata", ".init", ".close", ".leave", ".list_offsets")  # a run comes by once or twice
STARTS = (".connect", ".metadata", ".join", ".sync", ".init", ".committed")  # mostly while a process starts
STOPS = ("kill-before", "kill-after", "pause-before", "pause-after")
REPLIES = ("lost", "silent", "late")
# A copy that takes effect later, of a request that was answered at once. Not of a transaction's own requests: it could
# end, or take offsets into, the transaction after it, which no client before KIP-890 can tell from its own.
TWICE = {"consumer.heartbeat", "consumer.join", "consumer.fetch", "producer.produce", "admin.describe_topics"}
PRODUCE = ("expired", "expired-sent", "out-of-order")
PAUSES_S = (1.0, 4.0, 7.0, 12.0, 18.0)


def kinds(point: str) -> tuple[str, ...]:
    """All that can happen at a point."""
    found: tuple[str, ...] = STOPS if point in LOCAL else STOPS + REPLIES
    found += ("twice",) * (point in TWICE)
    return found + PRODUCE * (point == "producer.produce")


DIRECTED = tuple(f"{kind}:{point}" for point in REACHED if point not in RARE for kind in kinds(point))


class Aimed(NamedTuple):
    """One fault at one point: it strikes whoever comes by for the nth time after a moment."""

    kind: Any
    point: str
    after_s: float
    nth: int
    seconds: float


class Schedule:
    """What `World` asks at every point. After `heal_s` nothing befalls anybody."""

    def __init__(self, chance: random.Random, heal_s: float, rate: float, aims: Sequence[Aimed]):
        self._chance, self._heal_s, self._rate = chance, heal_s, rate
        self._aims = {aim.point: aim for aim in aims}
        self._passed: Counter[str] = Counter()  # by point aimed at: who has come by since
        self.now: Callable[[], float] = lambda: 0.0
        self.struck: list[str] = []

    def __call__(self, process: Process, point: str, count: int) -> Fault | None:
        now = self.now()
        if now >= self._heal_s:
            return None
        aimed = self._aims.get(point)
        if aimed is not None and now >= aimed.after_s:
            self._passed[point] += 1
            if self._passed[point] == aimed.nth:
                self.struck.append(f"{aimed.kind}:{point}")
                return Fault(aimed.kind, aimed.seconds)
        if self._rate and self._chance.random() < self._rate / OFTEN.get(point, 1):
            kind: Any = self._chance.choice(kinds(point))
            return Fault(kind, self._seconds(kind))
        return None

    def _seconds(self, kind: str) -> float:
        return self._chance.choice(PAUSES_S) if kind.startswith("pause") else self._chance.choice((0.05, 0.5, 3.0, 8.0))


def aim(chance: random.Random, directed: str, heal_s: float, eager: bool) -> list[Aimed]:
    """What a directed run aims at: `kind:point`. `eager`: whoever comes by first."""
    kind, _, point = directed.partition(":")
    nth = chance.randint(1, 3 * OFTEN.get(point, 1) if point in OFTEN else 3)
    if point.startswith("admin.") or point.endswith(SELDOM):
        nth = chance.randint(1, 2)
    seconds = chance.choice((8.0, 12.0, 18.0)) if kind.startswith("pause") else chance.choice((0.3, 2.0, 6.0))
    starts = point.startswith("admin.") or point.endswith(STARTS)
    after_s = 0.0 if starts and chance.random() < 0.7 else chance.uniform(1.0, heal_s / 2)
    return [Aimed(kind, point, 0.0, 1, seconds) if eager else Aimed(kind, point, after_s, nth, seconds)]
