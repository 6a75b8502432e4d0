"""The proof of a conversion: the original over whole sequences against the step model, stepped; and who is to blame.

Numbers decide, not rules: at several lengths and batches, from the states of a stream's birth and from random ones.
Where they differ, the same comparison tensor by tensor finds the first node that gives other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, NodeProto

from statestep.export.against import rounding
from statestep.export.compare import ROUNDINGS, TOLERANCE, Array
from statestep.export.errors import ExportError
from statestep.export.probe import Tag, Tags
from statestep.export.stateful import Carried
from statestep.export.surgery import every_tensor, reason, session, with_outputs
from statestep.export.whole import Whole, blamed, drawn
from statestep.runtime import State, StepModel

LENGTHS = (2, 17, 200)
BATCHES = (1, 2, 7, 64)
GROWN = (
    "{} rounds each row in its own way, and the network lets that grow; train it with smaller weights, or with LSTM "
    "or GRU in its place"
)
BLAME_STEPS, BLAME_BATCH = 9, 3

REASONS = {
    "ReduceMean": "takes the mean over the sequence",
    "GlobalAveragePool": "takes the mean over the sequence",
    "ReduceSum": "sums over the sequence",
    "ReduceMax": "takes the largest over the sequence",
    "GlobalMaxPool": "takes the largest over the sequence",
    "Softmax": "weighs all rows of the sequence against one another (attention)",
    "ReverseSequence": "reads the sequence backwards",
    "CumSum": "sums along the sequence",
    "Add": "adds something that depends on a row's place in the sequence",
    "Gather": "takes another row than the newest",
    "Slice": "takes other rows than the newest",
    "Loop": "counts a row's place in the sequence, or looks at other rows",
}
WAYS_OUT = {
    "Softmax": "put a recurrent layer in the place of attention over the sequence",
    "ReverseSequence": "train a network that only reads forward",
    "Gather": "answer from the newest row (y[:, -1])",
    "Slice": "answer from the newest row (y[:, -1])",
}


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared. `largest` is the largest difference, 0.0 where every bit was the same."""

    timesteps: int
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    largest: float  # in units of each output's spread
    absolute: float

    @property
    def exact(self) -> bool:
        """Whether every bit was the same."""
        return self.largest == 0.0


def prove(
    original: Whole, carried: Carried, step: StepModel, tags: Tags, *, given: Sequence[Array] = (), seed: int = 0
) -> Proof:
    """Compare, and raise `ExportError` that names the first node which gives other rows when it is stepped.

    `given` are sequences [T, 1, F] to go by beside random ones.
    """
    layout = original.layout
    lengths = LENGTHS if layout.steps is None else (layout.steps,)
    batches = BATCHES if layout.streams is None else (layout.streams,)
    middle = Whole(carried.model, carried.layout)
    largest, absolute, count = 0.0, 0.0, 0
    sequences = [drawn(original.model, layout, t, b, seed + t * b) for t in lengths for b in batches]
    fitting = [x for x in given if layout.steps in (None, len(x)) and layout.streams in (None, x.shape[1])]
    for x in [*sequences, *fitting]:
        for whole, states in ((original, None), (middle, random_states(carried.states, x.shape[1], seed))):
            relative, apart = _compared(whole, step, tags, x, states)
            if not relative <= TOLERANCE:
                sentence = blame(original, carried, tags)
                raise ExportError(sentence or _unexplained(original, x, apart))
            largest, absolute = max(largest, relative), max(absolute, apart)
            count += x.shape[0] * x.shape[1]
    return Proof(count, lengths, batches, largest, absolute)


def _unexplained(original: Whole, x: Array, apart: float) -> str:
    what = f"stepped over {len(x)} timesteps of {x.shape[1]} streams the model differs from the graph by {apart:.2g}"
    if found := rounding(original.model):
        return f"{what}: {GROWN.format(', '.join(found))}"
    return f"{what}, and no node of it is to blame: please report it with the graph"


