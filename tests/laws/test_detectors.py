"""The laws on models that judge: every rule, way of combining and scale, behind recurrences of torch's and by hand.

Readings cause events, so that streams are cut, rolled back and restored in the middle of some.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest

from statestep.export import (
    agrees_with,
    company_does_not_matter,
    cuts_do_not_matter,
    order_does_not_matter,
    outputs_are_finite,
    restored_goes_on,
    rollback_is_an_identity,
    streaming_is_offline,
)
from statestep.export.against import SequenceFile
from statestep.export.compose import Ports, composed, composed_sequence
from statestep.export.detector import COMBINES, RULES, Detector
from statestep.export.forms import OWN
from statestep.export.graph import sequence_graph, step_graph
from statestep.export.histories import stepped
from statestep.export.weights import reference_of
from statestep.runtime import Engine, StepModel

from ..export.detectors import WINDOW, detector, loaded, run_alone, step_model, story
from ..export.models import FEATURES, MEAN, STD, Array, model

SCALES = ("pooled", "per-stream")
KINDS = list(product(RULES, COMBINES, SCALES))
WIDTHS = (1, 5, 16, 33, 100)
STEPS, STREAMS = 70, 9


class Judging(NamedTuple):
    """A model that judges, its sequence form, and readings [T, B, F] that cause events in it."""

    step: StepModel
    offline: SequenceFile
    x: Array
    scale: str


@cache
def graphs(scale: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Step and sequence form of a small LSTM that forecasts flow and speed."""
    forecaster = model("lstm", scale=scale, hidden=6, seed=3)
    return step_graph(forecaster), sequence_graph(forecaster)


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def judging(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judging:
    """Each kind, composed once for all its laws."""
    rule, combine, scale = request.param
    d = of_pumps(rule, combine, scale)
    ports = Ports(own=OWN if scale == "per-stream" else None)
    step, sequence = graphs(scale)
    made = composed(step, d, ports)
    path: Path = tmp_path_factory.mktemp("judging") / "model.sequence.onnx"
    onnx.save(composed_sequence(sequence, d, ports, {o.role or "": o.name for o in made.outputs}), path)
    x = story(d, STEPS, STREAMS, std=np.array(STD), seed=2)[0]
    whole = loaded(made, d, model("lstm", scale=scale, hidden=6, seed=3).states)
    return Judging(whole, SequenceFile.load(path), x, scale)


def of_pumps(rule: str, combine: str, scale: str) -> Detector:
    """For readings as the tests of the export draw them, and forecasts of a network that nobody has trained."""
    pumps: dict[str, Any] = {"features": FEATURES, "mean": np.array(MEAN), "std": np.array(STD)}
    pumps |= {"spread": np.full(2, 0.8), "past": np.linspace(0.1, 0.8, WINDOW)}
    return detector(rule, combine, targets=(0, 2), per_stream=scale == "per-stream", **pumps)


def test_readings_cause_events(judging: Judging) -> None:
    """Or the laws below would say little: some begin, some end, and in between some are going on."""
    events = stepped(judging.step, judging.x)["event"]
    assert (events == 1).any() and (events < 0).any() and (events[len(events) // 2] > 0).any()


def test_numbers_are_finite(judging: Judging) -> None:
    """And no row is turned away."""
    outputs_are_finite(judging.step, judging.x)


def test_streaming_is_offline(judging: Judging) -> None:
    """Stepped = one run of the sequence form, whose detector is the body of a Scan, in every bit of every output."""
    assert judging.offline.rounds == ()
    streaming_is_offline(judging.step, judging.offline, judging.x)
    streaming_is_offline(judging.step, judging.offline, judging.x[:1, :1])


def test_torch_agrees(judging: Judging) -> None:
    """What is judged is the forecast of the torch model, as if nothing stood behind it."""
    reference = reference_of(model("lstm", scale=judging.scale, hidden=6, seed=3))
    agrees_with(judging.step, reference, judging.x, 1e-5)


def test_company_does_not_matter(judging: Judging) -> None:
    """In batches of 2, 7 and 9 every stream gets the bits that it gets alone."""
    company_does_not_matter(judging.step, judging.x[:40], sizes=(2, 7, STREAMS))


def test_order_does_not_matter(judging: Judging) -> None:
    """Interleaved at random every stream gets the bits that it gets alone."""
    order_does_not_matter(judging.step, judging.x, seed=1)


def test_cuts_do_not_matter(judging: Judging) -> None:
    """All timesteps in one call are as many calls, and one commit is as many."""
    cuts_do_not_matter(judging.step, judging.x)


def test_rollback_is_an_identity(judging: Judging) -> None:
    """What is rolled back before each timestep leaves no trace."""
    rollback_is_an_identity(judging.step, judging.x[:40, :3], seed=1)


def test_restored_goes_on(judging: Judging) -> None:
    """Read, and written into another engine, streams go on with the same bits, events and all."""
    restored_goes_on(judging.step, judging.x)


def test_an_event_goes_on_where_its_stream_is_restored(judging: Judging) -> None:
    """With the timesteps that it has counted, the time at which it began, and its highest score."""
    steps, streams = judging.x.shape[:2]
    times = 10**18 + 300 * np.arange(steps)[:, None] + np.arange(streams)  # [T, B] ns
    keys = [b"%d" % stream for stream in range(streams)]

    def run(engine: Engine, rows: range) -> dict[str, Array]:
        given = [engine.advance(keys, judging.x[t], times[t]).outputs for t in rows]
        return {name: np.stack([row[name] for row in given]) for name in given[0]}

    whole = run(Engine(judging.step), range(steps))
    within = (whole["event"][:-1] > 1) & (whole["event"][1:] > 2)  # [T − 1, B]
    cut = int(within.sum(axis=1).argmax()) + 1
    assert within[cut - 1].any()
    first, second = Engine(judging.step), Engine(judging.step)
    run(first, range(cut))
    second.write(keys, first.read(keys))
    rest = run(second, range(cut, steps))
    for name, value in rest.items():
        assert value.tobytes() == whole[name][cut:].tobytes(), name
    stream = int(within[cut - 1].argmax())
    begun = cut - int(whole["event"][cut - 1, stream])
    assert rest["since"][0, stream] == times[begun, stream]
    assert rest["event"][0, stream] == whole["event"][cut - 1, stream] + 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rule", RULES)
def test_what_is_missing_is_the_models_own_forecast(rule: str, scale: str) -> None:
    """NaN, or by hand the forecast of the timestep before (the last reading where there is none, at birth the mean):
    predictions and the forecaster's states are the same to the bit."""
    d = of_pumps(rule, "top", scale)
    forecaster = model("lstm", scale=scale, hidden=6, seed=3)
    made = composed(graphs(scale)[0], d, Ports(own=OWN if scale == "per-stream" else None))
    step = loaded(made, d, forecaster.states)
    x = story(d, STEPS, STREAMS, std=np.array(STD), seed=2)[0]
    holes = np.asarray(np.random.default_rng(7).random(x.shape)) < 0.2  # [T, B, F]
    holes[0, 0] = True
    holes[30:36, 1] = True
    blind = [np.stack([state] * STREAMS) for state in step.initial_states()]
    known = [state.copy() for state in blind]
    standing = np.stack([d.mean.astype(np.float32)] * STREAMS)  # [B, F]
    for row, missing in zip(x, holes, strict=True):
        filled: Array = np.where(missing, standing, row)
        ours, blind = step.step(np.where(missing, np.float32(np.nan), row), blind)
        theirs, known = step.step(filled, known)
        assert ours["prediction"].tobytes() == theirs["prediction"].tobytes()
        for one, other in zip(blind[: len(forecaster.states)], known, strict=False):
            assert one.tobytes() == other.tobytes()
        standing = filled.copy()
        standing[:, [0, 2]] = theirs["prediction"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rule", RULES)
def test_rows_of_any_width_keep_the_laws(rule: str, width: int, tmp_path: Path) -> None:
    """A vector's length, more and less: company, order, cuts and the body of a Scan change no bit."""
    d = detector(rule, "top" if width % 2 else "mean", width=width, evidence=("others", "range", "stuck"))
    step, x = step_model(d), story(d, 40, 33, std=d.std, seed=width)[0]
    whole = stepped(step, x)
    assert (whole["event"] > 0).any()
    for role, value in run_alone(d, x, whole["prediction"]).items():
        assert value.tobytes() == whole[role].tobytes(), role
    company_does_not_matter(step, x[:20], sizes=(2, 7, 33))
    order_does_not_matter(step, x[:20])
    cuts_do_not_matter(step, x)
