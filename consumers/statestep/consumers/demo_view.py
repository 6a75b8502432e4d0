"""What the demo shows: pure functions from a plain `View` or a `Verdict` to what rich can print.

The live page fits its console: the alarms take the lines that are left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from statestep.consumers.alarms import Alarm, Verdict
from statestep.consumers.fleet import PERIOD_SECONDS, SENSORS, Fault, Fleet
from statestep.consumers.report import Summary

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT_STEPS = 17  # timesteps in an alarm's sparkline: nearly an hour and a half
BAR_CELLS = 9
BAR_DECADES = (-1.0, 2.0)  # a bar is empty at a tenth of the threshold, full at a hundred times
MORE = " and {} more"
FIXED_LINES = 12  # of the live page besides its alarms and its row of pumps
WIDE = 116  # cells of a console that has room for what the model says


@dataclass(frozen=True, slots=True)
class AlarmRow:
    """An alarm as the page shows it; `fault` is what is truly wrong with the pump, which only a simulation knows."""

    alarm: Alarm
    open: bool
    recent: tuple[float, ...]  # its stream's latest scores in thresholds, oldest first
    fault: Fault | None
    told: str = ""  # what the model says of it while it is on


class DemoResult(NamedTuple):
    """What a demo found; `interrupted` where it was ended before its last message."""

    fleet: Fleet
    verdict: Verdict
    service: Summary
    seconds: float
    interrupted: bool


@dataclass(frozen=True, slots=True)
class View:
    """A moment of the demo."""

    seed: int
    start_ns: int  # time of timestep 0, ns since the epoch
    step: int  # the timestep that was seen last
    steps: int
    messages: int
    per_second: float
    dead_letters: int
    url: str  # of the HTTP port
    ratios: tuple[float, ...]  # [pumps] latest scores in thresholds
    alarms: tuple[AlarmRow, ...]  # those that are on first, then the newest first
    raised: int


def live_page(view: View, width: int, height: int) -> RenderableType:
    """The page for a console of `width` × `height` cells."""
    heat = _heat(view.ratios, width, max(1, (height - FIXED_LINES) // 2))
    room = max(1, height - FIXED_LINES - len(heat))
    done = Table.grid(padding=(0, 2), expand=True)
    done.add_column(no_wrap=True)
    done.add_column(ratio=1)
    done.add_column(no_wrap=True)
    done.add_row(
        Text(moment(view.start_ns, view.step), "bold"),
        ProgressBar(total=view.steps, completed=view.step + 1, complete_style="cyan"),
        f"day {_days(view.step + 1):.1f} of {_days(view.steps):g}",
    )
    numbers = (
        f"{view.messages:,} messages   {view.per_second:,.0f} a second   {len(view.ratios)} streams   "
        f"{view.dead_letters} dead letters"
    )
    still = sum(row.open for row in view.alarms)
    return Group(
        Text.assemble(("statestep demo", "bold cyan"), "  every message advances its own pump by one timestep"),
        "",
        done,
        Text(numbers),
        "",
        Text.assemble(("Pumps", "bold"), ("   latest score of each; red is over its threshold", "dim")),
        *heat,
        "",
        Text.assemble(("Alarms", "bold"), (f"   {view.raised} raised, {still} still on", "dim")),
        alarm_table(view, view.alarms[:room], telling=width >= WIDE),
        "",
        Text(f"metrics at {view.url}/metrics   seed {view.seed}   Ctrl-C ends it", "dim"),
    )


def alarm_table(view: View, rows: tuple[AlarmRow, ...], *, telling: bool = False) -> Table:
    """One line for each alarm. One that is over is dimmed, and tells its peak and how long it lasted.

    `telling` adds what the model says of it, as far as it says anything.
    """
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    telling = telling and any(row.told for row in rows)
    for header in ("pump", "since", "× threshold", "lately", "what is wrong", *["what the model says"] * telling):
        table.add_column(header, no_wrap=True)
    for row in rows:
        now = row.recent[-1] if row.open and row.recent else row.alarm.peak
        lasted = _span(row.alarm.last + 1 - row.alarm.raised)
        table.add_row(
            Text(row.alarm.stream, "bold" if row.open else ""),
            moment(view.start_ns, row.alarm.raised, "%a %H:%M"),
            Text.assemble(bar(now), f"{_times(now):>7}"),
            sparkline(row.recent) if row.open else f"over: {lasted}",
            fault_text(row.fault) if row.fault is not None else Text("nothing: false alarm", "yellow"),
            *[row.told] * telling,
            style="" if row.open else "dim",
        )
    return table


def progress_line(view: View) -> str:
    """The page in one line, for where there is no terminal."""
    still = sum(row.open for row in view.alarms)
    return (
        f"{moment(view.start_ns, view.step)}  day {_days(view.step + 1):.1f} of {_days(view.steps):g}: "
        f"{view.messages:,} messages, {view.per_second:,.0f} a second, {view.raised} alarms raised, {still} still on"
    )


def summary_page(result: DemoResult) -> RenderableType:
    """What was injected, whether and when it was seen, how often the alarm was false, and the messages' accounts."""
    verdict, start_ns, done = result.verdict, int(result.fleet.times[0]), result.service
    by_kind = verdict.recall()
    seen, injected = (sum(counts[place] for counts in by_kind.values()) for place in (0, 1))
    kinds = ", ".join(f"{kind} {found}/{of}" for kind, (found, of) in by_kind.items() if of)
    weeks = verdict.quiet_weeks
    rate = f", {len(verdict.false) / weeks:.2f} a pump-week" if weeks else ""
    false = f"{len(verdict.false)} false alarm{'' if len(verdict.false) == 1 else 's'}"
    ended = "  (ended early; faults not over yet are left out)" if result.interrupted else ""
    return Group(
        Text.assemble(("Injected faults", "bold"), (ended, "dim")),
        _fault_table(verdict, start_ns),
        "",
        Text.assemble((f"{seen} of {injected} injected faults seen", "bold"), f": {kinds}" if kinds else ""),
        Text.assemble((false, "bold"), f" in {weeks:.1f} pump-weeks without a fault{rate}"),
        f"{done.consumed:,} messages = {done.predicted:,} predictions + {done.refused:,} dead letters, "
        f"{done.consumed / result.seconds:,.0f} a second",
        Text(f"seed {result.fleet.seed}: --seed {result.fleet.seed} shows the same fleet again", "dim"),
    )


