"""Proof, on this machine and with the very runtime that will run it, that a step model does what its contract says.

1. *Finite.* Every output is a finite number for finite readings.
2. *Streaming is offline.* Stepped by the engine = one run of the sequence file over the whole sequence.
3. *Batches do not matter.* Every batch size and composition gives each stream the same bits.
4. *torch agrees*, where it is installed and the weights lie beside the model.

It reports how soon the model forgets, measured where its contract does not say it, and how fast it is.

It needs no torch itself, prints nothing and writes nothing: it returns a `Report`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from statestep.export import histories
from statestep.export.against import SequenceFile, against, sequence_path
from statestep.export.compare import Array, Outputs, first_difference, place_in_words, units
from statestep.export.errors import DataError
from statestep.export.horizon import in_words, memory
from statestep.export.laws import COMPANY, LawBroken, company_does_not_matter, order_does_not_matter
from statestep.export.readings import drawn, finite_rows
from statestep.export.suite import torch_beside
from statestep.runtime import Contract, ModelError, StepModel

Units = Mapping[str, Array]

SHAPES = ((1, 1), (2, 7), (200, 1), (64, 2), (48, 64))  # (T, B) of the drawn sequences
COMPANY_STEPS = 6
DATA_STEPS = 20_000  # timesteps of the given data that are stepped, over all streams
TORCH_STEPS = 400  # timesteps of each stream that torch runs: its recurrences are plain loops
TORCH_STREAMS = 8
WINDOWS = 2_000  # windows that are compared with streaming, evenly spread over the data
SPEED_BATCHES = (1, 64, 1024)
SPEED_SECONDS = 0.15  # for each batch size


@dataclass(frozen=True, slots=True)
class Check:
    """One claim. `passed` is None where it could not be checked or only reports."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Speed:
    """How long a step of `batch` streams takes on one core of this machine."""

    batch: int
    microseconds: float  # a step of the whole batch


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found. For the contract: `parity`, steps and largest difference from torch in sensor units, and
    `memory`, how soon it forgets."""

    name: str
    fingerprint: str
    checks: tuple[Check, ...]
    speeds: tuple[Speed, ...]
    parity: dict[str, float] | None = None
    memory: Mapping[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.passed is False]


def verify(
    model: str | Path,
    data: Mapping[str, Array] | None = None,
    *,
    window: int | None = None,
    sequence: bool = True,
    torch_model: Callable[[Array], Outputs] | None = None,
    loaded: StepModel | None = None,
    seed: int = 0,
) -> Report:
    """Check the step model at `model`, on `data` (stream → raw readings [T, F]) and on sequences drawn from `seed`.

    `window` also reports how far predictions from windows of that many timesteps are from streamed ones.
    `sequence=False` does without the sequence file; otherwise its absence is a failure. `torch_model` is the torch
    reference, x [T, B, F] → outputs [T, B, …]; by default it is read from `<name>.pt`. `loaded` is the model, where it
    was loaded with states or constants said by hand. Rows of `data` that hold a NaN
    are passed by, as the service would send them to the dead letters.

    Raises `ModelError` for a file that is no step model and `DataError` for data of another shape.
    """
    step = loaded or StepModel.load(model)
    rng = np.random.default_rng(seed)
    streams = finite_rows(step.contract, data)
    file = SequenceFile.load(path) if sequence and (path := sequence_path(model)).exists() else None
    fixed = () if file is None else ((file.steps or 20, file.streams or 2),)  # a file may be fixed at some sizes
    made = [drawn(step.contract, steps, batch, rng) for steps, batch in (*SHAPES, *fixed)]
    given = _cut(streams, DATA_STEPS)
    sequences = [*made, *given]  # each [T, B, F]
    stepped = [histories.stepped(step, x) for x in sequences]
    unit: list[Units] = []
    for own in (slice(None, len(made)), slice(len(made), None)):
        if sequences[own]:
            unit += [units(step.contract, sequences[own], stepped[own])] * len(sequences[own])
    checks = [_finite(step.contract, stepped)]
    if sequence:
        checks.append(_offline(step.contract, file, sequence_path(model), sequences, stepped, unit))
    checks.append(_company(step, rng))
    torch_check, parity = _torch(step.contract, Path(model), torch_model, sequences, stepped, unit)
    checks.append(torch_check)
    if window is not None:
        checks.append(_windowed(step, window, streams or {"drawn": drawn(step.contract, 2_000, 1, rng)[:, 0]}))
    remembered = step.contract.memory or memory(step, streams, seed=seed)
    checks.append(Check("memory", None, in_words(remembered)))
    speeds = tuple(_speed(step, batch, rng) for batch in SPEED_BATCHES)
    return Report(step.contract.name, step.fingerprint, tuple(checks), speeds, parity, remembered)


def _cut(streams: Mapping[str, Array], budget: int) -> list[Array]:
    """Streams as sequences [T, 1, F], each from its beginning, with no more than `budget` timesteps in all."""
    share = max(budget // max(len(streams), 1), 2)
    return [x[:share, None] for x in list(streams.values())[: budget // share]]


def _finite(contract: Contract, stepped: Sequence[Outputs]) -> Check:
    name = "finite outputs"
    for outputs in stepped:
        for output, value in outputs.items():
            if not np.isfinite(value).all():
                place = np.argwhere(~np.isfinite(value))[0]
                return Check(name, False, f"{place_in_words(contract, output, place)} is not a finite number")
    return Check(name, True, f"{sum(len(next(iter(o.values()))) for o in stepped):,} timesteps")


def _offline(
    contract: Contract,
    file: SequenceFile | None,
    path: Path,
    sequences: Sequence[Array],
    stepped: Sequence[Outputs],
    unit: Sequence[Units],
) -> Check:
    name = "streaming = offline"
    if file is None:
        return Check(name, False, f"there is no sequence file {path.name!r} beside the model to check it against")
    return Check(name, *against(contract, file, sequences, stepped, unit))


def _company(model: StepModel, rng: np.random.Generator) -> Check:
    """Each stream alone, then among others: in batches of every size, shuffled, and interleaved at random."""
    name = "batches do not matter"
    x = drawn(model.contract, COMPANY_STEPS, max(COMPANY), rng)  # [T, N, F]
    try:
        company_does_not_matter(model, x)
        order_does_not_matter(model, x)
    except LawBroken as broken:
        return Check(name, False, broken.detail)
    return Check(name, True, f"bit-equal at batch 1, {', '.join(map(str, COMPANY))}, shuffled and interleaved")


def _torch(
    contract: Contract,
    path: Path,
    reference: Callable[[Array], Outputs] | None,
    sequences: Sequence[Array],
    stepped: Sequence[Outputs],
    unit: Sequence[Units],
) -> tuple[Check, dict[str, float] | None]:
    name = "torch agrees"
    weights = path.with_suffix(".pt")
    reference = reference or torch_beside(path)
    if reference is None:
        why = "torch is not installed" if weights.exists() else f"there is no {weights.name!r} beside the model"
        return Check(name, None, f"not checked: {why}"), None
    prediction = _named(contract)
    steps, largest, relative = 0, 0.0, 0.0
    for x, outputs, scale in zip(sequences, stepped, unit, strict=True):
        x = x[:TORCH_STEPS, :TORCH_STREAMS]
        theirs = reference(x)
        ours = {key: value[: len(x), : x.shape[1]] for key, value in outputs.items() if key in theirs}
        difference = first_difference(contract, ours, theirs, scale)
        if difference:
            return Check(name, False, f"{difference} (onnxruntime, then torch)"), None
        gap = np.abs(ours[prediction] - theirs[prediction])  # [T, B, K]
        steps, largest = steps + len(x), max(largest, float(gap.max()))
        relative = max(relative, float((gap / scale[prediction]).max()))
    detail = f"within {relative:.1g} standard deviations over {steps:,} timesteps"
    return Check(name, True, detail), {"steps": steps, "max_abs_difference": float(f"{largest:.2g}")}


def _windowed(model: StepModel, window: int, streams: Mapping[str, Array]) -> Check:
    """Predictions of a fresh state after the last `window` rows, against those of a state carried since the start."""
    name = f"windows of {window}"
    if window < 1:
        raise DataError(f"window is {window}, it must be 1 timestep or more")
    prediction = _named(model.contract)
    usable = {key: x for key, x in streams.items() if len(x) > window}
    if not usable:
        longest = max((len(x) for x in streams.values()), default=0)
        return Check(name, None, f"not compared: the longest stream has {longest} rows")
    stride = max(sum(len(x) - window for x in usable.values()) // WINDOWS, 1)
    gaps = []
    whole = [histories.stepped(model, x[:, None]) for x in usable.values()]
    unit = units(model.contract, [x[:, None] for x in usable.values()], whole)[prediction]  # [K]
    for x, streamed in zip(usable.values(), whole, strict=True):
        ends = np.arange(window, len(x), stride)  # [n] the last row of each window; before `window` both are the same
        rows = x[ends[None] - window + 1 + np.arange(window)[:, None]]  # [window, n, F]
        fresh = histories.stepped(model, rows)[prediction][-1]  # [n, K]
        gaps.append((fresh - streamed[prediction][ends, 0]) / unit)
    gap = np.concatenate(gaps)  # [windows, K]
    rms = float(np.sqrt(np.mean(gap.astype(np.float64) ** 2)))
    return Check(
        name, None, f"differ from streaming by {rms:.2g} standard deviations (RMS), {np.abs(gap).max():.2g} at most"
    )


def _named(contract: Contract) -> str:
    """The output that is the prediction of named features."""
    output = contract.output("prediction")
    if output is None or output.features is None:
        raise ModelError(f"model {contract.name!r} names no output as its prediction of features: nothing to compare")
    return output.name


def _speed(model: StepModel, batch: int, rng: np.random.Generator) -> Speed:
    """The median call."""
    x = drawn(model.contract, 1, batch, rng)[0]  # [B, F]
    states = [np.stack([state] * batch) for state in model.initial_states()]
    model.step(x, states)
    laps: list[float] = []
    begin = time.perf_counter()
    while (before := time.perf_counter()) - begin < SPEED_SECONDS:
        model.step(x, states)
        laps.append(time.perf_counter() - before)
    return Speed(batch, float(np.median(laps)) * 1e6)
