"""Where a partition goes on after a restart: every case of what was committed and what is still kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statestep.consumers.checkpoint import PartitionsChanged, Progress, note, restore
from statestep.consumers.ports import Committed

FINGERPRINT = "0123456789ab" + "c" * 52

# committed offset, its metadata, (low, high), start → first, resume, next, whether to commit, truncated, warning
CASES = [
    (None, "", (0, 0), 0, (0, 0, 0), True, False, None),  # a new application on an empty topic
    (None, "", (5, 20), 5, (5, 5, 5), True, False, None),  # … at the earliest record kept
    (None, "", (5, 20), 20, (20, 20, 20), True, False, None),  # … at the latest
    (9, '{"first":0,"partitions":4}', (0, 20), 0, (0, 9, 0), False, False, None),
    (9, '{"first":9,"partitions":4}', (0, 20), 0, (9, 9, 9), False, False, None),  # nothing was applied yet
    (9, '{"first":5,"partitions":4}', (5, 9), 0, (5, 9, 5), False, False, None),  # up to date, all history kept
    (9, '{"first":5,"partitions":4}', (7, 20), 0, (7, 9, 7), False, True, "history from 5 on is kept only from 7"),
    (9, '{"first":5,"partitions":4}', (9, 20), 0, (9, 9, 9), False, True, "kept only from 9"),  # none of it is kept
    (9, '{"first":5,"partitions":4}', (10, 20), 0, (10, 10, 10), True, True, "9 is outside of what is kept, 10 to 20"),
    (30, '{"first":5,"partitions":4}', (0, 20), 0, (0, 0, 0), True, True, "30 is outside of what is kept, 0 to 20"),
    (9, '{"first":5,"partitions":4,"model":"0123456789ab"}', (0, 20), 0, (5, 9, 5), False, False, None),
    (9, '{"first":5,"partitions":4,"model":"ffffffffffff"}', (0, 20), 0, (5, 9, 5), False, False, "by model ffff"),
    (9, '{"first":5,"partitions":4,"later":true}', (0, 20), 0, (5, 9, 5), False, False, None),
    (9, '{"first":12,"partitions":4}', (0, 20), 0, (9, 9, 9), False, False, None),  # turned back by a tool
    (9, "", (0, 20), 0, (9, 9, 9), True, False, "9 was set by another tool"),
    (9, "somebody's text", (0, 20), 0, (9, 9, 9), True, False, "set by another tool"),
    (9, '{"first":"5"}', (0, 20), 0, (9, 9, 9), True, False, "set by another tool"),
    (9, '{"first":5,"partitions":4,"v":2}', (0, 20), 0, (9, 9, 9), True, False, "another tool or release"),
    (20, "", (0, 20), 0, (20, 20, 20), True, False, "set by another tool"),
]


@pytest.mark.parametrize(("offset", "metadata", "bounds", "start", "progress", "commit", "truncated", "warning"), CASES)
def test_restore(
    offset: int | None,
    metadata: str,
    bounds: tuple[int, int],
    start: int,
    progress: tuple[int, int, int],
    commit: bool,
    truncated: bool,
    warning: str | None,
) -> None:
    """Each case is a line of the table above."""
    committed = None if offset is None else Committed(offset, metadata)
    plan = restore(committed, bounds, start, 4, FINGERPRINT)
    assert plan.progress == Progress(*progress)
    assert (plan.commit, plan.truncated) == (commit, truncated)
    assert warning in plan.warning if warning and plan.warning else plan.warning is warning


def test_a_topic_that_was_cut_anew_stops_the_service() -> None:
    """With another number of partitions the keys lie elsewhere; both numbers and the way out are told."""
    with pytest.raises(PartitionsChanged, match=r"had 4 partitions .* has 6 now.*a new --app-id begins anew"):
        restore(Committed(9, '{"first":5,"partitions":4}'), (0, 20), 0, 6, FINGERPRINT)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_what_is_noted_is_restored(first: int, applied: int, kept_more: int) -> None:
    """A restart right after a commit replays exactly [first, next), and a note survives any number of restarts."""
    progress = Progress(first, first, first + applied)
    for _ in range(3):
        committed = note(progress, 4, FINGERPRINT)
        assert committed.offset == first + applied
        plan = restore(committed, (0, first + applied + kept_more), 0, 4, FINGERPRINT)
        assert plan.progress == Progress(first, first + applied, first)
        assert plan.warning is None
        progress = plan.progress


def test_progress_counts_up_to_the_live_records() -> None:
    """It is restoring below `resume`, and not from there on; a note of a partition in restoration keeps its offset."""
    progress = Progress(first=2, resume=4, next=2)
    assert progress.restoring
    progress = progress.advanced(2)
    assert progress.restoring
    assert note(progress, 1, FINGERPRINT).offset == 4
    progress = progress.advanced(3)
    assert not progress.restoring
    progress = progress.advanced(7)  # offsets may have holes
    assert progress == Progress(2, 4, 8)
    assert note(progress, 1, FINGERPRINT) == Committed(8, '{"first":2,"partitions":1,"model":"0123456789ab"}')
