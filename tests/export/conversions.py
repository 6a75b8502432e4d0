"""One conversion as a test sees it: a graph, what is said of it, what must become of it, and what it computes itself.

The reference runs the graph as it was exported, by onnxruntime, with the axes that the case names: nothing of what
convert finds out is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from statestep.export.convert import Converted, convert
from statestep.export.errors import ExportError
from statestep.runtime import ModelError, session_options

MODELS = Path(__file__).resolve().parents[1] / "fixtures" / "models"
SOURCES = {
    "keras": "Keras 3",
    "tf2onnx": "tf2onnx",
    "torch": "torch, dynamo exporter",
    "legacy": "torch, legacy exporter",
    "hand": "by hand",
}
DTYPES = {"float": np.float32, "double": np.float64, "int64": np.int64, "int32": np.int32, "bool": np.bool_}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """A graph to convert. `inputs` and `outputs` have each tensor's axes in letters: T, B, F, others for what is left.

    An input without T is a state of zeros, or the lengths. An output with R has one axis of all rows, those of a
    timestep side by side; with Q those of a stream. `refused` is a phrase of the sentence, empty where it converts.
    """

    name: str
    what: str
    graph: Callable[[], bytes]
    inputs: Mapping[str, str] = field(default_factory=lambda: {"x": "TBF"})
    outputs: Mapping[str, str] = field(default_factory=lambda: {"y": "TBO"})
    settings: Mapping[str, Any] = field(default_factory=dict)  # of `convert`
    refused: str = ""
    tokens: int = 0  # how many whole numbers an input of them may hold
    batch: int | None = None  # the only batch that it runs at, where its input does not say so

    @property
    def source(self) -> str:
        """Who made the graph."""
        return SOURCES.get(self.name.split("_")[0], SOURCES["hand"])


@dataclass(frozen=True)
class Outcome:
    """What became of a case: files, or the sentence of a refusal."""

    case: Case
    folder: Path
    made: Converted | None = None
    sentence: str = ""

    @property
    def files(self) -> list[str]:
        """What was written."""
        return sorted(path.name for path in self.folder.iterdir())


def outcome_of(case: Case, folder: Path) -> Outcome:
    """Convert a case into an empty folder."""
    source = folder.parent / f"{folder.name}.original"
    source.write_bytes(case.graph())
    try:
        return Outcome(case, folder, convert(source, folder / "step.onnx", **case.settings))
    except (ExportError, ModelError) as error:
        return Outcome(case, folder, sentence=str(error).removeprefix(f"{source}: "))


class Original:
    """The graph of a case on readings x [T, B, F]."""

    def __init__(self, case: Case):
        self.case = case
        options = session_options()
        self.session = onnxruntime.InferenceSession(case.graph(), options, providers=["CPUExecutionProvider"])
        self.entering = {node.name: node for node in self.session.get_inputs()}

    def size(self, letter: str, otherwise: int) -> int:
        """How long an axis of the inputs is, where the graph fixes it."""
        for name, axes in self.case.inputs.items():
            if letter in axes and isinstance(size := self.entering[name].shape[axes.index(letter)], int):
                return size
        return otherwise

    @property
    def widths(self) -> dict[str, int]:
        """The columns of each input of readings, in the graph's order."""
        axes = {name: self.case.inputs[name] for name in self.entering if name in self.case.inputs}
        return {n: self.entering[n].shape[a.index("F")] if "F" in a else 1 for n, a in axes.items() if "T" in a}

    def readings(self, steps: int, streams: int, seed: int) -> Array:
        """Random readings of a size that the graph takes: float32 [T, B, F]."""
        rng = np.random.default_rng(seed)
        shape = self.size("T", steps), self.case.batch or self.size("B", streams), sum(self.widths.values())
        if self.case.tokens:
            return rng.integers(0, self.case.tokens, shape).astype(np.float32)
        return rng.standard_normal(shape).astype(np.float32)

    def feeds(self, x: Array) -> dict[str, Array]:
        """x [T, B, F] as the graph's inputs."""
        feeds, first = {}, 0
        sizes = {"T": x.shape[0], "B": x.shape[1]}
        for name, width in self.widths.items():
            axes, dtype = self.case.inputs[name], self._dtype(name)
            part = x[:, :, first : first + width].astype(dtype)  # [T, B, W]
            part = part if "F" in axes else part[:, :, 0]
            feeds[name] = np.ascontiguousarray(part.transpose(["TBF".index(letter) for letter in axes]))
            first += width
        for name, axes in self.case.inputs.items():
            if name not in feeds and name in self.entering:
                shape = [sizes.get(a, size) for a, size in zip(axes, self.entering[name].shape, strict=True)]
                fill = x.shape[0] if axes == "B" else 0
                feeds[name] = np.full(shape, fill, self._dtype(name))
        return feeds

    def run(self, x: Array) -> dict[str, Array]:
        """x [T, B, F] → every output as [T, B, …], or [B, …] of one that answers for the last row alone."""
        names = list(self.case.outputs)
        given = dict(zip(names, self.session.run(names, self.feeds(x)), strict=True))
        return {name: laid_out(given[name], axes, *x.shape[:2]) for name, axes in self.case.outputs.items()}

    def _dtype(self, name: str) -> Any:
        return DTYPES[self.entering[name].type.removeprefix("tensor(").removesuffix(")")]


def laid_out(value: Array, axes: str, steps: int, streams: int) -> Array:
    """A tensor whose axes are named → [T, B, …], or [B, …] without time."""
    for letter, front in (("R", (steps, streams)), ("Q", (streams, steps))):
        if letter in axes:
            apart = np.moveaxis(value, axes.index(letter), 0)
            apart = apart.reshape(*front, *apart.shape[1:])
            return apart if letter == "R" else apart.swapaxes(0, 1)
    leading = [axes.index(letter) for letter in "TB" if letter in axes]
    return np.ascontiguousarray(value.transpose([*leading, *(a for a in range(value.ndim) if a not in leading)]))


def fixtures() -> list[Case]:
    """The models that other exporters made."""
    cases = []
    for entry in json.loads((MODELS / "catalogue.json").read_text()):
        inputs, outputs = entry["inputs"], entry["outputs"]
        cases.append(
            Case(
                entry["name"],
                entry["what"],
                (MODELS / f"{entry['name']}.onnx").read_bytes,
                inputs,
                outputs,
                refused="" if entry["expect"] == "converts" else ": ",
                tokens=7 * ("BT" in inputs.values()),
                batch=3 if entry["name"] == "keras_gru_stateful" else None,
            )
        )
    return cases
