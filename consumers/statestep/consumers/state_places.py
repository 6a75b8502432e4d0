"""Where durable states lie: in the changelog of an application behind Kafka, or in the store of a run over files.

To look changes nothing, and never joins the group. To write is what a transaction of the service is, and happens only
while nobody is a member: the offsets go first, so that whoever joins from then on waits for the end of the transaction
when it asks where to go on; then the group is looked at; then come states and commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
from kafka import TopicPartition
from kafka.errors import KafkaError
from kafka.structs import ConsumerGroupMetadata, OffsetAndMetadata

from statestep.consumers import file_progress
from statestep.consumers.changelog import MARKER, decode_marker
from statestep.consumers.checkpoint import Stop
from statestep.consumers.config import ConfigError
from statestep.consumers.kafka_changelog import KafkaChangelog
from statestep.consumers.kafka_client import REAL, REQUEST_MS, Clients, Properties, connect, fail
from statestep.consumers.kafka_delivery import CLOSE_S, CONNECT_MS, Outgoing, abandon, deliver, judge, open_producer
from statestep.consumers.kafka_source import stable_offset
from statestep.consumers.kafka_topics import changelog_topic, identify, prepare_topics
from statestep.consumers.ports import Blocked, BrokerError, Changelog, Committed, Identity, StateRecord, Undecided
from statestep.consumers.state_moves import Write
from statestep.consumers.states import Held, hold
from statestep.consumers.store import NAME, Store
from statestep.consumers.store_changelog import StoreChangelog
from statestep.consumers.times import parse_time

TRANSACTION_MS = 120_000  # an import is one transaction, which a killed one leaves open for as long
STABLE_MS = 15_000  # how long an offset whose transaction is still being decided is waited for
STUCK_S = 40.0  # without progress while a changelog is read
BLOCK_RECORDS = 20_000


class Place(Protocol):
    """Some application's durable states."""

    @property
    def application(self) -> str:
        """What it is called."""

    @property
    def input(self) -> str:
        """The topic or file that it reads."""

    def identity(self) -> Identity:
        """What the input is. Raises `BrokerError` or `FileError`."""

    def read(self) -> dict[int, Held]:
        """All that is held of each partition. Raises `BrokerError`, `FileError`, `Corrupt`."""

    def start(self, partition: int, word: str) -> int:
        """The offset that `earliest`, `latest` or a time stands for."""

    def write(self, writes: Sequence[Write]) -> None:
        """Make all of it durable, or nothing. Raises `Stop` while the application runs, `BrokerError`, `FileError`."""

    def close(self) -> None:
        """Let go."""


