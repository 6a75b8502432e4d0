"""A simulated partition: its records, markers and watermarks, as a broker keeps and serves them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

from kafka.errors import (
    InvalidProducerEpochError,
    InvalidRecordError,
    InvalidTimestampError,
    MessageSizeTooLargeError,
    NotEnoughReplicasError,
    OffsetOutOfRangeError,
    OutOfOrderSequenceNumberError,
)

Headers = Sequence[tuple[str, bytes]]
RECORD_OVERHEAD = 70  # bytes of a batch of one record beside its key, value and headers


class NewRecord(NamedTuple):
    """What a producer sends."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp_ms: int

    @property
    def size(self) -> int:
        """About how many bytes it takes in a batch of its own."""
        headers = sum(len(name) + len(value) for name, value in self.headers)
        return RECORD_OVERHEAD + len(self.key or b"") + len(self.value or b"") + headers


class Entry:
    """What lies at one offset: a record, or the marker that ends a transaction."""

    __slots__ = ("aborted", "headers", "key", "marker", "offset", "producer_id", "timestamp_ms", "value")

    def __init__(self, offset: int, record: NewRecord, producer_id: int, marker: str | None = None):
        self.offset = offset
        self.key = record.key
        self.value = record.value
        self.headers = record.headers
        self.timestamp_ms = record.timestamp_ms
        self.producer_id = producer_id
        self.marker = marker
        self.aborted = False


class Partition:
    """One partition of one topic; `low` and `high` are its watermarks, `stable` its last stable offset."""

    def __init__(self, configs: dict[str, str]):
        self.configs = configs
        self.entries: list[Entry] = []
        self.low = 0
        self.high = 0
        self.open: dict[int, list[Entry]] = {}  # records of transactions that have no marker yet, by producer
        self._epochs: dict[int, int] = {}  # the last that wrote, by producer
        self._last: dict[int, tuple[int, int, int]] = {}  # epoch, sequence and offset of the last batch, by producer

    @property
    def stable(self) -> int:
        """The last stable offset: no record before it belongs to an open transaction."""
        return min((entries[0].offset for entries in self.open.values()), default=self.high)

    def append(
        self,
        records: Sequence[NewRecord],
        now_ms: int,
        *,
        producer_id: int = -1,
        epoch: int = -1,
        sequence: int = -1,
        transactional: bool = False,
    ) -> int:
        """Write one batch; the offset of its first record. The same batch a second time changes nothing."""
        if producer_id >= 0:
            if epoch < self._epochs.get(producer_id, -1):
                raise InvalidProducerEpochError(f"epoch {epoch} of producer {producer_id} is old")
            last_epoch, last_sequence, last_offset = self._last.get(producer_id, (-1, -1, -1))
            if (epoch, sequence) == (last_epoch, last_sequence):
                return last_offset
            expected = last_sequence + 1 if epoch == last_epoch else 0
            if last_epoch >= 0 and sequence != expected:
                raise OutOfOrderSequenceNumberError(f"batch {sequence} after {last_sequence}")
        self._check(records, now_ms)
        first = self.high
        for record in records:
            entry = Entry(self.high, record, producer_id)
            self.entries.append(entry)
            self.high += 1
            if transactional:
                self.open.setdefault(producer_id, []).append(entry)
        if producer_id >= 0:
            self._epochs[producer_id] = epoch
            self._last[producer_id] = (epoch, sequence, first)
        return first

    def _check(self, records: Sequence[NewRecord], now_ms: int) -> None:
        size_max = int(self.configs.get("max.message.bytes", "1048588"))
        ahead_ms = int(self.configs.get("message.timestamp.after.max.ms", "3600000"))
        compacted = "compact" in self.configs.get("cleanup.policy", "delete")
        if int(self.configs.get("min.insync.replicas", "1")) > 1:
            raise NotEnoughReplicasError("there is one replica")
        if sum(record.size - RECORD_OVERHEAD for record in records) + RECORD_OVERHEAD > size_max:
            raise MessageSizeTooLargeError("the batch is larger than max.message.bytes")
        if any(record.timestamp_ms > now_ms + ahead_ms for record in records):
            raise InvalidTimestampError("a record of the batch is too far in the future")
        if compacted and any(record.key is None for record in records):
            raise InvalidRecordError("a compacted topic takes no record without a key")

    def mark(self, producer_id: int, epoch: int, commit: bool, now_ms: int) -> None:
        """End a producer's transaction here: its marker takes an offset."""
        entry = Entry(self.high, NewRecord(None, None, (), now_ms), producer_id, "commit" if commit else "abort")
        self.entries.append(entry)
        self.high += 1
        self._epochs[producer_id] = max(epoch, self._epochs.get(producer_id, -1))
        if self._last.get(producer_id, (-1, -1, -1))[0] < epoch:
            self._last[producer_id] = (epoch, -1, -1)
        for written in self.open.pop(producer_id, ()):
            written.aborted = not commit

    def fetch(self, offset: int, count: int, committed: bool) -> tuple[list[Entry], int]:
        """Up to `count` records from `offset` on, and the offset to go on from, past whatever is not shown.

        `committed` hides records of aborted transactions, and all from the last stable offset on.
        """
        if not self.low <= offset <= self.high:
            raise OffsetOutOfRangeError
        end = self.stable if committed else self.high
        found: list[Entry] = []
        for index in range(self._index(offset), len(self.entries)):
            entry = self.entries[index]
            if entry.offset >= end:
                break
            if entry.marker is None and not (committed and entry.aborted):
                found.append(entry)
                if len(found) == count:
                    return found, entry.offset + 1
        return found, max(offset, end)

    def offset_at(self, time_ms: int) -> Entry | None:
        """The first record that was made at a time or later."""
        return next((e for e in self.entries if e.marker is None and e.timestamp_ms >= time_ms), None)

    def delete_before(self, offset: int) -> None:
        """Retention: what lies before an offset is gone; at most up to the high watermark."""
        self.low = max(self.low, min(offset, self.high))
        del self.entries[: self._index(self.low)]

    def compact(self, upto: int | None = None, tombstones: bool = False) -> None:
        """Keep the last committed record of each key, below the last stable offset; aborted ones go.

        `upto` is where the active segment begins, which is never compacted. `tombstones`: deleted keys' records,
        and the markers, have been kept long enough and go too.
        """
        end = self.stable if upto is None else min(upto, self.stable)
        last = {e.key: e.offset for e in self.entries if e.marker is None and not e.aborted and e.offset < end}

        def stays(entry: Any) -> bool:
            if entry.offset >= end:
                return True
            if entry.marker is not None:
                return not tombstones
            if entry.aborted or last[entry.key] != entry.offset:
                return False
            return not (tombstones and entry.value is None)

        self.entries = [entry for entry in self.entries if stays(entry)]

    def _index(self, offset: int) -> int:
        return bisect_left(self.entries, offset, key=lambda entry: entry.offset)
