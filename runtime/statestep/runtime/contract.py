"""The contract of a step model: which tensors are state, which columns are features, what each output means.

It travels inside the ONNX file, as one JSON document under ``statestep.contract`` in ``metadata_props``.
This file is the one place that reads and writes it. A model without one can still run where its state
pairs are told by name: see `detect`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, NamedTuple, cast

import numpy as np
import onnx

CONTRACT_KEY = "statestep.contract"
VERSION = 1
MISSING_POLICIES = ("own-forecast", "reject")
ROLES = ("prediction", "expected", "score", "threshold", "anomaly", "flags")
DTYPES = ("float32", "float64", "float16", "int64", "int32", "bool")

# A state leaves the graph under a name made from the one it came in by. Tried in order; `{}` is the stem.
# Sources: torch (h0→hn), silero (state→stateN), icefall (state0→new_state0), transformers (past→present),
# NeMo (cache→cache_next).
PAIR_PATTERNS = (
    (r"^(.+?)_?0$", ("{}n", "{}_n", "{}N")),
    (r"^past_(.+)$", ("present_{}",)),
    (r"^past(.*)$", ("present{}",)),
    (r"^(.+)$", ("next_{}", "new_{}", "{}N", "{}_n", "{}_next", "{}_out")),
    (r"^(.+)_in$", ("{}_out",)),
)


class ContractError(ValueError):
    """A contract that is missing, malformed, from a later version, or at odds with its graph."""


class Tensor(NamedTuple):
    """One graph input or output as onnxruntime reports it; a symbolic dimension is a name or None."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Feature:
    """One column of the input, with the range seen in training where it is known."""

    name: str
    unit: str | None = None
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A pair of tensors that carries memory from one timestep to the next; `shape` is without the batch axis."""

    input: str
    output: str
    shape: tuple[int, ...]
    batch_axis: int = 0
    dtype: str = "float32"
    initial: Any = 0.0  # a number, or a nested list of `shape`

    def initial_value(self) -> np.ndarray[Any, Any]:
        """The state of a stream that has seen nothing: an array of `shape` and `dtype`.

        >>> State("h0", "hn", (2,), initial=[0.5, -0.5]).initial_value()
        array([ 0.5, -0.5], dtype=float32)
        """
        value = np.asarray(self.initial, dtype=self.dtype)
        if value.ndim and value.shape != self.shape:
            raise ContractError(
                f"state {self.input!r}: its initial value has shape {list(value.shape)}, its own is {list(self.shape)}"
            )
        return np.array(np.broadcast_to(value, self.shape))  # [*shape]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that leaves the step, with its meaning (`role`) where it has a known one."""

    name: str
    batch_axis: int = 0
    role: str | None = None
    features: tuple[str, ...] | None = None


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
    missing: str = "reject"  # what a NaN in x means: "own-forecast" lets the graph stand in for it
    period_seconds: float | None = None  # the time between two timesteps
    horizon: int = 1  # how many timesteps ahead `prediction` looks
    memory: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] | None = None  # {"steps", "max_abs_difference"}: proven against torch at export
    producer: str | None = None
    license: str | None = None
    trained_on: str | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the columns of `x`, in order."""
        return tuple(feature.name for feature in self.features)

    def output(self, role: str) -> Output | None:
        """The output that plays `role`, or None."""
        return next((output for output in self.outputs if output.role == role), None)

    def to_json(self) -> str:
        """The document that is written into the model; absent values are left out."""
        return json.dumps(_without_none(asdict(self)), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Read a document. Keys that this release does not know are passed by; a later version is refused."""
        try:
            raw = json.loads(text)
        except ValueError as error:
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
        except (KeyError, TypeError, ValueError) as error:
            raise ContractError(f"the model's contract cannot be read: {error}") from None


def stamp(model: onnx.ModelProto, contract: Contract) -> None:
    """Write `contract` into `model`, replacing what was there, with flat keys that other tools show."""
    flat = {CONTRACT_KEY: contract.to_json(), "name": contract.name, "version": contract.model_version}
    if contract.license:
        flat["license"] = contract.license
    kept = {entry.key: entry.value for entry in model.metadata_props} | flat
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, kept)
    model.producer_name = "statestep"


