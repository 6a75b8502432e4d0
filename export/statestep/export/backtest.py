"""How a detector would have done: a step model over labelled streams, beside the two baselines that it has to beat.

The model is stepped by the engine, row by row, as the service steps it, gaps included. *Last value* expects each
reading to stay as it is, *value* expects the mean of training. Both are judged by the rules of the model's own
detector, calibrated with its budget; only what the other readings of a row say, which takes a fit, is the model's
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from statestep.export.budget import QUANTILE, Budget
from statestep.export.calibrate import Judging, Past, calibrated, outputs_of
from statestep.export.compare import Array, Outputs
from statestep.export.detector import Detector, Forecasts
from statestep.export.errors import DataError, ExportError
from statestep.export.measures import Event, Judged, alarms_per_week, auc_pr, judged, vus_pr
from statestep.export.series import FEWEST_ROWS, Block, blocks_of, enough, mean_of, series_of
from statestep.runtime import NO_TIME, Contract, Engine, StepModel, silence_of

MODEL = "model"
BASELINES = ("last value", "value")
HALF = 0.5  # of what baselines are calibrated on, for their threshold; the other half for means and ranges
UNJUDGED = 0.15  # share of a stream, at its beginning, that baselines are calibrated on where there is no training file
BUFFER = 100  # rows around a labelled event within which VUS-PR counts a score


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream of readings, with what is known of it."""

    name: str
    x: Array  # float32 [T, F], NaN where a reading is missing
    times: Array | None = None  # int64 [T] ns since the epoch
    labels: Array | None = None  # bool [T]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one detector made of one stream, from row `begin` on."""

    outputs: Outputs  # by role, [T, …]
    begin: int  # the first row that counts

    @property
    def spans(self) -> list[Event]:
        """Every event of the stream, also before `begin`, as rows [start, end).

        >>> Verdict({"event": np.array([0, 1, 2, -3, 1, -2, 0, 1])}, 5).spans
        [(1, 4), (4, 6), (7, 8)]
        """
        count = self.outputs["event"]  # int64 [T]; 0 within an event is a row that was refused
        starts, ends = np.flatnonzero(count == 1), np.flatnonzero(count < 0) + 1
        last = int(np.flatnonzero(count)[-1]) + 1 if len(starts) else 0  # a stream may end in the middle of one
        return [(int(start), int(min(ends[ends > start], default=last))) for start in starts]

    @property
    def alarmed(self) -> Array:
        """Which rows belong to an event: bool [T]; of two that touch, the first is without its last row."""
        rows = np.zeros(len(self.outputs["event"]), bool)
        for start, end in self.spans:
            rows[start:end] = True
            rows[max(start - 1, 0)] &= start == 0
        return rows

    @property
    def events(self) -> list[Event]:
        """The events that count, as rows [start, end): those of the rows from `begin` on.

        >>> Verdict({"event": np.array([0, 1, 2, -3, 1, -2, 0, 1])}, 4).events
        [(4, 6), (7, 8)]
        """
        alarmed = self.alarmed
        return [(start, end) for start, end in self.spans if alarmed[max(start, self.begin) : end].any()]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a detector's measures over all streams. None where there is nothing to measure."""

    detector: str
    vus_pr: float | None
    auc_pr: float | None
    events: int  # labelled
    found: int
    alarms: int  # events of the detector
    precision: float | None
    recall: float | None
    delay_rows: float | None  # the median
    outside: int  # alarms outside of labels
    alarms_per_week: float | None  # of one stream, outside of labels


@dataclass(frozen=True, slots=True)
class Backtest:
    """Everything that a report shows."""

    contract: Contract
    fingerprint: str  # of the model's file
    streams: tuple[Stream, ...]
    verdicts: dict[str, tuple[Verdict, ...]]  # by detector, one for each stream; `MODEL` is the model itself
    table: tuple[Row, ...]
    period_seconds: float | None  # between two rows
    calibrated_on: str  # what baselines were, in words


