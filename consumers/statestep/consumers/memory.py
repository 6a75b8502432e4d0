"""A topic, its group, its sink and its changelog in memory: what the demo runs on, what tests script.

It keeps the words of `ports` and passes the same conformance suite as Kafka. Faults are scripted by hand:
`MemorySource.assign` and `revoke` move partitions, `MemorySource.unsettle` is a group in the middle of a move,
`MemorySink.fail_next` loses transactions or only the news of them, `MemoryBroker.delete_before` is retention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from statestep.consumers.ports import (
    BrokerError,
    Change,
    Committed,
    Headers,
    Identity,
    Message,
    Polled,
    Record,
    StateRecord,
    Transaction,
    Undecided,
)


class MemoryBroker:
    """One topic of `partitions` partitions, and all that transactions have made durable.

    >>> broker = MemoryBroker(partitions=1)
    >>> broker.append(0, b"pump-1", b"{}")
    0
    """

    def __init__(self, partitions: int, topic: str = "memory"):
        self.topic = topic
        self.log: list[list[Record]] = [[] for _ in range(partitions)]
        self.first_kept = [0] * partitions
        self.identity = Identity("memory", partitions, True)
        self.offsets: dict[int, Committed] = {}
        self.messages: list[Message] = []
        self.changelog: list[list[StateRecord]] = [[] for _ in range(partitions)]
        self.owner: dict[int, MemorySource] = {}

    def append(
        self, partition: int, key: bytes | None, value: bytes | None, timestamp_ms: int = -1, headers: Headers = ()
    ) -> int:
        """Write a record; gives its offset."""
        log = self.log[partition]
        log.append(Record(partition, len(log), timestamp_ms, key, value, headers))
        return len(log) - 1

    def delete_before(self, partition: int, offset: int) -> None:
        """What retention does: records below `offset` can no longer be read."""
        self.first_kept[partition] = max(self.first_kept[partition], offset)

    def write(self, transaction: Transaction, membership: Any) -> dict[int, int]:
        """Make a transaction durable; the changelog's positions after it. Refuses whoever does not own a partition."""
        for partition in transaction.offsets:
            if self.owner.get(partition) is not membership:
                raise Undecided(f"partition {partition} belongs to another member")
        self.messages += transaction.messages
        for record in transaction.states:
            log = self.changelog[record.partition]
            log.append(record._replace(offset=len(log)))
        self.offsets.update(transaction.offsets)
        return {partition: len(self.changelog[partition]) for partition in {r.partition for r in transaction.states}}

    @property
    def outputs(self) -> list[Message]:
        """The messages that answer records by predictions, or pass on that a stream has ended."""
        return [message for message in self.messages if not (message.dead or message.event)]

    @property
    def events(self) -> list[Message]:
        """The beginnings and ends of events."""
        return [message for message in self.messages if message.event]

    @property
    def dead_letters(self) -> list[Message]:
        """The records that were refused."""
        return [message for message in self.messages if message.dead]


