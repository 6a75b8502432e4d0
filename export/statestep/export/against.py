"""A step model against the sequence file beside it: one run over whole sequences, row for row the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort

from statestep.export.compare import TOLERANCE, Array, Outputs, first_difference
from statestep.export.errors import first_line
from statestep.export.stepping import VECTOR_TAILS
from statestep.export.surgery import bodies, nodes_of
from statestep.runtime import Contract, ModelError, guard, session_options

# Operators that compute a row in another order among many than alone, and so in other last bits.
ROUNDING = frozenset({"RNN", "Conv", *VECTOR_TAILS})


def sequence_path(model: str | Path) -> Path:
    """Where the whole-sequence form of a step model lies.

    >>> sequence_path("models/pump.onnx").name
    'pump.sequence.onnx'
    """
    return Path(model).with_suffix(".sequence.onnx")


@dataclass(frozen=True, slots=True)
class SequenceFile:
    """`<name>.sequence.onnx`: x [T, B, F] → outputs [T, B, …], or [B, …] of one that answers for the last row only."""

    name: str
    session: Any
    steps: int | None  # the timesteps and streams that it is fixed at
    streams: int | None
    rounds: tuple[str, ...]  # the operators of `ROUNDING` in it

    @classmethod
    def load(cls, path: Path) -> SequenceFile:
        """Raises `ModelError` for a file that is no ONNX model."""
        data = guard.read(path)
        model = guard.parse(data, str(path))
        try:
            session = ort.InferenceSession(data, session_options(), providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
            raise ModelError(f"{path}: onnxruntime cannot load it: {first_line(error)}") from None
        sizes = [size if isinstance(size, int) else None for size in session.get_inputs()[0].shape[:2]]
        return cls(path.name, session, sizes[0], sizes[1], rounding(model))

    def fits(self, x: Array) -> bool:
        """Whether x [T, B, F] is of a size that the file takes."""
        return self.steps in (None, len(x)) and self.streams in (None, x.shape[1])

    def run(self, x: Array, names: Sequence[str]) -> Outputs:
        """x [T, B, F] → outputs by name."""
        given = self.session.run(list(names), {self.session.get_inputs()[0].name: x})
        return dict(zip(names, given, strict=True))

    def absent(self, names: Sequence[str]) -> str | None:
        """The first of `names` that is no output of the file."""
        there = {node.name for node in self.session.get_outputs()}
        return next((name for name in names if name not in there), None)


def rounding(model: onnx.ModelProto) -> tuple[str, ...]:
    """The operators of a graph that compute a row in another order among many than alone.

    A matrix product does where its weights are carried round a Loop: they are not laid out beforehand then.
    """
    nodes = list(nodes_of(model.graph))
    padded = {node.output[0] for node in nodes if node.op_type == "Pad"}  # rows that fill whole vectors leave no rest
    found = {n.op_type for n in nodes if not (n.op_type in VECTOR_TAILS and n.input[0] in padded)} & ROUNDING
    loops = [body for node in nodes_of(model.graph) if node.op_type == "Loop" for body in bodies(node)]
    if any(node.op_type in ("MatMul", "Gemm") for body in loops for node in nodes_of(body)):
        found.add("Loop")
    return tuple(sorted(found))


def difference_from(
    contract: Contract, outputs: Outputs, whole: Outputs, unit: Mapping[str, Array] | None = None
) -> str | None:
    """The first timestep at which `outputs` [T, B, …] differ from those of whole sequences; without `unit` to the bit.

    One of `whole` may be [B, …], the answer for the last row alone.
    """
    truth = {name: value if value.ndim == outputs[name].ndim else value[None] for name, value in whole.items()}
    ours = {name: outputs[name][-len(value) :] for name, value in truth.items()}
    return first_difference(contract, ours, truth, unit)


def against(
    contract: Contract,
    file: SequenceFile,
    sequences: Sequence[Array],
    stepped: Sequence[Outputs],
    unit: Sequence[Mapping[str, Array]],
) -> tuple[bool, str]:
    """Whether each of `stepped` is what the file gives for `sequences` [T, B, F], and the finding in a phrase.

    Bit for bit; within a tolerance, in `unit`, where an operator rounds in its own way.
    """
    names = [output.name for output in contract.outputs]
    if name := file.absent(names):
        return False, f"the sequence file {file.name!r} has no output {name!r}"
    count = 0
    for which, (x, outputs) in enumerate(zip(sequences, stepped, strict=True)):
        if not file.fits(x):
            continue
        difference = difference_from(contract, outputs, file.run(x, names), unit[which] if file.rounds else None)
        if difference:
            return False, f"{difference} (stepped, then as one sequence of {len(x)} × {x.shape[1]})"
        count += len(x)
    how = "bit-equal"
    if file.rounds:
        how = f"within {TOLERANCE:g} standard deviations ({', '.join(file.rounds)} rounds each row in its own way)"
    sizes = "1 to 64 streams"
    if file.steps or file.streams:
        sizes = f"the {file.steps or 'T'} × {file.streams or 'B'} that the sequence file is fixed at"
    return True, f"{how} over {count:,} timesteps, {sizes}"
