"""Modules that teams write as one step: what is taken streams as a plain loop over it, what is not is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from statestep.export import ExportError, export_step, scaler_of
from statestep.export.against import sequence_path
from statestep.export.lift import lift
from statestep.runtime import Engine, State, StepModel

from .models import FEATURES, MEAN, STD, readings
from .step_modules import KINDS, UNITS, MinGRU, made, weights_of

H = [State("h0", "hn", (UNITS,))]


def in_numpy(kind: str, module: nn.Module, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x [T, B, F] stream by stream through the numpy twin, from zero: [T, B, K]."""
    weights, columns = weights_of(module), []
    for stream in range(x.shape[1]):
        states, given = [np.zeros(state.shape) for state in KINDS[kind].states], []
        for row in x[:, stream].astype(np.float64):
            forecast, states = KINDS[kind].twin(row, states, weights)
            given.append(forecast)
        columns.append(np.stack(given))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("kind", list(KINDS))
def test_both_forms_are_the_formulas(kind: str) -> None:
    """Whatever the cell, its sequence and its steps are its formulas."""
    module = made(kind)
    network = lift(module, features=FEATURES, states=KINDS[kind].states).model.network
    x = torch.randn(30, 3, 3, generator=torch.Generator().manual_seed(2))
    truth = in_numpy(kind, module, x.numpy())
    states = tuple(torch.zeros(3, *state.shape) for state in network.states)
    with torch.no_grad():
        np.testing.assert_allclose(network.sequence(x).numpy(), truth, atol=4e-6)
        for t, row in enumerate(x):
            given, states = network.step(row, states)
            np.testing.assert_allclose(given.numpy(), truth[t], atol=4e-6)


def operators(graph: onnx.GraphProto) -> list[str]:
    """Every node's operator, those of inner graphs too."""
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [node.op_type for node in graph.node] + [name for body in inner for name in operators(body)]


@pytest.mark.parametrize("kind", ["slstm", "cells"])
def test_a_step_module_is_written_and_runs(kind: str, tmp_path: Path) -> None:
    """The written model gives the formulas of raw readings; torch's single cells are ONNX's operators in both forms."""
    module = made(kind)
    lifted = lift(module, features=FEATURES, states=KINDS[kind].states, scaler=scaler_of(MEAN, STD, FEATURES))
    exported = export_step(lifted.model, tmp_path / "team.onnx")
    assert exported.report.passed
    assert [(s.input, s.output, s.shape) for s in exported.contract.states[:-2]] == [
        (s.input, s.output, s.shape) for s in KINDS[kind].states
    ]
    for path in (exported.model, sequence_path(exported.model)):
        found = [name for name in operators(onnx.load(path).graph) if name in ("LSTM", "GRU")]
        assert found == (["LSTM", "GRU"] if kind == "cells" else [])
    x = readings(40, 1)[:, 0]
    out = Engine(StepModel.load(exported.model)).advance([b"a"] * 40, x)
    z = (x.astype(np.float64) - MEAN) / STD
    np.testing.assert_allclose((out.prediction - MEAN) / STD, in_numpy(kind, module, z[:, None])[:, 0], atol=1e-5)


def test_a_stream_is_born_as_its_states_say(tmp_path: Path) -> None:
    """Declared initial values, not zeros, begin each stream, in the sequence and in the contract."""
    module = made("mingru")
    birth = np.linspace(-1, 1, UNITS, dtype=np.float32)
    states = [State("h0", "hn", (UNITS,), initial=birth.tolist())]
    network = lift(module, features=FEATURES, states=states).model.network
    x = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        truth, _ = module(x[0], torch.from_numpy(np.stack([birth] * 2)))
        torch.testing.assert_close(network.sequence(x)[0], truth)


class Company(MinGRU):
    """Looks at the other streams of its batch."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x - x.mean(0), h)


class Keeper(MinGRU):
    """Keeps a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = 0.0

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        self.kept += 0.1
        return super().forward(x + self.kept, h)


class Forgetful(MinGRU):
    """Gives no state back."""

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return super().forward(x, h)[0]


class Wide(MinGRU):
    """Gives a state of another width."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h = super().forward(x, h)
        return y, torch.cat([h, h], dim=-1)


class Projected(nn.Module):
    """A layer that the exporter writes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, UNITS, proj_size=3)


@pytest.mark.parametrize(
    ("kind", "states", "words"),
    [
        (Company, H, "Company cannot stream: a stream's forecast depends on the streams beside it"),
        (Keeper, H, "Keeper cannot stream: a second run gives another forecast"),
        (Forgetful, H, "Forgetful gives a Tensor, its forward must give 2 tensors: the forecast and the next hn"),
        (Wide, H, r"Wide gives 'hn' as float32 \[12\] beside the batch, and its state is float32 \[6\]"),
        (Projected, H, "layer 'rnn' has proj_size 3"),
        (
            MinGRU,
            [*H, State("c0", "cn", (UNITS,))],
            r"MinGRU fails on 3 rows of 3 features and the states h0 \[6\], c0",
        ),
        (MinGRU, [State("h0", "hn", (5,))], r"MinGRU fails on 3 rows of 3 features and the states h0 \[5\]"),
    ],
)
def test_what_cannot_stream_is_refused(kind: type[nn.Module], states: list[State], words: str) -> None:
    """One sentence says why."""
    torch.manual_seed(4)
    with pytest.raises(ExportError, match=words) as caught:
        lift(kind(), features=FEATURES, states=states)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_go_together_are_refused() -> None:
    """A step has no axis of time, and as many forecasts as targets."""
    with pytest.raises(ExportError, match="leave batch_first out"):
        lift(made("mingru"), features=FEATURES, states=H, batch_first=True)
    with pytest.raises(ExportError, match="MinGRU forecasts 3 values and 1 targets are named"):
        lift(made("mingru"), features=FEATURES, states=H, targets=["flow"])


def test_the_module_is_left_as_it_was() -> None:
    """Its single cells are replaced in a copy."""
    module = made("cells")
    lift(module, features=FEATURES, states=KINDS["cells"].states)
    assert isinstance(module.get_submodule("low"), nn.LSTMCell)


def test_what_torch_cannot_write_is_said_in_a_sentence(tmp_path: Path) -> None:
    """A module that looks at the values of its tensors streams in torch, and cannot become a graph."""

    class Branching(MinGRU):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            y, h = super().forward(x, h)
            return (y, h) if float(h.detach().abs().max()) < 1e9 else (-y, h)

    lifted = lift(Branching(), features=FEATURES, states=H)
    with pytest.raises(ExportError, match="torch cannot write the module as a graph: ") as caught:
        export_step(lifted.model, tmp_path / "m.onnx")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_function_that_rounds_a_batchs_end_otherwise_is_padded(tmp_path: Path) -> None:
    """onnxruntime's Softplus rounds the end of a batch otherwise than its middle; as written, no row differs alone."""

    class Soft(MinGRU):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            y, h = super().forward(x, h)
            return nn.functional.softplus(y), h

    torch.manual_seed(4)
    exported = export_step(lift(Soft(), features=FEATURES, states=H).model, tmp_path / "m.onnx")
    assert exported.report.passed and "Softplus" in operators(onnx.load(exported.model).graph)
