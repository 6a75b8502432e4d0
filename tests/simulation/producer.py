"""KafkaProducer as kafka-python 3.0.12 has it, over the simulated cluster: its states, its errors and its traps.

Records go out when something waits for them, each partition's as one batch, or once they have lingered. The point
`producer.produce` knows faults of its own: `expired` and `expired-sent` (the batch is given up after
`delivery_timeout_ms`, and was not, or was, written: only its futures fail, the transaction may still be committed) and
`out-of-order` (the epoch is raised behind the caller's back and the broker aborts the transaction; a commit that
waited for the batch returns all the same). Offsets that a failed `send_offsets_to_transaction` left behind go out
with the next transaction.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from kafka.errors import (
    BrokerResponseError,
    IllegalStateError,
    InvalidProducerEpochError,
    InvalidRecordError,
    InvalidTxnStateError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumberError,
    ProducerFencedError,
    RetriableError,
)
from kafka.producer.future import RecordMetadata
from kafka.structs import TopicPartition

from .cluster import Cluster
from .log import NewRecord
from .transactions import TransactionalProducer
from .world import LATENCY_S, RETRY_S, Fault, NoAnswerError, SilenceError, World

T = TypeVar("T")
BUSY_S = 4.0  # for how long a sender may wait for something that nobody wants any more


class Sent:
    """What `send` gives back: a future in kafka-python's words."""

    def __init__(self) -> None:
        self.is_done = False
        self.value: RecordMetadata | None = None
        self.exception: BaseException | None = None

    def succeeded(self) -> bool:
        """Whether it was acknowledged."""
        return self.is_done and self.exception is None

    def failed(self) -> bool:
        """Whether it was given up."""
        return self.is_done and self.exception is not None

    def _fail(self, error: BaseException) -> None:
        if not self.is_done:
            self.is_done, self.exception = True, error


Batch = list[tuple[NewRecord, Sent]]


class Sender:
    """What an adapter asks of a producer's sender thread, to be rid of it: a way that kafka-python has no name for."""

    def __init__(self, producer: SimulatedProducer, world: World):
        self._producer, self._world = producer, world

    def force_close(self) -> None:
        """Drop whatever is not sent. The sender ends now, or goes on with a request that it waits for meanwhile."""
        busy = self._world.random.random() < 0.5
        self._world.io(self._producer.process, BUSY_S if busy else 0.0, self._producer.stop)

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        until = self._world.now + (BUSY_S if timeout is None else timeout)
        while self.is_alive() and self._world.now < until:
            self._world.sleep(RETRY_S)

    def is_alive(self) -> bool:
        """Whether it still waits for something."""
        return not self._producer.stopped


