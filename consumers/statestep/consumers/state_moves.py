"""Durable states on the move: a portable file of them, and what an import has to write. Pure.

The file is lines of JSON. The first is `{"statestep-states": 1, "header": {…}, "crc32c": "…"}`, the header a `Header`
and the checksum that of its bytes as they stand. Each further line is a stream: its partition, its name for people,
and key and value of its changelog record in base64, which carries a checksum of its own (see `changelog`).

An import never goes behind the service's back: it writes what a transaction of the service would, one sequence on.
A moved record gets the target's state epoch, and as its offset the one before the target's `next`: every message
from there on is applied to it, and none before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec
from crc32c import crc32c
from kafka.partitioner.default import murmur2

from statestep.consumers.changelog import MARKER, STREAM, Marker, encode_marker, look, moved
from statestep.consumers.checkpoint import Stop, committed
from statestep.consumers.codec import text
from statestep.consumers.config import ConfigError
from statestep.consumers.ports import Committed, Identity, StateRecord
from statestep.consumers.states import Held, find
from statestep.consumers.tables import FileError

FORMAT = 1  # of the file; the file of another is not read

Placing = int | Literal["same"] | None  # a partition for all, the one that each had, or as it is due


class Header(msgspec.Struct, frozen=True):
    """What all the streams of a file have in common."""

    application: str
    input: str
    topic_id: str
    partitions: int
    model: str  # the fingerprint, SHA-256 in hex
    semantics: str
    layout: str  # of the tensors, in hex; empty if there is no stream
    next: dict[int, int]  # by partition: the offset that the states go on from
    streams: int


class _First(msgspec.Struct, rename={"version": "statestep-states"}):
    version: int
    header: msgspec.Raw
    crc32c: str


class _Line(msgspec.Struct):
    partition: int
    stream: str  # for people alone
    key: bytes
    value: bytes


class Exported(NamedTuple):
    """What a file holds."""

    header: Header
    records: list[StateRecord]


def export(
    application: str, topic: str, identity: Identity, holds: Sequence[Held], only: str | None = None
) -> Exported:
    """The streams of these partitions, or one of them. Raises `Stop` where they could not go on from the file."""
    kept = [held for held in holds if held.marker is not None]
    if only is not None:
        found = find(kept, only)
        kept, records = [held for held, _ in found], [held.streams[key] for held, key in found]
    else:
        records = [record for held in kept for record in held.streams.values()]
    if not kept:
        raise Stop(f"{application} has no states yet")
    for held in kept:
        _expect_still(held)
    markers = [held.marker for held in kept if held.marker is not None]
    layouts = {look(record).layout for record in records}
    if len({marker.model for marker in markers}) > 1 or len(layouts) > 1:
        raise Stop(
            f"the partitions of {application} are of different models; start it once and stop it by SIGTERM, so that "
            "all are of one"
        )
    header = Header(
        application=application,
        input=topic,
        topic_id=identity.topic_id,
        partitions=identity.partitions,
        model=markers[0].model,
        semantics=markers[0].semantics,
        layout="".join(layouts),
        next={held.partition: marker.next for held, marker in zip(kept, markers, strict=True)},
        streams=len(records),
    )
    return Exported(header, records)


def written(exported: Exported) -> Iterator[bytes]:
    """The lines of a file."""
    header = msgspec.json.encode(exported.header)
    yield msgspec.json.encode(_First(FORMAT, msgspec.Raw(header), f"{crc32c(header):08x}")) + b"\n"
    for partition, key, value, _ in exported.records:
        assert value is not None
        yield msgspec.json.encode(_Line(partition, text(key[len(STREAM) :]), key, value)) + b"\n"


def read(lines: Iterable[bytes], name: str) -> Exported:
    """What the lines of the file `name` hold. Raises `FileError`, for whatever is not as it was written."""
    rest = iter(lines)
    try:
        first = msgspec.json.decode(next(rest, b""), type=_First)
        if first.version != FORMAT:
            raise FileError(f"{name}: has format {first.version}, this release reads {FORMAT}; upgrade statestep")
        if f"{crc32c(bytes(first.header)):08x}" != first.crc32c:
            raise FileError(f"{name}: line 1 is damaged: its checksum does not match")
        header = msgspec.json.decode(first.header, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{name}: is no file of states, as `statestep state export` writes them: {error}") from None
    records = []
    for number, line in enumerate(rest, 2):
        try:
            found = msgspec.json.decode(line, type=_Line)
            record = StateRecord(found.partition, found.key, found.value, number)
            if not 0 <= found.partition < header.partitions:
                raise ValueError(f"there is no partition {found.partition} of {header.partitions}")
            if look(record).layout != header.layout:
                raise ValueError("it is of another layout than the others")
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise FileError(f"{name}: line {number} is damaged: {error}") from None
        records.append(record)
    if len(records) != header.streams:
        raise FileError(f"{name}: has {len(records)} streams, its first line tells of {header.streams}: it was cut")
    return Exported(header, records)


class Terms(NamedTuple):
    """What a person has said of an import."""

    placing: Placing = None
    start: str | None = None  # where a new application begins
    replace: bool = False  # streams that are there already
    any_model: bool = False
    any_offset: bool = False
    model: str | None = None  # fingerprint and layout of the target's model, where it was named
    layout: str | None = None


class Write(NamedTuple):
    """What an import makes durable in one partition."""

    partition: int
    states: list[StateRecord]  # the marker last
    offset: Committed


def place(key: bytes, partitions: int) -> int:
    """The partition to which producers send a key, if nobody told them another way.

    >>> place(b"abc", 4)
    3
    """
    return int((murmur2(key) & 0x7FFFFFFF) % partitions)


def plan(
    exported: Exported,
    target: Mapping[int, Held],
    identity: Identity,
    terms: Terms,
    start: Callable[[int, str], int],
    writer: str,
) -> list[Write]:
    """What an import has to write, by partition. `start` turns the word for a beginning into an offset; `writer` is a
    name that no other writer has.

    Raises `Stop` or `ConfigError` where streams could not go on as they were.
    """
    header = exported.header
    same = bool(header.topic_id) and header.topic_id == identity.topic_id
    placed: dict[int, dict[bytes, StateRecord]] = {}
    for record in exported.records:
        key = record.key[len(STREAM) :]
        partition = terms.placing
        if partition is None or partition == "same":
            kept = same or partition == "same"
            partition = record.partition if kept else place(key, identity.partitions)
        if not 0 <= partition < identity.partitions:
            raise ConfigError(f"there is no partition {partition}: the target has {identity.partitions}, from 0 on")
        if placed.setdefault(partition, {}).setdefault(key, record) is not record:
            raise Stop(
                f"the stream {text(key)!r} comes from two partitions and would lie on one; export a single partition's "
                "by its name, or keep them apart by --partition same"
            )
    if same and not isinstance(terms.placing, int):
        for partition in header.next:  # what had no stream goes on from the same place, too
            if target[partition].marker is None:
                placed.setdefault(partition, {})
    _expect_fitting(header, target, terms)
    return [
        _write(header, records, target[p], identity, terms, same, start, writer)
        for p, records in sorted(placed.items())
    ]


def _write(
    header: Header,
    records: Mapping[bytes, StateRecord],
    held: Held,
    identity: Identity,
    terms: Terms,
    same: bool,
    start: Callable[[int, str], int],
    writer: str,
) -> Write:
    """What is to be written of one partition."""
    p, seen, left_off = held.partition, held.marker, header.next.get(held.partition) if same else None
    if seen is None:
        if held.committed is not None:
            raise Stop(
                f"partition {p}: offset {held.committed.offset} is committed, but there are no states to go with it; "
                "use another --app-id"
            )
        begin = left_off if terms.start is None and left_off is not None else start(p, terms.start or "earliest")
        marker = Marker(
            sequence=0,
            redo=begin,
            next=begin,
            epoch=held.epochs + 1,
            topic_id=identity.topic_id,
            partitions=identity.partitions,
            records=0,
            semantics=header.semantics,
            model=terms.model or header.model,
            writer=writer,
        )
    else:
        _expect_still(held)
        if (seen.topic_id, seen.partitions) != (identity.topic_id, identity.partitions):
            raise Stop(f"partition {p}: the input is not the one that its streams began with; use another --app-id")
        if terms.start is not None:
            raise ConfigError(f"--start is for a new application; partition {p} goes on at offset {seen.next}")
        marker = msgspec.structs.replace(seen, sequence=seen.sequence + 1, writer=writer)
    if left_off not in (None, marker.next) and not terms.any_offset:
        assert left_off is not None
        what = "applied twice" if marker.next < left_off else "left out"
        between = sorted((marker.next, left_off))
        raise Stop(
            f"partition {p}: the states go on at offset {left_off} and the target at {marker.next}, so messages "
            f"{between[0]} to {between[1]} would be {what}; --any-offset takes that"
        )
    if there := [key for key in records if key in held.streams and not terms.replace]:
        raise Stop(f"partition {p}: the stream {text(there[0])!r} has a state there already; --replace takes the new")
    states = [moved(record, p, marker.epoch, marker.next - 1) for record in records.values()]
    states.append(StateRecord(p, MARKER, encode_marker(marker)))
    return Write(p, states, committed(marker))


def _expect_still(held: Held) -> None:
    """Refuse a partition whose states and messages are not at one offset."""
    assert held.marker is not None
    seen, stop = held.marker, "stop the application by SIGTERM, which writes them, and try again"
    if held.moving:
        raise Stop(f"partition {held.partition}: its states are being written; {stop}")
    if seen.redo < seen.next:
        raise Stop(f"partition {held.partition}: states of messages {seen.redo} to {seen.next} are not written; {stop}")
    if held.committed not in (None, committed(seen)):
        assert held.committed is not None
        raise Stop(
            f"partition {held.partition}: offset {held.committed.offset} is committed and the states go with "
            f"{seen.next}; start the application, which says how it can go on, and stop it by SIGTERM"
        )


def _expect_fitting(header: Header, target: Mapping[int, Held], terms: Terms) -> None:
    """Refuse states that the target's model did not make, or could not even read."""
    models = {held.marker.model for held in target.values() if held.marker is not None}
    theirs = terms.model or next(iter(models), header.model)
    if {theirs, *models} == {header.model}:
        return
    other = next(model for model in (theirs, *models) if model != header.model)
    if not terms.any_model:
        raise Stop(
            f"the states were made by model {header.model[:12]} and the target's is {other[:12]}; --any-model takes "
            "them all the same, if their tensors have the same names, shapes and types"
        )
    records = (record for held in target.values() for record in held.streams.values())
    layout = terms.layout or next((look(record).layout for record in records), None)
    if layout is None:
        raise ConfigError("--any-model needs --model, the target's, to see whether the states' tensors fit it")
    if header.layout not in ("", layout):
        raise Stop(f"the states of model {header.model[:12]} have other tensors than those of {other[:12]} need")
