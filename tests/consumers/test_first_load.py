"""The first load of a model file: in a process that may die, unless the file is pinned by its SHA-256."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import typer.testing
from onnx import TensorProto, helper

from statestep.consumers import config, first_load, wiring
from statestep.consumers.cli import app
from statestep.consumers.config import ConfigError
from statestep.consumers.first_load import Ending, Limits, in_fork, rehearse
from statestep.runtime import ModelError

from ..models import Array, detector, graph, smoother_contract, stamped

SMALL = Limits(seconds=1.0, memory_bytes=256 << 20)
Tensors = dict[str, tuple[str, list[object]]]

INPUTS: Tensors = {"x": ("float32", ["B", 2]), "h": ("float32", ["B", 2])}
OUTPUTS: Tensors = {"y": ("float32", ["B", 2]), "next_h": ("float32", ["B", 2])}


def bomb() -> bytes:
    """A kilobyte that asks for a terabyte as soon as it is run."""
    nodes = [
        helper.make_node("Expand", ["one", "shape"], ["vast"]),
        helper.make_node("ReduceSum", ["vast"], ["sum"], keepdims=0),
        helper.make_node("Add", ["h", "sum"], ["next_h"]),
        helper.make_node("Add", ["next_h", "x"], ["y"]),
    ]
    weights: dict[str, Array] = {"one": np.ones(1, np.float32), "shape": np.array([2**38], np.int64)}
    return stamped(graph(nodes, INPUTS, OUTPUTS, weights), smoother_contract())


def endless() -> bytes:
    """A loop that goes on for ever, in the space of a few numbers."""
    value = helper.make_tensor_value_info
    shape: list[str | int | None] = ["B", 2]
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["go_on"]), helper.make_node("Neg", ["carried"], ["turned"])],
        "body",
        [value("turn", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("carried", 1, shape)],
        [value("go_on", TensorProto.BOOL, []), value("turned", 1, shape)],
    )
    nodes = [
        helper.make_node("Loop", ["", "always", "h"], ["looped"], body=body),
        helper.make_node("Add", ["looped", "x"], ["next_h"]),
        helper.make_node("Identity", ["next_h"], ["y"]),
    ]
    return stamped(graph(nodes, INPUTS, OUTPUTS, {"always": np.array(True)}), smoother_contract())


def refused(data: bytes, *, fork: bool, limits: Limits = SMALL) -> str:
    with pytest.raises(ModelError) as error:
        rehearse(data, "m.onnx", fork=fork, limits=limits)
    assert str(error.value).startswith("m.onnx: ")
    return str(error.value).removeprefix("m.onnx: ")


def children() -> set[str]:
    """The processes that this one started and has not seen the end of; other tests may have theirs, a broker's say."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def fault() -> None:
    raise ValueError("of the graph's own")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang() -> None:
    signal.pause()


def work() -> None:
    while True:
        pass


def hoard() -> None:
    bytearray(1 << 33)


def odd() -> NoReturn:
    raise KeyError("a")


def chatter() -> NoReturn:
    os.write(1, b"on standard output\n")
    os.write(2, b"on standard error\n")
    raise ModelError("m.onnx: " + "long " * 10_000)


