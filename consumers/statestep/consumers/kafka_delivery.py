"""How records are sent through a kafka-python producer, and what became of them: every one is there, or an error.

What is known of kafka-python 3.0.12 and kept in mind here:
- `flush` says nothing of batches that failed: every future is looked at;
- an error of a transaction comes as what it is, inside of another, or as its text: `judge` knows all three;
- its sender forgets a transaction's request whose coordinator cannot be reached, since `await_ready` raises where False
  is expected; who waits for the answer waits for ever. So it is made to say False, and the sender looks for another;
- `close` flushes first, and so does not close a producer that has something to flush: its sender is told directly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from kafka.errors import (
    FencedInstanceIdError,
    InvalidProducerEpochError,
    InvalidRecordError,
    InvalidTimestampError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    ProducerFencedError,
    RecordListTooLargeError,
)

from statestep.consumers.kafka_client import FORBIDDEN, REAL, Clients, Properties, connect
from statestep.consumers.kafka_topics import STATE_RECORD_BYTES
from statestep.consumers.ports import BrokerError, Fenced, Message, Rejected, Undecided

TRANSACTION_TIMEOUT_MS = 10_000
CONNECT_MS = 5_000  # how long a producer may look for a broker
BLOCK_MS = 8_000  # and then wait for the transaction's coordinator, or for what is known of a topic
CLOSE_S = 3.0
ABANDON_S = 0.5
AGAIN_MS = 50  # before a coordinator that could not be reached is looked for again
BATCH_BYTES = 256 * 1024
REQUEST_BYTES = STATE_RECORD_BYTES  # of the largest message; the topic's own limit still holds

REFUSED = (MessageSizeTooLargeError, RecordListTooLargeError, InvalidRecordError, InvalidTimestampError)
FENCED = (ProducerFencedError, InvalidProducerEpochError)


class Outgoing(NamedTuple):
    """A record as the client takes it, and what it is called where it is refused."""

    kind: Literal["output", "dead letter", "event", "state"]
    topic: str
    partition: int | None
    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]]
    timestamp_ms: int | None


class Route(NamedTuple):
    """Where messages go: to the record's partition number in a topic that is cut like the input, else by their key."""

    output: str
    dead_letters: str
    aligned: frozenset[str]  # topics with as many partitions as the input
    events: str | None = None

    @classmethod
    def between(
        cls, topic: str, output: str, dead_letters: str, events: str | None, partitions: Mapping[str, int]
    ) -> Route:
        """From a topic to others, of which `partitions` has the number of partitions.

        >>> Route.between("in", "out", "dead", None, {"in": 3, "out": 3, "dead": 1}).aligned
        frozenset({'out'})
        """
        aligned = {
            name for name in (output, dead_letters, events) if name and partitions.get(name) == partitions[topic]
        }
        return cls(output, dead_letters, frozenset(aligned), events)

    def place(self, m: Message) -> tuple[str, int | None]:
        """A message's topic and partition; None where its key decides."""
        topic = self.dead_letters if m.dead else self.output
        if m.event:
            assert self.events is not None, "events are made only where there is a topic for them"
            topic = self.events
        return topic, m.partition if topic in self.aligned else None

    def outgoing(self, messages: Iterable[Message]) -> Iterable[Outgoing]:
        """Messages as the client takes them."""
        for m in messages:
            topic, partition = self.place(m)
            # kafka-python sends nothing that has neither key nor value; a dead letter without both is still one.
            value = b"" if m.key is None and m.value is None else m.value
            kind: Literal["output", "dead letter", "event"] = (
                "dead letter" if m.dead else "event" if m.event else "output"
            )
            yield Outgoing(kind, topic, partition, m.key, value, list(m.headers), m.timestamp_ms)


class KafkaWriter:
    """Messages to all topics without a transaction: acknowledged by all in-sync replicas, or an error."""

    def __init__(self, client_id: str, properties: Properties, route: Route, clients: Clients = REAL):
        self._route = route
        self.producer = open_producer(clients, properties, TRANSACTION_TIMEOUT_MS, client_id=client_id)

    def write(self, messages: Sequence[Message]) -> None:
        """Send messages and wait until they are there. Raises `Undecided`, `Rejected` or `BrokerError`."""
        if messages:
            deliver(self.producer, self._route.outgoing(messages), TRANSACTION_TIMEOUT_MS / 1000, instance_id=None)

    def close(self) -> None:
        """Let go; what was written is acknowledged."""
        with suppress(KafkaError):
            self.producer.close(timeout=CLOSE_S)


