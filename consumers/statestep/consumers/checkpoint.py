"""What is durable of a partition, and how it goes on from there. Pure: what was found goes in, what to do comes out.

The words. A stream is dirty from the first message applied since its record was last committed: `first_dirty`, an
offset. `redo` of a partition is the smallest of its streams' first_dirty, or where it stands if none is dirty. `next`
is the offset after the last message answered. `sequence` counts the partition's transactions.

A marker is committed with every transaction, and its sequence and writer stand in the metadata of the committed offset,
so the two are known to belong together, and a transaction that failed is known from another's that came in its place.
To go on, the states are read back and the messages from `redo` to `next` applied again, in silence: a step depends on
nothing but the stream's record and the message, so every stream gets its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from statestep.consumers.changelog import Marker
from statestep.consumers.ports import Committed, Identity

Spans = tuple[tuple[int, int], ...]  # [start, stop) of offsets, rising, none empty, none touching
OffsetMismatch = Literal["stop", "marker", "cold", "skip"]
ModelChange = Literal["reject", "cold"]
SemanticsChange = Literal["reject", "cold", "replay"]


class Stop(RuntimeError):
    """A partition cannot go on as it was without a person's word: one sentence that names the ways out."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one partition is."""

    sequence: int  # of its last committed transaction
    next: int  # the offset after the last message answered; what lies below is applied in silence
    position: int  # the next message to apply: below `next` while the partition replays
    redo: int  # where a restore would begin to replay
    epoch: int  # state records of another one are void
    spans: Spans = ()  # which offsets from `redo` to `position` held a message
    owed: int = 0  # messages that a replay has still to meet below `next`

    @property
    def restoring(self) -> bool:
        """Whether messages are still being replayed."""
        return self.owed > 0

    @property
    def unmarked(self) -> bool:
        """Whether `redo` may move up if no stream is dirty: a replay of refused messages alone makes none so."""
        return not self.owed and self.redo < self.position

    def applied(self, offsets: Sequence[int]) -> Progress:
        """The progress after the messages at rising `offsets`. Raises `Stop` if the log is not what it was.

        >>> Progress(sequence=7, next=9, position=5, redo=5, epoch=0, owed=2).applied([5, 8, 9]).spans
        ((5, 6), (8, 10))
        """
        replayed = sum(offset < self.next for offset in offsets) if offsets[0] < self.next else 0
        owed = self.owed - replayed
        if owed < 0 or (owed and replayed < len(offsets)):
            raise Stop(
                f"from offset {self.redo} to {self.next} there are {'more' if owed < 0 else 'fewer'} messages than "
                "were applied before, so states cannot be replayed: the input must keep every message "
                "(cleanup.policy=delete); --on-offset-mismatch cold forgets the states and goes on"
            )
        position = offsets[-1] + 1
        if self.owed and not owed:
            position = max(position, self.next)  # behind the last message there may be transaction marks
        return replace(
            self, position=position, next=max(self.next, position), owed=owed, spans=joined(self.spans, offsets)
        )


class Dirty(NamedTuple):
    """A stream whose record in the changelog is older than its state."""

    first: int  # its first_dirty
    since_s: float  # when that was, on the service's own clock
    stream: bytes  # the engine's key


class Pace(NamedTuple):
    """How fast dirty streams are written."""

    interval_s: float  # the age that `redo` is kept under; 0 writes every dirty stream with every transaction
    records: int  # written with one transaction at most, unless the interval is 0


def joined(spans: Spans, offsets: Sequence[int]) -> Spans:
    """`spans` with rising `offsets` behind them.

    >>> joined(((0, 2),), [2, 3, 7])
    ((0, 4), (7, 8))
    """
    found = list(spans)
    runs = [(offsets[0], offsets[-1] + 1)]
    if offsets[-1] - offsets[0] + 1 != len(offsets):
        runs = [(offset, offset + 1) for offset in offsets]
    for start, stop in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def kept(spans: Spans, redo: int) -> Spans:
    """`spans` from `redo` on."""
    return tuple((max(start, redo), stop) for start, stop in spans if stop > redo)


def due(waiting: Sequence[Dirty], fresh: int, elapsed_s: float, now_s: float, pace: Pace) -> int:
    """How many of a partition's dirty streams to write now, the longest dirty first.

    `waiting` are those of earlier transactions, `fresh` how many more this one makes dirty. A share of all, so that
    each is reached within the interval, and whatever is older than that.

    >>> due([Dirty(0, 0.0, b"a")] * 100, 0, 0.1, 1.0, Pace(10.0, 1000))
    1
    """
    count = len(waiting) + fresh
    if pace.interval_s <= 0:
        return count
    share = int(count * min(elapsed_s / pace.interval_s, 1.0))  # of a handful none: each is written once it is old
    old = next((i for i, dirty in enumerate(waiting) if now_s - dirty.since_s < pace.interval_s), len(waiting))
    return min(max(share, old), len(waiting), pace.records)


