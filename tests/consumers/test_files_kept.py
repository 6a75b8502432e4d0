"""Files with a store: a run that is cut off anywhere and started again leaves the outputs of one that never was."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from statestep.consumers.codec import Fields
from statestep.consumers.files import FileSink, FileSource
from statestep.consumers.ports import Committed, Message, StateRecord, Transaction
from statestep.consumers.report import Summary
from statestep.consumers.store import Store
from statestep.consumers.store_changelog import StoreChangelog
from statestep.consumers.tables import FileError
from statestep.consumers.transaction import Limits
from statestep.consumers.wiring import build

from ..models import pump
from .judging import judge, troubled

MODEL = pump()
ROWS = 400


class Cut(BaseException):
    """The process ends here."""


class CutStore(Store):
    """A store at whose n-th transaction the process ends, before or after it counts."""

    left, after = 10**9, False

    def apply(
        self, records: Sequence[StateRecord], positions: Mapping[int, int], notes: Mapping[str, bytes] | None = None
    ) -> None:
        self.left -= 1
        if self.left or self.after:
            super().apply(records, positions, notes)
        if not self.left:
            raise Cut


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Readings of five pumps, some of which cannot be applied."""
    chance, path = np.random.default_rng(3), tmp_path / "machine.csv"
    rows = [f"{n % 5},{a:.3f},{'bad' if n % 37 == 9 else b}" for n, (a, b) in enumerate(chance.normal(0, 2, (ROWS, 2)))]
    path.write_text("\n".join(["pump,flow,pressure", *rows]) + "\n")
    return path


