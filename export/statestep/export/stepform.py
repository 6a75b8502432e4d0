"""A team's own module in step form, `forward(x, *states) → (y, *new_states)`, as a network for the stream model.

The states are named by whoever wrote it. The step form calls the module, the sequence form is an ONNX Scan over the
same call, and both are proven against a plain loop over the untouched module. torch's single cells (`nn.LSTMCell`,
`nn.GRUCell`) inside it are exported as ONNX's operators, which the exporter would otherwise spell out.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from statestep.export import cells
from statestep.export.compare import TOLERANCE
from statestep.export.errors import ExportError, first_line
from statestep.export.forecaster import Gives
from statestep.export.recur import Tensors, recur
from statestep.runtime import State

PROOF_STEPS = 40
PROOF_BATCH = 3


class Stepped(nn.Module):
    """A network for the forms, made of a module that advances by one row. The module itself is not touched."""

    def __init__(self, module: nn.Module, states: Sequence[State], *, targets: tuple[int, ...], gives: Gives):
        super().__init__()
        self.states = tuple(states)
        self.targets = targets
        self.gives = gives
        self.name = type(module).__name__
        for state in self.states:
            self.register_buffer(f"birth_{state.input}", torch.from_numpy(state.initial_value()), persistent=False)
        self.module = copy.deepcopy(module).eval()
        for name, part in list(self.module.named_modules()):
            if isinstance(part, nn.LSTMCell | nn.GRUCell):
                self.module = replaced(self.module, name, _Cell(part))
            elif isinstance(part, nn.LSTM) and part.proj_size:
                raise ExportError(
                    f"layer {name!r} has proj_size {part.proj_size}, which the exporter writes wrong in a step: "
                    "lift the module in its form over sequences, or project by an nn.Linear"
                )

    def step(self, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """z [B, F] and the states → forecast [B, K] and the next states."""
        given, following = _parted(self.module(z, *states), self.states, self.name)
        return given.reshape(z.shape[0], -1), following

    def sequence(self, z: Tensor) -> Tensor:
        """z [T, B, F] → forecasts [T, B, K], from the states of a stream's birth."""

        def body(carry: Tensors, row: Tensors) -> tuple[Tensors, Tensors]:
            given, following = self.step(row[0], carry)
            return following, (given,)

        return recur(body, self.births(z.shape[1]), (z,))[1][0]

    def births(self, batch: int) -> Tensors:
        """The states of `batch` streams that have seen nothing, each with its batch axis where it belongs."""
        return tuple(
            self.get_buffer(f"birth_{state.input}")
            .unsqueeze(state.batch_axis)
            .expand(*state.shape[: state.batch_axis], batch, *state.shape[state.batch_axis :])
            .contiguous()
            for state in self.states
        )


class _Cell(nn.Module):
    """One of torch's single cells; where the graph is exported, the layer that it is a step of."""

    def __init__(self, cell: nn.LSTMCell | nn.GRUCell):
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, states: Any = None) -> Any:
        """As the cell: x [B, F] and (h, c) or h [B, H] → the next ones."""
        if not torch.compiler.is_exporting() or states is None or x.ndim != 2:
            return self.cell(x, states)
        cell = self.cell
        weights = [cell.weight_ih, cell.weight_hh, *([cell.bias_ih, cell.bias_hh] if cell.bias else [])]
        if isinstance(cell, nn.LSTMCell):
            start = [state[None] for state in states]
            _, h, c = torch.lstm(x[None], start, weights, cell.bias, 1, 0.0, False, False, False)
            return h[0], c[0]
        _, h = torch.gru(x[None], states[None], weights, cell.bias, 1, 0.0, False, False, False)
        return h[0]


def prove(module: nn.Module, network: Stepped, features: int, targets: int) -> None:
    """Raise `ExportError` unless the forms, and a stream alone, give what a loop over the untouched module gives."""
    untouched = copy.deepcopy(module).eval()
    name = network.name
    z = torch.randn(PROOF_STEPS, PROOF_BATCH, features, generator=torch.Generator().manual_seed(0))  # [T, B, F]
    try:
        with torch.no_grad(), cells.quiet():
            truth = _looped(untouched, z, network)
            alone = _looped(untouched, z[:, :1], network)
            again = _looped(untouched, z, network)
            given = network.sequence(z)
    except ExportError:
        raise
    except Exception as error:  # whatever a team's own code raises
        raise ExportError(
            f"{name} fails on {PROOF_BATCH} rows of {features} features and the states "
            f"{', '.join(f'{state.input} {list(state.shape)}' for state in network.states)}: {first_line(error)}"
        ) from error
    if truth.shape[-1] != targets:
        raise ExportError(f"{name} forecasts {truth.shape[-1]} values and {targets} targets are named")
    for other, words in (
        (again, "a second run gives another forecast: something besides the named states is kept, or drawn by chance"),
        (given, "called as one sequence it gives another forecast than row by row"),
        (torch.cat([alone, truth[:, 1:]], dim=1), "a stream's forecast depends on the streams beside it"),
    ):
        gap = float((other - truth).abs().max() / truth.abs().max().clamp(min=1.0))
        if not gap <= TOLERANCE:
            raise ExportError(f"{name} cannot stream: {words} (by {gap:.2g})")


def _looped(module: nn.Module, z: Tensor, network: Stepped) -> Tensor:
    """z [T, B, F] row by row through the untouched module: [T, B, K]."""
    carried, given = network.births(z.shape[1]), []
    for row in z:
        forecast, carried = _parted(module(row, *carried), network.states, network.name)
        given.append(forecast.reshape(z.shape[1], -1))
    return torch.stack(given)


def _parted(given: Any, states: Sequence[State], name: str) -> tuple[Tensor, Tensors]:
    """What the module gave, as forecast and next states, each of the shape and type that it is declared with."""
    count = 1 + len(states)
    if (
        not isinstance(given, tuple | list)
        or not all(isinstance(item, Tensor) for item in given)
        or len(given) != count
    ):
        parts = f"{len(given)} things" if isinstance(given, tuple | list) else f"a {type(given).__name__}"
        raise ExportError(
            f"{name} gives {parts}, its forward must give {count} tensors: the forecast and the next "
            f"{', '.join(state.output for state in states)}"
        )
    forecast, *following = given
    for state, tensor in zip(states, following, strict=True):
        shape = list(tensor.shape)
        del shape[state.batch_axis : state.batch_axis + 1]
        if tuple(shape) != state.shape or str(tensor.dtype) != f"torch.{state.dtype}":
            raise ExportError(
                f"{name} gives {state.output!r} as {str(tensor.dtype)[6:]} {shape} beside the batch, and its state is "
                f"{state.dtype} {list(state.shape)}"
            )
    return forecast, tuple(following)


def replaced(module: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """`module` with its submodule `name` replaced, in place; the module itself where the name is empty."""
    if not name:
        return layer
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, layer)
    return module
