"""Topics at the first start of an application, when all of its processes find that they are missing."""

from __future__ import annotations

from typing import Any

import pytest

from statestep.consumers.kafka_client import Clients as KafkaClients
from statestep.consumers.kafka_topics import SETTLED_S, prepare_topics
from statestep.consumers.ports import BrokerError

from .clients import Clients
from .cluster import Cluster
from .world import World


@pytest.mark.parametrize("late_s", [0.0, SETTLED_S - 1.0, SETTLED_S + 1.0])
@pytest.mark.parametrize(("unknown", "sentence"), [("policy", r"cleanup\.policy=delete"), ("name", "went away")])
def test_a_topic_that_was_just_made_may_not_be_known_whole(late_s: float, unknown: str, sentence: str) -> None:
    """A node that tells its defaults yet, or nothing, is asked again for a moment; what stays wrong is refused."""
    world = World(1)
    cluster = Cluster(world)
    cluster.create("in", 2)
    simulated = Clients(world, cluster)

    class Admin(simulated.KafkaAdminClient):  # type: ignore[misc,name-defined]
        def describe_topics(self, *what: Any, **how: Any) -> Any:
            found = super().describe_topics(*what, **how)
            away = unknown == "name" and world.now < late_s
            return [item for item in found if not (away and item["name"] == "app-state-changelog")]

        def describe_configs(self, *what: Any, **how: Any) -> Any:
            found = super().describe_configs(*what, **how)
            if unknown == "policy" and world.now < late_s:
                for entries in found["topic"].values():
                    entries["cleanup.policy"] = {"value": "delete"}
            return found

    clients = KafkaClients(
        simulated.KafkaConsumer, simulated.KafkaProducer, Admin, world.clock, world.sleep, world.within
    )

    def prepare() -> dict[str, int]:
        return prepare_topics({"bootstrap_servers": ["simulated"]}, "app", "in", ["out"], create=True, clients=clients)

    if late_s > SETTLED_S:
        with pytest.raises(BrokerError, match=sentence):
            world.call(prepare)
    else:
        assert world.call(prepare) == {"in": 2, "out": 2, "app-state-changelog": 2}
        assert world.now >= late_s
