"""A warm process that damages model files, and loads and steps each mutant in a fork of itself.

    python -m tests.runtime.fuzz_worker FOLDER FIRST LAST

takes the .onnx files of FOLDER in turn, a seed for each from FIRST up to LAST, and prints a line of JSON a mutant:
file, seed, how it was damaged, how the child ended, what it said. The child is the one in which production first
loads a file. This process has no thread of Python's own, so that forking it is safe.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from statestep.consumers import first_load
from statestep.runtime import ModelError, StepModel, guard, session_options

from .mutations import mutate

LIMITS = first_load.Limits(seconds=3.0, memory_bytes=512 << 20)
WHOLE = ".sequence."  # in the name of a file that holds a graph over whole sequences


def main() -> None:
    folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.onnx"))}
    for seed in range(first, last):
        name = sorted(files)[seed % len(files)]
        how, data = mutate(files[name], seed)
        code, said = first_load.in_fork(functools.partial(run_mutant, name, data), LIMITS)
        print(json.dumps({"file": name, "seed": seed, "how": how, "code": code, "said": said}), flush=True)


def run_mutant(name: str, data: bytes) -> None:
    """Load a model and run it. Raises `ModelError`, or whatever a model must not be able to bring about."""
    if WHOLE in name:
        _run_whole(name, data)
        return
    model = StepModel(data, name=name)
    rng = np.random.default_rng(0)
    for rows in (1, 5):
        x = rng.normal(size=(rows, len(model.contract.features))).astype(model.contract.input_dtype)
        states: Sequence[Any] = [np.stack([value] * rows) for value in model.initial_states()]
        for _ in range(2):
            try:
                _, states = model.step(x, states)
            except Exception:  # onnxruntime refuses a step by classes of its own, and that is no crash
                break


def _run_whole(name: str, data: bytes) -> None:
    """A graph over [T, B, F] or [B, T, F], as `verify` and `convert` run it."""
    guard.parse(data, name)
    try:
        session = ort.InferenceSession(data, session_options(), providers=["CPUExecutionProvider"], enable_fallback=0)
        session.run(None, {node.name: np.ones((3, 2, 3), np.float32) for node in session.get_inputs()})
    except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
        raise ModelError(f"{name}: onnxruntime cannot run it: {guard.first_line(error)}") from None


if __name__ == "__main__":
    main()
