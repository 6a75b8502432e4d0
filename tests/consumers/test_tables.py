"""Reading tables: the same rows from CSV, JSONL and Parquet, and every damaged file told by its name."""

from __future__ import annotations

import gzip
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from statestep.consumers.tables import (
    FileError,
    columns,
    expect_columns,
    file_format,
    lines,
    load_streams,
    rows,
    stem,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], str]:
    """`write(name, data) -> path`."""

    def made(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return made


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.csv", "csv"), ("x/y.b.CSV.gz", "csv"), ("a.jsonl", "jsonl"), ("a.ndjson", "jsonl"), ("a.json.gz", "jsonl"),
        ("a.parquet", "parquet"), ("-", "jsonl"),
    ],
)  # fmt: skip
def test_the_name_tells_the_format(path: str, expected: str) -> None:
    """By its last ending, `.gz` aside, in capitals too."""
    assert file_format(path) == expected


@pytest.mark.parametrize("path", ["data", "data.txt", "data.gz", "csv", ".csv.xz", ""])
def test_a_name_that_tells_no_format_is_refused(path: str) -> None:
    """The sentence names the file and the endings that there are."""
    with pytest.raises(FileError, match=r"its name tells no format; end it in \.csv, \.jsonl or \.parquet"):
        file_format(path)


def test_a_stream_is_called_like_its_file() -> None:
    """Without folder and endings."""
    assert [stem(p) for p in ("a/b/pump.csv.gz", "pump.2024.csv", "-", ".csv")] == ["pump", "pump", "stdin", "file"]


PLAIN = b"ts,flow,note\n2024-01-01,1.5,a\n2024-01-02,,\n"
ROWS: list[dict[str, Any]] = [
    {"ts": "2024-01-01", "flow": "1.5", "note": "a"},
    {"ts": "2024-01-02", "flow": None, "note": None},
]


@pytest.mark.parametrize(
    "data",
    [
        PLAIN,
        PLAIN.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN.rstrip(b"\n"),
        PLAIN + b"\n\n",
        b'"ts","flow","note"\n2024-01-01,"1.5","a"\n2024-01-02,,""\n',
    ],
)
def test_csv_as_programs_write_it(write: Callable[[str, bytes], str], data: bytes) -> None:
    """Line ends of either kind, a mark before UTF-8, no last line end, blank lines, quotes; gzipped or not."""
    for path in (write("a.csv", data), write("a.csv.gz", gzip.compress(data))):
        assert columns(path) == ("ts", "flow", "note")
        assert list(rows(path)) == ROWS


def test_a_cell_may_hold_commas_and_lines(write: Callable[[str, bytes], str]) -> None:
    """Quoted, as CSV has it; and text beyond ASCII."""
    path = write("a.csv", 'a,"b, c"\n"1\n2","ä"\n'.encode())
    assert columns(path) == ("a", "b, c")
    assert list(rows(path)) == [{"a": "1\n2", "b, c": "ä"}]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", "line 3 has not as many cells as the header has columns"),
        ("a.csv", b"a,b\n1,2,3\n", "line 2 has not as many cells"),
        ("a.csv", b"a,b\r1,2\r", "is not CSV"),
        ("a.csv", b"a\n" + b"x" * 200_000, "is not CSV: field larger than"),
        ("a.csv", "a,b\n1,ä".encode("utf-16"), "is not a text file in UTF-8"),
        ("a.csv", b"a,b\n1,\xff\n", "is not a text file in UTF-8"),
        ("a.csv.gz", b"a,b\n1,2\n", "cannot be read: Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n" * 100, mtime=0)[:-12], "cannot be read: "),
        ("a.csv.gz", b"", "has no column"),
        ("a.csv", b"", "has no column 'a', it has none"),
        ("a.csv", b"b\n1\n", "has no column 'a', it has b"),
        ("a.csv", b"a,b,a\n1,2,3\n", "has the column 'a' twice, it has a, b, a"),
        ("a.parquet", b"", "is not a readable Parquet file"),
        ("a.parquet", b"PAR1 and nothing more", "is not a readable Parquet file"),
    ],
)
def test_a_damaged_table_is_refused(write: Callable[[str, bytes], str], name: str, data: bytes, sentence: str) -> None:
    """Ragged lines, no CSV, no UTF-8, broken gzip, absent and doubled columns: one line that begins with the file."""
    path = write(name, data)
    with pytest.raises(FileError, match=sentence) as refused:
        expect_columns(path, ["a"])
        list(rows(path))
    assert str(refused.value).startswith(path)
    assert "\n" not in str(refused.value)


