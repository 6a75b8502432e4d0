"""A model whose rows depend on their batch-mates is found out, however little it takes; one that is sound is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from onnx import helper

from statestep.runtime import Contract, Feature, Output, State, StepModel, rows_agree
from statestep.runtime.waves import ROWS_PER_RUN

from ..laws import broken
from ..models import graph, pump, smoother, smoother_contract, stamped
from .doubles import Array, Double

SEEDS = range(5)


def lstm(features: int, units: int) -> StepModel:
    """An LSTM of random weights, its hidden state the output."""
    rng = np.random.default_rng(1)
    drawn = {"W": (1, 4 * units, features), "R": (1, 4 * units, units), "b": (1, 8 * units)}
    weights = {name: rng.uniform(-0.3, 0.3, shape).astype(np.float32) for name, shape in drawn.items()}
    nodes = [
        helper.make_node("Unsqueeze", ["x", "first"], ["z"]),
        helper.make_node("LSTM", ["z", "W", "R", "b", "", "h", "c"], ["", "hn", "cn"], hidden_size=units),
        helper.make_node("Squeeze", ["hn", "first"], ["y"]),
    ]
    state = ("float32", [1, "B", units])
    made = graph(
        nodes,
        {"x": ("float32", ["B", features]), "h": state, "c": state},
        {"y": ("float32", ["B", units]), "hn": state, "cn": state},
        weights | {"first": np.array([0])},
    )
    states = tuple(State(name, f"{name}n", (1, units), batch_axis=1) for name in "hc")
    named = tuple(Feature(f"f{i}") for i in range(features))
    return StepModel(stamped(made, Contract("lstm", named, states, (Output("y"),))))


def of_any_size() -> StepModel:
    """The smoother, with a feature whose range is that of its dtype and one without."""
    features = (Feature("a", min=-3e38, max=3e38), Feature("b"))
    return StepModel(stamped(smoother(), smoother_contract(features=features)))


SOUND: dict[str, Callable[[], StepModel | Double]] = {
    "a double with float, int and bool states": Double,
    "a whole detector": pump,
    "a detector with missing readings": lambda: pump(missing="own-forecast"),
    "an LSTM of 8 to 64": lambda: lstm(8, 64),
    "an LSTM of 25 to 128": lambda: lstm(25, 128),
    "readings as wide as their dtype": of_any_size,
    "a division by a reading that may be zero": broken.runaway,
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_model_agrees(name: str) -> None:
    """Whatever is drawn: with a false alarm its every stream would be written in every transaction."""
    assert [seed for seed in SEEDS if not rows_agree(SOUND[name](), seed=seed)] == []


@pytest.mark.parametrize("made", [broken.batch_mean, broken.running_sum, broken.rnn_operator])
def test_a_model_that_mixes_its_rows_is_found(made: Callable[[], StepModel]) -> None:
    """A mean over the call, a sum down its rows, a kernel that rounds a lone row otherwise: with every seed."""
    assert [seed for seed in SEEDS if rows_agree(made(), seed=seed)] == []


class Touchy(Double):
    """The double, but where `strange` says so of a call, the level of its last row is one bit off."""

    def __init__(self, strange: Callable[[Array, Array], bool], where: str):
        super().__init__()
        self.strange = strange
        self.where = where

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        """As `Double.step`."""
        outputs, following = super().step(x, states, times)
        level = outputs["y"] if self.where == "output" else following[0]
        if self.strange(x, states[1]):
            level[-1] = np.nextafter(level[-1], np.float32(np.inf))
        return outputs, following


STRANGE: dict[str, Callable[[Array, Array], bool]] = {
    "alone": lambda x, _: len(x) == 1,
    "in a pair": lambda x, _: len(x) == 2,
    "in a call of seven": lambda x, _: len(x) == 7,
    "in the call of all, for its place": lambda x, _: len(x) == 64,
    "in a run as large as the engine's": lambda x, _: len(x) == ROWS_PER_RUN,
    "beside a great reading": lambda x, _: bool(np.abs(x).max() > 10),
    "beside an older stream": lambda _, count: bool(count.max() > count[-1]),
    "beside a stream that saw two steps": lambda x, count: len(x) > 1 and bool(count.max() == 2),
}


@pytest.mark.parametrize("where", ["output", "state"])
@pytest.mark.parametrize("name", STRANGE)
def test_one_bit_in_one_company_is_enough(name: str, where: str) -> None:
    """Each company that is tried is needed, and so are rows of several sizes and ages: with every seed."""
    assert [seed for seed in SEEDS if rows_agree(Touchy(STRANGE[name], where), seed=seed)] == []


class Signed(Double):
    """The double, with an output that is nothing: as -0 and a NaN of another sign where a row is alone."""

    def __init__(self, nothing: float):
        super().__init__()
        self.nothing = np.float32(nothing)

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        """As `Double.step`."""
        outputs, following = super().step(x, states, times)
        sign = np.float32(-1 if len(x) == 1 else 1)
        return outputs | {"y": np.full_like(x, np.copysign(self.nothing, sign))}, following


def test_zeros_differ_by_their_sign_and_nans_do_not() -> None:
    """1 / -0 is another number than 1 / 0, but a row with a NaN is rejected whatever its bits are."""
    assert not rows_agree(Signed(0.0))
    assert rows_agree(Signed(np.nan))


class Tokens(Double):
    """Looks its readings up in a table of four rows, as an embedding does, and has no use for another number."""

    def __init__(self, features: tuple[Feature, ...], mixing: bool):
        super().__init__()
        self.contract = Contract("tokens", features, self.contract.states, self.contract.outputs, input_dtype="int64")
        self.mixing = mixing
        self.seen: set[int] = set()

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        """As `Double.step`, x int64 [B, 2]."""
        self.seen |= set(x.ravel().tolist())
        table = np.array([0.5, 1.5, 2.5, 3.5], np.float32)
        assert x.dtype == np.int64 and x.min() >= 0
        return super().step(table[x] + np.float32(self.mixing * len(x)), states)


@pytest.mark.parametrize(("highest", "tokens"), [(None, {0, 1, 2}), (3.5, {0, 1, 2, 3})])
def test_whole_numbers_stay_in_their_range(highest: float | None, tokens: set[int]) -> None:
    """A token that no table holds would fail the model, though it is sound."""
    features = (Feature("a", max=highest), Feature("b", min=1.5 if highest is None else -7, max=highest))
    sound = Tokens(features, mixing=False)
    assert rows_agree(sound)
    assert sound.seen == tokens
    assert not rows_agree(Tokens(features, mixing=True))


def test_it_costs_no_more_than_a_few_hundred_calls() -> None:
    """It runs at every start: some tens of milliseconds for a model that takes microseconds a call."""
    model = Double()
    assert rows_agree(model)
    assert model.calls < 400


def test_fewer_than_two_rows_say_nothing() -> None:
    """One row is in no company, so that it would always agree."""
    with pytest.raises(ValueError, match="1 is too few"):
        rows_agree(Double(), rows=1)
    assert rows_agree(Double(), rows=2) and not rows_agree(broken.batch_mean(), rows=2)
