"""Bytes to observations, predictions to bytes. A message that cannot be read is a value here, never an exception.

Input is JSON: an object with named features, or an array of numbers in the model's order. Output is the JSON
document of the README. Decoding is done here and not in the Kafka client, whose poll spins for ever once a
deserializer has raised.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np

from statestep.consumers.ports import Headers, Message, Record
from statestep.runtime import NO_TIME, Contract

MAX_KEY_BYTES = 4096  # keys are repeated in every output and, later, in every state record
MAX_MESSAGE_BYTES = 1 << 20
MAX_DEAD_LETTER_BYTES = 900_000  # leaves room for headers below a broker's usual limit of 1 MiB

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# A number is seconds below the first bound, then milliseconds, microseconds, nanoseconds: (bound, ns in a unit).
TIME_UNITS = ((1e11, 10**9), (1e14, 10**6), (1e17, 10**3), (float("inf"), 1))
NS_RANGE = (-(1 << 63) + 1, (1 << 63) - 1)  # the years 1677 to 2262


class Refused(NamedTuple):
    """Why a record is not an observation: a word for programs and metrics, a sentence for people."""

    reason: str
    sentence: str


class Observation(NamedTuple):
    """One timestep of one stream, still in double precision."""

    key: bytes
    values: tuple[float | None, ...]  # one for each feature, None or NaN where it is missing
    time: int  # ns since the epoch, NO_TIME if unknown


class Source(msgspec.Struct, frozen=True, gc=False):
    """Which record an output answers."""

    topic: str
    partition: int
    offset: int


class Prediction(msgspec.Struct, gc=False):
    """The value of an output message."""

    stream: str
    ts: datetime | None
    step: int
    expected: dict[str, float] | None
    prediction: dict[str, float] | None
    score: float | None
    threshold: float | None
    anomaly: bool | None
    flags: list[str]
    warm: bool | None
    model: msgspec.Raw
    source: Source
    outputs: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a message holds what is not a feature."""

    time: str = "ts"
    stream: str | None = None  # None: the record's key names the stream


