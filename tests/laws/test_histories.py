"""Any history: calls of any streams in any order, kept, rolled back, or cut by a restart, give what each gets alone."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestep.export.compare import Outputs
from statestep.export.histories import alone
from statestep.export.readings import drawn
from statestep.runtime import Engine, StepModel

from ..models import Array, pump

STREAMS, STEPS = 4, 24


class Known(NamedTuple):
    """A model, readings [T, B, F], and what each stream gets alone."""

    model: StepModel
    x: Array
    alone: Outputs


def known(model: StepModel) -> Known:
    x = drawn(model.contract, STEPS, STREAMS, np.random.default_rng(6))
    return Known(model, x, alone(model, x))


def shipped() -> StepModel:
    with as_file(files("statestep.consumers") / "models" / "pump.onnx") as path:
        return StepModel.load(path)


MODELS = {"shipped": known(shipped()), "mixed-dtypes": known(pump())}  # the second has int64 and bool states
CALL = st.lists(st.integers(0, STREAMS - 1), min_size=1, max_size=6)
FATE = st.sampled_from(["commit", "commit", "go on", "rollback", "restart", "drop"])


@pytest.mark.parametrize("name", MODELS)
@given(history=st.lists(st.tuples(CALL, FATE), min_size=1, max_size=14))
def test_any_history_gives_what_each_stream_gets_alone(name: str, history: list[tuple[list[int], str]]) -> None:
    """After "restart" a fresh engine goes on from the records as they were committed; a dropped stream begins anew."""
    model, x, expected = MODELS[name]
    engine = Engine(model)
    place = [0] * STREAMS  # the next timestep of each
    kept = list(place)  # as of the last commit
    for call, fate in history:
        rows = []
        for stream in call:
            if place[stream] < STEPS:
                rows.append((stream, place[stream]))
                place[stream] += 1
        if rows:
            streams, steps = np.array(rows).T
            out = engine.advance([b"%d" % stream for stream in streams], x[steps, streams])
            assert out.step.tolist() == (steps + 1).tolist()
            for output, value in out.outputs.items():
                assert value.tobytes() == expected[output][steps, streams].tobytes(), output
        if fate == "drop" and place[call[0]]:
            engine.drop([b"%d" % call[0]])
            place[call[0]] = 0
        elif fate == "commit":
            engine.commit()
            kept = list(place)
        elif fate in ("rollback", "restart"):
            engine.rollback()
            place = list(kept)
        if fate == "restart":
            held, fresh = engine.keys(), Engine(model)
            fresh.write(held, engine.read(held))
            fresh.commit()
            engine = fresh
