"""Files through the service: what comes out of a replay is what the engine gives, whatever the formats."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from statestep.consumers.files import FileSink, FileSource, flatten
from statestep.consumers.ports import BrokerError, Committed, Message, Transaction
from statestep.consumers.tables import FileError
from statestep.consumers.wiring import replay
from statestep.runtime import Engine

from ..models import pump
from .judging import judge, troubled

MODEL = pump()
TIMES = [f"2024-01-01T00:{minute:02}:00Z" for minute in range(30)]
X = np.random.default_rng(0).normal(0, 2, (30, 2)).round(3)  # [T, F]
PUMPS = ["p", "q", "p"] * 10


def written(path: Path) -> Path:
    """The readings, in the format that the path names."""
    table = [
        {"ts": ts, "pump": name, "flow": a, "pressure": b}
        for ts, name, (a, b) in zip(TIMES, PUMPS, X.tolist(), strict=True)
    ]
    kind = path.name.split(".")[1]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    elif kind == "jsonl":
        path.write_bytes("".join(json.dumps(row) + "\n" for row in table).encode())
    else:
        text = "\n".join([",".join(table[0]), *(",".join(map(str, row.values())) for row in table)])
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def documents(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def expected(keys: Sequence[str]) -> np.ndarray[Any, Any]:
    """What the engine gives for the readings: predictions and score, [T, 3]."""
    out = Engine(MODEL).advance([key.encode() for key in keys], X.astype(np.float32))
    return np.column_stack([out.prediction, out["score"]])


@pytest.mark.parametrize("name", ["machine.csv", "machine.csv.gz", "machine.jsonl", "machine.parquet"])
@pytest.mark.parametrize("key", [None, "pump"])
def test_a_replay_gives_what_the_engine_gives(tmp_path: Path, name: str, key: str | None) -> None:
    """From each format, one stream by the file's name or many by a column: the engine's numbers, bit for bit."""
    out = tmp_path / "out.jsonl"
    summary = replay(MODEL, str(written(tmp_path / name)), str(out), key=key)
    assert (summary.consumed, summary.predicted) == (30, 30)
    keys = PUMPS if key else ["machine"] * 30
    found = documents(out)
    assert [d["stream"] for d in found] == keys
    assert [d["ts"] for d in found] == TIMES
    numbers = [[d["prediction"]["flow"], d["prediction"]["pressure"], d["score"]] for d in found]
    assert np.array(numbers, np.float32).tobytes() == expected(keys).tobytes()
    assert [d["source"] for d in found][:2] == [
        {"topic": str(tmp_path / name), "partition": 0, "offset": offset} for offset in (0, 1)
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, "out.jsonl"])  # no dead letters, no file


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv", "out.parquet", "out.jsonl.gz", "out.csv.gz"])
def test_predictions_come_out_in_each_format(tmp_path: Path, name: str) -> None:
    """The same numbers from each, `expected` empty at the first step; a gzipped one is gzipped."""
    out = tmp_path / name
    replay(MODEL, str(written(tmp_path / "machine.csv")), str(out))
    if "jsonl" in name:
        flat = [{"prediction.flow": d["prediction"]["flow"], "score": d["score"]} for d in documents(out)]
        assert documents(out)[0]["expected"] is None
    elif "csv" in name:
        text = gzip.decompress(out.read_bytes()) if name.endswith(".gz") else out.read_bytes()
        table: list[dict[str, Any]] = list(csv.DictReader(text.decode().splitlines()))
        assert list(table[0])[:4] == ["stream", "ts", "step", "expected.flow"]
        assert (table[0]["expected.flow"], table[1]["expected.flow"] != "") == ("", True)
        assert (table[0]["model"], table[0]["source.offset"], table[0]["anomaly"]) == (MODEL.fingerprint, "0", "False")
        flat = [{name: float(row[name]) for name in ("prediction.flow", "score")} for row in table]
    else:
        rows = pq.read_table(out).to_pylist()
        assert rows[0]["expected.flow"] is None
        assert rows[1]["expected.flow"] == rows[0]["prediction.flow"]
        assert (rows[0]["ts"], rows[0]["step"], rows[0]["anomaly"]) == (TIMES[0], 1, False)
        flat = rows
    numbers = [[row["prediction.flow"], row["score"]] for row in flat]
    wanted = expected(["machine"] * 30)[:, [0, 2]]
    assert np.array(numbers, np.float32).tobytes() == wanted.tobytes()


def test_what_is_refused_goes_to_a_file_beside_the_output(tmp_path: Path) -> None:
    """One line each, with the original text, the reason and the row; the other rows are unharmed."""
    data = tmp_path / "machine.csv"
    data.write_text("ts,flow,pressure\n0,1,2\n1,high,2\n2,,2\n3,nan,2\n4,inf,2\n5,1_0,2\nnever,1,2\n6,1e39,2\n7,3,4\n")
    summary = replay(MODEL, str(data), str(tmp_path / "out.jsonl"))
    assert (summary.consumed, summary.predicted, summary.refused) == (9, 2, 7)
    dead = documents(tmp_path / "out.dead-letters.jsonl")
    assert [d["headers"]["__streams.errors.exception"] for d in dead] == [
        "wrong-type", "missing-feature", "wrong-type", "wrong-type", "wrong-type", "bad-time", "out-of-range",
    ]  # fmt: skip
    assert [int(d["headers"]["__streams.errors.offset"]) for d in dead] == [1, 2, 3, 4, 5, 6, 7]
    assert json.loads(dead[0]["value"]) == {"ts": "1", "flow": "high", "pressure": 2.0}
    assert [d["step"] for d in documents(tmp_path / "out.jsonl")] == [1, 2]


def test_dead_letters_go_where_they_are_told_to(tmp_path: Path) -> None:
    """JSONL lines as they came, bytes that are not text escaped; a second run begins the file anew."""
    data, dead = tmp_path / "machine.jsonl", tmp_path / "bad.txt"
    data.write_bytes(b'[1, 2]\n{"flow": \xff}\nnot json\n\n[3, 4]\n')
    for _ in range(2):
        replay(MODEL, str(data), str(tmp_path / "out.jsonl"), dead_letters=str(dead))
        assert [d["value"] for d in documents(dead)] == ['{"flow": \\xff}', "not json"]


@pytest.fixture
def trouble(tmp_path: Path) -> Path:
    """Readings of which some belong to an event."""
    path = tmp_path / "trouble.jsonl"
    path.write_bytes(b"\n".join(record.value or b"[0, 5]" for record in troubled(300, seed=5).log[0]) + b"\n")
    return path


def test_events_go_to_a_file_of_their_own(tmp_path: Path, trouble: Path) -> None:
    """A line for the beginning and one for the end of each, as outputs tell it; an empty file where there is none."""
    out, events = tmp_path / "out.jsonl", tmp_path / "events.jsonl"
    summary = replay(judge(), str(trouble), str(out), events=str(events))
    rows = [d for d in documents(out) if d.get("event", {"phase": "on"})["phase"] != "on"]
    found = documents(events)
    assert [(d["id"], d["phase"], d["source"]) for d in found] == [
        (d["event"]["id"], d["event"]["phase"], d["source"]) for d in rows
    ]
    assert summary.events == sum(d["phase"] == "begin" for d in found) > 1
    replay(MODEL, str(written(tmp_path / "machine.csv")), str(out), events=str(events))
    assert events.read_bytes() == b""


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_a_table_has_the_columns_of_an_event_from_its_first_row_on(tmp_path: Path, trouble: Path, name: str) -> None:
    """Filled where there is one, empty elsewhere; of the features that make it the names, the loudest first."""
    replay(judge(), str(trouble), str(tmp_path / "out.jsonl"))
    replay(judge(), str(trouble), str(tmp_path / name))
    wanted = documents(tmp_path / "out.jsonl")
    if name == "out.csv":
        with (tmp_path / name).open() as file:
            rows: list[dict[str, Any]] = list(csv.DictReader(file))
    else:
        rows = pq.read_table(tmp_path / name).to_pylist()
    assert "event" not in wanted[0] and any("event" in document for document in wanted)
    for row, document in zip(rows, wanted, strict=True):
        event = document.get("event", {})
        assert row["status"] == document["status"]
        for part in ("id", "phase", "since", "level"):
            assert (row[f"event.{part}"] or None) == event.get(part)
        for part in ("steps", "severity"):
            assert float(row[f"event.{part}"] or 0) == float(event.get(part, 0))
        assert row["why"] == " ".join(why["feature"] for why in document.get("why", ()))
    assert not {name for name in flatten(json.loads(b'{"status": null}')) if name.startswith("event")}


def test_cells_are_numbers_unless_they_name_something(tmp_path: Path) -> None:
    """The stream's name keeps its zeros, the time may be a number, and spaces around a number do not matter."""
    data = tmp_path / "machine.csv"
    data.write_text("when,unit,flow,pressure\n1700000000,007, 1 ,+2e0\n")
    replay(MODEL, str(data), str(tmp_path / "out.jsonl"), key="unit", time="when")
    (found,) = documents(tmp_path / "out.jsonl")
    assert (found["stream"], found["ts"]) == ("007", "2023-11-14T22:13:20Z")


