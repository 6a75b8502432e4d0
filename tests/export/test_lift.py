"""A team's own modules: what is taken streams as it forecasts from a sequence, what is not is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from statestep.export import ExportError, export_step, load_module, load_weights, read_scaler, scaler_of
from statestep.export.lift import lift
from statestep.runtime import Engine, StepModel

from .models import FEATURES, MEAN, STD, Array, readings


class Team(nn.Module):
    """What teams write: normalise, recur, drop out, a head on every row or on the last."""

    def __init__(self, cell: Any = nn.LSTM, *, batch_first: bool = True, last: bool = False, out: int = 3):
        super().__init__()
        self.batch_first, self.last = batch_first, last
        self.encoder = cell(3, 12, 2, batch_first=batch_first, dropout=0.3)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, out))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.encoder(x)
        if self.last:
            y = y[:, -1] if self.batch_first else y[-1]
        given: Tensor = self.head(self.norm(y))
        return given


class Branches(nn.Module):
    """Three recurrent layers, one fed by another, zero states made by hand, a head on hidden states, squeezed."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.GRU(3, 6, batch_first=True)
        self.high = nn.LSTM(6, 6, batch_first=True)
        self.side = nn.ModuleDict({"simple": nn.RNN(3, 6, batch_first=True, nonlinearity="relu")})
        self.head = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        zero = torch.zeros(1, x.shape[0], 6)
        y, _ = self.low(x, zero)
        _, (h, _) = self.high(y, (zero, zero))
        side, _ = self.side["simple"](x)
        return self.head(torch.cat([h[-1], side[:, -1]], dim=-1)).squeeze(-1), h


class Plain(nn.Module):
    """A recurrent layer and a head; the refused modules below differ from it in `look`."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.look(x))

    def look(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


class Mean(Plain):
    def look(self, x: Tensor) -> Tensor:
        return super().look(x).mean(dim=0)


class Cell(Plain):
    def look(self, x: Tensor) -> Tensor:
        cell: Tensor = self.rnn(x)[1][1]
        return cell[-1]


class Lagged(Plain):
    def look(self, x: Tensor) -> Tensor:
        return super().look(x + torch.cat([torch.zeros_like(x[:1]), x[:-1]]))


class Twice(Plain):
    def look(self, x: Tensor) -> Tensor:
        return super().look(x) + super().look(x)


class Learnt(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.ones(1, 1, 8))

    def look(self, x: Tensor) -> Tensor:
        start = self.start.expand(1, x.shape[1], 8).contiguous()
        y: Tensor = self.rnn(x, (start, start))[0]
        return y


class Idle(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.GRU(3, 8)


class Worded(Plain):
    def forward(self, x: Tensor) -> str:
        return "no tensor"


def seeded(kind: Any, *args: Any, **settings: Any) -> nn.Module:
    torch.manual_seed(4)
    module: nn.Module = kind(*args, **settings)
    return module


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_stepping_gives_the_modules_own_forecasts(cell: type[nn.RNNBase], batch_first: bool, last: bool) -> None:
    """After n steps the forecast is what the untouched module gives for those n rows at once, in the sensors' units."""
    module = seeded(Team, cell, batch_first=batch_first, last=last)
    model = lift(module, features=FEATURES, scaler=scaler_of(MEAN, STD, FEATURES)).model
    x = torch.from_numpy(readings(30, 4))  # [T, B, F]
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    z = (x - mean) / std
    states = model.initial_states(4)
    with torch.no_grad():
        for t in range(30):
            given, states = model.network.step(z[t], states)
            whole = module.eval()(z[: t + 1].transpose(0, 1) if batch_first else z[: t + 1])
            truth = whole if last else (whole[:, -1] if batch_first else whole[-1])
            torch.testing.assert_close(given, truth, atol=3e-6, rtol=0)


