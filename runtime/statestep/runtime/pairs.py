"""Guessing: the contract of a step model that carries none, its states told by how their tensors are called.

A state is recognised by name, shape and dtype together. What two readings would fit is refused with the candidates,
for a wrong pair runs without an error and predicts nonsense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

from statestep.runtime.contract import Contract, ContractError, Feature, Output, State

# A state leaves the graph under a name made from the one it came in by. Tried in order; `{}` is the stem.
# Sources: torch (h0→hn), silero (state→stateN, h→hn), icefall (state0→new_state0), transformers (past_key_values→
# present), NeMo (cache→cache_next, cache_len→cache_next_len, input_states→output_states), video matting (r1i→r1o).
PAIR_PATTERNS = (
    (r"^(.+?)_?0$", ("{}n", "{}_n", "{}N")),
    (r"^past_key_values(.*)$", ("present{}",)),
    (r"^past(.*)$", ("present{}",)),
    (r"^prev(?:ious)?_(.+)$", ("next_{}", "new_{}", "{}")),
    (r"^(?:input|in)_(.+)$", ("output_{}", "out_{}")),
    (r"^(.+)_(?:in|input|prev)$", ("{}_out", "{}_output", "{}_next")),
    (r"^(.+)_len$", ("{}_next_len",)),
    (r"^(.+\d)i$", ("{}o",)),
    (
        r"^(.+)$",
        (
            "next_{}",
            "new_{}",
            "out_{}",
            "updated_{}",
            "{}N",
            "{}n",
            "{}_n",
            "{}_next",
            "{}_new",
            "{}_out",
            "{}_updated",
        ),
    ),
)
WIDEST = 1 << 20  # features of a timestep; each gets a name, and a damaged file may claim billions
OBSERVATIONS = ("x", "input", "inputs", "observation", "features", "audio_signal")  # never guessed to be a state

Named = Mapping[str, str | tuple[str, int]]  # state input → its output, or that and the batch axis


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
    named: Named | None = None,
    features: int | Sequence[str] | None = None,
) -> Contract:
    """Guess the contract of a step model that carries none, from names, shapes and dtypes.

    `named` settles pairs by hand: state input → its output, or (its output, its batch axis). `features` names the
    columns of the observation, or is their number where the graph leaves it open. An input that pairs with two
    outputs, or leaves more or fewer than one input over, is a `ContractError` that lists the candidates.

    >>> x, y = Tensor("x", ("B", 3), "float32"), Tensor("y", ("B", 1), "float32")
    >>> h0, hn = Tensor("h0", (1, "B", 8), "float32"), Tensor("hn", (1, "B", 8), "float32")
    >>> detect("m", [x, h0], [y, hn]).states
    (State(input='h0', output='hn', shape=(1, 8), batch_axis=1, dtype='float32', initial=0.0, lasting=False),)
    """
    pairs = _pairs(inputs, outputs, named or {})
    x = _observation(inputs, outputs, pairs)
    symbol = _batch_symbol(x, [tensor for tensor in inputs if tensor.name in pairs])
    states = [
        _state_of(tensor, *pairs[tensor.name], symbol=symbol) for tensor in inputs if tensor.name in pairs
    ]  # in the graph's order
    given_back = {state.output for state in states}
    return Contract(
        name=name,
        features=tuple(Feature(column) for column in _columns(x, features, symbol)),
        states=tuple(states),
        outputs=tuple(
            Output(tensor.name, _axis_of_batch(tensor, symbol) or 0)
            for tensor in outputs
            if tensor.name not in given_back
        ),
        input=x.name,
        input_dtype=x.dtype,
    )


def partners(name: str) -> list[str]:
    """The output names that a state input called `name` may have, best first.

    >>> partners("h0")[:2]
    ['hn', 'h_n']
    """
    partners = []
    for pattern, templates in PAIR_PATTERNS:
        if match := re.match(pattern, name):
            partners += [template.format(match.group(1)) for template in templates]
    return list(dict.fromkeys(partners))


def time_axis(x: Tensor, symbol: str | None) -> int | None:
    """Which axis of an observation of rank 3 is time: the one of a single step, or a free one that is not the batch.

    None for a plain [batch, features]. `symbol` is what the graph calls the batch.

    >>> time_axis(Tensor("x", ("B", 1, 8), "float32"), "B")
    1
    """
    if len(x.shape) == 2:
        return None
    if len(x.shape) == 3:
        batch = _axis_of_batch(x, symbol)
        rest = [axis for axis in range(3) if axis != batch]
        single = [axis for axis in rest if x.shape[axis] == 1]
        free = [axis for axis in rest if not isinstance(x.shape[axis], int)]
        if batch is not None and (single or len(free) == 1):
            return (single or free)[0]
    raise ContractError(
        f"input {x.name!r} has shape {list(x.shape)}, a step takes [batch, features], or one timestep of a sequence as "
        "[batch, 1, features]"
    )


def batch_symbol(contract: Contract, inputs: Sequence[Tensor]) -> str | None:
    """What the graph calls its batch axis, where it gives it a name."""
    states = {state.input for state in contract.states}
    x = next(tensor for tensor in inputs if tensor.name == contract.input)
    return _batch_symbol(x, [tensor for tensor in inputs if tensor.name in states])


def _pairs(inputs: Sequence[Tensor], outputs: Sequence[Tensor], named: Named) -> dict[str, tuple[str, int | None]]:
    """Each state input with its output and, where it is given, its batch axis."""
    by_name = {tensor.name: tensor for tensor in outputs}
    if strangers := sorted(set(named) - {tensor.name for tensor in inputs}):
        raise ContractError(f"the graph has no input {strangers[0]!r}, it has {[tensor.name for tensor in inputs]}")
    pairs: dict[str, tuple[str, int | None]] = {}
    for name, settled in named.items():
        output, axis = (settled, None) if isinstance(settled, str) else settled
        if output not in by_name:
            raise ContractError(f"state {name!r}: the graph has no output {output!r}, it has {sorted(by_name)}")
        pairs[name] = output, axis
    taken = {output for output, _ in pairs.values()}
    for tensor in inputs:
        if tensor.name in pairs or tensor.name in OBSERVATIONS:
            continue
        fitting = [name for name in partners(tensor.name) if name not in taken and _alike(tensor, by_name.get(name))]
        if len(fitting) > 1:
            raise ContractError(f"input {tensor.name!r} could pair with any of {fitting}: name {_by_hand(tensor.name)}")
        if fitting:
            pairs[tensor.name] = fitting[0], None
    for output in sorted({output for output, _ in pairs.values()}):
        if len(claims := [name for name, pair in pairs.items() if pair[0] == output]) > 1:
            raise ContractError(f"output {output!r} could be the state of any of {claims}: name {_by_hand(claims[0])}")
    return pairs


def _observation(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor], pairs: Mapping[str, tuple[str, int | None]]
) -> Tensor:
    """The one input that is no state."""
    if not pairs:
        raise ContractError(
            f"the graph has no state pair: inputs {[t.name for t in inputs]}, outputs {[t.name for t in outputs]}; "
            f"a step model takes each state in and gives it out (h0 → hn){_hint(inputs, outputs)}"
        )
    free = [tensor for tensor in inputs if tensor.name not in pairs]
    if len(free) != 1:
        left = [tensor for tensor in outputs if tensor.name not in {output for output, _ in pairs.values()}]
        raise ContractError(
            f"the observation must be the one input that is no state, there are {[t.name for t in free]}; fix a "
            "constant by constants={name: value} (--set name=value), name a state by states={name: output} "
            f"(--state name=output){_hint(free, left)}"
        )
    return free[0]


def _by_hand(name: str) -> str:
    return f"the pair by states={{{name!r}: …}} (--state {name}=out)"


def _hint(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """Which outputs an input could come back as, by shape and dtype alone."""
    fits = {one.name: [other.name for other in outputs if _alike(one, other)] for one in inputs if len(one.shape) > 1}
    listed = "; ".join(f"{name!r} has the shape of {found}" for name, found in fits.items() if found)
    return f"; {listed}" if listed else ""


def _columns(x: Tensor, features: int | Sequence[str] | None, symbol: str | None) -> list[str]:
    """The features' names: given, or made from their number."""
    axis = time_axis(x, symbol)
    rest = [size for place, size in enumerate(x.shape) if place != axis]
    batch = 0 if axis is None else [a for a in range(3) if a != axis].index(_axis_of_batch(x, symbol) or 0)
    width = rest[1 - batch]
    if features is None and not isinstance(width, int):
        raise ContractError(
            f"input {x.name!r} has shape {list(x.shape)}, a step takes [batch, features]: say how many features by "
            "features=N (--features N)"
        )
    count = len(features) if isinstance(features, Sequence) else features
    count = cast(int, width) if count is None else count
    if isinstance(width, int) and count != width:
        raise ContractError(f"{count} features are named, input {x.name!r} has {width}")
    if not 1 <= count <= WIDEST:
        raise ContractError(f"input {x.name!r} has {count:,} features, a step takes 1 to {WIDEST:,}")
    return list(features) if isinstance(features, Sequence) else [f"x{i}" for i in range(count)]