def marked(progress: Progress, redo: int) -> Progress:
    """The progress that a transaction makes durable: one sequence on, and no history older than `redo`."""
    assert progress.redo <= redo <= progress.position <= progress.next, (progress, redo)
    return replace(progress, sequence=progress.sequence + 1, redo=redo, spans=kept(progress.spans, redo))


def marker(progress: Progress, identity: Identity, semantics: str, model: str, writer: str) -> Marker:
    """What is written of a partition with each transaction."""
    return Marker(
        sequence=progress.sequence,
        redo=progress.redo,
        next=progress.next,
        epoch=progress.epoch,
        topic_id=identity.topic_id,
        partitions=identity.partitions,
        records=sum(stop - start for start, stop in progress.spans) + progress.owed,
        semantics=semantics,
        model=model,
        writer=writer,
    )


def committed(marker: Marker) -> Committed:
    """What is committed for the group beside the marker: where a reader goes on, and which transaction says so.

    Two writers may number a transaction alike and end it at the same message, with other states in it: of these only
    one counts, and the other must not take it for its own.
    """
    return Committed(marker.next, f"{marker.sequence} {marker.writer}")


class Policies(NamedTuple):
    """What a person has allowed."""

    offset_mismatch: OffsetMismatch = "stop"
    model_change: ModelChange = "reject"
    semantics_change: SemanticsChange = "reject"


