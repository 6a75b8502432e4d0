"""Files as sources and sinks: history goes through the very service that runs behind Kafka.

A file is one partition whose offsets are row numbers. A row of a CSV or Parquet file becomes the JSON object that
a producer would have sent; a line of a JSONL file is taken as it is. `-` is standard input or output.

With a `Store`, what is written counts exactly once: outputs are on the disk first, then states, offset and the
outputs' lengths become durable together, and the next start cuts the outputs to these lengths.
"""

from __future__ import annotations

import csv
import gzip
import os
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from statestep.consumers import file_progress
from statestep.consumers.events import Event
from statestep.consumers.ports import BrokerError, Change, Committed, Identity, Message, Polled, Record, Transaction
from statestep.consumers.store import Store
from statestep.consumers.tables import FileError, file_format, lines, pyarrow, rows, stem

BLOCK_ROWS = 1024


class FileSource:
    """One file, read from any row on."""

    def __init__(self, path: str, *, text_columns: Sequence[str] = (), store: Store | None = None):
        """Its records' key is the file's stem; `text_columns` are never taken for numbers.

        With a `store` it is read on from where that says. Raises `FileError` where it is not the same file any more.
        """
        self._path = path
        self._key = stem(path).encode()
        self._text_columns = frozenset(text_columns)
        self._store = store
        self._origin = None if store is None else file_progress.same_input(store, path)
        self._blocks = self._read(0)
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
        """The next rows. Of standard input, what has come so far, or nothing after `tables.PIPE_SECONDS`."""
        if not self._joined:
            self._joined = True
            return Polled([Change("assigned", (0,))], [], ())
        if not self._sought:
            return Polled([], [], ())
        if not self._waiting:
            block = next(self._blocks, None)
            self._ended = block is None
            self._waiting = block or []
        values, self._waiting = self._waiting[:max_records], self._waiting[max_records:]
        first, self._next = self._next, self._next + len(values)
        return Polled([], [Record(0, first + i, -1, self._key, value) for i, value in enumerate(values)], ())

    def identity(self) -> Identity:
        """A file is known by its beginning."""
        if self._origin is None:
            self._origin = file_progress.origin(self._path)
        return Identity(self._origin.sha256, 1, is_log=True)

    def committed(self, partition: int) -> Committed | None:
        """What the store says; without one a file is read from its beginning."""
        return None if self._store is None else file_progress.committed(self._store, partition)

    def bounds(self, partition: int) -> tuple[int, int]:
        """The first row, and as far as is known by now: the end is not, before it is reached."""
        committed = self.committed(partition)
        return 0, self._next if committed is None else max(self._next, committed.offset)

    def offset_at(self, partition: int, time_ms: int) -> int:
        """Rows have no time of their own here."""
        raise FileError(f"{self._path}: a file is read from its beginning, a start time has no meaning for it")

    def seek(self, partition: int, offset: int) -> None:
        """Go on at a row; what comes by a pipe cannot be read again."""
        if offset != self._next:
            if not self.identity().topic_id:
                raise FileError(f"{self._path}: cannot go to row {offset}, a pipe is read once and in order")
            self._blocks.close()
            self._blocks, self._waiting, self._ended = self._read(offset), [], False
            self._next = offset
        self._sought = True

    def pause(self, partition: int) -> None:
        """Give nothing until the next `seek`."""
        self._sought = False

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

    def _read(self, offset: int) -> Generator[list[bytes]]:
        """The values from a row on, in blocks."""
        left = offset
        if file_format(self._path) == "jsonl":
            for block in lines(self._path):
                skipped = min(left, len(block))
                left -= skipped
                if not left:
                    yield block[skipped:]
        else:
            encode = msgspec.json.Encoder(enc_hook=str).encode  # dates of a Parquet file as text
            table = rows(self._path)
            left -= sum(1 for _ in islice(table, offset))
            while found := list(islice(table, BLOCK_ROWS)):
                yield [
                    encode({name: _cell(cell, name in self._text_columns) for name, cell in row.items()})
                    for row in found
                ]
        if left:
            raise FileError(f"{self._path}: has {offset - left} rows, {offset} were read of it before")


