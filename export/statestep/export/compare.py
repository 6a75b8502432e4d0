"""Where two runs of one model differ: the first timestep, stream, output and feature, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from statestep.runtime import Contract

Array = np.ndarray[Any, Any]
Outputs = dict[str, Array]  # by name, each [T, B, …]

IN_READINGS = (None, "prediction", "expected", "related")  # roles of outputs that are in the readings' units
TOLERANCE = 1e-5  # standard deviations of the checked data
ROUNDINGS = 2 * float(np.finfo(np.float32).eps)  # of a value; two computations of one number may be this far apart
SCORE_TOLERANCE = 1e-3  # of the score, which squares a difference over a small spread


def units(contract: Contract, sequences: Sequence[Array], stepped: Sequence[Outputs]) -> dict[str, Array]:
    """What a difference is measured in, for each output in sensor units or of its own kind: by output [K] or [].

    The spread of the readings (`sequences`, each [T, B, F]) or that of the output, the larger, for drawn readings may
    lie far from those that the model was trained on; but at least a few roundings of float32 at the readings' level:
    no computation is finer. An output of its own kind is measured in its own spread.
    """
    readings = _flat(sequences)  # [rows, F]
    rounding = ROUNDINGS * np.abs(readings).max(axis=0) / TOLERANCE
    std = np.maximum(np.maximum(readings.std(axis=0), rounding), np.finfo(np.float32).tiny)  # [F]
    columns = {feature: column for column, feature in enumerate(contract.feature_names)}
    found = {}
    for output in contract.outputs:
        features = output.features
        if features is None and output.role in ("prediction", "expected"):
            features = contract.feature_names  # as a contract has it that does not name them
        of_readings = features is not None and output.role in IN_READINGS and all(f in columns for f in features)
        if output.name not in stepped[0] or (not of_readings and output.role is not None):
            continue
        spread = _flat([outputs[output.name] for outputs in stepped]).std(axis=0)  # [K]
        if of_readings:
            found[output.name] = np.maximum(std[[columns[feature] for feature in features or ()]], spread)
        else:
            found[output.name] = np.maximum(spread.max(), np.finfo(np.float32).tiny)
    return found


def _flat(sequences: Sequence[Array]) -> Array:
    """Sequences [T, B, …], one below the other: float64 [rows, values of a row]."""
    return np.concatenate([x.reshape(x.shape[0] * x.shape[1], -1) for x in sequences]).astype(np.float64)


def first_difference(
    contract: Contract, one: Outputs, other: Outputs, unit: Mapping[str, Array] | None = None
) -> str | None:
    """The first timestep at which the two differ, in a phrase; without `unit` to the bit."""
    first: tuple[Array, str] | None = None  # the place, and the output's name
    for name, value in one.items():
        theirs = other[name]
        if value.shape != theirs.shape or value.dtype != theirs.dtype:
            return f"{name} is {value.dtype} {list(value.shape)} here, {theirs.dtype} {list(theirs.shape)} there"
        apart = np.argwhere(_apart(name, value, theirs, unit))  # [differences, axes]
        if len(apart) and (first is None or apart[0][0] < first[0][0]):
            first = apart[0], name
    if first is None:
        return None
    place, name = first
    here, there = one[name][tuple(place)], other[name][tuple(place)]
    return f"{place_in_words(contract, name, place)} differs: {here!s} and {there!s}"


def _apart(name: str, value: Array, theirs: Array, unit: Mapping[str, Array] | None) -> Array:
    if unit is None:
        bits = np.dtype(f"V{value.dtype.itemsize}")
        return np.asarray(np.ascontiguousarray(value).view(bits) != np.ascontiguousarray(theirs).view(bits))
    if value.dtype.kind != "f":
        return np.zeros(value.shape, bool)  # a flag may tip where the number that it follows from only rounds
    gap = np.abs(value.astype(np.float64) - theirs)
    if name in unit:
        return ~(gap <= TOLERANCE * unit[name] + ROUNDINGS * np.abs(theirs))
    return ~(gap <= SCORE_TOLERANCE * np.maximum(1.0, np.abs(theirs)))


def place_in_words(contract: Contract, name: str, place: Array) -> str:
    """Where in [T, B, …] in words: timestep, stream, output and the feature it is of."""
    features = next(output.features for output in contract.outputs if output.name == name)
    of = f" of {features[place[2]]!r}" if features is not None and len(place) == 3 else ""
    return f"step {place[0] + 1}, stream {place[1] + 1}: {name}{of}"