@dataclass(frozen=True, slots=True)
class Found:
    """All that is known of a partition when it is assigned."""

    committed: Committed | None
    marker: Marker | None
    epochs: int  # the highest epoch of any state record, -1 if there is none
    bounds: tuple[int, int]  # offsets of the first message kept and of the next to be written
    identity: Identity
    semantics: str
    model: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How a partition goes on."""

    progress: Progress
    cold: bool  # its states are void
    commit: bool  # its marker is to be written before anything is read
    warnings: tuple[str, ...] = ()


def plan(found: Found, policies: Policies, start: Callable[[], int]) -> Plan:
    """Decide how a partition goes on; `start` gives where a new application begins in it. Raises `Stop`."""
    seen, low, high = found.marker, *found.bounds
    if seen is None:
        return _begin(found, policies, start)
    if seen.partitions != found.identity.partitions:
        raise Stop(
            f"the input had {seen.partitions} partitions when its streams began and has {found.identity.partitions} "
            "now, so their keys have moved away from their states; a new --app-id begins anew"
        )
    cold = _next_epoch(seen, found)
    if seen.topic_id != found.identity.topic_id:
        if policies.offset_mismatch == "cold":
            return Plan(_at(cold, start()), cold=True, commit=True, warnings=("the topic is another one: begun anew",))
        raise Stop(
            "the input topic was deleted and made anew since its streams began, so offsets mean other messages; "
            "--on-offset-mismatch cold forgets the states and begins anew"
        )
    offset, warnings = _agreed(found, seen, policies)
    if policies.offset_mismatch == "cold" and offset != seen.next:
        return Plan(_at(cold, offset), cold=True, commit=True, warnings=warnings)
    if seen.model != found.model:
        if policies.model_change == "cold":
            warning = f"the model is {found.model[:12]} and was {seen.model[:12]}: its streams start anew at {offset}"
            return Plan(_at(cold, offset), cold=True, commit=True, warnings=(*warnings, warning))
        raise Stop(
            f"the states were made by model {seen.model[:12]} and this is {found.model[:12]}; "
            "--on-model-change cold forgets them and goes on, a new --app-id leaves them be"
        )
    if seen.semantics != found.semantics and seen.redo < seen.next and policies.semantics_change != "replay":
        if policies.semantics_change == "cold":
            warning = f"settings or releases that decide states have changed: its streams start anew at {offset}"
            return Plan(_at(cold, offset), cold=True, commit=True, warnings=(*warnings, warning))
        raise Stop(
            f"messages {seen.redo} to {seen.next} must be replayed, but a setting, release or machine type that "
            "decides states has changed since; start and stop the former once (a stop by SIGTERM leaves nothing to "
            "replay), or --on-semantics-change: replay takes the difference, cold forgets the states"
        )
    return _go_on(found, seen, offset, policies, warnings, low, high)


def _begin(found: Found, policies: Policies, start: Callable[[], int]) -> Plan:
    """No marker: a new application, or one whose states were lost or never written."""
    progress = Progress(sequence=-1, next=0, position=0, redo=0, epoch=found.epochs + 1)
    if found.committed is None:
        return Plan(_at(progress, start()), cold=found.epochs >= 0, commit=True)
    if policies.offset_mismatch == "cold":
        warning = f"no states go with the committed offset {found.committed.offset}: its streams start anew there"
        return Plan(_at(progress, found.committed.offset), cold=True, commit=True, warnings=(warning,))
    raise Stop(
        f"offset {found.committed.offset} is committed, but there are no states to go with it: the changelog was "
        "deleted, or another program or release committed; --on-offset-mismatch cold starts all streams anew there"
    )


def _agreed(found: Found, seen: Marker, policies: Policies) -> tuple[int, tuple[str, ...]]:
    """Where to go on, by the marker and by what is committed for the group."""
    said = found.committed
    if said is None:
        return seen.next, (f"the group's offset has gone; going on by the changelog, at {seen.next}",)
    if said == committed(seen):
        return seen.next, ()
    if policies.offset_mismatch == "marker":
        return seen.next, (f"offset {said.offset} is passed over for the changelog's {seen.next}",)
    if policies.offset_mismatch == "cold":
        return said.offset, (f"offset {said.offset} is not the changelog's {seen.next}: its streams start anew there",)
    if policies.offset_mismatch == "skip" and said.offset >= seen.next:
        return said.offset, (f"messages {seen.next} to {said.offset} are skipped, states are as they were before",)
    raise Stop(
        f"offset {said.offset} is committed ({f'transaction {said.metadata}' if said.metadata else 'by a tool'}), "
        f"the states go with {seen.next} (transaction {committed(seen).metadata}); choose by --on-offset-mismatch: "
        f"marker goes on at {seen.next}, cold starts all streams anew at {said.offset}"
        + (", skip keeps the states and leaves out what is between" if said.offset > seen.next else "")
    )


def _go_on(
    found: Found, seen: Marker, offset: int, policies: Policies, warnings: tuple[str, ...], low: int, high: int
) -> Plan:
    """The states are good: replay from `redo`, if the messages are still there."""
    lost = f"messages from {seen.redo} on are kept only from {low}" if seen.redo < low else ""
    if not lost and seen.next > high:
        lost = f"the log ends at {high}, before {seen.next}: it was truncated"
    if lost:
        if policies.offset_mismatch == "skip" and seen.redo == seen.next <= low:
            offset, lost = max(low, offset), ""
            warnings = (*warnings, f"messages {seen.next} to {low} were deleted unread")
        elif policies.offset_mismatch == "cold":
            begin = _at(_next_epoch(seen, found), min(max(offset, low), high))
            return Plan(begin, cold=True, commit=True, warnings=(*warnings, f"{lost}: its streams start anew"))
        else:
            skip = "skip keeps the states and goes on with what is there, " if seen.redo == seen.next <= low else ""
            raise Stop(
                f"{lost}, so the streams cannot go on as they were; --on-offset-mismatch: {skip}cold starts them anew"
            )
    progress = Progress(
        sequence=seen.sequence,
        next=seen.next,
        position=seen.redo if seen.records else seen.next,
        redo=seen.redo,
        epoch=seen.epoch,
        owed=seen.records,
    )
    if offset != seen.next and not progress.owed:  # skipped, and nothing to replay first
        progress = replace(progress, next=offset, position=offset, redo=offset)
        return Plan(progress, cold=False, commit=True, warnings=warnings)
    if offset != seen.next:
        raise Stop(
            f"messages {seen.redo} to {seen.next} must be replayed before any can be skipped; start once with "
            "--on-offset-mismatch marker and stop by SIGTERM, then skip"
        )
    return Plan(progress, cold=False, commit=found.committed != committed(seen), warnings=warnings)


def _next_epoch(seen: Marker, found: Found) -> Progress:
    """The progress of a partition whose records so far are void."""
    epoch = max(seen.epoch, found.epochs) + 1
    return Progress(sequence=seen.sequence, next=seen.next, position=seen.next, redo=seen.next, epoch=epoch)


def _at(progress: Progress, offset: int) -> Progress:
    """A progress that begins at `offset`, with nothing to replay."""
    return replace(progress, next=offset, position=offset, redo=offset, spans=(), owed=0)


def oldest(queues: Mapping[int, Sequence[Dirty]], now_s: float) -> float:
    """How long the longest-dirty stream has waited for its snapshot, in seconds; 0 if none waits."""
    return max((now_s - queue[0].since_s for queue in queues.values() if queue), default=0.0)
