"""A backtest in sentences: whether the model wins, how its detector was calibrated, what each measure means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from statestep.export.axes import number
from statestep.export.backtest import BASELINES, BUFFER, MODEL, Backtest, Row
from statestep.export.measures import WEEK_SECONDS

REASONS = {  # kinds of evidence, of a feature
    "error": "not as forecast",
    "others": "not as the other features say",
    "level": "far from where it usually is",
    "range": "outside of all that training saw",
    "stuck": "not moving",
}
COMBINATIONS = {
    "mean": "the mean over all features",
    "top": "the mean over the most unusual quarter of the features",
    "max": "the most unusual feature alone",
}
RULES = {
    "plain": "The score is judged as it is",
    "likelihood": "The score is how many of its own standard deviations a stream's late score lies above its mean",
    "conformal": "The score is how rare such a value is among the stream's own late scores, −log₁₀ of its share",
}
UNITS = ((86_400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
MEASURES = (
    (
        "VUS-PR",
        "Volume under the precision-recall surface of the score (Paparrizos et al., VLDB 2022), over buffers of 0 to "
        f"{BUFFER} rows around labels: no threshold is chosen, and a score that rises just beside a label is worth "
        "more than one far from it. Higher is better; by luck it is about the share of labelled rows. The mean over "
        "streams.",
    ),
    (
        "AUC-PR",
        "Average precision of the score, row by row, over all thresholds. The mean over streams.",
    ),
    (
        "found",
        "Labelled events within which an alarm stood, of all that count. However long an event is, it counts once.",
    ),
    ("alarms", "Events of the detector: from a score above the threshold to the end of the calm that follows."),
    ("precision", "The share of alarms that touch a label. One alarm counts once, however long it is."),
    ("delay", "The median time from the beginning of a found event to the first alarmed row within it."),
    (
        "false alarms",
        "Alarms that touch no label, for each week of one stream outside of labels.",
    ),
)


def percent(share: float) -> str:
    """A share in percent.

    >>> percent(0.625), percent(0.003)
    ('62 %', '0.3 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.01 or not share else f"{100 * share:.1g} %"


def times(severity: float) -> str:
    """A severity in units of the threshold, never rounded up to the next level.

    >>> times(1.4999)
    '1.49×'
    """
    return f"{math.floor(100 * severity + 1e-9) / 100:.2f}×"


def span(rows: float, period: float | None) -> str:
    """So many timesteps in the two largest units of time, or in rows where nobody knows how long one is.

    >>> span(43, 300.0), span(2, None), span(0, 60.0)
    ('3 h 35 min', '2 rows', '0 s')
    """
    if period is None:
        return f"{rows:,.4g} row" + "s" * (rows != 1)
    seconds = rows * period
    place = next((n for n, (size, _) in enumerate(UNITS) if seconds >= size), len(UNITS) - 1)
    size, unit = UNITS[place]
    if place == len(UNITS) - 1:
        return f"{seconds:.3g} {unit}"
    less, lesser = UNITS[place + 1]
    whole, rest = divmod(round(seconds / less), round(size / less))
    return f"{whole} {unit}" + (f" {rest} {lesser}" if rest else "")


def cells(row: Row, period: float | None) -> list[str]:
    """A line of the table of measures, as `HEADINGS` names them; a dash where there is nothing to measure."""

    def of(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    return [
        row.detector,
        of(row.vus_pr, ".3f"),
        of(row.auc_pr, ".3f"),
        f"{row.found} of {row.events}" if row.events else "–",
        f"{row.alarms:,}",
        "–" if row.precision is None else percent(row.precision),
        "–" if row.delay_rows is None else span(row.delay_rows, period),
        of(row.alarms_per_week, ".2f"),
    ]


HEADINGS = ("detector", "VUS-PR", "AUC-PR", "found", "alarms", "precision", "median delay", "false alarms a week")


def verdict(table: Sequence[Row]) -> str:
    """Whether the model beats both baselines, by VUS-PR, and how the alarms compare."""
    rows = {row.detector: row for row in table}
    model, others = rows[MODEL], [rows[name] for name in BASELINES]
    if model.vus_pr is None:
        rate = "" if model.alarms_per_week is None else f", {number(model.alarms_per_week)} a week of one stream"
        few = f"The model raised {counted(model.alarms, 'alarm')}{rate}"
        return f"{few}. Without labels nobody can say whether it beats the baselines."
    above = [f"{o.detector} ({o.vus_pr:.3f})" for o in others if o.vus_pr is not None and model.vus_pr > o.vus_pr]
    below = [f"{o.detector} ({o.vus_pr:.3f})" for o in others if o.vus_pr is None or model.vus_pr <= o.vus_pr]
    if not below:
        first = f"The model beats both baselines: VUS-PR {model.vus_pr:.3f}, above {' and '.join(above)}."
    elif not above:
        first = f"The model beats neither baseline: VUS-PR {model.vus_pr:.3f}, not above {' or '.join(below)}."
    else:
        first = f"The model beats only one baseline: VUS-PR {model.vus_pr:.3f}, above {above[0]}, not above {below[0]}."
    found = ", ".join(f"{o.detector} {o.found}" for o in others)
    if any(o.alarms_per_week is None for o in (model, *others)):
        false = f"{counted(model.outside, 'false alarm')} ({', '.join(f'{o.detector} {o.outside}' for o in others)})"
    else:
        theirs = ", ".join(f"{o.detector} {o.alarms_per_week:.2f}" for o in others)
        false = f"{model.alarms_per_week:.2f} false alarms a week ({theirs})"
    return f"{first} It found {model.found} of {counted(model.events, 'labelled event')} ({found}), with {false}."


def calibration(found: Backtest) -> list[str]:
    """How the model's detector came to its threshold, from its contract."""
    told: dict[str, Any] = dict(found.contract.detector or {})
    kinds = [f"{kind} ({REASONS[kind]})" for kind in told.get("evidence", []) if kind in REASONS]
    said = []
    if kinds:
        said.append(f"Evidence against each feature: {', '.join(kinds)}. The strongest counts.")
    if alpha := told.get("alpha"):
        said.append(
            f"Smoothing: the newest evidence has the weight {alpha:g}, which remembers about {1 / alpha:.0f} timesteps."
        )
    if told.get("combine") in COMBINATIONS:
        said.append(
            f"Score: {COMBINATIONS[told['combine']]} of log(1 + evidence). {RULES.get(str(told.get('rule')), '')}."
        )
    if told.get("scale") == "per-stream":
        said.append("Units: each stream's own, learnt as it goes.")
    said.append(_budget(told, found.period_seconds))
    if "tail" in told and "rows" in told:
        over = told["tail"]
        how = (
            "counted on them"
            if over is None
            else f"an exponential tail was fitted over {over.get('over')}, for so few do not tell of events so rare"
        )
        said.append(f"Found on {told['rows']:,} rows that training had not seen: {how}.")
    if calm := told.get("calm"):
        said.append(f"An event ends after {counted(calm, 'timestep')} below the threshold.")
    said.append(
        f"Baselines: the same rules and budget, calibrated on {found.calibrated_on}. Last value expects no change, "
        "value expects the mean; what the other features say, which takes a fit, is the model's alone."
    )
    return said


def _budget(told: dict[str, Any], period: float | None) -> str:
    threshold = f"Threshold: {told['threshold']:g}" if "threshold" in told else "Threshold"
    if every := told.get("every"):
        weekly = f", which is {number(WEEK_SECONDS / (every * period))} a week" if period else ""
        rate = f"one false alarm of a stream in {every:,} timesteps{weekly}"
        return f"{threshold}, for {rate}; it moves slowly to keep that."
    if quantile := told.get("quantile"):
        return f"{threshold}, above {100 * quantile:g} % of the scores."
    return f"{threshold}."


def counted(count: int, noun: str) -> str:
    """So many of a thing.

    >>> counted(1, "alarm"), counted(1200, "alarm")
    ('1 alarm', '1,200 alarms')
    """
    return f"{count:,} {noun}" + "s" * (count != 1)
