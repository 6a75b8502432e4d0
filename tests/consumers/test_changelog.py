"""The changelog's bytes: what was written is read back, bit for bit, and nothing else is ever taken for it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from statestep.consumers.changelog import (
    FORMAT,
    MARKER,
    STREAM,
    Corrupt,
    Foreign,
    Marker,
    StateCodec,
    decode_marker,
    encode_marker,
)
from statestep.consumers.ports import StateRecord
from statestep.runtime import Contract, Feature, Output, Records, State
from statestep.runtime.contract import DTYPES

Array = np.ndarray[Any, Any]


def crc32c(data: bytes) -> int:
    """The checksum bit by bit, as RFC 3720 defines it: the reference for the library that the codec uses."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def sealed(record: StateRecord, body: bytes) -> StateRecord:
    """`record` with `body` and the checksum that belongs to it: a forgery that only its content gives away."""
    crc = crc32c(struct.pack("<I", record.partition) + record.key + body)
    return record._replace(value=body + struct.pack("<I", crc))


def contract_of(*states: State) -> Contract:
    return Contract("drawn", (Feature("x"),), states, (Output("y"),))


def drawn_state(dtype: str, shape: tuple[int, ...], n: int, rng: np.random.Generator) -> Array:
    """n states of any bits that the dtype has: NaNs with payloads, subnormal numbers and -0 among them."""
    size = n * int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
    data = rng.integers(0, 2 if dtype == "bool" else 256, size, np.uint8)
    return np.frombuffer(data.tobytes(), dtype).reshape(n, *shape)


def drawn(contract: Contract, n: int, seed: int) -> Records:
    rng = np.random.default_rng(seed)
    states = [drawn_state(state.dtype, state.shape, n, rng) for state in contract.states]
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    numbers = [rng.integers(low, high, n, np.int64, endpoint=True) for low in (0, low, -1)]
    return Records(states, *numbers)


GOLDEN = contract_of(
    State("h", "hn", (2,)),
    State("c", "cn", (), dtype="float64"),
    State("n", "nn", (1, 2), dtype="float16"),
    State("i", "in", (1,), dtype="int64", initial=0),
    State("j", "jn", (), dtype="int32", initial=0),
    State("b", "bn", (3,), dtype="bool", initial=False),
)
GOLDEN_RECORDS = Records(
    [
        np.array([[0.5, -1]], np.float32),
        np.array([1 / 3]),
        np.array([[[1.5, -2]]], np.float16),
        np.array([[-5]]),
        np.array([7], np.int32),
        np.array([[True, False, True]]),
    ],
    step=np.array([5]),
    time=np.array([1_700_000_000_123_456_789]),
    offset=np.array([117]),
)
GOLDEN_VALUE = bytes.fromhex(
    "535354 01 62823ad3c9de08ae 07000000 7500000000000000 0500000000000000 15cd853dfe9c9717"
    "0000003f000080bf 555555555555d53f 003e00c0 fbffffffffffffff 07000000 010001 18f7324e"
)
GOLDEN_MARKER = (
    b'{"statestep-marker":1,"sequence":7,"redo":100,"next":117,"epoch":1,"topic_id":"aBcD","partitions":4,'
    b'"records":17,"semantics":"5e","model":"f0","writer":"3c","crc32c":"30829bf8"}'
)
MARK = Marker(7, 100, 117, 1, "aBcD", 4, 17, "5e", "f0", "3c")

SMALL = StateCodec(contract_of(State("h0", "hn", (2,))))
NUMBERS = np.array([5])
(RECORD,) = SMALL.encode(
    3, [b"pump-07"], Records([np.array([[0.5, -1]], np.float32)], NUMBERS, NUMBERS * 10, NUMBERS * 20), 1
)
VALUE = RECORD.value or b""


def flips(data: bytes) -> Iterator[bytes]:
    """`data` with one bit turned over, for every bit."""
    for place in range(len(data)):
        for bit in range(8):
            yield data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def cuts(data: bytes) -> Iterator[bytes]:
    """`data` without its end or its beginning, for every place, and with a zero too many."""
    for place in range(len(data)):
        yield data[:place]
        yield data[place + 1 :]
    yield data + b"\0"
    yield b"\0" + data