class FileSink:
    """Outputs to one file, dead letters as JSONL to another that is made when there is one, events to a third."""

    def __init__(self, path: str, dead_letters: str, store: Store | None = None, events: str | None = None):
        """With a `store`, what they hold is exactly what it says. Raises `FileError` where that cannot be.

        `events` is a JSONL file; without it none are written.
        """
        self._path, self._dead_path, self._events_path = path, dead_letters, events
        self._kind = file_format(path)
        if self._kind == "parquet":
            pyarrow(path)
        if events is not None and file_format(events) != "jsonl":
            raise FileError(f"{events}: events are written as JSON lines, end its name in .jsonl")
        self._store = store
        self._dead: IO[bytes] | None = None
        self._events: IO[bytes] | None = None
        self._table: Any = None  # a CSV file's columns or a Parquet file's writer, once they are known
        if store is not None:
            self._go_back(store)
            return
        self._out = _create(path)
        try:
            self._events = None if events is None else _create(events)
        except BaseException:
            self._let_go()
            raise

    @property
    def keeps_states(self) -> bool:
        """Whether there is a store."""
        return self._store is not None

    def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        """Write the messages, then what is to be kept. Raises `BrokerError` or `StoreError`, and nothing counts."""
        self._send(transaction.messages)
        for path, file in self._files():
            with _writing(path):
                file.flush()
                if self._store is not None:
                    os.fsync(file.fileno())
        if self._store is None:
            return {}
        written = file_progress.Outputs(
            str(Path(self._path).resolve()),
            self._out.tell(),
            str(Path(self._dead_path).resolve()),
            0 if self._dead is None else self._dead.tell(),
            self._table,
            None if self._events_path is None else str(Path(self._events_path).resolve()),
            0 if self._events is None else self._events.tell(),
        )
        counts = Counter(state.partition for state in transaction.states)
        positions = {partition: (self._store.position(partition) or 0) + n for partition, n in counts.items()}
        self._store.apply(transaction.states, positions, file_progress.notes(transaction.offsets, written))
        return positions

    def recover(self) -> None:
        """Cut off what a failed commit has written; without a store there is no way back."""
        if self._store is not None:
            self._let_go()
            self._go_back(self._store)

    def close(self) -> None:
        """Finish the files."""
        if self._kind == "parquet" and self._table is not None:
            with _writing(self._path):
                self._table.close()
        for path, file in self._files():
            with _writing(path):
                file.close()

    def _files(self) -> list[tuple[str, IO[bytes]]]:
        """The files that are open, by their paths."""
        found = ((self._path, self._out), (self._dead_path, self._dead), (self._events_path, self._events))
        return [(path, file) for path, file in found if path is not None and file is not None]

    def _go_back(self, store: Store) -> None:
        """Open the files as they were committed last."""
        kept = file_progress.outputs(store, self._path, self._dead_path, self._events_path)
        self._table = kept.columns
        self._out = file_progress.reopen(self._path, kept.length)
        self._dead = self._events = None
        try:
            if kept.dead_length or Path(self._dead_path).exists():
                self._dead = file_progress.reopen(self._dead_path, kept.dead_length)
            if self._events_path is not None:
                self._events = file_progress.reopen(self._events_path, kept.events_length)
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        """Close the files whatever they still hold back."""
        for _, file in self._files():
            with suppress(OSError):
                file.close()

    def _send(self, messages: Sequence[Message]) -> None:
        """Write messages to the files' buffers."""
        outputs = [m.value for m in messages if not (m.dead or m.event) and m.value is not None]
        with _writing(self._path):
            self._write(outputs)
        events = [m.value for m in messages if m.event and m.value is not None]
        if events:
            assert self._events is not None and self._events_path is not None, "nobody asked for events"
            with _writing(self._events_path):
                self._events.write(b"".join(event + b"\n" for event in events))
        dead = [message for message in messages if message.dead]
        with _writing(self._dead_path):
            if dead and self._dead is None:
                self._dead = (
                    _create(self._dead_path) if self._store is None else file_progress.reopen(self._dead_path, 0)
                )
            for message in dead:
                assert self._dead is not None
                self._dead.write(_dead_line(message))

    def _write(self, outputs: Sequence[bytes]) -> None:
        if not outputs:
            return
        if self._kind == "jsonl":
            self._out.write(b"".join(output + b"\n" for output in outputs))
            return
        flat = [flatten(msgspec.json.decode(output)) for output in outputs]
        if self._kind == "csv":
            self._out.write(self._csv(flat).encode())
            return
        library = pyarrow(self._path)
        batch = library.Table.from_pylist(flat, schema=self._table.schema if self._table else None)
        if self._table is None:
            self._table = library.parquet.ParquetWriter(self._out, _schema(library, batch.schema))
        self._table.write_table(batch.cast(self._table.schema))

    def _csv(self, flat: list[dict[str, Any]]) -> str:
        """Rows as text; the first ones give the columns, and bring the header."""
        text = StringIO()
        first, columns = self._table is None, self._table or list(flat[0])
        self._table = columns
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        if first:
            writer.writeheader()
        writer.writerows(flat)
        return text.getvalue()