class MemorySource:
    """Reads a `MemoryBroker`. All partitions are assigned at the first poll unless `partitions` says which.

    `feed` is called at the start of each poll, to append what is new; once it returns False, or where there is
    none, the source is exhausted as soon as everything was read.
    """

    def __init__(
        self,
        broker: MemoryBroker,
        partitions: Iterable[int] | None = None,
        feed: Callable[[], bool] | None = None,
    ):
        self.broker = broker
        chosen = range(len(broker.log)) if partitions is None else partitions
        self._changes = [Change("assigned", tuple(chosen))]
        self._position: dict[int, int | None] = {}
        self._unsettled = 0
        self._feed = feed
        self._fed = feed is None

    @property
    def topic(self) -> str:
        """The topic's name."""
        return self.broker.topic

    @property
    def partitions(self) -> int:
        """How many partitions the broker's topic has."""
        return len(self.broker.log)

    def assign(self, *partitions: int) -> None:
        """Give partitions at the next poll."""
        self._changes.append(Change("assigned", partitions))

    def revoke(self, *partitions: int, lost: bool = False) -> None:
        """Take partitions away at the next poll."""
        self._changes.append(Change("lost" if lost else "revoked", partitions))

    def unsettle(self, polls: int = 1) -> None:
        """Let the group be in the middle of a move for so many polls: nothing can be committed after them."""
        self._unsettled += polls

    def identity(self) -> Identity:
        """What the topic is now."""
        return self.broker.identity

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        """Give what is there, without waiting."""
        if not self._fed and self._feed is not None:
            self._fed = not self._feed()
        for partition, position in self._position.items():
            if position is not None and position < self.broker.first_kept[partition]:  # retention was quicker
                self._changes += [Change("lost", (partition,)), Change("assigned", (partition,))]
        changes, self._changes = self._changes, []
        for change in changes:
            for partition in change.partitions:
                if change.kind == "assigned":
                    self._position[partition] = None  # until the service seeks
                    self.broker.owner[partition] = self
                else:
                    self._position.pop(partition, None)
                    if self.broker.owner.get(partition) is self:
                        del self.broker.owner[partition]
        records: list[Record] = []
        for partition, position in self._position.items():
            if position is not None:
                taken = list(islice(self.broker.log[partition], position, position + max_records - len(records)))
                self._position[partition] = position + len(taken)
                records += taken
        settled, self._unsettled = not self._unsettled, max(self._unsettled - 1, 0)
        return Polled(changes, records, self if settled else None)

    def committed(self, partition: int) -> Committed | None:
        """What was committed last, or None."""
        return self.broker.offsets.get(partition)

    def bounds(self, partition: int) -> tuple[int, int]:
        """The offsets of the first record kept and of the next to be written."""
        return self.broker.first_kept[partition], len(self.broker.log[partition])

    def offset_at(self, partition: int, time_ms: int) -> int:
        """The offset of the first record made at `time_ms` or later."""
        log = self.broker.log[partition]
        return next((record.offset for record in log if record.timestamp_ms >= time_ms), len(log))

    def seek(self, partition: int, offset: int) -> None:
        """Go on reading at `offset`; of a partition that was taken away meanwhile nothing is read."""
        if partition not in self._position:
            return
        if not self.broker.first_kept[partition] <= offset <= len(self.broker.log[partition]):
            raise BrokerError(f"offset {offset} of partition {partition} is not kept")
        self._position[partition] = offset

    def pause(self, partition: int) -> None:
        """Give nothing of a partition until it is sought to again."""
        if partition in self._position:
            self._position[partition] = None

    def high_watermarks(self) -> Mapping[int, int]:
        """The length of each owned partition's log."""
        return {partition: len(self.broker.log[partition]) for partition in self._position}

    @property
    def exhausted(self) -> bool:
        """Whether everything was read and nothing more will be fed."""
        return (
            self._fed
            and not self._changes
            and all(position == len(self.broker.log[p]) for p, position in self._position.items())
        )

    def close(self) -> None:
        """Give the partitions back."""
        self._position.clear()


class MemorySink:
    """Commits to the broker at once."""

    def __init__(self, broker: MemoryBroker):
        self.broker = broker
        self._failures: list[tuple[Exception, bool]] = []

    @property
    def keeps_states(self) -> bool:
        """Always: as long as the broker object lives."""
        return True

    def fail_next(self, error: Exception | None = None, *, counts: bool = False) -> None:
        """Let the next transaction fail, for those before it in turn; with `counts` only the news of it is lost."""
        self._failures.append((error or Undecided("no acknowledgement"), counts))

    def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        """Make a transaction durable, unless a fault was scripted."""
        error, counts = self._failures.pop(0) if self._failures else (None, True)
        positions = self.broker.write(transaction, membership) if counts else {}
        if error is not None:
            raise error
        return positions

    def recover(self) -> None:
        """Nothing is ever left open."""

    def close(self) -> None:
        """Nothing is held."""


class MemoryChangelog:
    """Reads the broker's changelog."""

    def __init__(self, broker: MemoryBroker):
        self.broker = broker
        self._open: dict[int, tuple[int, int]] = {}  # by partition: position and end

    def open(self, partition: int, position: int | None = None) -> bool:
        """Begin to read what is committed by now."""
        end = len(self.broker.changelog[partition])
        if position is not None and not 0 <= position <= end:
            return False
        self._open[partition] = (position or 0, end)
        return True

    def read(self, max_records: int) -> Sequence[StateRecord]:
        """The next records of the open partitions."""
        records: list[StateRecord] = []
        for partition, (position, end) in self._open.items():
            stop = min(end, position + max_records - len(records))
            records += self.broker.changelog[partition][position:stop]
            self._open[partition] = (max(stop, position), end)
        return records

    def finished(self, partition: int) -> bool:
        """Whether everything was read."""
        position, end = self._open[partition]
        return position >= end

    def position(self, partition: int) -> int:
        """The offset after the last record read."""
        return self._open[partition][0]

    def shut(self, partition: int) -> None:
        """Read no more of a partition."""
        self._open.pop(partition, None)

    def close(self) -> None:
        """Nothing is held."""
