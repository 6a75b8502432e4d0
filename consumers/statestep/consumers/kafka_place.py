"""A static member's place in its group, and whether the group has an owner for every partition.

A cooperative rebalance takes two rounds: in the first a partition is given up, in the second it is given to another.
Kafka hands a static member that comes back what its place had last, without a round. So where it went between the
two, what it had given up is nobody's, and stays so for as long as nobody else comes or goes. Whoever has joined under
an instance id therefore looks at the group a while later. Where a partition has no owner, and had none at the look
before, the place is given up: the group deals all out anew, and the member joins again as any other does.
"""

from __future__ import annotations

import logging
from typing import Any

from kafka.admin import MemberToRemove
from kafka.errors import KafkaError

from statestep.consumers.kafka_client import Clients, Properties, connect
from statestep.consumers.ports import BrokerError

log = logging.getLogger("statestep")

LOOK_S = 5.0  # after a join, and between two looks: the second round of a rebalance has long been by then
ASK_MS = 5_000  # for an answer; a look can wait


class StaticPlace:
    """The place of one static member; of any other, which has no instance id, there is nothing to look for."""

    def __init__(
        self,
        topic: str,
        app_id: str,
        instance_id: str | None,
        properties: Properties,
        partitions: int,
        clients: Clients,
        look_s: float = LOOK_S,
    ):
        self._topic, self._app_id, self._instance_id = topic, app_id, instance_id
        self._properties, self._clients, self._look_s = properties, clients, look_s
        self._all = frozenset(range(partitions))
        self._seen: frozenset[int] = frozenset()  # without an owner at the last look
        self._due_s = float("inf")

    def joined(self) -> None:
        """The group was joined, for the first time or anew."""
        self._seen = frozenset()
        if self._instance_id is not None:
            self._due_s = self._clients.clock() + self._look_s

    def look(self) -> bool:
        """Look at the group if it is time to, for a member that its group knows; whether the place was given up.

        An error means a look later.
        """
        now_s = self._clients.clock()
        if now_s < self._due_s:
            return False
        self._due_s = now_s + self._look_s
        try:
            ownerless = self._ownerless()
            if ownerless is None:
                self._seen = frozenset()
                return False
            if ownerless & self._seen:
                log.warning(
                    "%s: partitions %s have no owner in the group %s: %s gives its place up and joins anew",
                    *(self._topic, sorted(ownerless), self._app_id, self._instance_id),
                )
                self._give_up()
                return True
        except (KafkaError, BrokerError) as error:
            log.warning("%s: looking whether each partition has an owner failed: %s", self._topic, error)
            return False
        self._seen = ownerless
        if not ownerless:
            self._due_s = float("inf")  # until the next join
        return False

    def _ownerless(self) -> frozenset[int] | None:
        """The partitions that are nobody's; None while the group is in the middle of a round."""
        with self._admin() as admin:
            found = admin.describe_groups([self._app_id])[self._app_id]
        if found["group_state"] != "Stable":
            return None
        owned = {
            partition
            for member in found["members"]
            for topic in (member["member_assignment"] or {}).get("assigned_partitions", [])
            if topic["topic"] == self._topic
            for partition in topic["partitions"]
        }
        return self._all - owned

    def _give_up(self) -> None:
        with self._admin() as admin:
            admin.remove_group_members(self._app_id, [MemberToRemove(group_instance_id=self._instance_id)])

    def _admin(self) -> Any:
        limits = {"bootstrap_timeout_ms": ASK_MS, "request_timeout_ms": ASK_MS}
        return connect(self._clients.admin, self._properties, client_id=self._app_id, **limits)
