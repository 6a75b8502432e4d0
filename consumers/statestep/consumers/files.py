"""Files as sources and sinks: history goes through the very service that runs behind Kafka.

A file is one partition whose offsets are row numbers. A row of a CSV or Parquet file becomes the JSON object that
a producer would have sent; a line of a JSONL file is taken as it is. `-` is standard input or output.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from statestep.consumers.ports import BrokerError, Change, Committed, Message, Polled, Record
from statestep.consumers.times import parse_time

FORMATS = ("csv", "jsonl", "parquet")
SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
CHUNK_BYTES = 1 << 20
BLOCK_ROWS = 1024


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
    with _open(path) as file:
        return tuple(next(csv.reader(_text(file, path)), ()))


def rows(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV or Parquet file by column; a CSV's cells are strings, empty ones None."""
    if file_format(path) == "parquet":
        for batch in _parquet(path).iter_batches():
            yield from batch.to_pylist()
        return
    with _open(path) as file:
        reader = csv.DictReader(_text(file, path))
        for row in reader:
            if None in row or None in row.values():
                raise FileError(f"{path}: line {reader.line_num} has not as many cells as the header has columns")
            yield {name: cell if cell != "" else None for name, cell in row.items()}


def load_streams(
    path: str, features: Sequence[str], *, key: str | None = None, time: str | None = None
) -> tuple[dict[str, np.ndarray[Any, np.dtype[np.float64]]], float | None]:
    """A table's streams by name, float64 [T, F] each in the file's order, and the usual time between two rows.

    An empty or null cell is NaN. Without `key` the file is one stream, named by its stem; without `time` the period
    is None. Raises `FileError` for a column that is absent or a cell that is no number.
    """
    wanted = [*features, *([key] if key else []), *([time] if time else [])]
    expect_columns(path, wanted)
    values: dict[str, list[list[float]]] = {}
    times: dict[str, list[int]] = {}
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
    if not values:
        raise FileError(f"{path}: has no rows")
    steps = [np.diff(np.array(stamps)) for stamps in times.values() if len(stamps) > 1]
    period = float(np.median(np.concatenate(steps))) / 1e9 if steps else 0.0
    return {name: np.array(numbers) for name, numbers in values.items()}, period if period > 0 else None


def expect_columns(path: str, names: Sequence[str]) -> None:
    """Refuse a table that lacks a column, before its every row becomes a dead letter."""
    found = columns(path)
    missing = [name for name in names if found is not None and name not in found]
    if found is not None and missing:
        raise FileError(f"{path}: has no column {missing[0]!r}, it has {', '.join(found) or 'none'}")


