"""The command line over models from elsewhere, and over all that a contract says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from statestep.runtime import Feature, StepModel

from ..models import graph, smoother, smoother_contract, stamped
from .test_cli import fault, own_process, run

__all__ = ["own_process"]  # a fixture that every test here uses

BY_HAND = ("--state", "memory=result:1", "--set", "gain=3", "--features", "flow,level")
CURVE = {"steps": [1, 2, 5, 10, 20, 50, 100], "gap": [2.0, 1.0, 0.3, 0.1, 0.01, 1e-4, 0.0]}
MEMORY = {
    "steps": 4096,
    "starts": 16,
    "warm": 2,
    "forgets": {"0.01": 2, "0.0001": 50, "equal": None},
    "outputs": {"y": {"0.01": 2, "0.0001": 50, "equal": None}},
    "curve": CURVE,
}

DETECTOR = {
    "evidence": ["error", "others", "range", "stuck"],
    "status": ["warming", "calibrated", "drifting"],
    "alpha": 0.05,
    "combine": "top",
    "rule": "conformal",
    "scale": "per-stream",
    "threshold": 4.125,
    "every": 10_080,
    "calm": 20,
    "warm": 30,
    "rows": 12_345,
    "tail": {"over": 2.5, "scale": 0.75},
}


def foreign() -> onnx.ModelProto:
    """A step model whose names tell nothing: result = memory / 2 + gain · x, of a width that the graph leaves open."""
    return graph(
        [
            helper.make_node("Mul", ["x", "gain"], ["loud"]),
            helper.make_node("Unsqueeze", ["loud", "first"], ["layer"]),
            helper.make_node("Mul", ["memory", "half"], ["kept"]),
            helper.make_node("Add", ["kept", "layer"], ["result"]),
            helper.make_node("Squeeze", ["result", "first"], ["y"]),
        ],
        {"x": ("float32", ["B", "F"]), "memory": ("float32", [1, "B", 2]), "gain": ("float32", [])},
        {"y": ("float32", ["B", "F"]), "result": ("float32", [1, "B", 2])},
        {"half": np.array(0.5, np.float32), "first": np.array([0])},
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model from elsewhere, one of our own, and readings."""
    (tmp_path / "foreign.onnx").write_bytes(foreign().SerializeToString())
    (tmp_path / "own.onnx").write_bytes(
        stamped(
            smoother(),
            smoother_contract(
                features=(Feature("a", "m³/h", 0.0, 12.5), Feature("b")),
                memory=MEMORY,
                author="A. Team",
                description="Smooths two readings.",
                license="MIT",
                period_seconds=60.0,
                parity={"steps": 200, "max_abs_difference": 1e-7},
                producer="a test",
                detector=DETECTOR,
            ),
        )
    )
    (tmp_path / "m.csv").write_text("ts,flow,level,a,b\n0,1,2,1,2\n60,3,4,3,4\n120,5,6,5,6\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class TestModelsFromElsewhere:
    """`--state`, `--set` and `--features` say what a file does not."""

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            ((), "has no state pair"),
            (BY_HAND[:2], "there are ['x', 'gain']; fix a constant by constants={name: value} (--set name=value)"),
            (BY_HAND[:4], "say how many features by features=N (--features N)"),
            ((*BY_HAND[2:], "--state", "memory=nothing"), "state 'memory': the graph has no output 'nothing'"),
            ((*BY_HAND[:2], *BY_HAND[4:], "--set", "gian=3"), "'gian' is no input of the graph, it has ['x', 'memory'"),
            ((*BY_HAND[:4], "--features", "3"), "foreign.onnx: cannot step 2 streams at once"),
        ],
    )
    def test_what_is_not_said_is_asked_for(self, folder: Path, flags: tuple[str, ...], sentence: str) -> None:
        """Exit code 3, and the sentence names the flag that settles it."""
        assert sentence in fault(run("inspect", "foreign.onnx", *flags), 3)

    @pytest.mark.parametrize(
        ("flags", "sentence"),
        [
            (("--state", "memory"), "--state is 'memory': it must be name=value"),
            (("--set", "gain=loud"), "--set is 'gain=loud': the value must be a number, true or false, or a list"),
        ],
    )
    def test_a_flag_of_another_form_is_usage(self, folder: Path, flags: tuple[str, ...], sentence: str) -> None:
        """Exit code 2, before the file is read."""
        assert fault(run("inspect", "foreign.onnx", *flags), 2) == sentence

    def test_it_is_inspected(self, folder: Path) -> None:
        """What was found and what was said, as a contract."""
        result = run("inspect", "foreign.onnx", *BY_HAND, "--json")
        assert result.exit_code == 0, result
        document = json.loads(result.stdout)
        assert [feature["name"] for feature in document["features"]] == ["flow", "level"]
        assert document["states"] == [
            {
                "input": "memory",
                "output": "result",
                "shape": [1, 2],
                "batch_axis": 1,
                "dtype": "float32",
                "initial": 0.0,
                "lasting": False,
            }
        ]
        assert "memory" not in document

    def test_it_is_replayed(self, folder: Path) -> None:
        """Its outputs come out under their own names, stepped as numpy steps them."""
        result = run("replay", "--model", "foreign.onnx", "--data", "m.csv", "--out", "out.jsonl", *BY_HAND)
        assert result.exit_code == 0, result
        rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        assert [row["outputs"]["y"] for row in rows] == [[3.0, 6.0], [10.5, 15.0], [20.25, 25.5]]
        assert [row["warm"] for row in rows] == [None] * 3

    def test_it_is_verified(self, folder: Path) -> None:
        """Without a sequence file the rest is proven, and how soon it forgets is measured: to 1e-2 in 7 to 12 steps."""
        result = run("verify", "foreign.onnx", *BY_HAND, "--no-sequence")
        assert result.exit_code == 0, result
        words = result.stdout.split("forgets its past within ")[1].split()
        assert 7 <= int(words[0]) <= 12 and words[1:4] == ["steps", "to", "1e-2,"]

    def test_the_service_takes_the_same(self, folder: Path) -> None:
        """`run` has the flags, and prints them as the tables of a settings file."""
        needed = ("--bootstrap-servers", "b:1", "--input", "i", "--output", "o", "--app-id", "a")
        result = run("run", "--model", "foreign.onnx", *needed, *BY_HAND, "--print-config")
        assert 'states = { "memory" = "result:1" }' in result.stdout
        assert 'constants = { "gain" = 3 }' in result.stdout
        assert 'features = "flow,level"' in result.stdout
        assert "has no state pair" in fault(run("run", "--model", "foreign.onnx", *needed), 3)