def random_states(states: Sequence[State], streams: int, seed: int) -> list[Array]:
    """States as none of their streams had them: [B, *shape] each; those that count stay as they start."""
    rng = np.random.default_rng(seed)
    drawn_states = []
    for state in states:
        value = np.stack([state.initial_value()] * streams)  # [B, *shape]
        if value.dtype.kind == "f":
            value = (value + rng.uniform(-0.5, 0.5, value.shape)).astype(value.dtype)
        drawn_states.append(value)
    return drawn_states


def _compared(whole: Whole, step: StepModel, tags: Tags, x: Array, states: list[Array] | None) -> tuple[float, float]:
    """The largest difference in units of an output's spread, and as it is."""
    fed = {}
    if states is not None:
        fed = {s.input: np.moveaxis(v, 0, s.batch_axis) for s, v in zip(step.contract.states, states, strict=True)}
    theirs = whole.run(x, fed)
    try:
        ours, last = stepped(step, x, states)
    except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
        raise ExportError(f"the step model fails on {x.shape[1]} streams: {reason(error)}") from None
    largest = absolute = 0.0
    for output in step.contract.outputs:
        truth = rows(theirs[output.name], tags[output.name], *x.shape[:2])
        relative, apart = _gap(ours[output.name][-len(truth) :], truth)
        largest, absolute = max(largest, relative), max(absolute, apart)
    if states is not None:
        for state, value in zip(step.contract.states, last, strict=True):
            relative, apart = _gap(value, np.moveaxis(theirs[state.output], state.batch_axis, 0))
            largest, absolute = max(largest, relative), max(absolute, apart)
    return largest, absolute


def stepped(step: StepModel, x: Array, states: list[Array] | None = None) -> tuple[dict[str, Array], list[Array]]:
    """x [T, B, F] row by row, from `states` or those of birth: outputs [T, B, …] and the last states."""
    held = states or [np.stack([value] * x.shape[1]) for value in step.initial_states()]
    given = []
    for row in x:
        outputs, held = step.step(row, held)
        given.append(outputs)
    return {name: np.stack([row[name] for row in given]) for name in given[0]}, held


def rows(value: Array, tag: Tag, steps: int, streams: int) -> Array:
    """An output over a sequence as [T, B, …], or [1, B, …] where it answers for the last row only."""
    if tag.merged is not None:
        by_row = np.moveaxis(value, tag.merged, 0)
        if tag.by_time:
            return by_row.reshape(steps, streams, *by_row.shape[1:])
        return by_row.reshape(streams, steps, *by_row.shape[1:]).swapaxes(0, 1)
    if tag.time is None:
        return (value if tag.batch is None else np.moveaxis(value, tag.batch, 0))[None]
    by_time = np.moveaxis(value, tag.time, 0)
    if tag.batch is None:
        return by_time
    return np.moveaxis(by_time, tag.batch + (tag.batch < tag.time), 1)


def _gap(ours: Array, theirs: Array) -> tuple[float, float]:
    """The largest difference in units of the spread of `theirs`, and as it is; (0, 0) where all bits are the same."""
    if ours.shape != theirs.shape:
        return np.inf, np.inf
    if ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes():
        return 0.0, 0.0
    if ours.dtype.kind != "f":
        return np.inf, np.inf
    apart = np.abs(ours.astype(np.float64) - theirs)
    apart = np.where(np.isnan(ours) & np.isnan(theirs), 0.0, apart)
    rounding = ROUNDINGS / TOLERANCE * float(np.nanmax(np.abs(theirs), initial=0.0))
    unit = max(float(np.nanstd(theirs.astype(np.float64))), rounding, 1e-30)
    worst = float(apart.max()) if np.isfinite(apart).all() else np.inf
    return max(worst / unit, 1e-300), worst


