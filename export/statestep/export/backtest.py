"""How a detector would have done: a step model over labelled streams, beside the two baselines that it has to beat.

The model is stepped by the engine, row by row, as the service steps it. *Last value* expects each reading to stay as it
is, *value* expects the mean of training. Both are judged by the very rules of the model's own detector, and calibrated
with the same budget: nothing but the forecast differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from statestep.export.budget import QUANTILE, Budget
from statestep.export.calibrate import Judging, Past, calibrated, outputs_of
from statestep.export.compare import Array, Outputs
from statestep.export.detector import Detector, Forecasts
from statestep.export.errors import DataError
from statestep.export.measures import Judged, alarms_per_week, auc_pr, judged, vus_pr
from statestep.export.series import Block, Series, block_of, blocks_of, enough, mean_of, series_of
from statestep.runtime import NO_TIME, Contract, Engine, StepModel

BASELINES = ("last value", "value")
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
    def alarmed(self) -> Array:
        """Which rows belong to an event: bool [T]."""
        return np.asarray(self.outputs["event"] != 0)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a detector's measures over all streams. None where there is nothing to measure."""

    detector: str
    vus_pr: float | None
    auc_pr: float | None
    events: int
    found: int
    precision: float | None
    recall: float | None
    delay_rows: float | None  # the median
    outside: int  # alarms outside of labels
    alarms_per_week: float | None  # of one stream, outside of labels


@dataclass(frozen=True, slots=True)
class Backtest:
    """Everything that a report shows."""

    contract: Contract
    streams: tuple[Stream, ...]
    verdicts: dict[str, tuple[Verdict, ...]]  # by detector, one for each stream; "model" is the model itself
    table: tuple[Row, ...]


def backtest(
    model: StepModel,
    streams: Sequence[Stream],
    *,
    training: Mapping[str, Array] | None = None,
    skip: float | None = None,
) -> Backtest:
    """Run `model` over `streams` and judge it beside the baselines.

    The baselines are calibrated on `training` (name → [T, F], what the model was fitted on); without it on the first
    `skip` share of each stream, which then counts for nobody. Raises `DataError` for a model without a detector, and
    for streams that nothing can be measured on.
    """
    contract = model.contract
    told = contract.detector
    if told is None or contract.output("event") is None:
        raise DataError(f"the model {contract.name!r} has no detector to be tested: fit or convert it with data")
    share = (UNJUDGED if training is None else 0.0) if skip is None else skip
    begins = [round(len(stream.x) * share) for stream in streams]
    found = {"model": tuple(map(Verdict, stepped(model, streams), begins))}
    for name in BASELINES:
        found[name] = tuple(map(Verdict, _baseline(name, contract, streams, training, begins), begins))
    rows = tuple(_row(name, streams, verdicts, contract.period_seconds) for name, verdicts in found.items())
    return Backtest(contract, tuple(streams), found, rows)


def stepped(model: StepModel, streams: Sequence[Stream]) -> list[Outputs]:
    """The model's outputs by role over each stream, [T, …], one timestep of all streams a call.

    A row that the service would refuse leaves a gap: NaN, or 0 in what is no float.
    """
    engine = Engine(model, max_streams=max(len(streams), 1))
    roles = {output.name: output.role for output in model.contract.outputs if output.role}
    found: list[Outputs] = [{} for _ in streams]
    refuses = model.contract.missing == "reject"
    for t in range(max((len(stream.x) for stream in streams), default=0)):
        here = [i for i, s in enumerate(streams) if t < len(s.x) and not (refuses and np.isnan(s.x[t]).any())]
        if not here:
            continue
        x = np.stack([streams[i].x[t] for i in here]).astype(model.contract.input_dtype)  # [n, F]
        times = np.array([NO_TIME if (when := streams[i].times) is None else when[t] for i in here])  # [n]
        out = engine.advance([b"%d" % i for i in here], x, times)
        engine.commit()
        for name, role in roles.items():
            value = out.outputs[name]
            for place, i in enumerate(here):
                blank = np.nan if value.dtype.kind == "f" else 0
                row = found[i].setdefault(role, np.full((len(streams[i].x), *value.shape[1:]), blank, value.dtype))
                row[t] = value[place]
    return found


def _baseline(
    name: str,
    contract: Contract,
    streams: Sequence[Stream],
    training: Mapping[str, Array] | None,
    begins: Sequence[int],
) -> list[Outputs]:
    """The outputs of a baseline over each stream."""
    features = contract.feature_names
    given = training or {s.name: s.x[:begin] for s, begin in zip(streams, begins, strict=True)}
    series, _ = series_of(given, features, 0.5)
    enough(blocks := blocks_of(series), 1)
    expected = contract.output("expected")
    targets = tuple(features.index(f) for f in (expected and expected.features) or features)
    known = Forecasts(features=features, targets=targets, mean=mean_of(series))
    pasts = [_forecast(name, block, known) for block in blocks]
    detector = calibrated(pasts, known, judging_of(contract)).detector
    return [_alone(name, stream, detector) for stream in streams]


def judging_of(contract: Contract) -> Judging:
    """How a contract's detector judges, for a baseline: a forecast alone, so nothing by the others of a row."""
    told = contract.detector or {}
    budget = Budget(told.get("every"), told.get("quantile") or QUANTILE)
    names = {key: told[key] for key in ("alpha", "combine", "rule") if key in told}
    return Judging(others=False, budget=budget, **names)


def _forecast(name: str, block: Block, known: Forecasts) -> Past:
    x = block.x[..., list(known.targets)]
    if name == "value":
        x = np.broadcast_to(known.mean[list(known.targets)].astype(np.float32), x.shape)
    return Past(block, np.ascontiguousarray(x, np.float32))


def _alone(name: str, stream: Stream, detector: Detector) -> Outputs:
    """One stream through a baseline's detector: outputs by role, [T, …]."""
    filled, _ = series_of({stream.name: stream.x}, detector.features, 0.5)
    if not filled or len(filled[0].x) != len(stream.x):
        raise DataError(f"stream {stream.name!r} holds an infinity, or too few readings to be tested on")
    block = block_of([Series(stream.name, filled[0].x, filled[0].missing, len(stream.x))])
    return {role: value[:, 0] for role, value in outputs_of(detector, _forecast(name, block, detector)).items()}


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
        precision=true / alarms if alarms else None,
        recall=found / events if events else None,
        delay_rows=float(np.median(delays)) if delays else None,
        outside=outside,
        alarms_per_week=alarms_per_week(outside, calm_rows, period) if period and calm_rows else None,
    )