def deliver(producer: Any, outgoing: Iterable[Outgoing], timeout_s: float, instance_id: str | None) -> list[Any]:
    """Send records in order, wait, and look at every future; gives the futures, all of which succeeded.

    Raises what `judge` makes of the first failure that tells most.
    """
    sent: list[tuple[Outgoing, Any]] = []
    for item in outgoing:
        try:
            future = producer.send(
                item.topic,
                value=item.value,
                key=item.key,
                headers=item.headers,
                partition=item.partition,
                timestamp_ms=item.timestamp_ms,
            )
        except KafkaError as error:
            raise judge(error, f"sending {_named(item)} failed", instance_id) from None
        except ValueError as error:  # the topic's partitions are not what they were
            raise Undecided(f"sending {_named(item)} failed: {error}") from None
        sent.append((item, future))
    try:
        producer.flush(timeout=timeout_s)
    except KafkaError as error:
        raise judge(error, "waiting for acknowledgements failed", instance_id) from None
    failed = [(item, future) for item, future in sent if not future.succeeded()]
    if failed:
        what = f"{len(failed)} of {len(sent)} records were not acknowledged, among them"
        verdicts = [
            judge(future.exception or KafkaError("no answer"), f"{what} {_named(item)}", instance_id)
            for item, future in failed
        ]
        telling = [v for v in verdicts if type(v) is not Undecided]
        raise (telling or verdicts)[0]
    return [future for _, future in sent]


def judge(error: BaseException, what: str, instance_id: str | None) -> Exception:
    """What an error of a transaction means; the causes that kafka-python wraps, or only quotes, count too.

    >>> judge(MessageSizeTooLargeError("9 MB"), "sending an output failed", None)
    Rejected('sending an output failed: [Error 10] MessageSizeTooLargeError: 9 MB')
    >>> judge(KafkaError("in an error state: [Error 90] ProducerFencedError"), "it failed", "a")
    Fenced('it failed: KafkaError: in an error state: [Error 90] ProducerFencedError')
    """
    sentence = f"{what}: {error}"
    causes = [error, *(cause for cause in error.args if isinstance(cause, BaseException))]

    def is_any(kinds: tuple[type, ...]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes) or any(kind.__name__ in str(error) for kind in kinds)

    if is_any(REFUSED):
        return Rejected(sentence)
    if is_any((FencedInstanceIdError,)):
        return Fenced(sentence)
    if is_any(FENCED):  # by a successor or, what looks the same, by the transaction's timeout
        return Fenced(sentence) if instance_id is not None else Undecided(sentence)
    if is_any(FORBIDDEN) or "AuthorizationFailed" in str(error):
        return BrokerError(sentence)
    return Undecided(sentence)


def abandon(producer: Any) -> bool:
    """Close a producer without sending what it still holds; False where its sender did not end yet."""
    sender = getattr(producer, "_sender", None)
    if sender is not None:
        sender.force_close()
        sender.join(ABANDON_S)
        if sender.is_alive():
            return False
    with suppress(KafkaError):
        producer.close(timeout=0)
    return True


def _named(item: Outgoing) -> str:
    key = None if item.key is None else item.key[:64]
    partition = "" if item.partition is None else f" of partition {item.partition}"
    return f"the {item.kind}{partition} with the key {key!r} ({len(item.value or b'')} bytes)"


def open_producer(clients: Clients, properties: Properties, time_ms: int, /, **ours: Any) -> Any:
    """An idempotent producer whose tries to send end before the time of a transaction, `time_ms`, is up.

    What must fit each other and that time is not a user's to set. Raises `BrokerError` where no broker answers.
    """
    own = {
        "request_timeout_ms": time_ms * 4 // 10,
        "delivery_timeout_ms": time_ms * 7 // 10,
        "max_block_ms": BLOCK_MS,
        "bootstrap_timeout_ms": CONNECT_MS,
        "retry_backoff_ms": 20,  # so long the client waits each time that the last commit is not yet complete
        "linger_ms": 50,  # until the flush, which comes sooner
        "retries": float("inf"),
        "max_in_flight_requests_per_connection": 5,
    }
    properties = {name: value for name, value in properties.items() if name not in own}
    producer = connect(
        clients.producer,
        properties,
        **own,
        **ours,
        acks="all",
        enable_idempotence=True,
        allow_auto_create_topics=False,
        batch_size=BATCH_BYTES,
        max_request_size=REQUEST_BYTES,
    )
    _keep_requests(producer)
    return producer


def _keep_requests(producer: Any) -> None:
    """Let the sender keep a request whose coordinator it cannot reach, and look for the coordinator again."""
    client = getattr(getattr(producer, "_sender", None), "_client", None)
    if client is None:
        return
    ready = client.await_ready

    def await_ready(node: Any, timeout_ms: float = CONNECT_MS) -> bool:
        try:
            return bool(ready(node, timeout_ms=timeout_ms))
        except KafkaConnectionError:
            client.poll(timeout_ms=AGAIN_MS)
            return False

    client.await_ready = await_ready
