"""Times: seconds to nanoseconds and ISO 8601 are told apart by looking, and what is no time is None."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestep.consumers.times import from_ms, moment, parse_time
from statestep.runtime import NO_TIME

SECOND = 10**9
NOON = 1_700_000_000 * SECOND  # 2023-11-14T22:13:20Z


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1_700_000_000, NOON),
        (1_700_000_000.5, NOON + SECOND // 2),
        (1_700_000_000_000, NOON),
        (1_700_000_000_000_000, NOON),
        (1_700_000_000_000_000_000, NOON),
        ("1700000000", NOON),
        ("+1700000000000", NOON),
        ("1700000000000000123", NOON + 123),
        ("1.7e9", NOON),
        ("1700000000.5", NOON + SECOND // 2),
        (9_223_372_036, 9_223_372_036 * SECOND),  # the last second that 64 bits of nanoseconds hold, in 2262
        (100_000_000_000, 100 * 10**6 * SECOND),  # the first millisecond
        (9_223_372_036_854, 9_223_372_036_854 * 10**6),
        (100_000_000_000_000, 100 * 10**6 * SECOND),  # the first microsecond
        (100_000_000_000_000_000, 100 * 10**6 * SECOND),  # the first nanosecond
        (0, 0),
        (-1, -SECOND),
        ("-1.5", -3 * SECOND // 2),
        ("2023-11-14T22:13:20Z", NOON),
        ("2023-11-14t22:13:20z", NOON),
        ("2023-11-14T22:13:20", NOON),
        ("2023-11-14 22:13:20", NOON),
        (" 2023-11-14 22:13:20 ", NOON),
        ("2023-11-15T00:13:20+02:00", NOON),
        ("2023-11-14T22:13:20.123456Z", NOON + 123_456_000),
        ("2023-11-14T22:13:20.123456789Z", NOON + 123_456_000),
        ("2023-11-14", NOON - (22 * 3600 + 13 * 60 + 20) * SECOND),
        ("1969-12-31T23:59:59Z", -SECOND),
    ],
)
def test_what_a_time_means(value: str | int | float, expected: int) -> None:
    """Numbers by their size, strings that look like numbers too, ISO 8601 with a zone or in UTC."""
    assert parse_time(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "", " ", "now", "14/11/2023", "2023-13-01", "2023-11-14T25:00", "nan", "inf", "-inf", "1e400", "--5", "1 2",
        "1_700_000_000", "2024_01_01", "9" * 5000, 9_223_372_037,
        99_999_999_999, float("nan"), float("inf"), 1e300, 10**400, 1 << 63, -(1 << 63) - 5,
        "0001-01-01", "9999-12-31T23:59:59Z", "0001-01-01T00:00:00+23:59", "\ud800", "２０２３-11-14",
    ],
)  # fmt: skip
def test_what_is_no_time(value: str | int | float) -> None:
    """Words, other calendars' forms, and what nanoseconds in 64 bits cannot hold: None, never an exception."""
    assert parse_time(value) is None


@given(st.text() | st.integers() | st.floats() | st.from_regex(r"[+-]?[0-9:.TZ eE_-]{0,30}", fullmatch=True))
def test_anything_is_a_time_in_range_or_none(value: str | int | float) -> None:
    """Whatever comes, the result is None or fits into int64 and is not the sign for no time."""
    time = parse_time(value)
    assert time is None or -(1 << 63) < time < 1 << 63
    if time is not None:
        assert moment(time) is not None


ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(st.datetimes(datetime(1700, 1, 1), datetime(2250, 1, 1), timezones=ZONES))
def test_iso_times_keep_their_microsecond(when: datetime) -> None:
    """Written by Python and read again it is the same moment, whatever its zone."""
    time = parse_time(when.isoformat())
    assert time is not None
    assert moment(time) == when
    assert moment(time + 999) == when


@given(st.integers(0, 9_223_372_036))
def test_a_second_is_the_same_in_every_unit(seconds: int) -> None:
    """From 1974 on, when milliseconds pass 1e11, the four units of one moment are one time."""
    if seconds >= 100_000_000:
        times = {parse_time(seconds * unit) for unit in (1, 10**3, 10**6, 10**9)}
        assert times == {seconds * SECOND}
    assert parse_time(str(seconds)) == parse_time(seconds) == seconds * SECOND


def test_a_records_timestamp() -> None:
    """Milliseconds since the epoch; a negative one, as Kafka has it for unknown, is no time; a huge one is the last."""
    assert from_ms(1_700_000_000_000) == NOON
    assert from_ms(0) == 0
    assert from_ms(-1) == NO_TIME
    assert from_ms(1 << 62) == (1 << 63) - 1
    assert moment(NO_TIME) is None
    assert moment(NOON) == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