class TestContracts:
    """`inspect` tells people all that programs read."""

    def test_everything_is_shown(self, folder: Path) -> None:
        """Each word of the contract, the curve, and no line wider than a terminal."""
        result = run("inspect", "own.onnx")
        assert result.exit_code == 0
        for words in (
            "smoother, version 1",
            "60 s",
            "largest difference 1e-07 over 200 steps",
            "from timestep 2 of a stream on",
            "Smooths two readings.",
            "A. Team",
            "a test",
            "MIT",
            "m³/h",
            "0 … 12.5",
            "forgets its past within 2 steps to 1e-2, within 50 to 1e-4, not within 4,096",
            "0.1 │██",
            "1                             10                           100",
            "error, others, range, stuck",
            "0.05 of the newest, which remembers about 20 timesteps",
            "top: the mean of the largest quarter of the features",
            "conformal: how few of the stream's own scores are as high",
            "per-stream: of each stream by itself",
            "one a stream in 10,080 timesteps (7 days)",
            "after 20 timesteps below the threshold",
            "from timestep 31 of a stream on",
        ):
            assert words in result.stdout, words
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert "4.125, from an exponential tail over 2.5, of scale 0.75, fitted to 12,345 scores" in " ".join(
            result.stdout.split()
        )

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"tail": None}, "4.125, counted on 12,345 scores"),
            ({"every": None, "quantile": 0.999}, "no budget: the threshold is above 0.999 of the scores"),
            ({"rule": "plain"}, "plain: the score itself"),
            ({"rule": "[bold]oracle"}, "[bold]oracle"),
            ({"threshold": "high", "evidence": "all", "tail": 5, "calm": None, "alpha": 0}, "detector"),
        ],
    )
    def test_a_detector_is_told_as_far_as_its_contract_goes(
        self, folder: Path, changes: dict[str, Any], sentence: str
    ) -> None:
        """Counted or fitted, by a budget or by a quantile; what is of another form is left out, and breaks nothing."""
        (folder / "odd.onnx").write_bytes(stamped(smoother(), smoother_contract(detector=DETECTOR | changes)))
        result = run("inspect", "odd.onnx")
        assert result.exit_code == 0
        assert sentence in " ".join(result.stdout.split())
        assert "days" not in result.stdout  # nobody knows how long a timestep is

    def test_programs_get_the_memory(self, folder: Path) -> None:
        """The document as it was stamped, null included."""
        assert json.loads(run("inspect", "own.onnx", "--json").stdout)["memory"] == MEMORY

    @pytest.mark.parametrize("command", ["inspect", "verify", "replay"])
    def test_a_contract_of_a_later_version_is_refused(self, folder: Path, command: str) -> None:
        """Exit code 3, the version, and what to do."""
        model = onnx.load("own.onnx")
        document = json.loads(smoother_contract().to_json()) | {"version": 2, "shiny": True}
        onnx.helper.set_model_props(model, {"statestep.contract": json.dumps(document)})
        onnx.save(model, "later.onnx")
        arguments = (
            ["--model", "later.onnx", "--data", "m.csv", "--out", "o.jsonl"] if command == "replay" else ["later.onnx"]
        )
        assert fault(run(command, *arguments), 3) == (
            "later.onnx: the model's contract has version 2, this release reads version 1: upgrade statestep"
        )

    def test_a_stream_says_when_it_is_warm(self, folder: Path) -> None:
        """False before the step that the memory names, true from it on; in tables as in JSON."""
        for out in ("out.jsonl", "out.csv"):
            assert run("replay", "--model", "own.onnx", "--data", "m.csv", "--out", out).exit_code == 0
        rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        assert [row["warm"] for row in rows] == [False, True, True]
        with (folder / "out.csv").open() as file:
            assert [row["warm"] for row in csv.DictReader(file)] == ["False", "True", "True"]

    def test_what_is_said_at_training_is_in_the_file(self, folder: Path) -> None:
        """Units, author, licence, description, a period; the horizon is measured on the readings that were given."""
        rng = np.random.default_rng(0)
        rows = "\n".join(f"{value:.4f},{value * 2:.4f}" for value in rng.normal(size=120).cumsum() / 5)
        (folder / "t.csv").write_text(f"a,b\n{rows}\n")
        about = (
            "--unit",
            "a=m³/h",
            "--author",
            "A. Team",
            "--license",
            "MIT",
            "--description",
            "Short.",
            "--period",
            "60",
        )
        small = ("--hidden", "2", "--epochs", "1")
        result = run("fit", "t.csv", "--features", "a,b", "--out", "fitted.onnx", *small, *about)
        assert result.exit_code == 0, result
        held = StepModel.load("fitted.onnx").contract
        said: dict[str, Any] = {"author": "A. Team", "license": "MIT", "description": "Short.", "period_seconds": 60.0}
        assert {name: getattr(held, name) for name in said} == said
        assert [feature.unit for feature in held.features] == ["m³/h", None]
        assert held.memory is not None and held.memory["readings"] == "given"

    def test_a_unit_of_no_feature_is_told_before_training(self, folder: Path) -> None:
        """Not after an hour of it."""
        sentence = fault(run("fit", "m.csv", "--features", "a,b", "--out", "f.onnx", "--unit", "c=bar"), 2)
        assert sentence == "--unit is of 'c': it must be of one of the features a, b"
