"""A network and a scaling joined to one stream model, in its two forms: a step, and a whole sequence.

`StepForm` and `SequenceForm` hold the same weights and are exported each on its own. The second never uses the
first, so that it is a reference which the step model can be checked against.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from statestep.export.forecaster import Gives
from statestep.export.recur import Tensors
from statestep.export.scaling import PerStreamScaling, Scaled, Scaling
from statestep.runtime import State

OWN = ("own_z", "own_std")  # outputs for the detector alone: readings in a stream's own units, and their deviation


class Network(Protocol):
    """What the forms need of a network: `Forecaster`, or a team's own module once it is lifted."""

    states: tuple[State, ...]
    targets: tuple[int, ...]  # the columns that it forecasts
    gives: Gives

    def step(self, z: Tensor, states: Tensors) -> tuple[Tensor, Tensors]:
        """z [B, F] and states → [B, K] in standard units, and the next states."""

    def sequence(self, z: Tensor) -> Tensor:
        """z [T, B, F] → [T, B, K] in standard units, from the states of a stream's birth."""


class StreamModel(nn.Module):
    """A forecaster: raw sensor values in, raw forecasts out. The detector comes behind its graphs (`compose.py`).

    `features` names the columns of x, K of which are forecast.
    """

    columns: Tensor

    def __init__(self, network: Network, scaling: Scaling, *, features: tuple[str, ...]):
        super().__init__()
        self.network = network
        self.scaling = scaling
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
        return (*self.network.states, *self.scaling.states)

    @property
    def per_stream(self) -> bool:
        """Whether each stream has standard units of its own, which the graphs then put out too."""
        return isinstance(self.scaling, PerStreamScaling)

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs."""
        return ("prediction", *(OWN if self.per_stream else ()))

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

    def given(self, prediction: Tensor, scaled: Scaled) -> Tensors:
        """What leaves the graphs, in the order of `outputs`."""
        return (prediction, scaled.z, scaled.std) if self.per_stream else (prediction,)


class StepForm(nn.Module):
    """x [B, F], states → outputs [B, …], next states: one timestep of B streams."""

    def __init__(self, model: StreamModel):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, *states: Tensor) -> Tensors:
        """`states` in the order of `StreamModel.states`; the outputs come first, then the next states."""
        model = self.model
        ends = len(model.network.states)
        scaled, scaling_states = model.scaling.step(x, states[ends:])
        network, network_states = model.network.step(scaled.z, states[:ends])
        outputs = model.given(model.forecast(network, x, scaled), scaled)  # [B, K] and [B, F]
        # What leaves must be a tensor of its own: the exporter merges two names for one.
        return tuple(tensor.clone() for tensor in (*outputs, *network_states, *scaling_states))


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
        return tuple(tensor.clone() for tensor in model.given(prediction, scaled))
