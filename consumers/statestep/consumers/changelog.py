"""The bytes of the state changelog: what is durable of a stream, and the marker of a partition. Pure.

A stream's record has the key `STREAM` + the stream's key, and the value

    "SST"  format u8  layout 8 bytes  epoch u32  offset i64  step i64  time i64  tensors  CRC32C u32

little-endian and without gaps, whatever the machine. `layout` tells which tensors follow: a record of another layout
is sound, but of another model. `offset` is that of the last message that was applied. The checksum covers the partition
and the record's key too, so that a record is no one else's. A marker has the key `MARKER` and is a line of JSON that
people can read; its checksum is its last entry.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
from crc32c import crc32c

from statestep.consumers.ports import StateRecord
from statestep.runtime import Contract, Records

STREAM, MARKER = b"s", b"m"  # what a record's key begins with; a marker's key is that letter alone
FORMAT = 1  # rises with every change of the bytes, of the record's or the marker's

_MAGIC = b"SST"
_HEAD = len(_MAGIC) + 1 + 8  # bytes before the epoch: magic, format, layout
_COLUMNS: list[Any] = [("head", f"V{_HEAD}"), ("epoch", "<u4"), ("offset", "<i8"), ("step", "<i8"), ("time", "<i8")]
_PLAIN = struct.Struct("<3sB8sIqqq")  # the same, for one record
_CRC = 4  # bytes
_SHORTEST = np.dtype(_COLUMNS).itemsize + _CRC  # bytes around the tensors
_RESIDUE = 0x48674BC7  # the CRC32C of anything that is followed by its own CRC32C
_KEY_SHOWN = 60  # bytes of a key in an error

_MARKER = re.compile(rb'\{"statestep-marker":([0-9]+),.*(,"crc32c":"[0-9a-f]{8}"\})', re.DOTALL)


class Corrupt(ValueError):
    """Bytes of the changelog that are not what was written: one sentence that names the record."""


class Foreign(ValueError):
    """A sound record of another layout: another model wrote it, so it is void unless its epoch is the present one."""

    def __init__(self, record: StateRecord, epoch: int):
        super().__init__(f"{_name(record)} holds the states of another model, under state epoch {epoch}")
        self.record = record
        self.epoch = epoch


class Marker(msgspec.Struct, frozen=True):
    """What a partition's last transaction says of it. The next one replaces it.

    Raises ValueError for numbers that no partition can have.
    """

    sequence: int  # number of the partition's transactions, this one included
    redo: int  # the input offset from which a restore replays
    next: int  # the input offset after the last message accounted for
    epoch: int  # records of another state epoch are void
    topic_id: str  # of the input; another one after the topic was made anew
    partitions: int  # of the input
    records: int  # how many input records lie in [redo, next): offsets may have gaps
    semantics: str  # hash of everything that decides what a replay gives, in hex
    model: str  # the model's fingerprint: the SHA-256 of its file, in hex
    writer: str  # who committed it: a name of its own for every start of a service

    def __post_init__(self) -> None:
        sound = min(self.sequence, self.redo, self.epoch) >= 0 and 0 <= self.records <= self.next - self.redo
        if not sound or self.partitions < 1:
            raise ValueError(
                f"a marker has sequence {self.sequence}, state epoch {self.epoch}, {self.partitions} partitions and "
                f"{self.records} records from redo {self.redo} to next {self.next}, which cannot be"
            )


def encode_marker(marker: Marker) -> bytes:
    """The value of a marker's record.

    >>> encode_marker(Marker(7, 100, 117, 1, "aBcD", 4, 17, "5e", "f0", "3c"))[:60]
    b'{"statestep-marker":1,"sequence":7,"redo":100,"next":117,"ep'
    """
    body = b'{"statestep-marker":%d,%s' % (FORMAT, msgspec.json.encode(marker)[1:-1])
    return body + b',"crc32c":"%08x"}' % crc32c(body)


def decode_marker(value: bytes, where: str = "a partition's marker") -> Marker:
    """The marker of which `value` is the record's. `where` is what an error calls it. Raises `Corrupt`.

    >>> decode_marker(encode_marker(Marker(7, 100, 117, 1, "aBcD", 4, 17, "5e", "f0", "3c"))).next
    117
    """
    found = _MARKER.fullmatch(value)
    if found is None:
        raise Corrupt(f"{where} is damaged: it is not a marker's JSON")
    if (version := found[1].decode()) != str(FORMAT):
        raise Corrupt(f"{where} {_other_format(version)}")
    if found[2] != b',"crc32c":"%08x"}' % crc32c(value[: found.start(2)]):
        raise Corrupt(f"{where} is damaged: its checksum does not match")
    try:
        return msgspec.json.decode(value, type=Marker)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{where} cannot be read: {error}") from None


@dataclass(frozen=True, slots=True)
class Decoded:
    """What changelog records hold: n streams of this layout, in the order of their records, and those of others."""

    partitions: list[int]  # [n]
    keys: list[bytes]  # [n] of the streams; where one occurs twice, the last counts
    epochs: np.ndarray[Any, np.dtype[np.int64]]  # [n] state epochs
    records: Records  # of n streams; the arrays are the caller's own
    foreign: list[Foreign]  # not raised, as old models leave them behind until compaction; one may be


class StateCodec:
    """Streams' records to bytes and back, for the states of one contract.

    >>> from statestep.runtime import Feature, Output, State
    >>> contract = Contract("pump", (Feature("flow"),), (State("h0", "hn", (2,)),), (Output("y"),))
    >>> codec = StateCodec(contract)
    >>> number = np.array([5])
    >>> records = Records([np.array([[0.5, -1]], np.float32)], number, number * 10, number * 100)
    >>> written = codec.encode(3, [b"pump-07"], records, epoch=1)
    >>> written[0].partition, written[0].key, len(written[0].value)
    (3, b'spump-07', 52)
    >>> decoded = codec.decode(written)
    >>> decoded.keys, decoded.epochs.tolist(), decoded.records.states[0].tolist()
    ([b'pump-07'], [1], [[0.5, -1.0]])
    >>> codec.decode([written[0]._replace(key=b"spump-08", offset=117)])
    Traceback (most recent call last):
    statestep.consumers.changelog.Corrupt: record 117 of changelog partition 3, stream b'pump-08', is damaged: its \
