"""A network, a scaling and a score joined to one stream model, in its two forms: a step, and a whole sequence.

`StepForm` and `SequenceForm` hold the same weights and are exported each on its own. The second never uses the
first, so that it is a reference which the step model can be checked against.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from statestep.export.forecaster import Gives
from statestep.export.recur import Tensors, recur
from statestep.export.scaler import LIMIT
from statestep.export.scaling import TINY, Scaled, Scaling
from statestep.runtime import State

ALPHA = 0.1  # weight of the newest error in the score: about ten timesteps of memory


class Network(Protocol):
    """What the forms need of a network: `Forecaster`, or a team's own module once it is lifted."""

    states: tuple[State, ...]
    targets: tuple[int, ...]  # the columns that it forecasts
    gives: Gives

    def step(self, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """z [B, F] and states → [B, K] in standard units, and the next states."""

    def sequence(self, z: Tensor) -> Tensor:
        """z [T, B, F] → [T, B, K] in standard units, from the states of a stream's birth."""


class Scoring(nn.Module):
    """The anomaly score: squared error of the previous forecast in units of its spread, largest target, smoothed.

        score[t] = α · max_k ((x[t] − expected[t]) / (std · spread))² + (1 − α) · score[t−1]

    `spread` [K] is the root mean square of a training forecast's error, in standard units. Until a stream has been
    seen `warm` times its errors count as 0: there is no forecast to judge, or no standard unit to judge it in.
    """

    spread: Tensor
    threshold: Tensor
    states = (State("error", "next_error", (1,)), State("seen", "next_seen", (1,)))

    def __init__(self, spread: Tensor, threshold: float, *, warm: int = 1, alpha: float = ALPHA):
        super().__init__()
        self.register_buffer("spread", spread.to(torch.float32))  # [K]
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))  # []
        self.warm = warm
        self.alpha = alpha

    def step(self, miss: Tensor, std: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """miss = x − expected [B, K], std [B, K], (error, seen) [B, 1] → score [B, 1] and the next states."""
        error, seen = states
        score = self._smooth(torch.where(seen >= self.warm, self._largest(miss, std), 0.0), error)
        return score, (score, (seen + 1).clamp(max=self.warm))

    def sequence(self, miss: Tensor, std: Tensor) -> Tensor:
        """miss, std [T, B, K] from the start of each stream → scores [T, B, 1]."""
        largest = self._largest(miss, std)  # [T, B, 1]
        judged = torch.arange(miss.shape[0])[:, None, None] >= self.warm  # [T, 1, 1]

        def body(carry: Tensors, row: Tensors) -> tuple[Tensors, Tensors]:
            score = self._smooth(row[0], carry[0])
            return (score,), (score,)

        _, (scores,) = recur(body, (torch.zeros_like(largest[0]),), (torch.where(judged, largest, 0.0),))
        return scores

    def _largest(self, miss: Tensor, std: Tensor) -> Tensor:
        error = (miss / (std * self.spread)).clamp(-LIMIT, LIMIT)
        return (error * error).amax(-1, keepdim=True)

    def _smooth(self, newest: Tensor, before: Tensor) -> Tensor:
        score = self.alpha * newest + (1 - self.alpha) * before
        return torch.where(score < TINY, 0.0, score)


class StreamModel(nn.Module):
    """Everything that advancing a stream needs: raw sensor values in, raw forecasts and a score out.

    `features` names the columns of x, K of which are forecast. Outputs in order: prediction, expected, and with a
    scoring also score, threshold, anomaly.
    """

    columns: Tensor

    def __init__(self, network: Network, scaling: Scaling, scoring: Scoring | None, *, features: tuple[str, ...]):
        super().__init__()
        self.network = network
        self.scaling = scaling
        self.scoring = scoring
        self.features = features
        self.register_buffer("columns", torch.tensor(network.targets), persistent=False)  # [K]
        self.eval()

    @property
    def target_names(self) -> tuple[str, ...]:
        """The features that are forecast, in the order of the prediction's columns."""
        return tuple(self.features[column] for column in self.network.targets)

    @property
    def states(self) -> tuple[State, ...]:
        """Every state pair, in the order in which the step form takes and gives them."""
        forecast = State("forecast", "next_forecast", (len(self.network.targets),))
        scoring = () if self.scoring is None else self.scoring.states
        return (*self.network.states, *self.scaling.states, forecast, *scoring)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs; each is its role in the contract too."""
        return ("prediction", "expected") + (() if self.scoring is None else ("score", "threshold", "anomaly"))

    def initial_states(self, batch: int) -> Tensors:
        """The states of streams that have seen nothing, each with its batch axis where the graph has it."""
        values = [torch.from_numpy(state.initial_value()) for state in self.states]
        return tuple(
            torch.stack([value] * batch, dim=state.batch_axis) for value, state in zip(values, self.states, strict=True)
        )

    def forecast(self, network: Tensor, x: Tensor, scaled: Scaled) -> Tensor:
        """From the network's standard units to the sensors': [… , K]."""
        if self.network.gives is Gives.RAW_VALUE:
            return network
        base = x if self.network.gives is Gives.CORRECTION else scaled.mean
        return self.targets(base) + self.targets(scaled.std) * network

    def targets(self, of_features: Tensor) -> Tensor:
        """The columns that are forecast: [… , F] → [… , K]."""
        if self.network.targets == tuple(range(len(self.features))):
            return of_features
        return of_features.index_select(-1, self.columns)

    def judged(self, score: Tensor) -> Tensors:
        """score [… , 1] → score, threshold, anomaly, each [… ]."""
        assert self.scoring is not None
        flat = score[..., 0]
        threshold = self.scoring.threshold.expand_as(flat)
        return flat, threshold, flat > threshold


class StepForm(nn.Module):
    """x [B, F], states → outputs [B, …], next states: one timestep of B streams."""

    def __init__(self, model: StreamModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *states: Tensor) -> Tensors:
        """`states` in the order of `StreamModel.states`; the outputs come first, then the next states."""
        model = self.model
        ends_network = len(model.network.states)
        ends_scaling = ends_network + len(model.scaling.states)
        scaled, scaling_states = model.scaling.step(x, states[ends_network:ends_scaling])
        network, network_states = model.network.step(scaled.z, states[:ends_network])
        prediction = model.forecast(network, x, scaled)  # [B, K]
        expected = states[ends_scaling]  # [B, K]
        outputs: Tensors = (prediction, expected.clone())
        scoring_states: Tensors = ()
        if model.scoring is not None:
            miss, std = model.targets(x) - expected, model.targets(scaled.std)
            score, scoring_states = model.scoring.step(miss, std, states[ends_scaling + 1 :])
            outputs = (*outputs, *model.judged(score))
        following = (*network_states, *scaling_states, prediction, *scoring_states)
        return (*outputs, *(state.clone() for state in following))


class SequenceForm(nn.Module):
    """x [T, B, F] → outputs [T, B, …]: whole sequences, each from the birth of its stream."""

    def __init__(self, model: StreamModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensors:
        """The outputs in the order of `StreamModel.outputs`."""
        model = self.model
        scaled = model.scaling.sequence(x)
        prediction = model.forecast(model.network.sequence(scaled.z), x, scaled)  # [T, B, K]
        expected = torch.cat([torch.zeros_like(prediction[:1]), prediction])[:-1]  # [T, B, K]
        if model.scoring is None:
            return prediction, expected
        miss, std = model.targets(x) - expected, model.targets(scaled.std)
        return prediction, expected, *model.judged(model.scoring.sequence(miss, std))
