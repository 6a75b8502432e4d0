"""The local store against a plain dict: through restarts, kills and full disks, and with any bit of it turned over."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statestep.consumers.changelog import MARKER
from statestep.consumers.config import ConfigError
from statestep.consumers.ports import StateRecord
from statestep.consumers.store import NAME, Store, StoreError
from statestep.consumers.store_changelog import StoreChangelog

WAL = f"{NAME}-wal"
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where thousands of stores cost no disk
Model = dict[int, tuple[int, bytes | None, dict[bytes, bytes]]]  # partition: position, marker, states


def sealed(key: bytes, number: int) -> bytes:
    """A value that proves itself, as those of the changelog do."""
    body = b"%d " % number + key * 20
    return body + zlib.crc32(key + body).to_bytes(4, "little")


def proves_itself(record: StateRecord) -> bool:
    value = record.value
    return value is not None and zlib.crc32(record.key + value[:-4]).to_bytes(4, "little") == value[-4:]


def blocks(store: Store, partition: int, size: int = 7) -> Iterator[StateRecord]:
    """All states of a partition, block by block."""
    after = None
    while block := store.load(partition, after, size):
        assert len(block) <= size
        yield from block
        after = block[-1].key


def content(store: Store, partitions: range = range(3)) -> Model:
    found: Model = {}
    for partition in partitions:
        position = store.position(partition)
        records = list(blocks(store, partition))
        states = {record.key: record.value for record in records if record.value is not None}
        assert len(states) == len(records) == store.count(partition)
        assert store.fetch(partition, [*states, b"snever"]) == states
        if position is not None:
            found[partition] = position, store.marker(partition), states
        else:
            assert (store.marker(partition), states) == (None, {})
    return found


KEYS = st.sampled_from([b"s", b"sa", b"sb", b"s\x00\xff", b"s" + b"k" * 4096])
VALUES = st.one_of(st.none(), st.binary(max_size=40), st.integers(1, 9).map(lambda n: b"x" * n * 1000))
RECORDS = st.lists(st.tuples(st.one_of(KEYS, KEYS, st.just(MARKER)), VALUES), max_size=12)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("apply"), st.integers(0, 2), RECORDS),
        st.tuples(st.sampled_from(["forget", "reopen", "crash"]), st.integers(0, 2), st.just([])),
    ),
    max_size=12,
)


@settings(max_examples=40)
@given(STEPS)
def test_a_store_is_a_dict_that_outlives_its_process(
    steps: list[tuple[str, int, list[tuple[bytes, bytes | None]]]],
) -> None:
    """Whatever is applied, forgotten, closed or cut off, it holds what a dict would; a crash is a copy of its files."""
    model: Model = {}
    with TemporaryDirectory(dir=MEMORY) as folder:
        places = (Path(folder) / str(number) for number in range(100))
        here = next(places)
        store = Store.open(here, "app")
        try:
            for number, (step, partition, records) in enumerate(steps):
                if step == "apply":
                    _, marker, states = model.get(partition, (0, None, {}))
                    states = dict(states)
                    for key, value in records:
                        if key == MARKER:
                            marker = value
                        elif value is None:
                            states.pop(key, None)
                        else:
                            states[key] = value
                    model[partition] = number, marker, states
                    store.apply([StateRecord(partition, k, v, 5) for k, v in records], {partition: number})
                elif step == "forget":
                    model.pop(partition, None)
                    store.forget(partition)
                else:
                    there = here
                    if step == "crash":
                        there = next(places)
                        shutil.copytree(here, there)
                    store.close()
                    here, store = there, Store.open(there, "app")
                assert content(store) == model
        finally:
            store.close()


KILLED = """
import sys
from statestep.consumers.ports import StateRecord
from statestep.consumers.store import Store
store = Store.open(sys.argv[1], "app")
number = store.position(0) or 0
mark = lambda value: StateRecord(0, b"m", value)
while True:
    number += 1
    value = b"%d" % number
    store.apply([StateRecord(0, b"s%d" % n, value * 100) for n in range(200)] + [mark(value)], {0: number})
    print(number, flush=True)