class FileSource:
    """One file, read once from its beginning."""

    def __init__(self, path: str, *, key: bytes | None = None, text_columns: Sequence[str] = ()):
        """`key` names the one stream (None where a field does); `text_columns` are never taken for numbers."""
        self._path = path
        self._key = stem(path).encode() if key is None else key
        self._blocks = self._read(frozenset(text_columns))
        self._waiting: list[bytes] = []
        self._next = 0
        self._joined = self._sought = self._ended = False

    @property
    def topic(self) -> str:
        """The file's path."""
        return self._path

    @property
    def partitions(self) -> int:
        """One: a file."""
        return 1

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        """The next rows; a pipe is waited for, and gives what has come so far."""
        if not self._joined:
            self._joined = True
            return Polled([Change("assigned", (0,))], [])
        if not self._sought:
            return Polled([], [])
        if not self._waiting:
            block = next(self._blocks, None)
            self._ended = block is None
            self._waiting = block or []
        values, self._waiting = self._waiting[:max_records], self._waiting[max_records:]
        first, self._next = self._next, self._next + len(values)
        return Polled([], [Record(0, first + i, -1, self._key, value) for i, value in enumerate(values)])

    def committed(self, partition: int) -> Committed | None:
        """None: a file is always read from its beginning."""
        return None

    def bounds(self, partition: int) -> tuple[int, int]:
        """The first row; the end is not known before it is reached."""
        return 0, self._next

    def offset_at(self, partition: int, time_ms: int) -> int:
        """Rows have no time of their own here."""
        raise FileError(f"{self._path}: a file is read from its beginning, a start time has no meaning for it")

    def seek(self, partition: int, offset: int) -> None:
        """Begin; a file cannot be read at another place."""
        if offset != self._next:
            raise FileError(f"{self._path}: cannot go to row {offset}, a file is read once and in order")
        self._sought = True

    def commit(self, offsets: Mapping[int, Committed]) -> None:
        """Nothing is kept: the run ends with the file."""

    def high_watermarks(self) -> Mapping[int, int]:
        """Unknown until the end."""
        return {}

    @property
    def exhausted(self) -> bool:
        """Whether the last row was given."""
        return self._ended

    def close(self) -> None:
        """Let go of the file."""
        self._blocks.close()

    def _read(self, text_columns: frozenset[str]) -> Generator[list[bytes]]:
        if file_format(self._path) == "jsonl":
            yield from _lines(self._path)
            return
        encode = msgspec.json.Encoder(enc_hook=str).encode  # dates of a Parquet file as text
        table = rows(self._path)
        while block := list(islice(table, BLOCK_ROWS)):
            yield [encode({name: _cell(cell, name in text_columns) for name, cell in row.items()}) for row in block]


