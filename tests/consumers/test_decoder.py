"""Bytes in: what a message may be, and why it is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from statestep.consumers.codec import (
    MAX_KEY_BYTES,
    Decoder,
    Encoder,
    Ended,
    Fields,
    Observation,
    Refused,
)
from statestep.consumers.metrics import REASONS
from statestep.consumers.ports import Headers, Record
from statestep.runtime import NO_TIME, Contract, Feature

from ..models import smoother_contract

CONTRACT = smoother_contract()  # features a and b
OWN_FORECAST = smoother_contract(missing="own-forecast")
NAN = float("nan")


def record(value: bytes | None, key: bytes | None = b"k", timestamp_ms: int = -1, headers: Headers = ()) -> Record:
    return Record(3, 17, timestamp_ms, key, value, headers)


def decoded(value: bytes | None, key: bytes | None = b"k", contract: Contract = CONTRACT, **fields: Any) -> Any:
    return Decoder(contract, Fields(**fields)).decode(record(value, key))


def judged(value: bytes, contract: Contract = CONTRACT) -> np.ndarray[Any, Any] | Refused:
    """The row of x that a message becomes, or why it does not."""
    decoder = Decoder(contract, Fields())
    found = decoder.decode(record(value))
    assert not isinstance(found, Ended)
    if isinstance(found, Refused):
        return found
    x, refused = decoder.matrix([found])
    return refused[0] or x[0]


@pytest.mark.parametrize(
    ("value", "row"),
    [
        (b'{"a": 1, "b": -2.5}', [1, -2.5]),
        (b'{"b": 2, "a": 1}', [1, 2]),
        (b"[1, 2.5]", [1, 2.5]),
        (b' {"a":1e3,"b":0.1,"more":[{"deep":null}],"text":"x"}\r\n', [1000, np.float32(0.1)]),
        (b'{"a": 1, "b": 2, "a": 3}', [3, 2]),
        (b'{"a": -0.0, "b": 1e-60}', [-0.0, 0.0]),
        (b'{"a": 340282346638528859811704183484516925440, "b": 3.4028235e38}', [3.4028235e38, 3.4028235e38]),
        (b'{"\\u0061": 1, "b": 2}', [1, 2]),
    ],
)
def test_a_message_becomes_a_row(value: bytes, row: list[float]) -> None:
    """Objects in any order, arrays in the model's; extra fields are ignored; of a doubled one the last counts."""
    found = judged(value)
    assert isinstance(found, np.ndarray)
    assert found.dtype == np.float32
    assert found.tobytes() == np.array(row, np.float32).tobytes()


