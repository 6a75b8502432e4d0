"""What the service asks of the world: a source of records, a sink that commits, and a changelog to restore from.

`kafka_source.py` and its like, `librdkafka.py`, `files.py` and `memory.py` are the adapters; one conformance suite
holds them to the words here. A source reads one topic, whose partitions are numbered from 0; the changelog has as
many. All calls come from one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

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
    """One message for the outside: an output, a record that was refused (`dead`), an `event`'s beginning or end."""

    dead: bool
    partition: int  # of the record it answers
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int | None = None  # None: the sink's own clock
    event: bool = False


class Change(NamedTuple):
    """Partitions that came or went. `lost` ones went without notice: another member may own them already."""

    kind: Literal["assigned", "revoked", "lost"]
    partitions: tuple[int, ...]


class Committed(NamedTuple):
    """What a commit holds for a partition: the offset to go on from, and a short text of the application's own."""

    offset: int
    metadata: str


class StateRecord(NamedTuple):
    """One record of the changelog: what is durable of a stream, or a partition's marker. See `changelog`."""

    partition: int
    key: bytes
    value: bytes | None  # None: a tombstone, the stream has ended
    offset: int = -1  # its place in the changelog, once it is there


class Transaction(NamedTuple):
    """What becomes durable together, or not at all."""

    messages: Sequence[Message]  # in the order in which they are to be written
    states: Sequence[StateRecord]  # likewise; each partition's marker is its last
    offsets: Mapping[int, Committed]  # for every partition that messages or states belong to


class Polled(NamedTuple):
    """What a poll brought: changes first, in order, then records of the partitions owned after them."""

    changes: Sequence[Change]
    records: Sequence[Record]
    membership: Any  # this process's standing in the group, for the sink's eyes; None: nothing may be committed now


class Identity(NamedTuple):
    """What makes the input the same log as before."""

    topic_id: str  # another one after the topic was deleted and made anew
    partitions: int  # with another number, keys lie elsewhere
    is_log: bool  # whether it keeps every record until retention takes it; a compacted topic does not


class BrokerError(RuntimeError):
    """The other side cannot be reached, or refuses: one sentence. Nothing that was not committed counts."""


class Undecided(RuntimeError):
    """A transaction failed; whether it counts is not known before `Sink.recover` and a look at what is committed."""


class Rejected(Undecided):
    """A message was refused for what it is, such as its size: the same transaction would fail again."""


class Fenced(RuntimeError):
    """Another process has taken this one's place. It must not write again, nor try."""


class Blocked(RuntimeError):
    """A call of the client did not return before its deadline. Whatever it was doing is undecided."""


class Source(Protocol):
    """Where records come from, in offset order within each partition."""

    @property
    def topic(self) -> str:
        """What outputs name as their origin."""

    @property
    def partitions(self) -> int:
        """How many partitions the topic had when the source was made."""

    def identity(self) -> Identity:
        """What the topic is now; asks. May raise `BrokerError`."""

    def poll(self, timeout_s: float, max_records: int) -> Polled:
        """Wait for records up to `timeout_s`; give at most `max_records` of them.

        A partition that was just assigned gives none before `seek`. May raise `BrokerError`.
        """

    def committed(self, partition: int) -> Committed | None:
        """What was committed last, or None. A commit under way is waited for. May raise `BrokerError`."""

    def bounds(self, partition: int) -> tuple[int, int]:
        """The offsets of the first record that is still kept and of the next one to be written."""

    def offset_at(self, partition: int, time_ms: int) -> int:
        """The offset of the first record made at `time_ms` or later; the next one to be written if there is none."""

    def seek(self, partition: int, offset: int) -> None:
        """Go on reading at `offset`. For a partition that is no longer owned it does nothing."""

    def pause(self, partition: int) -> None:
        """Give no records of an owned partition until the next `seek`."""

    def high_watermarks(self) -> Mapping[int, int]:
        """For each owned partition the offset of the next record to be written, as far as it is known unasked."""

    @property
    def exhausted(self) -> bool:
        """Whether no record will ever come again. True at the end of a file; a broker's topic never ends."""

    def close(self) -> None:
        """Give the partitions back."""


class Sink(Protocol):
    """Where outputs, dead letters, states and offsets go, in transactions."""

    @property
    def keeps_states(self) -> bool:
        """Whether states and offsets are kept at all; without, a run that ends early begins anew."""

    def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        """Make a transaction durable; `membership` is of the poll just before.

        Returns once it counts: for each partition with states the changelog's position after them. Raises
        `Undecided`, `Rejected`, `Fenced` or `Blocked`; but for `Fenced`, `recover` must come before the next commit.
        """

    def recover(self) -> None:
        """After a failed commit: end whatever it left open, so that it counts or never will.

        May raise `BrokerError` (try again later), `Fenced` or `Blocked`.
        """

    def close(self) -> None:
        """Let go. Nothing is left open by a commit that returned."""


class Changelog(Protocol):
    """The durable states of every partition, read back in the order in which they were committed.

    Several partitions can be open at a time. Compaction may have removed records that later ones replace.
    """

    def open(self, partition: int, position: int | None = None) -> bool:
        """Begin to read what is committed by now, from `position` or from the beginning.

        False, and nothing is opened, where `position` is no longer or not yet there. May raise `BrokerError`.
        """

    def read(self, max_records: int) -> Sequence[StateRecord]:
        """Records of the open partitions, in order within each; none where there are none yet. Does not wait long."""

    def finished(self, partition: int) -> bool:
        """Whether everything that was committed when it was opened has been read."""

    def position(self, partition: int) -> int:
        """The offset after the last record that was read."""

    def shut(self, partition: int) -> None:
        """Read no more of a partition."""

    def close(self) -> None:
        """Let go."""
