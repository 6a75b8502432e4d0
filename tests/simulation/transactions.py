"""A producer's transactions, as kafka-python 3.0.12 keeps them: its states, errors, and offsets it does not forget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import kafka
from kafka.errors import (
    CommitFailedError,
    FencedInstanceIdError,
    IllegalGenerationError,
    IllegalStateError,
    InvalidProducerEpochError,
    KafkaError,
    KafkaTimeoutError,
    ProducerFencedError,
    RetriableError,
    TransactionAbortedError,
    UnknownMemberIdError,
)
from kafka.structs import ConsumerGroupMetadata, OffsetAndMetadata, TopicPartition

from .cluster import Cluster
from .world import LATENCY_S, RETRY_S, SILENCE_S, NoAnswerError, SilenceError, World

T = TypeVar("T")


class Manager:
    """What an adapter asks of a producer's transaction manager, to be rid of it."""

    def __init__(self, producer: TransactionalProducer):
        self._producer = producer

    def authentication_failed(self, error: BaseException) -> None:
        """Whoever waits for an answer to a request that was not sent waits no longer."""
        self._producer.give_up(error)


class TransactionalProducer:
    """What a producer knows of its transactions; its records are the business of `SimulatedProducer`."""

    DEFAULT_CONFIG = kafka.KafkaProducer.DEFAULT_CONFIG

    def __init__(self, world: World, cluster: Cluster, configs: Mapping[str, Any]):
        unknown = set(configs) - set(self.DEFAULT_CONFIG)
        if unknown:
            raise ValueError(f"Unrecognized configs: {unknown}")
        self.config = {**self.DEFAULT_CONFIG, **configs}
        self._world, self._cluster = world, cluster
        self.process = world.alive()
        self._id: str | None = self.config["transactional_id"]
        self._state: Literal["Uninitialized", "Ready", "InTransaction", "Abortable", "Bumping", "Fatal"] = (
            "Uninitialized"
        )
        self._error: BaseException | None = None
        self._producer_id, self._epoch = -1, -1
        self._sequences: dict[TopicPartition, int] = {}
        self._added: set[TopicPartition] = set()
        self._started = False  # whether the coordinator knows of the transaction
        self._stale: dict[TopicPartition, OffsetAndMetadata] = {}
        self._closed = self.stopped = False
        self._given_up: BaseException | None = None
        self._transaction_manager = Manager(self) if self._id is not None else None

    def _drain(self, timeout_s: float | None = None) -> None:
        """Write out the records that wait."""
        raise AssertionError("of the subclass")

    def _fail_waiting(self, error: BaseException) -> None:
        """Give up the records that wait."""
        raise AssertionError("of the subclass")

    # Transactions

    def init_transactions(self) -> None:
        """Wait for a producer id and epoch, up to `max_block_ms`."""
        self._transactional()
        if self._state == "Ready":
            return
        try:
            self._initialise(self.config["max_block_ms"] / 1000)
        except NoAnswerError:
            raise KafkaTimeoutError("Timeout expired while initializing transactional state") from None
        except SilenceError:
            raise self._unknown() from None

    def _initialise(self, timeout_s: float | None) -> None:
        timeout_ms = self.config["transaction_timeout_ms"] if self._id is not None else 0
        found = self._ask("producer.init", lambda: self._cluster.init_producer(self._id, timeout_ms / 1000), timeout_s)
        self._producer_id, self._epoch = found
        self._sequences.clear()
        self._state, self._error = "Ready", None

    def begin_transaction(self) -> None:
        """Local: the coordinator hears of it with the first partition."""
        self._transactional()
        self._no_error()
        self._expect("Ready", "IN_TRANSACTION")
        self._world.point("producer.begin")
        self._state = "InTransaction"

    def send_offsets_to_transaction(
        self, offsets: Mapping[TopicPartition, OffsetAndMetadata], group_metadata: ConsumerGroupMetadata | str
    ) -> None:
        """Add offsets to the transaction; blocks without limit."""
        self._transactional()
        if isinstance(group_metadata, str):
            group_metadata = ConsumerGroupMetadata(group_id=group_metadata)
        if group_metadata.generation_id > 0 and not group_metadata.member_id:
            raise ValueError("Invalid ConsumerGroupMetadata: a generation without a member id")
        self._no_error()
        if self._state != "InTransaction":
            raise KafkaError("Cannot send offsets to transaction because the producer is not in an active transaction")
        group, me = group_metadata.group_id, (self._id, self._producer_id, self._epoch)
        self._coordinate("producer.add_offsets", lambda: self._cluster.add_offsets(*me, group))  # type: ignore[arg-type]
        self._started = True
        self._stale.update(offsets)
        member = (group_metadata.member_id, group_metadata.group_instance_id, group_metadata.generation_id)
        given = dict(self._stale)
        try:
            self._coordinate(
                "producer.offsets",
                lambda: self._cluster.commit_offsets(*me, group, *member, given),  # type: ignore[arg-type]
            )
        except (IllegalGenerationError, UnknownMemberIdError) as error:
            self._abortable(
                CommitFailedError(
                    "Transaction offset commit failed due to consumer group metadata mismatch: " + type(error).__name__
                )
            )
            raise self._last_error() from None
        except FencedInstanceIdError as error:
            self._abortable(error)
            raise
        self._stale.clear()

    def commit_transaction(self) -> None:
        """Write out what waits, and commit; blocks without limit."""
        self._end(commit=True)

    def abort_transaction(self) -> None:
        """Drop what waits, and abort; blocks without limit."""
        self._end(commit=False)

    def _end(self, commit: bool) -> None:
        self._transactional()
        if commit or self._state != "Abortable":
            self._no_error()
            self._expect("InTransaction", "COMMITTING_TRANSACTION" if commit else "ABORTING_TRANSACTION")
        if commit:
            self._drain()
            if self._state in ("Abortable", "Fatal"):
                raise self._last_error()
            if self._state != "InTransaction":
                return  # the epoch is being raised, so the broker aborts; nobody says so
        else:
            self._fail_waiting(self._error or TransactionAbortedError())
        me = (self._id, self._producer_id, self._epoch)
        if self._started:
            point = "producer.end:commit" if commit else "producer.end:abort"
            self._coordinate(point, lambda: self._cluster.end_transaction(*me, commit))  # type: ignore[arg-type]
        self._state, self._error = "Ready", None
        self._started = False
        self._added.clear()

    # Requests and errors

    def _ask(self, point: str, does: Callable[[], T], timeout_s: float | None = None) -> T:
        """Ask the coordinator, again and again while it says to."""
        give_up = None if timeout_s is None else self._world.now + timeout_s
        while True:
            left = None if give_up is None else max(give_up - self._world.now, 0.0)
            while self.stopped:
                if self._given_up is not None:
                    raise self._given_up
                self._world.sleep(SILENCE_S, wakeable=True)
            try:
                found = self._world.effect(point, does, left, self.config["request_timeout_ms"] / 1000)
                if not self.stopped:
                    return found
            except RetriableError:
                if give_up is not None and self._world.now >= give_up:
                    raise NoAnswerError from None
                self._world.sleep(self.config["retry_backoff_ms"] / 1000)

    def _coordinate(self, point: str, does: Callable[[], None]) -> None:
        """The same for a transaction's requests: without an answer, or fenced, the producer is done for."""
        try:
            self._ask(point, does)
        except SilenceError:
            raise self._unknown() from None
        except (ProducerFencedError, InvalidProducerEpochError):
            self._fatal(ProducerFencedError())
            raise self._last_error() from None
        except (FencedInstanceIdError, IllegalGenerationError, UnknownMemberIdError):
            raise
        except KafkaError as error:
            self._fatal(error)
            raise

    def _unknown(self) -> KafkaError:
        error = KafkaError("Could not execute transactional request for unknown reasons: request timed out")
        self._fatal(error)
        return error

    def _raise_epoch(self) -> None:
        """Go on under the next epoch, as kafka-python's sender does by itself; the broker aborts what was open."""
        if self._id is None or self._state in ("Bumping", "Fatal"):
            return
        self._state, self._error = "Bumping", None
        self._started = False
        self._added.clear()
        timeout_s = self.config["transaction_timeout_ms"] / 1000

        def attempt() -> None:
            if self.stopped:
                return
            if self._world.reachable_at(self.process) > self._world.now:
                self._world.io(self.process, RETRY_S, attempt)
                return
            try:
                found = self._cluster.init_producer(self._id, timeout_s, self._producer_id, self._epoch)
            except RetriableError:
                self._world.io(self.process, self.config["retry_backoff_ms"] / 1000, attempt)
            except KafkaError as error:
                self._fatal(error)
            else:
                self._producer_id, self._epoch = found
                self._sequences.clear()
                self._state = "Ready"

        self._world.io(self.process, LATENCY_S, attempt)

    def _abortable(self, error: BaseException) -> None:
        if self._id is not None and self._state != "Fatal":
            self._state, self._error = "Abortable", error

    def give_up(self, error: BaseException) -> None:
        """Nothing comes of it any more."""
        self._given_up = error
        self._fatal(error)
        self._world.wake(self.process)

    def _fatal(self, error: BaseException) -> None:
        self._state, self._error = "Fatal", error
        self._fail_waiting(error)

    def _last_error(self) -> BaseException:
        assert self._error is not None
        return self._error

    def _transactional(self) -> None:
        if self._id is None:
            raise IllegalStateError("Transactional method invoked on a non-transactional producer.")

    def _no_error(self) -> None:
        if self._state in ("Abortable", "Fatal"):
            raise KafkaError(f"Cannot execute transactional method because we are in an error state: {self._error}")

    def _expect(self, state: str, target: str) -> None:
        if self._state != state:
            raise KafkaError(f"Invalid transition attempted from state {self._state} to state {target}")
