"""The forecaster's stack of layers, of one kind or mixed: its states, its weights, its nodes in the graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from statestep.export import ExportError, Forecaster, ForecasterConfig, cells
from statestep.export.forecaster import CELLS, kinds_of
from statestep.export.graph import sequence_graph, step_graph
from statestep.export.lift import lift
from statestep.export.weights import load, reference_of, save

from . import reference
from .models import model, readings
from .operators import NODES, nodes

MIXED = "rnn-relu,lstm-projected,gru-reset-before,lstm-layernorm,lstm-peephole"


def network(cell: str, *, layers: int = 1, hidden: int = 6, **settings: Any) -> Forecaster:
    """A forecaster of all of three features, in evaluation."""
    made = Forecaster(ForecasterConfig(3, (0, 1, 2), cell, hidden, layers, **settings), seed=3).eval()
    nn.init.uniform_(made.head.weight, -0.5, 0.5)
    return made


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_mixed_stack_is_its_layers_one_above_another() -> None:
    """Corrections of the trained call and of the steps are those of the numpy cells, chained."""
    made, x = network(MIXED), drawn(15, 2, 3)
    head = made.head.weight.double().numpy(), made.head.bias.double().numpy()
    states: tuple[Tensor, ...] = tuple(torch.zeros(s.shape[0], 2, s.shape[1]) for s in made.states)
    stepped = []
    for row in x:
        given, states = made.step(row, states)
        stepped.append(given)
    whole, after = made(x)
    for stream in range(2):
        y = x[:, stream].double().numpy()
        for cell, part in zip(kinds_of(MIXED), made.parts, strict=True):
            y = reference.hidden_states(cell, reference.layers_of(part), y)
        truth = y @ head[0].T + head[1]
        np.testing.assert_allclose(whole[:, stream].numpy(), truth, atol=4e-6)
        np.testing.assert_allclose(torch.stack(stepped)[:, stream].numpy(), truth, atol=4e-6)
    for one, other in zip(states, after, strict=True):
        torch.testing.assert_close(one, other, atol=4e-6, rtol=0)


def test_states_are_named_by_layer_where_kinds_differ() -> None:
    """Layers of one kind share h0 and c0, as they did; in a mixed stack each layer has its own."""
    assert [s.input for s in network("lstm", layers=2).states] == ["h0", "c0"]
    assert [s.shape for s in network("gru, gru").states] == [(2, 6)]
    assert [(s.input, s.output, s.shape) for s in network("lstm-projected,gru", projection=2).states] == [
        ("layer1_h0", "layer1_hn", (1, 2)),
        ("layer1_c0", "layer1_cn", (1, 6)),
        ("layer2_h0", "layer2_hn", (1, 6)),
    ]


def test_dropout_thins_a_mixed_stack_between_its_layers() -> None:
    """In training what a layer reads from the one below is thinned, in evaluation nothing is."""
    made, x = network("lstm,gru", dropout=0.5), drawn(10, 2, 3)
    below = cells.run(made.parts[0], x, None)[0]
    seen: list[Tensor] = []
    made.parts[1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    made.train()(x)
    made.eval()(x)
    assert 0.2 < float((seen[0] == 0).double().mean()) < 0.8
    torch.testing.assert_close(seen[1], below, atol=0, rtol=0)


class Everything(nn.Module):
    """Every kind of layer side by side, without biases, batch first; the forecast is all their hidden states."""

    def __init__(self) -> None:
        super().__init__()
        settings: dict[str, Any] = {"bias": False, "batch_first": True}
        self.cells = nn.ModuleDict(
            {
                cell: CELLS[cell](2, 4, 1, **settings | ({"proj_size": 3} if cell == "lstm-projected" else {}))
                for cell in CELLS
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[..., :2])[0] for layer in self.cells.values()], dim=-1)


def test_layers_without_biases_are_written_and_run() -> None:
    """A module of every layer, without biases and batch first: two graphs, bit-equal, that give the numpy cells'."""
    torch.manual_seed(6)
    module = Everything().eval()
    names = [f"s{column}" for column in range(sum(4 - (cell == "lstm-projected") for cell in CELLS))]
    lifted = lift(module, features=names).model
    step, whole = step_graph(lifted), sequence_graph(lifted)
    assert sorted(map(str, nodes(step))) == sorted(map(str, NODES.values())) == sorted(map(str, nodes(whole)))
    x = drawn(30, 2, len(names)).numpy()
    session = ort.InferenceSession(step.SerializeToString())
    states = {state.input: value.numpy() for state, value in zip(lifted.states, lifted.initial_states(2), strict=True)}
    stepped = []
    for row in x:
        given = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": row} | states), strict=True))
        states = {state.input: given[state.output] for state in lifted.states}
        stepped.append(given["prediction"])
    (at_once,) = ort.InferenceSession(whole.SerializeToString()).run(["prediction"], {"x": x})
    assert np.stack(stepped).tobytes() == at_once.tobytes()
    for stream in range(2):
        truth = [
            reference.hidden_states(cell, reference.layers_of(layer), x[:, stream, :2].astype(np.float64))
            for cell, layer in module.cells.items()
        ]
        np.testing.assert_allclose(at_once[:, stream], np.concatenate(truth, axis=1), atol=4e-6)


