"""What all tests share: libraries with one thread, Hypothesis's examples, and which process runs which file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

# Read when torch and numpy are imported, here and in children: of matrices as small as these two threads take ten times
# as long as one, and the other cores have tests of their own.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# Derandomised, so that a failure here is the same failure on the next machine; deadlines would test the machine.
settings.register_profile("statestep", derandomize=True, deadline=None, database=None, print_blob=True)
settings.load_profile("statestep")

# What takes longest begins first under `-n`, so that no process works on alone while the others have nothing left.
LONG = (
    "tests/laws/test_matrix",
    "tests/export/test_conver",
    "tests/simulation",
    "tests/broker",
    "tests/runtime/test_fuzz",
)
SHARING = "test_conver"  # how files begin whose tests share what they convert


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """A command's log goes to a stderr that is closed after its test: nothing else may be written to it."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    root.handlers[:] = before


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # xdist ships no types
    """The tests of a file go to one process, where their fixtures are made once."""

    def _split_scope(self, nodeid: str) -> str:
        path = PurePosixPath(nodeid.partition("::")[0])
        return str(path.parent / SHARING) if path.name.startswith(SHARING) else str(path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    """How tests are dealt out under `-n`; without it they run in one process, in order."""
    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a process of several, what is long comes first."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not item.nodeid.startswith(LONG))
