"""The contract of a step model: which tensors are state, which columns are features, what each output means.

It travels inside the ONNX file, as one JSON document under ``statestep.contract`` in ``metadata_props``.
This file is the one place that reads and writes it. A model without one can still run where its state
pairs are told by name: see `pairs.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import numpy as np
import onnx

CONTRACT_KEY = "statestep.contract"
PRODUCER = "statestep"
VERSION = 1
MISSING_POLICIES = ("own-forecast", "reject")
NO_TIME = int(np.iinfo(np.int64).min)  # the event time of what has none
# What an output may mean: with a column for each feature that it names, or with one number for each stream.
BY_FEATURE = (
    "prediction",  # the forecast for the stream's next timestep
    "expected",  # the one that had been made for this timestep
    "contribution",  # the share of each feature in the score
    "reason",  # what speaks loudest against each feature: a place in `detector.evidence`
    "related",  # each feature as the others of its row would have it
    "drift",  # the share of late readings of each feature that are not as in training
)
BY_STREAM = (
    "score",
    "threshold",
    "anomaly",  # whether the score is over it
    "event",  # n at the n-th timestep of an anomaly, −n at the n-th that is its last, 0 outside
    "since",  # the event time at which it began
    "severity",  # its highest score so far, in units of the threshold
    "status",  # a place in `detector.status`
    "score_drift",  # the share of late scores that are not
)
ROLES = (*BY_FEATURE, *BY_STREAM, "flags")
GAP_WAYS = ("hold", "bridge", "reset")
MOST_BRIDGED = 200  # timesteps; a model that goes on by itself for longer says little
DTYPES = ("float32", "float64", "float16", "int64", "int32", "bool")


class ContractError(ValueError):
    """A contract that is missing, malformed, from a later version, or at odds with its graph."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One column of the input, with the range seen in training where it is known."""

    name: str
    unit: str | None = None
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A pair of tensors that carries memory from one timestep to the next; `shape` is without the batch axis.

    One that is `lasting` is of the stream rather than of the moment, as its level or what is usual of it: a reset after
    a gap leaves it as it is.
    """

    input: str
    output: str
    shape: tuple[int, ...]
    batch_axis: int = 0
    dtype: str = "float32"
    initial: Any = 0.0  # a number, or a nested list of `shape`
    lasting: bool = False

    def initial_value(self) -> np.ndarray[Any, Any]:
        """The state of a stream that has seen nothing: an array of `shape` and `dtype`.

        >>> State("h0", "hn", (2,), initial=[0.5, -0.5]).initial_value()
        array([ 0.5, -0.5], dtype=float32)
        """
        try:
            value = np.asarray(self.initial, dtype=self.dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise ContractError(f"state {self.input!r}: its initial value cannot be read: {error}") from None
        if value.ndim and value.shape != self.shape:
            raise ContractError(
                f"state {self.input!r}: its initial value has shape {list(value.shape)}, its own is {list(self.shape)}"
            )
        if not np.isfinite(value).all():
            raise ContractError(f"state {self.input!r}: its initial value is not finite")
        return np.array(np.broadcast_to(value, self.shape))  # [*shape]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that leaves the step, with its meaning (`role`) where it has a known one.

    `state` is the input of the state that holds what was put out last, where one does: it can be read there between
    two timesteps, as where a stream ends in the middle of an event.
    """

    name: str
    batch_axis: int = 0
    role: str | None = None
    features: tuple[str, ...] | None = None
    state: str | None = None


