"""What is done about silence, at its bounds; what an engine makes of it is in test_engine_machine.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from statestep.runtime import NO_TIME, Contract, Feature, Output, Silence, State, silence_of
from statestep.runtime.silence import elapsed_of

NOW, SECOND = 1_700_000_000 * 10**9, 10**9
PLAN = ((2, "hold"), (5, "bridge"), (None, "reset"))


def judged(elapsed: int, silence: Silence, now: int = NOW) -> tuple[int, bool, bool]:
    """Of one stream: bridged, reset, expired."""
    found = silence.judged(np.array([now - elapsed]), np.array([now]))
    return (0, False, False) if found is None else (int(found.bridged[0]), bool(found.reset[0]), bool(found.expired[0]))


@pytest.mark.parametrize("now", [NOW, 2**62])
def test_bounds_are_exact_to_the_nanosecond(now: int) -> None:
    """A float64 of a time since 1970 is a multiple of 256 ns; what has passed is told by whole numbers."""
    silence = Silence(SECOND, ((None, "reset"),), 60 * SECOND)
    assert judged(3 * SECOND // 2, silence, now) == (0, False, False)
    assert judged(3 * SECOND // 2 + 1, silence, now) == (0, True, False)
    assert judged(60 * SECOND, silence, now) == (0, True, False)
    assert judged(60 * SECOND + 1, silence, now) == (0, False, True)


def test_each_length_has_its_way() -> None:
    """So many timesteps are missing as would have fitted between, rounded."""
    ways = [judged(round(periods * SECOND), Silence(SECOND, PLAN)) for periods in (1, 2, 3, 4, 5.4, 6, 7, 10**6)]
    assert [bridged for bridged, _, _ in ways] == [0, 0, 0, 3, 4, 5, 0, 0]
    assert [reset for _, reset, _ in ways] == [False] * 6 + [True] * 2


def test_what_has_no_time_or_comes_late_is_not_silent() -> None:
    """Nor does the difference of two times overflow."""
    before, now = np.array([NO_TIME, 5, 9, -(2**63) + 1]), np.array([7, NO_TIME, 3, 2**63 - 1])
    assert elapsed_of(before, now).tolist() == [0.0, 0.0, 0.0, 2.0**64]
    silence = Silence(1.0, ((None, "reset"),), 10.0)
    found = silence.judged(before, now)
    assert found is not None and found.expired.tolist() == [False, False, False, True] and not found.reset.any()
    assert silence.judged(before[:3], now[:3]) is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"plan": ()}, "must end with a way for all"),
        ({"plan": ((3, "hold"),)}, "must end with a way for all"),
        ({"plan": ((None, "bridge"),)}, "must end with a way for all"),
        ({"plan": ((None, "guess"),)}, "must end with a way for all"),
        ({"period_ns": 0.0}, "not above 0"),
        ({"expire_ns": -1.0}, "not above 0"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], words: str) -> None:
    """In one sentence."""
    with pytest.raises(ValueError, match=words):
        Silence(**wrong)


def test_a_contracts_plan_is_done_and_a_setting_comes_first() -> None:
    """`measured` is the plan where there is one; without a gap that is acted on there is nothing to do."""
    plan = {"plan": [{"up_to": 2, "do": "bridge"}, {"up_to": None, "do": "hold"}]}
    contract = Contract(
        "m", (Feature("a"),), (State("h", "hn", (1,)),), (Output("y", role="prediction"),),
        missing="own-forecast", period_seconds=2.0, gaps=plan,
    )  # fmt: skip
    assert silence_of(contract) == Silence(2e9, ((2, "bridge"), (None, "hold")))
    assert silence_of(contract, on_gap="hold") is None
    assert silence_of(contract, on_gap="hold", expire_s=5.0) == Silence(2e9, ((None, "hold"),), 5e9)
    assert silence_of(contract, on_gap="bridge") == Silence(2e9, ((200, "bridge"), (None, "hold")))
