"""How good anomaly scores and alarms are against labels: areas under curves, and events found, missed and false.

No point-adjusted F1. It counts a whole labelled event as found once a single row of it is alarmed, so that alarms
thrown at random reach it sooner or later in every long event: random scores beat trained detectors by that measure
(Kim et al., "Towards a Rigorous Evaluation of Time-Series Anomaly Detection", AAAI 2022). Here an event counts once,
however long it is, and so does an alarm; or every row counts by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, Any]
Event = tuple[int, int]  # rows [start, end)

THRESHOLDS = 250  # of a VUS curve, at evenly spaced ranks of the score; the published figures have as many
WEEK_SECONDS = 7 * 24 * 3600.0


def auc_pr(label: ArrayLike, score: ArrayLike) -> float:
    """The average precision of `score` [T] for `label` (bool or 0 and 1) [T]: from 0 to 1, about the base rate by luck.

    Σ (Rₙ − Rₙ₋₁) Pₙ with precision P and recall R at every distinct score as the threshold, as scikit-learn's
    `average_precision_score` has it: rows of the same score are alarmed together, and nothing is interpolated.
    Raises `ValueError` for lengths that differ, a label with one kind of row only, or a score that is not finite.

    >>> auc_pr([0, 1, 0, 1], [0.1, 0.9, 0.8, 0.7])
    0.8333333333333333
    """
    labelled, scored = _checked(label, score)
    values, place = np.unique(-scored, return_inverse=True)  # [N] from the largest score down, [T]
    true = np.bincount(place[labelled], minlength=len(values)).cumsum()  # [N] labelled rows that are alarmed
    alarmed = np.bincount(place, minlength=len(values)).cumsum()  # [N]
    return float(np.diff(true, prepend=0) @ (true / alarmed) / true[-1])


def vus_pr(label: ArrayLike, score: ArrayLike, buffer: int = 100) -> float:
    """The volume under the precision-recall surface of `score` [T] for `label` (bool or 0 and 1) [T].

    VUS-PR of Paparrizos et al., "Volume Under the Surface" (VLDB 2022): the mean over windows 0, 1, … `buffer` rows of
    the average precision with soft labels. A window widens each labelled event by half of it on either side, where the
    label falls as √(1 − d / window) at d rows from the event; recall is multiplied by the share of widened events with
    any alarm. Thresholds are the scores at 250 evenly spaced ranks. Equal to what TSB-AD's `generate_curve` gives.
    Raises `ValueError` as `auc_pr` does, and for a negative buffer.

    An alarm just before the event is worth more than one far from it:

    >>> label = np.arange(60) // 10 == 3
    >>> near, far = np.arange(60) == 28, np.arange(60) == 5
    >>> round(vus_pr(label, near, buffer=8), 3), round(vus_pr(label, far, buffer=8), 3)
    (0.239, 0.215)
    """
    labelled, scored = _checked(label, score)
    if buffer < 0:
        raise ValueError(f"buffer is {buffer} rows, it must be 0 or more")
    ranks = np.linspace(0, len(scored) - 1, THRESHOLDS).astype(int)
    falling = np.sort(-scored)[ranks]  # [H] thresholds from the highest down, negated
    reached = np.searchsorted(falling, -scored)  # [T] the first threshold that alarms a row
    areas = [_soft_precision(labelled, reached, window) for window in range(buffer + 1)]
    return float(np.mean(areas))


def _soft_precision(label: Array, reached: Array, window: int) -> float:
    """The average precision where events of label [T] have slopes; `reached` [T]: the first threshold of each row."""
    events = events_of(label)
    slopes = _slopes(label, events, window)  # [T]
    alarmed = np.bincount(reached, minlength=THRESHOLDS).cumsum()  # [H] rows
    partly = np.bincount(reached, slopes, THRESHOLDS).cumsum()  # [H] of the slopes, the alarmed part
    true = np.bincount(reached[label], minlength=THRESHOLDS).cumsum() + partly  # [H]
    positive = np.count_nonzero(label) + partly / 2  # [H] half-way between the hard label and the one that was met
    recall = np.minimum(true / positive, 1.0) * _existence(events, reached, window // 2)  # [H]
    return float(np.diff(recall, prepend=0.0) @ (true / alarmed))


def _slopes(label: Array, events: Sequence[Event], window: int) -> Array:
    """What each row [T] beside the events is labelled, 0 within them; slopes that meet add up, to 1 at most."""
    away = np.arange(1, window // 2 + 1)  # [D] rows from an event
    starts, ends = np.array(events).T[:, :, None]  # [E, 1] each
    rows = np.concatenate([starts - away, ends - 1 + away])  # [2·E, D]
    height = np.broadcast_to(np.sqrt(1 - away / window), rows.shape)
    there = (rows >= 0) & (rows < len(label))
    met = np.minimum(np.bincount(rows[there], height[there], len(label)), 1.0)  # [T]
    return np.where(label, 0.0, met)


def _existence(events: Sequence[Event], reached: Array, half: int) -> Array:
    """The share of events, widened by `half` rows, in which any row is alarmed: [H]. Those that meet are one."""
    joined = _widened(merged(events, 2 * half), half, len(reached))
    edges = np.array(joined).ravel()
    first = np.minimum.reduceat(np.append(reached, THRESHOLDS), edges)[::2]  # [E]; the last event may end with the rows
    return np.bincount(first, minlength=THRESHOLDS).cumsum() / len(joined)


def events_of(mask: ArrayLike) -> list[Event]:
    """The runs of True in mask (bool or 0 and 1) [T], each as [start, end) in rows.

    >>> events_of([True, False, True, True])
    [(0, 1), (2, 4)]
    """
    edges = np.flatnonzero(np.diff(_flags(mask, "mask").astype(np.int8), prepend=0, append=0))  # [2·E]
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def merged(events: Sequence[Event], gap: int) -> list[Event]:
    """Events with less than `gap` rows between them as one, in order of their start.

    >>> merged([(0, 2), (4, 6), (9, 10)], gap=3)
    [(0, 6), (9, 10)]
    """
    joined: list[Event] = []
    for start, end in sorted(events):
        if joined and start - joined[-1][1] < gap:
            first, last = joined.pop()
            start, end = first, max(last, end)
        joined.append((start, end))
    return joined


def _widened(events: Sequence[Event], rows: int, total: int) -> list[Event]:
    """Events with `rows` more on either side, within the `total` rows that there are."""
    return [(max(start - rows, 0), min(end + rows, total)) for start, end in events]


@dataclass(frozen=True)
class Judged:
    """Alarms of one series against its labels, counted in events.

    >>> judged([0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 0])
    Judged(events=1, found=1, alarms=2, true_alarms=1, delays=[1])
    """

    events: int  # labelled
    found: int  # of those, with an alarmed row
    alarms: int  # runs of alarmed rows
    true_alarms: int  # of those, on or within the tolerance of a labelled event
    delays: list[int]  # rows from the start of each found event to its first alarmed row

    @property
    def outside(self) -> int:
        """Alarm events that touch no label."""
        return self.alarms - self.true_alarms

    @property
    def precision(self) -> float | None:
        """The share of alarm events that touch a label; None where there is no alarm."""
        return self.true_alarms / self.alarms if self.alarms else None

    @property
    def recall(self) -> float | None:
        """The share of labelled events that were found; None where nothing is labelled."""
        return self.found / self.events if self.events else None

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall: 0 where no event was found, None where nothing is labelled."""
        if self.recall is None:
            return None
        both = (self.precision or 0.0) + self.recall
        return 2 * (self.precision or 0.0) * self.recall / both if both else 0.0


