"""The memory horizon, on models whose forgetting is known in closed form."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from onnx import helper

from statestep.export.errors import DataError
from statestep.export.horizon import in_words, memory, watch
from statestep.runtime import Contract, Feature, Output, State, StepModel

from ..models import Array, graph, stamped

ALPHA = 0.1


def leaky(keep: float, *, state: str = "float32", role: str | None = "prediction") -> StepModel:
    """h ← keep · h + x, y = h: a gap between two pasts shrinks by `keep` each step, whatever the readings."""
    model = graph(
        [
            helper.make_node("Mul", ["h", "keep"], ["kept"]),
            helper.make_node("Add", ["kept", "x"], ["next_h"]),
            helper.make_node("Identity", ["next_h"], ["y"]),
        ],
        {"x": ("float32", ["B", 1]), "h": ("float32", ["B", 1])},
        {"y": ("float32", ["B", 1]), "next_h": ("float32", ["B", 1])},
        {"keep": np.array(keep, np.float32)},
    )
    contract = Contract(
        "leaky",
        (Feature("a", min=-1.0, max=1.0),),
        (State("h", "next_h", (1,)),),
        (Output("y", role=role, features=("a",) if role else None),),
    )
    return StepModel(stamped(model, contract))


def smoothed_error() -> StepModel:
    """score ← α · x² + (1 − α) · score, with a threshold of 2: what the detector's score is made of."""
    model = graph(
        [
            helper.make_node("Mul", ["x", "x"], ["squared"]),
            helper.make_node("Mul", ["squared", "take"], ["taken"]),
            helper.make_node("Mul", ["error", "keep"], ["kept"]),
            helper.make_node("Add", ["kept", "taken"], ["next_error"]),
            helper.make_node("Squeeze", ["next_error", "column"], ["score"]),
            helper.make_node("Mul", ["score", "nothing"], ["zero"]),
            helper.make_node("Add", ["zero", "two"], ["threshold"]),
        ],
        {"x": ("float32", ["B", 1]), "error": ("float32", ["B", 1])},
        {"score": ("float32", ["B"]), "threshold": ("float32", ["B"]), "next_error": ("float32", ["B", 1])},
        {
            "take": np.array(ALPHA, np.float32),
            "keep": np.array(1 - ALPHA, np.float32),
            "nothing": np.array(0, np.float32),
            "two": np.array(2, np.float32),
            "column": np.array([1]),
        },
    )
    contract = Contract(
        "error",
        (Feature("a", min=-1.0, max=1.0),),
        (State("error", "next_error", (1,)),),
        (Output("score", role="score"), Output("threshold", role="threshold")),
    )
    return StepModel(stamped(model, contract))


def counting(cap: float) -> StepModel:
    """seen ← min(seen + 1, cap), y = seen + x: two streams agree once both have counted to the cap."""
    model = graph(
        [
            helper.make_node("Add", ["seen", "one"], ["more"]),
            helper.make_node("Min", ["more", "cap"], ["next_seen"]),
            helper.make_node("Add", ["next_seen", "x"], ["y"]),
        ],
        {"x": ("float32", ["B", 1]), "seen": ("float32", ["B", 1])},
        {"y": ("float32", ["B", 1]), "next_seen": ("float32", ["B", 1])},
        {"one": np.array(1, np.float32), "cap": np.array(cap, np.float32)},
    )
    contract = Contract(
        "counting", (Feature("a"),), (State("seen", "next_seen", (1,)),), (Output("y", role="prediction"),)
    )
    return StepModel(stamped(model, contract))


def exactly(gap: float, keep: float, eps: float) -> int:
    """The first step n with gap · keepⁿ ≤ eps."""
    return math.ceil(math.log(eps / gap) / math.log(keep) - 1e-9)


@pytest.mark.parametrize("keep", [0.5, 0.75, 0.9375])
def test_a_gap_shrinks_as_the_recurrence_says(keep: float) -> None:
    """From pasts 0 and 1 and the same readings, the gap after n steps is keepⁿ: the readings cancel."""
    x = np.random.default_rng(0).integers(-3, 4, (20, 2, 1)).astype(np.float32)  # [T, Q, F]
    starts = [np.tile(np.array([[0.0], [1.0]], np.float32), (2, 1, 1))]  # [Q, 2, 1]
    watched = watch(leaky(keep), starts, x, {"y": np.array([2.0])})
    np.testing.assert_allclose(watched.gaps["y"], keep ** np.arange(1, 21) / 2, rtol=1e-3)
    assert not watched.same["y"].any()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99])
def test_a_leaky_memory_has_the_horizon_of_its_leak(keep: float, seed: int) -> None:
    """N(eps) = log(eps / gap) / log(keep), the gap being what the curve begins with."""
    found = memory(leaky(keep), seed=seed)
    first = found["curve"]["gap"][0] / keep  # before any step
    for eps in ("0.01", "0.0001"):
        assert abs(found["outputs"]["y"][eps] - exactly(first, keep, float(eps))) <= 1, found
    assert found["forgets"] == found["outputs"]["y"]
    assert found["warm"] == found["forgets"]["0.01"]
    assert found["curve"]["steps"][0] == 1


