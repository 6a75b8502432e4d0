"""The simulated cluster and clients behave as the real ones: the same scenarios, and faults that only they can make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .clients import Clients
from .cluster import Cluster
from .scenarios import SCENARIOS, Bench, Member
from .world import Process, World


class SimulatedBench:
    """Simulated clients and time, within one process."""

    def __init__(self, seed: int):
        self.world = World(seed)
        self.cluster = Cluster(self.world)
        self.clients = Clients(self.world, self.cluster)
        self._names = 0
        self._processes: dict[Member, Process] = {}

    def consumer(self, **config: Any) -> Any:
        return self.clients.KafkaConsumer(**config)

    def producer(self, **config: Any) -> Any:
        return self.clients.KafkaProducer(**config)

    def admin(self) -> Any:
        return self.clients.KafkaAdminClient()

    def topic(self, partitions: int = 1, **configs: str) -> str:
        name = self.name("topic")
        self.cluster.create(name, partitions, {key.replace("_", "."): value for key, value in configs.items()})
        return name

    def name(self, what: str) -> str:
        self._names += 1
        return f"{what}-{self._names}"

    def sleep(self, seconds: float) -> None:
        self.world.sleep(seconds)

    def wall_ms(self) -> int:
        return self.world.wall_ms()

    def start(self, member: Member, live: Callable[[], None]) -> None:
        self._processes[member] = self.world.spawn(self.name("member"), live)

    def vanish(self, member: Member) -> None:
        self.world.kill(self._processes[member])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("check", SCENARIOS, ids=lambda check: check.__name__)
def test_the_simulation_behaves(check: Callable[[Bench], None], seed: int) -> None:
    """Each scenario holds over the simulation, under any chance."""
    bench = SimulatedBench(seed)
    bench.world.call(lambda: check(bench))