def test_parquet_cells_mean_what_they_mean_in_json(tmp_path: Path) -> None:
    """Decimals are numbers, NaN and null are missing, infinity is refused, times of nanoseconds are times."""
    data = tmp_path / "machine.parquet"
    table = pa.table(
        {
            "ts": pa.array([1_700_000_000_000_000_000 + n for n in range(5)], pa.timestamp("ns")),
            "flow": [1.5, float("nan"), None, float("inf"), 2.5],
            "pressure": pa.array([Decimal("1.25")] * 5, pa.decimal128(5, 2)),
        }
    )
    pq.write_table(table, data)
    summary = replay(MODEL, str(data), str(tmp_path / "out.jsonl"))
    assert summary.reasons == {"missing-feature": 2, "wrong-type": 1}
    assert [d["ts"] for d in documents(tmp_path / "out.jsonl")] == ["2023-11-14T22:13:20Z"] * 2


def test_times_that_begin_late_do_not_spoil_a_parquet_output(tmp_path: Path) -> None:
    """A column that has been null for a whole block keeps the type that it must have."""
    data, out = tmp_path / "machine.jsonl", tmp_path / "out.parquet"
    rows = ["[1, 2]"] * 4500 + ['{"flow": 1, "pressure": 2, "ts": 5}']
    data.write_text("\n".join(rows))
    replay(MODEL, str(data), str(out))
    times = pq.read_table(out).column("ts").to_pylist()
    assert times == [None] * 4500 + ["1970-01-01T00:00:05Z"]


