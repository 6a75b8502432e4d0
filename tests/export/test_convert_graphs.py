"""Graphs from everywhere: what converts gives the numbers of its original, what cannot be streamed is refused by name.

The original runs as it was exported, by onnxruntime; the step model runs in the engine, row by row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest

from statestep.export.against import rounding
from statestep.export.histories import stepped
from statestep.runtime import StepModel, session_options

from . import graphs_odd
from .conversion_table import BY_HAND, cases
from .conversions import Case, Original, Outcome

CONVERTING = [case for case in cases() if not case.refused]
REFUSED = [case for case in [*BY_HAND, *graphs_odd.UNRUNNABLE] if case.refused]
BEGINNINGS = ("node '", "input '", "output '", "nothing in the graph", "the graph", "uses the operator", "onnxruntime")
SHAPES = ((23, 5), (3, 1))  # T and B
Converted = Callable[[Case], Outcome]


def name(case: Case) -> str:
    return case.name


def test_each_case_has_a_name_of_its_own() -> None:
    """Outcomes are remembered by name."""
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", CONVERTING, ids=name)
def test_stepped_it_is_the_original(case: Case, converted: Converted) -> None:
    """Bit for bit; where an operator rounds each row in its own way, within 1e-6 of the largest number."""
    made = converted(case).made
    assert made is not None, converted(case).sentence
    model, original = StepModel.load(made.model), Original(case)
    assert made.sequence is not None
    rounds = rounding(onnx.load(made.sequence))
    assert made.proof is not None and (made.proof.exact or rounds)
    for steps, streams in SHAPES:
        x = original.readings(steps, streams, seed=steps)
        truth, ours = original.run(x), stepped(model, x)
        for key, value in truth.items():
            if key not in ours:  # a state
                continue
            found = ours[key] if ours[key].ndim == value.ndim else ours[key][-1]
            assert found.dtype == value.dtype and found.shape == value.shape
            if rounds and value.dtype.kind == "f":
                np.testing.assert_allclose(found, value, rtol=0, atol=1e-6 * max(1.0, float(np.abs(value).max())))
            else:
                assert found.tobytes() == value.tobytes()


@pytest.mark.parametrize("case", CONVERTING, ids=name)
def test_the_sequence_file_is_the_original(case: Case, converted: Converted) -> None:
    """x [T, B, F] in, outputs [T, B, …] out, or [B, …] for the last row: the numbers of the original."""
    made = converted(case).made
    assert made is not None and made.sequence is not None
    session = onnxruntime.InferenceSession(made.sequence, session_options(), providers=["CPUExecutionProvider"])
    original = Original(case)
    x = original.readings(9, 4, seed=1)
    names = [output.name for output in made.contract.outputs]
    truth = original.run(x)
    for key, value in zip(names, session.run(names, {session.get_inputs()[0].name: x}), strict=True):
        if key in truth:
            np.testing.assert_allclose(value, truth[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", REFUSED, ids=name)
def test_what_cannot_be_streamed_is_refused(case: Case, converted: Converted) -> None:
    """One sentence that names what it is about and a way out; nothing is written."""
    outcome = converted(case)
    assert outcome.made is None and outcome.files == []
    assert case.refused in outcome.sentence
    assert outcome.sentence.startswith(BEGINNINGS), outcome.sentence
    assert (": " in outcome.sentence or "; " in outcome.sentence) and len(outcome.sentence) < 300
    if case not in graphs_odd.UNRUNNABLE:
        assert ". " not in outcome.sentence
