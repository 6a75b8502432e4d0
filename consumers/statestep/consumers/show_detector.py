"""What `inspect` prints of a detector: how it judges, and how it was calibrated, as its contract tells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNITS = ((86_400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
COMBINED = {
    "mean": "the mean of all features",
    "top": "the mean of the largest quarter of the features",
    "max": "the largest of the features",
}
RULES = {
    "plain": "the score itself",
    "likelihood": "how far the latest scores are above the stream's own",
    "conformal": "how few of the stream's own scores are as high",
}
SCALES = {"pooled": "of all streams together", "per-stream": "of each stream by itself"}


def detector(told: Mapping[str, Any], period_seconds: float | None, console: Console) -> None:
    """A detector in a few lines, without what its contract does not tell; a timestep takes `period_seconds`."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, fact in lines(told, period_seconds):
        facts.add_row(name, escape(fact))
    console.print()
    console.print("detector", style="bold")
    console.print(facts)


def lines(told: Mapping[str, Any], period_seconds: float | None) -> Iterable[tuple[str, str]]:
    """Each fact with its name.

    >>> dict(lines({"combine": "max", "every": 2016, "rule": "plain"}, 300.0))["false alarms"]
    'one a stream in 2,016 timesteps (7 days)'
    """
    if isinstance(evidence := told.get("evidence"), list | tuple):
        yield "evidence", ", ".join(map(str, evidence))
    alpha = _number(told, "alpha")
    if alpha:
        yield "smoothing", f"{alpha:g} of the newest, which remembers about {1 / alpha:.0f} timesteps"
    for name, key, meanings in (("combined", "combine", COMBINED), ("rule", "rule", RULES), ("units", "scale", SCALES)):
        if word := told.get(key):
            meaning = meanings.get(str(word))
            yield name, f"{word}: {meaning}" if meaning else str(word)
    if (threshold := _number(told, "threshold")) is not None:
        yield "threshold", f"{threshold:g}{_origin(told)}"
    if every := _number(told, "every"):
        length = f" ({span(every * period_seconds)})" if period_seconds else ""
        yield "false alarms", f"one a stream in {every:,.0f} timesteps{length}"
    elif quantile := _number(told, "quantile"):
        yield "false alarms", f"no budget: the threshold is above {quantile:.6g} of the scores"
    if (calm := _number(told, "calm")) is not None:
        yield "an event ends", f"after {calm:,.0f} timesteps below the threshold"
    if (warm := _number(told, "warm")) is not None:
        yield "judges", f"from timestep {warm + 1:,.0f} of a stream on"


def span(seconds: float) -> str:
    """A length of time in the largest unit of which it has one at least.

    >>> span(604_800), span(5400), span(0.25)
    ('7 days', '1.5 hours', '0.25 seconds')
    """
    size, unit = next(((size, unit) for size, unit in UNITS if seconds >= size), UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def _origin(told: Mapping[str, Any]) -> str:
    """How the threshold was found."""
    rows = _number(told, "rows")
    of = f" {rows:,.0f} scores" if rows is not None else " scores"
    tail = told.get("tail")
    if isinstance(tail, Mapping):
        over, scale = _number(tail, "over"), _number(tail, "scale")
        fitted = "" if over is None or scale is None else f" over {over:g}, of scale {scale:g},"
        return f", from an exponential tail{fitted} fitted to{of}"
    return f", counted on{of}" if "tail" in told else ""


def _number(told: Mapping[str, Any], name: str) -> float | None:
    found = told.get(name)
    return found if isinstance(found, int | float) and not isinstance(found, bool) else None