def test_a_lifted_module_is_written_and_runs(tmp_path: Path) -> None:
    """The written model, in the engine, gives the module's forecasts of raw readings, scored and scaled."""
    module = seeded(Team, out=2, last=True)
    x = readings(200, 1)[:, 0]
    lifted = lift(
        module,
        features=FEATURES,
        targets=["speed", "flow"],
        scaler=scaler_of(MEAN, STD, FEATURES),
        data={"a": x},
    )
    exported = export_step(lifted.model, tmp_path / "team.onnx", lifted.detector, ranges=lifted.ranges)
    assert exported.weights is None and exported.report.passed
    engine = Engine(StepModel.load(exported.model))
    out = engine.advance([b"a"] * 40, x[:40])
    mean, std = np.array(MEAN, np.float32), np.array(STD, np.float32)
    z = torch.from_numpy((x - mean) / std)
    with torch.no_grad():
        truth = np.stack([module.eval()(z[None, : t + 1])[0].numpy() for t in range(40)])  # [T, K]
    columns = [2, 0]
    np.testing.assert_allclose((out.prediction - mean[columns]) / std[columns], truth, atol=1e-5)
    assert lifted.errors is not None and list(lifted.errors.by_target) == ["speed", "flow"]
    assert np.isfinite(out["score"]).all() and out["score"][0] == 0 and out["score"][20] > 0


def test_several_layers_carry_their_states_apart(tmp_path: Path) -> None:
    """Each recurrent layer has state pairs of its name, and without data there is no score."""
    module = seeded(Branches)
    lifted = lift(module, features=FEATURES, targets=["flow"], output="raw")
    assert lifted.errors is None and lifted.detector is None
    exported = export_step(lifted.model, tmp_path / "branches.onnx")
    assert [(s.input, s.output) for s in exported.contract.states] == [
        ("low_h0", "low_hn"),
        ("high_h0", "high_hn"),
        ("high_c0", "high_cn"),
        ("side_simple_h0", "side_simple_hn"),
        ("forecast", "next_forecast"),
        ("last", "next_last"),
    ]
    assert [output.name for output in exported.contract.outputs] == ["prediction", "expected"]
    x = (readings(15, 1)[:, 0] - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    out = Engine(StepModel.load(exported.model)).advance([b"a"] * 15, x)
    with torch.no_grad():
        truth = [module(torch.from_numpy(x[None, : t + 1]))[0].item() for t in range(15)]
    np.testing.assert_allclose(out.prediction[:, 0], truth, atol=1e-5)


def test_the_module_is_left_as_it_was() -> None:
    """Lifting works on a copy: training mode, layers and weights of the given module stay."""
    module = seeded(Team).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    lift(module, features=FEATURES)
    assert module.training and isinstance(module.get_submodule("encoder"), nn.LSTM)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (Mean, "Mean cannot stream: stepped row by row it differs by"),
        (Lagged, "Lagged cannot stream"),
        (Learnt, "Learnt cannot stream.*does not start from zero"),
        (Cell, "Cell looks at the cell state"),
        (Twice, "layer 'rnn' is called twice"),
        (Idle, "layer 'spare' is not called"),
        (Worded, "gives a str, it must give its forecast as a tensor"),
        (lambda: nn.Linear(3, 3), "Linear holds no nn.LSTM, nn.GRU or nn.RNN"),
        (lambda: nn.LSTM(3, 3, bidirectional=True), "is bidirectional"),
        (lambda: nn.GRU(5, 3), "GRU fails on 3 sequences of 1 rows of 3 features"),
        (lambda: nn.GRU(3, 4), "GRU forecasts 4 values and 3 targets are named"),
    ],
)
def test_what_cannot_stream_is_refused(module: Any, words: str) -> None:
    """One sentence says why."""
    with pytest.raises(ExportError, match=words) as caught:
        lift(seeded(module), features=FEATURES)
    assert "\n" not in str(caught.value)


def test_a_bare_layer_is_a_module_too() -> None:
    """nn.GRU itself forecasts its hidden state."""
    assert lift(seeded(nn.GRU, 3, 3), features=FEATURES).model.states[0].shape == (1, 3)


def test_settings_of_lift_are_checked() -> None:
    """The unknown output and target are named."""
    with pytest.raises(ExportError, match="output is 'cooked'"):
        lift(seeded(Team), features=FEATURES, output="cooked")
    with pytest.raises(ExportError, match="target 'mood' is not among"):
        lift(seeded(Team), features=FEATURES, targets=["mood"])


