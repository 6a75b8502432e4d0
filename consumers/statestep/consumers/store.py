"""The local store: committed states in one SQLite file, for quick restarts, for spilling, or as all that there is.

Behind Kafka it mirrors the committed changelog and nothing else. Of files it is the changelog itself: states,
offsets and the outputs' lengths count in one transaction. It is trusted only as far as it proves itself: SQLite
checks its pages when it is opened, each note carries a checksum, and each state's own is checked by whoever decodes
it. Whatever is wrong with it is a `StoreError`; behind Kafka it is then dropped, for the changelog has it all.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from typing import Literal

import msgspec

from statestep.consumers.changelog import MARKER
from statestep.consumers.config import ConfigError
from statestep.consumers.ports import StateRecord
from statestep.consumers.tables import FileError

Reason = Literal["corrupt", "foreign", "version", "unwritable", "full", "gone"]

NAME = "state.db"
APPLICATION = 0x73746570  # "step", in the file's header
FORMAT = 1  # of the tables; the file of another is not read
PAGE_BYTES = 4096  # what a state that changes alone costs to write
CACHE_KIB = 32 * 1024
WAL_BYTES = 32 << 20  # a write-ahead log that is longer is moved into the database
USABLE_SECONDS = 12 * 3600  # half of the time that Kafka keeps a tombstone for (delete.retention.ms)
NEWS_SECONDS = 60  # that nothing has happened is written no more often
CLOCK_SECONDS = 3600  # a clock may have been set back by this much
MAKE_NOTES = "CREATE TABLE notes (name BLOB PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID"
MAKE_STATES = "CREATE TABLE states_{} (id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, value BLOB NOT NULL)"
REASONS: dict[int, Reason] = {  # by SQLite's result code; any other says that the file is not as it was made
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_READONLY: "unwritable",
    sqlite3.SQLITE_CANTOPEN: "unwritable",
    sqlite3.SQLITE_IOERR: "unwritable",
}


class StoreError(FileError):
    """The local store cannot be used: one sentence, and the `reason` in a word, for a metric."""

    def __init__(self, sentence: str, reason: Reason):
        super().__init__(sentence)
        self.reason: Reason = reason


class Mirrored(msgspec.Struct, frozen=True):
    """What is noted of a partition."""

    position: int  # in the changelog, after the last record that is here
    marker: bytes | None
    written_at_s: float  # seconds since the epoch


class Store:
    """The open store of one directory. Made by `open`; any method may raise `StoreError`, after which it is lost."""

    def __init__(self, directory: Path, lock: int, connection: sqlite3.Connection, clock: Callable[[], float]):
        """For `open` alone."""
        self._clock = clock
        self._path = directory / NAME
        self._wal = directory / f"{NAME}-wal"
        self._lock, self._connection = lock, connection
        self._notes: dict[bytes, bytes] = {}
        self._partitions: dict[int, Mirrored] = {}
        self._tables: set[int] = set()
        self._last: dict[int, tuple[bytes, int]] = {}  # by partition: the last row that was loaded

    @classmethod
    def open(
        cls, directory: str | Path, identity: str, *, durable: bool = False, clock: Callable[[], float] = time.time
    ) -> Store:
        """Open the store of a directory, or make it there. `identity` says what its states are of.

        A killed process loses nothing either way; a power cut may take the last transactions, whole, unless they are
        `durable`. `clock` tells seconds since the epoch. Raises `StoreError`, and `ConfigError` while another process
        has the directory.
        """
        directory = Path(directory)
        lock = _locked(directory)
        try:
            with _told(directory / NAME):
                connection = sqlite3.connect(
                    directory / NAME, isolation_level=None, check_same_thread=False, timeout=0, cached_statements=512
                )
        except BaseException:
            os.close(lock)
            raise
        store = cls(directory, lock, connection, clock)
        try:
            with _told(store._path):
                store._begin(identity, durable)
        except BaseException:
            store.close()
            raise
        return store

    @staticmethod
    def discard(directory: str | Path) -> None:
        """Remove the store of a directory, whatever is wrong with it. Raises as `open` does."""
        lock = _locked(Path(directory))
        try:
            for name in (f"{NAME}-wal", f"{NAME}-shm", NAME):  # a log without its database means nothing
                (Path(directory) / name).unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(f"{directory}: cannot be emptied: {error.strerror}", "unwritable") from None
        finally:
            os.close(lock)

    def position(self, partition: int) -> int | None:
        """Where the changelog goes on after what is here; None where nothing is. Then `forget` before filling it."""
        found = self._partitions.get(partition)
        return None if found is None else found.position

    def marker(self, partition: int) -> bytes | None:
        """The value of the partition's last marker."""
        found = self._partitions.get(partition)
        return None if found is None else found.marker

    def usable(self, partition: int) -> bool:
        """Whether the partition can be read on from its position: compaction may since have removed tombstones.

        A process that follows an idle partition says so by `apply([], {partition: position})` now and then.
        """
        found = self._partitions.get(partition)
        return found is not None and -CLOCK_SECONDS <= self._clock() - found.written_at_s <= USABLE_SECONDS

    def note(self, name: str) -> bytes | None:
        """A note of the caller's own, as `apply` wrote it."""
        return self._notes.get(b"note " + name.encode())

    def apply(
        self,
        records: Sequence[StateRecord],
        positions: Mapping[int, int],
        notes: Mapping[str, bytes] | None = None,
    ) -> None:
        """Take over committed records, in order, with each partition's changelog position after them: all or nothing.

        `positions` has every partition of the records. Notes of the caller's own may count with them.
        """
        rows: dict[int, dict[bytes, bytes | None]] = {partition: {} for partition in positions}
        for partition, key, value, _ in records:
            rows[partition][key] = value  # the last one counts
        mirrored, now_s = {}, self._clock()
        for partition, position in positions.items():
            marker = rows[partition].pop(MARKER, self.marker(partition))
            before = self._partitions.get(partition)
            said = before is not None and abs(now_s - before.written_at_s) <= NEWS_SECONDS
            if rows[partition] or not said or (position, marker) != (self.position(partition), self.marker(partition)):
                mirrored[partition] = Mirrored(position, marker, now_s)
        sealed = {b"note " + name.encode(): value for name, value in (notes or {}).items()}
        if not (mirrored or sealed):
            return
        encoded = {b"partition %d" % p: msgspec.json.encode(noted) for p, noted in mirrored.items()}
        missing = {partition for partition, found in rows.items() if found} - self._tables
        with self._transaction():
            for partition in missing:
                self._connection.execute(MAKE_STATES.format(partition))
            for partition, found in rows.items():
                self._write_rows(partition, found)
            self._write_notes(sealed | encoded)
        self._tables |= missing
        self._partitions |= mirrored
        self._notes |= sealed
        self._shorten_wal()

    def load(self, partition: int, after: bytes | None, max_records: int) -> list[StateRecord]:
        """The next states of a partition, without its marker, in an order that stays; none at the end.

        `after` is the last key of the block before. Records that are applied meanwhile may or may not be among them.
        """
        if partition not in self._tables:
            return []
        table, (key, last) = f"states_{partition}", self._last.get(partition, (None, 0))
        with _told(self._path):
            if after is None:
                last = 0
            elif after != key:
                found = self._connection.execute(f"SELECT id FROM {table} WHERE key = ?", (after,)).fetchone()
                if found is None:
                    raise ValueError(f"{after!r} was no key of the block before")
                last = found[0]
            rows = self._connection.execute(
                f"SELECT id, key, value FROM {table} WHERE id > ? ORDER BY id LIMIT ?", (last, max_records)
            ).fetchall()
        if not rows:
            return []
        self._last[partition] = rows[-1][1], rows[-1][0]
        _, keys, values = zip(*rows, strict=True)
        self._expect_bytes(partition, keys + values)
        return list(map(StateRecord._make, zip(repeat(partition), keys, values, repeat(-1), strict=False)))

    def fetch(self, partition: int, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that are here."""
        found: dict[bytes, bytes] = {}
        if partition not in self._tables:
            return found
        with _told(self._path):
            execute = self._connection.execute
            for key in keys:
                row = execute(f"SELECT value FROM states_{partition} WHERE key = ?", (key,)).fetchone()
                if row is not None:
                    found[key] = row[0]
        self._expect_bytes(partition, found.values())
        return found

    def count(self, partition: int) -> int:
        """How many states of a partition are here. Takes about 10 ms a million."""
        if partition not in self._tables:
            return 0
        with _told(self._path):
            (count,) = self._connection.execute(f"SELECT count(*) FROM states_{partition}").fetchone()
        return int(count)

    def forget(self, partition: int) -> None:
        """Drop all that is here of a partition."""
        with self._transaction():
            if partition in self._tables:
                self._connection.execute(f"DROP TABLE states_{partition}")
            self._connection.execute("DELETE FROM notes WHERE name = ?", (b"partition %d" % partition,))
        self._tables.discard(partition)
        self._partitions.pop(partition, None)
        self._last.pop(partition, None)

    def close(self) -> None:
        """Let go of the directory. Whatever was applied is there."""
        if self._lock >= 0:
            with suppress(sqlite3.Error):  # moving the log into the database may fail; the log stays, then
                self._connection.close()
            os.close(self._lock)
            self._lock = -1

    def _begin(self, identity: str, durable: bool) -> None:
        """Check all that can be checked, or make the tables."""
        connection = self._connection
        if self._path.is_file() and 0 < self._path.stat().st_size < PAGE_BYTES:  # SQLite would take it for a new one
            raise StoreError(f"{self._path}: is damaged", "corrupt")
        connection.text_factory = bytes  # a damaged type must not be decoded
        connection.executescript(  # one process, so no shared memory; the log is shortened by hand, see below
            f"PRAGMA page_size = {PAGE_BYTES}; PRAGMA cache_size = -{CACHE_KIB}; PRAGMA trusted_schema = OFF;"
            "PRAGMA cell_size_check = ON; PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL;"
            f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}; PRAGMA wal_autocheckpoint = 0;"
        )
        application, version, made = (
            connection.execute(query).fetchone()[0]
            for query in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if (application, version, made) == (0, 0, 0):
            with self._transaction():
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
                connection.execute(MAKE_NOTES)
                self._write_notes({b"identity": identity.encode()})
            sync_names(self._path.parent)
        elif application != APPLICATION:
            raise StoreError(f"{self._path}: is a database of another program", "foreign")
        elif version != FORMAT:
            raise StoreError(f"{self._path}: has format {version}, this release reads {FORMAT}", "version")
        if connection.execute("PRAGMA integrity_check(1)").fetchall() != [(b"ok",)]:
            raise StoreError(f"{self._path}: is damaged", "corrupt")
        self._inode = self._path.stat().st_ino
        self._read_schema()
        self._read_notes(identity)
        with self._transaction():  # or it would be found to be read-only in the middle of the work
            pass
        # Frames of the log that the database has already would, were the log damaged, bring back old pages beside
        # new ones. So the log never keeps any.
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _expect_bytes(self, partition: int, cells: Iterable[object]) -> None:
        """SQLite lets a column hold anything, so a damaged cell may have become a number."""
        if not set(map(type, cells)) <= {bytes}:
            raise StoreError(f"{self._path}: partition {partition} holds what is no state", "corrupt")

    def _read_schema(self) -> None:
        for kind, name, sql in self._connection.execute("SELECT type, name, CAST(sql AS BLOB) FROM sqlite_master"):
            matched = re.fullmatch(rb"states_(\d+)", name)
            if matched:
                self._tables.add(int(matched[1]))
            made = MAKE_STATES.format(int(matched[1])) if matched else MAKE_NOTES if name == b"notes" else None
            if (kind, sql) != ((b"index", None) if made is None else (b"table", made.encode())):
                raise StoreError(f"{self._path}: its tables are not as they were made", "corrupt")

    def _read_notes(self, identity: str) -> None:
        for name, value in self._connection.execute("SELECT CAST(name AS BLOB), CAST(value AS BLOB) FROM notes"):
            body, seal = value[:-4], value[-4:]
            if _seal(name, body) != seal:
                raise StoreError(f"{self._path}: a note in it is damaged", "corrupt")
            if name.startswith(b"partition "):
                self._partitions[int(name[10:])] = msgspec.json.decode(body, type=Mirrored)
            else:
                self._notes[name] = body
        if not self._tables <= self._partitions.keys():
            raise StoreError(f"{self._path}: a note is missing in it", "corrupt")
        if self._notes.get(b"identity") != identity.encode():
            theirs = self._notes.get(b"identity", b"nobody").decode()
            raise StoreError(f"{self._path}: belongs to {theirs}, not to {identity}", "foreign")

    def _write_rows(self, partition: int, rows: Mapping[bytes, bytes | None]) -> None:
        table = f"states_{partition}"
        put = [(key, value) for key, value in rows.items() if value is not None]
        if put:
            self._connection.executemany(
                f"INSERT INTO {table}(key, value) VALUES(?, ?) ON CONFLICT(key) DO UPDATE SET value = excluded.value",
                put,
            )
        if len(put) < len(rows):
            gone = [(key,) for key, value in rows.items() if value is None]
            self._connection.executemany(f"DELETE FROM {table} WHERE key = ?", gone)

    def _write_notes(self, notes: Mapping[bytes, bytes]) -> None:
        sealed = [(name, body + _seal(name, body)) for name, body in notes.items()]
        self._connection.executemany("INSERT OR REPLACE INTO notes(name, value) VALUES(?, ?)", sealed)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All that is executed inside, or nothing."""
        with _told(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    with suppress(sqlite3.Error):
                        self._connection.execute("ROLLBACK")
                raise

    def _shorten_wal(self) -> None:
        """Move a long log into the database; notice when either was deleted while it was open."""
        try:
            gone = self._path.stat().st_ino != self._inode
            length = self._wal.stat().st_size
        except OSError:
            gone, length = True, 0
        if gone:
            raise StoreError(f"{self._path}: was deleted while it was in use", "gone")
        if length > WAL_BYTES:
            with _told(self._path):
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _locked(directory: Path) -> int:
    """Take the directory for this process; gives the open lock file, which ends with the process, however it ends."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(f"{directory}: no store can be kept here: {error.strerror}", "unwritable") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise ConfigError(
                f"--state-dir is {str(directory)!r}: another process uses it; give each a directory of its own"
            ) from None
        raise StoreError(f"{directory}: cannot be locked: {error.strerror}", "unwritable") from None
    return lock


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What SQLite cannot do, as a `StoreError`."""
    try:
        yield
    except sqlite3.ProgrammingError:  # our own fault
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # a damaged name may be part of SQLite's message
        reason = REASONS.get(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF, "corrupt")
        what = "is damaged" if reason == "corrupt" else "cannot be written"
        raise StoreError(f"{path}: {what}: {error}", reason) from None


def _seal(name: bytes, body: bytes) -> bytes:
    """Four bytes without which a note is not believed."""
    return zlib.crc32(name + b"\0" + body).to_bytes(4, "little")


def sync_names(directory: Path) -> None:
    """Make the names in a directory outlive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
