"""Compressed batches of records, inflated up to a bound and no further.

kafka-python 3.0.12 believes what a batch says of its size: a megabyte of zeros compressed by gzip is a gigabyte in
memory, and whoever may write to the input could end the service with it. A broker does not look (before its setting
max.decompressed.message.bytes). So the client's decoders are replaced by some that stop.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from kafka import codec
from kafka.errors import CorruptRecordError
from kafka.record import default_records, legacy_records

INFLATED_BYTES = 256 << 20  # of one batch; producers close a batch at a megabyte or less, before it is compressed
XERIAL_HEADER = 16  # bytes before the first block of Java's way to write snappy
GZIP = 31  # zlib's name for the format

Decoder = Callable[[Any, int], bytes]


def gunzip(data: Any, most: int) -> bytes:
    """Inflate gzip; at most a byte more than `most`.

    >>> import gzip
    >>> len(gunzip(gzip.compress(bytes(1000)), 1000)), len(gunzip(gzip.compress(bytes(1000)), 10))
    (1000, 11)
    """
    inflated, rest = b"", bytes(data)
    while rest and len(inflated) <= most:
        member = zlib.decompressobj(GZIP)
        inflated += member.decompress(rest, most + 1 - len(inflated))
        if not member.eof and len(inflated) <= most:
            raise EOFError("it ends too soon")
        rest = member.unused_data
    return inflated


def unlz4(data: Any, most: int) -> bytes:
    """The same for a frame of lz4."""
    frame = codec.lz4.LZ4FrameDecompressor()
    inflated: bytes = frame.decompress(data, max_length=most + 1)
    if not frame.eof and len(inflated) <= most:
        raise EOFError("it ends too soon")
    return inflated


def unzstd(data: Any, most: int) -> bytes:
    """The same for zstd."""
    with codec.zstd.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
        inflated: bytes = reader.read(most + 1)
    return inflated


def unsnappy(data: Any, most: int) -> bytes:
    """The same for snappy, whose blocks each say in front how large they are, and are not believed beyond `most`."""
    blocks = [data]
    if codec._detect_xerial_stream(data):
        blocks, at = [], XERIAL_HEADER
        while at < len(data):
            size = int.from_bytes(data[at : at + 4], "big")
            blocks.append(data[at + 4 : at + 4 + size])
            at += 4 + size
    if sum(map(_said, blocks)) > most:
        return bytes(most + 1)
    return b"".join(codec.snappy.decompress(block) for block in blocks)


def _said(block: bytes) -> int:
    """The size in front of a block of snappy, seven bits a byte, the lowest first."""
    size = 0
    for place, byte in enumerate(block[:5]):
        size |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return size
    raise EOFError("it does not say how large it is")


DECODERS: dict[str, Decoder] = {"gzip": gunzip, "snappy": unsnappy, "lz4": unlz4, "zstd": unzstd}


def bounded(name: str, decoder: Decoder, most: int = INFLATED_BYTES) -> Callable[[Any], bytes]:
    """`decoder` as kafka-python calls it; whatever is wrong is one error of the client's own, which the poll raises."""

    def decode(data: Any) -> bytes:
        try:
            inflated = decoder(data, most)
        except Exception as error:  # each library has its own
            raise CorruptRecordError(f"a batch compressed by {name} cannot be read: {error}") from None
        if len(inflated) > most:
            raise CorruptRecordError(
                f"a batch of {len(data):,} bytes compressed by {name} inflates beyond {most >> 20} MiB; "
                "--client librdkafka reads it, if there is memory for it"
            )
        return inflated

    return decode


@cache
def bound() -> None:
    """Put the bounded decoders in the place of kafka-python's, for all of its clients in this process."""
    for name, decoder in DECODERS.items():
        for records in (default_records, legacy_records):
            if hasattr(records, f"{name}_decode"):
                setattr(records, f"{name}_decode", bounded(name, decoder))
