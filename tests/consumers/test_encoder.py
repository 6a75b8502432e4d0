"""Bytes out: what an output and a dead letter look like, to the byte."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestep.consumers.codec import (
    MAX_HEADER_BYTES,
    Decoder,
    Encoder,
    Fields,
    Observation,
    Refused,
    text,
)
from statestep.consumers.ports import Headers, Record
from statestep.runtime import NO_TIME, Output

from ..models import smoother_contract

CONTRACT = smoother_contract()  # features a and b


def record(value: bytes | None, key: bytes | None = b"k", timestamp_ms: int = -1, headers: Headers = ()) -> Record:
    return Record(3, 17, timestamp_ms, key, value, headers)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
def test_float32_values_survive_an_output(values: list[float]) -> None:
    """What is written is read back as the same float32, to the last bit, subnormal numbers and -0 included."""
    encoder = Encoder(CONTRACT, "ab" * 32, "sensors")
    x = np.array(values, np.float32)
    row = {"prediction": x.tolist()}
    message = encoder.message(record(b""), Observation(b"k", (1.0, 2.0), 0), 1, [], row, msgspec.UNSET)
    assert message.value is not None
    written = json.loads(message.value)["prediction"]
    assert np.array([written["a"], written["b"]], np.float32).tobytes() == x.tobytes()


FULL = smoother_contract(
    name="pump",
    model_version="3",
    outputs=(
        Output("y", role="prediction", features=("b",)),
        Output("e", role="expected", features=("b",)),
        Output("s", role="score"),
        Output("t", role="threshold"),
        Output("w", role="anomaly"),
        Output("extra"),
    ),
)


ROW: dict[str, Any] = {"prediction": [1.5], "expected": [2.5], "score": 0.25, "threshold": 2.0, "anomaly": True}


def test_an_output_is_the_promised_document() -> None:
    """Every key of the README's example, in its order, with the values of this row."""
    encoder = Encoder(FULL, "ab" * 32, "sensors")
    seen = Observation("Pumpe-ä".encode(), (1.0, 2.0), 1_700_000_000_123_456_789)
    message = encoder.message(record(b""), seen, 5, ["gap"], ROW, {"extra": [1, 2]})
    assert message.value is not None
    assert json.loads(message.value) == {
        "stream": "Pumpe-ä",
        "ts": "2023-11-14T22:13:20.123456Z",
        "step": 5,
        "expected": {"b": 2.5},
        "prediction": {"b": 1.5},
        "score": 0.25,
        "threshold": 2.0,
        "anomaly": True,
        "flags": ["gap"],
        "warm": None,
        "status": None,
        "model": {"name": "pump", "version": "3", "sha256": "ab" * 32},
        "source": {"topic": "sensors", "partition": 3, "offset": 17},
        "outputs": {"extra": [1, 2]},
    }
    assert list(json.loads(message.value))[:4] == ["stream", "ts", "step", "expected"]
    assert (message.key, message.partition, message.dead) == ("Pumpe-ä".encode(), 3, False)
    assert message.timestamp_ms is None


def test_what_the_model_cannot_say_is_null() -> None:
    """Without roles, time or other outputs the fields are null or absent."""
    encoder = Encoder(FULL, "ab" * 32, "sensors")
    first = encoder.message(record(b""), Observation(b"\xff/k", (1.0, 2.0), NO_TIME), 1, [], ROW, msgspec.UNSET)
    assert first.value is not None
    document = json.loads(first.value)
    assert document["ts"] is None
    assert document["stream"] == "\\xff/k"
    assert "outputs" not in document
    bare = encoder.message(record(b""), Observation(b"k", (1.0, 2.0), 0), 2, [], {}, msgspec.UNSET)
    assert bare.value is not None
    document = json.loads(bare.value)
    names = ("expected", "prediction", "score", "threshold", "anomaly", "warm", "status")
    assert [document[name] for name in names] == [None] * 7
    assert not {"event", "why", "outputs"} & document.keys()


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (None, [None] * 4),
        ({"warm": None}, [None] * 4),
        ({"warm": 1}, [True] * 4),
        ({"warm": 3}, [False, False, True, True]),
    ],
)
def test_a_stream_is_warm_from_the_horizon_on(memory: dict[str, Any] | None, expected: list[bool | None]) -> None:
    """From the step that the model's memory names its outputs no longer depend on how the stream began."""
    encoder = Encoder(smoother_contract(memory=memory), "ab" * 32, "sensors")
    seen = Observation(b"k", (1.0, 2.0), 0)
    values = [encoder.message(record(b""), seen, step, [], {}, msgspec.UNSET).value for step in (1, 2, 3, 400)]
    assert [json.loads(value or b"")["warm"] for value in values] == expected


def test_headers_pass_through_with_the_origin() -> None:
    """Headers of the input come first, doubled names included; then topic, partition and offset, on tombstones too."""
    encoder = Encoder(CONTRACT, "ab" * 32, "sensors")
    given_headers = (("traceparent", b"00-ab"), ("x", b"1"), ("x", b"\xff"), ("empty", b""))
    source = record(b"[1, 2]", headers=given_headers)
    message = encoder.message(source, Observation(b"k", (1.0, 2.0), 0), 1, [], {}, msgspec.UNSET)
    expected = (
        *given_headers,
        ("statestep.source.topic", b"sensors"),
        ("statestep.source.partition", b"3"),
        ("statestep.source.offset", b"17"),
    )
    assert message.headers == expected
    assert encoder.tombstone(source)._replace(value=b"") == message._replace(value=b"")
    assert encoder.tombstone(source).value is None


