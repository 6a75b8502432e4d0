"""What goes into a transaction: a slice of the dirty streams, the longest dirty first, and markers for what moves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from statestep.consumers.batch import Batch
from statestep.consumers.bounds import BARE, Bounds
from statestep.consumers.changelog import MARKER, STREAM, StateCodec, decode_marker
from statestep.consumers.checkpoint import Dirty, Pace, Progress, Stop
from statestep.consumers.codec import Decoder, Encoder, Fields
from statestep.consumers.pipeline import Pipeline
from statestep.consumers.ports import Committed, Identity, Message, Record
from statestep.consumers.transaction import Composer, Limits, Turn
from statestep.runtime import Engine

from .runs import MODEL

LOG = Identity("t", 2, True)
NEW = Progress(4, 0, 0, 0, 3)
NOTHING, ALL = Pace(1e9, 0), Pace(0.0, 0)


class Run:
    """A pipeline and a composer over one partition, with what the service keeps between transactions."""

    def __init__(self, *, keeps_states: bool = True):
        self.engine = Engine(MODEL, 100)
        encoder = Encoder(MODEL.contract, MODEL.fingerprint, "sensors")
        self.pipeline = Pipeline(self.engine, Decoder(MODEL.contract, Fields()), encoder)
        self.composer = Composer(
            self.engine, StateCodec(MODEL.contract), "w", keeps_states=keeps_states, semantics="s", model="m"
        )
        self.progress, self.waiting = NEW, list[Dirty]()

    def turn(self, *rows: tuple[bytes, bytes | None], pace: Pace, elapsed_s: float = 1.0, counts: bool = True) -> Turn:
        """One transaction with records of these keys and values; with `counts` it becomes the streams' own."""
        records = [Record(0, self.progress.position + i, -1, key, value) for i, (key, value) in enumerate(rows)]
        batch = self.pipeline.advance(records, self.pipeline.decode(records), {0: self.progress})
        turn = self.compose(records, batch, pace, elapsed_s)
        if counts:
            self.engine.clean(turn.streams)
            self.engine.commit()
            self.progress = turn.after.get(0, self.progress)
            left = batch.dirtied.get(0, [])[turn.fresh.get(0, 0) :]
            self.waiting = self.waiting[turn.written.get(0, 0) :] + [Dirty(o, 0.0, stream) for o, stream in left]
        else:
            self.engine.rollback()
        return turn

    def compose(self, records: list[Record], batch: Batch, pace: Pace, elapsed_s: float) -> Turn:
        return self.composer.compose(
            records,
            batch,
            self.pipeline.encode(batch),
            running={0: self.progress},
            opening={},
            waiting={0: self.waiting},
            identity=LOG,
            elapsed_s=elapsed_s,
            now_s=1.0,
            pace=pace,
        )


def keys(turn: Turn) -> list[bytes]:
    """The streams whose states a transaction holds, without its marker, which must come last."""
    *states, marker = turn.transaction.states
    assert marker.key == MARKER
    return [state.key.removeprefix(STREAM) for state in states]


def marker(turn: Turn) -> tuple[int, int, int, int, int]:
    """Its sequence, redo, next, epoch and records."""
    found = decode_marker(turn.transaction.states[-1].value or b"")
    assert turn.transaction.offsets[0] == Committed(found.next, f"{found.sequence} w")
    assert (found.topic_id, found.partitions, found.semantics, found.model, found.writer) == ("t", 2, "s", "m", "w")
    return found.sequence, found.redo, found.next, found.epoch, found.records


ROWS = [(b"a", b"[1, 2]"), (b"b", b"[3, 4]"), (b"a", b"[5, 6]"), (b"c", b"[7, 8]")]


def test_with_an_interval_of_nothing_every_dirty_stream_goes_along() -> None:
    """Those that the transaction itself makes dirty too, so `redo` is `next`, and there is nothing to replay."""
    run = Run()
    turn = run.turn(*ROWS, pace=ALL)
    assert keys(turn) == [b"a", b"b", b"c"]
    assert marker(turn) == (5, 4, 4, 3, 0)
    assert run.engine.dirty() == []
    assert (run.waiting, len(turn.transaction.messages)) == ([], 4)


def test_a_slice_of_the_longest_dirty_moves_redo() -> None:
    """First none, then one after the other: `redo` is the first_dirty of the next one that is left."""
    run = Run()
    assert marker(run.turn(*ROWS, pace=NOTHING)) == (5, 0, 4, 3, 4)
    found = [run.turn((b"a", b"[9, 9]"), pace=Pace(1.0, 1)) for _ in range(3)]
    assert [keys(turn) for turn in found] == [[b"a"], [b"b"], [b"c"]]
    # a was written with the first of them, offset 4 in it, and is dirty again by the second, at 5.
    assert [marker(turn) for turn in found] == [(6, 1, 5, 3, 4), (7, 3, 6, 3, 3), (8, 5, 7, 3, 2)]
    turn = run.turn(pace=Pace(1.0, 1))
    assert (keys(turn), marker(turn)) == ([b"a"], (9, 7, 7, 3, 0))
    assert run.turn(pace=Pace(1.0, 1)).transaction.offsets == {}


def test_the_bound_holds_whatever_is_due() -> None:
    """Of three that are due two go."""
    run = Run()
    run.turn(*ROWS, pace=NOTHING)
    assert keys(run.turn(pace=Pace(1e-6, 2))) == [b"a", b"b"]


