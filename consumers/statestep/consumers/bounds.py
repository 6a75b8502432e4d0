"""How much a transaction may hold, and how one message that no broker takes is found among many.

After a transaction with a refused message, half as many records go into the next, until one fails alone. First what
tells of an event is left out, which may be what was refused and costs no answer; then the answer becomes a dead letter,
and if that is refused too, one without the record's own bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from statestep.consumers.checkpoint import Progress, Stop
from statestep.consumers.ports import Message, Record

BARE = 2  # how often an answer is refused before even its dead letter goes without the record's own bytes


class Bounds:
    """What refusals have taught.

    >>> bounds = Bounds(8, 1 << 20)
    >>> bounds.refused([Record(0, offset, -1, b"k", b"") for offset in range(8)], [], 500)
    >>> bounds.records, bounds.searching
    (4, True)
    """

    def __init__(self, records: int, size: int):
        """At most `records` in one transaction as long as none is refused, of `size` bytes, or one that is larger."""
        self.records = self._most = records
        self._size = size
        # By partition and offset, how often the answer was refused; 0 where it may have been an event's message.
        self.undeliverable: dict[tuple[int, int], int] = {}

    @property
    def searching(self) -> bool:
        """Whether a refused message is being looked for, or was found a moment ago."""
        return self.records < self._most or bool(self.undeliverable)

    def cut(self, waiting: list[Record]) -> list[Record]:
        """The records that go into the next transaction."""
        chosen = waiting[: self.records]
        sizes = accumulate(len(record.value or b"") for record in chosen)
        return chosen[: max(bisect_right(list(sizes), self._size), 1)]

    def refused(self, records: Sequence[Record], messages: Sequence[Message], state_bytes: int) -> None:
        """A transaction of `messages`, which answer `records`, held one that was refused. Raises `Stop` at the end."""
        if len(records) > 1:
            self.records = len(records) // 2
            return
        if not records:
            raise Stop(
                f"the broker refuses the states of a stream: a record of {state_bytes:,} bytes; raise "
                "max.message.bytes of the changelog topic"
            )
        at = (records[0].partition, records[0].offset)
        first = 0 if any(message.event for message in messages) else 1
        self.undeliverable[at] = max(self.undeliverable.get(at, -1) + 1, first)
        if self.undeliverable[at] > BARE:
            raise Stop(
                f"the broker refuses even a bare dead letter for partition {at[0]}, offset {at[1]}, or a state that "
                f"goes with it: a record of {state_bytes:,} bytes; raise max.message.bytes of the dead letters' and "
                "the changelog topic"
            )

    def taken(self, running: Mapping[int, Progress]) -> None:
        """A transaction counts: the next may hold twice as many records."""
        self.records = min(self.records * 2, self._most)
        if self.undeliverable:
            self.undeliverable = {(p, o): n for (p, o), n in self.undeliverable.items() if o >= running[p].next}

    def forget(self, partition: int) -> None:
        """A partition has gone to others."""
        self.undeliverable = {at: n for at, n in self.undeliverable.items() if at[0] != partition}
