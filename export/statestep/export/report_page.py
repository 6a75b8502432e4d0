"""The report of a backtest: one HTML file that needs nothing else, opens offline and prints.

What it shows of each stream are the pictures of `pictures.py`, and below them tables of its labels and alarms.
Every name that comes from data is escaped. The same backtest gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from statestep.export.axes import moment, number
from statestep.export.backtest import MODEL, Backtest, Stream
from statestep.export.findings import Alarm, Label, Why, alarms_of, labels_of
from statestep.export.pictures import caption, close_up, stack
from statestep.export.words import (
    HEADINGS,
    MEASURES,
    REASONS,
    calibration,
    cells,
    counted,
    percent,
    span,
    times,
    verdict,
)

STREAMS = 12  # shown in full
PICTURES = 24  # of a stream's alarms, the severest
LINES = 500  # of a table of alarms or labels
HATCH = (
    '<svg width="0" height="0" class="defs"><defs><pattern id="hatch" width="5" height="5"'
    ' patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect class="hatch-ground" width="5" height="5"/>'
    '<line class="hatch-line" y2="5"/>'
    "</pattern></defs></svg>"
)
VEIL = '<span class="k veil-k">not judged</span>'
LEGEND = (
    '<p class="legend"><span class="k seen-k">seen</span><span class="k expected-k">expected</span>'
    '<span class="k score-k">score</span><span class="k threshold-k">threshold</span>'
    '<span class="k over-k">score above it</span><span class="k alarm-k">alarm</span>'
    '<span class="k label-k">label</span>{veil}</p>'
)


def page(found: Backtest, *, data: str, labels: str | None = None) -> str:
    """The whole report; `data` names the file that was judged, `labels` says where its labels came from."""
    contract = found.contract
    name = f"{contract.name}, version {contract.model_version}"
    told = [(alarms_of(found, place), labels_of(found, place)) for place in range(len(found.streams))]
    order = sorted(range(len(told)), key=lambda place: -len(told[place][0]) - len(told[place][1]))
    shown = order[:STREAMS]
    body = [_head(found, name, data, labels), _measures(found)]
    if left := order[STREAMS:]:
        rest = sum(len(told[place][0]) for place in left)
        body.append(
            f'<p class="left-out">{len(left):,} of {len(order):,} streams are left out below, those with the fewest '
            f"alarms and labels; {rest:,} alarms lie in them.</p>"
        )
    body += [_stream(found, place, f"s{n}", *told[place]) for n, place in enumerate(shown, 1)]
    body.append(_end(found))
    own = files("statestep.export")
    style, script = (own.joinpath(f"report_page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Backtest of {escape(name)}</title>\n<style>\n{style}</style></head>\n<body>{HATCH}<main>\n"
        + "\n".join(body)
        + f"\n</main><script>\n{script}</script></body></html>\n"
    )


def _head(found: Backtest, name: str, data: str, labels: str | None) -> str:
    streams, verdicts = found.streams, found.verdicts[MODEL]
    rows, judged = (
        sum(len(s.x) for s in streams),
        sum(len(s.x) - v.begin for s, v in zip(streams, verdicts, strict=True)),
    )
    every = f", one every {span(1, found.period_seconds)}" if found.period_seconds else ""
    known = [s.times for s in streams if s.times is not None and len(s.times)]
    if known:
        first, last = min(known, key=lambda t: t[0]), max(known, key=lambda t: t[-1])
        every += f", {moment(first, 0)} to {moment(last, -1)}"
    what = f"{judged:,} of {rows:,} rows of {counted(len(streams), 'stream')}{every}"
    if judged < rows:
        what += f"; not judged: {rows - judged:,} rows at the beginning of the stream{'s' * (len(streams) != 1)}"
    facts = [("data", data), ("judged", what), ("labels", labels or "none"), ("sha256", found.fingerprint)]
    if found.contract.trained_on:
        facts.insert(2, ("trained on", found.contract.trained_on))
    listed = "".join(f"<dt>{key}</dt><dd>{escape(fact)}</dd>" for key, fact in facts)
    return f'<header><p class="kind">Backtest</p><h1>{escape(name)}</h1><dl>{listed}</dl></header>'


def _measures(found: Backtest) -> str:
    lines = []
    for row in found.table:
        named, *numbers = cells(row, found.period_seconds)
        kind = ' class="model"' if row.detector == MODEL else ""
        lines.append(
            f'<tr{kind}><th scope="row">{escape(named)}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in numbers)
            + "</tr>"
        )
    heads = "".join(f'<th scope="col">{heading}</th>' for heading in HEADINGS)
    return (
        f'<section><p class="verdict">{escape(verdict(found.table))}</p>'
        f'<table class="measures"><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></section>'
    )


def _stream(found: Backtest, place: int, anchor: str, alarms: Sequence[Alarm], labels: Sequence[Label]) -> str:
    stream, period = found.streams[place], found.period_seconds
    legend = LEGEND.format(veil=VEIL if found.verdicts[MODEL][place].begin else "")
    parts = [f"<section><h2>{escape(stream.name)}</h2>{legend}"]
    parts.append(f'<figure class="wide">{stack(found, place, alarms, labels, anchor)}</figure>')
    if labels:
        parts.append(_labels(stream, period, labels, anchor))
    if not alarms:
        return "".join([*parts, "<p>No alarm.</p></section>"])
    severest = sorted(alarms, key=lambda alarm: -alarm.severity)[:PICTURES]
    parts.append(_alarms(stream, period, alarms, {alarm.number for alarm in severest}, anchor))
    if len(severest) < len(alarms):
        parts.append(
            f'<p class="left-out">Below, the {len(severest)} severest of {len(alarms):,} alarms from near.</p>'
        )
    near = []
    for alarm in sorted(severest, key=lambda alarm: alarm.number):
        said = caption(stream, alarm, period, stream.labels is not None)
        near.append(f'<figure class="card" id="{anchor}-near-{alarm.number}"><figcaption>{said}</figcaption>')
        near.append(f"{close_up(found, place, alarm, labels)}</figure>")
    return "".join([*parts, f'<div class="cards">{"".join(near)}</div></section>'])


def _labels(stream: Stream, period: float | None, labels: Sequence[Label], anchor: str) -> str:
    lines = []
    for label in labels:
        if not label.counts:
            said = "not judged"
        elif label.found_by is None or label.delay is None:
            said = "<b>missed</b>"
        else:
            after = f"after {span(label.delay, period)}" if label.delay else "at once"
            said = f'found {after} by alarm <a href="#{anchor}-{label.found_by}">{label.found_by}</a>'
        lasted = span(label.end - label.start, period)
        lines.append((str(label.number), escape(moment(stream.times, label.start)), lasted, said))
    return _table("labels", ("label", "begin", "lasted", "found"), lines)


def _alarms(stream: Stream, period: float | None, alarms: Sequence[Alarm], near: set[int], anchor: str) -> str:
    """A line an alarm; those whose numbers are in `near` lead to their pictures."""
    heads = ["alarm", "begin", "lasted", "severity", *(["label"] if stream.labels is not None else []), "why"]
    lines = []
    for alarm in alarms:
        there = f' href="#{anchor}-near-{alarm.number}"' if alarm.number in near else ""
        line = [
            f'<a id="{anchor}-{alarm.number}"{there}>{alarm.number}</a>',
            escape(moment(stream.times, alarm.start)),
            span(alarm.end - alarm.start, period),
            f'<span class="{alarm.level}">{alarm.level} {times(alarm.severity)}</span>',
        ]
        if stream.labels is not None:
            line.append(str(alarm.label) if alarm.label else '<span class="soft">outside</span>')
        line.append("".join(_because(why, several=len(alarm.why) > 1) for why in alarm.why) or "–")
        lines.append(line)
    return _table("alarms", heads, lines)


def _because(why: Why, several: bool) -> str:
    share = f" {percent(why.share)}" if several else ""
    reason = REASONS.get(why.reason or "", "unusual")
    seen, expected = ("–" if value is None else number(value) for value in (why.seen, why.expected))
    return (
        f'<span class="why"><b>{escape(why.feature)}</b>{share} <span class="soft">{reason}</span> '
        f"{seen} → {expected}</span>"
    )


def _table(kind: str, heads: Sequence[str], lines: Sequence[Iterable[str]]) -> str:
    """A table of HTML cells."""
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines[:LINES])
    more = f'<p class="left-out">{len(lines) - LINES:,} more are left out.</p>' if len(lines) > LINES else ""
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}'


def _end(found: Backtest) -> str:
    how = "".join(f"<li>{escape(line)}</li>" for line in calibration(found))
    what = "".join(f"<dt>{name}</dt><dd>{escape(said)}</dd>" for name, said in MEASURES)
    return (
        f"<section><h2>How it was calibrated</h2><ul>{how}</ul></section>"
        f'<section><h2>What the measures mean</h2><dl class="meanings">{what}</dl>'
        "<p>In the pictures a line keeps the least and the greatest value of every column of pixels. A score’s axis is "
        "linear up to the threshold and logarithmic above. Seen → expected: the reading where a feature’s part shows "
        "most, and what the forecast said, or the other features. Dotted: the edges of what training saw.</p></section>"
    )