def test_gzip_that_is_damaged_inside_is_refused(write: Callable[[str, bytes], str]) -> None:
    """Bytes turned over in the midst of the compressed data, of CSV as of JSONL."""
    whole = bytearray(gzip.compress(os.urandom(3000).hex().encode()))
    for place in range(200, 240):
        whole[place] ^= 0xFF
    with pytest.raises(FileError, match="cannot be read"):
        list(rows(write("a.csv.gz", bytes(whole))))
    with pytest.raises(FileError, match="cannot be read"):
        list(lines(write("a.jsonl.gz", bytes(whole))))


@pytest.mark.parametrize("name", ["gone.csv", "gone.jsonl", "gone.parquet", "gone.csv.gz"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    """The sentence has the path and the system's reason; a folder is no file either."""
    path = str(tmp_path / name)
    with pytest.raises(FileError, match="No such file"):
        list(lines(path) if "jsonl" in name else rows(path))
    (tmp_path / name).mkdir()
    with pytest.raises(FileError):
        list(lines(path) if "jsonl" in name else rows(path))


class TestLines:
    """Lines of JSONL."""

    @pytest.mark.parametrize("data", [b"a\nb\n", b"a\r\nb", b"\xef\xbb\xbfa\n\n  \nb", b"\n\na\nb\n\n"])
    def test_blank_lines_and_marks_are_left_out(self, write: Callable[[str, bytes], str], data: bytes) -> None:
        """Whatever the line ends, with and without the last one, the lines are the same but for a carriage return."""
        for path in (write("a.jsonl", data), write("a.jsonl.gz", gzip.compress(data))):
            assert [line.rstrip(b"\r") for block in lines(path) for line in block] == [b"a", b"b"]

    @pytest.mark.parametrize("data", [b"", b"\n", b"\xef\xbb\xbf", b" \r\n"])
    def test_an_empty_file_has_none(self, write: Callable[[str, bytes], str], data: bytes) -> None:
        """Nothing, a line end, a mark alone."""
        assert [line for block in lines(write("a.jsonl", data)) for line in block] == []

    def test_long_lines_and_many_lines_are_whole(self, write: Callable[[str, bytes], str]) -> None:
        """Lines are cut where they end, and not where a read does, which is every MiB."""
        wanted = [b"x" * size for size in (3_000_000, 1, 1 << 20, (1 << 20) - 1)] + [b"%d" % n for n in range(300_000)]
        path = write("a.jsonl", b"\n".join(wanted))
        assert [line for block in lines(path) for line in block] == wanted

    def test_a_named_pipe_gives_what_has_come(self, tmp_path: Path) -> None:
        """A line can be read before the writer closes, or writes a MiB."""
        path = tmp_path / "pipe.jsonl"
        os.mkfifo(path)
        read = threading.Event()

        def feed() -> None:
            with path.open("wb", buffering=0) as pipe:
                pipe.write(b"first\nsec")
                assert read.wait(30)
                pipe.write(b"ond")

        writer = threading.Thread(target=feed)
        writer.start()
        blocks = lines(str(path))
        assert next(blocks) == [b"first"]
        read.set()
        assert [line for block in blocks for line in block] == [b"second"]
        writer.join()


class TestParquet:
    """Parquet by pyarrow."""

    def test_rows_have_pythons_values(self, tmp_path: Path) -> None:
        """Numbers, texts, nulls and times; nanoseconds are cut to microseconds."""
        table = pa.table(
            {
                "ts": pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns", "UTC")),
                "flow": pa.array([1.5, None]),
                "name": ["a", "b"],
            }
        )
        path = str(tmp_path / "a.parquet")
        pq.write_table(table, path)
        assert columns(path) == ("ts", "flow", "name")
        found = list(rows(path))
        assert found[0]["ts"].isoformat() == "2023-11-14T22:13:20.123456+00:00"
        assert found[1] == {"ts": None, "flow": None, "name": "b"}

    def test_one_that_was_cut_is_refused(self, tmp_path: Path) -> None:
        """A file whose pages are damaged is told as one, in a line."""
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"a": np.arange(1000) * 1.5}), path)
        data = bytearray(path.read_bytes())
        data[50:300] = bytes(250)
        path.write_bytes(data)
        with pytest.raises(FileError, match="is not a readable Parquet file") as refused:
            list(rows(str(path)))
        assert "\n" not in str(refused.value)