REFUSED: list[tuple[bytes | None, str, str]] = [
    (b"", "empty", "the message has no bytes"),
    (b"not json", "malformed", "is not JSON"),
    (b" ", "malformed", "is not JSON"),
    (b'{"a": 1, "b": 2', "malformed", "is not JSON"),
    (b'{"a": 1, "b": 2} {}', "malformed", "is not JSON"),
    (b"{'a': 1}", "malformed", "is not JSON"),
    (b"\xff\xfe{\x00}\x00", "malformed", "is not JSON"),
    (b'{"a": 1, "b": 2, "ts": "\xff"}', "malformed", "is not JSON"),
    (b'{"a": 1, "b": 2, "ts": "\\ud800"}', "malformed", "is not JSON"),
    (b"[" * 100_000, "wrong-type", "at `$[0]`"),
    (b'{"x": ' * 100_000, "malformed", "is nested too deep to be read"),
    (b'{"a": NaN, "b": 2}', "non-finite", "holds nan, which is not a JSON number; send null for a missing value"),
    (b'{"a": 1, "b": -Infinity}', "non-finite", "holds -inf"),
    (b"[1, NaN]", "non-finite", "holds nan"),
    (b"NaN", "non-finite", "holds nan"),
    (b'{"a": {"deep": NaN}, "b": 2}', "wrong-type", "$.a"),
    (b'{"a": 1, "b": 2, "extra": [NaN]}', "malformed", "is not JSON"),
    (b'{"a": "1", "b": 2}', "wrong-type", "got `str` - at `$.a`"),
    (b'{"a": true, "b": 2}', "wrong-type", "got `bool` - at `$.a`"),
    (b'{"a": {}, "b": 2}', "wrong-type", "got `object` - at `$.a`"),
    (b'{"a": [1], "b": 2}', "wrong-type", "got `array` - at `$.a`"),
    (b'[1, "2"]', "wrong-type", "at `$[1]`"),
    (b"[[1, 2]]", "wrong-type", "at `$[0]`"),
    (b"5", "wrong-type", "got `int`"),
    (b'"text"', "wrong-type", "got `str`"),
    (b"null", "wrong-type", "got `null`"),
    (b'{"a": 1, "b": 2, "ts": true}', "wrong-type", "at `$.ts`"),
    (b'{"a": 1, "b": 2, "ts": ["2024"]}', "wrong-type", "at `$.ts`"),
    (b"[1]", "wrong-shape", "the array has 1 numbers, the model takes 2"),
    (b"[1, 2, 3]", "wrong-shape", "the array has 3 numbers, the model takes 2"),
    (b"[]", "wrong-shape", "the array has 0 numbers"),
    (b'{"a": 1e400, "b": 2}', "out-of-range", "at `$.a`"),
    (b'{"a": 1, "b": 1%s}' % (b"0" * 400), "out-of-range", "at `$.b`"),
    (b'{"a": 1, "b": -1%s}' % (b"0" * 6000), "out-of-range", "at `$.b`"),
    (b'{"a": 1e39, "b": 2}', "out-of-range", "feature 'a' is 1e+39, beyond a float32"),
    (b"[1, -4e38]", "out-of-range", "feature 'b' is -4e+38, beyond a float32"),
    (b'{"a": 1}', "missing-feature", "feature 'b' is missing or null"),
    (b'{"a": null, "b": 2}', "missing-feature", "feature 'a' is missing or null"),
    (b"[1, null]", "missing-feature", "feature 'b' is missing or null"),
    (b"{}", "missing-feature", "feature 'a' is missing or null"),
    (b'{"a": 1, "b": 2, "ts": "yesterday"}', "bad-time", "'ts' is 'yesterday': neither ISO 8601 nor a number"),
    (b'{"a": 1, "b": 2, "ts": 1e300}', "bad-time", "'ts' is 1e+300"),
    (b'{"a": 1, "b": 2, "ts": "2024-01-01T99:00"}', "bad-time", "'ts' is '2024-01-01T99:00'"),
]


@pytest.mark.parametrize(("value", "reason", "sentence"), REFUSED, ids=[str(v)[:40] for v, _, _ in REFUSED])
def test_what_is_refused_and_why(value: bytes, reason: str, sentence: str) -> None:
    """Each reason has its word, which the metrics know, and a sentence that names the place and the value."""
    found = judged(value)
    assert isinstance(found, Refused)
    assert found.reason == reason
    assert sentence in found.sentence
    assert reason in REASONS


def test_the_size_of_a_message_is_bounded() -> None:
    """A byte more than is taken is refused unread; the sentence has both sizes."""
    decoder = Decoder(CONTRACT, Fields(), max_bytes=20)
    assert isinstance(decoder.decode(record(b'{"a": 1, "b": 2.000}')), Observation)
    assert decoder.decode(record(b'{"a": 1, "b": 2.0000}')) == Refused(
        "too-large", "the message has 21 bytes, at most 20 are taken"
    )
    assert Decoder(CONTRACT, Fields()).decode(record(b"x" * 20_000_000)) == Refused(
        "too-large", "the message has 20,000,000 bytes, at most 1,048,576 are taken"
    )


@pytest.mark.parametrize("value", [b'{"a": null, "b": 2}', b'{"b": 2}', b"[null, 2]"])
def test_a_model_that_stands_in_for_missing_values_gets_nan(value: bytes) -> None:
    """Under own-forecast null and absence are NaN in x; a number that is too large is still refused."""
    found = judged(value, OWN_FORECAST)
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, np.array([NAN, 2], np.float32))
    refused = judged(b'{"a": null, "b": 1e39}', OWN_FORECAST)
    assert isinstance(refused, Refused)
    assert refused.reason == "out-of-range"


