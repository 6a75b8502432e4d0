"""The laws of a step model, over every cell, depth and scaling, by the runtime that runs it.

1. Streaming is offline: stepped T times = one run of the sequence file, bit for bit.
2. A stream's numbers do not depend on its company: any batch size, order and interleaving gives the same bits.
3. What runs is what was trained: torch gives the same within 1e-5 standard deviations.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from statestep.export import export_step
from statestep.export.against import sequence_path
from statestep.export.weights import load, reference_of
from statestep.runtime import Engine, StepModel

from ..export.models import STD, Array, model, readings

KINDS = [
    ("lstm", 1, "pooled"),
    ("lstm", 2, "per-stream"),
    ("gru", 1, "per-stream"),
    ("gru", 2, "pooled"),
    ("rnn", 1, "pooled"),
    ("rnn", 2, "per-stream"),
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One exported model of each kind."""
    cell, layers, scale = request.param
    out = tmp_path_factory.mktemp("laws") / "model.onnx"
    return export_step(model(cell, layers, scale=scale, hidden=24), out).model


def stepped(path: Path, x: Array) -> dict[str, Array]:
    """x [T, B, F] through an engine, one timestep of every stream a call: outputs [T, B, …]."""
    engine = Engine(StepModel.load(path))
    rows = [engine.advance([b"%d" % stream for stream in range(x.shape[1])], row).outputs for row in x]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def offline(path: Path, x: Array) -> dict[str, Array]:
    """x [T, B, F] through the sequence file in one run, in a session with onnxruntime's defaults."""
    session = ort.InferenceSession(sequence_path(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": x}), strict=True))


@pytest.mark.parametrize("steps", [1, 2, 60])
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_streaming_is_offline(path: Path, steps: int, batch: int) -> None:
    """Every output of every stream at every timestep has the bits of the whole-sequence run."""
    x = readings(steps, batch, seed=steps * batch)
    one, other = stepped(path, x), offline(path, x)
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].tobytes() == np.ascontiguousarray(other[name]).tobytes(), name


def test_company_does_not_matter(path: Path) -> None:
    """Streams interleaved at random, in calls of random size, get the bits that each gets alone."""
    steps, streams = 25, 33
    rng = np.random.default_rng(11)
    x = readings(steps, streams, seed=1)
    order = rng.permutation(np.repeat(np.arange(streams), steps))  # [T·B] the stream of each observation
    engine, place, got = Engine(StepModel.load(path)), np.zeros(streams, int), np.empty((steps, streams), np.float32)
    while len(order):
        members, order = np.split(order, [rng.integers(1, 120)])
        places = []
        for stream in members:
            places.append(place[stream])
            place[stream] += 1
        out = engine.advance([b"%d" % stream for stream in members], x[places, members])
        got[places, members] = out["score"]
    for stream in range(streams):
        alone = stepped(path, x[:, stream : stream + 1])["score"][:, 0]
        assert got[:, stream].tobytes() == alone.tobytes(), stream


def test_torch_gives_the_same(path: Path) -> None:
    """The weights beside the model, run by torch, forecast the same within 1e-5 standard deviations."""
    x = readings(60, 5, seed=3)
    ours, theirs = stepped(path, x), reference_of(load(path.with_suffix(".pt")))(x)
    unit = np.array(STD)[[0, 2]]
    for name in ("prediction", "expected"):
        np.testing.assert_allclose(ours[name] / unit, theirs[name] / unit, atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours["score"], theirs["score"], rtol=1e-3, atol=1e-5)
