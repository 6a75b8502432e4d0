"""Recurrent layers, stepped and whole, against the plain numpy cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from statestep.export import ExportError, cells

from . import reference

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CASES = [(cell, layers) for cell in CELLS for layers in (1, 2)]


def built(cell: str, layers: int) -> tuple[nn.RNNBase, list[reference.Weights], torch.Tensor]:
    """A layer of 3 inputs and 5 units, its weights in float64, and a sequence x [30, 4, 3]."""
    torch.manual_seed(5)
    rnn = CELLS[cell](3, 5, layers).eval()
    weights = [tuple(w.detach().double().numpy() for w in layer) for layer in rnn.all_weights]
    return rnn, weights, torch.randn(30, 4, 3)


@pytest.mark.parametrize(("cell", "layers"), CASES)
def test_whole_sequences_are_the_formulas(cell: str, layers: int) -> None:
    """Every stream's hidden states equal the numpy cell's, within float32."""
    rnn, weights, x = built(cell, layers)
    with torch.no_grad():
        top = cells.sequence(rnn, x)[-1].numpy()  # [T, B, H]
    for stream in range(x.shape[1]):
        expected = reference.hidden_states(cell, weights, x[:, stream].double().numpy())
        np.testing.assert_allclose(top[:, stream], expected, atol=2e-6)


@pytest.mark.parametrize(("cell", "layers"), CASES)
def test_steps_are_the_whole_sequence(cell: str, layers: int) -> None:
    """Stepping with the state handed on gives every layer's hidden state of torch's own call, and its final states."""
    rnn, _, x = built(cell, layers)
    states = tuple(torch.zeros(state.shape[0], 4, state.shape[1]) for state in cells.states_of(rnn))
    tops = []
    with torch.no_grad():
        for row in x:
            hidden, states = cells.step(rnn, row, states)
            tops.append(hidden[-1][0])
        whole, final = rnn(x)
    torch.testing.assert_close(torch.stack(tops), whole, atol=2e-6, rtol=0)
    for stepped, theirs in zip(states, final if cell == "lstm" else (final,), strict=True):
        torch.testing.assert_close(stepped, theirs, atol=2e-6, rtol=0)


def test_a_relu_cell_bends_as_it_should() -> None:
    """nn.RNN with relu is stepped with relu."""
    torch.manual_seed(5)
    rnn, x = nn.RNN(3, 5, nonlinearity="relu").eval(), torch.randn(30, 4, 3)
    with torch.no_grad():
        torch.testing.assert_close(cells.sequence(rnn, x)[-1], rnn(x)[0], atol=2e-6, rtol=0)


def test_a_layer_without_biases_is_stepped() -> None:
    """bias=False leaves two weights a layer."""
    for kind in CELLS.values():
        rnn, x = kind(3, 5, bias=False).eval(), torch.randn(30, 4, 3)
        with torch.no_grad():
            torch.testing.assert_close(cells.sequence(rnn, x)[-1], rnn(x)[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("rnn", "words"),
    [(nn.LSTM(3, 5, bidirectional=True), "bidirectional"), (nn.LSTM(3, 5, proj_size=2), "proj_size 2")],
)
def test_layers_that_cannot_stream_are_refused(rnn: nn.RNNBase, words: str) -> None:
    """The sentence names the layer and the reason."""
    with pytest.raises(ExportError, match=f"layer 'encoder'.*{words}"):
        cells.check(rnn, "encoder")
