"""How a partition's streams are brought back: by replaying its input, outputs suppressed, up to the committed offset.

The offset that a commit holds says up to where outputs were acknowledged. Its metadata says from where states grew:
`first`, the first offset that this application ever applied. Replaying [first, offset) through the one apply path
gives every stream the bits it had, since a step depends on nothing but the stream's record and the message.

The functions here are pure: what was found goes in, what to do comes out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from statestep.consumers.ports import Committed


class Note(msgspec.Struct, frozen=True, omit_defaults=True):
    """What this application writes beside an offset; other tools leave the place empty."""

    first: int  # the first offset ever applied in this partition
    partitions: int  # how many the topic had: with another number keys go elsewhere
    model: str = ""  # the beginning of the model's fingerprint
    v: Literal[1] = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one partition is."""

    first: int  # where its streams' history begins
    resume: int  # records below this were answered before: they are applied, their outputs suppressed
    next: int  # the offset after the last record accounted for

    @property
    def restoring(self) -> bool:
        """Whether records are still being replayed."""
        return self.next < self.resume

    def advanced(self, offset: int) -> Progress:
        """The progress after the record at `offset`."""
        return replace(self, next=offset + 1)


@dataclass(frozen=True, slots=True)
class Restore:
    """What to do with a partition that was assigned."""

    progress: Progress
    commit: bool  # write the starting point down before anything is read
    truncated: bool  # history was deleted before it could be replayed
    warning: str | None = None


class PartitionsChanged(RuntimeError):
    """The input topic has another number of partitions than when its streams began."""


def note(progress: Progress, partitions: int, fingerprint: str) -> Committed:
    """What to commit for a partition.

    >>> note(Progress(first=5, resume=5, next=9), 4, "ab" * 32)
    Committed(offset=9, metadata='{"first":5,"partitions":4,"model":"abababababab"}')
    """
    text = msgspec.json.encode(Note(progress.first, partitions, fingerprint[:12])).decode()
    return Committed(max(progress.next, progress.resume), text)


def restore(
    committed: Committed | None, bounds: tuple[int, int], start: int, partitions: int, fingerprint: str
) -> Restore:
    """Decide where a partition goes on.

    `bounds` are the offsets of the first record kept and of the next to be written; `start` is where a new
    application begins. Nothing committed: begin at `start`, and write that down first, so that a crash before the
    first commit begins there too. An offset that another tool set begins a new history at that offset.

    Raises `PartitionsChanged` where the topic was cut anew since: the streams' keys lie elsewhere now.

    >>> restore(Committed(9, '{"first":5,"partitions":4}'), (0, 20), 0, 4, "").progress
    Progress(first=5, resume=9, next=5)
    """
    low, high = bounds
    if committed is None:
        return Restore(Progress(start, start, start), commit=True, truncated=False)
    if not low <= committed.offset <= high:
        warning = (
            f"the committed offset {committed.offset} is outside of what is kept, {low} to {high}: its streams "
            f"start anew at {low}, and what was deleted unread is lost"
        )
        return Restore(Progress(low, low, low), commit=True, truncated=True, warning=warning)
    try:
        known = msgspec.json.decode(committed.metadata, type=Note)
    except msgspec.DecodeError:
        start = committed.offset
        warning = f"the committed offset {start} was set by another tool or release: its streams start anew there"
        return Restore(Progress(start, start, start), commit=True, truncated=False, warning=warning)
    if known.partitions != partitions:
        raise PartitionsChanged(
            f"the input had {known.partitions} partitions when its streams began and has {partitions} now, so their "
            "keys have moved away from their states; a new --app-id begins anew"
        )
    begin = min(max(known.first, low), committed.offset)  # a tool may have turned the offset back, keeping the note
    warnings = []
    if begin > known.first:
        warnings.append(
            f"history from {known.first} on is kept only from {low}: streams older than that start anew there, "
            "and may predict otherwise than before"
        )
    if known.model and not fingerprint.startswith(known.model):
        warnings.append(f"history was applied by model {known.model}, it is now replayed by {fingerprint[:12]}")
    progress = Progress(begin, committed.offset, begin)
    return Restore(progress, commit=False, truncated=begin > known.first, warning="; ".join(warnings) or None)
