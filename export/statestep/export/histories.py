"""Readings of many streams x [T, B, F] through an engine: timestep by timestep, each stream alone, or interleaved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from statestep.export.compare import Array, Outputs
from statestep.runtime import Engine, Model

CALLS = 13  # that an interleaved history is cut into


def keys_of(x: Array) -> list[bytes]:
    """A key for each stream of x [T, B, F]."""
    return [b"%d" % stream for stream in range(x.shape[1])]


def advanced(engine: Engine, x: Array) -> Outputs:
    """x [T, B, F], one timestep of every stream a call, each committed: outputs [T, B, …]."""
    keys, rows = keys_of(x), []
    for row in x:
        rows.append(engine.advance(keys, row).outputs)
        engine.commit()
    return stacked(rows)


def stepped(model: Model, x: Array) -> Outputs:
    """x [T, B, F] from the birth of its streams, one timestep of every stream a call: outputs [T, B, …]."""
    return advanced(Engine(model, max_streams=x.shape[1]), x)


def alone(model: Model, x: Array) -> Outputs:
    """x [T, B, F] stream by stream, one row a call: outputs [T, B, …]."""
    single = [stepped(model, x[:, stream : stream + 1]) for stream in range(x.shape[1])]
    return {name: np.concatenate([outputs[name] for outputs in single], axis=1) for name in single[0]}


def in_batches(model: Model, x: Array, size: int, rng: np.random.Generator) -> Outputs:
    """x [T, B, F] shuffled and cut into batches of `size` streams, each stepped by itself: outputs [T, B, …]."""
    order = rng.permutation(x.shape[1])
    out: Outputs = {}
    for begin in range(0, len(order), size):
        members = order[begin : begin + size]
        for name, value in stepped(model, x[:, members]).items():
            whole = out.setdefault(name, np.empty((len(x), len(order), *value.shape[2:]), value.dtype))
            whole[:, members] = value
    return out


def interleaved(model: Model, x: Array, rng: np.random.Generator) -> Outputs:
    """x [T, B, F] in a random order that keeps each stream's own, cut into calls of random size: outputs [T, B, …]."""
    steps, streams = x.shape[:2]
    order = rng.permutation(np.repeat(np.arange(streams), steps))  # [T·B] the stream of each observation
    place = np.zeros(len(order), np.int64)  # [T·B] its timestep
    by_stream = np.argsort(order, kind="stable")
    place[by_stream] = np.tile(np.arange(steps), streams)
    engine, keys = Engine(model, max_streams=streams), keys_of(x)
    cuts = np.sort(rng.integers(0, len(order), CALLS - 1))
    out: Outputs = {}
    for rows in np.split(np.arange(len(order)), cuts):
        given = engine.advance([keys[stream] for stream in order[rows]], x[place[rows], order[rows]])
        engine.commit()
        for name, value in given.outputs.items():
            whole = out.setdefault(name, np.empty((steps, streams, *value.shape[1:]), value.dtype))
            whole[place[rows], order[rows]] = value
    return out


def stacked(rows: Sequence[Outputs]) -> Outputs:
    """Outputs [B, …] of each timestep as outputs [T, B, …]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