"""


def test_a_killed_process_leaves_whole_transactions(tmp_path: Path) -> None:
    """SIGKILL at any moment: every row is of the same transaction, which is none older than the last one reported."""
    chance = random.Random(5)
    reported = 0
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for _ in range(chance.randrange(1, 150)):
            reported = int(child.stdout.readline())
        with pytest.raises(ConfigError, match="another process uses it; give each a directory of its own"):
            Store.open(tmp_path, "app")
        with pytest.raises(ConfigError, match="another process uses it"):
            Store.discard(tmp_path)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        with closing(Store.open(tmp_path, "app")) as store:
            number = store.position(0)
            assert number is not None
            assert number >= reported
            assert store.marker(0) == b"%d" % number
            assert {record.value for record in blocks(store, 0)} == {b"%d" % number * 100}
            assert store.count(0) == 200


class Damaged:
    """A store's files as they were after several transactions, and what it held after each."""

    def __init__(self, folder: Path):
        self.history: list[Model] = [{}]
        self.place = folder / "damaged"
        store = Store.open(folder / "sound", "app")
        for number in range(1, 7):
            records = [
                StateRecord(p, key := b"sstream-%d" % n, sealed(key, number * (p + 1)))
                for p in (0, 1)
                for n in range(30)
                if n % number < 2
            ]
            records += [StateRecord(0, b"sstream-%d" % number, None), StateRecord(1, MARKER, b"marker %d" % number)]
            store.apply(records, {0: number, 1: 100 + number})
            self.history.append(content(store))
            if number == 3:
                store._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self.files = {name: (folder / "sound" / name).read_bytes() for name in (NAME, WAL)}
        store.close()
        self.closed = {NAME: (folder / "sound" / NAME).read_bytes()}

    def verdict(self, files: dict[str, bytes]) -> str:
        """What becomes of damaged files: refused, found by the values' own seal, or harmless."""
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        for name, data in files.items():
            (self.place / name).write_bytes(data)
        try:
            with closing(Store.open(self.place, "app")) as store:
                if not all(proves_itself(record) for partition in (0, 1) for record in blocks(store, partition)):
                    return "by its seal"
                assert content(store) in self.history, "something that never was committed"
                store.apply([StateRecord(0, b"snew", b"new")], {0: 50})
                return "harmless" if store.position(1) == 106 else "older"
        except StoreError as error:
            return error.reason


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_no_flipped_bit_gives_a_wrong_value(damaged: Damaged) -> None:
    """Bits of all the header, of every page and of the log: refused, found, without effect, or some steps back."""
    chance, seen = random.Random(11), dict[str, int]()
    for files, name, bits in (
        (damaged.closed, NAME, range(0, 800, 3)),
        (damaged.closed, NAME, chance.sample(range(800, len(damaged.closed[NAME]) * 8), 400)),
        (damaged.files, NAME, chance.sample(range(len(damaged.files[NAME]) * 8), 100)),
        (damaged.files, WAL, [*range(0, 32 * 8, 7), *chance.sample(range(len(damaged.files[WAL]) * 8), 150)]),
    ):
        for bit in bits:
            verdict = damaged.verdict(files | {name: flipped(files[name], bit)})
            assert (verdict != "older") or name == WAL, f"bit {bit} of {name}"
            seen[verdict] = seen.get(verdict, 0) + 1
    assert seen["corrupt"] > 80, seen
    assert seen["by its seal"] > 10, seen
    assert seen["older"] > 10, seen


