"""Kafka as a sink, through librdkafka: transactions of outputs, dead letters, events, states and offsets.

What is known of librdkafka 2.16 and kept in mind here:
- it refuses by itself to commit a transaction of which a message failed, and then tells why the first one did; a
  record's own report is asked for only where its offset is of use, and outside of transactions, if it failed;
- sending offsets may not come back where the group's coordinator goes away meanwhile, whatever its timeout: a call that
  is stuck is left behind with its producer, which the next one fences; one such is forgiven, for it holds some memory;
- a commit or an init that timed out may still be going on: a producer that failed is never used again;
- `close` would abort, flush and wait: a producer is let go of by forgetting it, which takes no time at all;
- it does not know KIP-890, so that a late answer to a slow commit could end the next transaction in its place: after a
  slow one the producer is replaced too.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer, TopicPartition

from statestep.consumers.kafka_client import REAL, Clients, Properties
from statestep.consumers.kafka_delivery import BATCH_BYTES, BLOCK_MS, REQUEST_BYTES, TRANSACTION_TIMEOUT_MS, Route
from statestep.consumers.kafka_sink import Guarantee
from statestep.consumers.kafka_topics import changelog_topic
from statestep.consumers.librdkafka_client import FORBIDDEN, RAISED, code_of, connect, error_of, says
from statestep.consumers.ports import (
    Blocked,
    BrokerError,
    Fenced,
    Message,
    Rejected,
    Transaction,
    Undecided,
)

FULL_S = 0.05  # how long room in the client's queue is waited for at a time
ASK_S = 1.0
SLACK_S = 3.0  # beyond the time that the calls of a commit share
ANY = -1  # a partition that the key decides

REFUSED = {
    KafkaError.MSG_SIZE_TOO_LARGE,
    KafkaError.RECORD_LIST_TOO_LARGE,
    KafkaError.INVALID_RECORD,
    KafkaError.INVALID_TIMESTAMP,
}
FENCED = {KafkaError._FENCED, KafkaError.PRODUCER_FENCED, KafkaError.INVALID_PRODUCER_EPOCH}


class LibrdkafkaSink:
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
        self._writer: Any = None  # of messages outside of transactions, which are not exactly once
        self._failures: list[Any] = []  # of the writer's messages
        self._tired = False  # whether the producer is to be replaced before it is used again
        self._stuck = False  # whether a call was left behind once

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
        began, producer, writer = self._clients.clock(), self._producer, self._writer
        try:
            positions: Mapping[int, int] = self._clients.within(
                self._timeout_ms / 1000 + SLACK_S, lambda: self._commit(producer, writer, transaction, membership)
            )
        except Blocked as error:
            self._abandon()
            if self._stuck:
                raise
            self._stuck = True
            raise Undecided(str(error)) from None
        except Exception:
            self._abandon()
            raise
        self._tired = self._clients.clock() - began > self._timeout_ms / 2000
        return positions

    def recover(self) -> None:
        """A producer with the same id: making it ends what the one before had begun, for good or not at all."""
        self._abandon()
        self._tired = False
        self._producer = self._clients.within(2 * BLOCK_MS / 1000, self._open)
        if not self._exactly_once:
            self._failures = []
            self._writer = self._connect({"on_delivery": self._reported, "delivery.report.only.error": True})

    def close(self) -> None:
        """Let go. Nothing is open after a commit that returned; after one that failed, the broker will abort it."""
        self._abandon()

    def _commit(self, producer: Any, writer: Any, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        """1. outputs, 2. states, 3. wait until all are there, 4. offsets, 5. commit."""
        until_s = self._clients.clock() + self._timeout_ms / 1000  # of all calls together: then the broker aborts it
        last = {state.partition: number for number, state in enumerate(transaction.states)}
        reports: dict[int, tuple[Any, int]] = {}  # of each partition's last state: an error or None, and the offset

        def left_s() -> float:
            return max(until_s - self._clients.clock(), FULL_S)

        def reported(error: Any, message: Any) -> None:
            reports[message.partition()] = (error, message.offset())

        try:
            if writer is not None:
                self._send(writer, transaction.messages, until_s)
                self._flush(writer, left_s())
                if self._failures:
                    raise self._judge(self._failures[0], f"{len(self._failures)} messages were not acknowledged")
            producer.begin_transaction()
            if writer is None:
                self._send(producer, transaction.messages, until_s)
            for number, (partition, key, value, _) in enumerate(transaction.states):
                then = {"on_delivery": reported} if last[partition] == number else {}
                self._produce(producer, until_s, self._changelog, value, key, partition, **then)
            self._flush(producer, left_s())
            failed = [error for error, _ in reports.values() if error is not None]
            if failed or len(reports) < len(last):
                raise self._judge(failed[0] if failed else TimeoutError("no report"), "a state was not acknowledged")
            offsets = [TopicPartition(self._topic, p, c.offset, c.metadata) for p, c in transaction.offsets.items()]
            producer.send_offsets_to_transaction(offsets, membership, left_s())
            if producer is not self._producer:
                raise Undecided("the transaction was given up while its offsets were on their way")
            producer.commit_transaction(left_s())
        except RAISED as raised:
            raise self._judge(_cause(producer, membership, raised), "the transaction failed") from None
        return {partition: offset + 1 for partition, (_, offset) in reports.items()}

    def _send(self, producer: Any, messages: Iterable[Message], until_s: float) -> None:
        """To the record's partition number in a topic that is cut like the input, else by the key."""
        for m in messages:
            how = {"headers": list(m.headers), "timestamp": m.timestamp_ms or 0}  # 0: now
            topic, partition = self._route.place(m)
            self._produce(producer, until_s, topic, m.value, m.key, ANY if partition is None else partition, **how)

    def _produce(
        self,
        producer: Any,
        until_s: float,
        topic: str,
        value: bytes | None,
        key: bytes | None,
        partition: int,
        **how: Any,
    ) -> None:
        """Hand one record to the client; while its queue is full, wait for room. Raises what the client does."""
        while True:
            try:
                producer.produce(topic, value, key, partition, **how)
                return
            except BufferError:
                if self._clients.clock() > until_s:
                    raise Undecided(f"the queue of the Kafka client stays full of messages to {topic!r}") from None
                producer.poll(FULL_S)
            except RAISED as raised:
                error = error_of(raised)
                if code_of(error) not in REFUSED:
                    raise
                where = f" partition {partition}" if partition != ANY else ""
                size = f"({len(value or b'')} bytes)"
                what = f"the record with the key {(key or b'')[:64]!r} {size} for {topic!r}{where} was refused"
                raise self._judge(error, what) from None

    def _flush(self, producer: Any, timeout_s: float) -> None:
        left = producer.flush(timeout_s)
        if left:
            raise Undecided(f"{left} messages were not acknowledged within {timeout_s:.1f} s")

    def _judge(self, error: Any, what: str) -> Exception:
        """What an error means."""
        code = code_of(error)
        sentence = f"{what}: {says(error)}"
        if code in REFUSED:
            return Rejected(sentence)
        if code == KafkaError.FENCED_INSTANCE_ID:
            return Fenced(sentence)
        if code in FENCED:  # by a successor or, what looks the same, by the transaction's timeout
            return Fenced(sentence) if self._instance_id is not None else Undecided(sentence)
        return BrokerError(sentence) if code in FORBIDDEN else Undecided(sentence)

    def _open(self) -> Any:
        """A producer whose transactional id is free of older ones. Raises `BrokerError` or `Fenced`."""
        own = {"transactional.id": self._id, "transaction.timeout.ms": self._timeout_ms}
        producer = self._connect(own)
        try:
            producer.init_transactions(BLOCK_MS / 1000)
        except RAISED as raised:
            verdict = self._judge(error_of(raised), "taking up the transactional id failed")
            raise (verdict if isinstance(verdict, Fenced) else BrokerError(str(verdict))) from None
        return producer

    def _connect(self, own: Mapping[str, Any]) -> Any:
        """An idempotent producer whose tries to send end before the time of a transaction is up.

        What must fit each other and that time is not a user's to set.
        """
        time_ms = self._timeout_ms
        ours = {
            "client.id": self._app_id,
            "acks": "all",
            "enable.idempotence": True,
            "socket.timeout.ms": time_ms * 4 // 10,
            "request.timeout.ms": time_ms * 4 // 10,
            "delivery.timeout.ms": time_ms * 7 // 10,
            "retry.backoff.ms": 20,
            "retries": 2**31 - 1,
            "max.in.flight": 5,
            "linger.ms": 50,  # until the flush, which comes sooner
            "batch.size": BATCH_BYTES,
            "message.max.bytes": REQUEST_BYTES,
            "partitioner": "murmur2_random",  # where other clients put a key
        }
        return connect(Producer, self._properties, {**ours, **own}, {})

    def _reported(self, error: Any, _: Any) -> None:
        self._failures.append(error)

    def _replace(self) -> None:
        try:
            self.recover()
        except (BrokerError, Blocked) as error:
            raise Undecided(f"the producer could not be replaced after a slow commit: {error}") from None

    def _abandon(self) -> None:
        """Never use these again. Nothing is waited for: what a transaction left open, recover ends."""
        self._producer = self._writer = None


def _cause(producer: Any, membership: Any, raised: Any) -> Any:
    """Why a transaction failed, where what was raised tells only that it has: to send no offsets asks the producer."""
    behind = raised.__cause__  # confluent-kafka raises a fatal error, and then calls back: Python complains of that
    error = error_of(behind if isinstance(raised, SystemError) and isinstance(behind, KafkaException) else raised)
    if code_of(error) in (None, KafkaError._STATE):
        try:
            producer.send_offsets_to_transaction([], membership, ASK_S)
        except RAISED as cause:
            return error_of(cause)
    return error