@pytest.mark.parametrize("fork", [True, False])
class TestBothKinds:
    """A fork of this process and a fresh interpreter say the same."""

    def test_a_good_model_passes(self, fork: bool) -> None:
        """Nothing comes back, and nothing is raised."""
        rehearse(detector(), "m.onnx", fork=fork)

    def test_a_refusal_comes_back_in_its_own_words(self, fork: bool) -> None:
        """What the guard or the contract says of a file is what the parent says of it."""
        assert "is not an ONNX file" in refused(detector()[:-9], fork=fork)
        other = stamped(
            graph([helper.make_node("Add", ["x", "h"], ["y"])], INPUTS, {"y": OUTPUTS["y"]}), smoother_contract()
        )
        assert "its contract names the outputs ['next_h']" in refused(other, fork=fork)

    def test_what_the_model_is_given_goes_along(self, fork: bool) -> None:
        """Names of states reach the child; ones that the graph does not have are refused there."""
        with pytest.raises(ModelError, match="nowhere"):
            rehearse(detector(), "m.onnx", {"states": {"nowhere": ("hn", 1)}}, fork=fork)

    def test_a_bomb_is_a_sentence(self, fork: bool) -> None:
        """A terabyte is not there to be had, and the machine's memory is left alone."""
        assert "cannot step 2 streams at once" in refused(bomb(), fork=fork)

    def test_a_loop_without_an_end_is_ended(self, fork: bool) -> None:
        """It is stopped by its limit, and the sentence says how to load it all the same."""
        sentence = refused(endless(), fork=fork)
        assert sentence == (
            "was not loaded within 1 s by a process of its own; if it is trusted all the same, pin it by --model-sha256"
        )

    def test_a_graph_over_sequences_is_only_opened(self, fork: bool) -> None:
        """It has no contract, so a session is made of it; one that cannot be is refused."""
        good = graph([helper.make_node("Relu", ["x"], ["y"])], {"x": INPUTS["x"]}, {"y": OUTPUTS["y"]})
        rehearse(good.SerializeToString(), "m.onnx", kind="graph", fork=fork)
        good.graph.node[0].input[0] = "nowhere"
        with pytest.raises(ModelError, match=r"m\.onnx: onnxruntime cannot load it"):
            rehearse(good.SerializeToString(), "m.onnx", kind="graph", fork=fork)


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (crash, -signal.SIGSEGV),
        (hang, None),
        (work, None),
        (hoard, first_load.NO_MEMORY),
        (chatter, first_load.REFUSED),
    ],
)
def test_a_child_ends_by_itself(job: Callable[[], None], code: int | None, capfd: pytest.CaptureFixture[str]) -> None:
    """A crash, a hang, a busy loop and hoarding end the child alone; what it prints is seen by nobody."""
    began, others = time.monotonic(), children()
    ending = in_fork(job, SMALL)
    assert ending.code == code
    assert len(ending.said) <= first_load.SENTENCE_BYTES
    assert time.monotonic() - began < 30
    assert capfd.readouterr() == ("", "")
    assert children() == others  # nothing is left behind


@pytest.mark.parametrize(("job", "words"), [(crash, "crashes onnxruntime"), (lambda: time.sleep(60), "within 0.5 s")])
def test_what_comes_after_loading_is_tried_too(job: Callable[[], None], words: str) -> None:
    """A graph whose run kills or outlasts the child is refused; what the job itself raises is left to the parent."""
    limits = Limits(seconds=0.5)
    with pytest.raises(ModelError, match=f"m.onnx: .*{words}"):
        first_load.survived(job, "m.onnx", limits=limits, fork=True)
    first_load.survived(fault, "m.onnx", fork=True)


def test_a_fault_of_our_own_is_told_as_one() -> None:
    """An exception that no model should be able to bring about ends as a sentence with its name."""
    assert in_fork(odd, SMALL) == Ending(first_load.REFUSED, "cannot be loaded (KeyError: 'a')")


def test_a_death_in_a_fork_is_believed_only_of_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork inherits locks and threads' leftovers: a good model that dies there is tried without them, and passes."""
    monkeypatch.setattr(first_load, "in_fork", lambda job, limits: Ending(-signal.SIGSEGV, ""))
    rehearse(detector(), "m.onnx", fork=True)
    monkeypatch.setattr(first_load, "_in_fresh_process", lambda *task: Ending(-signal.SIGSEGV, ""))
    assert refused(detector(), fork=True) == ("crashes onnxruntime (SIGSEGV in a process of its own); do not run it")


def test_a_process_with_threads_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread might hold a lock, which in the child nobody would give back."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        monkeypatch.setattr(first_load, "in_fork", lambda job, limits: pytest.fail("it has forked"))
        rehearse(detector(), "m.onnx")
    finally:
        done.set()
        thread.join()


