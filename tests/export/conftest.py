"""What the tests of convert share: every graph is converted once in a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest

from .conversions import Case, Outcome, outcome_of
from .registry import one_registry

__all__ = ["one_registry"]


@contextmanager
def shortened() -> Iterator[None]:
    """Conversions without what takes long and is tested where it belongs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(import_module("statestep.export.verify"), "SPEED_SECONDS", 1e-4)
        patch.setattr(import_module("statestep.export.verify"), "COMPANY_STEPS", 2)
        patch.setattr(import_module("statestep.export.verify"), "COMPANY", (2, 7, 33))  # whose last are so many streams
        patch.setattr(import_module("statestep.export.horizon"), "MOST", 256)
        yield


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Conversions are shortened in one file of tests, and no further."""
    with shortened():
        yield


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Outcome]:
    """What became of a case, by a call."""
    seen: dict[str, Outcome] = {}

    def of(case: Case) -> Outcome:
        if case.name not in seen:
            with shortened():
                seen[case.name] = outcome_of(case, tmp_path_factory.mktemp(case.name))
        return seen[case.name]

    return of
