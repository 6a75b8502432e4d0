"""What a backtest found, one by one: events with their reasons, labels with the alarm that found them. And as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from statestep.export.axes import moment
from statestep.export.backtest import BASELINES, MODEL, Backtest, Stream, Verdict
from statestep.export.compare import Array
from statestep.export.detector import BESIDE
from statestep.export.measures import events_of
from statestep.runtime import Contract

LEVELS = ((3.0, "critical"), (1.5, "major"), (0.0, "minor"))  # from which severity on, in units of the threshold
NAMED = 3  # features that an event is explained by


@dataclass(frozen=True, slots=True)
class Why:
    """One feature's part in an event."""

    feature: str
    share: float  # of the score, while it was over the threshold
    reason: str | None  # the kind of evidence that spoke loudest, most of the time
    row: int  # where it shows most
    seen: float | None
    expected: float | None  # by the forecast, or by the other readings of the row where these are the reason


@dataclass(frozen=True, slots=True)
class Alarm:
    """An event of a detector: rows [start, end) of a stream. Numbers begin with 1 in each stream."""

    number: int
    start: int
    end: int
    severity: float  # the highest score in units of the threshold
    level: str
    label: int | None  # the labelled event that it touches first
    why: tuple[Why, ...]  # by falling share


@dataclass(frozen=True, slots=True)
class Label:
    """A labelled event: rows [start, end) of a stream."""

    number: int
    start: int
    end: int
    counts: bool  # not if it lies in the rows that count for nobody
    found_by: int | None  # the number of the first alarm within it
    delay: int | None  # rows from its beginning, or the first row that counts, to that alarm


def level_of(severity: float) -> str:
    """How severe an event is, in a word.

    >>> level_of(1.2), level_of(1.5), level_of(3.0)
    ('minor', 'major', 'critical')
    """
    return next(level for least, level in LEVELS if severity >= least)


def alarms_of(found: Backtest, place: int, detector: str = MODEL) -> list[Alarm]:
    """The events of a detector in the stream at `place`, those that count."""
    stream, verdict = found.streams[place], found.verdicts[detector][place]
    ratio = ratio_of(verdict)
    spans = events_of(stream.labels) if stream.labels is not None else []
    told = []
    for number, (start, end) in enumerate(verdict.events, 1):
        severity = float(np.nanmax(ratio[start:end]))
        label = next((n for n, (a, b) in enumerate(spans, 1) if max(start, verdict.begin) < b and a < end), None)
        why = _why(found.contract, stream, verdict, start, end) if detector == MODEL else ()
        told.append(Alarm(number, start, end, severity, level_of(severity), label, why))
    return told


def labels_of(found: Backtest, place: int, detector: str = MODEL) -> list[Label]:
    """The labelled events of the stream at `place`, and which alarm of a detector found each."""
    stream, verdict = found.streams[place], found.verdicts[detector][place]
    alarmed, told = verdict.alarmed, []
    for number, (start, end) in enumerate(events_of(stream.labels) if stream.labels is not None else [], 1):
        first = max(start, verdict.begin)
        hit = np.flatnonzero(alarmed[first:end])
        by, delay = None, None
        if hit.size:
            delay = int(hit[0])
            by = next(n for n, (a, b) in enumerate(verdict.events, 1) if a <= first + delay < b)
        told.append(Label(number, start, end, end > verdict.begin, by, delay))
    return told


def ratio_of(verdict: Verdict) -> Array:
    """The score in units of the threshold, [T]; NaN where a row was refused."""
    ratio: Array = verdict.outputs["score"].astype(np.float64) / verdict.outputs["threshold"]
    return ratio


