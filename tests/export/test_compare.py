"""Where two runs differ is told by the first timestep, not by the first output."""

from __future__ import annotations

import numpy as np
import pytest

from statestep.export.compare import Outputs, first_difference, units
from statestep.runtime import Contract, Feature, Output, State

CONTRACT = Contract(
    "pump",
    (Feature("flow"), Feature("speed")),
    (State("h0", "hn", (1,)),),
    (Output("prediction", features=("flow", "speed")), Output("score"), Output("anomaly")),
)


def run() -> Outputs:
    """Outputs of 5 timesteps of 3 streams."""
    return {
        "prediction": np.ones((5, 3, 2), np.float32),
        "score": np.ones((5, 3), np.float32),
        "anomaly": np.zeros((5, 3), bool),
    }


def test_equal_runs_do_not_differ() -> None:
    """To the bit, and in units."""
    unit = units(CONTRACT, [np.ones((5, 3, 2), np.float32)], [run()])
    assert first_difference(CONTRACT, run(), run()) is None
    assert first_difference(CONTRACT, run(), run(), unit) is None


def test_the_earliest_timestep_is_told() -> None:
    """Whichever output differs at the earliest step is told, in words, not the first or the last in order."""
    other = run()
    other["prediction"][3, 0, 1] = 2
    other["score"][4, 0] = 2
    assert first_difference(CONTRACT, run(), other) == "step 4, stream 1: prediction of 'speed' differs: 1.0 and 2.0"
    other["score"][1, 2] = 3
    assert first_difference(CONTRACT, run(), other) == "step 2, stream 3: score differs: 1.0 and 3.0"
    other["anomaly"][0, 1] = True
    assert first_difference(CONTRACT, run(), other) == "step 1, stream 2: anomaly differs: False and True"


@pytest.mark.parametrize("name", ["prediction", "score"])
def test_one_bit_is_a_difference(name: str) -> None:
    """The neighbouring float32, and a zero of the other sign, differ to the bit."""
    for value in (np.nextafter(np.float32(1), np.float32(2)), None):
        one, other = run(), run()
        one[name][2, 1] = 0.0 if value is None else 1.0
        other[name][2, 1] = -0.0 if value is None else value
        assert (first_difference(CONTRACT, one, other) or "").startswith("step 3, stream 2")


def test_units_are_the_spread_of_what_is_compared() -> None:
    """1e-5 standard deviations apart pass, twice as far do not; a NaN never does."""
    readings = np.random.default_rng(0).normal(0, [1.0, 100.0], (4000, 1, 2)).astype(np.float32)
    still: Outputs = {"prediction": np.zeros((4000, 1, 2), np.float32)}
    unit = units(CONTRACT, [readings], [still])
    np.testing.assert_allclose(unit["prediction"], [1.0, 100.0], rtol=0.05)
    for gap, passes in ((0.8e-3, True), (2e-3, False), (np.nan, False)):
        other = {"prediction": still["prediction"].copy()}
        other["prediction"][7, 0, 1] = gap
        assert (first_difference(CONTRACT, still, other, unit) is None) is passes


def test_another_shape_is_told() -> None:
    """Shapes and dtypes are compared before numbers."""
    other = run() | {"score": np.ones((5, 3), np.float64)}
    assert first_difference(CONTRACT, run(), other) == "score is float32 [5, 3] here, float64 [5, 3] there"