checksum does not match
    """

    def __init__(self, contract: Contract):
        self._states = [(np.dtype(state.dtype), state.shape) for state in contract.states]
        named = [[state.input, list(state.shape), state.dtype] for state in contract.states]
        layout = hashlib.sha256(json.dumps(named, separators=(",", ":")).encode()).digest()[:8]
        self._head = _MAGIC + bytes([FORMAT]) + layout
        tensors = [
            (f"state {i}", dtype.newbyteorder("<"), shape)  # numbered: names in a graph may be anything
            for i, (dtype, shape) in enumerate(self._states)
        ]
        self._body = np.dtype([*_COLUMNS, *tensors])
        self._value = np.dtype([("body", self._body), ("crc", "<u4")])

    @property
    def size(self) -> int:
        """Bytes of every value."""
        return self._value.itemsize

    @property
    def layout(self) -> str:
        """Which tensors every value holds, as a hash in hex."""
        return self._head[-8:].hex()

    def encode(self, partition: int, keys: Sequence[bytes], records: Records, epoch: int) -> list[StateRecord]:
        """The changelog records of n streams of one partition: `keys` has theirs, `records` what is remembered of them.

        Raises ValueError for arrays of another dtype or shape than the contract's.
        """
        n = len(keys)
        for i, (value, (dtype, shape)) in enumerate(zip(records.states, self._states, strict=True)):
            if value.dtype != dtype or value.shape != (n, *shape):
                raise ValueError(
                    f"state {i} of {n} streams is {value.dtype} {list(value.shape)}, it must be {dtype} {[n, *shape]}"
                )
        rows = np.empty(n, self._body)  # [n]
        rows["head"] = np.void(self._head)
        rows["epoch"] = epoch
        rows["offset"], rows["step"], rows["time"] = records.offset, records.step, records.time
        for i, value in enumerate(records.states):
            rows[f"state {i}"] = value
        data, size, seed = rows.tobytes(), self._body.itemsize, _seed(partition)
        written = []
        for i, stream in enumerate(keys):
            key = STREAM + stream
            body = data[i * size : (i + 1) * size]
            written.append(StateRecord(partition, key, body + crc32c(body, crc32c(key, seed)).to_bytes(_CRC, "little")))
        return written

    def decode(self, records: Sequence[StateRecord]) -> Decoded:
        """What stream records hold, be they of one partition or several; markers and tombstones are not for it.

        Raises `Corrupt` for the first record that is not what was written.
        """
        partitions: list[int] = []
        keys: list[bytes] = []
        values: list[bytes] = []
        foreign: list[Foreign] = []
        seeds = {partition: _seed(partition) for partition in {record.partition for record in records}}
        for record in records:
            value, key = record.value, record.key
            if value is None:
                raise ValueError(f"{_name(record)} is a tombstone, which holds no state")
            crc = crc32c(value, crc32c(key, seeds[record.partition]))
            if crc == _RESIDUE and len(value) == self.size and value.startswith(self._head) and key.startswith(STREAM):
                partitions.append(record.partition)
                keys.append(key[len(STREAM) :])
                values.append(value)
            else:
                foreign.append(self._judged(record, value, crc))
        rows = np.frombuffer(b"".join(values), self._value)["body"] if values else np.empty(0, self._body)  # [n]
        states = [
            np.array(rows[f"state {i}"], dtype, order="C")  # [n, *shape]
            for i, (dtype, _) in enumerate(self._states)
        ]
        step, time, offset = (np.array(rows[column], np.int64) for column in ("step", "time", "offset"))  # [n]
        epochs = np.array(rows["epoch"], np.int64)  # [n]
        return Decoded(partitions, keys, epochs, Records(states, step, time, offset), foreign)

    def _judged(self, record: StateRecord, value: bytes, crc: int) -> Foreign:
        """What a record is that is not of this layout: foreign, or `Corrupt` is raised."""
        _expect_sound(record, value, crc)
        if value.startswith(self._head):
            raise Corrupt(f"{_name(record)} is damaged: it has {len(value)} bytes, its tensors need {self.size}")
        return Foreign(record, int.from_bytes(value[_HEAD : _HEAD + 4], "little"))


class Head(NamedTuple):
    """What a stream's record says without its model."""

    layout: str  # of its tensors, in hex
    epoch: int
    offset: int
    step: int
    time: int  # ns since the epoch, NO_TIME if unknown
    size: int  # bytes of the record's value


