"""`statestep backtest` as a person meets it: the table, the report, and one sentence for each thing that is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from statestep.consumers import events
from statestep.consumers.cli import app
from statestep.consumers.tables import FileError
from statestep.consumers.windows import windows_of
from statestep.export.backtest import Row
from statestep.export.findings import level_of
from statestep.export.words import cells

from ..export.backtests import BEGIN_NS, PERIOD, labelled, model_bytes

MODEL = model_bytes()
BEGIN = datetime.fromtimestamp(BEGIN_NS / 1e9, UTC)


def at(row: int) -> str:
    """The time of a row, as a file has it."""
    return (BEGIN + timedelta(seconds=PERIOD * row)).isoformat()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that commands run in: a model, two streams with labels, and readings to calibrate on."""
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes(MODEL)
    lines = ["pump,ts,s0,s1,s2,bad,words"]
    for stream in labelled():
        assert stream.labels is not None
        for row, (reading, label) in enumerate(zip(stream.x.tolist(), stream.labels, strict=True)):
            cells = ["" if np.isnan(value) else repr(value) for value in reading]
            lines.append(f"{stream.name},{at(row)},{','.join(cells)},{int(label)},{'maybe' if row == 6 else 'True'}")
    Path("d.csv").write_text("\n".join(lines) + "\n")
    readings = [",".join(map(repr, row)) for row in labelled()[0].x.tolist()]
    Path("train.csv").write_text("\n".join(["pump,s0,s1,s2", *(f"plant-1,{row}" for row in readings)]))
    yield tmp_path


def backtest(*flags: str, pinned: bool = True) -> tuple[int, str, str]:
    """The exit code, what was printed, and the error's sentence. A pinned model needs no child process to load it."""
    flags = (*flags, "--model-sha256", hashlib.sha256(MODEL).hexdigest()) if pinned else flags
    done = CliRunner().invoke(app, ["backtest", "m.onnx", *flags])
    return done.exit_code, " ".join(done.stdout.split()), " ".join(done.stderr.split())


DATA = ("--data", "d.csv", "--key", "pump", "--time", "ts", "--out", "r.html")


def test_a_table_a_report_and_its_numbers() -> None:
    """What is printed is what is written, in both files."""
    code, printed, said = backtest(*DATA, "--labels", "bad", "--json", "r.json", pinned=False)
    assert code == 0, said
    told = json.loads(Path("r.json").read_text())
    report = Path("r.html").read_text()
    rows = [Row(**row) for row in told["table"]]
    assert [row.detector for row in rows] == ["model", "last value", "value"] and rows[0].events == 4
    for row in rows:
        for cell in cells(row, PERIOD):
            assert cell in printed and f">{cell}<" in report
    assert "VUS-PR AUC-PR found alarms precision" in printed and "written: r.html, r.json" in printed
    assert "the column &#x27;bad&#x27;" in report and told["data"] == "d.csv" and "<h2>plant-2</h2>" in report
    assert (told["period_seconds"], told["model"]["name"]) == (PERIOD, "plant")
    assert [stream["judged_from"] for stream in told["streams"]] == [60, 54]
    assert "baseline" in printed


def test_labels_and_windows_that_say_the_same_give_the_same() -> None:
    """A column, windows by stream, by file, and a list for a file of one stream."""
    windows = {s.name: [[at(100), at(139)], [at(len(s.x) - 60), at(len(s.x) - 31)]] for s in labelled()}
    Path("streams.json").write_text(json.dumps(windows))
    found = []
    for flags in (("--labels", "bad"), ("--windows", "streams.json")):
        code, _, said = backtest(*DATA, *flags, "--json", "r.json", "--train", "train.csv", "--skip", "0.1")
        assert (code, said) == (0, "")
        found.append(json.loads(Path("r.json").read_text()))
    assert found[0] == found[1] and found[0]["baselines_calibrated_on"] == "400 rows of training"
    Path("file.json").write_text(json.dumps({"realKnownCause/d.csv": windows["plant-1"], "other.csv": []}))
    Path("list.json").write_text(json.dumps(windows["plant-1"]))
    code, _, _ = backtest(*DATA, "--windows", "file.json", "--json", "r.json")
    by_file = json.loads(Path("r.json").read_text())
    assert code == 0 and backtest(*DATA, "--windows", "list.json", "--json", "r.json")[0] == 0
    assert by_file == json.loads(Path("r.json").read_text())


def test_neither_labels_nor_times_are_needed() -> None:
    """Then there is nothing but alarms, a week of them by the model's own period, or by the one that is told."""
    Path("d.csv").write_text(Path("train.csv").read_text())
    code, printed, _ = backtest("--data", "d.csv", "--out", "r.html", "--json", "r.json")
    assert code == 0 and "Without labels nobody can say" in printed
    weekly = json.loads(Path("r.json").read_text())["table"][0]["alarms_per_week"]
    assert backtest("--data", "d.csv", "--out", "r.html", "--json", "r.json", "--period", "600")[0] == 0
    told = json.loads(Path("r.json").read_text())
    assert told["table"][0]["alarms_per_week"] == pytest.approx(weekly / 2) and told["streams"][0]["labels"] is None
    assert told["streams"][0]["stream"] == "d" and "row " in Path("r.html").read_text()


