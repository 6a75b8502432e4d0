"""Goal: whatever breaks, a reader of committed records cannot tell: one fault of each kind on a real cluster."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from .chaos import play, table
from .cluster import Cluster
from .faults import KINDS, plan

SEED = 20
CLIENTS = ["kafka-python", "librdkafka"]


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for both clients."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.mark.parametrize("client", CLIENTS)
def test_faults_of_each_kind_leave_no_trace(cluster: Cluster, tmp_path: Path, client: str) -> None:
    """Each message is answered once, in order, to the last bit, though services and brokers come and go.

    The clients share the kinds of fault between them.
    """
    kinds = plan(len(KINDS), random.Random(SEED))[CLIENTS.index(client) :: len(CLIENTS)]
    report = play(tmp_path, cluster, kinds, seed=SEED, app_id=f"chaos-{client}", client=client, say=print)
    print(table(report))
    assert not report.failure, f"seed {SEED}: {report.failure}"
    assert [fault.kind for fault in report.faults] == kinds
    assert report.verdict.messages > 0
