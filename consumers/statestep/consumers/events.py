"""The documents of an event, which is an anomaly from its beginning to its end: its name, its level, what makes it."""

from __future__ import annotations

from datetime import datetime
from hashlib import blake2b
from typing import Literal, NamedTuple

import msgspec

Phase = Literal["begin", "on", "end"]

MAJOR, CRITICAL = 1.5, 3.0  # severities, in units of the threshold, from which on an event is called so
LEVELS = ("minor", "major", "critical")


class Event(msgspec.Struct, frozen=True, gc=False):
    """An event as of one timestep of its stream."""

    id: str
    phase: Phase
    since: datetime | None
    steps: int  # of the event so far, this one included
    severity: float | None  # the highest score so far, in units of the threshold
    level: str | None


class Why(msgspec.Struct, frozen=True, gc=False):
    """One feature's part in the score."""

    feature: str
    share: float
    reason: str | None  # the kind of evidence that speaks loudest
    seen: float | None  # None where the reading was missing
    expected: float | None  # None where it is not forecast
    related: float | msgspec.UnsetType = msgspec.UNSET  # as the others of its row would have it


class Told(NamedTuple):
    """What an answer tells of the event that it belongs to."""

    event: Event
    why: list[Why]  # by falling share


def level_of(severity: float) -> str:
    """How severe an event is, in a word.

    >>> [level_of(severity) for severity in (1.0, 1.5, 3.0)]
    ['minor', 'major', 'critical']
    """
    return LEVELS[(severity >= MAJOR) + (severity >= CRITICAL)]


def event_id(topic: str, partition: int, key: bytes, step: int, since: int) -> str:
    """The name of the event that began with timestep `step` of a stream, at the event time `since` (ns or NO_TIME).

    It is made of nothing else, so whoever processes the stream, and however often, calls the event by the same name.

    >>> event_id("sensors", 3, b"pump-07", 1201, 1_767_571_200_000_000_000)
    '4ae126b1f2f05b20'
    """
    place = f"{topic}\0{partition}\0{step}\0{since}\0".encode()
    return blake2b(place + key, digest_size=8).hexdigest()