class FileSink:
    """Outputs to one file, dead letters as JSONL to another that is made when there is one."""

    def __init__(self, path: str, dead_letters: str):
        self._path, self._dead_path = path, dead_letters
        self._kind = file_format(path)
        if self._kind == "parquet":
            _pyarrow(path)
        self._out = _create(path)
        self._dead: IO[bytes] | None = None
        self._table: Any = None  # the writer of a CSV or Parquet file, once the columns are known

    def send(self, messages: Sequence[Message]) -> None:
        """Write messages to the files' buffers."""
        try:
            outputs = [message for message in messages if not message.dead and message.value is not None]
            self._write(outputs)
            for message in messages:
                if message.dead:
                    self._dead = self._dead or _create(self._dead_path)
                    self._dead.write(_dead_line(message))
        except OSError as error:
            raise BrokerError(f"{self._path}: cannot be written: {error.strerror}") from None

    def flush(self) -> None:
        """Hand everything to the operating system."""
        try:
            self._out.flush()
            if self._dead is not None:
                self._dead.flush()
        except OSError as error:
            raise BrokerError(f"{self._path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Finish the files."""
        if self._kind == "parquet" and self._table is not None:
            self._table.close()
        for file in (self._out, self._dead):
            if file is not None and file is not sys.stdout.buffer:
                file.close()

    def _write(self, outputs: Sequence[Message]) -> None:
        if self._kind == "jsonl":
            self._out.write(b"".join(message.value + b"\n" for message in outputs if message.value is not None))
            return
        flat = [flatten(msgspec.json.decode(message.value)) for message in outputs if message.value is not None]
        if not flat:
            return
        if self._kind == "csv":
            lines = _Lines()
            table = csv.DictWriter(lines, list(flat[0]), extrasaction="ignore", lineterminator="\n")
            if self._table is None:
                self._table = table
                table.writeheader()
            table.writerows(flat)
            self._out.write("".join(lines.written).encode())
            return
        pyarrow = _pyarrow(self._path)
        batch = pyarrow.Table.from_pylist(flat, schema=self._table.schema if self._table else None)
        if self._table is None:
            self._table = pyarrow.parquet.ParquetWriter(self._out, _nullable(pyarrow, batch.schema))
        self._table.write_table(batch.cast(self._table.schema))


def flatten(output: Mapping[str, Any]) -> dict[str, Any]:
    """An output document as one row of a table: `prediction.flow`, `flags` joined by spaces, the model by its hash.

    >>> flatten({"step": 1, "prediction": {"flow": 2.5}, "flags": ["gap"], "model": {"sha256": "ab"}, "source": {}})
    {'step': 1, 'prediction.flow': 2.5, 'flags': 'gap', 'model': 'ab'}
    """
    row: dict[str, Any] = {}
    for name, value in output.items():
        if name == "model":
            row[name] = value["sha256"]
        elif name == "flags":
            row[name] = " ".join(value)
        elif name == "source":
            row |= {f"source.{part}": item for part, item in value.items()}
        elif isinstance(value, dict):
            row |= {f"{name}.{feature}": number for feature, number in value.items()}
        elif name == "expected" and value is None:
            row |= {f"expected.{feature}": None for feature in output["prediction"] or ()}
        else:
            row[name] = value
    return row


def _table_rows(path: str) -> Iterator[Mapping[str, Any]]:
    """The rows of any format, a JSONL line being an object."""
    if file_format(path) != "jsonl":
        yield from rows(path)
        return
    for number, line in enumerate(chain.from_iterable(_lines(path)), 1):
        try:
            yield msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise FileError(f"{path}: line {number} is no JSON object: {error}") from None


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return cell is None
    return True


class _Lines:
    """Where csv writes, so that the bytes go out in one piece."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, line: str) -> int:
        self.written.append(line)
        return len(line)


def _nullable(pyarrow: Any, schema: Any) -> Any:
    """The first batch's schema, with a number where a column had only nulls so far."""
    fields = [f.with_type(pyarrow.float64()) if pyarrow.types.is_null(f.type) else f for f in schema]
    return pyarrow.schema(fields)


def _cell(cell: Any, is_text: bool) -> Any:
    """A CSV cell as a number where it is one; the rest stays text, for the codec to refuse or take."""
    if is_text or not isinstance(cell, str):
        return cell
    try:
        number = float(cell)
    except ValueError:
        return cell
    return number if abs(number) < float("inf") else cell  # JSON has no NaN: as text it is refused by name


def _lines(path: str) -> Iterator[list[bytes]]:
    """Lines without their ends, blank ones left out, a block for each read: of a pipe, what has come so far."""
    with _open(path) as file:
        rest = b""
        while chunk := (os.read(file.fileno(), CHUNK_BYTES) if path == "-" else file.read(CHUNK_BYTES)):
            *whole, rest = (rest + chunk).split(b"\n")
            yield [line for line in whole if line.strip()]
        if rest.strip():
            yield [rest]


def _open(path: str) -> IO[bytes]:
    if path == "-":
        return sys.stdin.buffer
    try:
        return gzip.open(path) if path.endswith(".gz") else Path(path).open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from None


def _create(path: str) -> IO[bytes]:
    if path == "-":
        return sys.stdout.buffer
    try:
        return Path(path).open("wb")
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}") from None


def _text(file: IO[bytes], path: str) -> Iterator[str]:
    """A file's lines as text, without the mark that some programs put before UTF-8."""
    try:
        for number, line in enumerate(file):
            yield line.decode("utf-8-sig" if number == 0 else "utf-8")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise FileError(f"{path}: is not a text file in UTF-8: {error}") from None


def _dead_line(message: Message) -> bytes:
    headers = {name: value.decode("utf-8", "backslashreplace") for name, value in message.headers}
    value = None if message.value is None else message.value.decode("utf-8", "backslashreplace")
    return msgspec.json.encode({"value": value, "headers": headers}) + b"\n"


def _pyarrow(path: str) -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        raise FileError(f"{path}: Parquet needs pyarrow; install statestep[parquet]")
    import pyarrow.parquet

    return pyarrow


def _parquet(path: str) -> Any:
    pyarrow = _pyarrow(path)
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise FileError(f"{path}: is not a readable Parquet file: {error}") from None
