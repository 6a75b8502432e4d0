"""A real Kafka cluster of three nodes on this machine, each broker and controller at once, to be broken on purpose.

Everything has three copies and needs two, as on a well-kept cluster, so any one node may go and nothing may be lost.
`with Cluster(folder) as cluster:` starts it and, at the end, kills it.
"""

from __future__ import annotations

import random
import signal
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kafka import KafkaAdminClient, TopicPartition
from kafka.errors import KafkaError

from .kafka_server import KafkaServer, KafkaServerError, as_properties, server_settings
from .service_process import wait_until

NODES = 3
OFFSETS, TRANSACTIONS = "__consumer_offsets", "__transaction_state"
# Below the ports that Linux hands out by itself: a client that tries again and again to reach a node that is down
# would be given the node's own port one day, and be connected to itself.
PORTS = range(15_000, 32_000)
PREFERRED = 0  # the kind of election in which the first replica in the list leads


class Node(KafkaServer):
    """One of the nodes; it knows the others by their controllers' ports."""

    def __init__(self, data: Path, number: int, port: int, controller_ports: Sequence[int]) -> None:
        super().__init__(data, port)
        self.number = number
        self._controller_ports = controller_ports

    def properties(self) -> str:
        """As those of a single broker, with three replicas of which two must acknowledge."""
        ports = self._controller_ports
        voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in enumerate(ports, 1))
        settings = server_settings(self.data / "log", self.port, ports[self.number - 1])
        settings |= {
            "node.id": self.number,
            "controller.quorum.voters": voters,
            "default.replication.factor": NODES,
            "min.insync.replicas": NODES - 1,
            "offsets.topic.replication.factor": NODES,
            "transaction.state.log.replication.factor": NODES,
            "transaction.state.log.min.isr": NODES - 1,
            # A follower that is paused must fall out of the replicas in sync, or every write waits for it: 30 s.
            "replica.lag.time.max.ms": 5000,
            # Leaders move when a test says so, and at no other time.
            "auto.leader.rebalance.enable": "false",
        }
        return as_properties(settings)

    def pause(self) -> None:
        """SIGSTOP: its connections stay open, and nothing is answered."""
        assert self.process is not None, f"node {self.number} does not run"
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process is not None, f"node {self.number} does not run"
        self.process.send_signal(signal.SIGCONT)


class Cluster:
    """The three nodes, numbered from 1, and what an operator does to them."""

    def __init__(self, folder: Path) -> None:
        ports = free_ports(2 * NODES)
        controllers = ports[NODES:]
        self.nodes = [Node(folder / f"node-{n}", n, ports[n - 1], controllers) for n in range(1, NODES + 1)]

    @property
    def bootstrap_servers(self) -> str:
        """All nodes, as Kafka clients take them."""
        return ",".join(node.bootstrap_servers for node in self.nodes)

    def node(self, number: int) -> Node:
        """A node by its number."""
        return self.nodes[number - 1]

    def start(self) -> None:
        """Start all nodes at once, for none answers alone, and return once they are whole."""
        for node in self.nodes:
            node.begin()
        for node in self.nodes:
            node.wait_until_it_answers()
        self.wait_until_whole()

    def kill(self) -> None:
        """End all nodes as a power cut would."""
        for node in self.nodes:
            node.kill()

    def restart(self, number: int) -> None:
        """Start a node that is down, and return once it has caught up."""
        self.node(number).start()
        self.wait_until_whole()

    def rolling_restart(self) -> None:
        """Shut each node down in order and start it again, the next once it has caught up."""
        for node in self.nodes:
            node.stop()
            self.restart(node.number)

    def admin(self) -> KafkaAdminClient:
        """A client for administration, to be closed."""
        return KafkaAdminClient(
            bootstrap_servers=self.bootstrap_servers, bootstrap_timeout_ms=20_000, request_timeout_ms=6000
        )

    def wait_until_whole(self, seconds: float = 60) -> None:
        """Return once every node is there and every partition has all its replicas in sync."""
        state = "nobody answers"

        def whole() -> bool:
            nonlocal state
            try:
                with self.admin() as admin:
                    brokers = [broker["broker_id"] for broker in admin.describe_cluster()["brokers"]]
                    topics = admin.describe_topics(None)
            except KafkaError as error:
                state = repr(error)
                return False
            behind = [
                f"{topic['name']}-{partition['partition_index']}"
                for topic in topics
                for partition in topic["partitions"]
                if partition["leader_id"] < 0 or len(partition["isr_nodes"]) < len(partition["replica_nodes"])
            ]
            state = f"brokers {sorted(brokers)}, replicas missing of {behind[:5]}"
            return len(brokers) == NODES and not behind

        try:
            wait_until(whole, "the cluster to be whole", seconds)
        except AssertionError as error:
            raise KafkaServerError(f"{error}; {state}.") from None

    def topics(self) -> list[str]:
        """The names of all topics."""
        with self.admin() as admin:
            return [topic["name"] for topic in admin.describe_topics(None)]

    def leaders(self, topic: str) -> dict[int, int]:
        """The number of the node that leads each partition; no partition has -1 but one without a leader."""
        with self.admin() as admin:
            return {p["partition_index"]: p["leader_id"] for p in partitions_of(admin, topic)}

    def coordinator(self, name: str, topic: str = OFFSETS) -> int:
        """The node that coordinates a group, or under `TRANSACTIONS` a transactional id."""
        leaders = self.leaders(topic)
        return leaders[java_hash(name) % len(leaders)]

    def move_leaders(self, topics: Iterable[str]) -> int:
        """Let another replica lead each partition of `topics`, none of which need be down; gives how many moved."""
        moved = 0
        with self.admin() as admin:
            for topic in topics:
                found = partitions_of(admin, topic)
                if not found:  # an internal topic that nobody has needed yet
                    continue
                orders = {
                    TopicPartition(topic, p["partition_index"]): rotated(p["replica_nodes"], p["leader_id"])
                    for p in found
                }
                admin.alter_partition_reassignments(orders)  # the same replicas in another order: no data moves
                admin.elect_leaders(PREFERRED, {topic: [tp.partition for tp in orders]}, raise_errors=False)
                before = {p["partition_index"]: p["leader_id"] for p in found}
                moved += sum(p["leader_id"] != before[p["partition_index"]] for p in partitions_of(admin, topic))
        return moved

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def partitions_of(admin: KafkaAdminClient, topic: str) -> list[dict[str, Any]]:
    """What the cluster says of a topic's partitions; none where there is no such topic."""
    return [partition for found in admin.describe_topics([topic]) for partition in found["partitions"]]


def rotated(replicas: Sequence[int], leader: int) -> list[int]:
    """The replicas in an order whose first is not the leader.

    >>> rotated([1, 2, 3], 1), rotated([2, 3, 1], 3), rotated([2, 3, 1], -1)
    ([2, 3, 1], [1, 2, 3], [2, 3, 1])
    """
    place = replicas.index(leader) + 1 if leader in replicas else 0
    return [*replicas[place:], *replicas[:place]]


def java_hash(text: str) -> int:
    """Java's `String.hashCode` without its sign, by which Kafka finds a coordinator's partition.

    >>> java_hash("statestep") == java_hash("statestep") & 0x7FFFFFFF
    True
    >>> java_hash("ab")
    3105
    """
    value = 0
    for unit in text:
        value = (31 * value + ord(unit)) & 0xFFFFFFFF
    return value & 0x7FFFFFFF


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on just now, out of `PORTS`."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise KafkaServerError(f"no {count} ports of {PORTS} are free.")
