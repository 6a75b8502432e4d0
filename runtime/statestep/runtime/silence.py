"""What is done where a stream was silent: it goes on, the gap is bridged without readings, or states begin anew. Pure.

Everything is decided by a stream's own event times alone, so that a replay decides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from statestep.runtime.contract import GAP_WAYS, MOST_BRIDGED, NO_TIME, Contract

GAP_PERIODS = 1.5  # a stream that was silent for longer has a gap
OnGap = Literal["measured", "hold", "bridge", "reset"]  # by the contract's plan, or one of `GAP_WAYS` for every gap
FOREVER = float("inf")

Array = np.ndarray[Any, Any]


class Judged(NamedTuple):
    """What is to be done about n streams before their observations."""

    bridged: Array  # int64 [n] timesteps without readings
    reset: Array  # bool [n] whose states begin anew
    expired: Array  # bool [n] that are new streams; none of them is reset


@dataclass(frozen=True, slots=True)
class Silence:
    """What is done about gaps of every length, and after how long a stream is a new one.

    >>> silence = Silence(10.0, ((3, "bridge"), (None, "reset")), expire_ns=1000.0)
    >>> silence.judged(np.array([100, 100, 100, 100]), np.array([110, 130, 500, 2000])).bridged
    array([0, 2, 0, 0])
    """

    period_ns: float = FOREVER  # between two timesteps; infinite where nobody knows
    plan: tuple[tuple[int | None, str], ...] = ((None, "hold"),)  # up to so many missing timesteps, what is done
    expire_ns: float = FOREVER  # a stream that was silent for longer is a new one

    def __post_init__(self) -> None:
        ways = [way for _, way in self.plan]
        if not ways or self.plan[-1][0] is not None or ways[-1] == "bridge" or not set(ways) <= set(GAP_WAYS):
            raise ValueError(f"the plan for gaps is {self.plan}, it must end with a way for all that are longer")
        if not (self.period_ns > 0 and self.expire_ns > 0):
            raise ValueError(f"a period of {self.period_ns} ns or expiry after {self.expire_ns} ns is not above 0")

    @property
    def idle(self) -> bool:
        """Whether nothing is ever done."""
        return all(way == "hold" for _, way in self.plan) and self.expire_ns == FOREVER

    def judged(self, before: Array, now: Array) -> Judged | None:
        """Event times int64 [n] of streams so far and of an observation of each; None where nothing is to be done."""
        elapsed = elapsed_of(before, now)  # [n]
        expired = elapsed > self.expire_ns
        gap = (elapsed > GAP_PERIODS * self.period_ns) & ~expired
        if not (expired.any() or gap.any()):
            return None
        missing = np.zeros(len(gap), np.int64)
        missing[gap] = np.minimum(np.round(elapsed[gap] / self.period_ns) - 1, 2.0**53)
        bridged, reset, below = np.zeros_like(missing), np.zeros(len(gap), bool), 0
        for up_to, way in self.plan:
            here = (missing > below) if up_to is None else (missing > below) & (missing <= up_to)  # [n]
            if way == "bridge":
                bridged[here] = missing[here]
            reset |= here & (way == "reset")
            below = up_to or below
        return Judged(bridged, reset, expired)


def elapsed_of(before: Array, now: Array) -> Array:
    """Nanoseconds from event times int64 [n] to others, 0 where they are not later or not known: float64 [n].

    Exact up to 104 days; the times themselves are not, as float64.

    >>> elapsed_of(np.array([-(2**62), 5, NO_TIME]), np.array([2**62, 3, 7])).tolist()
    [9.223372036854776e+18, 0.0, 0.0]
    """
    later = (now > before) & (before != NO_TIME)  # NO_TIME is before all times
    # The difference of two int64 may be too large for one, but not for an uint64.
    return np.where(later, now.view(np.uint64) - before.view(np.uint64), 0).astype(np.float64)


def silence_of(contract: Contract, *, on_gap: str = "measured", expire_s: float | None = None) -> Silence | None:
    """What a contract and two settings make together; None where nothing is ever done.

    `on_gap` is "measured", for the plan of the contract where it has one, or one way for every gap; a gap that is
    longer than any bridge is held. Raises `ValueError`, one sentence, for what the model cannot do.

    >>> from statestep.runtime import Feature, Output, State
    >>> contract = Contract("m", (Feature("v"),), (State("h", "hn", (1,)),), (Output("y"),), period_seconds=60.0)
    >>> silence_of(contract), silence_of(contract, on_gap="reset").plan
    (None, ((None, 'reset'),))
    """
    if on_gap not in get_args(OnGap):
        raise ValueError(f"on_gap is {on_gap!r}, it must be one of {', '.join(get_args(OnGap))}")
    period, plan = contract.period_seconds, list[tuple[int | None, str]]()
    if on_gap == "measured":
        steps: Sequence[Any] = [] if contract.gaps is None else contract.gaps["plan"]
        plan = [(step["up_to"], step["do"]) for step in steps]
    elif on_gap != "hold" and period is None:
        raise ValueError(f"{contract.name} names no period, so a gap cannot be told: hold it")
    elif on_gap == "bridge" and contract.missing != "own-forecast":
        raise ValueError(f"{contract.name} takes no missing readings, so it cannot bridge a gap: hold it, or reset")
    elif on_gap == "bridge":
        plan = [(MOST_BRIDGED, "bridge")]
    elif on_gap == "reset":
        plan = [(None, "reset")]
    if not plan or plan[-1][0] is not None:
        plan.append((None, "hold"))
    found = Silence(
        FOREVER if period is None else period * 1e9, tuple(plan), FOREVER if expire_s is None else expire_s * 1e9
    )
    return None if found.idle else found
