"""What a run over files keeps in its store beside the states, and how the files are held to it at the next start.

The input must be the file that it was, the outputs must have what was committed; what they have beyond that never
counted and is cut off. So only plain files will do: neither pipes nor what can only be written from its beginning.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import msgspec

from statestep.consumers.ports import Committed
from statestep.consumers.store import Store, sync_names
from statestep.consumers.tables import FileError, file_format

BEGINNING_BYTES = 64 << 10  # by which a file is known again
ANEW = "begin anew with another --state-dir"


class Origin(msgspec.Struct, frozen=True):
    """A file as it was when it was opened."""

    path: str
    size: int  # bytes
    hashed: int  # how many bytes of the beginning the hash is of
    sha256: str  # empty where it comes by a pipe


class Outputs(msgspec.Struct, frozen=True):
    """How far the files that are written are committed."""

    path: str
    length: int  # bytes
    dead_path: str
    dead_length: int  # bytes; 0 where there is no file yet
    columns: list[str] | None = None  # of a CSV file, once they are known
    events_path: str | None = None  # None: none are written
    events_length: int = 0


def origin(path: str, hashed: int = BEGINNING_BYTES) -> Origin:
    """A file, known by at most `hashed` bytes; of standard input and pipes nothing is known. Raises `FileError`."""
    if path == "-":
        return Origin(path, 0, 0, "")
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return Origin(path, 0, 0, "")
        with Path(path).open("rb") as file:
            beginning = file.read(hashed)
            size = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from None
    return Origin(str(Path(path).resolve()), size, len(beginning), hashlib.sha256(beginning).hexdigest())


def same_input(store: Store, path: str) -> Origin:
    """The input as it was first seen; it may have grown. Raises `FileError` where it is another one."""
    found = origin(path)
    if not found.sha256:
        raise FileError(f"{path}: cannot be read a second time, so no state can be kept; leave --state-dir out")
    noted = store.note("input")
    if noted is not None and committed(store, 0) is not None:
        known = msgspec.json.decode(noted, type=Origin)
        if found.path != known.path:
            raise FileError(f"{path}: the states are of {known.path}; {ANEW}")
        if found.size < known.size:
            raise FileError(f"{path}: has {found.size} bytes, it had {known.size}; {ANEW}")
        if origin(path, known.hashed).sha256 != known.sha256:
            raise FileError(f"{path}: does not begin as it did, so it is another file; {ANEW}")
        found = Origin(known.path, found.size, known.hashed, known.sha256)
    store.apply([], {}, {"input": msgspec.json.encode(found)})
    return found


def committed(store: Store, partition: int) -> Committed | None:
    """What was committed last for a partition."""
    noted = store.note(f"offset {partition}")
    return None if noted is None else msgspec.json.decode(noted, type=Committed)


def outputs(store: Store, path: str, dead_path: str, events_path: str | None) -> Outputs:
    """How far the files are committed. Raises `FileError` where others were, or where these cannot be cut back."""
    places = [None if name is None else _plain(name) for name in (path, dead_path, events_path)]
    noted = store.note("outputs")
    if noted is None:
        assert places[0] is not None and places[1] is not None
        return Outputs(places[0], 0, places[1], 0, events_path=places[2])
    known = msgspec.json.decode(noted, type=Outputs)
    names, before = (path, dead_path, events_path), (known.path, known.dead_path, known.events_path)
    for name, now, then in zip(names, places, before, strict=True):
        if then is None and now is not None:
            raise FileError(f"{name}: the states go with no file of events; leave --events out, or {ANEW}")
        if now != then:
            raise FileError(f"{name or '--events'}: the states go with {then}; write there, or {ANEW}")
    return known


def notes(offsets: Mapping[int, Committed], written: Outputs) -> dict[str, bytes]:
    """What is to be kept with a transaction's states."""
    kept = {f"offset {partition}": msgspec.json.encode(committed) for partition, committed in offsets.items()}
    return kept | {"outputs": msgspec.json.encode(written)}


def reopen(path: str, length: int) -> IO[bytes]:
    """A file to be written on after its first `length` bytes; the others are cut off. Raises `FileError`."""
    try:
        size = Path(path).stat().st_size if Path(path).exists() else 0
        if size < length:
            raise FileError(f"{path}: has {size} bytes, {length} were committed: it was cut or replaced; {ANEW}")
        Path(path).touch()
        os.truncate(path, length)
        sync_names(Path(path).resolve().parent)
        return Path(path).open("ab")
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}") from None


def _plain(path: str) -> str:
    """The whole path of a file that can be cut back. Raises `FileError` for any other."""
    if path == "-" or (Path(path).exists() and not Path(path).is_file()):
        what = "standard output or a pipe"
    elif path.endswith(".gz"):
        what = "a gzipped file"
    elif file_format(path) == "parquet":
        what = "a Parquet file"
    else:
        return str(Path(path).resolve())
    raise FileError(f"{path}: {what} cannot be cut back after a crash; leave --state-dir out, or write plain text")
