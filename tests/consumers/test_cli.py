"""The command line: one sentence and an exit code for every fault, help for every flag, and pipes that flow."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import typer
from typer.testing import CliRunner

from statestep.consumers import bench
from statestep.consumers.cli import app
from statestep.consumers.config import FLAGS, Settings
from statestep.consumers.options import Cell
from statestep.runtime import Feature

from ..models import detector, pump, smoother, smoother_contract, stamped

STATESTEP = [sys.executable, "-m", "statestep.consumers"]
DATA = "ts,flow,pressure\n0,1,2\n60,3,4\n120,5,6\n"


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in this process, and set what belongs to one: signals, the log, the environment."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    root = logging.getLogger()
    logged, level = root.handlers[:], logging.getLogger("statestep").level
    for name in list(os.environ):
        if name.startswith(("STATESTEP_", "KAFKA_")):
            monkeypatch.delenv(name)
    yield
    root.handlers[:] = logged
    logging.getLogger("statestep").setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and readings, which commands run in."""
    (tmp_path / "pump.onnx").write_bytes(detector(period_seconds=60.0, license="MIT"))
    (tmp_path / "machine.csv").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Done(NamedTuple):
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str
    exception: BaseException | None


def run(*arguments: str, **environ: str) -> Done:
    done = CliRunner().invoke(app, arguments, env=environ)
    return Done(done.exit_code, done.stdout, done.stderr, done.exception)


def fault(result: Done, code: int) -> str:
    """The one sentence of a fault, without a traceback; nothing on standard output."""
    assert result.exit_code == code, result
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.strip().endswith(sentence)
    return sentence.removeprefix("error: ")


REPLAY = ("replay", "--model", "pump.onnx", "--data", "machine.csv")
RUN = (
    "run",
    "--bootstrap-servers",
    "127.0.0.1:1",
    "--input",
    "i",
    "--output",
    "o",
    "--app-id",
    "a",
    "--http-port",
    "0",
)