@dataclass(frozen=True, slots=True)
class Contract:
    """Everything that a runtime must know about a step model and cannot read off its graph.

    >>> contract = Contract("pump", (Feature("flow"),), (State("h0", "hn", (4,)),), (Output("y", role="prediction"),))
    >>> Contract.from_json(contract.to_json()) == contract
    True
    """

    name: str
    features: tuple[Feature, ...]
    states: tuple[State, ...]
    outputs: tuple[Output, ...]
    model_version: str = "1"
    input: str = "x"
    input_dtype: str = "float32"
    time_input: str | None = None  # takes each observation's event time, int64 [B] ns since the epoch or NO_TIME
    missing: str = "reject"  # what a NaN in x means: "own-forecast" lets the graph stand in for it
    period_seconds: float | None = None  # the time between two timesteps
    horizon: int = 1  # how many timesteps ahead `prediction` looks
    detector: Mapping[str, Any] | None = None  # how it judges and was calibrated, for people and pages
    gaps: Mapping[str, Any] | None = None  # what is best done when a stream was silent, as statestep.export.gaps found
    memory: Mapping[str, Any] | None = None  # how soon it forgets, as statestep.export.horizon measured it
    parity: Mapping[str, Any] | None = None  # {"steps", "max_abs_difference", "against"?}: the proof; against torch
    producer: str | None = None
    license: str | None = None
    trained_on: str | None = None
    author: str | None = None
    description: str | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the columns of `x`, in order."""
        return tuple(feature.name for feature in self.features)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inputs that are no states."""
        return (self.input,) if self.time_input is None else (self.input, self.time_input)

    @property
    def warm_after(self) -> int | None:
        """From which timestep of a stream on its outputs no longer depend on how it began; None where nobody knows."""
        return None if self.memory is None else self.memory.get("warm")

    def output(self, role: str) -> Output | None:
        """The output that plays `role`, or None."""
        return next((output for output in self.outputs if output.role == role), None)

    def to_json(self) -> str:
        """The document that is written into the model; absent values are left out."""
        document = _without_none(asdict(self))
        for name in ("memory", "detector", "gaps"):
            if (told := getattr(self, name)) is not None:
                document[name] = told  # where null says that none was found
        return json.dumps(document, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Read a document. Keys that this release does not know are passed by; a later version is refused."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ContractError(f"the model's contract is not JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ContractError(f"the model's contract is a JSON {type(raw).__name__}, it must be an object")
        if (version := raw.get("version", VERSION)) != VERSION:
            raise ContractError(
                f"the model's contract has version {version!r}, this release reads version {VERSION}: upgrade statestep"
            )
        try:
            document = _known(cls, raw)
            document["features"] = tuple(Feature(**_known(Feature, item)) for item in document["features"])
            document["states"] = tuple(_state(item) for item in document["states"])
            document["outputs"] = tuple(_output(item) for item in document["outputs"])
            return cls(**document)
        except ContractError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ContractError(f"the model's contract cannot be read: {error}") from None


def stamp(model: onnx.ModelProto, contract: Contract) -> None:
    """Write `contract` into `model`, replacing what was there, with flat keys that other tools show."""
    flat = {"name": contract.name, "version": contract.model_version}
    flat |= {name: value for name in ("author", "description", "license") if (value := getattr(contract, name))}
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != CONTRACT_KEY} | flat
    # The producer is at the file's beginning and the contract at its end: of a file that was cut short one is missing.
    model.producer_name = PRODUCER
    onnx.helper.set_model_props(model, kept | {CONTRACT_KEY: contract.to_json()})


def _validate(contract: Contract) -> None:
    if not contract.features:
        raise ContractError("a contract names at least one feature")
    if not contract.states:
        raise ContractError("a contract names at least one state pair (h0 → hn); without one nothing is remembered")
    for field in ("name", "model_version", "input"):
        _name(field, getattr(contract, field))
    if contract.time_input is not None:
        _name("time_input", contract.time_input)
    if contract.detector is not None and not isinstance(contract.detector, Mapping):
        raise ContractError(f"detector is {contract.detector!r}, it must be an object")
    for field in ("producer", "license", "trained_on", "author", "description"):
        _text(field, getattr(contract, field))
    _one_of("input_dtype", contract.input_dtype, DTYPES)
    _one_of("missing", contract.missing, MISSING_POLICIES)
    _above_zero("horizon", contract.horizon, int)
    if contract.period_seconds is not None:
        _above_zero("period_seconds", contract.period_seconds, int | float)
    if contract.parity is not None:
        numbers = [contract.parity.get(name) for name in ("steps", "max_abs_difference")]
        if not all(map(_finite, numbers)):
            raise ContractError(f"parity is {dict(contract.parity)}, it must have steps and max_abs_difference")
    if contract.memory is not None:
        _validate_memory(contract.memory)
    if contract.gaps is not None:
        _validate_gaps(contract.gaps)
    for feature in contract.features:
        _name("a feature's name", feature.name)
        _text(f"the unit of feature {feature.name!r}", feature.unit)
        if any(bound is not None and not _finite(bound) for bound in (feature.min, feature.max)):
            raise ContractError(f"feature {feature.name!r} has the range {feature.min!r} to {feature.max!r}")
    for state in contract.states:
        _validate_state(state)
    for output in contract.outputs:
        _name("an output's name", output.name)
        _axis(f"output {output.name!r}", output.batch_axis)
        if output.role is not None:
            _one_of(f"the role of output {output.name!r}", output.role, ROLES)
        if unknown := set(output.features or ()) - set(contract.feature_names):
            raise ContractError(f"output {output.name!r} names {sorted(unknown)}, which are no features of the input")
        if output.state is not None and output.state not in [state.input for state in contract.states]:
            raise ContractError(f"output {output.name!r} is held by {output.state!r}, which is no state")
    _unique("feature", [feature.name for feature in contract.features])
    _unique("input", [*contract.inputs, *(state.input for state in contract.states)])
    _unique("output", [o.name for o in contract.outputs] + [state.output for state in contract.states])
    _unique("role", [output.role for output in contract.outputs if output.role])