def backtest(
    model: StepModel,
    streams: Sequence[Stream],
    *,
    training: Mapping[str, Array] | None = None,
    skip: float | None = None,
    period_seconds: float | None = None,
) -> Backtest:
    """Run `model` over `streams` and judge it beside the baselines.

    The baselines are calibrated on `training` (name → [T, F], what the model was fitted on); without it on the first
    `skip` share of each stream, which then counts for nobody. `period_seconds` is the data's, the contract's by
    default. Raises `ExportError` for a model without a detector, `DataError` for readings that nothing can be measured
    on.
    """
    contract = model.contract
    if contract.detector is None or any(contract.output(role) is None for role in ("event", "score", "threshold")):
        raise ExportError(f"the model {contract.name!r} has no detector to be tested: fit or convert it with data")
    for stream in streams:
        if not accepted(contract, stream.x).any():
            raise DataError(f"stream {stream.name!r} has no row that the model takes: leave it out")
    share = (UNJUDGED if training is None else 0.0) if skip is None else skip
    begins = [round(len(stream.x) * share) for stream in streams]
    detectors, told = _baselines(contract, streams, training, begins, share)
    period = period_seconds or contract.period_seconds
    found = {MODEL: tuple(map(Verdict, stepped(model, streams), begins))}
    for name, detector in detectors.items():
        found[name] = tuple(
            Verdict(_alone(name, stream, detector, contract), begin)
            for stream, begin in zip(streams, begins, strict=True)
        )
    rows = tuple(_row(name, streams, verdicts, period) for name, verdicts in found.items())
    return Backtest(contract, model.fingerprint, tuple(streams), found, rows, period, told)


def accepted(contract: Contract, x: Array) -> Array:
    """Which rows of x [T, F] the service would apply, bool [T]: none with an infinity, nor, for some models, a NaN."""
    bad: Array = np.isinf(x) if contract.missing == "own-forecast" else ~np.isfinite(x)  # [T, F]
    return np.logical_not(bad.any(axis=1))


def stepped(model: StepModel, streams: Sequence[Stream]) -> list[Outputs]:
    """The model's outputs by role over each stream, [T, …], one timestep of all streams a call.

    A row that the service would refuse leaves a gap: NaN, or 0 in what is no float.
    """
    engine = Engine(model, max_streams=max(len(streams), 1), silence=silence_of(model.contract))
    roles = {output.name: output.role for output in model.contract.outputs if output.role}
    found: list[Outputs] = [{} for _ in streams]
    applied = [accepted(model.contract, stream.x) for stream in streams]
    for t in range(max((len(stream.x) for stream in streams), default=0)):
        here = [i for i, rows in enumerate(applied) if t < len(rows) and rows[t]]
        if not here:
            continue
        x = np.stack([streams[i].x[t] for i in here]).astype(model.contract.input_dtype)  # [n, F]
        times = np.array([NO_TIME if (when := streams[i].times) is None else when[t] for i in here])  # [n]
        out = engine.advance([b"%d" % i for i in here], x, times)
        engine.commit()
        for name, role in roles.items():
            value = out.outputs[name]
            for place, i in enumerate(here):
                found[i].setdefault(role, _blank(len(streams[i].x), value))[t] = value[place]
    return found


def judging_of(contract: Contract) -> Judging:
    """How a contract's detector judges, for a baseline: a forecast alone, so nothing by the others of a row."""
    told = contract.detector or {}
    budget = Budget(told.get("every"), told.get("quantile") or QUANTILE)
    names = {key: told[key] for key in ("alpha", "combine", "rule") if key in told}
    return Judging(others=False, budget=budget, **names)