class Decoder:
    """Records to observations for one model.

    >>> from statestep.runtime import Feature, Output, State
    >>> contract = Contract("m", (Feature("flow"),), (State("h0", "hn", (1,)),), (Output("y"),))
    >>> decoder = Decoder(contract, Fields())
    >>> decoder.decode(Record(0, 7, -1, b"pump-1", b'{"flow": 2.5, "ts": "1970-01-01T00:00:01Z"}'))
    Observation(key=b'pump-1', values=(2.5,), time=1000000000)
    >>> decoder.decode(Record(0, 8, -1, b"pump-1", b'{"flow": "high"}')).reason
    'wrong-type'
    """

    def __init__(self, contract: Contract, fields: Fields, max_bytes: int = MAX_MESSAGE_BYTES):
        names = contract.feature_names
        for what, field in (("time", fields.time), ("stream", fields.stream)):
            if field in names:
                raise ValueError(f"the {what} field {field!r} is also a feature of the model: name another")
        self._names = names
        self._fields = fields
        self._max_bytes = max_bytes
        self._accepts_missing = contract.missing == "own-forecast"
        inner = {f"f{i}": name for i, name in enumerate(names)} | {"time": fields.time}
        kinds: list[tuple[str, Any, Any]] = [(f"f{i}", float | None, np.nan) for i in range(len(names))]
        kinds.append(("time", str | int | float | None, None))
        if fields.stream is not None:
            inner["stream"] = fields.stream
            kinds.append(("stream", str | int | None, None))
        timestep = msgspec.defstruct("Timestep", kinds, rename=inner, gc=False)
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(timestep | list[float | None])

    def decode(self, record: Record) -> Observation | Refused:
        """One record. Its features are counted, not yet judged: `matrix` does that for many at once."""
        if not record.value:
            return Refused("empty", "the message has no bytes")
        if len(record.value) > self._max_bytes:
            size = len(record.value)
            return Refused("too-large", f"the message has {size:,} bytes, at most {self._max_bytes:,} are taken")
        try:
            step = self._decoder.decode(record.value)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            return self._refused(record.value, error)
        if isinstance(step, list):
            if len(step) != len(self._names):
                return Refused("wrong-shape", f"the array has {len(step)} numbers, the model takes {len(self._names)}")
            values, when, name = tuple(step), None, None
        else:
            fields = msgspec.structs.astuple(step)
            values, when = fields[: len(self._names)], fields[len(self._names)]
            name = fields[-1] if self._fields.stream is not None else None
        key = self._key(record, name)
        if isinstance(key, Refused):
            return key
        time = parse_time(when) if when is not None else _record_time(record.timestamp_ms)
        if time is None:
            return Refused("bad-time", f"{self._fields.time!r} is {when!r}: neither ISO 8601 nor a number since 1970")
        return Observation(key, values, time)

    def matrix(self, observations: Sequence[Observation]) -> tuple[np.ndarray[Any, np.dtype[np.float32]], list[Any]]:
        """float32 [N, F], and for each row None or why it is `Refused`."""
        shape = (len(observations), len(self._names))
        try:
            flat = chain.from_iterable(o.values for o in observations)
            wide = np.fromiter(flat, np.float64, shape[0] * shape[1]).reshape(shape)  # [N, F]
        except TypeError:  # a None, which only the slower way understands
            wide = np.array([o.values for o in observations], np.float64).reshape(shape)
        with np.errstate(over="ignore"):
            x = wide.astype(np.float32)  # [N, F]
        refused: list[Refused | None] = [None] * shape[0]
        if np.isfinite(x).all():
            return x, refused
        for row, column in np.argwhere(~np.isfinite(x)).tolist():
            name, value = self._names[column], wide[row, column]
            if not np.isnan(value):
                refused[row] = Refused("out-of-range", f"feature {name!r} is {value!r}, beyond what a float32 holds")
            elif not self._accepts_missing and refused[row] is None:
                refused[row] = Refused("missing-feature", f"feature {name!r} is missing or null")
        return x, refused

    def _key(self, record: Record, name: str | int | None) -> bytes | Refused:
        if self._fields.stream is None:
            key = record.key
            if not key:
                return Refused("no-key", "the record has no key to name its stream, and no stream field is set")
        else:
            if name is None or name == "":
                return Refused("no-key", f"the field {self._fields.stream!r}, which names the stream, is missing")
            key = str(name).encode("utf-8", "surrogatepass")
        if len(key) > MAX_KEY_BYTES:
            return Refused(
                "key-too-large", f"the stream's name has {len(key):,} bytes, at most {MAX_KEY_BYTES:,} are taken"
            )
        return key

    def _refused(self, value: bytes, error: Exception) -> Refused:
        """Tell wrong types from broken JSON. Python's own writer emits NaN and Infinity, which are not JSON."""
        if isinstance(error, msgspec.ValidationError):
            return Refused("wrong-type", str(error))
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return Refused("malformed", f"not JSON: {error}")
        numbers = found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]
        odd = [number for number in numbers if isinstance(number, float) and not np.isfinite(number)]
        if odd:
            return Refused("non-finite", f"holds {odd[0]}, which is not a JSON number; send null for a missing value")
        return Refused("malformed", f"not JSON: {error}")


