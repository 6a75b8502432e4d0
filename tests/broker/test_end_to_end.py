"""Goal: as in `scenario`, over slices of real data that travel with the code, so that a clone alone can be tested."""

from __future__ import annotations

import uuid
from pathlib import Path

from statestep.consumers.tables import load_streams

from . import scenario

DATA = Path(__file__).resolve().parents[1] / "data"


def test_application_servers_survive_join_leave_and_kill(bootstrap_servers: str, tmp_path: Path) -> None:
    """19 features, 4 partitions: bit-equal to offline, torch within 1e-5, none missing, doubles identical."""
    streams, features = scenario.asd(DATA)
    assert len(features) == 19
    result = scenario.play(bootstrap_servers, streams, features, tmp_path, f"asd-{uuid.uuid4().hex[:8]}")
    assert result.messages == sum(len(x) for x in streams.values())
    assert result.sigterm_seconds < 10


def test_machine_temperature_beside_it(bootstrap_servers: str, tmp_path: Path) -> None:
    """One stream on a topic, model and group of its own."""
    path = DATA / "machine_temperature.csv"
    streams, _ = load_streams(str(path), ["value"])
    result = scenario.play(bootstrap_servers, streams, ("value",), tmp_path, f"nab-{uuid.uuid4().hex[:8]}")
    assert result.messages == 600