def look(record: StateRecord) -> Head:
    """What can be told of a stream's record, whatever its layout. Raises `Corrupt`."""
    value = record.value
    if value is None:
        raise ValueError(f"{_name(record)} is a tombstone, which holds no state")
    _expect_sound(record, value, crc32c(value, crc32c(record.key, _seed(record.partition))))
    _, _, layout, epoch, offset, step, time = _PLAIN.unpack_from(value)
    return Head(layout.hex(), epoch, offset, step, time, len(value))


def moved(record: StateRecord, partition: int, epoch: int, offset: int) -> StateRecord:
    """A sound stream record as another partition's: its step, time and tensors stay, bit for bit."""
    assert record.value is not None
    magic, version, layout, _, _, step, time = _PLAIN.unpack_from(record.value)
    head = _PLAIN.pack(magic, version, layout, epoch, offset, step, time)
    body = head + record.value[_PLAIN.size : -_CRC]
    crc = crc32c(body, crc32c(record.key, _seed(partition)))
    return StateRecord(partition, record.key, body + crc.to_bytes(_CRC, "little"))


def _expect_sound(record: StateRecord, value: bytes, crc: int) -> None:
    """Raise `Corrupt` for what is no stream's record as it was written; `crc` is over all of it."""
    if not record.key.startswith(STREAM):
        raise Corrupt(f"{_name(record)} is no stream's: its key does not begin with {STREAM!r}")
    if len(value) < _SHORTEST or not value.startswith(_MAGIC):
        raise Corrupt(f"{_name(record)} is damaged: its {len(value)} bytes are no state record")
    if (version := value[len(_MAGIC)]) != FORMAT:
        raise Corrupt(f"{_name(record)} {_other_format(version)}")
    if crc != _RESIDUE:
        raise Corrupt(f"{_name(record)} is damaged: its checksum does not match")


def _seed(partition: int) -> int:
    """The checksum of a partition's number, from which those of its records go on."""
    return crc32c(partition.to_bytes(4, "little"))


def _other_format(version: object) -> str:
    return (
        f"has format {version}, this release reads {FORMAT}: written by a later release, or damaged; upgrade statestep"
    )


def _name(record: StateRecord) -> str:
    """What an error calls a record; its key is escaped, and cut where it is long."""
    key, kind = (record.key[1:], "stream") if record.key.startswith(STREAM) else (record.key, "key")
    cut = "" if len(key) <= _KEY_SHOWN else f" and {len(key) - _KEY_SHOWN} bytes more"
    return f"record {record.offset} of changelog partition {record.partition}, {kind} {key[:_KEY_SHOWN]!r}{cut},"