def detect(
    name: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    *,
    named: Mapping[str, tuple[str, int]] | None = None,
) -> Contract:
    """Guess the contract of a step model that carries none, from names, shapes and dtypes.

    `named` settles pairs by hand: state input → (its output, its batch axis). An input that pairs with two
    outputs, or leaves more or fewer than one input over, is a `ContractError` that lists the candidates.

    >>> x, y = Tensor("x", ("B", 3), "float32"), Tensor("y", ("B", 1), "float32")
    >>> h0, hn = Tensor("h0", (1, "B", 8), "float32"), Tensor("hn", (1, "B", 8), "float32")
    >>> detect("m", [x, h0], [y, hn]).states
    (State(input='h0', output='hn', shape=(1, 8), batch_axis=1, dtype='float32', initial=0.0),)
    """
    by_name = {tensor.name: tensor for tensor in outputs}
    states = []
    for tensor in inputs:
        if named is not None and tensor.name in named:
            output, axis = named[tensor.name]
            if output not in by_name:
                raise ContractError(
                    f"state {tensor.name!r}: the graph has no output {output!r}, it has {sorted(by_name)}"
                )
            states.append(_state_of(tensor, output, axis))
            continue
        candidates = [other for other in _partners(tensor.name) if _alike(tensor, by_name.get(other))]
        if len(candidates) > 1:
            raise ContractError(f"input {tensor.name!r} could pair with any of {candidates}: name the pair")
        if candidates:
            states.append(_state_of(tensor, candidates[0], _batch_axis(tensor)))
    if not states:
        raise ContractError(
            f"the graph has no state pair: inputs {[t.name for t in inputs]}, outputs {[t.name for t in outputs]}; "
            "a step model takes each state in and gives it out (h0 → hn)"
        )
    taken = {state.input for state in states}
    free = [tensor for tensor in inputs if tensor.name not in taken]
    if len(free) != 1:
        raise ContractError(
            f"the observation must be the one input that is no state, there are {[t.name for t in free]}"
        )
    x = free[0]
    if len(x.shape) != 2 or not isinstance(x.shape[1], int):
        raise ContractError(f"input {x.name!r} has shape {list(x.shape)}, a step takes [batch, features]")
    given_back = {state.output for state in states}
    return Contract(
        name=name,
        features=tuple(Feature(f"x{column}") for column in range(x.shape[1])),
        states=tuple(states),
        outputs=tuple(Output(tensor.name) for tensor in outputs if tensor.name not in given_back),
        input=x.name,
        input_dtype=x.dtype,
    )


def _validate(contract: Contract) -> None:
    if not contract.features:
        raise ContractError("a contract names at least one feature")
    if not contract.states:
        raise ContractError("a contract names at least one state pair (h0 → hn); without one nothing is remembered")
    if contract.missing not in MISSING_POLICIES:
        raise ContractError(f"missing is {contract.missing!r}, it must be one of {list(MISSING_POLICIES)}")
    _unique("feature", [feature.name for feature in contract.features])
    _unique("input", [contract.input, *(state.input for state in contract.states)])
    _unique("output", [o.name for o in contract.outputs] + [state.output for state in contract.states])
    _unique("role", [output.role for output in contract.outputs if output.role])
    for state in contract.states:
        if state.dtype not in DTYPES:
            raise ContractError(f"state {state.input!r} has dtype {state.dtype!r}, it must be one of {list(DTYPES)}")
        if not 0 <= state.batch_axis <= len(state.shape):
            raise ContractError(
                f"state {state.input!r} has batch axis {state.batch_axis} and shape {list(state.shape)}"
            )
        if any(size < 1 for size in state.shape):
            raise ContractError(f"state {state.input!r} has shape {list(state.shape)}, each size must be 1 or more")
        state.initial_value()
    for output in contract.outputs:
        if output.role is not None and output.role not in ROLES:
            raise ContractError(f"output {output.name!r} has role {output.role!r}, it must be one of {list(ROLES)}")
        if unknown := set(output.features or ()) - set(contract.feature_names):
            raise ContractError(f"output {output.name!r} names {sorted(unknown)}, which are no features of the input")
    if contract.period_seconds is not None and not contract.period_seconds > 0:
        raise ContractError(f"period_seconds is {contract.period_seconds}, it must be above 0")


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


def _partners(name: str) -> list[str]:
    """The output names that a state input called `name` may have, best first."""
    partners = []
    for pattern, templates in PAIR_PATTERNS:
        if match := re.match(pattern, name):
            partners += [template.format(match.group(1)) for template in templates]
    return list(dict.fromkeys(partners))


def _alike(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether the two can be one state: same dtype and rank, no two fixed sizes that differ."""
    if other is None or tensor.dtype != other.dtype or len(tensor.shape) != len(other.shape):
        return False
    pairs = zip(tensor.shape, other.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _batch_axis(tensor: Tensor) -> int:
    symbolic = [axis for axis, size in enumerate(tensor.shape) if not isinstance(size, int)]
    if len(symbolic) != 1:
        raise ContractError(
            f"state {tensor.name!r} has shape {list(tensor.shape)}: its batch axis must be its one free dimension"
        )
    return symbolic[0]


def _state_of(tensor: Tensor, output: str, axis: int) -> State:
    shape = tensor.shape[:axis] + tensor.shape[axis + 1 :]
    if axis >= len(tensor.shape) or not all(isinstance(size, int) for size in shape):
        raise ContractError(
            f"state {tensor.name!r} has shape {list(tensor.shape)}, axis {axis} cannot be its batch axis"
        )
    return State(tensor.name, output, cast(tuple[int, ...], shape), axis, tensor.dtype)
