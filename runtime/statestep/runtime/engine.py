"""The engine: observations of many streams go in, in arrival order, and each advances its stream by one timestep.

It joins a model, which knows no streams, with a table, which knows no model. No clock, no I/O, no threads.

Rules that everything here keeps:

1. A stream that occurs k times in a call is stepped k times, in order: the call is cut in *waves*, each with at
   most one row a stream, and a wave is one run of the model.
2. What a row gives depends on its stream's record and on the row, never on its batch-mates or on the time of day.
3. Nothing is final before `commit`; `rollback` restores every touched stream bit for bit.
4. A row whose new state or output is not finite changes nothing: its stream keeps the record it had.
5. An exception leaves the engine as it was before the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from statestep.runtime.contract import NO_TIME, Contract
from statestep.runtime.state import Array, Column, Slots, StateTable
from statestep.runtime.waves import Rows, portions_of, waves_of

# The engine's own columns, after the model's states in every record. A state may be called the same in its graph.
STEP, TIME, OFFSET, DIRTY = "step", "time", "offset", "dirty"
CLEAN = np.iinfo(np.int64).max  # in the `dirty` column: nothing has changed since the last snapshot
NO_OFFSET = -1  # the `offset` of a stream that was never advanced with one


class Model(Protocol):
    """What the engine needs of a model; `StepModel` is one, a wrapper that times its calls another."""

    @property
    def contract(self) -> Contract:
        """What the tensors mean."""

    def initial_states(self) -> list[Array]:
        """A new stream's states, one [*shape] for each."""

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        """x [B, F], states [B, *shape] and event times [B] → outputs [B, …] and next states [B, *shape]."""


@dataclass(frozen=True, slots=True)
class Records:
    """What is remembered of n streams: the model's states and the engine's own columns."""

    states: list[Array]  # each [n, *shape], in the contract's order
    step: np.ndarray[Any, np.dtype[np.int64]]  # [n] timesteps applied since the stream's birth
    time: np.ndarray[Any, np.dtype[np.int64]]  # [n] greatest event time, ns since the epoch; NO_TIME if none
    offset: np.ndarray[Any, np.dtype[np.int64]]  # [n] where the last observation applied stood in its log; NO_OFFSET


@dataclass(frozen=True, slots=True)
class Advanced:
    """What a call gave, row by row as the observations came. The arrays are the caller's own.

    A rejected row has NaN in its float outputs (zero in others), its stream's step unchanged.
    """

    contract: Contract
    outputs: dict[str, Array]  # each [N, …]
    rejected: np.ndarray[Any, np.dtype[np.bool_]]  # [N] the model gave something not finite; nothing was changed
    step: np.ndarray[Any, np.dtype[np.int64]]  # [N] the stream's number of timesteps, this one included
    previous_time: np.ndarray[Any, np.dtype[np.int64]]  # [N] greatest event time before this row, or NO_TIME
    dirtied: np.ndarray[Any, np.dtype[np.bool_]]  # [N] rows by which a clean stream became dirty
    slots: Slots  # [N] the stream's place in the table, until it is dropped
    waves: int  # how often the stream that occurred most did
    runs: int  # how many calls of the model it took

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]

    def role(self, role: str) -> Array | None:
        """The output that plays `role`, or None where the model has none."""
        output = self.contract.output(role)
        return None if output is None else self.outputs[output.name]

    @property
    def prediction(self) -> Array:
        """The forecast for each row's next timestep: [N, K]. A model without that role raises KeyError."""
        prediction = self.role("prediction")
        if prediction is None:
            raise KeyError(f"the model names no output as its prediction, it has {list(self.outputs)}")
        return prediction


