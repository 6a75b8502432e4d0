"""A model in numpy alone, quick and exact, that fails on command and counts its calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from statestep.runtime import Contract, Feature, Output, State

Array = np.ndarray[Any, Any]

CONTRACT = Contract(
    name="double",
    features=(Feature("a"), Feature("b")),
    states=(
        State("level", "next_level", (2,), initial=[1.0, -1.0]),
        State("count", "next_count", (), dtype="int64", initial=0),
        State("even", "next_even", (1,), dtype="bool", initial=True),
    ),
    outputs=(Output("y", role="prediction"), Output("n"), Output("was_even")),
)


# As above, but for a reading that is missing its own level stands in, and `count` is of what was put out last.
SERENE = replace(
    CONTRACT,
    name="serene",
    states=(*CONTRACT.states[:2], replace(CONTRACT.states[2], lasting=True)),
    outputs=(Output("y", role="prediction"), Output("n", state="count"), Output("was_even")),
    missing="own-forecast",
    period_seconds=1e-9,
)


class Double:
    """level ← level/2 + x, a counter and its parity. `fails_at` is the call, counted from 1, that raises."""

    def __init__(self, fails_at: int | None = None):
        self.contract = CONTRACT
        self.calls = 0
        self.fails_at = fails_at

    def initial_states(self) -> list[Array]:
        return [state.initial_value() for state in CONTRACT.states]

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        """x [B, 2] → y [B, 2], n [B], was_even [B, 1]."""
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError(f"call {self.calls} fails, as it was told to")
        level, count, even = states
        with np.errstate(all="ignore"):
            level = level * np.float32(0.5) + self._filled(x, level)  # [B, 2]
        return {"y": level.copy(), "n": count.copy(), "was_even": even.copy()}, [level, count + 1, ~even]

    @staticmethod
    def _filled(x: Array, level: Array) -> Array:
        return x


class Serene(Double):
    """A double that takes missing readings. A count of 3 falls back to where it began: nothing is going on."""

    def __init__(self) -> None:
        super().__init__()
        self.contract = SERENE

    def step(
        self, x: Array, states: Sequence[Array], times: Array | None = None
    ) -> tuple[dict[str, Array], list[Array]]:
        """As a double's; the times, int64 [B], count too."""
        outputs, (level, count, even) = super().step(x, states)
        if times is not None:
            level = level + (times % 7)[:, None].astype(np.float32)  # [B, 2]
        return outputs, [level, np.where(count >= 3, 0, count), even]

    @staticmethod
    def _filled(x: Array, level: Array) -> Array:
        return np.where(np.isnan(x), level, x)