@pytest.mark.parametrize("name", ["machine.csv", "machine.jsonl", "machine.parquet"])
@pytest.mark.parametrize("out", ["out.jsonl", "out.csv", "out.parquet"])
def test_no_rows_give_no_predictions(tmp_path: Path, name: str, out: str) -> None:
    """A table with a header alone, and an empty JSONL, are read to their end."""
    data = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.table({n: pa.array([], pa.float64()) for n in ("flow", "pressure")}), data)
    else:
        data.write_text("flow,pressure\n" if name.endswith("csv") else "")
    assert replay(MODEL, str(data), str(tmp_path / out)).consumed == 0
    assert (tmp_path / out).exists()


class TestRefusals:
    """What is refused before a row is read, so that nothing is overwritten."""

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"key": "unit"}, "has no column 'unit', it has ts, pump, flow, pressure"),
            ({"time": "when"}, "has no column 'when'"),
            ({"out": "machine.csv"}, "would be written over"),
            ({"out": "x/../machine.csv"}, "would be written over"),
            ({"dead_letters": "machine.csv"}, "would be written over"),
            ({"dead_letters": "out.jsonl"}, "would be written over"),
            ({"events": "out.jsonl"}, "would be written over"),
            ({"events": "events.csv"}, "events are written as JSON lines, end its name in .jsonl"),
            ({"events": "nowhere/events.jsonl"}, "cannot be written: No such file or directory"),
            ({"out": "nowhere/out.jsonl"}, "cannot be written: No such file or directory"),
            ({"out": "out.txt"}, "its name tells no format"),
        ],
    )
    def test_the_data_are_as_they_were(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str], sentence: str
    ) -> None:
        """A column that is not there, a file that is named twice, a folder that is not there."""
        monkeypatch.chdir(tmp_path)
        before = written(tmp_path / "machine.csv").read_bytes()
        with pytest.raises(FileError, match=sentence):
            replay(MODEL, "machine.csv", options.pop("out", "out.jsonl"), **options)  # type: ignore[arg-type]
        assert (tmp_path / "machine.csv").read_bytes() == before

    def test_a_model_that_wants_more_than_the_table_has(self, tmp_path: Path) -> None:
        """The first column that is missing is named."""
        data = tmp_path / "machine.csv"
        data.write_text("flow\n1\n")
        with pytest.raises(FileError, match="has no column 'pressure', it has flow"):
            replay(MODEL, str(data), str(tmp_path / "out.jsonl"))

    def test_a_time_column_is_optional_under_its_usual_name(self, tmp_path: Path) -> None:
        """`ts` is looked for and need not be there."""
        data = tmp_path / "machine.csv"
        data.write_text("flow,pressure\n1,2\n")
        replay(MODEL, str(data), str(tmp_path / "out.jsonl"))
        assert documents(tmp_path / "out.jsonl")[0]["ts"] is None


