"""Rows of CSV, JSONL and Parquet files, plain or gzipped; `-` is JSONL on standard input.

Whatever is wrong with a file is a `FileError` that names it.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import select
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np

from statestep.consumers.times import parse_time

SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
CHUNK_BYTES = 1 << 20
PIPE_SECONDS = 0.2  # the longest that a silent pipe keeps a signal from being seen
LABELS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}  # cells in lower case
BOM = b"\xef\xbb\xbf"  # which some programs put before UTF-8


class FileError(ValueError):
    """A file that is not there, has no such column, or is not in the format that it claims."""


def file_format(path: str) -> str:
    """The format that a file's name tells, `.gz` aside; standard input and output are JSONL.

    >>> file_format("data/pumps.csv.gz")
    'csv'
    """
    if path == "-":
        return "jsonl"
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    known = SUFFIXES.get(suffixes[-1].lower()) if suffixes else None
    if known is None:
        raise FileError(f"{path}: its name tells no format; end it in .csv, .jsonl or .parquet")
    return known


def stem(path: str) -> str:
    """The name of a file's one stream: its name without directory and endings."""
    return "stdin" if path == "-" else Path(path).name.split(".")[0] or "file"


def columns(path: str) -> tuple[str, ...] | None:
    """The names of a table's columns, None for JSONL."""
    kind = file_format(path)
    if kind == "jsonl":
        return None
    if kind == "parquet":
        return tuple(_parquet(path).schema_arrow.names)
    with _reading(path) as file:
        return tuple(next(csv.reader(_text(file)), ()))


def expect_columns(path: str, names: Sequence[str]) -> None:
    """Refuse a table that lacks a column, or has it twice, before its every row becomes a dead letter."""
    found = columns(path)
    if found is None:
        return
    for name in names:
        if found.count(name) != 1:
            what = f"has the column {name!r} twice" if name in found else f"has no column {name!r}"
            raise FileError(f"{path}: {what}, it has {', '.join(found) or 'none'}")


def rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or Parquet file by column; a CSV's cells are strings, empty ones None."""
    if file_format(path) == "parquet":
        yield from _parquet_rows(path)
        return
    with _reading(path) as file:
        reader = csv.DictReader(_text(file))
        for row in reader:
            if None in row or None in row.values():
                raise FileError(f"{path}: line {reader.line_num} has not as many cells as the header has columns")
            yield {name: cell if cell != "" else None for name, cell in row.items()}


def lines(path: str) -> Iterator[list[bytes]]:
    """Lines without their ends, blank ones left out, a block for each read: of a pipe, what has come so far.

    While nothing comes from standard input, an empty block comes now and then.
    """
    with _reading(path) as file:
        rest, first = b"", True
        for chunk in _chunks(file, path):
            *whole, rest = (rest + chunk).split(b"\n")
            if first and whole:
                whole[0], first = whole[0].removeprefix(BOM), False
            yield [line for line in whole if line.strip()]
        rest = rest.removeprefix(BOM) if first else rest
        if rest.strip():
            yield [rest]


class Readings(NamedTuple):
    """One stream of a table, in the file's order."""

    x: np.ndarray[Any, np.dtype[np.float64]]  # [T, F]
    times: np.ndarray[Any, np.dtype[np.int64]] | None  # [T] ns since the epoch
    labels: np.ndarray[Any, np.dtype[np.bool_]] | None  # [T]


def load_streams(
    path: str, features: Sequence[str], *, key: str | None = None, time: str | None = None
) -> tuple[dict[str, np.ndarray[Any, np.dtype[np.float64]]], float | None]:
    """A table's streams by name, float64 [T, F] each in the file's order, and the usual time between two rows.

    An empty or null cell is NaN. Without `key` the file is one stream, named by its stem; without `time` the period
    is None. Raises `FileError` for a column that is absent or a cell that is no number.
    """
    found, period = load_readings(path, features, key=key, time=time)
    return {name: readings.x for name, readings in found.items()}, period