def holes(data: bytes) -> Iterator[bytes]:
    """`data` with a run of zeros over it, as a disk leaves behind: every place, several lengths."""
    for length in (2, 4, 8, 16, 32, len(data)):
        for place in range(len(data) - length + 1):
            damaged = data[:place] + bytes(length) + data[place + length :]
            if damaged != data:
                yield damaged


states = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 4), max_size=3).map(tuple)), min_size=1, max_size=4
).map(lambda kinds: [State(f"s{i}", f"t{i}", shape, dtype=dtype, initial=0) for i, (dtype, shape) in enumerate(kinds)])
stream_keys = st.binary(max_size=40) | st.binary(min_size=4096, max_size=4096)


@given(states, st.lists(stream_keys, max_size=5), st.integers(0, 2**32 - 1), st.integers(0, 2**31 - 1), st.integers(0))
@example([State("h", "hn", (3,))], [b"", b"m", b"s", bytes(4096)], 2**32 - 1, 0, 1)
def test_every_record_comes_back_bit_for_bit(
    kinds: list[State], keys: list[bytes], epoch: int, partition: int, seed: int
) -> None:
    """Whatever a contract allows, with any bits in it, under any key; arrays are as the engine takes them."""
    contract = contract_of(*kinds)
    codec, records = StateCodec(contract), drawn(contract, len(keys), seed)
    written = codec.encode(partition, keys, records, epoch)
    assert [record.key for record in written] == [STREAM + key for key in keys]
    assert all(record.partition == partition and len(record.value or b"") == codec.size for record in written)
    decoded = codec.decode(written)
    assert (decoded.keys, decoded.partitions, decoded.foreign) == (keys, [partition] * len(keys), [])
    assert decoded.epochs.tolist() == [epoch] * len(keys)
    before = [*records.states, records.step, records.time, records.offset]
    after = [*decoded.records.states, decoded.records.step, decoded.records.time, decoded.records.offset]
    for one, other in zip(before, after, strict=True):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        assert other.dtype.isnative and other.flags.c_contiguous and other.flags.writeable


def test_the_format_is_stable() -> None:
    """These bytes lie on brokers and disks. Another layout of them needs another `FORMAT`."""
    assert FORMAT == 1
    written = StateCodec(GOLDEN).encode(3, [b"pump-07"], GOLDEN_RECORDS, epoch=7)
    assert [(record.partition, record.key) for record in written] == [(3, b"spump-07")]
    body = (written[0].value or b"")[:-4]
    head, rest = body[:12], struct.unpack("<Iqqq2fd", body[12:56])
    named = b'[["h",[2],"float32"],["c",[],"float64"],["n",[1,2],"float16"],["i",[1],"int64"],["j",[],"int32"],'
    assert head == b"SST\x01" + hashlib.sha256(named + b'["b",[3],"bool"]]').digest()[:8]
    assert rest == (7, 117, 5, 1_700_000_000_123_456_789, 0.5, -1, 1 / 3)
    assert struct.unpack("<2eqi3?", body[56:]) == (1.5, -2, -5, 7, True, False, True)
    assert sealed(written[0], body) == written[0], "the checksum is that of partition, key and body"
    assert written[0].value == GOLDEN_VALUE


def test_the_markers_format_is_stable() -> None:
    """A marker is one line of JSON for people, and its checksum is that of all before it."""
    assert (STREAM, MARKER) == (b"s", b"m")
    assert encode_marker(MARK) == GOLDEN_MARKER
    assert decode_marker(GOLDEN_MARKER) == MARK
    body, _, crc = GOLDEN_MARKER.partition(b',"crc32c":')
    assert crc == b'"%08x"}' % crc32c(body)
    assert msgspec.json.decode(GOLDEN_MARKER)["next"] == 117