def test_a_window_without_a_row_is_noted() -> None:
    """A typing error in a date must not pass for a detector that missed nothing."""
    Path("w.json").write_text(json.dumps([[at(100), at(139)], ["1999-01-01", "1999-01-02"]]))
    code, _, said = backtest(*DATA, "--windows", "w.json")
    assert (code, said) == (0, "note: 2 windows of w.json hold no row")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--out", "r.pdf"), "--out is 'r.pdf': its name must end in .html"),
        (("--out", "no/r.html"), "--out is 'no/r.html': there is no folder 'no', make it first"),
        (("--json", "no/r.json"), "--json is 'no/r.json': there is no folder 'no'"),
        (("--labels", "bad", "--windows", "w.json"), "--labels is 'bad' and --windows 'w.json': give one of them"),
        (("--labels", "s1"), "--labels is 's1', which the model reads as a feature"),
        (("--skip", "0"), "--skip is 0, which leaves nothing to calibrate the baselines on: give --train"),
        (("--skip", "2"), "Invalid value for '--skip'"),
        (("--json", "."), ". cannot be written: Is a directory"),
    ],
)
def test_a_flag_that_cannot_be_used_is_told(flags: tuple[str, ...], words: str) -> None:
    """Exit 2."""
    code, _, said = backtest(*DATA, *flags)
    assert (code, words in said) == (2, True), said


def test_windows_need_times() -> None:
    """Exit 2, and the flag that is lacking."""
    code, _, said = backtest("--data", "d.csv", "--out", "r.html", "--windows", "w.json")
    assert code == 2 and said == "error: --windows is 'w.json', and no row has a time: name its column by --time"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data", "no.csv"), "no.csv: cannot be read: No such file or directory"),
        (("--labels", "gone"), "d.csv: has no column 'gone', it has pump, ts, s0"),
        (("--labels", "words"), "d.csv: row 7: 'words' is 'maybe', it must be 0, 1, true or false"),
        (("--key", "who"), "d.csv: has no column 'who'"),
        (("--time", "words"), "d.csv: row 1: 'words' is 'True', neither ISO 8601 nor a number"),
        (("--train", "no.csv"), "no.csv: cannot be read"),
        (("--windows", "no.json"), "no.json: cannot be read: No such file or directory"),
        (("--skip", "0.001"), "the first 0.001 of each stream are too few rows to calibrate the baselines on"),
    ],
)
def test_data_that_cannot_be_used_is_told(flags: tuple[str, ...], words: str) -> None:
    """Exit 4, and no report is written."""
    code, _, said = backtest(*DATA, *flags)
    assert (code, words in said) == (4, True), said
    assert not Path("r.html").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "w.json: is not JSON: "),
        ("7", "w.json: holds 7, it must be a list of [begin, end], or an object"),
        ('{"x.csv": []}', "w.json: has windows of 'x.csv', it must have some of 'd.csv', 'plant-1', 'plant-2'"),
        (
            '{"d": [["2024-01-01", "noon"]]}',
            """'d' has the window ["2024-01-01","noon"], it must be [begin, end]: two""",
        ),
        ('[["2024-01-02", "2024-01-01"]]', "the earlier first"),
        ('["2024-01-02", "2024-01-01"]', """the list has the window "2024-01-02", it must be"""),
        ('{"d": 5}', "'d' has the window 5, it must be"),
    ],
)
def test_windows_that_are_none_are_told(text: str, words: str) -> None:
    """Exit 4: the file, the window, and what it must be."""
    Path("w.json").write_text(text)
    code, _, said = backtest(*DATA, "--windows", "w.json")
    assert (code, words in said) == (4, True), said


def test_a_model_without_a_detector_is_told() -> None:
    """Exit 3, and the way to one."""
    Path("m.onnx").write_bytes(model_bytes(detector=None))
    code, _, said = backtest(*DATA, pinned=False)
    assert code == 3 and "'plant' has no detector to be tested: fit or convert it with data" in said


def test_a_streams_own_windows_come_before_its_files() -> None:
    """And a name is known with and without folder and endings."""
    path = Path("w.json")
    path.write_text(json.dumps({"d": [[1, 2]], "plant-1": [[3, 4]], "some/where/plant-2.csv.gz": [[5, 6]]}))
    found = windows_of(path, "data/d.csv", ["plant-1", "plant-2", "plant-3"])
    assert found == {
        "plant-1": [(3 * 10**9, 4 * 10**9)],
        "plant-2": [(5 * 10**9, 6 * 10**9)],
        "plant-3": [(10**9, 2 * 10**9)],
    }
    path.write_text(json.dumps({"plant-1": [[3, 4]]}))
    assert windows_of(path, "d.csv", ["plant-1", "plant-2"])["plant-2"] == []
    path.write_bytes(b'{"\xff": []}')
    with pytest.raises(FileError, match="is not JSON"):
        windows_of(path, "d.csv", ["plant-1"])


def test_levels_are_called_as_the_service_calls_them() -> None:
    """The report and the messages have their words from two places, for neither may import the other."""
    for severity in (1.0, 1.49, 1.5, 2.99, 3.0, 100.0):
        assert level_of(severity) == events.level_of(severity)
