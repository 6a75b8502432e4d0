"""Recurrent layers, stepped and whole, against the plain numpy cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from statestep.export import CoupledLSTM, ExportError, LayerNormLSTM, PeepholeLSTM, ResetBeforeGRU, cells
from statestep.export.cells import Recurrent
from statestep.export.forecaster import CELLS

from . import reference

CASES = [(cell, layers, bias) for cell in CELLS for layers in (1, 2, 3) for bias in (True, False)]
OWN = [cell for cell in CELLS if cell.startswith(("lstm-p", "lstm-c", "lstm-l", "gru-")) and cell != "lstm-projected"]


def same(given: Tensor, expected: Any) -> None:
    """Within float32: layer normalisation of few units magnifies a rounding more than gates do."""
    np.testing.assert_allclose(given.numpy(), expected, atol=4e-6, rtol=0)


def built(cell: str, layers: int = 2, **settings: Any) -> Recurrent:
    """Layers of 3 inputs and 6 units, projected on 4, from a seed; biases and gains are drawn too."""
    torch.manual_seed(5)
    if cell == "lstm-projected":
        settings["proj_size"] = 4
    rnn = CELLS[cell](3, 6, layers, **settings).eval()
    for weight in rnn.parameters():
        nn.init.uniform_(weight, -0.6, 0.6)
    return rnn


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def in_numpy(cell: str, rnn: Recurrent, x: Tensor, states: tuple[Tensor, ...] | None = None) -> tuple[Any, Any, Any]:
    """x [T, B, F] stream by stream: the top hidden states [T, B, H], and every layer's last h and c [L, B, H]."""
    layers, tops, last = reference.layers_of(rnn), [], []
    for stream in range(x.shape[1]):
        start = None
        if states is not None:
            given = [state[:, stream].double().numpy() for state in states]
            start = list(zip(given[0], given[-1], strict=True))
        top, held = reference.run(cell, layers, x[:, stream].double().numpy(), start)
        tops.append(top)
        last.append(held)
    h, c = (np.stack([[held[k] for held in stream] for stream in last], axis=1) for k in (0, 1))
    return np.stack(tops, axis=1), h, c


@pytest.mark.parametrize(("cell", "layers", "bias"), CASES)
@torch.no_grad()
def test_every_way_is_the_formulas(cell: str, layers: int, bias: bool) -> None:
    """A layer's own call, the sequence and T steps give the numpy cell's hidden states and last states."""
    rnn, x = built(cell, layers, bias=bias), drawn(20, 3, 3)
    top, *last = in_numpy(cell, rnn, x)
    states: tuple[Tensor, ...] = tuple(torch.zeros(state.shape[0], 3, state.shape[1]) for state in cells.states_of(rnn))
    tops = []
    own, after = cells.run(rnn, x, None)
    for row in x:
        hidden, states = cells.step(rnn, row, states)
        tops.append(hidden[-1][0])
    for given in (own, cells.sequence(rnn, x)[-1], torch.stack(tops)):
        same(given, top)
    for given, expected in zip((*after, *states), last[: len(after)] * 2, strict=True):
        same(given, expected)


@pytest.mark.parametrize("cell", list(CELLS))
@torch.no_grad()
def test_states_are_taken_up(cell: str) -> None:
    """From random states, a call over whole sequences and steps go on as the numpy cell does."""
    rnn, x = built(cell), drawn(9, 3, 3)
    states = tuple(torch.tanh(drawn(state.shape[0], 3, state.shape[1])) for state in cells.states_of(rnn))
    top, *last = in_numpy(cell, rnn, x, states)
    own, after = cells.run(rnn, x, states)
    same(own, top)
    for given, expected in zip(after, last, strict=False):
        same(given, expected)
    for t, row in enumerate(x):
        hidden, states = cells.step(rnn, row, states)
        same(hidden[-1][0], top[t])


@pytest.mark.parametrize("cell", OWN)
@torch.no_grad()
def test_batch_first_is_a_layout(cell: str) -> None:
    """With batch_first x and y are [B, T, F], the states [L, B, H] as ever."""
    one, other, x = built(cell), built(cell, batch_first=True), drawn(7, 3, 3)
    y, states = cells.run(one, x, None)
    turned, theirs = cells.run(other, x.transpose(0, 1), None)
    torch.testing.assert_close(turned.transpose(0, 1), y, atol=0, rtol=0)
    for state, their in zip(states, theirs, strict=True):
        torch.testing.assert_close(state, their, atol=0, rtol=0)


@pytest.mark.parametrize("cell", OWN)
def test_every_weight_learns(cell: str) -> None:
    """Gradients reach every weight, and sixty updates at least halve the error of recalling the row before."""
    rnn, x = built(cell, dropout=0.0).train(), drawn(12, 16, 3)
    head = nn.Linear(6, 3)
    optimiser = torch.optim.Adam([*rnn.parameters(), *head.parameters()], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (head(rnn(x)[0][1:]) - x[:-1]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in rnn.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@torch.no_grad()
def test_a_peephole_of_zero_is_none() -> None:
    """With peephole weights of zero, and the others those of an nn.LSTM, the LSTM is that one."""
    twin, x = nn.LSTM(3, 6, 2), drawn(20, 3, 3)
    rnn = PeepholeLSTM(3, 6, 2)
    absent, unknown = rnn.load_state_dict(twin.state_dict(), strict=False)
    assert absent == ["weight_peephole_l0", "weight_peephole_l1"] and not unknown
    for name in absent:
        nn.init.zeros_(rnn.get_parameter(name))
    same(rnn(x)[0], twin(x)[0])


@torch.no_grad()
def test_peephole_and_coupling_are_one_module_either_way() -> None:
    """`PeepholeLSTM(coupled=True)` and `CoupledLSTM(peephole=True)` take the same weights and give the same."""
    one, other, x = PeepholeLSTM(3, 6, coupled=True), CoupledLSTM(3, 6, peephole=True), drawn(20, 3, 3)
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(one(x)[0], other(x)[0], atol=0, rtol=0)


@pytest.mark.parametrize("kind", [PeepholeLSTM, CoupledLSTM, LayerNormLSTM, ResetBeforeGRU])
def test_dropout_lies_between_layers(kind: type[nn.Module]) -> None:
    """In training the layer above reads a thinned input; evaluated, or with one layer, nothing is dropped."""
    x = drawn(20, 3, 3)
    for layers, differs in ((1, False), (2, True)):
        torch.manual_seed(5)
        rnn = kind(3, 6, layers, dropout=0.5)
        trained, evaluated = rnn.train()(x)[0], rnn.eval()(x)[0]
        assert torch.equal(trained, evaluated) != differs


def test_an_input_of_another_shape_is_refused() -> None:
    """The sentence says what was given, and what it must be."""
    for x in (torch.zeros(4, 3), torch.zeros(4, 2, 5)):
        with pytest.raises(ValueError, match=r"x has shape \[4, .*it must be of three axes, the last 3 wide"):
            PeepholeLSTM(3, 6)(x)


def test_layers_that_cannot_stream_are_refused() -> None:
    """The sentence names the layer and the reason."""
    with pytest.raises(ExportError, match="layer 'encoder' is bidirectional"):
        cells.check(nn.LSTM(3, 5, bidirectional=True), "encoder")