def run(data: Path, out: Path, store: Store) -> Summary:
    """As `replay --state-dir`, in small transactions."""
    limits = Limits(commit_interval_s=0.0, batch_records=23, snapshot_interval_s=3600.0)
    with (
        closing(FileSource(str(data), text_columns=["pump"], store=store)) as source,
        closing(FileSink(str(out), str(out.with_name("dead.jsonl")), store)) as sink,
    ):
        fields = Fields(stream="pump")
        return build(MODEL, source, sink, StoreChangelog(store), fields=fields, limits=limits).run()


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_whatever_was_cut_off_cannot_be_seen(tmp_path: Path, data: Path, name: str) -> None:
    """Ends before and after a transaction counted, again and again, with much to replay: outputs to the byte."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    with closing(Store.open(whole / "state", "files")) as store:
        done = run(data, whole / name, store)
    assert (done.consumed, done.refused) == (ROWS, 11)
    chance, cuts = random.Random(8), 0
    for _ in range(200):
        with closing(CutStore.open(parts / "state", "files")) as cut:
            assert isinstance(cut, CutStore)
            cut.left, cut.after = chance.randrange(1, 7), chance.random() < 0.5
            try:
                run(data, parts / name, cut)
                break
            except Cut:
                cuts += 1
        with (parts / name).open("ab") as file:  # what the operating system may have had of the next transaction
            file.write(b"half a li")
    assert cuts > 5
    for file_name in (name, "dead.jsonl"):
        assert (parts / file_name).read_bytes() == (whole / file_name).read_bytes()


def test_a_finished_run_has_nothing_left_to_do_until_the_file_grows(tmp_path: Path, data: Path) -> None:
    """The second run reads nothing; what is appended is predicted from where the streams are, as in one run."""
    text = data.read_text()
    cut = text.index("\n", len(text) // 2) + 1
    data.write_text(text[:cut])
    with closing(Store.open(tmp_path / "state", "files")) as store:
        first = run(data, tmp_path / "out.jsonl", store)
        assert run(data, tmp_path / "out.jsonl", store).consumed == 0
        data.write_text(text)
        assert run(data, tmp_path / "out.jsonl", store).consumed == ROWS - first.consumed
    with closing(Store.open(tmp_path / "other", "files")) as store:
        run(data, tmp_path / "whole.jsonl", store)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: shorten(folder / "out.jsonl"), r"out\.jsonl: has \d+ bytes, \d+ were committed"),
        (lambda folder: (folder / "out.jsonl").unlink(), r"out\.jsonl: has 0 bytes, \d+ were committed"),
        (lambda folder: shorten(folder / "dead.jsonl"), r"dead\.jsonl: has \d+ bytes, \d+ were committed"),
        (lambda folder: shorten(folder / "machine.csv"), r"machine\.csv: has \d+ bytes, it had \d+"),
        (
            lambda folder: (folder / "machine.csv").write_bytes(
                (folder / "machine.csv").read_bytes().replace(b"bad", b"BAD", 1)
            ),
            "does not begin as it did, so it is another file",
        ),
    ],
)
def test_files_that_are_not_what_they_were_stop_the_run(
    tmp_path: Path, data: Path, change: Callable[[Path], None], sentence: str
) -> None:
    """An output that lost what was committed, an input that is another: one sentence, and nothing is touched."""
    with closing(Store.open(tmp_path / "state", "files")) as store:
        run(data, tmp_path / "out.jsonl", store)
        change(tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        with pytest.raises(FileError, match=sentence):
            run(data, tmp_path / "out.jsonl", store)
        assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_whatever_was_cut_off_no_event_is_told_twice(tmp_path: Path) -> None:
    """Ends before and after a transaction counted: outputs and events to the byte as of a run that was never cut."""
    data = tmp_path / "trouble.jsonl"
    data.write_bytes(b"\n".join(record.value or b"[0, 5]" for record in troubled(1200, seed=5).log[0]) + b"\n")
    whole, parts, chance, cuts = tmp_path / "whole", tmp_path / "parts", random.Random(9), 0

    def told(folder: Path, store: Store) -> None:
        limits = Limits(commit_interval_s=0.0, batch_records=23, snapshot_interval_s=3600.0)
        names = [str(folder / name) for name in ("out.jsonl", "dead.jsonl", "events.jsonl")]
        with (
            closing(FileSource(str(data), store=store)) as source,
            closing(FileSink(names[0], names[1], store, names[2])) as sink,
        ):
            build(judge(), source, sink, StoreChangelog(store), events=True, limits=limits).run()

    whole.mkdir()
    parts.mkdir()
    with closing(Store.open(whole / "state", "files")) as store:
        told(whole, store)
    for _ in range(200):
        with closing(CutStore.open(parts / "state", "files")) as cut:
            assert isinstance(cut, CutStore)
            cut.left, cut.after = chance.randrange(1, 7), chance.random() < 0.5
            try:
                told(parts, cut)
                break
            except Cut:
                cuts += 1
        with (parts / "events.jsonl").open("ab") as file:
            file.write(b"half a li")
    assert cuts > 3
    assert (whole / "events.jsonl").read_bytes().count(b"\n") > 10
    for name in ("out.jsonl", "events.jsonl"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_other_files_than_before_are_refused(tmp_path: Path, data: Path) -> None:
    """The states are of one input and go with one output."""
    with closing(Store.open(tmp_path / "state", "files")) as store:
        run(data, tmp_path / "out.jsonl", store)
        other = tmp_path / "other.csv"
        other.write_bytes(data.read_bytes())
        with pytest.raises(FileError, match=r"other\.csv: the states are of .*machine\.csv; begin anew"):
            run(other, tmp_path / "out.jsonl", store)
        with pytest.raises(FileError, match=r"new\.jsonl: the states go with .*out\.jsonl; write there"):
            run(data, tmp_path / "new.jsonl", store)
        names = [str(tmp_path / name) for name in ("out.jsonl", "dead.jsonl", "events.jsonl")]
        with pytest.raises(FileError, match=r"events\.jsonl: the states go with no file of events; leave --events out"):
            FileSink(names[0], names[1], store, names[2])
    with closing(Store.open(tmp_path / "told", "files")) as store:
        sink = FileSink(names[0], names[1], store, names[2])
        sink.commit(Transaction([], [], {0: Committed(0, "")}), ())
        sink.close()
        with pytest.raises(FileError, match=r"--events: the states go with .*events\.jsonl; write there"):
            FileSink(names[0], names[1], store)


@pytest.mark.parametrize("out", ["-", "out.jsonl.gz", "out.parquet", "pipe.jsonl"])
def test_what_cannot_be_cut_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """Standard output, pipes, gzipped and Parquet files go without a store only; so does standard input."""
    monkeypatch.chdir(tmp_path)
    Path("pipe.jsonl").symlink_to("/dev/null")
    with closing(Store.open(tmp_path / "state", "files")) as store:
        with pytest.raises(FileError, match="cannot be cut back after a crash; leave --state-dir out"):
            FileSink(out, "dead.jsonl", store)
        for path in ("-", "pipe.jsonl"):
            with pytest.raises(FileError, match="cannot be read a second time"):
                FileSource(path, store=store)


def test_a_failed_commit_can_be_taken_back(tmp_path: Path) -> None:
    """`recover` puts both files back to what was committed last, and they can be written on."""

    def transaction(number: int) -> Transaction:
        messages = [Message(dead, 0, b"k", b'{"n":%d}' % number, ()) for dead in (False, True)]
        return Transaction(messages, [StateRecord(0, b"s", b"%d" % number)], {0: Committed(number, f"text {number}")})

    with closing(CutStore.open(tmp_path / "state", "files")) as store:
        assert isinstance(store, CutStore)
        out, dead = tmp_path / "out.jsonl", tmp_path / "dead.jsonl"
        with closing(FileSink(str(out), str(dead), store)) as sink:
            assert sink.commit(transaction(1), ()) == {0: 1}
            committed = out.read_bytes(), dead.read_bytes()
            store.left = 1
            with pytest.raises(Cut):
                sink.commit(transaction(2), ())
            assert out.read_bytes() != committed[0]
            sink.recover()
            assert (out.read_bytes(), dead.read_bytes()) == committed
            store.left = 10
            assert sink.commit(transaction(3), ()) == {0: 2}
        assert out.read_bytes() == b'{"n":1}\n{"n":3}\n'
        (tmp_path / "in.jsonl").write_bytes(b"[]\n" * 5)
        source = FileSource(str(tmp_path / "in.jsonl"), store=store)
        assert source.committed(0) == Committed(3, "text 3")
        assert source.committed(1) is None
        assert source.bounds(0) == (0, 3)
        source.close()
