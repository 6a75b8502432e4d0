"""Guessing: the contract of a step model that carries none, its states told by how their tensors are called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from statestep.runtime.contract import Contract, ContractError, Feature, Output, State

# A state leaves the graph under a name made from the one it came in by. Tried in order; `{}` is the stem.
# Sources: torch (h0→hn), silero (state→stateN), icefall (state0→new_state0), transformers (past→present),
# NeMo (cache→cache_next).
PAIR_PATTERNS = (
    (r"^(.+?)_?0$", ("{}n", "{}_n", "{}N")),
    (r"^past(.*)$", ("present{}",)),
    (r"^(.+)$", ("next_{}", "new_{}", "{}N", "{}_n", "{}_next", "{}_out")),
    (r"^(.+)_in$", ("{}_out",)),
)


class Tensor(NamedTuple):
    """One graph input or output as onnxruntime reports it; a symbolic dimension is a name or None."""

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str


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
    if strangers := sorted(set(named or ()) - {tensor.name for tensor in inputs}):
        raise ContractError(f"the graph has no input {strangers[0]!r}, it has {[tensor.name for tensor in inputs]}")
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