class TestLoadModel:
    """What every command loads by."""

    def test_an_unpinned_file_is_tried_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The bytes that the child was given are those of the model; a pinned file has no child."""
        (tmp_path / "m.onnx").write_bytes(data := detector())
        digest, tried = hashlib.sha256(data).hexdigest(), list[bytes]()
        monkeypatch.setattr(first_load, "rehearse", lambda data, name, how: tried.append(data))
        assert wiring.load_model(tmp_path / "m.onnx").fingerprint == digest
        assert tried == [data]
        assert wiring.load_model(tmp_path / "m.onnx", sha256=digest.upper()).fingerprint == digest
        assert tried == [data]

    def test_another_file_than_the_pinned_is_refused(self, tmp_path: Path) -> None:
        """Before anything of it is read as a model."""
        (tmp_path / "m.onnx").write_bytes(b"anything")
        with pytest.raises(
            ModelError, match="has the SHA-256 ee0874170b7f6f32b8c2ac9573c428d35b575270a66b757c2c0185d2bd"
        ):
            wiring.load_model(tmp_path / "m.onnx", sha256="a" * 64)

    @pytest.mark.parametrize("digest", ["", "a" * 63, "g" * 64, "a" * 65])
    def test_what_is_no_sha256_is_wrong_usage(self, tmp_path: Path, digest: str) -> None:
        """It could never fit."""
        with pytest.raises(ConfigError, match="it must be 64 hexadecimal digits"):
            wiring.load_model(tmp_path / "m.onnx", sha256=digest)

    def test_what_a_child_does_not_survive_is_never_loaded_here(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The sentence comes from the child, and this process has made no session."""
        (tmp_path / "m.onnx").write_bytes(bomb())
        monkeypatch.setattr(wiring, "StepModel", lambda *args, **how: pytest.fail("it was loaded"))
        with pytest.raises(ModelError, match=r"m\.onnx: cannot step 2 streams at once"):
            wiring.load_model(tmp_path / "m.onnx")


COMMANDS = {
    "inspect": ["inspect", "m.onnx"],
    "verify": ["verify", "m.onnx"],
    "replay": ["replay", "--model", "m.onnx", "--data", "d.csv", "--out", "o.jsonl"],
    "run": [
        "run",
        "--model",
        "m.onnx",
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
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
class TestCommandLine:
    """Every command that takes a model loads it by the same rules."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """A folder with a model and readings, and signals as they were."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        root = logging.getLogger()
        logged, level = root.handlers[:], logging.getLogger("statestep").level
        monkeypatch.chdir(tmp_path)
        Path("m.onnx").write_bytes(detector())
        Path("d.csv").write_text("ts,flow,pressure\n0,1,2\n")
        yield
        root.handlers[:] = logged
        logging.getLogger("statestep").setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def fault(self, command: str, *more: str) -> tuple[int, str]:
        """The exit code, and the one sentence of an error."""
        done = typer.testing.CliRunner().invoke(app, [*COMMANDS[command], *more])
        (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        return done.exit_code, sentence.removeprefix("error: ")

    def test_another_file_than_the_pinned_is_3(self, command: str) -> None:
        """The sentence names both."""
        code, sentence = self.fault(command, "--model-sha256", "a" * 64)
        assert code == 3
        assert hashlib.sha256(detector()).hexdigest() in sentence
        assert "a" * 64 in sentence

    def test_a_pin_of_another_form_is_2(self, command: str) -> None:
        """It is no SHA-256 and would never fit."""
        code, sentence = self.fault(command, "--model-sha256", "abc")
        assert code == 2
        assert sentence.startswith("--model-sha256 is 'abc': it must ")

    def test_what_a_child_does_not_survive_is_3(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The commands try a file that is not pinned, and believe what came of it."""
        monkeypatch.setattr(first_load, "in_fork", lambda job, limits: Ending(-signal.SIGSEGV, ""))
        monkeypatch.setattr(first_load, "_in_fresh_process", lambda *task: Ending(-signal.SIGSEGV, ""))
        assert self.fault(command) == (
            3,
            "m.onnx: crashes onnxruntime (SIGSEGV in a process of its own); do not run it",
        )

    def test_an_operator_that_is_not_allowed_is_3(self, command: str) -> None:
        """The guard's sentence reaches the user as it is."""
        model = graph([helper.make_node("RandomNormalLike", ["x"], ["y"])], INPUTS, {"y": OUTPUTS["y"]})
        Path("m.onnx").write_bytes(model.SerializeToString())
        code, sentence = self.fault(command)
        assert code == 3
        assert sentence.startswith("m.onnx: uses the operator 'RandomNormalLike', which draws random numbers")


def test_the_pin_is_a_setting() -> None:
    """By its variable in the environment, as every setting; one that is no SHA-256 is refused there already."""
    needed = {"model": "m.onnx", "bootstrap_servers": "k:9092", "input": "in", "output": "out", "app_id": "app"}
    assert config.load(None, needed, {"STATESTEP_MODEL_SHA256": "A" * 64}).model_sha256 == "A" * 64
    with pytest.raises(ConfigError, match="--model-sha256 is 'abc': it must match"):
        config.load(None, needed, {"STATESTEP_MODEL_SHA256": "abc"})
