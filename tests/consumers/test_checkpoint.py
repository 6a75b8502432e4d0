"""What is durable of a partition, and every case of how it goes on: the table of plans, and the laws of the pace."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestep.consumers import checkpoint
from statestep.consumers.changelog import Marker
from statestep.consumers.checkpoint import Dirty, Found, Pace, Policies, Progress, Stop, due, joined, kept, marked, plan
from statestep.consumers.ports import Committed, Identity

SEEN = Marker(7, 100, 117, epoch=2, topic_id="t", partitions=4, records=17, semantics="s", model="m" * 64, writer="a")
CLEAN = Marker(7, 117, 117, epoch=2, topic_id="t", partitions=4, records=0, semantics="s", model="m" * 64, writer="a")


def found(marker: Marker | None, committed: Committed | None, **change: Any) -> Found:
    """What there is of a partition whose log holds everything, but for what is said."""
    usual: dict[str, Any] = {
        "epochs": -1 if marker is None else marker.epoch,
        "bounds": (0, 500),
        "identity": Identity("t", 4, True),
        "semantics": "s",
        "model": "m" * 64,
    }
    return Found(committed, marker, **(usual | change))


AGREED, NONE = Committed(117, "7 a"), Policies()
COLD, MARKER, SKIP = (Policies(offset_mismatch=choice) for choice in ("cold", "marker", "skip"))
GONE = {"bounds": (101, 500)}
OTHER = {"model": "x" * 64}
CHANGED = {"semantics": "else"}
# What is found, what is allowed → sequence, next, position, redo, epoch, owed; cold; commit; a warning's words.
PLANS = {
    "a new application": (found(None, None), NONE, (-1, 5, 5, 5, 0, 0), False, True, ""),
    "states of one that was never marked": (found(None, None, epochs=3), NONE, (-1, 5, 5, 5, 4, 0), True, True, ""),
    "offset without states, cold": (found(None, Committed(9, "")), COLD, (-1, 9, 9, 9, 0, 0), True, True, "anew there"),
    "all agree": (found(SEEN, AGREED), NONE, (7, 117, 100, 100, 2, 17), False, False, ""),
    "all agree, nothing to replay": (found(CLEAN, AGREED), NONE, (7, 117, 117, 117, 2, 0), False, False, ""),
    "the group has no offset": (found(SEEN, None), NONE, (7, 117, 100, 100, 2, 17), False, True, "offset has gone"),
    "another offset, marker": (
        found(SEEN, Committed(50, "")), MARKER, (7, 117, 100, 100, 2, 17), False, True, "50 is passed over",
    ),
    "another offset, cold": (
        found(SEEN, Committed(50, "")), COLD, (7, 50, 50, 50, 3, 0), True, True, "50 is not the changelog's 117",
    ),
    "a later offset, skip": (
        found(CLEAN, Committed(130, "")), SKIP, (7, 130, 130, 130, 2, 0), False, True, "117 to 130 are skipped",
    ),
    "history is gone, cold": (found(SEEN, AGREED, **GONE), COLD, (7, 117, 117, 117, 3, 0), True, True, "start anew"),
    "unread messages are gone, skip": (
        found(CLEAN, AGREED, bounds=(120, 500)), SKIP, (7, 120, 120, 120, 2, 0), False, True, "117 to 120 were deleted",
    ),
    "the log was cut, cold": (
        found(SEEN, AGREED, bounds=(0, 90)), COLD, (7, 90, 90, 90, 3, 0), True, True, "was truncated",
    ),
    "topic made anew, cold": (
        found(SEEN, AGREED, identity=Identity("u", 4, True)), COLD, (7, 5, 5, 5, 3, 0), True, True, "another one",
    ),
    "another model, cold": (
        found(SEEN, AGREED, **OTHER), Policies(model_change="cold"), (7, 117, 117, 117, 3, 0), True, True, "xx and was",
    ),
    "a later epoch than the marker's": (
        found(SEEN, AGREED, epochs=5, **OTHER), Policies(model_change="cold"), (7, 117, 117, 117, 6, 0), True, True, "",
    ),
    "other settings, nothing to replay": (
        found(CLEAN, AGREED, **CHANGED), NONE, (7, 117, 117, 117, 2, 0), False, False, "",
    ),
    "other settings, replay": (
        found(SEEN, AGREED, **CHANGED), Policies(semantics_change="replay"),
        (7, 117, 100, 100, 2, 17), False, False, "",
    ),
    "other settings, cold": (
        found(SEEN, AGREED, **CHANGED), Policies(semantics_change="cold"), (7, 117, 117, 117, 3, 0), True, True, "anew",
    ),
}  # fmt: skip

STOPS = {
    "offset without states": (found(None, Committed(9, "")), NONE, "offset 9 is committed, but there are no states"),
    "another offset": (found(SEEN, Committed(50, "")), NONE, r"offset 50 is committed \(by a tool\).* 117 \(transact"),
    "another transaction": (found(SEEN, Committed(117, "8 a")), NONE, r"117 is committed \(transaction 8 a\)"),
    "another writer's": (found(SEEN, Committed(117, "7 b")), NONE, r"transaction 7 b\), .* 117 \(transaction 7 a\)"),
    "an earlier offset cannot be skipped to": (found(CLEAN, Committed(50, "")), SKIP, "offset 50 is committed"),
    "skipping before a replay": (found(SEEN, Committed(130, "")), SKIP, "100 to 117 must be replayed before any can"),
    "history is gone": (found(SEEN, AGREED, **GONE), NONE, "from 100 on are kept only from 101.*cold starts them anew"),
    "history is gone, skip": (found(SEEN, AGREED, **GONE), SKIP, "from 100 on are kept only from 101"),
    "unread messages are gone": (found(CLEAN, AGREED, bounds=(120, 500)), NONE, "skip keeps the states"),
    "the log was cut": (found(CLEAN, AGREED, bounds=(0, 90)), NONE, "the log ends at 90, before 117: it was truncated"),
    "topic made anew": (found(SEEN, AGREED, identity=Identity("u", 4, True)), NONE, "deleted and made anew"),
    "topic made anew, marker": (found(SEEN, AGREED, identity=Identity("u", 4, True)), MARKER, "deleted and made anew"),
    "other partitions": (found(SEEN, AGREED, identity=Identity("t", 6, True)), COLD, "had 4 partitions .* has 6 now"),
    "another model": (found(SEEN, AGREED, **OTHER), NONE, "by model mmmmmmmmmmmm and this is xxxxxxxxxxxx"),
    "other settings": (found(SEEN, AGREED, **CHANGED), NONE, "messages 100 to 117 must be replayed, but a setting"),
}


@pytest.mark.parametrize("case", PLANS)
def test_how_a_partition_goes_on(case: str) -> None:
    """Each line of the table: what is found and allowed, and how far the partition then is."""
    what, allowed, progress, cold, commit, warning = PLANS[case]
    chosen = plan(what, allowed, lambda: 5)
    held = chosen.progress
    assert (held.sequence, held.next, held.position, held.redo, held.epoch, held.owed) == progress
    assert (chosen.cold, chosen.commit) == (cold, commit)
    assert bool(chosen.warnings) >= bool(warning)
    assert warning in " ".join(chosen.warnings)


@pytest.mark.parametrize("case", STOPS)
def test_what_a_person_has_to_decide(case: str) -> None:
    """Each line of the table: one sentence that names what was found."""
    what, allowed, sentence = STOPS[case]
    with pytest.raises(Stop, match=sentence):
        plan(what, allowed, lambda: 5)


def test_the_start_is_asked_for_only_where_it_is_needed() -> None:
    """A time as a start costs the broker a look, and must not move an application that has begun."""
    plan(found(SEEN, AGREED), NONE, lambda: pytest.fail("it was asked"))


class TestProgress:
    """How far a partition is, after each batch."""

    def test_live_messages_move_next(self) -> None:
        """Offsets may have gaps: what is counted is what was there."""
        progress = Progress(7, 10, 10, 8, 0, ((8, 10),)).applied([10, 11, 14])
        assert (progress.next, progress.position, progress.redo) == (15, 15, 8)
        assert progress.spans == ((8, 12), (14, 15))
        assert not progress.restoring

    def test_replayed_ones_do_not(self) -> None:
        """`next` stays until the last that is owed; then it goes on behind it, transaction marks included."""
        progress = Progress(7, 20, 10, 10, 0, owed=3).applied([10, 12])
        assert (progress.next, progress.position, progress.owed, progress.restoring) == (20, 12 + 1, 1, True)
        progress = progress.applied([15])
        assert (progress.next, progress.position, progress.owed, progress.restoring) == (20, 20, 0, False)
        assert progress.spans == ((10, 11), (12, 13), (15, 16))

    @pytest.mark.parametrize(
        ("owed", "offsets", "words"),
        [(1, [10, 11], "more"), (3, [10, 11, 20], "fewer"), (1, [20], "fewer"), (0, [19], "more")],
    )
    def test_a_log_that_is_not_what_it_was_stops(self, owed: int, offsets: list[int], words: str) -> None:
        """More messages below `next`, or fewer, than were applied before: states cannot be replayed."""
        with pytest.raises(Stop, match=f"from offset 10 to 20 there are {words} messages than were applied before"):
            Progress(7, 20, 10, 10, 0, owed=owed).applied(offsets)

    @given(st.lists(st.integers(0, 60), unique=True).map(sorted), st.integers(0, 70))
    def test_spans_are_the_set_of_offsets(self, offsets: list[int], redo: int) -> None:
        """Cut into batches anyhow, the spans are runs of just these offsets; `kept` leaves those from `redo` on."""
        spans: checkpoint.Spans = ()
        for begin in range(0, len(offsets), 3):
            spans = joined(spans, offsets[begin : begin + 3])
        for held, expected in ((spans, offsets), (kept(spans, redo), [o for o in offsets if o >= redo])):
            assert [offset for start, stop in held for offset in range(start, stop)] == expected
            assert all(before[1] < after[0] for before, after in pairwise(held))

    @given(st.lists(st.integers(1, 5), min_size=1, max_size=30), st.data())
    def test_what_is_marked_is_replayed_and_no_more(self, gaps: list[int], data: st.DataObject) -> None:
        """A marker of any moment, and the log: the plan owes exactly the messages from redo to next, and then ends."""
        offsets = [sum(gaps[: i + 1]) for i in range(len(gaps))]
        progress = Progress(0, 0, 0, 0, 0).applied(offsets)
        redo = data.draw(st.sampled_from([0, *offsets, progress.position]))
        progress = marked(progress, redo)
        noted = checkpoint.marker(progress, Identity("t", 4, True), "s", "m" * 64, "a")
        again = plan(found(noted, checkpoint.committed(noted)), NONE, lambda: 0)
        owed = [offset for offset in offsets if offset >= redo]
        assert (again.progress.owed, again.commit, again.progress.sequence) == (len(owed), False, 1)
        assert again.progress.position == (redo if owed else progress.next)
        if owed:
            cut = data.draw(st.integers(0, len(owed) - 1))
            halfway = again.progress.applied(owed[:cut]) if cut else again.progress
            assert not cut or marked(halfway, redo).next == progress.next
            ended = halfway.applied(owed[cut:])
            assert (ended.next, ended.owed, ended.spans) == (progress.next, 0, kept(progress.spans, redo))


class TestPace:
    """Which dirty streams go with a transaction."""

    QUEUES = st.lists(st.floats(0, 30), max_size=50).map(
        lambda ages: [Dirty(i, 100.0 - age, b"%d" % i) for i, age in enumerate(sorted(ages, reverse=True))]
    )

    @given(QUEUES, st.integers(0, 20), st.floats(0, 20), st.floats(0.01, 20), st.integers(0, 60))
    def test_nothing_grows_older_than_the_interval(
        self, waiting: list[Dirty], fresh: int, elapsed_s: float, interval_s: float, records: int
    ) -> None:
        """What is older than the interval goes, up to the bound, and of the others a share."""
        count = due(waiting, fresh, elapsed_s, 100.0, Pace(interval_s, records))
        assert 0 <= count <= min(len(waiting), records)
        assert count == records or all(100.0 - dirty.since_s < interval_s for dirty in waiting[count:])
        share = int((len(waiting) + fresh) * min(elapsed_s / interval_s, 1.0))
        assert count >= min(share, len(waiting), records)

    @given(QUEUES, st.integers(0, 20), st.integers(0, 60))
    def test_an_interval_of_nothing_writes_all(self, waiting: list[Dirty], fresh: int, records: int) -> None:
        """Each dirty stream with each transaction, those that it makes dirty itself too, whatever the bound."""
        assert due(waiting, fresh, 0.0, 100.0, Pace(0.0, records)) == len(waiting) + fresh

    @given(st.lists(st.integers(0, 12), min_size=50, max_size=200), st.sampled_from([0.05, 0.1, 0.3]))
    def test_redo_is_kept_under_the_interval(self, arrivals: list[int], step_s: float) -> None:
        """Whatever comes when, each stream is written within the interval and one transaction more."""
        waiting: list[Dirty] = []
        now_s, interval_s = 0.0, 2.0
        for fresh in arrivals:
            now_s += step_s
            del waiting[: due(waiting, fresh, step_s, now_s, Pace(interval_s, 10**6))]
            assert not waiting or now_s - waiting[0].since_s < interval_s
            waiting += [Dirty(0, now_s, b"")] * fresh
        for _ in range(int(interval_s / step_s) + 2):
            now_s += step_s
            del waiting[: due(waiting, 0, step_s, now_s, Pace(interval_s, 10**6))]
        assert not waiting, "it must come to an end"

    def test_a_handful_is_written_no_more_often_than_the_interval_asks(self) -> None:
        """Three streams that move all the time are written once in each ten seconds."""
        waiting, written = [Dirty(0, 0.0, b"%d" % i) for i in range(3)], 0
        for turn in range(1, 601):
            count = due(waiting, 0, 0.1, turn / 10, Pace(10.0, 10**6))
            waiting, written = waiting[count:] + [Dirty(0, turn / 10, b"")] * count, written + count
        assert written == 3 * 6

    def test_the_work_is_spread_over_the_interval(self) -> None:
        """Of a hundred thousand streams at once the first transactions take a hundredth each, not all at the end."""
        waiting = [Dirty(i, 0.0, b"") for i in range(100_000)]
        assert due(waiting, 0, 0.1, 0.1, Pace(10.0, 10**6)) == 1000

    def test_the_age_is_that_of_the_longest_dirty(self) -> None:
        """Over all partitions; nothing where none waits."""
        queues = {0: [Dirty(0, 5.0, b""), Dirty(1, 9.0, b"")], 1: [Dirty(0, 3.0, b"")], 2: []}
        assert checkpoint.oldest(queues, 10.0) == 7.0
        assert checkpoint.oldest({0: []}, 10.0) == 0.0