def _validate_state(state: State) -> None:
    _name("a state's input", state.input)
    _name(f"the output of state {state.input!r}", state.output)
    _one_of(f"the dtype of state {state.input!r}", state.dtype, DTYPES)
    _axis(f"state {state.input!r}", state.batch_axis)
    if state.batch_axis > len(state.shape):
        raise ContractError(f"state {state.input!r} has batch axis {state.batch_axis} and shape {list(state.shape)}")
    if any(size < 1 for size in state.shape):
        raise ContractError(f"state {state.input!r} has shape {list(state.shape)}, each size must be 1 or more")
    state.initial_value()


def _validate_memory(memory: Any) -> None:
    """What its readers rely on: numbers of timesteps from 1 on, or null; a curve of as many gaps as steps."""
    try:
        counts = [memory.get("warm"), *(n for found in memory.get("outputs", {}).values() for n in found.values())]
        curve = memory.get("curve", {})
        steps, gaps = curve.get("steps", []), curve.get("gap", [])
        sound = all(n is None or (type(n) is int and n >= 1) for n in counts) and len(steps) == len(gaps)
        sound = sound and all(_finite(number) and number >= 0 for number in [*steps, *gaps])
    except (AttributeError, TypeError):
        sound = False
    if not sound:
        raise ContractError(f"memory is {str(memory)[:200]}, it must be as statestep.export.horizon gives it")


def _validate_gaps(gaps: Any) -> None:
    """What the service relies on: ways for rising lengths, the last for all that are longer, which is no bridge."""
    try:
        lengths = [step["up_to"] for step in gaps["plan"]]
        ways = [step["do"] for step in gaps["plan"]]
        sound = bool(ways) and lengths[-1] is None and ways[-1] != "bridge" and set(ways) <= set(GAP_WAYS)
        sound = sound and all(type(n) is int and n >= 1 for n in lengths[:-1]) and lengths[:-1] == sorted(lengths[:-1])
        bridged = [n for n, way in zip(lengths, ways, strict=True) if way == "bridge"]
        sound = sound and all(n <= MOST_BRIDGED for n in bridged)
    except (AttributeError, KeyError, TypeError, IndexError):
        sound = False
    if not sound:
        raise ContractError(f"gaps is {str(gaps)[:200]}, it must have a plan as statestep.export.gaps gives it")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _text(what: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise ContractError(f"{what} is {value!r}, it must be a text")


def _name(what: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ContractError(f"{what} is {value!r}, it must be a text that is not empty")


def _one_of(what: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise ContractError(f"{what} is {value!r}, it must be one of {list(known)}")


def _axis(what: str, axis: Any) -> None:
    if not isinstance(axis, int) or axis < 0:
        raise ContractError(f"{what} has batch axis {axis!r}, it must be a number from 0 on")


def _above_zero(what: str, value: Any, kind: Any) -> None:
    if not isinstance(value, kind) or not 0 < value < math.inf:
        raise ContractError(f"{what} is {value!r}, it must be a number above 0")


def _unique(what: str, names: Sequence[str | None]) -> None:
    doubled = sorted({str(name) for name in names if names.count(name) > 1})
    if doubled:
        raise ContractError(f"a contract names each {what} once, {doubled} stand twice")


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_without_none(item) for item in value]
    return value


def _known(cls: type, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `raw` that `cls` has a field for; a required one that is absent is named."""
    absent = [
        f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING and f.name not in raw
    ]
    if absent:
        raise ContractError(f"the model's contract: {cls.__name__.lower()} lacks {absent[0]!r}")
    return {f.name: raw[f.name] for f in fields(cls) if f.name in raw}


def _state(raw: Mapping[str, Any]) -> State:
    known = _known(State, raw)
    return State(**known | {"shape": tuple(int(size) for size in known["shape"])})


def _output(raw: Mapping[str, Any]) -> Output:
    known = _known(Output, raw)
    named = known.get("features")
    return Output(**known | {"features": None if named is None else tuple(named)})