class TestAdapters:
    """The words of `ports` as far as files keep them."""

    def test_a_file_is_read_once_and_in_order(self, tmp_path: Path) -> None:
        """Nothing before the seek, and bounded polls."""
        data = tmp_path / "machine.jsonl"
        data.write_bytes(b"1\n2\n3\n4\n5\n")
        source = FileSource(str(data))
        assert source.poll(0, 2).changes == [("assigned", (0,))]
        assert source.poll(0, 2).records == []
        source.seek(0, 0)
        found = [source.poll(0, 2).records for _ in range(3)]
        assert [[(r.offset, r.key, r.value) for r in records] for records in found] == [
            [(0, b"machine", b"1"), (1, b"machine", b"2")], [(2, b"machine", b"3"), (3, b"machine", b"4")],
            [(4, b"machine", b"5")],
        ]  # fmt: skip
        assert not source.exhausted
        assert source.poll(0, 2).records == []
        assert source.exhausted
        with pytest.raises(FileError, match="a start time has no meaning"):
            source.offset_at(0, 0)
        source.close()

    @pytest.mark.parametrize("name", ["machine.csv", "machine.csv.gz", "machine.jsonl", "machine.parquet"])
    def test_a_file_can_be_read_from_any_row_on(self, tmp_path: Path, name: str) -> None:
        """Forth and back, to the same values; past its end it is told how short the file is."""
        source = FileSource(str(written(tmp_path / name)))
        source.poll(0, 9)
        source.seek(0, 0)
        everything = source.poll(0, 100).records
        assert [record.offset for record in everything] == list(range(30))
        for row in (7, 29, 30, 3):
            source.seek(0, row)
            assert source.poll(0, 100).records == everything[row:]
        source.pause(0)
        assert source.poll(0, 100).records == []
        source.seek(0, 31)
        with pytest.raises(FileError, match="has 30 rows, 31 were read of it before"):
            source.poll(0, 100)
        source.close()

    def test_a_pipe_is_read_once_and_in_order(self, tmp_path: Path) -> None:
        """Of standard input and named pipes there is no way back, nor forth."""
        os.mkfifo(tmp_path / "machine.jsonl")
        for path in ("-", str(tmp_path / "machine.jsonl")):
            source = FileSource(path)
            source.seek(0, 0)
            with pytest.raises(FileError, match="cannot go to row 3, a pipe is read once and in order"):
                source.seek(0, 3)
            source.close()

    def test_a_full_disk_is_one_sentence(self, tmp_path: Path) -> None:
        """/dev/full takes nothing: writing fails when the buffer is handed over, with the file's name."""
        out = tmp_path / "out.jsonl"
        out.symlink_to("/dev/full")
        sink = FileSink(str(out), str(tmp_path / "bad.jsonl"))
        written = Transaction([Message(False, 0, b"k", b"{}", ())], [], {0: Committed(1, "")})
        for act in (lambda: sink.commit(written, ()), sink.close):
            with pytest.raises(BrokerError, match=r"out\.jsonl: cannot be written: No space left"):
                act()
