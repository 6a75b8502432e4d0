"""The bounded decoders give what kafka-python's own give, stop at the bound, and know one error."""

from __future__ import annotations

import gzip
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kafka import codec
from kafka.errors import CorruptRecordError, UnsupportedCodecError
from kafka.record import default_records

from statestep.consumers.kafka_client import fail
from statestep.consumers.kafka_codecs import DECODERS, bound, bounded
from statestep.consumers.ports import BrokerError

ENCODERS = {
    "gzip": codec.gzip_encode,
    "snappy": codec.snappy_encode,
    "lz4": codec.lz4_encode,
    "zstd": codec.zstd_encode,
    "plain snappy": lambda data: codec.snappy_encode(data, xerial_compatible=False),
    "gzip in two": lambda data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :]),
}
EACH = pytest.mark.parametrize("kind", ENCODERS)


def name_of(kind: str) -> str:
    return next(name for name in DECODERS if name in kind)


@EACH
@given(data=st.binary(min_size=1, max_size=100_000))
def test_what_was_compressed_comes_back(kind: str, data: bytes) -> None:
    """Up to the bound, and it to the byte."""
    decode = bounded(name_of(kind), DECODERS[name_of(kind)], most=len(data))
    assert decode(memoryview(ENCODERS[kind](data)) if "gzip" in kind else ENCODERS[kind](data)) == data


@EACH
def test_nothing_is_inflated_beyond_the_bound(kind: str) -> None:
    """Neither the result nor what is held on the way is much larger."""
    bomb = ENCODERS[kind](bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptRecordError, match=f"compressed by {name_of(kind)} inflates beyond 1 MiB"):
            bounded(name_of(kind), DECODERS[name_of(kind)], most=1 << 20)(bomb)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@EACH
@given(data=st.binary(min_size=1, max_size=500), cut=st.floats(0, 1, exclude_max=True))
def test_what_was_cut_short_is_one_error(kind: str, data: bytes, cut: float) -> None:
    """Or what there is of it, where a format cannot tell: never another exception."""
    whole = ENCODERS[kind](data)
    try:
        found = bounded(name_of(kind), DECODERS[name_of(kind)])(whole[: int(cut * len(whole))])
    except CorruptRecordError:
        return
    assert data.startswith(found)


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(name: str, data: bytes) -> None:
    """Of whatever kind the library's own error is."""
    try:
        bounded(name, DECODERS[name], most=1 << 20)(data)
    except CorruptRecordError as error:
        assert name in str(error)


def test_the_client_uses_them() -> None:
    """Once any client is made."""
    bound()
    for name in DECODERS:
        assert getattr(default_records, f"{name}_decode").__module__ == "statestep.consumers.kafka_codecs"


def test_a_missing_library_is_named_with_its_extra() -> None:
    """A topic that is compressed needs it; kafka-python says which."""
    with pytest.raises(BrokerError, match=r"Libraries for zstd.*; pip install 'statestep\[compression\]'"):
        fail("reading 'in'", UnsupportedCodecError("Libraries for zstd compression codec not found"))