def test_many_rows_are_judged_each_by_itself() -> None:
    """One bad row of a batch leaves the others their numbers, whatever kind of bad it is."""
    decoder = Decoder(CONTRACT, Fields())
    values = [b"[1, 2]", b"[3, null]", b"[1e39, 4]", b"[5, 6]", b'{"a": 7}']
    observations = [decoder.decode(record(value)) for value in values]
    x, refused = decoder.matrix([o for o in observations if isinstance(o, Observation)])
    assert x[[0, 3]].tolist() == [[1, 2], [5, 6]]
    assert [why and why.reason for why in refused] == [None, "missing-feature", "out-of-range", None, "missing-feature"]
    x, refused = decoder.matrix([])
    assert x.shape == (0, 2)
    assert refused == []


def test_a_model_of_float64_gets_float64() -> None:
    """x has the dtype of the contract, and a range to match."""
    found = judged(b"[0.1, 1e39]", smoother_contract(input_dtype="float64"))
    assert isinstance(found, np.ndarray)
    assert (found.dtype, found.tolist()) == (np.float64, [0.1, 1e39])
    with pytest.raises(ValueError, match="the model takes int64, messages hold numbers with a fraction"):
        Decoder(smoother_contract(input_dtype="int64"), Fields())


class TestStreams:
    """Which stream a message belongs to: by its record's key, or by a field."""

    @pytest.mark.parametrize("key", [b"k", b"\xff\x00", "Pumpe-ä".encode(), b"x" * MAX_KEY_BYTES, b"a/b"])
    def test_the_records_key_is_taken_as_it_is(self, key: bytes) -> None:
        """Any bytes name a stream, UTF-8 or not."""
        assert decoded(b"[1, 2]", key).key == key

    @pytest.mark.parametrize("key", [None, b""])
    def test_a_record_without_a_key_is_refused(self, key: bytes | None) -> None:
        """With no field to name the stream, a missing and an empty key are dead letters, tombstone or not."""
        for value in (b"[1, 2]", None):
            assert decoded(value, key) == Refused(
                "no-key", "the record has no key to name its stream, and no stream field is set"
            )

    def test_a_huge_key_is_refused(self) -> None:
        """Keys are repeated in outputs and states, so they are bounded, a tombstone's too."""
        for value in (b"[1, 2]", None):
            assert decoded(value, b"x" * 4097) == Refused(
                "key-too-large", "the stream's name has 4,097 bytes, at most 4,096 are taken"
            )

    @pytest.mark.parametrize(
        ("name", "key"),
        [('"pump"', b"pump"), ("7", b"7"), ('"7"', b"7"), ("-0", b"0"), ('"\\u00e4"', "ä".encode()), ('"a b"', b"a b")],
    )
    def test_a_field_may_name_the_stream(self, name: str, key: bytes) -> None:
        """A text or a whole number; the record's own key does not matter then."""
        value = f'{{"a": 1, "b": 2, "pump": {name}}}'.encode()
        assert decoded(value, b"another", stream="pump").key == key
        assert decoded(value, None, stream="pump").key == key

    @pytest.mark.parametrize(
        ("value", "reason"),
        [
            (b'{"a": 1, "b": 2}', "no-key"),
            (b'{"a": 1, "b": 2, "pump": null}', "no-key"),
            (b'{"a": 1, "b": 2, "pump": ""}', "no-key"),
            (b"[1, 2]", "no-key"),
            (b'{"a": 1, "b": 2, "pump": 1.5}', "wrong-type"),
            (b'{"a": 1, "b": 2, "pump": true}', "wrong-type"),
            (b'{"a": 1, "b": 2, "pump": ["x"]}', "wrong-type"),
            (b'{"a": 1, "b": 2, "pump": "%s"}' % (b"x" * 4097), "key-too-large"),
            (b'{"a": 1, "b": 2, "pump": "%s"}' % ("ä".encode() * 2049), "key-too-large"),
            (b'{"a": 1, "b": 2, "pump": "\\ud800"}', "malformed"),
            (None, "empty"),
        ],
    )
    def test_a_field_that_names_no_stream_is_refused(self, value: bytes | None, reason: str) -> None:
        """Missing, null, empty, of another type, too large; a null value ends no stream then."""
        assert decoded(value, b"k", stream="pump").reason == reason

    def test_a_null_value_ends_the_stream_of_the_key(self) -> None:
        """A tombstone is a value of its own kind, while no bytes at all are refused."""
        assert decoded(None, b"pump") == Ended(b"pump")
        assert decoded(b"", b"pump").reason == "empty"

    @pytest.mark.parametrize(
        ("fields", "sentence"),
        [
            ({"time": "a"}, "the time field 'a' is also a feature"),
            ({"stream": "b"}, "the stream field 'b' is also a feature"),
            ({"time": "x", "stream": "x"}, "the field 'x' cannot hold both the time and the stream"),
        ],
    )
    def test_fields_that_clash_are_refused_at_once(self, fields: dict[str, str], sentence: str) -> None:
        """A field has one meaning; the sentence says to name another."""
        with pytest.raises(ValueError, match=sentence):
            Decoder(CONTRACT, Fields(**fields))


