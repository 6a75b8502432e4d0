"""What the tests of deploy/ share: the folders, and the metrics that the service really has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from statestep.consumers.batch import Tally
from statestep.consumers.metrics import Metrics

from ..consumers.judging import judge

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def deploy(root: Path) -> Path:
    """The folder under test."""
    return root / "deploy"


@pytest.fixture
def metrics() -> Metrics:
    """The service's metrics in a registry of their own, with the series that a running service has."""
    made = Metrics(CollectorRegistry(), topic="sensors", model="pump")
    made.model_info.info({"model": "pump", "version": "1", "sha256": "0123456789ab"})
    made.partition(0)
    made.expect(judge().contract)
    made.judged(Tally(), np.full((1, 2), 0.1), np.full(1, 0.1))
    return made


@pytest.fixture
def known_series(metrics: Metrics) -> dict[str, set[str]]:
    """The service's series, each with its labels and those that a scrape adds."""
    known = {"up": {"job", "instance"}}
    for family in metrics.registry.collect():
        for sample in family.samples:
            known[sample.name] = {"job", "instance", *sample.labels}
    return known