def test_a_scaler_is_read_by_name_and_by_order(tmp_path: Path) -> None:
    """Objects and lists give the same scaling."""
    path = tmp_path / "scaler.json"
    for mean, std in ((MEAN, STD), (dict(zip(FEATURES, MEAN, strict=True)), dict(zip(FEATURES, STD, strict=True)))):
        path.write_text(json.dumps({"mean": mean, "std": std}))
        scaler = read_scaler(path, FEATURES)
        assert scaler.mean.tolist() == MEAN and scaler.std.tolist() == STD


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ("[1]", 'must be an object with "mean" and "std"'),
        ('{"mean": [1, 2, 3]}', "the scaler's std must have a number for each"),
        ('{"mean": [1, 2], "std": [1, 1]}', "the scaler's mean must have a number for each"),
        ('{"mean": {"flow": 1}, "std": [1, 1, 1]}', "the scaler's mean of 'pressure' is None"),
        ('{"mean": [1, 2, 3], "std": [1, 0, 1]}', "the scaler's std of 'pressure' is 0, .* above 0"),
    ],
)
def test_a_wrong_scaler_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """The file or the feature is named."""
    path = tmp_path / "scaler.json"
    path.write_text(text)
    with pytest.raises(ExportError, match=words):
        read_scaler(path, FEATURES)
    with pytest.raises(ExportError, match=r"absent\.json' cannot be read"):
        read_scaler(tmp_path / "absent.json", FEATURES)


@pytest.mark.parametrize("wrapped", [True, False])
def test_weights_are_loaded(tmp_path: Path, wrapped: bool) -> None:
    """A state_dict, bare or under "state_dict", fills the module."""
    trained, fresh = seeded(Team), Team()
    held: dict[str, Any] = trained.state_dict()
    torch.save({"state_dict": held, "epoch": 3} if wrapped else held, tmp_path / "w.pt")
    load_weights(fresh, tmp_path / "w.pt")
    assert all(torch.equal(value, held[name]) for name, value in fresh.state_dict().items())


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """The first tensor that differs is named, with both shapes."""
    torch.save(seeded(Team, out=2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ExportError, match=r"'head.3.bias' is \[2\] in the file and \[3\] in the module"):
        load_weights(Team(), tmp_path / "w.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ExportError, match=r"text\.pt' are not a torch state_dict"):
        load_weights(Team(), tmp_path / "text.pt")
    with pytest.raises(ExportError, match=r"absent\.pt' cannot be read"):
        load_weights(Team(), tmp_path / "absent.pt")


def test_a_factory_is_found_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pkg.mod:name is imported from where the command was started."""
    (tmp_path / "plant_model.py").write_text(
        "from torch import nn\ndef make():\n    return nn.GRU(3, 3)\nanswer = int\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    assert isinstance(load_module("plant_model:make"), nn.GRU)
    for factory, words in (
        ("plant_model", "must be written pkg.mod:name"),
        ("plant_model:absent", "fails: AttributeError"),
        ("no_such_module:make", "fails: ModuleNotFoundError"),
        ("plant_model:answer", "gives a int, it must give a torch module"),
    ):
        with pytest.raises(ExportError, match=words):
            load_module(factory)


def test_calibration_without_a_scaler_is_in_the_datas_own_spread() -> None:
    """The least spread is a thousandth of the sensor's, so that small units are not floored away."""

    class Constant(Plain):
        def look(self, x: Tensor) -> Tensor:
            return 0 * super().look(x)

    module = seeded(Constant)
    nn.init.zeros_(module.get_submodule("head").bias)  # type: ignore[arg-type]
    data: dict[str, Array] = {"a": 1e-6 * np.random.default_rng(0).standard_normal((2000, 3))}
    detector = lift(module, features=FEATURES, data=data).detector
    assert detector is not None
    np.testing.assert_allclose(detector.detector.std, 1e-6, rtol=0.2)
    np.testing.assert_allclose(detector.detector.spread, 1.0, rtol=0.2)
