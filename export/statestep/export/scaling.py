"""Between a sensor's units and the network's: standardisation that is part of the graph.

`PooledScaling` has one mean and standard deviation a feature for all streams, constants from the training part.
`PerStreamScaling` learns each stream's own as it goes, and carries them as state pairs. `NoScaling` leaves values
alone. All three answer alike, so that nothing that uses them can tell the difference.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from statestep.export.recur import recur
from statestep.export.scaler import LIMIT
from statestep.runtime import State

RELATIVE_FLOOR = 1e-6  # a spread below this share of the level is rounding, float32 has 7 digits
ABSOLUTE_FLOOR = 1e-12  # units; keeps a stream of zeros from dividing by zero
LARGEST_JUMP = 1e18  # units; its square still is a float32
TINY = 1e-30  # a decaying state is cut to zero here, long before it becomes a denormal number, which is slow

States = tuple[Tensor, ...]


class Scaled(NamedTuple):
    """A timestep in standard units, and what leads back to the sensor's.

    z is [B, F], or [T, B, F] of a sequence; the others are too, or [F] where they are constants.
    """

    z: Tensor
    mean: Tensor
    std: Tensor


class Scaling(Protocol):
    """What the forms need of a scaling."""

    states: tuple[State, ...]
    kind: str

    def step(self, x: Tensor, states: States) -> tuple[Scaled, States]:
        """One timestep of B streams: x [B, F] and states [B, …] → scaled and next states."""

    def sequence(self, x: Tensor) -> Scaled:
        """Whole sequences from the start of their streams: x [T, B, F]."""


class NoScaling(nn.Module):
    """The network takes and gives the sensor's own units."""

    kind = "none"
    states: tuple[State, ...] = ()

    def step(self, x: Tensor, states: States) -> tuple[Scaled, States]:
        """x [B, F] as it is."""
        return self.sequence(x), ()

    def sequence(self, x: Tensor) -> Scaled:
        """x [T, B, F] as it is."""
        one = x.new_ones(x.shape[-1])  # [F]
        return Scaled(x, torch.zeros_like(one), one)


class PooledScaling(nn.Module):
    """z = (x − mean) / std with constants.

    >>> scaling = PooledScaling(torch.tensor([10.0]), torch.tensor([2.0]))
    >>> scaling.sequence(torch.tensor([[[14.0]]])).z.item()
    2.0
    """

    kind = "pooled"
    states: tuple[State, ...] = ()
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.to(torch.float32))  # [F]
        self.register_buffer("std", std.to(torch.float32))  # [F], above 0

    def step(self, x: Tensor, states: States) -> tuple[Scaled, States]:
        """x [B, F] → standard units."""
        return self.sequence(x), ()

    def sequence(self, x: Tensor) -> Scaled:
        """x [T, B, F] → standard units."""
        z = ((x - self.mean) / self.std).clamp(-LIMIT, LIMIT)
        return Scaled(z, self.mean, self.std)


class PerStreamScaling(nn.Module):
    """z = (x − mean) / std with each stream's running mean and standard deviation, this timestep included.

    Welford's update (Technometrics 4, 1962) with a count that stops at `memory` timesteps: from there on it forgets
    exponentially, as streams change. The mean is kept as two float32, or at level 1e6 it could not follow in steps
    of a thousandth. At a stream's first timestep z is 0, and later, this timestep being among the n that are counted,
    |z| stays below √n: a sensor that moves for the first time is far out, not infinitely far.
    """

    kind = "per-stream"

    def __init__(self, features: int, memory: int = 2000):
        super().__init__()
        self.memory = memory
        self.features = features
        self.states = (
            State("count", "next_count", (1,), lasting=True),
            *(State(name, f"next_{name}", (features,), lasting=True) for name in ("mean", "mean_rest", "variance")),
        )

    def step(self, x: Tensor, states: States) -> tuple[Scaled, States]:
        """x [B, F] and (count [B, 1], mean, its rest, variance [B, F]) → standard units and the updated states."""
        count, mean, rest, variance = states
        count = (count + 1).clamp(max=self.memory)  # [B, 1]
        delta = (x - mean - rest).clamp(-LARGEST_JUMP, LARGEST_JUMP)  # [B, F]
        move = delta / count
        variance = variance + (delta * (delta - move) - variance) / count
        variance = torch.where(variance < TINY, 0.0, variance)
        step = rest + move
        moved = mean + step  # rounds; what it loses is the new rest
        rest = step - (moved - mean)
        std = _spread(moved, variance)
        z = ((x - moved - rest) / std).clamp(-LIMIT, LIMIT)
        return Scaled(z, moved, std), (count, moved, rest, variance)

    def sequence(self, x: Tensor) -> Scaled:
        """x [T, B, F] → the same, timestep by timestep from the start."""

        def body(states: States, row: States) -> tuple[States, States]:
            scaled, following = self.step(row[0], states)
            return following, tuple(scaled)

        zero = torch.zeros_like(x[0])  # [B, F]
        _, scaled = recur(body, (zero[:, :1].clone(), zero.clone(), zero.clone(), zero.clone()), (x,))
        return Scaled(*scaled)


def _spread(mean: Tensor, variance: Tensor) -> Tensor:
    """The standard deviation, floored so that a constant stream divides by something.

    The floors are no sum: onnxscript's optimizer takes a term as small as this for zero, and drops it.
    """
    floor = (mean.abs() * RELATIVE_FLOOR).clamp(min=ABSOLUTE_FLOOR)
    return torch.maximum(torch.sqrt(variance), floor)
