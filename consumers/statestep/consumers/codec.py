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
from datetime import datetime
from itertools import chain
from typing import Any, NamedTuple

import msgspec
import numpy as np

from statestep.consumers.events import Event, Phase, Told, Why
from statestep.consumers.ports import Headers, Message, Record
from statestep.consumers.times import from_ms, moment, parse_time
from statestep.runtime import Contract

MAX_KEY_BYTES = 4096  # keys are repeated in every output and, later, in every state record
MAX_MESSAGE_BYTES = 1 << 20
MAX_DEAD_LETTER_BYTES = 900_000  # leaves room for headers below a broker's usual limit of 1 MiB
MAX_HEADER_BYTES = 32 * 1024  # of the record's own, names and values; whole headers past it are dropped
MAX_QUOTED = 80  # characters of a message that a sentence repeats


Array = np.ndarray[Any, Any]


class Refused(NamedTuple):
    """Why a record is not an observation: a word for programs and metrics, a sentence for people."""

    reason: str
    sentence: str


class Ended(NamedTuple):
    """A tombstone: a null value, which ends the stream that the record's key names."""

    key: bytes


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
    status: str | None
    model: msgspec.Raw
    source: Source
    event: Event | msgspec.UnsetType = msgspec.UNSET  # of rows that belong to one
    why: list[Why] | msgspec.UnsetType = msgspec.UNSET
    outputs: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class Notice(msgspec.Struct, gc=False):
    """The value of a message that tells of an event's beginning or end."""

    id: str
    stream: str
    phase: Phase
    ts: datetime | None
    since: datetime | None
    steps: int
    severity: float | None
    level: str | None
    score: float | None
    threshold: float | None
    why: list[Why]
    model: msgspec.Raw
    source: Source
    ended: bool | msgspec.UnsetType = msgspec.UNSET  # true where the stream has ended, and the event with it


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
        if fields.time == fields.stream:
            raise ValueError(f"the field {fields.time!r} cannot hold both the time and the stream: name another")
        self._dtype = np.dtype(contract.input_dtype)
        if self._dtype.kind != "f":
            raise ValueError(f"the model takes {self._dtype}, messages hold numbers with a fraction")
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

    def decode(self, record: Record) -> Observation | Ended | Refused:
        """One record. Its features are counted, not yet judged: `matrix` does that for many at once."""
        if record.value is None and self._fields.stream is None:
            key = self._key(record, None)
            return key if isinstance(key, Refused) else Ended(key)
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
        time = parse_time(when) if when is not None else from_ms(record.timestamp_ms)
        if time is None:
            quoted = f"{when!r:.{MAX_QUOTED}}"  # all of it could make a dead letter that no broker takes
            return Refused("bad-time", f"{self._fields.time!r} is {quoted}: neither ISO 8601 nor a number since 1970")
        return Observation(key, values, time)

    def matrix(self, observations: Sequence[Observation]) -> tuple[Array, list[Refused | None]]:
        """[N, F] in the model's dtype, and for each row None or why it is `Refused`."""
        shape = (len(observations), len(self._names))
        try:
            flat = chain.from_iterable(o.values for o in observations)
            wide = np.fromiter(flat, np.float64, shape[0] * shape[1]).reshape(shape)  # [N, F]
        except TypeError:  # a None, which only the slower way understands
            wide = np.array([o.values for o in observations], np.float64).reshape(shape)
        with np.errstate(over="ignore"):
            x = wide.astype(self._dtype)  # [N, F]
        refused: list[Refused | None] = [None] * shape[0]
        if np.isfinite(x).all():
            return x, refused
        for row, column in np.argwhere(~np.isfinite(x)).tolist():
            name, value = self._names[column], wide[row, column]
            if not np.isnan(value):
                refused[row] = Refused("out-of-range", f"feature {name!r} is {value}, beyond a {self._dtype}")
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
            return Refused("out-of-range" if "out of range" in str(error) else "wrong-type", str(error))
        if isinstance(error, RecursionError):
            return Refused("malformed", "is nested too deep to be read")
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return Refused("malformed", f"is not JSON: {error}")
        numbers = found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]
        odd = [number for number in numbers if isinstance(number, float) and not np.isfinite(number)]
        if odd:
            return Refused("non-finite", f"holds {odd[0]}, which is not a JSON number; send null for a missing value")
        return Refused("malformed", f"is not JSON: {error}")


