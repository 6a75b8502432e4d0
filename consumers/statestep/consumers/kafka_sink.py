"""Kafka as a sink, through kafka-python: transactions of outputs, dead letters, events, states and offsets.

What is known of kafka-python 3.0.12 and kept in mind here:
- `commit_transaction` returns as if all were well though a batch was given up, or the transaction aborted, so all is
  flushed first, every future is looked at, and only then come offsets and commit;
- offsets of a transaction that failed go along with the next one, so a producer that failed is never used again;
- sending offsets and committing wait without end for a broker that is gone: a deadline is set from outside.

A late answer to a slow commit could end the next transaction in its place, since this client does not know KIP-890:
after a slow one the producer is replaced too.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

from kafka import TopicPartition
from kafka.errors import KafkaError
from kafka.structs import OffsetAndMetadata

from statestep.consumers.kafka_client import REAL, Clients, Properties
from statestep.consumers.kafka_delivery import (
    BLOCK_MS,
    CLOSE_S,
    CONNECT_MS,
    TRANSACTION_TIMEOUT_MS,
    KafkaWriter,
    Outgoing,
    Route,
    abandon,
    deliver,
    judge,
    open_producer,
)
from statestep.consumers.kafka_topics import changelog_topic
from statestep.consumers.ports import Blocked, BrokerError, Fenced, Transaction, Undecided

Guarantee = Literal["exactly-once", "at-least-once"]


class KafkaSink:
    """Commits transactions; a producer with a transactional id, which `recover` makes and makes anew."""

    def __init__(
        self,
        topic: str,
        app_id: str,
        properties: Properties,
        output: str,
        dead_letters: str,
        partitions: Mapping[str, int],
        *,
        events: str | None = None,
        instance_id: str | None = None,
        guarantee: Guarantee = "exactly-once",
        transaction_timeout_ms: int = TRANSACTION_TIMEOUT_MS,
        transactional_id: str | None = None,
        clients: Clients = REAL,
    ):
        """`topic` is the input, `partitions` the number of each topic's partitions; without `events` none are sent.

        The transactional id is made of the instance id, so that a successor ends at once what this one left open;
        without one it is random.
        """
        self._topic, self._app_id, self._properties = topic, app_id, properties
        self._changelog = changelog_topic(app_id)
        self._route = Route.between(topic, output, dead_letters, events, partitions)
        self._instance_id = instance_id
        self._id = transactional_id or f"{app_id}-{instance_id or uuid.uuid4().hex}"
        self._exactly_once = guarantee == "exactly-once"
        self._timeout_ms = transaction_timeout_ms
        self._clients = clients
        self._producer: Any = None
        self._writer: KafkaWriter | None = None
        self._tired = False  # whether the producer is to be replaced before it is used again
        self._abandoned: list[Any] = []

    @property
    def keeps_states(self) -> bool:
        """Always: in the changelog."""
        return True

    def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        """Everything is sent and seen to be there; then offsets and commit, both fenced by the membership."""
        if self._tired:
            self._replace()
        if self._producer is None:
            raise Undecided("the last transaction failed; recover comes before the next")
        began, producer = self._clients.clock(), self._producer
        try:
            positions: Mapping[int, int] = self._clients.within(
                2 * self._timeout_ms / 1000, lambda: self._commit(producer, transaction, membership)
            )
        except Exception:
            self._abandon()
            raise
        self._tired = self._clients.clock() - began > self._timeout_ms / 2000
        return positions

    def recover(self) -> None:
        """A producer with the same id: making it ends what the one before had begun, for good or not at all."""
        self._abandon()
        self._tired = False
        limit_s = 3 * (CONNECT_MS + BLOCK_MS) / 1000
        producer, self._writer = self._clients.within(limit_s, self._open)
        self._producer = producer

    def close(self) -> None:
        """Let go. Nothing is open after a commit that returned; after one that failed, the broker will abort it."""
        self._abandoned = [producer for producer in self._abandoned if not abandon(producer)]
        if self._writer is not None:
            self._writer.close()
        if self._producer is not None:
            with suppress(KafkaError):
                self._producer.close(timeout=CLOSE_S)
        self._producer = self._writer = None

    def _commit(self, producer: Any, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        """1. outputs, 2. states, 3. look at every acknowledgement, 4. offsets, 5. commit."""
        timeout_s = self._timeout_ms / 1000
        outgoing = list(self._route.outgoing(transaction.messages))
        if self._writer is not None:
            self._writer.write(transaction.messages)
            outgoing = []
        states = len(transaction.states)
        outgoing += [
            Outgoing("state", self._changelog, s.partition, s.key, s.value, [], None) for s in transaction.states
        ]
        offsets = {
            TopicPartition(self._topic, p): OffsetAndMetadata(c.offset, c.metadata, -1)
            for p, c in transaction.offsets.items()
        }
        try:
            producer.begin_transaction()
            futures = deliver(producer, outgoing, timeout_s, self._instance_id)
            producer.send_offsets_to_transaction(offsets, membership)
            if producer is not self._producer:
                raise Undecided("the transaction was given up while its offsets were on their way")
            producer.commit_transaction()
        except KafkaError as error:
            raise judge(error, "the transaction failed", self._instance_id) from None
        written = zip(transaction.states, futures[len(futures) - states :], strict=True)
        return {state.partition: future.value.offset + 1 for state, future in written}

    def _open(self) -> tuple[Any, KafkaWriter | None]:
        """A producer whose transactional id is free of older ones, and what writes outside of its transactions."""
        producer = open_producer(
            self._clients,
            self._properties,
            self._timeout_ms,
            client_id=self._app_id,
            transactional_id=self._id,
            transaction_timeout_ms=self._timeout_ms,
        )
        try:
            producer.init_transactions()
            if self._exactly_once:
                return producer, None
            return producer, KafkaWriter(self._app_id, self._properties, self._route, self._clients)
        except KafkaError as error:
            self._put_away(producer)
            verdict = judge(error, "taking up the transactional id failed", self._instance_id)
            raise (verdict if isinstance(verdict, Fenced) else BrokerError(str(verdict))) from None
        except BrokerError:
            self._put_away(producer)
            raise

    def _replace(self) -> None:
        try:
            self.recover()
        except (BrokerError, Blocked) as error:
            raise Undecided(f"the producer could not be replaced after a slow commit: {error}") from None

    def _abandon(self) -> None:
        """Never use this producer again, nor wait for it: to abort its transaction may block, and recover does it."""
        producer, writer = self._producer, self._writer
        self._producer = self._writer = None
        self._abandoned = [old for old in self._abandoned if not abandon(old)]
        for old in (producer, writer and writer.producer):
            if old is not None:
                self._put_away(old)

    def _put_away(self, producer: Any) -> None:
        if not abandon(producer):
            self._abandoned.append(producer)