def _batch_symbol(x: Tensor, states: Sequence[Tensor]) -> str | None:
    """The name that the batch axis bears, told by the tensors that have one free axis only."""
    for tensor in (x, *states):
        free = [size for size in tensor.shape if not isinstance(size, int)]
        if len(free) == 1:
            return free[0]
    return x.shape[0] if len(x.shape) == 2 and isinstance(x.shape[0], str) else None


def _axis_of_batch(tensor: Tensor, symbol: str | None) -> int | None:
    """The one free axis, or of several the one that is called as the batch is; None where it cannot be told."""
    free = [axis for axis, size in enumerate(tensor.shape) if not isinstance(size, int)]
    if len(free) > 1:
        free = [axis for axis in free if symbol is not None and tensor.shape[axis] == symbol]
    return free[0] if len(free) == 1 else None


def _alike(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether the two can be one state: same dtype and rank, no two fixed sizes that differ."""
    if other is None or tensor.dtype != other.dtype or len(tensor.shape) != len(other.shape):
        return False
    pairs = zip(tensor.shape, other.shape, strict=True)
    return all(a == b for a, b in pairs if isinstance(a, int) and isinstance(b, int))


def _state_of(tensor: Tensor, output: str, axis: int | None, *, symbol: str | None) -> State:
    """A state pair, its batch axis as given or as the shape tells it."""
    shown = f"state {tensor.name!r} has shape {list(tensor.shape)}"
    free = [place for place, size in enumerate(tensor.shape) if not isinstance(size, int)]
    if not free:
        raise ContractError(f"{shown}, with no free axis for the batch; export it with a free batch axis")
    told = _axis_of_batch(tensor, symbol) if axis is None else axis
    if told is None:
        raise ContractError(
            f"{shown}: which of the axes {free} is the batch cannot be told; say it by states={{{tensor.name!r}: "
            f"({output!r}, AXIS)}} (--state {tensor.name}={output}:AXIS)"
        )
    if not 0 <= told < len(tensor.shape):
        raise ContractError(f"{shown}, axis {told} cannot be its batch axis")
    if told not in free:
        raise ContractError(f"{shown}, axis {told} cannot be its batch axis: it is fixed, axis {free[0]} is free")
    if others := [place for place in free if place != told]:
        raise ContractError(
            f"{shown}: beside the batch, axis {told}, axis {others[0]} is free too; a state has a fixed size"
        )
    return State(
        tensor.name, output, cast(tuple[int, ...], tensor.shape[:told] + tensor.shape[told + 1 :]), told, tensor.dtype
    )