def _fault_table(verdict: Verdict, start_ns: int) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", pad_edge=False)
    for header in ("pump", "sensor", "kind", "start", "seen after", "× threshold"):
        table.add_column(header, no_wrap=True, justify="right" if header in ("seen after", "× threshold") else "left")
    for fault, alarm in verdict.answers:
        after = Text("not seen", "red") if alarm is None else Text(_span(alarm.raised - fault.start), "green")
        peak = "" if alarm is None else _times(alarm.peak)
        at = moment(start_ns, fault.start)
        table.add_row(f"pump-{fault.pump + 1:02d}", SENSORS[fault.sensor].name, fault.kind, at, after, peak)
    return table


def moment(start_ns: int, step: int, form: str = "%a %d %b %H:%M") -> str:
    """The simulated time of a timestep, to the minute.

    >>> moment(1_767_571_200_000_000_000, 12)
    'Mon 05 Jan 01:00'
    """
    when = datetime.fromtimestamp(start_ns // 1_000_000_000, UTC) + timedelta(seconds=step * PERIOD_SECONDS)
    return when.strftime(form)


def sparkline(ratios: tuple[float, ...]) -> Text:
    """Scores as blocks, oldest first, padded to `RECENT_STEPS` on the left.

    >>> sparkline((0.1, 1.0, 100.0)).plain.strip()
    '▁▃█'
    """
    return Text.assemble(" " * (RECENT_STEPS - len(ratios)), *(_cell(ratio) for ratio in ratios[-RECENT_STEPS:]))


def bar(ratio: float) -> Text:
    """A score in thresholds on a logarithmic scale, with a mark where the threshold is.

    >>> bar(1.0).plain
    '███│     '
    """
    filled = round(_share(ratio) * BAR_CELLS)
    mark = round(_share(1.0) * BAR_CELLS)
    cells = ["█"] * filled + [" "] * (BAR_CELLS - filled)
    if filled <= mark:
        cells[mark] = "│"
    return Text("".join(cells), _colour(ratio))


def fault_text(fault: Fault) -> Text:
    """A fault in two words."""
    return Text(f"{fault.kind}, {SENSORS[fault.sensor].name}")


def _heat(ratios: tuple[float, ...], width: int, lines: int) -> list[Text]:
    """A cell for each pump, on at most `lines` lines; what has no place is told at their end."""
    shown = ratios if len(ratios) <= width * lines else ratios[: width * lines - len(MORE.format(len(ratios)))]
    cells = [_cell(ratio) for ratio in shown]
    heat = [Text.assemble(*cells[at : at + width]) for at in range(0, len(cells), width)]
    if len(shown) < len(ratios):
        heat[-1].append(MORE.format(len(ratios) - len(shown)), "dim")
    return heat


def _cell(ratio: float) -> tuple[str, str]:
    return BLOCKS[min(int(_share(ratio) * len(BLOCKS)), len(BLOCKS) - 1)], _colour(ratio)


def _share(ratio: float) -> float:
    """Where a score stands between the ends of the scale: 0 to 1."""
    low, high = BAR_DECADES
    return min(max((math.log10(max(ratio, 1e-9)) - low) / (high - low), 0.0), 1.0)


def _colour(ratio: float) -> str:
    return "red" if ratio > 1 else "yellow" if ratio > 0.7 else "green"


def _times(ratio: float) -> str:
    """A score in thresholds.

    >>> _times(1.25), _times(2345.6)
    ('1.2×', '2,346×')
    """
    return f"{ratio:.1f}×" if ratio < 1000 else f"{ratio:,.0f}×"


def _days(steps: int) -> float:
    return steps * PERIOD_SECONDS / 86_400


def _span(steps: int) -> str:
    """A number of timesteps as hours and minutes.

    >>> _span(30)
    '2 h 30 min'
    """
    hours, minutes = divmod(steps * PERIOD_SECONDS // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min" if minutes else "at once"