@pytest.mark.parametrize("cell", [MIXED, "lstm-projected", "lstm-peephole-coupled"])
def test_weights_build_the_same_model_again(cell: str, tmp_path: Path) -> None:
    """Saved and loaded, every kind of stack gives the same bits."""
    made, x = model(cell, hidden=6), readings(12, 2)
    save(made, tmp_path / "m.pt")
    one, other = reference_of(made)(x), reference_of(load(tmp_path / "m.pt"))(x)
    assert one.keys() == other.keys()
    assert all(one[name].tobytes() == other[name].tobytes() for name in one)


def test_weights_without_a_later_setting_are_read(tmp_path: Path) -> None:
    """A file that knows of no projections builds its model; the weights have the names they had."""
    made, x = model("lstm", 2), readings(12, 2)
    save(made, tmp_path / "m.pt")
    document = torch.load(tmp_path / "m.pt", weights_only=True)
    assert document["network"].pop("projection", "absent") is None
    assert {"network.rnn.weight_ih_l1", "network.head.weight", "network.gain"} < document["weights"].keys()
    torch.save(document, tmp_path / "old.pt")
    one, other = (reference_of(each)(x)["prediction"] for each in (made, load(tmp_path / "old.pt")))
    assert one.tobytes() == other.tobytes()


def test_weights_of_a_release_that_scored_in_torch_are_told_apart(tmp_path: Path) -> None:
    """Its format is named, with the one that is read."""
    save(model("gru"), tmp_path / "m.pt")
    document = torch.load(tmp_path / "m.pt", weights_only=True)
    torch.save(document | {"format": 1, "scoring": {"threshold": 1.5}}, tmp_path / "old.pt")
    with pytest.raises(ExportError, match=r"old\.pt: has format 1, this release reads 2$"):
        load(tmp_path / "old.pt")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cell": "lstm,transformer"}, "cell is 'transformer', it must be one of rnn, rnn-relu, lstm, "),
        ({"cell": ""}, "cell is '', it must be one of"),
        ({"layers": 0}, "layers is 0"),
        ({"cell": "lstm,gru", "layers": 3}, "names 2 layers and layers is 3: leave one of them out"),
        ({"projection": 3}, "projection is 3 and no layer is lstm-projected: leave it out"),
        ({"cell": "lstm-projected", "projection": 6}, "projection is 6, it must be 1 or more and below the 6 hidden"),
        ({"cell": "lstm-projected", "hidden": 1}, "projection is 0, it must be 1 or more"),
    ],
)
def test_settings_that_make_no_stack_are_refused(settings: dict[str, Any], words: str) -> None:
    """One sentence names the setting."""
    given: dict[str, Any] = {"features": 3, "targets": (0,), "hidden": 6}
    with pytest.raises(ExportError, match=words):
        ForecasterConfig(**given | settings)


@torch.no_grad()
def test_layers_draw_as_torch_does() -> None:
    """Weights lie within ±1/√H, as in nn.LSTM, and fill that range; gains and their biases begin where they should."""
    for cell in CELLS:
        layer = CELLS[cell](3, 16, 1, **({"proj_size": 8} if cell == "lstm-projected" else {}))
        for name, weight in layer.named_parameters():
            if name.startswith("gain"):
                assert (weight == (0.1 if name == "gain_hh_l0" else 1)).all()
            elif cell == "lstm-layernorm" and name.startswith("bias"):
                assert (weight == 0).all()
            else:
                assert 0.5 / 4 < float(weight.abs().max()) <= 1 / 4


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_an_untrained_layer_norm_does_not_wander(seed: int) -> None:
    """Its float32 stays with its float64 over 60 rows: what rounding does is not magnified from row to row."""
    torch.manual_seed(seed)
    layer, x = CELLS["lstm-layernorm"](3, 12, 2).eval(), drawn(60, 8, 3)
    given = cells.run(layer, x, None)[0]
    torch.testing.assert_close(given.double(), cells.run(layer.double(), x.double(), None)[0], atol=5e-6, rtol=0)