def test_headers_without_bound_are_dropped_and_counted() -> None:
    """Past 32 KiB whole headers are left out, of outputs and of dead letters, and one header says how many."""
    encoder = Encoder(CONTRACT, "ab" * 32, "sensors")
    huge = (("a", b"1"), ("b", b"x" * MAX_HEADER_BYTES), ("c", b"x" * 1_000_000), ("d", b"2"))
    source = record(b"[1, 2]", headers=huge)
    for message in (encoder.tombstone(source), encoder.dead_letter(source, Refused("empty", "…"))):
        assert message.headers[:2] == (("a", b"1"), ("statestep.headers.dropped", b"3"))
        assert sum(len(name) + len(value) for name, value in message.headers) < MAX_HEADER_BYTES + 1000
    full = tuple((f"{number:04}", b"x" * 28) for number in range(1024))  # 32 KiB to the byte
    assert encoder.tombstone(record(None, headers=full)).headers[:1024] == full


class TestDeadLetters:
    """A record that was refused: as it came, with the reason in headers."""

    ENCODER = Encoder(CONTRACT, "ab" * 32, "sensors")

    def test_it_is_the_record_with_its_reason(self) -> None:
        """Key, value and headers as they were, not valid text included; the reason under Kafka Streams' names."""
        source = record(b"\xff\x00", b"\xfe", headers=(("h", b"\xfd"),))
        message = self.ENCODER.dead_letter(source, Refused("malformed", "is not JSON: ä"))
        assert (message.dead, message.partition, message.key, message.value) == (True, 3, b"\xfe", b"\xff\x00")
        assert message.headers == (
            ("h", b"\xfd"),
            ("__streams.errors.exception", b"malformed"),
            ("__streams.errors.message", "is not JSON: ä".encode()),
            ("__streams.errors.topic", b"sensors"),
            ("__streams.errors.partition", b"3"),
            ("__streams.errors.offset", b"17"),
        )

    @pytest.mark.parametrize("value", [None, b""])
    def test_nothing_stays_nothing(self, value: bytes | None) -> None:
        """A null value and no bytes are told apart on the other side, too."""
        message = self.ENCODER.dead_letter(record(value, None), Refused("no-key", "…"))
        assert (message.key, message.value) == (None, value)

    def test_a_large_one_is_cut_and_says_what_it_was(self) -> None:
        """Of 20 MB the first 900,000 bytes are kept, with size and SHA-256 of the whole; the same for a huge key."""
        value, key = bytes(range(256)) * 80_000, b"k" * 5000
        message = self.ENCODER.dead_letter(record(value, key), Refused("too-large", "…"))
        headers = dict(message.headers)
        assert message.value == value[:900_000]
        assert message.key == key[:4096]
        assert headers["statestep.original.value.size"] == b"20480000"
        assert headers["statestep.original.value.sha256"].decode() == hashlib.sha256(value).hexdigest()
        assert headers["statestep.original.key.size"] == b"5000"
        assert headers["statestep.original.key.sha256"].decode() == hashlib.sha256(key).hexdigest()

    def test_one_that_just_fits_is_whole(self) -> None:
        """At the limit nothing is cut and nothing is said; a byte less room and it is."""
        value = b"x" * 100
        assert "statestep.original.value.size" not in dict(
            self.ENCODER.dead_letter(record(value), Refused("empty", "…"), max_bytes=100).headers
        )
        cut = self.ENCODER.dead_letter(record(value), Refused("empty", "…"), max_bytes=99)
        assert (cut.value, dict(cut.headers)["statestep.original.value.size"]) == (value[:99], b"100")

    def test_a_broker_takes_the_largest_there_is(self) -> None:
        """Value, key, headers and sentence at their bounds stay below a broker's usual limit of 1,048,588 bytes."""
        value = b'{"a": 1, "b": 2, "ts": "%s"}' % (b"9:" * 500_000)
        source = record(value, b"k" * 4096, headers=tuple((f"h{n}", b"x" * 100) for n in range(9999)))
        why = Decoder(CONTRACT, Fields()).decode(source)
        assert isinstance(why, Refused)
        assert (why.reason, len(why.sentence) < 200) == ("bad-time", True)
        message = self.ENCODER.dead_letter(source, why)
        assert message.value is not None and message.key is not None
        headers = sum(len(name) + len(told) + 10 for name, told in message.headers)
        assert len(message.value) + len(message.key) + headers < 1_000_000


@given(st.binary(min_size=1, max_size=20))
def test_any_key_has_a_name_for_people(key: bytes) -> None:
    """Text stays text; other bytes are escaped; JSON and UTF-8 take the result."""
    name = text(key)
    name.encode()
    try:
        assert name == key.decode()
    except UnicodeDecodeError:
        assert "\\x" in name
