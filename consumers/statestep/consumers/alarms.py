"""Alarms from anomaly flags, and how well they answer the faults that a simulation is known to hold.

An *alarm* is an episode of one stream: it is raised by an anomalous timestep and ends once `CLEAR_STEPS` timesteps
have passed without another. A fault is *seen* by an alarm that is raised while it lasts; an alarm at another time is
*false*. One that is raised within `GRACE_STEPS` of a fault's end is neither: a sensor that jumps back to the truth is
worth an alarm, but it comes too late. Timesteps are counted from 0 within each stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from statestep.consumers.fleet import KINDS, STEPS_PER_DAY, STEPS_PER_HOUR, Fault

CLEAR_STEPS = STEPS_PER_HOUR  # a score that hovers at its threshold is one alarm, not many
GRACE_STEPS = STEPS_PER_HOUR


@dataclass(frozen=True, slots=True)
class Alarm:
    """An episode of a stream. `last` is its latest anomalous timestep, `peak` its greatest score in thresholds."""

    stream: str
    raised: int
    last: int
    peak: float


@dataclass(slots=True)
class AlarmLog:
    """The alarms of all streams as their timesteps come in, each stream's in order.

    >>> log = AlarmLog()
    >>> for step, ratio in enumerate([0.2, 1.5, 3.0, 0.4]):
    ...     log.see("pump-01", step, ratio, ratio > 1)
    >>> log.open
    {'pump-01': Alarm(stream='pump-01', raised=1, last=2, peak=3.0)}
    """

    open: dict[str, Alarm] = field(default_factory=dict)
    ended: list[Alarm] = field(default_factory=list)

    def see(self, stream: str, step: int, ratio: float, anomalous: bool) -> None:
        """One timestep of `stream`; `ratio` is its score in thresholds."""
        alarm = self.open.get(stream)
        if anomalous:
            if alarm is None:
                alarm = Alarm(stream, step, step, ratio)
            self.open[stream] = replace(alarm, last=step, peak=max(alarm.peak, ratio))
        elif alarm is not None and step - alarm.last >= CLEAR_STEPS:
            self.ended.append(self.open.pop(stream))

    def all(self) -> list[Alarm]:
        """Every alarm so far, by the time when it was raised."""
        return sorted([*self.ended, *self.open.values()], key=lambda alarm: (alarm.raised, alarm.stream))


class Answer(NamedTuple):
    """A fault and the first alarm that saw it, or None."""

    fault: Fault
    alarm: Alarm | None


class Verdict(NamedTuple):
    """How the alarms answer the faults."""

    answers: list[Answer]
    false: list[Alarm]
    quiet_weeks: float  # pump-weeks at no fault's time

    def recall(self) -> dict[str, tuple[int, int]]:
        """For each kind of fault: how many were seen, of how many."""
        kinds = [answer.fault.kind for answer in self.answers]
        seen = [answer.fault.kind for answer in self.answers if answer.alarm is not None]
        return {kind: (seen.count(kind), kinds.count(kind)) for kind in KINDS}


def caused(alarm: Alarm, fault: Fault, stream: str) -> bool:
    """Whether `alarm` was raised by `fault`, which is on `stream`, or by its end."""
    return alarm.stream == stream and fault.start <= alarm.raised < fault.end + GRACE_STEPS


def judge(faults: Sequence[Fault], alarms: Sequence[Alarm], steps: Mapping[str, int], names: Sequence[str]) -> Verdict:
    """Match alarms to faults. `steps` tells how many timesteps of each stream were seen, `names` each pump's stream.

    A fault that had not begun, or that was not seen yet when its stream stopped in the midst of it, is left out.

    >>> fault = Fault(pump=0, sensor=1, kind="stuck", start=300, end=360, size=0.0)
    >>> alarms = [Alarm("pump-01", 40, 41, 1.1), Alarm("pump-01", 320, 350, 5.0)]
    >>> verdict = judge([fault], alarms, {"pump-01": 1000}, ["pump-01"])
    >>> verdict.answers[0].alarm.raised, len(verdict.false)
    (320, 1)
    """
    answers = []
    false = set(alarms)
    quiet = sum(steps.values())
    for fault in faults:
        stream = names[fault.pump]
        known = steps.get(stream, 0)
        mine = [alarm for alarm in alarms if caused(alarm, fault, stream)]
        false -= set(mine)
        quiet -= max(0, min(known, fault.end + GRACE_STEPS) - fault.start)
        first = min(mine, key=lambda alarm: alarm.raised, default=None)
        if first is not None and first.raised < fault.end:
            answers.append(Answer(fault, first))
        elif fault.end <= known:
            answers.append(Answer(fault, None))
    in_order = sorted(false, key=lambda alarm: (alarm.raised, alarm.stream))
    return Verdict(answers, in_order, quiet / (7 * STEPS_PER_DAY))