class Encoder:
    """Advanced rows to output messages for one model and topic."""

    def __init__(self, contract: Contract, fingerprint: str, topic: str):
        named = {"name": contract.name, "version": contract.model_version, "sha256": fingerprint}
        self._model = msgspec.Raw(msgspec.json.encode(named))
        self.topic = topic
        self._origin_topic = ("statestep.source.topic", topic.encode())
        self._warm_after = contract.warm_after
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
        told: Told | None = None,
    ) -> Message:
        """One output. `row` has this row of each output whose role has a place in it, as Python numbers or lists of
        them, the status as a word; `told` is the event that it belongs to."""
        value = Prediction(
            stream=text(observation.key),
            ts=moment(observation.time),
            step=step,
            expected=self._named("expected", row.get("expected")),
            prediction=self._named("prediction", row.get("prediction")),
            score=row.get("score"),
            threshold=row.get("threshold"),
            anomaly=None if (anomaly := row.get("anomaly")) is None else bool(anomaly),
            flags=flags,
            warm=None if self._warm_after is None else step >= self._warm_after,
            status=row.get("status"),
            model=self._model,
            source=Source(self.topic, record.partition, record.offset),
            outputs=extra,
        )
        if told is not None:  # by themselves: a call with more than 15 names takes CPython four times as long
            value.event, value.why = told
        return Message(False, record.partition, observation.key, self._encode(value), self.headers(record))

    def _named(self, role: str, values: list[float] | None) -> dict[str, float] | None:
        return None if values is None else dict(zip(self._names[role], values, strict=True))

    def tombstone(self, record: Record) -> Message:
        """A null value passed on: the stream has ended."""
        return Message(False, record.partition, record.key, None, self.headers(record))

    def notice(
        self,
        record: Record,
        key: bytes,
        time: int,
        told: Told,
        *,
        phase: Phase,
        score: float | None = None,
        threshold: float | None = None,
        ended: bool | msgspec.UnsetType = msgspec.UNSET,
    ) -> Message:
        """An event's beginning or end, for the topic of events; without the record's own headers, for it is of many."""
        event = told.event
        value = Notice(
            id=event.id,
            stream=text(key),
            phase=phase,
            ts=moment(time),
            since=event.since,
            steps=event.steps,
            severity=event.severity,
            level=event.level,
            score=score,
            threshold=threshold,
            why=told.why,
            model=self._model,
            source=Source(self.topic, record.partition, record.offset),
            ended=ended,
        )
        return Message(False, record.partition, key, self._encode(value), self._origin(record), event=True)

    def headers(self, record: Record) -> Headers:
        """The record's own headers, then where it came from."""
        return (*_bounded(record.headers), *self._origin(record))

    def _origin(self, record: Record) -> Headers:
        return (
            self._origin_topic,
            ("statestep.source.partition", b"%d" % record.partition),
            ("statestep.source.offset", b"%d" % record.offset),
        )

    def dead_letter(self, record: Record, why: Refused, max_bytes: int = MAX_DEAD_LETTER_BYTES) -> Message:
        """The record as it came, with the reason in headers under the names that Kafka Streams uses (KIP-1034).

        A value over `max_bytes` is cut, and its size and SHA-256 are told.
        """
        value, key = record.value, record.key
        headers = [
            *_bounded(record.headers),
            ("__streams.errors.exception", why.reason.encode()),
            ("__streams.errors.message", why.sentence.encode("utf-8", "backslashreplace")),
            ("__streams.errors.topic", self.topic.encode()),
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


def _bounded(headers: Headers) -> Headers:
    """The headers that fit into `MAX_HEADER_BYTES`, and how many did not: they could make a message no broker takes."""
    room, kept = MAX_HEADER_BYTES, []
    for name, value in headers:
        room -= len(name.encode()) + len(value)
        if room >= 0:
            kept.append((name, value))
    if len(kept) < len(headers):
        kept.append(("statestep.headers.dropped", b"%d" % (len(headers) - len(kept))))
    return tuple(kept)


def text(key: bytes) -> str:
    """A stream's name for people and JSON; bytes that are not UTF-8 are escaped."""
    return key.decode("utf-8", "backslashreplace")