def judged(alarms: ArrayLike, labels: ArrayLike, tolerance: int = 0) -> Judged:
    """Judge `alarms` against `labels` (both bool or 0 and 1) [T], event by event.

    An alarm event is true if it lies, if only with one row, on a labelled event or at most `tolerance` rows beside it.
    A labelled event is found only by an alarm within it, whatever the tolerance: one that came before and was gone
    when the event began has not told of it. Raises `ValueError` for lengths that differ or a negative tolerance.

    >>> told = judged([1, 0, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], tolerance=1)
    >>> told.precision, told.recall, told.f1, told.outside
    (0.5, 0.0, 0.0, 1)
    """
    alarmed, labelled = _flags(alarms, "alarms"), _flags(labels, "labels")
    if len(alarmed) != len(labelled):
        raise ValueError(f"alarms have {len(alarmed)} rows and labels {len(labelled)}, they must be of the same rows")
    if tolerance < 0:
        raise ValueError(f"tolerance is {tolerance} rows, it must be 0 or more")
    near = np.zeros(len(labelled), bool)  # [T]
    events, alarm_events = events_of(labelled), events_of(alarmed)
    for start, end in _widened(events, tolerance, len(near)):
        near[start:end] = True
    delays = [int(alarmed[start:end].argmax()) for start, end in events if alarmed[start:end].any()]
    true = sum(bool(near[start:end].any()) for start, end in alarm_events)
    return Judged(len(events), len(delays), len(alarm_events), true, delays)


