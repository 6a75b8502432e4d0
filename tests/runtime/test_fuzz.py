"""Damaged and adversarial model files: thousands of mutants, each loaded and stepped where production first loads it.

What is asserted of every mutant: it loads, or is refused in one sentence. Its process does not die by a signal and
is not stopped for its time or memory, except by what only running can tell: a Loop that goes on for ever.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from statestep.consumers import first_load
from statestep.consumers.bench_model import lstm_step
from statestep.runtime import ModelError

from ..models import Array, detector, graph, smoother_contract, stamped
from .mutations import every_node, mutate

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "consumers" / "statestep" / "consumers" / "models"
EXPORTED = ROOT / "tests" / "fixtures" / "models"
MUTANTS = 3_200
WORKERS = 2
LIMITS = first_load.Limits(seconds=2.0, memory_bytes=256 << 20)
SECONDS = 400  # for a worker; it takes about thirty on a quiet machine
FINE, REFUSED = 0, 3
STOPPED = (None, first_load.NO_MEMORY, -signal.SIGABRT)  # for time, for memory, for memory inside of onnxruntime


def looping() -> bytes:
    """A step model whose state goes through an If and a Loop, and whose weight is kept as float16."""
    value = helper.make_tensor_value_info
    shape: list[str | int | None] = ["B", 2]
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["carried", "half32"], ["next_carried"]),
            helper.make_node("Identity", ["go"], ["go_on"]),
        ],
        "body",
        [value("turn", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("carried", 1, shape)],
        [value("go_on", TensorProto.BOOL, []), value("next_carried", 1, shape)],
    )
    same = helper.make_graph([helper.make_node("Identity", ["looped"], ["a"])], "same", [], [value("a", 1, shape)])
    other = helper.make_graph([helper.make_node("Neg", ["looped"], ["b"])], "other", [], [value("b", 1, shape)])
    nodes = [
        helper.make_node("Cast", ["half"], ["half32"], to=1),
        helper.make_node("Loop", ["turns", "always", "h"], ["looped"], body=body),
        helper.make_node("If", ["always"], ["kept"], then_branch=same, else_branch=other),
        helper.make_node("Add", ["kept", "x"], ["next_h"]),
        helper.make_node("Identity", ["next_h"], ["y"]),
    ]
    weights: dict[str, Array] = {
        "half": np.array(0.5, np.float16),
        "turns": np.array(3, np.int64),
        "always": np.array(True),
    }
    model = graph(
        nodes,
        {"x": ("float32", ["B", 2]), "h": ("float32", ["B", 2])},
        {"y": ("float32", ["B", 2]), "next_h": ("float32", ["B", 2])},
        weights,
    )
    return stamped(model, smoother_contract())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real files: the one that is shipped, of three exporters, and by hand with every kind of subgraph and type."""
    place = tmp_path_factory.mktemp("models")
    for name in ("pump.onnx", "pump.sequence.onnx"):
        (place / name).write_bytes((SHIPPED / name).read_bytes())
    for name in ("keras_gru", "torch_scan", "legacy_loop", "torch_gru"):
        (place / f"{name}.sequence.onnx").write_bytes((EXPORTED / f"{name}.onnx").read_bytes())
    (place / "detector.onnx").write_bytes(detector(others=True))
    (place / "lstm.onnx").write_bytes(lstm_step(3, 4, 2))
    (place / "looping.onnx").write_bytes(looping())
    return place


@pytest.fixture(scope="module")
def endings(folder: Path) -> list[dict[str, Any]]:
    """How every mutant ended. The workers have one thread each, and are warm: a mutant costs a fork."""
    share = MUTANTS // WORKERS
    environ = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runtime.fuzz_worker", str(folder)]
    workers = [
        subprocess.Popen(
            [*command, str(share * number), str(share * (number + 1))],
            cwd=ROOT,
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(WORKERS)
    ]
    found: list[dict[str, Any]] = []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=SECONDS)
            assert (worker.returncode, err) == (0, ""), err
            found += [json.loads(line) for line in out.splitlines()]
    finally:
        for worker in workers:
            worker.kill()
    return found


def test_the_unharmed_files_run(folder: Path) -> None:
    """What the mutants are made of loads, so that a refusal is the damage's."""
    from .fuzz_worker import run_mutant

    for path in sorted(folder.glob("*.onnx")):
        run_mutant(path.name, path.read_bytes())


def mutant(folder: Path, ending: dict[str, Any]) -> bytes:
    return mutate((folder / ending["file"]).read_bytes(), ending["seed"])[1]


def stopped_in_a_loop(folder: Path, ending: dict[str, Any]) -> bool:
    """Whether a child was stopped, and had a Loop that may have gone on."""
    return ending["code"] in STOPPED and any(
        node.op_type == "Loop" for node in every_node(onnx.load_model_from_string(mutant(folder, ending)).graph)
    )


def test_every_mutant_loads_or_is_refused(folder: Path, endings: list[dict[str, Any]]) -> None:
    """No signal, no limit reached, no fault that is not a `ModelError`; the seed of one that did otherwise is shown."""
    assert len(endings) == MUTANTS >= 3_000
    bad = [e for e in endings if e["code"] not in (FINE, REFUSED) and not stopped_in_a_loop(folder, e)]
    bad += [e for e in endings if e["code"] == REFUSED and not e["said"].startswith(f"{e['file']}: ")]
    assert not bad, bad[:5]


def test_the_mutants_are_worth_it(endings: list[dict[str, Any]]) -> None:
    """Many get past the parser, the guard and onnxruntime each, so that all three have been tried."""
    said = [e["said"].removeprefix(f"{e['file']}: ") for e in endings]
    kinds = {
        "no protobuf": sum(sentence.startswith("is not an ONNX file") for sentence in said),
        "the guard": sum(sentence.startswith(("holds ", "uses ", "has ", "declares ")) for sentence in said),
        "onnxruntime": sum("onnxruntime" in sentence or "ONNXRuntime" in sentence for sentence in said),
        "nobody": sum(e["code"] == FINE for e in endings),
    }
    assert min(kinds.values()) > 100, kinds


def test_every_refusal_is_one_printable_sentence(endings: list[dict[str, Any]]) -> None:
    """Names from the file cannot break the line, steer a terminal, or stretch it without end."""
    for ending in endings:
        assert ending["said"].isprintable(), ending
        assert len(ending["said"]) < 2_000, ending


def test_what_only_running_tells_is_refused_in_production(folder: Path, endings: list[dict[str, Any]]) -> None:
    """A mutant that ended by a limit is a model error, no more, to the process that loads it."""
    ended = [e for e in endings if e["code"] not in (FINE, REFUSED)]
    assert ended
    for ending in ended[:1]:
        kind: first_load.Kind = "graph" if ".sequence." in ending["file"] else "step"
        with pytest.raises(ModelError, match=r"a process of its own|of memory"):
            first_load.rehearse(
                mutant(folder, ending), ending["file"], kind=kind, limits=first_load.Limits(2.0, 256 << 20)
            )