@given(st.lists(st.integers(0, 2**62), min_size=3, max_size=3), st.integers(1, 2**31), st.text())
def test_every_marker_comes_back(numbers: list[int], partitions: int, topic_id: str) -> None:
    """Also where an offset is large and the topic's id has quotes or letters from anywhere."""
    redo, length, epoch = numbers
    mark = Marker(0, redo, redo + length, epoch, topic_id, partitions, length, "ab" * 32, "cd" * 32, "ef" * 8)
    assert decode_marker(encode_marker(mark)) == mark


@pytest.mark.parametrize("change", [{"redo": 118}, {"records": 18}, {"records": -1}, {"partitions": 0}, {"epoch": -1}])
def test_a_marker_that_cannot_be_is_neither_made_nor_read(change: dict[str, int]) -> None:
    """A marker whose numbers contradict each other would send a restore astray, however sound its checksum."""
    fields = msgspec.structs.asdict(MARK) | change
    with pytest.raises(ValueError, match="which cannot be"):
        Marker(**fields)
    body = b'{"statestep-marker":1,' + msgspec.json.encode(fields)[1:-1]
    with pytest.raises(Corrupt, match="cannot be read"):
        decode_marker(body + b',"crc32c":"%08x"}' % crc32c(body))


@pytest.mark.parametrize("damage", [flips, cuts, holes])
def test_every_damage_to_a_record_is_seen(damage: Any) -> None:
    """Every single bit, every cut, every run of zeros: none is read, and none passes for another model's."""
    tried = 0
    for value in damage(VALUE):
        with pytest.raises(Corrupt):
            SMALL.decode([RECORD, RECORD._replace(value=value)])
        tried += 1
    assert tried >= 2 * len(VALUE)


@pytest.mark.parametrize("damage", [flips, cuts, holes])
def test_every_damage_to_a_marker_is_seen(damage: Any) -> None:
    """Every single bit, every cut, every run of zeros; hex digits in capitals among them."""
    tried = 0
    for value in damage(GOLDEN_MARKER):
        with pytest.raises(Corrupt):
            decode_marker(value)
        tried += 1
    assert tried >= 2 * len(GOLDEN_MARKER)


def test_a_record_is_no_one_elses() -> None:
    """Under another key, on another partition, or for the marker's, sound bytes are refused."""
    moved = [RECORD._replace(key=key) for key in [*flips(RECORD.key), *cuts(RECORD.key)]]
    moved += [RECORD._replace(partition=3 ^ 1 << bit) for bit in range(31)]
    for record in moved:
        with pytest.raises(Corrupt):
            SMALL.decode([record])
    with pytest.raises(Corrupt, match="no stream's"):
        SMALL.decode([sealed(RECORD._replace(key=MARKER), VALUE[:-4])])
    with pytest.raises(Corrupt):
        SMALL.decode([RECORD._replace(value=GOLDEN_MARKER)])
    with pytest.raises(Corrupt):
        decode_marker(VALUE)


@pytest.mark.parametrize(
    "state",
    [
        State("h1", "hn", (2,)),
        State("h0", "hn", (1, 2)),
        State("h0", "hn", (3,)),
        State("h0", "hn", (2,), dtype="int32", initial=0),
        State("h0", "hn", (1,), dtype="float64"),
    ],
)
def test_another_models_record_is_foreign_and_not_corrupt(state: State) -> None:
    """Other names, shapes or dtypes, even of the same size: set apart with its epoch, while the others are read."""
    other = StateCodec(contract_of(state))
    (foreign,) = other.encode(3, [b"pump-08"], drawn(contract_of(state), 1, seed=1), epoch=9)
    decoded = SMALL.decode([foreign, RECORD])
    assert decoded.keys == [b"pump-07"]
    assert [(found.record, found.epoch) for found in decoded.foreign] == [(foreign, 9)]
    assert "another model, under state epoch 9" in str(decoded.foreign[0])
    for value in flips(foreign.value or b""):
        with pytest.raises(Corrupt):
            SMALL.decode([foreign._replace(value=value)])


def test_what_a_new_birth_would_be_is_of_the_same_layout() -> None:
    """Initial values, the states' outputs and where the batch axis stands do not lie in a record."""
    other = StateCodec(contract_of(State("h0", "next", (2,), batch_axis=1, initial=0.5)))
    assert other.decode([RECORD]).keys == [b"pump-07"]