class KafkaPlace:
    """An application behind Kafka: its changelog, its group's offsets, its input topic."""

    def __init__(
        self, properties: Properties, app_id: str, topic: str, *, writing: bool = False, clients: Clients = REAL
    ) -> None:
        """For `writing` the application may not run (`Stop`), and its changelog is made where it is missing."""
        self._properties, self._clients = properties, clients
        self._app_id, self._topic, self._changelog = app_id, topic, changelog_topic(app_id)
        self._identity = identify(properties, app_id, topic, clients)
        if writing:
            self._expect_nobody()
            prepare_topics(properties, app_id, topic, [], create=True, clients=clients)
        self._consumer = connect(
            clients.consumer,
            properties,
            client_id=app_id,
            group_id=app_id,  # to ask for its offsets; who does not subscribe does not join
            enable_auto_commit=False,
            auto_offset_reset="none",
            isolation_level="read_committed",
            allow_auto_create_topics=False,
        )
        found = self._consumer.partitions_for_topic(self._changelog)
        if not found or len(found) != self._identity.partitions:
            self.close()
            what = f"has {len(found)} partitions and {topic!r} {self._identity.partitions}" if found else "is not there"
            raise BrokerError(f"the topic {self._changelog!r} {what}; is --app-id right, and did it ever run?")

    @property
    def application(self) -> str:
        """The application's id."""
        return self._app_id

    @property
    def input(self) -> str:
        """The topic's name."""
        return self._topic

    def identity(self) -> Identity:
        """As it was at the beginning."""
        return self._identity

    def read(self) -> dict[int, Held]:
        """Offsets before and after the changelog: where they differ, something was committed meanwhile."""
        partitions = range(self._identity.partitions)
        before = {p: self._committed(p) for p in partitions}
        changelog = KafkaChangelog(self._app_id, self._properties, clients=self._clients)
        try:
            values = _values(changelog, partitions, self._clients.clock)
        finally:
            changelog.close()
        holds = {}
        for p in partitions:
            held = _held(p, values[p], self._committed(p))
            held.moving = held.committed != before[p]
            held.end = self._ask(lambda tp: self._consumer.end_offsets([tp], timeout_ms=REQUEST_MS)[tp], p)
            holds[p] = held
        return holds

    def start(self, partition: int, word: str) -> int:
        """Asks the broker."""
        consumer, limit_ms = self._consumer, REQUEST_MS
        if word == "earliest":
            return int(self._ask(lambda tp: consumer.beginning_offsets([tp], timeout_ms=limit_ms)[tp], partition))
        if word != "latest":
            time = parse_time(word)
            if time is None:
                raise ConfigError(f"--start is {word!r}: it must be earliest, latest or a time")
            when_ms = time // 1_000_000
            found = self._ask(lambda tp: consumer.offsets_for_times({tp: when_ms}, timeout_ms=limit_ms)[tp], partition)
            if found is not None and found.offset >= 0:
                return int(found.offset)
        return int(self._ask(lambda tp: consumer.end_offsets([tp], timeout_ms=limit_ms)[tp], partition))

    def write(self, writes: Sequence[Write]) -> None:
        """One transaction."""
        own = {"transactional_id": f"{self._app_id}-state", "transaction_timeout_ms": TRANSACTION_MS}
        producer = open_producer(self._clients, self._properties, TRANSACTION_MS, client_id=self._app_id, **own)
        try:
            self._clients.within(2 * TRANSACTION_MS / 1000, lambda: self._transact(producer, writes))
        except (KafkaError, Undecided) as error:
            verdict = judge(error, "writing the states failed", None) if isinstance(error, KafkaError) else error
            raise BrokerError(f"{verdict}; whether they count, `statestep state ls` tells") from None
        finally:
            _let_go(producer)
        for partition, _, offset in writes:
            if self._committed(partition) != offset:  # kafka-python does not tell of a commit that became an abort
                raise BrokerError(f"the states of partition {partition} were not taken by the broker; try again")

    def end(self, key: bytes, partitions: Iterable[int]) -> None:
        """Send a tombstone for a stream to the input, which ends it once it is its turn. Raises `BrokerError`."""
        producer = open_producer(self._clients, self._properties, CONNECT_MS * 2, client_id=self._app_id)
        tombstones = [Outgoing("output", self._topic, p, key, None, [], None) for p in partitions]
        try:
            deliver(producer, tombstones, CONNECT_MS * 2 / 1000, None)
        except Undecided as error:
            raise BrokerError(f"the stream may or may not be ended: {error}") from None
        finally:
            _let_go(producer)

    def close(self) -> None:
        """Let go of the broker."""
        self._consumer.close(autocommit=False)

    def _transact(self, producer: Any, writes: Sequence[Write]) -> None:
        """1. offsets, 2. is anybody there?, 3. states, 4. commit."""
        offsets = {TopicPartition(self._topic, w.partition): OffsetAndMetadata(*w.offset, -1) for w in writes}
        states = (state for write in writes for state in write.states)
        producer.init_transactions()
        producer.begin_transaction()
        try:
            producer.send_offsets_to_transaction(offsets, ConsumerGroupMetadata(self._app_id))
            self._expect_nobody()
            outgoing = [Outgoing("state", self._changelog, s.partition, s.key, s.value, [], None) for s in states]
            deliver(producer, outgoing, TRANSACTION_MS / 1000, None)
        except Exception:
            with suppress(KafkaError, RuntimeError):
                producer.abort_transaction()  # or the application could not start before the transaction's timeout
            raise
        producer.commit_transaction()

    def _expect_nobody(self) -> None:
        """Refuse to write while the application runs."""
        admin = connect(self._clients.admin, self._properties, client_id=self._app_id)
        try:
            found = admin.describe_groups([self._app_id])[self._app_id]
        except KafkaError as error:
            fail(f"looking at the group {self._app_id!r}", error)
        finally:
            admin.close()
        if found["error"] and found["group_state"] != "Dead":
            raise BrokerError(f"looking at the group {self._app_id!r} failed: {found['error']}")
        if members := len(found["members"]):
            raise Stop(
                f"{self._app_id} is running ({members} members of its group), and would not see what is written: stop "
                "it by SIGTERM, or wait until the group has missed what was killed, and try again"
            )

    def _committed(self, partition: int) -> Committed | None:
        return stable_offset(self._consumer, self._topic, partition, STABLE_MS)

    def _ask(self, question: Callable[[TopicPartition], Any], partition: int) -> Any:
        try:
            return question(TopicPartition(self._topic, partition))
        except KafkaError as error:
            fail(f"asking for the offsets of {self._topic!r} partition {partition}", error)


