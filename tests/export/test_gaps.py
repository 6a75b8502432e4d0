"""What is done about gaps: measured on models of which the best way is known."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from statestep.export.gaps import FEWEST, LENGTHS, measure, plan_of
from statestep.runtime import Contract, ContractError, Feature, Output, State, StepModel

from ..models import graph, stamped


def turning(period: float) -> StepModel:
    """A model that knows that x turns on a circle (two columns) and is told the angle only by what it sees.

    Its forecast is the last reading, or what stands in for it, turned by one step: bridging a gap is exact.
    """
    angle = 2 * np.pi / period
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], np.float32)
    nodes = [
        helper.make_node("IsNaN", ["x"], ["absent"]),
        helper.make_node("Where", ["absent", "forecast", "x"], ["seen"]),
        helper.make_node("Mul", ["h", "keep"], ["kept"]),
        helper.make_node("Mul", ["seen", "take"], ["taken"]),
        helper.make_node("Add", ["kept", "taken"], ["level"]),  # a smoothed reading, which must not lag behind
        helper.make_node("MatMul", ["level", "turn"], ["next_h"]),
        helper.make_node("Identity", ["next_h"], ["y"]),
        helper.make_node("Identity", ["next_h"], ["next_forecast"]),
    ]
    shape = ("float32", ["B", 2])
    made = graph(
        nodes,
        {"x": shape, "h": shape, "forecast": shape},
        {"y": shape, "next_h": shape, "next_forecast": shape},
        {"turn": turn, "keep": np.array(0.9, np.float32), "take": np.array(0.1, np.float32)},
    )
    contract = Contract(
        "turning",
        (Feature("a"), Feature("b")),
        (State("h", "next_h", (2,)), State("forecast", "next_forecast", (2,))),
        (Output("y", role="prediction", features=("a", "b")),),
        missing="own-forecast",
        period_seconds=1.0,
    )
    return StepModel(stamped(made, contract))


def circle(rows: int, period: float) -> np.ndarray:
    t = np.arange(rows) * 2 * np.pi / period
    return np.stack([np.cos(t), np.sin(t)], axis=1)


def test_a_model_that_can_go_on_by_itself_bridges() -> None:
    """On a circle the bridge is exact at every length, holding is off by the angle that was missed."""
    period = 40.0
    found = measure(turning(period), {"a": circle(4000, period)})
    assert found is not None
    assert [row["missing"] for row in found["measured"]] == list(LENGTHS)
    for row in found["measured"]:
        assert row["bridge"] < 0.01
        if row["missing"] % period:
            assert row["hold"] > 0.05, row
    assert found["plan"][0] == {"up_to": LENGTHS[-1], "do": "bridge"}
    assert found["plan"][1]["up_to"] is None and found["plan"][1]["do"] != "bridge"


def test_too_little_is_not_measured() -> None:
    """Streams without room for a gap give no table, nor do models that cannot step over missing readings."""
    assert measure(turning(40.0), {"a": circle(30, 40.0)}) is None
    refusing = turning(40.0)
    object.__setattr__(refusing.contract, "missing", "reject")
    assert measure(refusing, {"a": circle(4000, 40.0)}) is None
    assert FEWEST > 1


def test_the_plan_holds_unless_another_way_is_clearly_better() -> None:
    """A difference of a hundredth changes nothing; ways for neighbouring lengths are one entry."""
    rows = [
        {"missing": 1, "hold": 1.0, "bridge": 0.99, "reset": 5.0},
        {"missing": 2, "hold": 1.0, "bridge": 0.5, "reset": 5.0},
        {"missing": 5, "hold": 1.0, "bridge": 0.6, "reset": 5.0},
        {"missing": 10, "hold": 9.0, "bridge": 7.0, "reset": 5.0},
    ]
    assert plan_of(rows) == [
        {"up_to": 1, "do": "hold"},
        {"up_to": 5, "do": "bridge"},
        {"up_to": None, "do": "reset"},
    ]


@pytest.mark.parametrize(
    "plan",
    [
        [],
        [{"up_to": 5, "do": "hold"}],
        [{"up_to": None, "do": "bridge"}],
        [{"up_to": 5, "do": "guess"}, {"up_to": None, "do": "hold"}],
        [{"up_to": 5, "do": "hold"}, {"up_to": 2, "do": "hold"}, {"up_to": None, "do": "hold"}],
    ],
)
def test_a_contract_with_a_plan_that_cannot_be_is_refused(plan: list[dict[str, object]]) -> None:
    """The service reads it without asking again."""
    with pytest.raises(ContractError, match="gaps is"):
        Contract("m", (Feature("a"),), (State("h", "hn", (1,)),), (Output("y"),), gaps={"plan": plan})