@pytest.mark.parametrize("version", [0, 2, 255])
def test_a_later_releases_bytes_are_called_that(version: int) -> None:
    """Though their checksum is sound, and another format may put anything behind its number."""
    with pytest.raises(Corrupt, match=f"has format {version}, .* later release"):
        SMALL.decode([sealed(RECORD, b"SST" + bytes([version]) + VALUE[4:-4])])
    with pytest.raises(Corrupt, match=f"has format {version}, .* later release"):
        decode_marker(GOLDEN_MARKER.replace(b'marker":1', b'marker":%d' % version))


def test_a_sound_checksum_over_too_few_tensors_is_no_record() -> None:
    """The layout's hash says which tensors follow. Where they do not, nothing is read beyond the end."""
    for length in range(40, len(VALUE) - 4):
        with pytest.raises(Corrupt, match=f"it has {length + 4} bytes, its tensors need 52"):
            SMALL.decode([sealed(RECORD, VALUE[:length])])


@pytest.mark.parametrize("key", [b"pump\n\xff", b"k" * 4096])
def test_an_error_names_the_record(key: bytes) -> None:
    """Partition, changelog offset and key; the key escaped, and cut where it is long."""
    with pytest.raises(Corrupt) as caught:
        SMALL.decode([StateRecord(3, STREAM + key, VALUE, offset=117)])
    shown = "b'pump\\n\\xff'" if len(key) < 100 else f"b'{'k' * 60}' and 4036 bytes more"
    assert str(caught.value) == (
        f"record 117 of changelog partition 3, stream {shown}, is damaged: its checksum does not match"
    )
    with pytest.raises(Corrupt, match=r"^the marker of partition 3 is damaged"):
        decode_marker(b"", "the marker of partition 3")


def test_a_tombstone_is_not_for_the_codec() -> None:
    """It says that a stream ended: nothing of it can be decoded, and it is not damage either."""
    with pytest.raises(ValueError, match="tombstone") as caught:
        SMALL.decode([RECORD._replace(value=None)])
    assert not isinstance(caught.value, Corrupt | Foreign)


@pytest.mark.parametrize("states", [np.zeros((1, 2)), np.zeros((1, 1), np.float32), np.zeros((2, 2), np.float32)])
def test_states_of_another_kind_are_not_written(states: Array) -> None:
    """numpy would convert and repeat them in silence."""
    with pytest.raises(ValueError, match=r"state 0 of 1 streams is .*, it must be float32 \[1, 2\]"):
        SMALL.encode(3, [b"k"], Records([states], NUMBERS, NUMBERS, NUMBERS), 1)


heads = st.sampled_from([b"", VALUE[:3], VALUE[:4], VALUE[:12]])


@given(st.builds(bytes.__add__, heads, st.binary(max_size=60)), st.binary(max_size=9), st.booleans())
def test_any_bytes_are_read_or_refused(value: bytes, key: bytes, sound: bool) -> None:
    """Chance never raises anything else, not even with a checksum that is right; without one it is always refused."""
    record = StateRecord(3, STREAM + key, value)
    if not sound:
        with pytest.raises(Corrupt):
            SMALL.decode([record])
        return
    record = sealed(record, value)
    try:
        decoded = SMALL.decode([record])
    except Corrupt:
        return
    assert value.startswith(VALUE[:4])
    assert value.startswith(VALUE[:12]) == (not decoded.foreign)


@given(st.binary(max_size=60) | st.builds(bytes.__add__, st.just(GOLDEN_MARKER[:21]), st.binary(max_size=60)))
@example(GOLDEN_MARKER[:21] + b',"x":' + b"[" * 100_000)
@example(GOLDEN_MARKER[:21] + b',"topic_id":"\xff"')
def test_any_bytes_are_a_marker_or_refused(body: bytes) -> None:
    """JSON that is broken, too deep or of other fields is refused in one way, with a right checksum too."""
    with pytest.raises(Corrupt):
        decode_marker(body)
    with pytest.raises(Corrupt):
        decode_marker(body + b',"crc32c":"%08x"}' % crc32c(body))
