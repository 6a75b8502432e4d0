"""The laws of a step model, as functions to call on your own: each returns in silence or raises `LawBroken`.

A law takes a model, or anything that steps as one does, and readings x [T, B, F]: T timesteps of B streams. It runs
them through the engine that runs the model in service. `laws_of` has them all, made ready for a file.

Numbers must be equal to the bit. Where a kernel rounds a row alone otherwise than among others, a `tolerance` may be
given: in standard deviations, of the readings for an output in their units, of the output itself for one of its own
kind. These are x's own; `spread_of` gives other readings, where x is too short to have a spread. A score squares a
difference over a small spread: it must then be equal within a thousandth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from statestep.export.against import SequenceFile, difference_from
from statestep.export.compare import TOLERANCE, Array, Outputs, units
from statestep.export.errors import DataError
from statestep.export.histories import advanced, alone, in_batches, interleaved, keys_of, stacked, stepped
from statestep.runtime import Contract, Engine, Model, Records

Reference = Callable[[Array], Outputs]  # x [T, B, F] → outputs by name, [T, B, …] or [B, …] for the last row alone

COMPANY = (2, 3, 7, 16, 64, 257)  # batch sizes that must give the bits of batch 1


class LawBroken(AssertionError):
    """A law does not hold: `law` is its name, `detail` says where, with both values."""

    def __init__(self, law: Callable[..., None], detail: str):
        self.law = name_of(law)
        self.detail = detail
        super().__init__(f"{self.law}: {detail}")


def name_of(law: Callable[..., None]) -> str:
    """A law's name, for people.

    >>> name_of(streaming_is_offline)
    'streaming is offline'
    """
    return law.__name__.replace("_", " ")


def outputs_are_finite(model: Model, x: Array) -> None:
    """Finite readings give finite numbers, in outputs and in states.

    >>> from importlib.resources import files
    >>> from statestep.runtime import StepModel
    >>> from statestep.export.readings import drawn
    >>> pump = StepModel.load(files("statestep.consumers") / "models" / "pump.onnx")
    >>> outputs_are_finite(pump, drawn(pump.contract, 20, 3, np.random.default_rng(0)))
    """
    engine, keys = Engine(model, max_streams=x.shape[1]), keys_of(x)
    for step, row in enumerate(x, 1):
        rejected = engine.advance(keys, row).rejected  # [B]
        if rejected.any():
            stream = int(np.argmax(rejected))
            engine.rollback()
            found = _not_finite(engine, keys[stream], row[stream])
            raise LawBroken(outputs_are_finite, f"step {step}, stream {stream + 1}: {found}")
        engine.commit()


def streaming_is_offline(
    model: Model,
    sequence: str | Path | SequenceFile | Reference,
    x: Array,
    tolerance: float = 0.0,
    *,
    spread_of: Array | None = None,
) -> None:
    """Stepped timestep by timestep, every stream gets the numbers of one run over its whole sequence.

    `sequence` is the sequence file, or a function of x that gives every output. Raises `DataError` for an x of another
    size than the file is fixed at.

    >>> from importlib.resources import files
    >>> from statestep.runtime import StepModel
    >>> from statestep.export.readings import drawn
    >>> models = files("statestep.consumers") / "models"
    >>> pump = StepModel.load(models / "pump.onnx")
    >>> x = drawn(pump.contract, 20, 3, np.random.default_rng(0))
    >>> streaming_is_offline(pump, models / "pump.sequence.onnx", x)
    >>> streaming_is_offline(pump, lambda x: {"prediction": x}, x)
    Traceback (most recent call last):
    statestep.export.laws.LawBroken: streaming is offline: the whole sequence has no output 'expected'
    """
    names = [output.name for output in model.contract.outputs]
    if isinstance(sequence, str | Path):
        sequence = SequenceFile.load(Path(sequence))
    if isinstance(sequence, SequenceFile):
        if not sequence.fits(x):
            fixed = f"{sequence.steps or 'T'} × {sequence.streams or 'B'}"
            raise DataError(f"x is {len(x)} × {x.shape[1]} (T × B) and {sequence.name} is fixed at {fixed}: cut it so")
        absent = sequence.absent(names)
        whole = {} if absent else sequence.run(x, names)
    else:
        given = sequence(x)
        absent = next((name for name in names if name not in given), None)
        whole = {name: given[name] for name in names if name in given}
    if absent:
        raise LawBroken(streaming_is_offline, f"the whole sequence has no output {absent!r}")
    unit = _unit(model, x if spread_of is None else spread_of, tolerance)
    _same(streaming_is_offline, model, stepped(model, x), whole, "stepped, then as one sequence", unit)


def agrees_with(
    model: Model, reference: Reference, x: Array, tolerance: float = TOLERANCE, *, spread_of: Array | None = None
) -> None:
    """Stepped, a model gives what a reference computes, for those outputs that the reference names.

    It may compute in float64: its numbers are compared as the model's dtype. Flags are not compared: one may tip where
    the number that it follows from only rounds. Raises ValueError for a reference that gives no number of the model's.

    >>> from importlib.resources import files
    >>> from statestep.runtime import StepModel
    >>> from statestep.export.readings import drawn
    >>> models = files("statestep.consumers") / "models"
    >>> pump, whole = StepModel.load(models / "pump.onnx"), SequenceFile.load(models / "pump.sequence.onnx")
    >>> x = drawn(pump.contract, 20, 3, np.random.default_rng(0))
    >>> agrees_with(pump, lambda x: whole.run(x, ["prediction"]), x)
    """
    ours, theirs = stepped(model, x), reference(x)
    cast = {name: np.asarray(theirs[name]).astype(value.dtype) for name, value in ours.items() if name in theirs}
    if not any(value.dtype.kind == "f" for value in cast.values()):
        raise ValueError(f"the reference gives {list(theirs)}, none of them numbers that {model.contract.name!r} gives")
    unit = _unit(model, x if spread_of is None else spread_of, tolerance)
    _same(agrees_with, model, ours, cast, "stepped, then the reference", unit)


def company_does_not_matter(
    model: Model, x: Array, *, sizes: Sequence[int] = COMPANY, seed: int = 0, tolerance: float = 0.0
) -> None:
    """A stream's numbers are those that it gets alone, whoever shares its batch, and however many they are.

    >>> from importlib.resources import files
    >>> from statestep.runtime import StepModel
    >>> from statestep.export.readings import drawn
    >>> pump = StepModel.load(files("statestep.consumers") / "models" / "pump.onnx")
    >>> company_does_not_matter(pump, drawn(pump.contract, 5, 64, np.random.default_rng(0)))
    """
    _need(company_does_not_matter, x, steps=1, streams=2)
    rng, expected, unit = np.random.default_rng(seed), alone(model, x), _unit(model, x, tolerance)
    for size in sizes:
        among = in_batches(model, x, size, rng)
        _same(company_does_not_matter, model, among, expected, f"in a batch of {size}, then alone", unit)


def order_does_not_matter(model: Model, x: Array, *, seed: int = 0, tolerance: float = 0.0) -> None:
    """Streams interleaved at random, in calls of random size, get the numbers that each gets alone.

    >>> from importlib.resources import files
    >>> from statestep.runtime import StepModel
    >>> from statestep.export.readings import drawn
    >>> pump = StepModel.load(files("statestep.consumers") / "models" / "pump.onnx")
    >>> order_does_not_matter(pump, drawn(pump.contract, 20, 16, np.random.default_rng(0)))
    """
    _need(order_does_not_matter, x, steps=1, streams=2)
    mixed = interleaved(model, x, np.random.default_rng(seed))
    how = "interleaved with other streams, then alone"
    _same(order_does_not_matter, model, mixed, alone(model, x), how, _unit(model, x, tolerance))


def cuts_do_not_matter(model: Model, x: Array) -> None:
    """All timesteps in one call with one commit give the numbers, and leave the states, of a call and commit for each.

    >>> from importlib.resources import files
    >>> from statestep.runtime import StepModel
    >>> from statestep.export.readings import drawn
    >>> pump = StepModel.load(files("statestep.consumers") / "models" / "pump.onnx")
    >>> cuts_do_not_matter(pump, drawn(pump.contract, 20, 3, np.random.default_rng(0)))
    """
    _need(cuts_do_not_matter, x, steps=2, streams=1)
    steps, streams = x.shape[:2]
    keys = keys_of(x)
    engine, cut = Engine(model, max_streams=streams), Engine(model, max_streams=streams)
    given = engine.advance(keys * steps, x.reshape(steps * streams, -1)).outputs
    engine.commit()
    engine.rollback()  # what is committed stays
    whole = {name: value.reshape(steps, streams, *value.shape[1:]) for name, value in given.items()}
    how = "in one call with one commit, then in a call and commit each"
    _same(cuts_do_not_matter, model, whole, advanced(cut, x), how)
    one, other = (each.read(sorted(each.keys())) for each in (engine, cut))
    _same_records(cuts_do_not_matter, model.contract, one, other, steps, how)


def rollback_is_an_identity(model: Model, x: Array, *, seed: int = 0) -> None:
    """What is stepped and rolled back leaves no trace: states are put back, later numbers are as if it never was.

    >>> from importlib.resources import files
    >>> from statestep.runtime import StepModel
    >>> from statestep.export.readings import drawn
    >>> pump = StepModel.load(files("statestep.consumers") / "models" / "pump.onnx")
    >>> rollback_is_an_identity(pump, drawn(pump.contract, 20, 3, np.random.default_rng(0)))
    """
    rng, keys = np.random.default_rng(seed), keys_of(x)
    steps, streams = x.shape[:2]
    engine = Engine(model, max_streams=2 * streams)
    rows = []
    for step, row in enumerate(x):
        before = engine.read(sorted(engine.keys()))
        some = rng.integers(0, 2 * streams, 2 * streams)  # streams several times over, and such as there are not
        engine.advance([b"%d" % stream for stream in some], x[rng.integers(0, steps, len(some)), some % streams])
        engine.rollback()
        how = "before what was rolled back, then after"
        _same_records(rollback_is_an_identity, model.contract, before, engine.read(sorted(engine.keys())), step, how)
        rows.append(engine.advance(keys, row).outputs)
        engine.commit()
    how = "with roll-backs between, then without"
    _same(rollback_is_an_identity, model, stacked(rows), stepped(model, x), how)


def restored_goes_on(model: Model, x: Array, *, fresh: Model | None = None) -> None:
    """Records that are read at any timestep, and written into a fresh engine, go on with the same bits.

    `fresh` is the model of that engine, as another process would load it; by default it is `model` itself.

    >>> from importlib.resources import files
    >>> from statestep.runtime import StepModel
    >>> from statestep.export.readings import drawn
    >>> pump, again = (StepModel.load(files("statestep.consumers") / "models" / "pump.onnx") for _ in range(2))
    >>> restored_goes_on(pump, drawn(pump.contract, 20, 3, np.random.default_rng(0)), fresh=again)
    """
    _need(restored_goes_on, x, steps=2, streams=1)
    keys, expected = keys_of(x), stepped(model, x)
    for cut in sorted({1, len(x) // 2, len(x) - 1}):
        first, second = (Engine(each, max_streams=len(keys)) for each in (model, fresh or model))
        begun = advanced(first, x[:cut])
        held = first.keys()  # a stream of which every row was rejected is not begun
        second.write(held, first.read(held))
        second.commit()
        rest = advanced(second, x[cut:])
        joined = {name: np.concatenate([value, rest[name]]) for name, value in begun.items()}
        _same(restored_goes_on, model, joined, expected, f"restored after step {cut}, then without")


def _not_finite(engine: Engine, key: bytes, row: Array) -> str:
    """What of a stream's next timestep is not finite."""
    born = set(engine.keys())
    states = engine.read([key]).states if key in born else [state[None] for state in engine.model.initial_states()]
    outputs, following = engine.model.step(row[None], states)
    names = [f"state {state.output}" for state in engine.model.contract.states]
    for name, value in [*outputs.items(), *zip(names, following, strict=True)]:
        if not np.isfinite(value).all():
            return f"{name} is not a finite number: {value[~np.isfinite(value)][0]!s}"
    return "a number was not finite, and is when the timestep is repeated"