def alarms_per_week(outside_events: int, rows_outside: int, period_seconds: float) -> float:
    """False alarms in a week of normal running: `outside_events` in `rows_outside` rows, one every `period_seconds`.

    Raises `ValueError` where there is no time outside of the labels to have false alarms in.

    >>> alarms_per_week(3, rows_outside=4032, period_seconds=300)
    1.5
    """
    seconds = rows_outside * period_seconds
    if not seconds > 0:
        raise ValueError(f"{rows_outside} rows of {period_seconds} s outside of labels, it must be more than no time")
    return outside_events * WEEK_SECONDS / seconds


def paired_interval(
    differences: ArrayLike, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Between which two values the mean of `differences` [N] lies: its percentile bootstrap interval (Efron, 1979).

    Each difference is that of two detectors on one application, in the unit of the measure. Applications are drawn
    with replacement, `draws` times, not rows: the rows of one application are no independent trials. The same seed
    gives the same interval. Raises `ValueError` for fewer than two differences, which have no spread, or one that is
    not finite.

    >>> paired_interval([0.25, 0.25, 0.25])
    (0.25, 0.25)
    """
    gaps = np.asarray(differences, np.float64)  # [N]
    if gaps.ndim != 1 or len(gaps) < 2 or not np.isfinite(gaps).all():
        raise ValueError(
            f"differences are {gaps.tolist()}, they must be two finite numbers or more, one an application"
        )
    if not (0 < level < 1 and draws >= 1):
        raise ValueError(f"level is {level} and draws are {draws}, they must lie between 0 and 1 and be 1 or more")
    drawn = np.random.default_rng(seed).integers(0, len(gaps), (draws, len(gaps)))
    low, high = np.quantile(gaps[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _flags(values: ArrayLike, name: str) -> Array:
    """Values [T] as bool; a score taken for a label must not pass as one."""
    given = np.asarray(values)
    if given.ndim != 1:
        raise ValueError(f"{name} has the shape {list(given.shape)}, it must have one axis, the rows")
    flags = given.astype(bool)
    if not np.array_equal(given, flags):
        raise ValueError(
            f"{name} has the value {given[given != flags][0]}, it must be True or False, 1 or 0, throughout"
        )
    return flags


def _checked(label: ArrayLike, score: ArrayLike) -> tuple[Array, Array]:
    """Label as bool [T] and score as float64 [T], or `ValueError` where no curve can be drawn from them."""
    labelled, scored = _flags(label, "label"), np.asarray(score, np.float64)
    if scored.shape != labelled.shape:
        raise ValueError(f"label has {len(labelled)} rows and score the shape {list(scored.shape)}, they must be alike")
    if not np.isfinite(scored).all():
        row = int(np.flatnonzero(~np.isfinite(scored))[0])
        raise ValueError(f"score is {scored[row]} in row {row}, it must be finite throughout")
    if labelled.all() or not labelled.any():
        missing = "normal" if len(labelled) and labelled.all() else "anomalous"
        raise ValueError(f"label has no {missing} row among its {len(labelled)}, a curve needs both kinds")
    return labelled, scored