class TestExitCodes:
    """0 done, 2 usage or configuration, 3 bad model, 4 data refused, 5 broker."""

    def test_done_is_0(self, folder: Path) -> None:
        """A replay says how much it did on standard error, and leaves standard output alone."""
        result = run(*REPLAY, "--out", "out.jsonl")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "3 records → 3 predictions" in result.stderr
        assert len((folder / "out.jsonl").read_text().splitlines()) == 3

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("nonsense",), "No such command 'nonsense'"),
            (("replay",), "Missing option '--model'"),
            ((*REPLAY, "--out", "o.jsonl", "--speed", "9"), "No such option: --speed"),
            ((*REPLAY, "--out", "o.jsonl", "--max-streams", "0"), "--max-streams"),
            ((*REPLAY, "--out", "o.jsonl", "--on-bad-message", "cry"), "'cry'"),
            ((*RUN, "--model", "pump.onnx", "--http-port", "many"), "Invalid value for '--http-port'"),
        ],
    )
    def test_wrong_usage_is_2(self, folder: Path, arguments: tuple[str, ...], words: str) -> None:
        """An unknown command or option, a missing one, a value of another type: told before anything is done."""
        result = run(*arguments)
        assert result.exit_code == 2
        assert words in result.stderr
        assert "Traceback" not in result.stderr

    def test_wrong_configuration_is_2(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A missing setting, a wrong one, an unknown variable, a field with two meanings, a port in use."""
        assert "--model is missing" in fault(run(*RUN), 2)
        assert "--start is 'never'" in fault(run(*RUN, "--model", "pump.onnx", "--start", "never"), 2)
        assert "--kafka is 'retries': it must be name=value" in fault(run(*RUN, "--kafka", "retries"), 2)
        assert "cannot be read" in fault(run(*RUN, "--config", "gone.toml"), 2)
        assert "the time field 'flow' is also a feature" in fault(
            run(*RUN, "--model", "pump.onnx", "--time", "flow"), 2
        )
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            sentence = fault(run(*RUN, "--model", "pump.onnx", "--http-port", port), 2)
            assert f"127.0.0.1:{port} cannot be listened on: Address already in use; --http-port" in sentence
        monkeypatch.setenv("STATESTEP_MODLE", "x")
        assert "STATESTEP_MODLE is no setting; did you mean STATESTEP_MODEL?" in fault(run(*RUN), 2)

    def test_a_cell_that_is_not_there_is_2(self, folder: Path) -> None:
        """It is named with all that there are, before any data is read; the help lists the same ones."""
        fit = ("fit", "gone.csv", "--features", "flow", "--out", "m.onnx", "--cell")
        sentence = fault(run(*fit, "lstm,elman"), 2)
        assert sentence.startswith("--cell is 'elman', it must be one of rnn, ")
        told = re.findall(r"[a-z-]+", get_args(Cell)[1].help.partition(":")[2].partition(";")[0])
        assert [word for word in told if word != "or"] == sentence.partition("one of ")[2].split(", ")
        assert "leave one of them out" in fault(run(*fit, "lstm,gru", "--layers", "3"), 2)

    def test_a_state_without_its_width_is_2(self, folder: Path) -> None:
        """The states of a module in step form are in=out:WIDTH."""
        export = ("export", "plant:make", "--weights", "w.pt", "--features", "flow", "--out", "m.onnx", "--state")
        for state in ("h0=hn", "h0=hn:", "h0=hn:0", "h0=hn:4x", "h0=:4"):
            assert f"--state is '{state}': it must be in=out:WIDTH" in fault(run(*export, state), 2)

    def test_one_stream_too_many_is_2(self, folder: Path) -> None:
        """The way out is a setting."""
        (folder / "many.jsonl").write_text("".join(f'{{"k": {n}, "flow": 1, "pressure": 2}}\n' for n in range(3)))
        result = run(
            "replay",
            "--model",
            "pump.onnx",
            "--data",
            "many.jsonl",
            "--key",
            "k",
            "--max-streams",
            "2",
            "--out",
            "o.csv",
        )
        assert "3 new streams and room for 2: max_streams is 2" in fault(result, 2)

    @pytest.mark.parametrize("command", ["inspect", "replay", "run"])
    def test_a_bad_model_is_3(self, folder: Path, command: str) -> None:
        """Not there, not ONNX, truncated, without a state pair, of a later contract: one sentence each."""
        whole = detector()
        stateless = smoother()
        del stateless.graph.output[1]
        later = stamped(smoother(), smoother_contract()).replace(b'"version":1}', b'"version":2}')
        faults = {
            b"": "is not an ONNX file",
            b"hello": "is not an ONNX file",
            whole[: len(whole) // 2]: "is not an ONNX file",
            stateless.SerializeToString(): "has no state pair",
            later: "has version 2, this release reads version 1: upgrade statestep",
        }
        arguments = {
            "inspect": ["inspect", "bad.onnx"],
            "replay": ["replay", "--model", "bad.onnx", "--data", "machine.csv", "--out", "o.jsonl"],
            "run": [*RUN, "--model", "bad.onnx"],
        }[command]
        assert "bad.onnx: cannot be read: No such file" in fault(run(*arguments), 3)
        for data, sentence in faults.items():
            (folder / "bad.onnx").write_bytes(data)
            assert sentence in fault(run(*arguments), 3)
        assert not (folder / "o.jsonl").exists()

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            (("--data", "gone.csv"), "gone.csv: cannot be read: No such file or directory"),
            (("--data", "machine.txt"), "machine.txt: its name tells no format"),
            (("--data", "machine.csv", "--key", "pump"), "has no column 'pump', it has ts, flow, pressure"),
            (("--data", "machine.csv", "--time", "when"), "has no column 'when'"),
            (("--data", "half.csv"), "has no column 'pressure', it has flow"),
            (("--data", "bad.csv", "--on-bad-message", "fail"), "partition 0, offset 1: Expected"),
            (("--data", "ragged.csv"), "line 2 has not as many cells"),
        ],
    )
    def test_refused_data_are_4(self, folder: Path, options: tuple[str, ...], sentence: str) -> None:
        """A file or column that is not there, a line that is none, a bad cell where that is to fail."""
        (folder / "half.csv").write_text("flow\n1\n")
        (folder / "bad.csv").write_text("flow,pressure\n1,2\nhigh,2\n")
        (folder / "ragged.csv").write_text("flow,pressure\n1\n")
        result = run("replay", "--model", "pump.onnx", "--out", "out.jsonl", *options)
        assert sentence in fault(result, 4)

    def test_data_of_which_nothing_could_be_applied_are_4(self, folder: Path) -> None:
        """The reasons are counted, the dead letters are told, and a program sees that something is wrong."""
        (folder / "bad.jsonl").write_text("{\n[1]\n[1, 2, 3]\n")
        result = run("replay", "--model", "pump.onnx", "--data", "bad.jsonl", "--out", "out.jsonl")
        assert result.exit_code == 4
        assert "3 records refused: 1 malformed, 2 wrong-shape" in result.stderr
        assert "they are in out.dead-letters.jsonl" in result.stderr
        assert "error: bad.jsonl: not one of 3 records could be applied" in result.stderr

    def test_a_broker_that_is_not_there_is_5(self, folder: Path) -> None:
        """The sentence has its address and what to look at; it does not wait for ever."""
        impatient = ("--model", "pump.onnx", "--kafka", "bootstrap.timeout.ms=1000")
        done = subprocess.run([*STATESTEP, *RUN, *impatient], capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stdout) == (5, "")
        assert "Traceback" not in done.stderr
        sentence = done.stderr.splitlines()[-1]
        assert sentence.startswith("error: no Kafka broker answers at 127.0.0.1:1 ")
        assert sentence.endswith("is it running, and is --bootstrap-servers right?")

    def test_debug_shows_where_a_fault_came_from(self, folder: Path) -> None:
        """The exception comes through whole, for a traceback."""
        result = run("inspect", "gone.onnx", "--debug")
        assert result.exit_code == 1
        assert type(result.exception).__name__ == "ModelError"


class TestHelp:
    """`--help` says all there is to say."""

    def test_every_option_of_every_command_has_a_help(self) -> None:
        """And every command a sentence."""
        group = typer.main.get_command(app)
        commands = getattr(group, "commands")  # noqa: B009
        assert {"fit", "export", "inspect", "verify", "replay", "run", "demo", "bench"} <= set(commands)
        for name, command in commands.items():
            assert command.help, name
            for parameter in command.params:
                assert parameter.help, f"{name} {parameter.name}"

    def test_defaults_are_shown(self) -> None:
        """As they are, in brackets that no markup swallows; what `run` leaves to the file has none."""
        shown = " ".join(run("replay", "--help").stdout.split())
        assert "Streams remembered at most. [default: 1000000; x>=1]" in shown
        assert "refused record. [default: dead-letter]" in shown
        assert "The step model, an .onnx file. [required]" in shown
        assert "[default: " not in run("run", "--help").stdout

    def test_run_has_a_flag_for_every_setting(self) -> None:
        """Under the setting's own name."""
        shown = run("run", "--help").stdout
        for name in Settings.model_fields:
            assert f"--{FLAGS.get(name, name).replace('_', '-')}" in shown, name


class TestInspect:
    """A model's contract for people and for programs."""

    def test_people_read_tables(self, folder: Path) -> None:
        """Features, states with their bytes, outputs and their meaning."""
        shown = run("inspect", "pump.onnx").stdout
        for words in ("pump, version 1", "60 s", "MIT", "flow", "h0 → hn", "1×4", "int64", "anomaly", "refused"):
            assert words in shown
        assert pump(period_seconds=60.0, license="MIT").fingerprint in shown

    def test_names_with_brackets_are_shown_whole(self, folder: Path) -> None:
        """What looks like markup is text."""
        contract = smoother_contract(features=(Feature("[red]a[/red]", unit="[bar]"), Feature("b")))
        (folder / "odd.onnx").write_bytes(stamped(smoother(), contract))
        shown = run("inspect", "odd.onnx").stdout
        assert "[red]a[/red]" in shown
        assert "[bar]" in shown

    def test_programs_read_json(self, folder: Path) -> None:
        """The contract, with fingerprint and opset, on one line."""
        document = json.loads(run("inspect", "pump.onnx", "--json").stdout)
        assert (document["name"], document["opset"], document["license"]) == ("pump", 18, "MIT")
        assert [state["input"] for state in document["states"]][:2] == ["h0", "c0"]


def test_the_configuration_can_be_printed_and_used(folder: Path) -> None:
    """From flags, environment and file; passwords starred; the service is not started."""
    (folder / "s.toml").write_text('model = "pump.onnx"\nhttp_port = 7\n')
    topics = ("--input", "i", "--output", "o", "--events", "e", "--no-create-topics")
    given = ("--bootstrap-servers", "k:1", *topics, "--kafka", "sasl.password=x=y")
    environ = {"STATESTEP_APP_ID": "app", "STATESTEP_HTTP_PORT": "8"}
    result = run("run", "--config", "s.toml", *given, "--print-config", **environ)
    assert result.exit_code == 0
    for line in (
        'model = "pump.onnx"',
        "http_port = 8",
        'app_id = "app"',
        'events = "e"',
        "create_topics = false",
        '"sasl.password" = "***"',
    ):
        assert line in result.stdout


class TestPipes:
    """Standard input and output, as a process of its own."""

    ARGUMENTS = (*STATESTEP, "replay", "--model", "pump.onnx", "--data", "-", "--out", "-")

    def test_a_line_is_answered_before_the_next_is_written(self, folder: Path) -> None:
        """A pipe that stays open gives each prediction as soon as its reading is there; its end is the end."""
        with subprocess.Popen(
            self.ARGUMENTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin and process.stdout and process.stderr
            for step in range(1, 4):
                process.stdin.write(b'{"flow": 1, "pressure": %d}\n' % step)
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                assert (answer["stream"], answer["step"]) == ("stdin", step)
            process.stdin.write(b"[5, 6]")  # no line end: the end of the input is one
            process.stdin.close()
            assert json.loads(process.stdout.readline())["step"] == 4
            assert process.stdout.read() == b""
            assert b"4 records" in process.stderr.read()
            assert process.wait(30) == 0

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_a_silent_pipe_in_order(self, folder: Path, number: signal.Signals) -> None:
        """While it waits for a reading that does not come, it ends within seconds, with what it did."""
        with subprocess.Popen(
            self.ARGUMENTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write(b"[1, 2]\n")
            process.stdin.flush()
            process.stdout.readline()
            process.send_signal(number)
            assert process.wait(8) == 0
            assert b"1 records" in process.stderr.read()

    @pytest.mark.parametrize(("rows", "unbuffered"), [(1, ""), (20_000, ""), (20_000, "1")])
    def test_a_reader_that_goes_away_is_one_sentence(self, folder: Path, rows: int, unbuffered: str) -> None:
        """As with `head`: no traceback, and no complaint of Python at its end, much or little left to be written."""
        environ = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        with subprocess.Popen(
            self.ARGUMENTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ
        ) as process:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write(b"[1, 2]\n")
            process.stdin.flush()
            process.stdout.readline()
            process.stdout.close()
            _, said = process.communicate(b"[3, 4]\n" * rows)
            assert process.returncode == 5
            assert said.decode().splitlines() == ["error: -: nobody reads it any more"]


def test_the_bench_measures_and_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    """`bench --quick` prints both tables, uncut in a file's 80 columns, with figures that add up."""
    monkeypatch.setattr(bench, "REPEATS", 1)
    monkeypatch.setattr(bench, "ROUND_SECONDS", 0.01)
    shown = run("bench", "--quick").stdout
    engine, service = shown.split("\n\n")[:2]
    assert "…" not in shown
    for row in engine.splitlines()[1:]:
        model, streams, batch, raw, advanced, wall, ratio = row.split()
        assert (model, streams, batch in ("64", "1,024")) == ("lstm-8-64x1", "2,000", True)
        assert float(raw) > 0 and float(advanced) > 0 and float(wall) > 0 and 0 < float(ratio) < 2
    names = ["decode", "gather", "infer", "scatter", "rest", "encode"]
    assert service.split()[: len(names) + 1] == [*names, "messages"]
    for row in service.splitlines()[2:]:
        model, _, *stages, rate = row.split()
        assert model == "lstm-8-64x1"
        # The stages are a message's whole way but for the loop around them.
        assert sum(map(float, stages)) == pytest.approx(1e6 / float(rate.replace(",", "")), rel=0.2)


def test_the_module_is_the_command() -> None:
    """`python -m statestep.consumers` and the installed `statestep` are one."""
    done = subprocess.run([*STATESTEP, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "one message" in done.stdout