def _need(law: Callable[..., None], x: Array, *, steps: int, streams: int) -> None:
    """Raise `DataError` for readings that could not break the law."""
    if len(x) < steps or x.shape[1] < streams:
        wanted = f"'{name_of(law)}' can fail from {steps} timesteps of {streams} streams on"
        raise DataError(f"x is {len(x)} × {x.shape[1]} (T × B), and {wanted}: give it more")


def _unit(model: Model, x: Array, tolerance: float) -> dict[str, Array] | None:
    """What differences are measured in, where they may be other than none."""
    if not tolerance:
        return None
    scale = tolerance / TOLERANCE
    return {name: value * scale for name, value in units(model.contract, [x], [stepped(model, x)]).items()}


def _same(
    law: Callable[..., None],
    model: Model,
    ours: Outputs,
    theirs: Outputs,
    how: str,
    unit: Mapping[str, Array] | None = None,
) -> None:
    """Raise `LawBroken` at the first timestep where the two differ."""
    if difference := difference_from(model.contract, ours, theirs, unit):
        raise LawBroken(law, f"{difference} ({how})")


def _same_records(
    law: Callable[..., None], contract: Contract, one: Records, other: Records, step: int, how: str
) -> None:
    """Raise `LawBroken` at the first stream of which not the same bits are remembered."""
    names = [f"state {state.input}" for state in contract.states] + ["the step", "the time"]
    for name, here, there in zip(
        names, [*one.states, one.step, one.time], [*other.states, other.step, other.time], strict=True
    ):
        if len(here) != len(there):
            raise LawBroken(law, f"after step {step}: {len(here)} streams are remembered, and {len(there)} ({how})")
        for stream, (mine, yours) in enumerate(zip(here, there, strict=True), 1):
            if mine.tobytes() != yours.tobytes():
                place = int(np.argmax((mine != yours).ravel()))
                values = f"{mine.ravel()[place]!s} and {yours.ravel()[place]!s}"
                raise LawBroken(law, f"after step {step}, stream {stream}: {name} differs: {values} ({how})")