@pytest.mark.parametrize(
    ("value", "timestamp_ms", "time"),
    [
        (b'{"a": 1, "b": 2, "ts": "1970-01-01T00:00:05Z"}', 7000, 5 * 10**9),
        (b'{"a": 1, "b": 2, "ts": 5}', 7000, 5 * 10**9),
        (b'{"a": 1, "b": 2, "ts": null}', 7000, 7 * 10**9),
        (b'{"a": 1, "b": 2}', 7000, 7 * 10**9),
        (b"[1, 2]", 7000, 7 * 10**9),
        (b"[1, 2]", -1, NO_TIME),
    ],
)
def test_the_time_is_the_fields_or_else_the_records(value: bytes, timestamp_ms: int, time: int) -> None:
    """A field that is absent or null leaves the record's timestamp; without either there is none."""
    found = Decoder(CONTRACT, Fields()).decode(record(value, timestamp_ms=timestamp_ms))
    assert isinstance(found, Observation)
    assert found.time == time


@pytest.mark.parametrize("name", ["a b", "Druck/1", "ä", "f0", "time", "x.y", "$", "0"])
def test_features_may_be_called_as_people_call_them(name: str) -> None:
    """Spaces, dots, umlauts, and the names that the decoder uses inside."""
    contract = smoother_contract(features=(Feature(name), Feature("f1")))
    found = decoded(json.dumps({name: 1, "f1": 2}).encode(), contract=contract)
    assert found.values == (1, 2)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "ts", "pump", "x"]), inner, max_size=5)
    ),
    max_leaves=8,
)


@given(st.binary(max_size=60) | JSON.map(lambda document: json.dumps(document).encode()))
@example(b'{"a":1,"b":2,"ts":"\x00"}')
@example(b'\xef\xbb\xbf{"a":1,"b":2}')
def test_no_bytes_raise(value: bytes) -> None:
    """Whatever a message holds, decoding gives an observation or a reason that the metrics know."""
    for fields in (Fields(), Fields(stream="pump")):
        for contract in (CONTRACT, OWN_FORECAST):
            decoder = Decoder(contract, fields)
            found = decoder.decode(record(value))
            if isinstance(found, Observation):
                x, refused = decoder.matrix([found])
                assert x.shape == (1, 2)
                found = refused[0] or found
            if isinstance(found, Refused):
                assert found.reason in REASONS
                assert found.sentence
                encoder = Encoder(contract, "ab" * 32, "sensors")
                headers = encoder.dead_letter(record(value), found).headers
                assert sum(len(name) + len(told) for name, told in headers) < 1000


def test_a_time_of_nanoseconds_is_not_read_through_a_float() -> None:
    """19 digits keep their last one, as a number and as a string."""
    for value in (b'{"a":1,"b":2,"ts":1700000000123456789}', b'{"a":1,"b":2,"ts":"1700000000123456789"}'):
        assert decoded(value).time == 1_700_000_000_123_456_789
    assert math.isclose(decoded(b'{"a":1,"b":2,"ts":1700000000.25}').time, 1_700_000_000.25e9)