def flatten(output: Mapping[str, Any]) -> dict[str, Any]:
    """An output document as one row of a table: `prediction.flow`, `flags` joined by spaces, the model by its hash.

    Of a model that tells its status every row has the columns of an event, filled or not: the first rows of a table say
    which columns there are. Of `why` the features' names remain, the loudest first.

    >>> flatten({"step": 1, "prediction": {"flow": 2.5}, "flags": ["gap"], "model": {"sha256": "ab"}, "source": {}})
    {'step': 1, 'prediction.flow': 2.5, 'flags': 'gap', 'model': 'ab'}
    """
    if output.get("status") is not None:
        output = {**output, "event": output.get("event") or dict.fromkeys(Event.__struct_fields__)}
        output["why"] = output.get("why", ())
    row: dict[str, Any] = {}
    for name, value in output.items():
        if name == "model":
            row[name] = value["sha256"]
        elif name == "flags":
            row[name] = " ".join(value)
        elif name == "why":
            row[name] = " ".join(part["feature"] for part in value)
        elif name == "source":
            row |= {f"source.{part}": item for part, item in value.items()}
        elif isinstance(value, dict):
            row |= {f"{name}.{feature}": number for feature, number in value.items()}
        elif name == "expected" and value is None:
            row |= {f"expected.{feature}": None for feature in output["prediction"] or ()}
        else:
            row[name] = value
    return row


def _schema(library: Any, schema: Any) -> Any:
    """The first batch's schema; a column that had only nulls so far holds numbers, unless its name says texts."""
    types = dict.fromkeys(("ts", "event.id", "event.phase", "event.since", "event.level"), library.string())
    fields = [f.with_type(types.get(f.name, library.float64())) if library.types.is_null(f.type) else f for f in schema]
    return library.schema(fields)


def _cell(cell: Any, is_text: bool) -> Any:
    """A cell as a number where it is one; the rest stays text, for the codec to refuse or take."""
    if is_text or not isinstance(cell, str | float | Decimal) or (isinstance(cell, str) and "_" in cell):
        return cell
    try:
        number = float(cell)
    except ValueError:
        return cell
    if isinstance(cell, float) and number != number:
        return None  # which is how Parquet files of pandas say that nothing is there
    return number if abs(number) < float("inf") else str(cell)  # JSON has no NaN: as text it is refused by name


def _create(path: str) -> IO[bytes]:
    try:
        if path == "-":
            return os.fdopen(os.dup(1), "wb")  # sys.stdout may be unbuffered, and a write to it incomplete
        return gzip.open(path, "wb") if path.endswith(".gz") else Path(path).open("wb")  # type: ignore[return-value]
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def _writing(path: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # whoever read has gone, as `head` does
        raise BrokerError(f"{path}: nobody reads it any more") from None
    except OSError as error:
        raise BrokerError(f"{path}: cannot be written: {error.strerror}") from None


def _dead_line(message: Message) -> bytes:
    headers = {name: value.decode("utf-8", "backslashreplace") for name, value in message.headers}
    value = None if message.value is None else message.value.decode("utf-8", "backslashreplace")
    return msgspec.json.encode({"value": value, "headers": headers}) + b"\n"