def _baselines(
    contract: Contract,
    streams: Sequence[Stream],
    training: Mapping[str, Array] | None,
    begins: Sequence[int],
    share: float,
) -> tuple[dict[str, Detector], str]:
    """A calibrated detector for each baseline, and what they were calibrated on, in words."""
    features = contract.feature_names
    if training is None:
        given = {s.name: s.x[:begin] for s, begin in zip(streams, begins, strict=True)}
        if max(begins, default=0) < FEWEST_ROWS:
            raise DataError(
                f"the first {share:.3g} of each stream are too few rows to calibrate the baselines on: skip a larger "
                "share (--skip), or name the readings that the model was fitted on (--train)"
            )
        told = f"the first {100 * share:.3g} % of each stream, which count for nobody"
    else:
        given = dict(training)
        told = f"{sum(map(len, given.values())):,} rows of training"
    try:
        series, _ = series_of(given, features, HALF)
        enough(blocks := blocks_of(series), 1)
    except DataError as error:
        raise DataError(f"the baselines cannot be calibrated on {told}: {error}") from None
    expected = contract.output("expected")
    targets = tuple(features.index(f) for f in (expected and expected.features) or features)
    known = Forecasts(features=features, targets=targets, mean=mean_of(series))
    how = judging_of(contract)
    return {
        name: calibrated([_forecast(name, block, known) for block in blocks], known, how).detector for name in BASELINES
    }, told


def _forecast(name: str, block: Block, known: Forecasts) -> Past:
    x = block.x[..., list(known.targets)]
    if name == "value":
        x = np.broadcast_to(known.mean[list(known.targets)].astype(np.float32), x.shape)
    return Past(block, np.ascontiguousarray(x, np.float32))


def _alone(name: str, stream: Stream, detector: Detector, contract: Contract) -> Outputs:
    """One stream through a baseline's detector: outputs by role, [T, …]; rows that a service refuses leave gaps."""
    applied = accepted(contract, stream.x)  # [T]
    x = np.ascontiguousarray(stream.x[applied], np.float32)[:, None]  # [t, 1, F]
    missing = np.isnan(x)
    last = np.maximum.accumulate(np.where(missing, -1, np.arange(len(x))[:, None, None]), axis=0)  # where it was read
    held = np.where(last < 0, detector.mean, np.take_along_axis(x, np.maximum(last, 0), axis=0)).astype(np.float32)
    block = Block(held, missing, np.array([len(x)]), np.array([0]))
    past = Past(Block(x, missing, block.rows, block.cuts), _forecast(name, block, detector).prediction)
    found = {}
    for role, value in outputs_of(detector, past).items():
        found[role] = _blank(len(applied), value[0])
        found[role][applied] = value[:, 0]
    return found


def _blank(rows: int, like: Array) -> Array:
    """What outputs like these [n, …] are where there is none: [rows, …]."""
    return np.full((rows, *like.shape[1:]), np.nan if like.dtype.kind == "f" else 0, like.dtype)


def _row(name: str, streams: Sequence[Stream], verdicts: Sequence[Verdict], period: float | None) -> Row:
    """A detector's measures over all streams; the areas are means over the streams that have both kinds of rows."""
    vus, auc, judgements, calm_rows = [], [], list[Judged](), 0
    for stream, verdict in zip(streams, verdicts, strict=True):
        begin = verdict.begin
        labels = np.zeros(len(stream.x), bool) if stream.labels is None else stream.labels
        labels, score = labels[begin:], np.nan_to_num(verdict.outputs["score"][begin:].astype(np.float64))
        if labels.any() and not labels.all():
            vus.append(vus_pr(labels, score, BUFFER))
            auc.append(auc_pr(labels, score))
        judgements.append(judged(verdict.alarmed[begin:], labels))
        calm_rows += int((~labels).sum())
    alarms = sum(each.alarms for each in judgements)
    true = sum(each.true_alarms for each in judgements)
    events, found = sum(each.events for each in judgements), sum(each.found for each in judgements)
    delays = [delay for each in judgements for delay in each.delays]
    outside = alarms - true
    return Row(
        detector=name,
        vus_pr=float(np.mean(vus)) if vus else None,
        auc_pr=float(np.mean(auc)) if auc else None,
        events=events,
        found=found,
        alarms=alarms,
        precision=true / alarms if alarms and events else None,
        recall=found / events if events else None,
        delay_rows=float(np.median(delays)) if delays else None,
        outside=outside,
        alarms_per_week=alarms_per_week(outside, calm_rows, period) if period and calm_rows else None,
    )