def load_readings(
    path: str, features: Sequence[str], *, key: str | None = None, time: str | None = None, label: str | None = None
) -> tuple[dict[str, Readings], float | None]:
    """What `load_streams` gives, with the times of the rows and what the column `label` says of them.

    A label is 0 or 1, or true or false; anything else is a `FileError`.
    """
    wanted = [*features, *([key] if key else []), *([time] if time else []), *([label] if label else [])]
    expect_columns(path, wanted)
    values: dict[str, list[list[float]]] = {}
    times: dict[str, list[int]] = {}
    labels: dict[str, list[bool]] = {}
    for number, row in enumerate(_table_rows(path), 1):
        name = stem(path) if key is None else str(row.get(key))
        try:
            numbers = [np.nan if row.get(f) is None else float(row[f]) for f in features]
        except (TypeError, ValueError):
            bad = next(f for f in features if not _is_number(row.get(f)))
            raise FileError(f"{path}: row {number}: {bad!r} is {row[bad]!r}, it must be a number") from None
        values.setdefault(name, []).append(numbers)
        if time is not None:
            when = parse_time(row[time] if isinstance(row.get(time), str | int | float) else str(row.get(time)))
            if when is None:
                raise FileError(f"{path}: row {number}: {time!r} is {row.get(time)!r}, neither ISO 8601 nor a number")
            times.setdefault(name, []).append(when)
        if label is not None:
            flag = LABELS.get(str(row.get(label)).lower())
            if flag is None:
                raise FileError(
                    f"{path}: row {number}: {label!r} is {row.get(label)!r}, it must be 0, 1, true or false"
                )
            labels.setdefault(name, []).append(flag)
    if not values:
        raise FileError(f"{path}: has no rows")
    steps = [np.diff(np.array(stamps)) for stamps in times.values() if len(stamps) > 1]
    period = float(np.median(np.concatenate(steps))) / 1e9 if steps else 0.0
    found = {
        name: Readings(
            np.array(numbers),
            np.array(times[name]) if name in times else None,
            np.array(labels[name]) if name in labels else None,
        )
        for name, numbers in values.items()
    }
    return found, period if period > 0 else None


def pyarrow(path: str) -> Any:
    """The library, which the base package does not bring; `path` is what wants it."""
    if importlib.util.find_spec("pyarrow") is None:
        raise FileError(f"{path}: Parquet needs pyarrow; install statestep[parquet]")
    import pyarrow.parquet

    return pyarrow


@contextmanager
def _reading(path: str) -> Iterator[IO[bytes]]:
    """A file open for reading, gunzipped, and whatever goes wrong with it as a `FileError`."""
    try:
        if path == "-":
            if sys.stdin is None:
                raise FileError("standard input is closed; name a file")
            yield sys.stdin.buffer
        else:
            with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
                yield file  # type: ignore[misc]  # GzipFile reads like any other
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: is not a text file in UTF-8: {error}") from None
    except csv.Error as error:
        raise FileError(f"{path}: is not CSV: {error}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _chunks(file: IO[bytes], path: str) -> Iterator[bytes]:
    """What can be read without waiting for more; nothing, now and then, while standard input is silent."""
    if path != "-":
        while chunk := file.read1(CHUNK_BYTES):  # type: ignore[attr-defined]  # a pipe may have a name, too
            yield chunk
        return
    while True:
        if not select.select([file], [], [], PIPE_SECONDS)[0]:
            yield b""
        elif chunk := os.read(file.fileno(), CHUNK_BYTES):
            yield chunk
        else:
            return


def _text(file: Iterable[bytes]) -> Iterator[str]:
    """A file's lines as text, the mark before the first left out."""
    for number, line in enumerate(file):
        yield line.decode("utf-8-sig" if number == 0 else "utf-8")


def _table_rows(path: str) -> Iterator[Mapping[str, Any]]:
    """The rows of any format, a JSONL line being an object."""
    if file_format(path) != "jsonl":
        yield from rows(path)
        return
    for number, line in enumerate(chain.from_iterable(lines(path)), 1):
        try:
            yield msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise FileError(f"{path}: line {number} is no JSON object: {error}") from None


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return cell is None
    return True


def _parquet(path: str) -> Any:
    library = pyarrow(path)
    try:
        return library.parquet.ParquetFile(path)
    except (OSError, library.ArrowException) as error:
        raise FileError(f"{path}: is not a readable Parquet file: {_first_line(error)}") from None


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    """Nanoseconds are cut to microseconds, which is what Python's own times hold."""
    library = pyarrow(path)
    try:
        for batch in _parquet(path).iter_batches():
            table = library.Table.from_batches([batch])
            for place, field in enumerate(table.schema):
                if library.types.is_timestamp(field.type) and field.type.unit == "ns":
                    micro = table.column(place).cast(library.timestamp("us", field.type.tz), safe=False)
                    table = table.set_column(place, field.name, micro)
            yield from table.to_pylist()
    except (OSError, library.ArrowException) as error:
        raise FileError(f"{path}: is not a readable Parquet file: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