class SimulatedProducer(TransactionalProducer):
    """Made by `Clients`; the configuration is kafka-python's."""

    def __init__(self, world: World, cluster: Cluster, configs: Mapping[str, Any]):
        super().__init__(world, cluster, configs)
        self._waiting: dict[TopicPartition, Batch] = {}
        self._sender = Sender(self, world)
        try:
            self._ask("producer.connect", lambda: None, self.config["bootstrap_timeout_ms"] / 1000)
        except (NoAnswerError, SilenceError):
            raise KafkaTimeoutError("Unable to bootstrap") from None

    def send(
        self,
        topic: str,
        value: bytes | None = None,
        key: bytes | None = None,
        headers: list[tuple[str, bytes]] | None = None,
        partition: int | None = None,
        timestamp_ms: int | None = None,
    ) -> Sent:
        """Hand over a record; what becomes of it is for the future to tell."""
        if self._closed:
            raise IllegalStateError("KafkaProducer already closed!")
        if value is None and key is None:
            raise ValueError("Need at least one: key or value")
        if headers is not None and not isinstance(headers, list):
            raise TypeError("headers must be list-type")
        self._world.point("producer.send")
        known = self._cluster.topics.get(topic)
        if known is None:
            self._world.sleep(self.config["max_block_ms"] / 1000)
            raise KafkaTimeoutError(f"Failed to update metadata after {self.config['max_block_ms'] / 1000:.1f} secs.")
        if partition is None:
            partition = zlib.crc32(key or b"") % len(known.partitions)
        if not 0 <= partition < len(known.partitions):
            raise ValueError(f"Unrecognized partition {partition} for topic {topic}")
        stamp = self._world.wall_ms() if timestamp_ms is None else timestamp_ms
        record = NewRecord(key, value, headers or (), stamp)
        if record.size > self.config["max_request_size"]:
            raise MessageSizeTooLargeError(f"The message is {record.size} bytes when serialized which is larger than")
        if self._state in ("Abortable", "Fatal"):
            raise KafkaError("Cannot perform send because at least one previous request has failed with errors.")
        if self._id is not None and self._state != "InTransaction":
            raise IllegalStateError(f"Cannot call send in state {self._state}")
        future = Sent()
        batch = self._waiting.setdefault(TopicPartition(topic, partition), [])
        batch.append((record, future))
        if len(batch) == 1:
            linger_s = self.config["linger_ms"] / 1000 + LATENCY_S * self._world.random.random()
            self._world.io(self.process, linger_s, self._send_early)
        return future

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every record is done with, well or not."""
        self._world.point("producer.flush")
        if timeout == 0 and self._waiting:
            raise KafkaTimeoutError("Failed to flush buffered records within 0 secs.")
        try:
            self._drain(timeout)
        except NoAnswerError:
            raise KafkaTimeoutError(f"Failed to flush buffered records within {timeout} secs.") from None

    def close(self, timeout: float | None = None, null_logger: bool = False) -> None:
        """Flush, and let go: an open transaction stays open until it times out."""
        if self._closed:
            return
        self.flush(timeout)
        self._closed = True

    def stop(self) -> None:
        """The sender's thread ends: whoever waits for an answer waits for ever."""
        self._fail_waiting(IllegalStateError("Producer is closed forcefully."))
        self.stopped = True

    def _drain(self, timeout_s: float | None = None) -> None:
        if self._waiting and self._producer_id < 0:
            try:
                self._initialise(timeout_s)
            except SilenceError:
                self._unknown()
                return
        new = [tp for tp in self._waiting if tp not in self._added]
        if self._id is not None and new and self._state == "InTransaction":
            me = (self._id, self._producer_id, self._epoch)
            try:
                self._coordinate("producer.add_partitions", lambda: self._cluster.add_partitions(*me, new))
            except KafkaError as error:
                self._fail_waiting(error)
                return
            self._added.update(new)
            self._started = True
        give_up = None if timeout_s is None else self._world.now + timeout_s
        for tp in list(self._waiting):
            if batch := self._waiting.pop(tp, None):
                if self._state in ("Abortable", "Fatal"):
                    _fail(batch, self._last_error())
                else:
                    self._write(tp, batch, give_up)

    def _write(self, tp: TopicPartition, batch: Batch, give_up: float | None) -> None:
        """Send one batch and give its futures their outcome."""
        world = self._world
        fault = world.decide(self.process, "producer.produce")
        delivery_s = self.config["delivery_timeout_ms"] / 1000
        produce = self._produce(tp, batch)
        kind = None if fault is None else fault.kind
        if kind in ("expired", "expired-sent"):
            if kind == "expired-sent":
                produce()
            self._expire(tp, batch, delivery_s, give_up)
            return
        if kind == "out-of-order":
            _fail(batch, OutOfOrderSequenceNumberError())
            self._raise_epoch()
            return
        wait_s = delivery_s if give_up is None else min(delivery_s, give_up - world.now)
        try:
            first = self._deliver(fault, produce, max(wait_s, 0.0))
        except NoAnswerError:
            self._expire(tp, batch, max(delivery_s - wait_s, 0.0), give_up)
        except (InvalidProducerEpochError, OutOfOrderSequenceNumberError) as error:
            _fail(batch, error)
            self._raise_epoch()
        except (ProducerFencedError, InvalidTxnStateError) as error:
            _fail(batch, error)
            self._fatal(error)
        except MessageSizeTooLargeError as error:
            if len(batch) > 1:  # kafka-python cuts the batch and tries the pieces, under the sequence that it had
                self._sequences[tp] -= 1
                for one in batch:
                    self._write(tp, [one], give_up)
                return
            _fail(batch, error)
            self._abortable(error)
        except BrokerResponseError as error:
            _fail(batch, error if len(batch) == 1 else InvalidRecordError(str(error)))
            self._abortable(error)
        else:
            _succeed(tp, batch, first)

    def _deliver(self, fault: Fault | None, produce: Callable[[], int], timeout_s: float) -> int:
        give_up = self._world.now + timeout_s
        while True:
            try:
                left_s = max(give_up - self._world.now, 0.0)
                return self._world.carry_out(fault, produce, left_s, self.config["request_timeout_ms"] / 1000)
            except SilenceError:
                fault = None  # the client asks again, and the broker knows the batch
            except RetriableError:
                fault = None
                if self._world.now >= give_up:
                    raise NoAnswerError from None
                self._world.sleep(self.config["retry_backoff_ms"] / 1000)

    def _produce(self, tp: TopicPartition, batch: Batch) -> Callable[[], int]:
        records = [record for record, _ in batch]
        me = (self._producer_id, self._epoch, self._sequences.get(tp, 0), self._id)
        self._sequences[tp] = me[2] + 1  # taken for good, so that a batch which fails leaves a gap
        return lambda: self._cluster.produce(tp, records, *me)

    def _expire(self, tp: TopicPartition, batch: Batch, after_s: float, give_up: float | None) -> None:
        """A batch that nobody acknowledges: its futures fail, and that is all."""
        world = self._world
        if give_up is not None and give_up < world.now + after_s:
            world.io(self.process, after_s, lambda: _fail(batch, KafkaTimeoutError("Expiring record(s)")))
            world.sleep(max(give_up - world.now, 0.0))
            raise NoAnswerError
        world.sleep(after_s)
        _fail(batch, KafkaTimeoutError(f"Expiring {len(batch)} record(s) for {tp}"))

    def _send_early(self) -> None:
        """The sender's thread was quick: what is in the transaction's partitions already is written, unseen."""
        if self._state == "InTransaction" or (self._id is None and self._producer_id >= 0):
            if self._world.reachable_at(self.process) > self._world.now:
                return
            for tp in [tp for tp in self._waiting if self._id is None or tp in self._added]:
                batch = self._waiting.pop(tp)
                try:
                    first = self._produce(tp, batch)()
                except KafkaError:
                    self._sequences[tp] -= 1
                    self._waiting[tp] = batch  # whoever waits for it will see why
                    continue
                _succeed(tp, batch, first)

    def _fail_waiting(self, error: BaseException) -> None:
        for batch in self._waiting.values():
            _fail(batch, error)
        self._waiting.clear()


def _fail(batch: Batch, error: BaseException) -> None:
    for _, future in batch:
        future._fail(error)


def _succeed(tp: TopicPartition, batch: Batch, first: int) -> None:
    for index, (record, future) in enumerate(batch):
        if not future.is_done:
            sizes = (len(record.key or b""), len(record.value or b""), -1)
            future.value = RecordMetadata(tp.topic, tp.partition, tp, first + index, record.timestamp_ms, None, *sizes)
            future.is_done = True