class TestStreams:
    """`load_streams`: what training, proofs and exports read."""

    def test_streams_by_key_in_the_files_order(self, write: Callable[[str, bytes], str]) -> None:
        """Each with its rows as they came, an empty cell as NaN, and the usual time between two rows."""
        data = b"ts,pump,a,b\n0,x,1,2\n0,y,5,\n60,x,3,4\n60,y,7,8\n120,x,9,9\n500,y,0,0\n"
        streams, period = load_streams(write("a.csv", data), ["b", "a"], key="pump", time="ts")
        np.testing.assert_array_equal(streams["x"], [[2, 1], [4, 3], [9, 9]])
        np.testing.assert_array_equal(streams["y"], [[np.nan, 5], [8, 7], [0, 0]])
        assert period == 60.0

    @pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
    def test_every_format_gives_the_same(self, write: Callable[[str, bytes], str], tmp_path: Path, kind: str) -> None:
        """One stream, named by the file's stem, without a period where no time is named."""
        path = str(tmp_path / f"m.{kind}")
        if kind == "csv":
            write("m.csv", b"a\n1.5\n\n2.5\n")
        elif kind == "jsonl":
            write("m.jsonl", b'{"a": 1.5}\n{"a": 2.5, "more": []}\n')
        else:
            pq.write_table(pa.table({"a": [1.5, 2.5]}), path)
        streams, period = load_streams(path, ["a"])
        assert {name: values.tolist() for name, values in streams.items()} == {"m": [[1.5], [2.5]]}
        assert period is None

    @pytest.mark.parametrize(
        ("name", "data", "sentence"),
        [
            ("a.csv", b"ts,a\n0,1\n1,two\n", "row 2: 'a' is 'two', it must be a number"),
            ("a.csv", b"ts,a\n0,1\nnoon,2\n", "row 2: 'ts' is 'noon', neither ISO 8601 nor a number"),
            ("a.csv", b"ts,a\n,1\n", "row 1: 'ts' is None"),
            ("a.csv", b"ts,a\n", "has no rows"),
            ("a.csv", b"a\n1\n", "has no column 'ts'"),
            ("a.jsonl", b'{"ts": 0, "a": 1}\n[1]\n', "line 2 is no JSON object"),
            ("a.jsonl", b'{"ts": 0, "a": [1]}\n', r"row 1: 'a' is \[1\], it must be a number"),
            ("a.jsonl", b"\xff\n", "line 1 is no JSON object"),
            ("a.jsonl", b"", "has no rows"),
        ],
    )
    def test_what_cannot_be_trained_on_is_refused(
        self, write: Callable[[str, bytes], str], name: str, data: bytes, sentence: str
    ) -> None:
        """The row, the column and the value are named."""
        with pytest.raises(FileError, match=sentence):
            load_streams(write(name, data), ["a"], time="ts")