def test_a_stream_that_has_ended_leaves_a_tombstone() -> None:
    """It stays dirty until that is written; then it is forgotten. One that comes again is alive."""
    run = Run()
    run.turn((b"a", b"[1, 2]"), (b"b", b"[1, 2]"), (b"a", None), (b"b", None), (b"b", b"[3, 4]"), pace=NOTHING)
    assert sorted(run.engine.keys()) == [b"0/a", b"0/b"]
    turn = run.turn(pace=ALL)
    values = {state.key: state.value for state in turn.transaction.states}
    assert values[b"sa"] is None
    assert values[b"sb"] is not None
    assert run.engine.keys() == [b"0/b"]
    assert int(run.engine.read([b"0/b"]).step[0]) == 1


def test_a_transaction_that_is_taken_back_leaves_all_as_dirty_as_it_was() -> None:
    """Then the same records give the same transaction, byte for byte."""
    run = Run()
    run.turn(*ROWS, pace=NOTHING)
    first = run.turn((b"b", b"[9, 9]"), (b"c", None), pace=ALL, counts=False)
    assert run.engine.first_dirty([b"0/a", b"0/b", b"0/c"]).tolist() == [0, 1, 3]
    assert run.turn((b"b", b"[9, 9]"), (b"c", None), pace=ALL).transaction == first.transaction


def test_a_partition_that_opens_is_marked_though_nothing_moves() -> None:
    """Where an application begins is written before anything is read; a partition at rest is left out."""
    run = Run()
    batch = run.pipeline.advance([], [], {})
    turn = run.composer.compose(
        [],
        batch,
        [],
        running={0: NEW},
        opening={1: Progress(-1, 7, 7, 7, 0)},
        waiting={0: [], 1: []},
        identity=LOG,
        elapsed_s=1.0,
        now_s=1.0,
        pace=ALL,
    )
    assert turn.transaction.offsets == {1: Committed(7, "0 w")}
    assert [(state.partition, state.key) for state in turn.transaction.states] == [(1, MARKER)]
    assert (turn.after[0], turn.after[1].sequence) == (NEW, 0)


def test_without_a_place_for_states_only_the_offsets_move() -> None:
    """A run over files without a store: no states, no markers."""
    turn = Run(keeps_states=False).turn(*ROWS, pace=ALL)
    assert (list(turn.transaction.states), turn.transaction.offsets) == ([], {0: Committed(4, "5 w")})


@pytest.mark.parametrize(
    ("how", "pace"),
    [
        ({}, Pace(10.0, 41)),
        ({"at_once": True}, Pace(0.0, 41)),
        ({"ending": True}, Pace(1e-6, 41)),
        ({"searching": True}, Pace(10.0, 0)),  # messages alone
        ({"searching": True, "idle": True}, Pace(10.0, 1)),  # one state alone
    ],
)
def test_the_pace_is_what_the_moment_asks_for(how: dict[str, bool], pace: Pace) -> None:
    """Bytes become a number of states; a signal to stop, a compacted input and a refusal change it."""
    usual = {"at_once": False, "ending": False, "searching": False, "idle": False}
    assert Limits(snapshot_bytes=4100).pace(100, **(usual | how)) == pace
    assert Limits(snapshot_bytes=1).pace(100, **usual).records == 1


class TestBounds:
    """Finding the one message that no broker takes."""

    @staticmethod
    def records(count: int) -> Sequence[Record]:
        return [Record(0, 10 + i, -1, b"k", b"") for i in range(count)]

    def test_halves_until_it_is_alone_and_grows_again(self) -> None:
        """At most a logarithm of refusals; the answer is marked, and twice as many go after each that counts."""
        bounds = Bounds(100, 10**9)
        sizes = []
        while not bounds.undeliverable:
            sizes.append(bounds.records)
            bounds.refused(self.records(bounds.records), [], 0)
        assert sizes == [100, 50, 25, 12, 6, 3, 1]
        assert bounds.undeliverable == {(0, 10): 1}
        bounds.taken({0: Progress(0, 11, 11, 0, 0)})
        assert (bounds.records, bounds.undeliverable) == (2, {})
        for _ in range(6):
            bounds.taken({0: Progress(0, 11, 11, 0, 0)})
        assert (bounds.records, bounds.searching) == (100, False)

    def test_an_answer_is_marked_until_it_has_gone(self) -> None:
        """What lies behind `next` of its partition is kept, and forgotten with the partition."""
        bounds = Bounds(1, 10**9)
        bounds.refused(self.records(1), [], 0)
        bounds.taken({0: Progress(0, 10, 10, 0, 0)})
        assert bounds.undeliverable == {(0, 10): 1}
        bounds.forget(1)
        assert bounds.searching
        bounds.forget(0)
        assert not bounds.searching

    def test_even_a_bare_dead_letter_that_is_refused_stops(self) -> None:
        """There is nothing smaller; the sentence names the place. A state that is refused names the topic's setting."""
        bounds = Bounds(1, 10**9)
        for _ in range(BARE):
            bounds.refused(self.records(1), [], 0)
        with pytest.raises(Stop, match="refuses even a bare dead letter for partition 0, offset 10"):
            bounds.refused(self.records(1), [], 0)
        with pytest.raises(Stop, match=r"a record of 2,000,000 bytes; raise max\.message\.bytes of the changelog"):
            bounds.refused([], [], 2_000_000)

    def test_what_tells_of_an_event_is_given_up_before_an_answer_is(self) -> None:
        """Refused with it: marked by 0. Refused without it too: the answer is, as it would have been at once."""
        bounds, event = Bounds(1, 10**9), Message(False, 0, b"k", b"{}", (), event=True)
        marks = []
        for messages in ([event], [], []):
            bounds.refused(self.records(1), messages, 0)
            marks.append(bounds.undeliverable[0, 10])
        assert marks == [0, 1, BARE]
        assert bounds.searching