@pytest.mark.parametrize("limit", [64, 300])
def test_an_integrator_forgets_nothing(limit: int) -> None:
    """h ← h + x carries its beginning for ever: none is found, however long one watches."""
    found = memory(leaky(1.0), limit=limit)
    assert found["outputs"]["y"] == {"0.01": None, "0.0001": None, "equal": None}
    assert (found["warm"], found["steps"]) == (None, limit)
    assert min(found["curve"]["gap"]) > 0.1


def test_what_agrees_only_at_the_end_does_not_count() -> None:
    """A horizon in the last quarter of what was watched may be chance: none is claimed until it has held longer."""
    keep = 0.99
    horizon = memory(leaky(keep))["outputs"]["y"]["0.01"]
    assert memory(leaky(keep), limit=int(horizon * 1.2))["outputs"]["y"]["0.01"] is None
    assert abs(memory(leaky(keep), limit=int(horizon * 1.5))["outputs"]["y"]["0.01"] - horizon) <= 10


def test_a_smoothed_error_is_forgotten_by_its_alpha() -> None:
    """A score is measured in its threshold: gaps shrink by 1 − α a step from there on."""
    found = memory(smoothed_error())
    first = found["curve"]["gap"][0] / (1 - ALPHA)
    assert first < 1  # errors of at most 1 under a threshold of 2
    for eps in ("0.01", "0.0001"):
        assert abs(found["outputs"]["score"][eps] - exactly(first, 1 - ALPHA, float(eps))) <= 1
    assert found["outputs"]["threshold"] == {"0.01": 1, "0.0001": 1, "equal": 1}
    assert found["forgets"] == found["outputs"]["score"]


@pytest.mark.parametrize("cap", [5, 100, 1000])
def test_a_counter_is_forgotten_when_it_stops(cap: int) -> None:
    """Streams of another age agree, to the bit, from the step at which the youngest has counted to the cap."""
    found = memory(counting(cap))
    assert found["forgets"] == {"0.01": cap, "0.0001": cap, "equal": cap}
    assert found["steps"] == math.ceil(cap / 64) * 64  # all states are the same: nothing can part them any more


def test_outputs_without_a_meaning_count_where_no_other_does() -> None:
    """A model from elsewhere has no prediction and no score: all that it gives is judged, in its own spread."""
    found = memory(leaky(0.5, role=None))
    assert found["warm"] == found["outputs"]["y"]["0.01"] > 3


def test_a_document_is_plain_and_the_same_for_a_seed() -> None:
    """It survives JSON and the contract's own rules, and another run gives the same one."""
    model = leaky(0.9)
    found = memory(model, seed=3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found == memory(model, seed=3)
    contract = Contract("m", model.contract.features, model.contract.states, model.contract.outputs, memory=found)
    assert Contract.from_json(contract.to_json()).warm_after == found["warm"]


def test_given_readings_are_walked_over() -> None:
    """Real readings take the place of drawn ones, rows that are not finite left out; their spread is the unit."""
    rng = np.random.default_rng(1)
    narrow: Array = rng.normal(0, 0.001, (50, 1))
    narrow[7] = np.nan
    drawn, given = memory(leaky(0.9)), memory(leaky(0.9), {"a": narrow, "b": 2 + narrow[:20]})
    assert (drawn["readings"], given["readings"]) == ("drawn", "given")
    assert given["outputs"]["y"] != drawn["outputs"]["y"]
    with pytest.raises(DataError, match=r"stream 'a' has shape \[50, 2\], the model takes \[T, 1\] readings"):
        memory(leaky(0.9), {"a": np.zeros((50, 2))})


def test_a_model_that_runs_away_has_no_horizon() -> None:
    """States that grow without end never agree, and no infinity gets into the document."""
    found = memory(leaky(2.0))
    assert found["forgets"] == {"0.01": None, "0.0001": None, "equal": None}
    assert max(found["curve"]["gap"]) == 1e30


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        (
            {"steps": 4096, "forgets": {"0.01": 37, "0.0001": 80, "equal": 212}},
            "forgets its past within 37 steps to 1e-2, within 80 to 1e-4, within 212 to the bit",
        ),
        (
            {"steps": 4096, "forgets": {"0.01": None, "0.0001": None, "equal": None}},
            "forgets its past not within 4,096 steps to 1e-2, not within 4,096 to 1e-4, not within 4,096 to the bit",
        ),
        ({}, "nobody measured how soon it forgets"),
    ],
)
def test_a_document_reads_as_a_sentence(document: dict[str, Any], sentence: str) -> None:
    """What was found, and what was not."""
    assert in_words(document) == sentence
