"""All laws on a model's file, made ready for a test suite: by name, each a call without arguments.

    @pytest.mark.parametrize("law", laws_of("pump.onnx"), ids=str)
    def test_law(law):
        law()

No torch is needed; where it is installed and the weights lie beside the model, it is one more reference.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from statestep.export import laws
from statestep.export.against import SequenceFile, sequence_path
from statestep.export.compare import TOLERANCE, Array
from statestep.export.laws import LawBroken, Reference, name_of
from statestep.export.readings import drawn, finite_rows
from statestep.runtime import StepModel

SHAPES = ((1, 1), (2, 7), (50, 2), (24, 64))  # (T, B) of the drawn readings, the last the largest
COMPANY_SHAPE = (6, 257)
ORDER_SHAPE = (25, 33)
DATA_STEPS = 2_000  # timesteps of given readings that are stepped, over all streams


class Readings(NamedTuple):
    """What a model is stepped over: sequences [T, B, F] that were drawn, and streams [T, 1, F] that were given."""

    made: Sequence[Array]
    given: Sequence[Array]

    def with_spread(self) -> Iterator[tuple[Array, Array]]:
        """Each of them, and what tells the spread of its kind: one by itself may be a single row."""
        yield from ((x, self.made[-1]) for x in self.made)
        if self.given:
            whole = np.concatenate(self.given)  # [T, 1, F]
            yield from ((x, whole) for x in self.given)


@dataclass(frozen=True, slots=True)
class Law:
    """A law on one model, to be called. Its string is its name."""

    name: str
    check: Callable[[], None]

    def __call__(self) -> None:
        """Return in silence, or raise `LawBroken`."""
        self.check()

    def __str__(self) -> str:
        return self.name


def laws_of(
    path: str | Path,
    data: Mapping[str, Array] | None = None,
    *,
    sequence: bool = True,
    tolerance: float | None = None,
    seed: int = 0,
) -> list[Law]:
    """Every law on the step model at `path`, on readings drawn from `seed` and on `data` (stream → readings [T, F]).

    `sequence=False` leaves out the sequence file, of a model that never had one; otherwise its absence breaks the law.
    `tolerance` is that of streaming against it: by default none, or 1e-5 where the file holds an operator that is
    known to round.

    Raises `ModelError` for a file that is no step model and `DataError` for data of another shape.

    >>> from importlib.resources import files
    >>> for law in laws_of(files("statestep.consumers") / "models" / "pump.onnx"):
    ...     law()
    ...     print(law)
    outputs are finite
    streaming is offline
    company does not matter
    order does not matter
    cuts do not matter
    rollback is an identity
    restored goes on
    """
    path = Path(path)
    model, rng = StepModel.load(path), np.random.default_rng(seed)
    streams = list(finite_rows(model.contract, data).values())
    share = -(-DATA_STEPS // max(len(streams), 1))
    readings = Readings([drawn(model.contract, *shape, rng) for shape in SHAPES], [x[:share, None] for x in streams])
    many, some = (drawn(model.contract, *shape, rng) for shape in (COMPANY_SHAPE, ORDER_SHAPE))  # [T, B, F] each
    found = [_law(laws.outputs_are_finite, partial(_finite, model, readings))]
    if sequence:
        offline = partial(_offline, model, sequence_path(path), readings, tolerance)
        found.append(_law(laws.streaming_is_offline, offline))
    found += [
        _law(laws.company_does_not_matter, partial(laws.company_does_not_matter, model, many, seed=seed)),
        _law(laws.order_does_not_matter, partial(laws.order_does_not_matter, model, some, seed=seed)),
        _law(laws.cuts_do_not_matter, partial(laws.cuts_do_not_matter, model, some)),
        _law(laws.rollback_is_an_identity, partial(laws.rollback_is_an_identity, model, some, seed=seed)),
        _law(laws.restored_goes_on, partial(laws.restored_goes_on, model, some, fresh=StepModel.load(path))),
    ]
    if reference := torch_beside(path):
        found.append(_law(laws.agrees_with, partial(_agrees, model, reference, readings), " torch"))
    return found


def check_model(path: str | Path, data: Mapping[str, Array] | None = None, **settings: Any) -> None:
    """Call every law of `laws_of`, which takes the same arguments; the first that does not hold raises `LawBroken`.

    >>> from importlib.resources import files
    >>> check_model(files("statestep.consumers") / "models" / "pump.onnx", seed=3)
    """
    for law in laws_of(path, data, **settings):
        law()


def torch_beside(path: Path) -> Reference | None:
    """The torch model whose weights lie beside a step model; None where there are none, or torch is not installed."""
    weights = path.with_suffix(".pt")
    if not weights.exists() or importlib.util.find_spec("torch") is None:
        return None
    from statestep.export.weights import load, reference_of

    return reference_of(load(weights))


def _law(law: Callable[..., None], check: Callable[[], None], of: str = "") -> Law:
    return Law(name_of(law) + of, check)


def _finite(model: StepModel, readings: Readings) -> None:
    for x, _ in readings.with_spread():
        laws.outputs_are_finite(model, x)


def _agrees(model: StepModel, reference: Reference, readings: Readings) -> None:
    for x, spread_of in readings.with_spread():
        laws.agrees_with(model, reference, x, spread_of=spread_of)


def _offline(model: StepModel, path: Path, readings: Readings, tolerance: float | None) -> None:
    """Against the sequence file, on those readings that are of a size that it takes, and on some that surely are."""
    if not path.exists():
        raise LawBroken(laws.streaming_is_offline, f"there is no sequence file {path.name!r} beside the model")
    file = SequenceFile.load(path)
    if tolerance is None:
        tolerance = TOLERANCE if file.rounds else 0.0
    sure = drawn(model.contract, file.steps or 20, file.streams or 2, np.random.default_rng(0))
    for x, spread_of in (*readings.with_spread(), (sure, sure)):
        if file.fits(x):
            laws.streaming_is_offline(model, file, x, tolerance, spread_of=spread_of)
