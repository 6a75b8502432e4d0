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
from statestep.runtime.results import Results, as_born, blanked, finite
from statestep.runtime.silence import Silence
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
    step: np.ndarray[Any, np.dtype[np.int64]]  # [n] timesteps since the stream's states began
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
    step: np.ndarray[Any, np.dtype[np.int64]]  # [N] timesteps since the stream's states began, this one included
    previous_time: np.ndarray[Any, np.dtype[np.int64]]  # [N] greatest event time before this row, or NO_TIME
    bridged: np.ndarray[Any, np.dtype[np.int64]]  # [N] timesteps without readings that were stepped before the row's
    reset: np.ndarray[Any, np.dtype[np.bool_]]  # [N] the stream's states began anew with this row, after a gap
    dirtied: np.ndarray[Any, np.dtype[np.bool_]]  # [N] rows by which a clean stream became dirty
    slots: Slots  # [N] the stream's place in the table, until it is dropped
    waves: int  # how often the stream that occurred most did
    runs: int  # how many calls of the model it took

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]

    @property
    def first(self) -> Array:
        """Which rows are the first that their stream's states have seen, so that nothing was expected: bool [N]."""
        first: Array = (self.step == 1) | self.reset
        return first

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

    def __init__(self, model: Model, max_streams: int = 1_000_000, silence: Silence | None = None):
        """`silence` says what is done before an observation whose stream was silent; else it is the next timestep."""
        self.model = model
        self.silence = silence
        columns = [
            Column(f"state {state.input}", value)
            for state, value in zip(model.contract.states, model.initial_states(), strict=True)
        ]
        self._width = len(columns)
        told = {output.state for output in model.contract.outputs}
        # States of what was put out last: an event that is on outlives a new beginning, for its end is to be told.
        self._told = [i for i, state in enumerate(model.contract.states) if state.input in told]
        # What a reset leaves as it is.
        self._lasting = [i for i, state in enumerate(model.contract.states) if state.input in told or state.lasting]
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
    ) -> Advanced:
        """Step each observation's stream once, in order.

        `keys` has N stream keys, `x` is float32 [N, F] (the contract's input dtype), `times` int64 [N] event times
        in nanoseconds since the epoch, or None where there are none, `offsets` int64 [N] the observations' places in
        their log, which do not fall within a stream, or None. A key may occur any number of times.

        A stream whose every row is rejected is not begun. Raises TypeError or ValueError for arrays of another kind,
        and `CapacityError` when the call brings more new streams than there is room for; nothing has changed then.
        """
        self._check(keys, x, times, offsets)
        places = np.zeros(len(keys), np.int64) if offsets is None else offsets  # [N]
        mark = self.table.mark()
        slots = self.table.admit(keys)  # [N]
        before: list[tuple[Slots, list[Array]]] = []
        out: Results | None = None
        waves = runs = 0
        try:
            for waves, wave in enumerate(waves_of(slots), 1):
                for rows in portions_of(wave, len(slots)):
                    here = slots[rows].copy()  # [n], distinct; the table's own, as the caller gets `slots`
                    held = self.table.gather(here)
                    if waves == 1:  # every stream of the call is in the first wave
                        before.append((here, held))
                        self.table.save(here, held)
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
            self.model.contract,
            out.outputs,
            out.rejected,
            out.step,
            out.previous_time,
            out.bridged,
            out.reset,
            out.dirtied,
            slots,
            waves,
            runs,
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

    def idle(self, slots: Slots) -> Array:
        """Which streams have put out nothing that is still to be gone on with, such as an event: bool [n]."""
        columns = [self.table.columns[i] for i in self._told]
        return as_born(columns, [self.table.column(column.name)[slots] for column in columns], len(slots))

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

    def _after_silence(
        self, silence: Silence, held: list[Array], times: Array, x: Array
    ) -> tuple[list[Array], Array, Array]:
        """The records `held` [n, …] as they are just before observations at `times` [n]; bridged [n] and reset [n].

        An event that is on is no new stream's: a stream that expires in the middle of one is reset, and its timesteps
        are counted on, for the event is named by them.
        """
        before, count = held[self._width + 1], len(times)
        judged = silence.judged(before, times)
        if judged is None:
            return held, np.zeros(count, np.int64), np.zeros(count, bool)
        bridged, reset, expired = judged
        told = [self.table.columns[i] for i in self._told]
        idle = as_born(told, [held[i] for i in self._told], count)  # [n]
        new, reset = expired & idle, reset | (expired & ~idle)  # [n] each
        rows = [value.copy() for value in held]  # the undo log keeps what they were
        for place, (row, column) in enumerate(zip(rows[: self._width + 2], self.table.columns, strict=False)):
            row[new] = column.initial
            if place < self._width and place not in self._lasting:
                row[reset] = column.initial
        rows[self._width][reset & idle] = 0
        for number in range(1, int(bridged.max()) + 1):
            here = np.flatnonzero(bridged >= number)  # [m]
            if not here.size:
                break
            absent = np.full((len(here), x.shape[1]), np.nan, x.dtype)  # [m, F]
            when = before[here] + round(number * silence.period_ns)  # [m]
            outputs, states = self.model.step(absent, [row[here] for row in rows[: self._width]], when)
            good = finite([*outputs.values(), *states], len(here))  # [m]
            if good is not None:  # the rest of their gap is passed by
                bridged[here[~good]] = number - 1
                here, states = here[good], [state[good] for state in states]
            for row, state in zip(rows, states, strict=False):
                row[here] = state
            rows[self._width][here] += 1
        return rows, bridged, reset

    def _check(self, keys: Sequence[bytes], x: Array, times: Array | None, offsets: Array | None) -> None:
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
        for name, array in (("times", times), ("offsets", offsets)):
            if array is None:
                continue
            if not isinstance(array, np.ndarray) or array.dtype != np.int64:
                kind = getattr(array, "dtype", type(array).__name__)
                raise TypeError(f"{name} must be an array of int64, it is {kind}")
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
        out: Results | None,
    ) -> Results:
        """One run of the model over distinct streams: results go into `out` at `rows`, new states into the table."""
        bridged, reset, known = np.zeros(len(slots), np.int64), np.zeros(len(slots), bool), held[self._width]
        if self.silence is not None and times is not None:
            held, bridged, reset = self._after_silence(self.silence, held, times[rows], x)
        outputs, states = self.model.step(x[rows], held[: self._width], None if times is None else times[rows])
        step, time, _, dirty = held[self._width :]
        good = finite([*outputs.values(), *states], len(slots))  # [n]
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
            outputs = {name: blanked(value, rejected) for name, value in outputs.items()}
            step, bridged = np.where(good, step + 1, known), np.where(good, bridged, 0)
            reset, dirtied = reset & good, dirtied & good
        if len(slots) == len(x):
            return Results(outputs, rejected, step, time.copy(), bridged, reset, dirtied)  # the undo log keeps `time`
        if out is None:
            out = Results.empty(len(x), outputs)
        out.put(rows, outputs, rejected, step, time, bridged, reset, dirtied)
        return out

    def _nothing(self, x: Array) -> Results:
        """The results of a call without observations: empty, with the shapes that a row would have."""
        outputs, _ = self.model.step(np.zeros((1, x.shape[1]), x.dtype), [s[None] for s in self.model.initial_states()])
        return Results.empty(0, outputs)