class Encoder:
    """Advanced rows to output messages for one model and topic."""

    def __init__(self, contract: Contract, fingerprint: str, topic: str):
        named = {"name": contract.name, "version": contract.model_version, "sha256": fingerprint}
        self._model = msgspec.Raw(msgspec.json.encode(named))
        self._topic = topic
        self._encode = msgspec.json.Encoder().encode
        self._names = {
            role: (output.features if output is not None and output.features else contract.feature_names)
            for role in ("prediction", "expected")
            for output in [contract.output(role)]
        }

    def features(self, role: str) -> tuple[str, ...]:
        """The names of the columns of the output that plays `role`."""
        return self._names[role]

    def message(
        self,
        record: Record,
        observation: Observation,
        step: int,
        flags: list[str],
        row: dict[str, Any],
        extra: dict[str, Any] | msgspec.UnsetType,
    ) -> Message:
        """One output. `row` has this row of each output with a role, as Python numbers or lists of them."""
        expected = row.get("expected")
        prediction = row.get("prediction")
        threshold = row.get("threshold")
        value = Prediction(
            stream=text(observation.key),
            ts=moment(observation.time),
            step=step,
            # At a stream's first step no forecast had been made, whatever the graph has to put there.
            expected=None
            if expected is None or step == 1
            else dict(zip(self._names["expected"], expected, strict=True)),
            prediction=None if prediction is None else dict(zip(self._names["prediction"], prediction, strict=True)),
            score=row.get("score"),
            threshold=threshold,
            anomaly=bool(row["anomaly"]) if row.get("anomaly") is not None else None,
            flags=flags,
            warm=None,
            model=self._model,
            source=Source(self._topic, record.partition, record.offset),
            outputs=extra,
        )
        return Message(False, record.partition, observation.key, self._encode(value), self.headers(record))

    def tombstone(self, record: Record) -> Message:
        """A null value passed on: the stream has ended."""
        return Message(False, record.partition, record.key, None, self.headers(record))

    def headers(self, record: Record) -> Headers:
        """The record's own headers, then where it came from."""
        return (
            *record.headers,
            ("statestep.source.topic", self._topic.encode()),
            ("statestep.source.partition", b"%d" % record.partition),
            ("statestep.source.offset", b"%d" % record.offset),
        )

    def dead_letter(self, record: Record, why: Refused, max_bytes: int = MAX_DEAD_LETTER_BYTES) -> Message:
        """The record as it came, with the reason in headers under the names that Kafka Streams uses (KIP-1034).

        A value over `max_bytes` is cut, and its size and SHA-256 are told.
        """
        value, key = record.value, record.key
        headers = [
            *record.headers,
            ("__streams.errors.exception", why.reason.encode()),
            ("__streams.errors.message", why.sentence.encode("utf-8", "backslashreplace")),
            ("__streams.errors.topic", self._topic.encode()),
            ("__streams.errors.partition", b"%d" % record.partition),
            ("__streams.errors.offset", b"%d" % record.offset),
        ]
        for name, whole, limit in (("key", key, MAX_KEY_BYTES), ("value", value, max_bytes)):
            if whole is not None and len(whole) > limit:
                headers.append((f"statestep.original.{name}.size", b"%d" % len(whole)))
                headers.append((f"statestep.original.{name}.sha256", hashlib.sha256(whole).hexdigest().encode()))
        key = None if key is None else key[:MAX_KEY_BYTES]
        value = None if value is None else value[:max_bytes]
        return Message(True, record.partition, key, value, tuple(headers))


def parse_time(value: str | int | float) -> int | None:
    """A point in time as ns since the epoch, or None if it is none.

    Numbers, and strings that look like one, count from 1970 in seconds, milliseconds (from 1e11), microseconds
    (from 1e14) or nanoseconds (from 1e17). Other strings are ISO 8601; without a zone they are UTC.

    >>> parse_time(1_700_000_000) == parse_time("1700000000000") == parse_time("2023-11-14T22:13:20Z")
    True
    """
    number: int | float
    if isinstance(value, str):
        try:
            number = int(value) if value.lstrip("+-").isdecimal() else float(value)
        except ValueError:
            return _iso_time(value)
    else:
        number = value
    if not abs(number) <= NS_RANGE[1]:  # NaN is not, either
        return None
    unit = next(ns for bound, ns in TIME_UNITS if abs(number) < bound)
    time = number * unit if isinstance(number, int) else round(number * unit)
    return time if NS_RANGE[0] <= time <= NS_RANGE[1] else None


def moment(time: int) -> datetime | None:
    """Nanoseconds since the epoch as a UTC datetime, to the microsecond; None for `NO_TIME`."""
    return None if time == NO_TIME else EPOCH + timedelta(microseconds=time // 1000)


def text(key: bytes) -> str:
    """A stream's name for people and JSON; bytes that are not UTF-8 are escaped."""
    return key.decode("utf-8", "backslashreplace")


def _iso_time(value: str) -> int | None:
    try:
        when = datetime.fromisoformat(value.strip())
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    time = (when - EPOCH) // timedelta(microseconds=1) * 1000
    return time if NS_RANGE[0] <= time <= NS_RANGE[1] else None


def _record_time(timestamp_ms: int) -> int:
    return NO_TIME if timestamp_ms < 0 else min(timestamp_ms * 1_000_000, NS_RANGE[1])
