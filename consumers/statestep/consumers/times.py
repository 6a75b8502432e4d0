"""Points in time: whatever a message calls one, as nanoseconds since the epoch, and back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from statestep.runtime import NO_TIME

SPANS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}  # seconds
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# A number is seconds below the first bound, then milliseconds, microseconds, nanoseconds: (bound, ns in a unit).
TIME_UNITS = ((1e11, 10**9), (1e14, 10**6), (1e17, 10**3), (float("inf"), 1))
NS_RANGE = (-(1 << 63) + 1, (1 << 63) - 1)  # the years 1677 to 2262


def parse_time(value: str | int | float) -> int | None:
    """A point in time as ns since the epoch, or None if it is none.

    Numbers, and strings that look like one, count from 1970 in seconds, milliseconds (from 1e11), microseconds
    (from 1e14) or nanoseconds (from 1e17). Other strings are ISO 8601; without a zone they are UTC.

    >>> parse_time(1_700_000_000) == parse_time("1700000000000") == parse_time("2023-11-14T22:13:20Z")
    True
    """
    number: int | float
    if not isinstance(value, str):
        number = value
    elif value[4:8:3] == "--":  # 2026-01-31…, the usual case, and no number
        return _iso_time(value)
    elif "_" in value:  # which Python takes for a number, and nobody else
        return None
    else:
        try:
            number = int(value) if value.lstrip("+-").isdecimal() else float(value)
        except ValueError:
            return _iso_time(value)
    if not abs(number) <= NS_RANGE[1]:  # NaN is not, either
        return None
    unit = next(ns for bound, ns in TIME_UNITS if abs(number) < bound)
    time = number * unit if isinstance(number, int) else round(number * unit)
    return time if NS_RANGE[0] <= time <= NS_RANGE[1] else None


def moment(time: int) -> datetime | None:
    """Nanoseconds since the epoch as a UTC datetime, to the microsecond; None for `NO_TIME`."""
    return None if time == NO_TIME else EPOCH + timedelta(microseconds=time // 1000)


def from_ms(timestamp_ms: int) -> int:
    """A record's timestamp as ns since the epoch; a negative one means that there is none."""
    return NO_TIME if timestamp_ms < 0 else min(timestamp_ms * 1_000_000, NS_RANGE[1])


def seconds_of(text: str) -> float | None:
    """A length of time as a person writes it, in seconds; None for anything else.

    >>> seconds_of("90s"), seconds_of("5m"), seconds_of("1.5 h"), seconds_of("7d"), seconds_of("soon")
    (90.0, 300.0, 5400.0, 604800.0, None)
    """
    number, unit = text.strip()[:-1].strip(), text.strip()[-1:].lower()
    if unit not in SPANS:
        return None
    try:
        length = float(number) * SPANS[unit]
    except ValueError:
        return None
    return length if 0 < length < float("inf") else None


def _iso_time(value: str) -> int | None:
    try:
        when = datetime.fromisoformat(value.strip().upper())
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    since = when - EPOCH
    time = ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1000
    return time if NS_RANGE[0] <= time <= NS_RANGE[1] else None
