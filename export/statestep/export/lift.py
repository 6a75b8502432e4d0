"""A team's own trained torch module as a stream model: its recurrent layers are made to carry their state from outside.

The module stays as it is, but for its recurrent layers, torch's own and those of `layers.py`. Each is replaced by a
stand-in that advances the same weights and takes its state from, and leaves it in, a `_Carrier`. The step form then
calls the module with sequences of one row. The sequence form lays all T·B rows out as a batch of one-row sequences, so
that everything but the recurrent layers works row by row, and the stand-ins run the true sequences; thus a head that
looks only at the last row gives a forecast at every row. Both are proven against the untouched module before anything
else is done.
A module that already is a step, and whose states are named, needs none of this: see `stepform.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from statestep.export import cells
from statestep.export.calibrate import Calibrated, Judging, calibrated
from statestep.export.cells import Recurrent
from statestep.export.compare import TOLERANCE, Array
from statestep.export.detector import Forecasts
from statestep.export.errors import ExportError, first_line
from statestep.export.forecaster import Gives
from statestep.export.forecasts import Errors, errors_of, past_of
from statestep.export.forms import StreamModel
from statestep.export.recur import Tensors
from statestep.export.scaling import NoScaling, PooledScaling, Scaling
from statestep.export.series import blocks_of, columns_of, enough, mean_of, ranges_of, series_of
from statestep.export.stepform import Stepped, prove, replaced
from statestep.runtime import State

PROOF_LENGTHS = (1, 2, 3, 10, 40)  # rows that the untouched module reads at once
PROOF_BATCH = 3
GIVES = {"scaled": Gives.VALUE, "raw": Gives.RAW_VALUE}


class _Carrier:
    """Brings states to the stand-ins of one forward pass and takes them back. No module, so that torch leaves it be."""

    def __init__(self) -> None:
        self.states: dict[str, Tensors] | None = None  # by layer; None: whole sequences from zero states
        self.shape = (0, 0)  # T and B of the whole sequences
        self.after: dict[str, Tensors] = {}  # by layer, once it has been called


class _StandIn(nn.Module):
    """Called like the recurrent layer that it stands for, with sequences of one row."""

    def __init__(self, name: str, rnn: Recurrent, carrier: _Carrier):
        super().__init__()
        self.name = name
        self.rnn = rnn
        self.carrier = carrier

    def forward(self, x: Any, initial: Any = None) -> tuple[Tensor, Any]:
        """x [N, 1, F] or [1, N, F] → the top layer's output, laid out alike, and the final states [L, N, H].

        A given initial state is passed by: a stream's birth is at zero, and the proof shows where it was not.
        """
        time = 1 if self.rnn.batch_first else 0
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[time] != 1:
            raise ExportError(f"layer {self.name!r} is not given the input row by row, so it cannot be stepped")
        if self.name in self.carrier.after:
            raise ExportError(f"layer {self.name!r} is called twice in a forward pass, so its state is not one")
        rows = x.squeeze(time)  # [N, F]
        if self.carrier.states is not None:
            hidden, after = cells.step(self.rnn, rows, self.carrier.states[self.name])
        else:
            steps, batch = self.carrier.shape
            whole = cells.sequence(self.rnn, rows.reshape(steps, batch, -1))  # each [T, B, H]
            hidden = [layer.reshape(1, steps * batch, -1) for layer in whole]
            after = (torch.cat(hidden),)
        self.carrier.after[self.name] = after
        if len(after) < len(cells.letters_of(self.rnn)):
            # Whole sequences leave no cell state for each row: the proof knows by the NaN that the module looks at it.
            after = (*after, after[0].new_full((*after[0].shape[:2], self.rnn.hidden_size), torch.nan))
        return hidden[-1].transpose(0, 1) if self.rnn.batch_first else hidden[-1], cells.packed(self.rnn, after)


class Lifted(nn.Module):
    """A network for the forms, made of a module that forecasts from a sequence. The module itself is not touched."""

    def __init__(self, module: nn.Module, *, targets: tuple[int, ...], batch_first: bool | None, gives: Gives):
        super().__init__()
        layers = {name: part for name, part in module.named_modules() if isinstance(part, cells.KINDS)}
        if not layers:
            raise ExportError(
                f"{type(module).__name__} holds no nn.LSTM, nn.GRU or nn.RNN, whose state could be carried; "
                "if it advances by one row, forward(x, *states) → (y, *new_states), name its states (--state)"
            )
        for name, rnn in layers.items():
            cells.check(rnn, name)
        self.batch_first = next(iter(layers.values())).batch_first if batch_first is None else batch_first
        self.targets = targets
        self.gives = gives
        self.carrier = _Carrier()
        self.module = copy.deepcopy(module).eval()
        self.pairs: dict[str, tuple[State, ...]] = {}  # by layer
        for name, rnn in layers.items():
            self.module = replaced(self.module, name, _StandIn(name, copy.deepcopy(rnn).eval(), self.carrier))
            self.pairs[name] = cells.states_of(rnn, "" if len(layers) == 1 else f"{name.replace('.', '_')}_")
        self.states = tuple(state for pairs in self.pairs.values() for state in pairs)

    def step(self, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """z [B, F] and the states of every layer [L, B, H] → forecast [B, K] and the next states."""
        rest = iter(states)
        given = self._call(z, {name: tuple(next(rest) for _ in pairs) for name, pairs in self.pairs.items()})
        return given, tuple(state for name in self.pairs for state in self.carrier.after[name])

    def sequence(self, z: Tensor) -> Tensor:
        """z [T, B, F] → forecasts [T, B, K], from zero states."""
        steps, batch = z.shape[:2]
        self.carrier.shape = (steps, batch)
        return self._call(z.reshape(steps * batch, -1), None).reshape(steps, batch, -1)

    def _call(self, rows: Tensor, states: dict[str, Tensors] | None) -> Tensor:
        """One forward pass over rows [N, F], each a sequence of its own: [N, K]."""
        self.carrier.states, self.carrier.after = states, {}
        given = _forecast_of(self.module(rows[:, None] if self.batch_first else rows[None]))
        idle = [name for name in self.pairs if name not in self.carrier.after]
        if idle:
            raise ExportError(f"layer {idle[0]!r} is not called in the forward pass: take it out of the module")
        return given.reshape(rows.shape[0], -1)


@dataclass(frozen=True, slots=True)
class LiftedModel:
    """A lifted module, ready to be written. Without data there are no errors, no ranges and no detector."""

    model: StreamModel
    detector: Calibrated | None
    errors: Errors | None
    ranges: dict[str, tuple[float, float]]


def lift(
    module: nn.Module,
    *,
    features: Sequence[str],
    targets: Sequence[str] | None = None,
    states: Sequence[State] | None = None,
    batch_first: bool | None = None,
    scaler: PooledScaling | None = None,
    output: str = "scaled",
    data: Mapping[str, Array] | None = None,
    validation: float = 0.2,
    judging: Judging | None = None,
) -> LiftedModel:
    """Make a stream model of a trained `module` that forecasts the next row from a sequence.

    Its forward takes x [B, T, F] (`batch_first`, read from its recurrent layers where None) or [T, B, F], and gives a
    forecast for every row, or [B, K] for the last one. `targets` may be left out where K = F. With a `scaler` it reads
    standardised values; `output` says whether it forecasts such too ("scaled") or the sensor's own ("raw"). `data`
    (stream → raw readings [T, F]) is what a detector is measured on, which judges as `judging` says; its threshold is
    taken from the last `validation` share.

    A module that advances by one row itself, `forward(x [B, F], *states) → (y [B, K], *new_states)`, is taken as it is
    where its `states` are named, in the order of the arguments: `states=[State("h0", "hn", (64,))]` for h [B, 64],
    from zero at a stream's birth.

    Raises `ExportError` for a module that cannot be stepped, or that gives other forecasts when it is.
    """
    if output not in GIVES:
        raise ExportError(f"output is {output!r}, it must be one of {list(GIVES)}")
    columns = columns_of(features, targets)
    network: Lifted | Stepped
    if states is None:
        network = Lifted(module, targets=columns, batch_first=batch_first, gives=GIVES[output])
        _prove(module, network, len(features), len(columns))
    else:
        if batch_first is not None:
            raise ExportError("a module whose states are named reads one row of each stream: leave batch_first out")
        network = Stepped(module, states, targets=columns, gives=GIVES[output])
        prove(module, network, len(features), len(columns))
    scaling: Scaling = NoScaling() if scaler is None else scaler
    model = StreamModel(network, scaling, features=tuple(features))
    if data is None:
        return LiftedModel(model, None, None, {})
    series, _ = series_of(data, features, validation)
    blocks = blocks_of(series)
    enough(blocks, 1)
    pasts = [past_of(model, block) for block in blocks]
    known = Forecasts(features=tuple(features), targets=columns, mean=mean_of(series))
    detector = calibrated(pasts, known, judging or Judging())
    return LiftedModel(model, detector, errors_of(model, pasts, 1), ranges_of(series, features))


def _prove(module: nn.Module, network: Lifted, features: int, targets: int) -> None:
    """Raise `ExportError` unless stepping and the whole-sequence form give what the untouched module gives."""
    name = type(module).__name__
    untouched = copy.deepcopy(module).eval()
    draw = torch.Generator().manual_seed(0)
    for length in PROOF_LENGTHS:
        z = torch.randn(length, PROOF_BATCH, features, generator=draw)  # [T, B, F]
        try:
            with torch.no_grad(), cells.quiet():
                whole = _forecast_of(untouched(z.transpose(0, 1) if network.batch_first else z))
                stepped, at_once = _step_through(network, z), network.sequence(z)  # [T, B, K]
        except ExportError:
            raise
        except Exception as error:  # whatever a team's own code raises
            raise ExportError(
                f"{name} fails on {PROOF_BATCH} sequences of {length} rows of {features} features: {first_line(error)}"
            ) from error
        if stepped.shape[-1] != targets:
            raise ExportError(f"{name} forecasts {stepped.shape[-1]} values and {targets} targets are named")
        if at_once.isnan().any() and not whole.isnan().any():
            raise ExportError(
                f"{name} looks at the cell state of an nn.LSTM, which a whole sequence does not leave for each of its "
                "rows: let its head look at the output, or at the hidden state"
            )
        truth = _in_time(whole, length, targets, network.batch_first, name)  # [T or 1, B, K]
        for form, given in (("stepped row by row", stepped), ("run row by row over the sequence", at_once)):
            gap = float((given[-len(truth) :] - truth).abs().max() / truth.abs().max().clamp(min=1.0))
            if not gap <= TOLERANCE:
                raise ExportError(
                    f"{name} cannot stream: {form} it differs by {gap:.2g} from one call over {length} rows, so "
                    "something besides its recurrent layers looks at other rows, or a layer does not start from zero"
                )


def _step_through(network: Lifted, z: Tensor) -> Tensor:
    """z [T, B, F] row by row: [T, B, K]."""
    states: Tensors = tuple(z.new_zeros(state.shape[0], z.shape[1], state.shape[1]) for state in network.states)
    given = []
    for row in z:
        forecast, states = network.step(row, states)
        given.append(forecast)
    return torch.stack(given)


def _in_time(whole: Tensor, steps: int, targets: int, batch_first: bool, name: str) -> Tensor:
    """A module's answer to a sequence as [T, B, K], or [1, B, K] where it answers for the last row only."""
    if whole.numel() == PROOF_BATCH * targets:
        return whole.reshape(1, PROOF_BATCH, targets)
    if whole.numel() != steps * PROOF_BATCH * targets:
        raise ExportError(
            f"{name} gives {list(whole.shape)} for {PROOF_BATCH} sequences of {steps} rows and {targets} targets, "
            "which is a forecast neither for each row nor for the last"
        )
    if batch_first:
        return whole.reshape(PROOF_BATCH, steps, targets).transpose(0, 1)
    return whole.reshape(steps, PROOF_BATCH, targets)


def _forecast_of(given: Any) -> Tensor:
    """What a module's forward gives, or the first of it where it gives its states too."""
    first = given[0] if isinstance(given, tuple | list) and given else given
    if not isinstance(first, Tensor):
        raise ExportError(f"the module's forward gives a {type(first).__name__}, it must give its forecast as a tensor")
    return first
