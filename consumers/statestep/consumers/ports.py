"""What the service asks of the world: a source of records and a sink for messages.

`broker.py`, `files.py` and `memory.py` are the adapters; one conformance suite holds them to the words here.
A source reads one topic, whose partitions are numbered from 0. All calls come from one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

Headers = tuple[tuple[str, bytes], ...]


class Record(NamedTuple):
    """One message of the input, undecoded."""

    partition: int
    offset: int
    timestamp_ms: int  # when it was made or stored, ms since the epoch; -1 if unknown
    key: bytes | None
    value: bytes | None
    headers: Headers = ()


class Message(NamedTuple):
    """One message for the outside: an output, or a record that was refused (`dead`)."""

    dead: bool
    partition: int  # of the record it answers
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None = None  # None: the sink's own clock


class Change(NamedTuple):
    """Partitions that came or went. `lost` ones went without notice: another member may own them already."""

    kind: Literal["assigned", "revoked", "lost"]
    partitions: tuple[int, ...]


class Committed(NamedTuple):
    """What a commit holds for a partition: the offset to go on from, and a short text of the application's own."""

    offset: int
    metadata: str


class Polled(NamedTuple):
    """What a poll brought: changes first, in order, then records of the partitions owned after them."""

    changes: Sequence[Change]
    records: Sequence[Record]


class BrokerError(RuntimeError):
    """The other side cannot be reached, or refuses: one sentence. Nothing that was not committed counts."""


class CommitRefused(RuntimeError):
    """Offsets were not committed because the group has moved on; the next poll tells which partitions are left."""


class Source(Protocol):
    """Where records come from, in offset order within each partition."""

    @property
    def topic(self) -> str:
        """What outputs name as their origin."""

    @property
    def partitions(self) -> int:
        """How many partitions the topic has."""

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        """Wait for records up to `timeout_s`; give at most `max_records` of them.

        A partition that was just assigned gives none before `seek`. May raise `BrokerError`.
        """

    def committed(self, partition: int) -> Committed | None:
        """What was committed last, or None."""

    def bounds(self, partition: int) -> tuple[int, int]:
        """The offsets of the first record that is still kept and of the next one to be written."""

    def offset_at(self, partition: int, time_ms: int) -> int:
        """The offset of the first record made at `time_ms` or later; the next one to be written if there is none."""

    def seek(self, partition: int, offset: int) -> None:
        """Go on reading at `offset`."""

    def commit(self, offsets: Mapping[int, Committed]) -> None:
        """Keep `offsets` so that whoever owns the partitions next finds them. May raise `CommitRefused`."""

    def high_watermarks(self) -> Mapping[int, int]:
        """For each owned partition the offset of the next record to be written, as far as it is known unasked."""

    @property
    def exhausted(self) -> bool:
        """Whether no record will ever come again. True at the end of a file; a broker's topic never ends."""

    def close(self) -> None:
        """Give the partitions back."""


class Sink(Protocol):
    """Where outputs and dead letters go."""

    def send(self, messages: Sequence[Message]) -> None:
        """Take messages, to be written in order. May raise `BrokerError`."""

    def flush(self) -> None:
        """Return once everything sent is acknowledged; raise `BrokerError` if any of it is not."""

    def close(self) -> None:
        """Flush and let go."""