def leading(found: Backtest, place: int, most: int) -> list[int]:
    """The columns of at most `most` features that contribute most to a stream's alarms, or else to its scores."""
    verdict = found.verdicts[MODEL][place]
    shares = verdict.outputs.get("contribution")
    if shares is None:
        return list(range(min(most, len(found.contract.features))))
    weight = np.nan_to_num(verdict.outputs["score"].astype(np.float64))  # [T]
    alarmed = verdict.alarmed & (np.arange(len(weight)) >= verdict.begin)
    total = np.nan_to_num(shares[alarmed] if alarmed.any() else shares).T @ (
        weight[alarmed] if alarmed.any() else weight
    )
    order = np.argsort(-total, kind="stable")[:most]
    return [_columns(found.contract, "contribution")[k] for k in order]


def of_feature(found: Contract, outputs: Mapping[str, Array], role: str, column: int) -> Array | None:
    """A role's numbers for the feature in a column of the input, [T]; None where the model does not tell them."""
    columns = _columns(found, role)
    return outputs[role][:, columns.index(column)] if role in outputs and column in columns else None


def document(found: Backtest, data: str) -> dict[str, Any]:
    """Everything that was found, for programs; `data` is the file's name. Rows are counted from 0."""
    contract = found.contract
    return {
        "model": {"name": contract.name, "version": contract.model_version, "sha256": found.fingerprint},
        "data": data,
        "period_seconds": found.period_seconds,
        "baselines_calibrated_on": found.calibrated_on,
        "table": [asdict(row) for row in found.table],
        "streams": [_stream(found, place) for place in range(len(found.streams))],
    }


def _stream(found: Backtest, place: int) -> dict[str, Any]:
    stream = found.streams[place]

    def timed(one: Alarm | Label) -> dict[str, Any]:
        known = stream.times is not None
        moments = {"begin": moment(stream.times, one.start), "last": moment(stream.times, one.end - 1)} if known else {}
        return moments | asdict(one)

    return {
        "stream": stream.name,
        "rows": len(stream.x),
        "judged_from": found.verdicts[MODEL][place].begin,
        "labels": None if stream.labels is None else [timed(one) for one in labels_of(found, place)],
        "events": {name: [timed(one) for one in alarms_of(found, place, name)] for name in (MODEL, *BASELINES)},
    }


def _columns(contract: Contract, role: str) -> list[int]:
    """The columns of the input that a role has a number for, in its order."""
    output = contract.output(role)
    names = contract.feature_names
    return [] if output is None else [names.index(name) for name in output.features or names]


def _why(contract: Contract, stream: Stream, verdict: Verdict, start: int, end: int) -> tuple[Why, ...]:
    """What made an event, rows [start, end)."""
    shares = verdict.outputs.get("contribution")
    if shares is None:
        return ()
    over = start + np.flatnonzero(ratio_of(verdict)[start:end] > 1)  # rows; the others of an event only end it
    mean = shares[over].mean(axis=0)  # [F]
    columns = _columns(contract, "contribution")
    order = [k for k in np.argsort(-mean, kind="stable")[:NAMED].tolist() if mean[k] > 0]
    return tuple(_one(contract, stream, verdict, columns[k], float(mean[k]), over) for k in order)


def _one(contract: Contract, stream: Stream, verdict: Verdict, column: int, share: float, over: Array) -> Why:
    feature, seen = contract.features[column], stream.x[:, column]
    kinds = (contract.detector or {}).get("evidence", [])
    places = of_feature(contract, verdict.outputs, "reason", column)
    reason = None
    if places is not None:
        place = int(np.bincount(places[over]).argmax())
        reason = kinds[place] if place < len(kinds) else None
    against = of_feature(contract, verdict.outputs, "related" if reason in BESIDE else "expected", column)
    if reason == "range" and feature.min is not None and feature.max is not None:
        apart = np.maximum(feature.min - seen[over], seen[over] - feature.max)  # [N]
    else:
        apart = np.zeros(len(over)) if against is None else np.abs(seen[over] - against[over])
    row = int(over[np.nan_to_num(apart, nan=-1.0).argmax()])
    return Why(feature.name, share, reason, row, _finite(seen[row]), None if against is None else _finite(against[row]))


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
