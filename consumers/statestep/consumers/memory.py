"""A topic, its group and its sink in memory: what the demo runs on, what tests script, what an embedder can try.

It keeps the words of `ports` and passes the same conformance suite as Kafka. Faults are scripted by hand:
`MemorySource.assign` and `revoke` move partitions, `MemorySource.refuse_next` is a group that has moved on,
`MemorySink.fail_next` loses acknowledgements, `MemoryBroker.delete_before` is retention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

from statestep.consumers.ports import BrokerError, Change, CommitRefused, Committed, Headers, Message, Polled, Record


class MemoryBroker:
    """One topic of `partitions` partitions, the offsets committed for it, and the messages that came out.

    >>> broker = MemoryBroker(partitions=1)
    >>> broker.append(0, b"pump-1", b"{}")
    0
    """

    def __init__(self, partitions: int, topic: str = "memory"):
        self.topic = topic
        self.log: list[list[Record]] = [[] for _ in range(partitions)]
        self.first_kept = [0] * partitions
        self.offsets: dict[int, Committed] = {}
        self.messages: list[Message] = []

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

    @property
    def outputs(self) -> list[Message]:
        """The messages that are no dead letters."""
        return [message for message in self.messages if not message.dead]

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
        self._refusals = 0
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

    def refuse_next(self, commits: int = 1) -> None:
        """Let the next commits be refused: nothing of what they hold is kept."""
        self._refusals += commits

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
                else:
                    self._position.pop(partition, None)
        records: list[Record] = []
        for partition, position in self._position.items():
            if position is not None:
                taken = list(islice(self.broker.log[partition], position, position + max_records - len(records)))
                self._position[partition] = position + len(taken)
                records += taken
        return Polled(changes, records)

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

    def commit(self, offsets: Mapping[int, Committed]) -> None:
        """Keep `offsets` in the broker."""
        if self._refusals:
            self._refusals -= 1
            raise CommitRefused("the group has moved on")
        self.broker.offsets.update(offsets)

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
    """Keeps messages until `flush`, then hands them to the broker."""

    def __init__(self, broker: MemoryBroker):
        self.broker = broker
        self._pending: list[Message] = []
        self._failures = 0

    def fail_next(self, flushes: int = 1) -> None:
        """Let the next flushes fail: nothing of what they hold is kept."""
        self._failures += flushes

    def send(self, messages: Sequence[Message]) -> None:
        """Take messages."""
        self._pending += messages

    def flush(self) -> None:
        """Hand over everything sent."""
        pending, self._pending = self._pending, []
        if self._failures:
            self._failures -= 1
            raise BrokerError(f"{len(pending)} messages were not acknowledged")
        self.broker.messages += pending

    def close(self) -> None:
        """Flush."""
        self.flush()