def test_no_truncation_gives_a_wrong_value(damaged: Damaged) -> None:
    """Cut at every page, around it and inside: the database is refused, the log goes back to a whole transaction."""
    chance = random.Random(12)
    for files, name in ((damaged.closed, NAME), (damaged.files, NAME), (damaged.files, WAL)):
        size = len(files[name])
        cuts = {*range(0, size, 4096), *chance.sample(range(size), 60), size - 1, 1, 99, 100}
        for cut in sorted(cuts):
            verdict = damaged.verdict(files | {name: files[name][:cut]})
            if files is damaged.closed and cut:
                assert verdict not in ("older", "harmless"), f"{cut} bytes of {name}: {verdict}"
    assert damaged.verdict({NAME: damaged.files[NAME]}) == "older"  # the log is gone
    assert damaged.verdict({WAL: damaged.files[WAL]}) != "harmless"  # the database is


@pytest.fixture
def damaged() -> Iterator[Damaged]:
    with TemporaryDirectory(dir=MEMORY) as folder:
        yield Damaged(Path(folder))


def opened(folder: Path, reason: str, sentence: str) -> None:
    with pytest.raises(StoreError, match=sentence) as caught:
        Store.open(folder, "app")
    assert caught.value.reason == reason


def test_what_is_not_ours_is_refused_and_can_be_discarded(tmp_path: Path) -> None:
    """Another application's store, another program's database, a later format, a text file; then it begins anew."""
    Store.open(tmp_path, "other").close()
    opened(tmp_path, "foreign", "belongs to other, not to app")
    with closing(sqlite3.connect(tmp_path / NAME)) as connection:
        connection.execute("PRAGMA user_version = 2")
    opened(tmp_path, "version", "has format 2, this release reads 1")
    Store.discard(tmp_path)
    with closing(sqlite3.connect(tmp_path / NAME)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    opened(tmp_path, "foreign", "is a database of another program")
    Store.discard(tmp_path)
    (tmp_path / NAME).write_bytes(b"no database at all" * 300)
    opened(tmp_path, "corrupt", "is damaged: file is not a database")
    Store.discard(tmp_path)
    with closing(Store.open(tmp_path, "app")) as store:
        assert content(store) == {}
    Store.discard(tmp_path)
    Store.discard(tmp_path)  # nothing is there
    (tmp_path / NAME).mkdir()
    opened(tmp_path, "unwritable", "cannot be written: unable to open database file")
    with pytest.raises(StoreError, match="cannot be emptied"):
        Store.discard(tmp_path)
    (tmp_path / "file").write_text("")
    opened(tmp_path / "file", "unwritable", "no store can be kept here: File exists")


def test_what_is_deleted_underneath_is_noticed(tmp_path: Path) -> None:
    """Writing into a file that nobody can find again is no use."""
    with closing(Store.open(tmp_path / "a", "app")) as store:
        store.apply([], {0: 1})
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(StoreError, match="was deleted while it was in use") as caught:
            store.apply([], {0: 2})
        assert caught.value.reason == "gone"


def test_a_full_disk_is_one_sentence_and_nothing_half(tmp_path: Path) -> None:
    """SQLite finds no page any more: the transaction has no effect, what was there stays, and it may go on later."""
    with closing(Store.open(tmp_path, "app")) as store:
        store.apply([StateRecord(0, b"sa", b"1")], {0: 1})
        store._connection.execute("PRAGMA max_page_count = 12").fetchall()
        with pytest.raises(StoreError, match="cannot be written: database or disk is full") as caught:
            store.apply([StateRecord(0, b"sa", b"2"), StateRecord(0, b"sb", b"x" * 100_000)], {0: 2})
        assert caught.value.reason == "full"
        assert content(store) == {0: (1, None, {b"sa": b"1"})}
        store._connection.execute("PRAGMA max_page_count = 1000").fetchall()
        store.apply([StateRecord(0, b"sa", b"3")], {0: 3})
    with closing(Store.open(tmp_path, "app")) as store:
        assert content(store) == {0: (3, None, {b"sa": b"3"})}


LIMITED = """
import resource, sys
from statestep.consumers.ports import StateRecord
from statestep.consumers.store import Store, StoreError
store = Store.open(sys.argv[1], "app")
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
number = 0
try:
    while number < 1000:
        store.apply([StateRecord(0, b"s%d" % n, b"%d" % (number + 1) * 500) for n in range(20)], {0: number + 1})
        number += 1
except StoreError as error:
    print(number, error.reason, error)
store.close()
"""


def test_a_file_that_may_not_grow_is_like_a_full_disk(tmp_path: Path) -> None:
    """The operating system refuses a write in the middle of a transaction: the one before is what is found."""
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    number, reason, sentence = done.stdout.strip().split(" ", 2)
    assert (reason, sentence) == ("unwritable", f"{tmp_path / NAME}: cannot be written: disk I/O error")
    assert 0 < int(number) < 1000
    with closing(Store.open(tmp_path, "app")) as store:
        assert store.position(0) == int(number)
        assert {record.value for record in blocks(store, 0)} == {b"%d" % int(number) * 500}


def test_a_copy_that_is_too_old_is_not_to_be_used(tmp_path: Path) -> None:
    """Twelve hours after the last word of a partition its tombstones may be gone; news without records count."""
    now = [1e9]
    with closing(Store.open(tmp_path, "app", clock=lambda: now[0])) as store:
        assert not store.usable(0)
        store.apply([StateRecord(0, b"sa", b"1")], {0: 1, 1: 0})
        now[0] += 11 * 3600
        store.apply([], {1: 0})
        now[0] += 3601 + 60
        assert (store.usable(0), store.usable(1)) == (False, True)
    with closing(Store.open(tmp_path, "app", clock=lambda: now[0])) as store:
        assert (store.usable(0), store.usable(1)) == (False, True)
        now[0] -= 13 * 3600  # the clock was set back: nothing is known of the time between
        assert (store.usable(0), store.usable(1)) == (True, False)


def test_the_log_of_writes_stays_short(tmp_path: Path) -> None:
    """However much is written, the write-ahead log is moved into the database at 32 MiB, and gone after a close."""
    with closing(Store.open(tmp_path, "app")) as store:
        longest = 0
        for number in range(30):
            store.apply([StateRecord(0, b"s%d" % n, os.urandom(2000)) for n in range(2000)], {0: number})
            longest = max(longest, (tmp_path / WAL).stat().st_size)
        assert 4 << 20 < longest < 48 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", NAME]


def test_as_a_changelog_it_gives_every_state_and_then_the_marker(tmp_path: Path) -> None:
    """Each partition to its end, in pieces; from the end on nothing, and no other place can be asked for."""
    with closing(Store.open(tmp_path, "app")) as store:
        states = [StateRecord(p, b"s%d" % n, b"%d" % n) for p in (0, 1) for n in range(25)]
        store.apply([*states, StateRecord(0, MARKER, b"m0"), StateRecord(1, MARKER, b"m1")], {0: 26, 1: 26})
        changelog = StoreChangelog(store)
        assert all(changelog.open(partition) for partition in (0, 1, 2))
        found: list[Any] = []
        while not all(changelog.finished(partition) for partition in (0, 1, 2)):
            block = changelog.read(10)
            assert len(block) <= 10
            found += block
        for partition in (0, 1):
            mine = [record for record in found if record.partition == partition]
            assert mine[-1] == StateRecord(partition, MARKER, b"m%d" % partition)
            assert sorted(mine[:-1]) == sorted(state for state in states if state.partition == partition)
        assert [changelog.position(partition) for partition in (0, 1, 2)] == [26, 26, 0]
        changelog.shut(0)
        assert not changelog.open(0, 7)
        assert changelog.open(0, 26)
        assert changelog.read(10) == []
        assert changelog.finished(0)
        changelog.close()