class StorePlace:
    """The store of a run over files, as `replay --state-dir` makes it."""

    def __init__(self, directory: Path, *, writing: bool = False, data: str | None = None) -> None:
        """For `writing` there need be none yet; `data` is then the file that its streams will go on with.

        Raises `ConfigError` while another process has it.
        """
        if not writing and not (directory / NAME).is_file():
            raise ConfigError(f"--state-dir is {str(directory)!r}: there is no store in it")
        self._directory, self._data = directory, data
        self._store = Store.open(directory, "replay", durable=True)

    @property
    def application(self) -> str:
        """The directory."""
        return str(self._directory)

    @property
    def input(self) -> str:
        """The file, or nothing where none was read yet."""
        noted = self._store.note("input")
        return "" if noted is None else msgspec.json.decode(noted, type=file_progress.Origin).path

    def identity(self) -> Identity:
        """Of the file that was read, or that is to be."""
        if self._data is not None:
            return Identity(file_progress.same_input(self._store, self._data).sha256, 1, is_log=True)
        noted = self._store.note("input")
        if noted is None:
            raise ConfigError("--data is missing: the store is new, so say which file its streams will go on with")
        return Identity(msgspec.json.decode(noted, type=file_progress.Origin).sha256, 1, is_log=True)

    def read(self) -> dict[int, Held]:
        """Of the one partition."""
        changelog = StoreChangelog(self._store)
        return {0: _held(0, _values(changelog, [0], lambda: 0.0)[0], file_progress.committed(self._store, 0))}

    def start(self, partition: int, word: str) -> int:
        """A file is read from its beginning."""
        if word != "earliest":
            raise ConfigError(f"--start is {word!r}: a file is read from its beginning")
        return 0

    def write(self, writes: Sequence[Write]) -> None:
        """One transaction."""
        states = [state for write in writes for state in write.states]
        position = (self._store.position(0) or 0) + len(states)
        notes = {f"offset {write.partition}": msgspec.json.encode(write.offset) for write in writes}
        self._store.apply(states, {0: position}, notes)

    def close(self) -> None:
        """Let go of the directory."""
        self._store.close()


def _let_go(producer: Any) -> None:
    """Close a producer; one whose transaction was given up has nothing left to send, or is told not to."""
    with suppress(KafkaError):
        producer.close(timeout=CLOSE_S)
    abandon(producer)


def _values(
    changelog: Changelog, partitions: Iterable[int], clock: Callable[[], float]
) -> dict[int, dict[bytes, StateRecord]]:
    """The latest record by key, of each partition. Raises `Blocked` where reading does not get on."""
    values: dict[int, dict[bytes, StateRecord]] = {}
    for partition in partitions:
        values[partition] = {}
        changelog.open(partition)
        moved_s = clock()
        while not changelog.finished(partition):
            before = changelog.position(partition)
            for record in changelog.read(BLOCK_RECORDS):
                values[partition][record.key] = record
            if changelog.position(partition) != before:
                moved_s = clock()
            elif clock() - moved_s > STUCK_S:
                raise Blocked(f"reading changelog partition {partition} has not moved for {STUCK_S:g} s")
        changelog.shut(partition)
    return values


def _held(partition: int, values: Mapping[bytes, StateRecord], committed: Committed | None) -> Held:
    record = values.get(MARKER)
    marker = None
    if record is not None and record.value is not None:
        marker = decode_marker(record.value, f"the marker of changelog partition {partition}")
    return hold(partition, values, marker, committed)