class Engine:
    """Recurrent state for up to `max_streams` streams, advanced in batches. Not thread-safe."""

    def __init__(self, model: Model, max_streams: int = 1_000_000):
        self.model = model
        columns = [
            Column(f"state {state.input}", value)
            for state, value in zip(model.contract.states, model.initial_states(), strict=True)
        ]
        self._width = len(columns)
        columns += [
            Column(STEP, np.zeros((), np.int64)),
            Column(TIME, np.full((), NO_TIME, np.int64)),
            Column(OFFSET, np.full((), NO_OFFSET, np.int64)),
            Column(DIRTY, np.full((), CLEAN, np.int64)),
        ]
        self.table = StateTable(columns, max_streams)

    def __len__(self) -> int:
        return len(self.table)

    def advance(
        self,
        keys: Sequence[bytes],
        x: Array,
        times: Array | None = None,
        offsets: Array | None = None,
        anew: Array | None = None,
    ) -> Advanced:
        """Step each observation's stream once, in order.

        `keys` has N stream keys, `x` is float32 [N, F] (the contract's input dtype), `times` int64 [N] event times
        in nanoseconds since the epoch, or None where there are none, `offsets` int64 [N] the observations' places in
        their log, which do not fall within a stream, or None. Where `anew`, bool [N], is true, the stream begins anew
        with that row: from the initial state, as its first timestep. A key may occur any number of times.

        A stream whose every row is rejected is not begun. Raises TypeError or ValueError for arrays of another kind,
        and `CapacityError` when the call brings more new streams than there is room for; nothing has changed then.
        """
        self._check(keys, x, times, offsets, anew)
        places = np.zeros(len(keys), np.int64) if offsets is None else offsets  # [N]
        mark = self.table.mark()
        slots = self.table.admit(keys)  # [N]
        before: list[tuple[Slots, list[Array]]] = []
        out: _Results | None = None
        waves = runs = 0
        try:
            for waves, wave in enumerate(waves_of(slots), 1):
                for rows in portions_of(wave, len(slots)):
                    here = slots[rows].copy()  # [n], distinct; the table's own, as the caller gets `slots`
                    held = self.table.gather(here)
                    if waves == 1:  # every stream of the call is in the first wave
                        before.append((here, held))
                        self.table.save(here, held)
                    if anew is not None and anew[rows].any():
                        held = self._born_again(held, anew[rows])
                    out = self._run(rows, here, held, x, times, places, out)
                    runs += 1
        except BaseException:
            for here, held in before:
                self.table.scatter(here, held)
            self.table.rewind(mark)
            raise
        if out is None:
            out = self._nothing(x)
        if np.count_nonzero(out.rejected):
            self._unborn(mark)
        return Advanced(
            self.model.contract, out.outputs, out.rejected, out.step, out.previous_time, out.dirtied, slots, waves, runs
        )

    def commit(self) -> None:
        """Make what was advanced, written and dropped since the last commit the streams' state."""
        self.table.commit()

    def rollback(self) -> None:
        """Put every stream back, bit for bit, to where it was at the last commit."""
        self.table.rollback()

    def keys(self) -> list[bytes]:
        """The streams that are remembered."""
        return self.table.keys()

    def read(self, keys: Sequence[bytes]) -> Records:
        """The records of `keys`, copied. A stream that is not there is a KeyError."""
        rows = self.table.gather(self._present(keys))
        step, time, offset, _ = rows[self._width :]
        return Records(rows[: self._width], step, time, offset)

    def write(self, keys: Sequence[bytes], records: Records, *, clean: bool = False) -> None:
        """Set the records of distinct `keys`, new or not. `rollback` undoes it.

        They are dirty from `records.offset` on until `clean` is called, or clean at once: what was read back from
        where it is durable has not changed.
        """
        if len(set(keys)) != len(keys):
            raise ValueError("write sets each stream once, a key is doubled")
        dirty = np.full(len(keys), CLEAN, np.int64) if clean else records.offset  # [n]
        rows = [*records.states, records.step, records.time, records.offset, dirty]
        for column, row in zip(self.table.columns, rows, strict=True):
            expected = (len(keys), *column.initial.shape)
            if row.shape != expected or row.dtype != column.initial.dtype:
                raise ValueError(
                    f"{column.name!r} is {row.dtype} {list(row.shape)}, "
                    f"it must be {column.initial.dtype} {list(expected)}"
                )
        self._overwrite(self.table.admit(keys), rows)

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget streams. Their next observation starts from the initial state. `rollback` undoes it."""
        self.table.drop(keys)

    def end(self, keys: Sequence[bytes], offsets: Array) -> Array:
        """End distinct streams, each by the message at its place in `offsets` [n]; `rollback` undoes it.

        An ended stream is as if it had never been, with step 0, but it stays in the table until it is called clean:
        that it has ended must become durable too. A key without a stream is passed by. Gives bool [n]: which streams
        were clean and are dirty now.
        """
        found = self.table.slots(keys)  # [n]
        known = found >= 0
        slots, places = found[known], offsets[known]
        dirty = self.table.column(DIRTY)[slots]
        initial = [
            np.broadcast_to(column.initial, (len(slots), *column.initial.shape)) for column in self.table.columns
        ]
        self._overwrite(slots, [*initial[: self._width + 2], places, np.minimum(dirty, places)])
        dirtied = np.zeros(len(keys), bool)
        dirtied[known] = dirty == CLEAN
        return dirtied

    def dirty(self) -> list[bytes]:
        """The streams that have changed since they were last called clean."""
        keys = self.keys()
        return [key for key, first in zip(keys, self.first_dirty(keys).tolist(), strict=True) if first != CLEAN]

    def first_dirty(self, keys: Sequence[bytes]) -> Array:
        """For each stream the offset of the first message applied since it was last clean; `CLEAN` if none: [n]."""
        return self.table.column(DIRTY)[self._present(keys)]

    def clean(self, keys: Sequence[bytes]) -> None:
        """Call streams clean, for what they are now is durable; an ended one is forgotten. `rollback` undoes it."""
        slots = np.unique(self._present(keys))
        rows = self.table.gather(slots)
        rows[-1] = np.full(len(slots), CLEAN, np.int64)
        self._overwrite(slots, rows)
        steps = self.table.column(STEP)[self._present(keys)].tolist()
        self.table.drop(key for key, step in zip(keys, steps, strict=True) if step == 0)

    def _overwrite(self, slots: Slots, rows: Sequence[Array]) -> None:
        self.table.save(slots, self.table.gather(slots))
        self.table.scatter(slots, rows)

    def _present(self, keys: Sequence[bytes]) -> Slots:
        slots = self.table.slots(keys)
        if (slots < 0).any():
            raise KeyError(f"there is no stream {keys[int(np.argmin(slots))]!r}")
        return slots

    def _born_again(self, held: list[Array], anew: Array) -> list[Array]:
        """The records `held` [n, …], those that are `anew` [n] with the initial states and step 0."""
        rows = [value.copy() for value in held[: self._width + 1]]  # the undo log keeps what they were
        for row, column in zip(rows, self.table.columns, strict=False):
            row[anew] = column.initial
        return [*rows, *held[self._width + 1 :]]

    def _check(
        self, keys: Sequence[bytes], x: Array, times: Array | None, offsets: Array | None, anew: Array | None
    ) -> None:
        contract = self.model.contract
        if not isinstance(x, np.ndarray) or x.dtype != contract.input_dtype:
            raise TypeError(
                f"x must be an array of {contract.input_dtype}, it is {getattr(x, 'dtype', type(x).__name__)}"
            )
        if isinstance(keys, bytes | str):
            raise TypeError(f"keys must be a sequence of keys, it is the one key {keys!r}")
        if x.shape != (len(keys), len(contract.features)):
            raise ValueError(
                f"x has shape {list(x.shape)}, {len(keys)} keys of {len(contract.features)} features need "
                f"{[len(keys), len(contract.features)]}"
            )
        for name, array, dtype in (("times", times, "int64"), ("offsets", offsets, "int64"), ("anew", anew, "bool")):
            if array is None:
                continue
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                kind = getattr(array, "dtype", type(array).__name__)
                raise TypeError(f"{name} must be an array of {dtype}, it is {kind}")
            if array.shape != (len(keys),):
                raise ValueError(f"{name} has shape {list(array.shape)}, {len(keys)} keys need {[len(keys)]}")

    def _unborn(self, mark: int) -> None:
        """Forget the streams that were born since `mark` and not advanced."""
        born = self.table.born_since(mark)
        steps = self.table.column(STEP)[self.table.slots(born)]  # [born]
        self.table.unbear([key for key, step in zip(born, steps.tolist(), strict=True) if step == 0], mark)

    def _run(
        self,
        rows: Rows,
        slots: Slots,
        held: list[Array],
        x: Array,
        times: Array | None,
        offsets: Array,
        out: _Results | None,
    ) -> _Results:
        """One run of the model over distinct streams: results go into `out` at `rows`, new states into the table."""
        outputs, states = self.model.step(x[rows], held[: self._width], None if times is None else times[rows])
        step, time, _, dirty = held[self._width :]
        good = _finite([*outputs.values(), *states], len(slots))  # [n]
        greatest = time if times is None else np.maximum(time, times[rows])  # [n]
        places = offsets[rows]  # [n]
        following = [*states, step + 1, greatest, places, np.minimum(dirty, places)]
        dirtied = dirty == CLEAN  # [n]
        if good is None:
            self.table.scatter(slots, following)
            rejected = np.zeros(len(slots), bool)
            step = following[self._width]
        else:
            self.table.scatter(slots[good], [value[good] for value in following])
            rejected = ~good
            outputs = {name: _blanked(value, rejected) for name, value in outputs.items()}
            step = step + good
            dirtied &= good
        if len(slots) == len(x):
            return _Results(outputs, rejected, step, time.copy(), dirtied)  # the undo log keeps `time`
        if out is None:
            out = _Results.empty(len(x), outputs)
        out.put(rows, outputs, rejected, step, time, dirtied)
        return out

    def _nothing(self, x: Array) -> _Results:
        """The results of a call without observations: empty, with the shapes that a row would have."""
        outputs, _ = self.model.step(np.zeros((1, x.shape[1]), x.dtype), [s[None] for s in self.model.initial_states()])
        return _Results.empty(0, outputs)


@dataclass(slots=True)
class _Results:
    """The arrays of a call while its waves fill them in."""

    outputs: dict[str, Array]
    rejected: Array  # bool [N]
    step: Array  # int64 [N]
    previous_time: Array  # int64 [N]
    dirtied: Array  # bool [N]

    @classmethod
    def empty(cls, n: int, like: dict[str, Array]) -> _Results:
        outputs = {name: np.empty((n, *value.shape[1:]), value.dtype) for name, value in like.items()}
        return cls(outputs, np.empty(n, bool), np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, bool))

    def put(
        self, rows: Rows, outputs: dict[str, Array], rejected: Array, step: Array, time: Array, dirtied: Array
    ) -> None:
        for name, value in outputs.items():
            self.outputs[name][rows] = value
        self.rejected[rows] = rejected
        self.step[rows] = step
        self.previous_time[rows] = time
        self.dirtied[rows] = dirtied


def _finite(arrays: Sequence[Array], n: int) -> Array | None:
    """Which rows hold only finite numbers in every float array: bool [n], or None where all do."""
    bad = []
    for array in arrays:
        if array.dtype.kind == "f":
            finite = np.isfinite(array)  # [n, …]
            if np.count_nonzero(finite) < finite.size:  # the quickest way to ask whether all are
                bad.append(~finite.reshape(n, -1).all(axis=1))
    return ~np.logical_or.reduce(bad) if bad else None


def _blanked(value: Array, rejected: Array) -> Array:
    """`value` with the rejected rows made NaN, or zero where its dtype has no NaN."""
    blank = value.copy()
    blank[rejected] = np.nan if value.dtype.kind == "f" else 0
    return blank
