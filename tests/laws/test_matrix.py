"""The laws of a step model, on every cell at depths 1 to 3, mixed stacks and modules of a team's own.

Each law is held at batches of 1, 2, 7 and 64 streams and over 1, 2 and 50 timesteps. No cell asks for a tolerance:
those that ONNX has no operator for are spelt out in products that give a row the same bits in every company.
"""

from __future__ import annotations

import onnx
import pytest

from statestep.export import (
    agrees_with,
    company_does_not_matter,
    cuts_do_not_matter,
    order_does_not_matter,
    restored_goes_on,
    rollback_is_an_identity,
    streaming_is_offline,
)
from statestep.export.against import sequence_path
from statestep.export.forecaster import kinds_of

from ..export.operators import NODES, nodes
from .zoo import BATCHES, MODULES, NAMES, STEPS, Specimen, X, specimen

SHAPES = [(steps, batch) for steps in STEPS for batch in BATCHES]
MATRIX = pytest.mark.parametrize(("steps", "batch"), SHAPES, ids=[f"T{steps}-B{batch}" for steps, batch in SHAPES])


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Specimen:
    """Each model, exported once for all its laws."""
    return specimen(request.param, tmp_path_factory.mktemp("laws"))


@MATRIX
def test_streaming_is_offline(model: Specimen, steps: int, batch: int) -> None:
    """Stepped = one run of the sequence file, in every bit of every output."""
    streaming_is_offline(model.step, model.offline, X[:steps, :batch])


@MATRIX
def test_torch_agrees(model: Specimen, steps: int, batch: int) -> None:
    """torch, on the same weights, gives every output within 1e-5 standard deviations."""
    agrees_with(model.step, model.torch, X[:steps, :batch], 1e-5, spread_of=X)


@MATRIX
def test_the_formulas_agree(model: Specimen, steps: int, batch: int) -> None:
    """Plain numpy in float64, one gate a line, gives the prediction within 1e-5 standard deviations."""
    truth = {name: value[:steps, :batch] for name, value in model.numpy.items()}
    agrees_with(model.step, lambda x: truth, X[:steps, :batch], 1e-5, spread_of=X)


def test_company_does_not_matter(model: Specimen) -> None:
    """In batches of 2, 7 and 64 every stream gets the bits that it gets alone."""
    company_does_not_matter(model.step, X[:12], sizes=BATCHES[1:])


@pytest.mark.parametrize("seed", [1, 2])
def test_order_does_not_matter(model: Specimen, seed: int) -> None:
    """Interleaved at random every stream gets the bits that it gets alone."""
    order_does_not_matter(model.step, X[:25, :7], seed=seed)


@pytest.mark.parametrize("batch", BATCHES)
def test_cuts_do_not_matter(model: Specimen, batch: int) -> None:
    """Fifty timesteps in one call are fifty calls, and one commit is fifty."""
    cuts_do_not_matter(model.step, X[:, :batch])


@pytest.mark.parametrize("batch", BATCHES)
def test_rollback_is_an_identity(model: Specimen, batch: int) -> None:
    """What is rolled back before each timestep, of these streams and others, leaves no trace."""
    rollback_is_an_identity(model.step, X[:20, :batch], seed=batch)


def test_restored_goes_on(model: Specimen) -> None:
    """Read, and written into the engine of another process' model, streams go on with the same bits."""
    restored_goes_on(model.step, X[:20, :7], fresh=type(model.step).load(model.path))


def test_each_layer_becomes_its_operator(model: Specimen) -> None:
    """Step and sequence form hold ONNX's operator for each layer that has one, in their order, and never RNN."""
    name = model.step.contract.name
    found = [nodes(onnx.load(path)) for path in (model.path, sequence_path(model.path))]
    if name not in MODULES:
        cell, _, layers = name.partition(" x")
        expected = [NODES[kind] for kind in kinds_of(cell, int(layers or 1)) if kind in NODES]
        assert found == [expected, expected]