def blame(original: Whole, carried: Carried, tags: Tags) -> str | None:
    """The first node whose rows differ when the graph is stepped though those that it takes do not: a sentence."""
    layout = original.layout
    steps, streams = layout.steps or BLAME_STEPS, layout.streams or BLAME_BATCH
    x = drawn(original.model, layout, steps, streams, seed=5)
    truth = Whole(original.model, layout, plain=True).run(x)
    one = Whole(carried.model, carried.layout, plain=True)
    held = {s.input: _at_birth(s, streams) for s in carried.states}
    singles: list[dict[str, Array]] = []
    for row in x:
        try:
            given = one.run(row[None], held)
        except ExportError as error:
            name = blamed(str(error))
            where = f"node {name!r}" if name else "the graph"
            return (
                f"{where} cannot run on a single row, so it cannot be streamed: answer each row from the newest alone"
            )
        held = {s.input: given[s.output] for s in carried.states}
        singles.append(given)
    for node in original.model.graph.node:
        for name in node.output:
            tag = tags.get(name)
            if tag is None or not tag.varies or tag.offset or tag.odd or name not in singles[0]:
                continue
            if not _alike(truth[name], [single[name] for single in singles], tag, streams):
                return _sentence(node, tag)
    return None


def _at_birth(state: State, streams: int) -> Array:
    return np.stack([state.initial_value()] * streams, axis=state.batch_axis)


def _alike(truth: Array, singles: Sequence[Array], tag: Tag, streams: int) -> bool:
    steps = len(singles)
    if tag.merged is not None:
        whole = rows(truth, tag, steps, streams)
        return all(_near(whole[t], np.moveaxis(singles[t], tag.merged, 0)) for t in range(steps))
    if tag.time is None:
        return _near(truth, singles[-1])
    return all(_near(truth.take([t], axis=tag.time), singles[t]) for t in range(steps))


def _near(one: Array, other: Array) -> bool:
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return bool((one == other).all())
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True))


def _sentence(node: NodeProto, tag: Tag) -> str:
    why = REASONS.get(node.op_type, "mixes rows of the sequence")
    way = WAYS_OUT.get(node.op_type, "let recurrent layers or causal convolutions alone look at other rows")
    if node.op_type in ("MatMul", "Einsum", "Gemm"):
        why, way = "mixes rows of the sequence (attention, or a product along time)", WAYS_OUT["Softmax"]
    if tag.time is not None and node.op_type in ("Slice", "Gather"):
        why, way = "reads the sequence in another order", WAYS_OUT["ReverseSequence"]
    return f"node {node.name!r} ({node.op_type}) {why}, so it cannot be streamed row by row: {way}"


def company(model: ModelProto, step: StepModel, seed: int = 0) -> str | None:
    """The first node of a step graph whose row depends on who shares its batch: a sentence, or None."""
    rng = np.random.default_rng(seed)
    ready = session(with_outputs(model, every_tensor(model.graph)), plain=True)
    names = [node.name for node in ready.get_outputs()]
    x = rng.standard_normal((64, len(step.contract.features))).astype(np.float32)  # [B, F]
    states = random_states(step.contract.states, len(x), seed)

    def run(rows_of: slice) -> dict[str, Array]:
        feeds = {step.contract.input: x[rows_of]}
        for state, value in zip(step.contract.states, states, strict=True):
            feeds[state.input] = np.ascontiguousarray(np.moveaxis(value[rows_of], 0, state.batch_axis))
        return dict(zip(names, ready.run(names, feeds), strict=True))

    among, alone, pair = run(slice(None)), [run(slice(i, i + 1)) for i in range(3)], run(slice(0, 2))
    for node in model.graph.node:
        for name in node.output:
            if name not in among:
                continue
            axes = [
                axis for axis, size in enumerate(among[name].shape) if size == len(x) and pair[name].shape[axis] == 2
            ]
            if len(axes) != 1:
                continue
            apart = [(among[name].take([i], axis=axes[0]), single[name]) for i, single in enumerate(alone)]
            if all(one.tobytes() == other.tobytes() for one, other in apart):
                continue
            if all(_near(one, other) for one, other in apart):
                why = "rounds a row otherwise when others share its batch, so a replay could not repeat its bits"
                way = "put an operator that computes number by number in its place"
            else:
                why = "gives a row other values when other streams share its batch"
                way = "normalise or sum over features, never over the batch"
            return f"node {node.name!r} ({node.op_type}) {why}: {way}"
    return None
