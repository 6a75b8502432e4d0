"""The pictures of a backtest's report: a stream from end to end, and each of its events from near. Time is aligned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from statestep.export.axes import moment
from statestep.export.backtest import BASELINES, MODEL, Backtest, Stream
from statestep.export.chart import text
from statestep.export.findings import Alarm, Label, alarms_of, leading
from statestep.export.panels import STRIP, TITLE, View, reading, score, short, strip
from statestep.export.words import counted, span, times

WIDTH, LEFT, RIGHT = 1120.0, 62.0, 84.0
TRACK, SCORE, SMALL = 9.0, 128.0, 46.0  # heights of a rail, of the model's score, of a baseline's
READING = (0.0, 124.0, 96.0, 80.0, 72.0)  # of a feature's, where there are so many
SHOWN = 4  # features
NEAR = (368.0, 40.0, 8.0)  # width and margins of a picture from near
NEAR_SCORE, NEAR_READING = 62.0, 74.0
AROUND = 0.6  # of an event's length, on either side of it
LEAST_AROUND = 24  # rows


def stack(found: Backtest, place: int, alarms: Sequence[Alarm], labels: Sequence[Label], name: str) -> str:
    """A stream from end to end: labels and alarms, score, leading features, their shares, the baselines' scores.

    `name` begins the anchors of its events: `name-1`, `name-2`, ….
    """
    stream, verdict = found.streams[place], found.verdicts[MODEL][place]
    view = View.of(stream, 0, len(stream.x), LEFT, WIDTH - RIGHT)
    columns = leading(found, place, SHOWN)
    several = len(found.contract.features) > 1 and "contribution" in verdict.outputs
    top, parts = 16.0, []
    spans = [(a.start, a.end, f"alarm {a.number}: {a.level} {times(a.severity)}") for a in alarms]
    tracks = _tracks(view, top, alarms, labels, spans, name)
    y = top + 2 * TRACK + 4
    score_top = y + TITLE
    parts.append(score(view, verdict, y, SCORE, "", _summary(found.contract.name, alarms, stream)))
    y += TITLE + SCORE
    for rank, column in enumerate(columns):
        parts.append(reading(found, view, verdict, y, READING[len(columns)], column, rank if several else None))
        y += TITLE + READING[len(columns)]
    if several:
        parts.append(strip(found, view, verdict, y, columns))
        y += TITLE + STRIP
    alarmed_to = y
    for other in BASELINES:
        theirs = found.verdicts[other][place]
        own = alarms_of(found, place, other)
        bands = view.bands(((a.start, a.end, f"alarm of {other}") for a in own), y + TITLE, SMALL, "alarm")
        parts.append(bands + score(view, theirs, y, SMALL, other, _summary(other, own, stream)))
        y += TITLE + SMALL
    behind = view.axis(top + 2 * TRACK + 4, y, 76)
    behind += view.bands(((n.start, n.end, "") for n in labels), score_top, y - score_top, "label")
    behind += view.bands(spans, score_top, alarmed_to - score_top, "alarm")
    if verdict.begin:
        behind += view.bands([(0, verdict.begin, "not judged")], top, y - top, "veil")
    said = f"{stream.name}: {len(alarms)} alarms, {len(labels)} labels"
    return _svg("stack", WIDTH, y + 20, behind + tracks + "".join(parts), said, view)


def close_up(found: Backtest, place: int, alarm: Alarm, labels: Sequence[Label]) -> str:
    """An event from near: the score over its threshold, and the readings of its leading feature beside the forecast."""
    stream, verdict = found.streams[place], found.verdicts[MODEL][place]
    around = max(round(AROUND * (alarm.end - alarm.start)), LEAST_AROUND)
    width, left, right = NEAR
    start, end = max(alarm.start - around, 0), min(alarm.end + around, len(stream.x))
    view = View.of(stream, start, end, left, width - right)
    bottom = TITLE + NEAR_SCORE + TITLE + NEAR_READING
    behind = view.axis(TITLE, bottom, 78)
    behind += view.bands(((n.start, n.end, "") for n in labels), TITLE, bottom - TITLE, "label")
    behind += view.bands([(alarm.start, alarm.end, "")], TITLE, bottom - TITLE, "alarm")
    inside = score(view, verdict, 0, NEAR_SCORE, near=True)
    if alarm.why:
        column = found.contract.feature_names.index(alarm.why[0].feature)
        inside += reading(found, view, verdict, TITLE + NEAR_SCORE, NEAR_READING, column, None, alarm.why[0])
    return _svg("near", width, bottom + 18, behind + inside, f"alarm {alarm.number}")


def _svg(kind: str, width: float, height: float, inside: str, said: str, view: View | None = None) -> str:
    told = ""
    if view is not None:  # what a readout needs
        told = f" data-x='{json.dumps([round(v, 3) for v in view.x[:4]])}' data-timed='{int(view.along.timed)}'"
    box = f"0 0 {width:g} {height:g}"
    return f'<svg class="{kind}" viewBox="{box}" role="img" aria-label="{escape(said)}"{told}>{inside}</svg>\n'


def _tracks(
    view: View,
    top: float,
    alarms: Sequence[Alarm],
    labels: Sequence[Label],
    spans: list[tuple[int, int, str]],
    name: str,
) -> str:
    """Two rails on top, of labels and of alarms; the alarms' numbers where there is room, the severest first."""
    found = [text(LEFT - 6, top + TRACK - 1, "labels", "tick", "end")] if labels else []
    found.append(text(LEFT - 6, top + 2 * TRACK + 2, "alarms", "tick", "end"))
    told = ((n.start, n.end, f"label {n.number}") for n in labels)
    found.append(view.bands(told, top, TRACK - 1, "label-rail"))
    taken: list[tuple[float, float]] = []
    for place, alarm in sorted(enumerate(alarms), key=lambda each: -each[1].severity):
        left, width = view.along.band(alarm.start, alarm.end, view.x)
        bar = view.bands([spans[place]], top + TRACK + 2, TRACK - 1, "alarm-rail")
        middle, half = left + width / 2, 3.5 * len(str(alarm.number)) + 1
        if all(middle + half <= a or middle - half >= b for a, b in taken):
            taken.append((middle - half, middle + half))
            bar += text(middle, top - 3, str(alarm.number), "mark", "middle")
        found.append(f'<a href="#{name}-{alarm.number}">{bar}</a>')
    return "".join(found)


def _summary(name: str, alarms: Sequence[Alarm], stream: Stream) -> str:
    """The title of a score, with its alarms counted."""
    outside = sum(alarm.label is None for alarm in alarms)
    false = f", {outside or 'none'} outside of labels" if alarms and stream.labels is not None else ""
    return f"score of {short(name)}: {counted(len(alarms), 'alarm')}{false}"


def caption(stream: Stream, alarm: Alarm, period: float | None, labelled: bool) -> str:
    """What stands over a picture from near, as HTML."""
    where = "" if not labelled else (f" · label {alarm.label}" if alarm.label else " · outside")
    what = f"{moment(stream.times, alarm.start)} · {span(alarm.end - alarm.start, period)}"
    return f"<b>{alarm.number}</b> {escape(what)} · {alarm.level} {times(alarm.severity)}{where}"
