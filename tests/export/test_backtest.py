"""A backtest steps as the engine does, judges baselines by the same rules, and counts what its table says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from statestep.export import DataError, ExportError
from statestep.export.backtest import BASELINES, HALF, MODEL, Row, Stream, Verdict, backtest, judging_of, stepped
from statestep.export.calibrate import Past, measured, with_threshold
from statestep.export.detector import Forecasts
from statestep.export.findings import alarms_of, document, labels_of, leading
from statestep.export.measures import alarms_per_week, auc_pr, events_of, judged, vus_pr
from statestep.export.series import blocks_of, series_of
from statestep.runtime import NO_TIME, Engine, StepModel

from . import twin
from .backtests import PERIOD, Array, labelled, made_up, model

CALM = 6  # of the detector of `model`


def one_by_one(step: StepModel, stream: Stream) -> dict[str, Array]:
    """The outputs of an engine that is given one row at a time, and not those that a service refuses."""
    engine, found = Engine(step), dict[str, Array]()
    refuses = step.contract.missing == "reject"
    for t, row in enumerate(stream.x):
        if np.isinf(row).any() or (refuses and np.isnan(row).any()):
            continue
        when = np.array([NO_TIME if stream.times is None else stream.times[t]])
        out = engine.advance([b"a"], row[None], when)
        engine.commit()
        for output in step.contract.outputs:
            value = out.outputs[output.name][0]
            blank = np.full((len(stream.x), *value.shape), np.nan if value.dtype.kind == "f" else 0, value.dtype)
            found.setdefault(str(output.role), blank)[t] = value
    return found


@pytest.mark.parametrize("missing", ["own-forecast", "reject"])
def test_stepping_is_the_engines_row_by_row(missing: str) -> None:
    """To the bit, with readings and whole rows missing, rows that are refused, and streams of different lengths."""
    streams = labelled(holes=True)
    streams[0].x[50:53] = np.nan
    streams[1].x[70, 1] = np.inf
    streams.append(Stream("late", streams[1].x[80:150]))
    step = model(missing=missing)
    for found, stream in zip(stepped(step, streams), streams, strict=True):
        expected = one_by_one(step, stream)
        assert set(found) == set(expected) and "severity" in found
        for role, value in expected.items():
            np.testing.assert_array_equal(found[role], value, err_msg=role)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_its_detectors_twin_over_a_forecast_by_hand(name: str) -> None:
    """Last value forecasts the last reading that there was, value the mean of the first half of training."""
    step, stream = model(), labelled(holes=True, count=1)[0]
    stream.x[:4, 0] = np.nan  # before its first reading there is nothing but the mean
    train = labelled(steps=300, count=1)[0].x
    found = backtest(step, [stream], training={"a": train})
    mean = train[: round(len(train) * (1 - HALF))].astype(np.float64).mean(axis=0)
    features = step.contract.feature_names
    known = Forecasts(features=features, targets=tuple(range(len(features))), mean=mean)
    forecasts, held = [], mean.copy()
    for row in stream.x:
        held = np.where(np.isnan(row), held, row)
        forecasts.append(held if name == "last value" else mean)
    (block,) = blocks_of(series_of({"a": train}, features, HALF)[0])
    before = train[:, None] if name == "last value" else np.broadcast_to(mean, train[:, None].shape)
    past = Past(block, before.astype(np.float32))
    how = judging_of(step.contract)
    d = with_threshold(measured([past], known, how), [past], how).detector
    assert d.others is None and (d.alpha, d.every) == (0.3, 40)
    told = twin.run(d, stream.x[:, None], np.array(forecasts)[:, None])
    sure = told.sure[:, 0]
    assert sure.mean() > 0.8
    outputs = found.verdicts[name][0].outputs
    for role in ("score", "threshold", "expected"):
        np.testing.assert_allclose(outputs[role][sure], told.outputs[role][:, 0][sure], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(outputs["event"][sure], told.outputs["event"][:, 0][sure])
    assert (outputs["event"] != 0).any(), "a story without an event tests nothing"


def test_a_baseline_takes_the_rows_that_the_model_takes() -> None:
    """A row that the service refuses leaves the same gap in all three, and none judges by it."""
    streams = labelled(count=1, holes=True)
    streams[0].x[60, 0] = -np.inf
    found = backtest(model(missing="reject"), streams)
    gaps = np.isnan(found.verdicts[MODEL][0].outputs["score"])
    assert gaps[60] and 0.05 < gaps.mean() < 0.5
    for name in BASELINES:
        np.testing.assert_array_equal(np.isnan(found.verdicts[name][0].outputs["score"]), gaps)


def test_spans_are_as_long_as_the_model_counts() -> None:
    """An event of n timesteps is n rows; the stream's last may go on."""
    for outputs in stepped(model(), labelled()):
        verdict = Verdict(outputs, 0)
        assert len(verdict.spans) >= 3
        for start, end in verdict.spans:
            assert outputs["event"][start] == 1
            assert abs(outputs["event"][end - 1]) == end - start > CALM or end == len(outputs["event"])


def test_events_that_touch_are_two() -> None:
    """So many events as are listed are counted, also where one begins in the row after another's last."""
    count = np.array([0, 1, 2, -3, 1, 2, -3, 0, 1, 2, 0, -3])  # the last has a row in it that was refused
    for begin, events in ((0, 3), (3, 2), (4, 2), (7, 1)):
        verdict = Verdict({"event": count}, begin)
        assert len(verdict.events) == events
        assert judged(verdict.alarmed[begin:], np.zeros(len(count) - begin)).alarms == events


def test_the_table_is_made_of_the_measures() -> None:
    """Each number, from the model's own outputs, over what lies behind the rows that count for nobody."""
    streams = labelled()
    found = backtest(model(), streams, skip=0.1)
    row, verdicts = found.table[0], found.verdicts[MODEL]
    begins = [round(len(s.x) * 0.1) for s in streams]
    assert [v.begin for v in verdicts] == begins
    parts = [
        (s.labels[begin:], v.outputs["score"][begin:], v.alarmed[begin:])
        for s, v, begin in zip(streams, verdicts, begins, strict=True)
        if s.labels is not None
    ]
    assert row.vus_pr == pytest.approx(np.mean([vus_pr(labels, score) for labels, score, _ in parts]))
    assert row.auc_pr == pytest.approx(np.mean([auc_pr(labels, score) for labels, score, _ in parts]))
    each = [judged(alarmed, labels) for labels, _, alarmed in parts]
    assert (row.events, row.found) == (4, sum(one.found for one in each))
    assert row.alarms == sum(one.alarms for one in each) == sum(len(v.events) for v in verdicts)
    assert row.outside == sum(one.outside for one in each) > 0
    assert row.precision == pytest.approx(1 - row.outside / row.alarms)
    assert row.delay_rows == np.median([delay for one in each for delay in one.delays])
    calm = sum(int((~labels).sum()) for labels, _, _ in parts)
    assert row.alarms_per_week == pytest.approx(alarms_per_week(row.outside, calm, PERIOD))
    assert [one.detector for one in found.table] == [MODEL, *BASELINES]


def test_what_is_skipped_counts_for_nobody() -> None:
    """Labels there change no number."""
    streams = labelled()
    skipped = [replace(s, labels=(np.arange(len(s.x)) < 30) | np.asarray(s.labels)) for s in streams]
    assert backtest(model(), skipped, skip=0.1).table == backtest(model(), streams, skip=0.1).table


def test_without_labels_only_alarms_are_counted() -> None:
    """Nothing is said of what nobody knows, also where the data's period is another than the model's."""
    streams = [replace(stream, labels=None) for stream in labelled()]
    found = backtest(model(), streams, period_seconds=60.0)
    for row in found.table:
        assert (row.vus_pr, row.auc_pr, row.precision, row.recall, row.delay_rows, row.events) == (None,) * 5 + (0,)
        rows = sum(len(s.x) - v.begin for s, v in zip(streams, found.verdicts[MODEL], strict=True))
        assert row.alarms_per_week == pytest.approx(row.alarms * 604_800 / (rows * 60))


def refused(change: dict[str, Any], step: StepModel | None = None, streams: list[Stream] | None = None) -> str:
    with pytest.raises((DataError, ExportError)) as raised:
        backtest(step or model(), labelled() if streams is None else streams, **change)
    return str(raised.value)


def test_what_cannot_be_tested_is_told() -> None:
    """One sentence that names what is wrong and the way out."""
    assert "'plant' has no detector to be tested: fit or convert it" in refused({}, model(detector=None))
    assert "the first 0.001 of each stream are too few rows" in refused({"skip": 0.001})
    nothing = [Stream("dead", np.full((30, 3), np.inf, np.float32))]
    assert "stream 'dead' has no row that the model takes" in refused({}, None, nothing)
    blind = {"a": np.where(np.arange(3) == 1, np.nan, np.ones((50, 3)))}
    words = refused({"training": blind})
    assert "cannot be calibrated on 50 rows of training" in words and "'s1' has no reading" in words


def test_every_event_says_what_made_it() -> None:
    """Its features by their share of the score while that was over the threshold; what was seen and what expected."""
    streams = labelled()
    found = backtest(model(), streams)
    for place, (stream, verdict) in enumerate(zip(streams, found.verdicts[MODEL], strict=True)):
        alarms = alarms_of(found, place)
        assert [(alarm.start, alarm.end) for alarm in alarms] == verdict.events
        for alarm in alarms:
            rows = np.arange(alarm.start, alarm.end)
            assert alarm.severity == pytest.approx(verdict.outputs["severity"][rows].max(), rel=1e-5)
            over = rows[verdict.outputs["anomaly"][rows]]
            shares = verdict.outputs["contribution"][over].mean(axis=0)
            assert [why.share for why in alarm.why] == pytest.approx(sorted(shares, reverse=True)[: len(alarm.why)])
            for why in alarm.why:
                column = found.contract.feature_names.index(why.feature)
                assert why.row in over and why.seen == pytest.approx(stream.x[why.row, column])
                said = {"others": "related", "level": "related"}.get(str(why.reason), "expected")
                assert why.expected == pytest.approx(verdict.outputs[said][why.row, column])


def test_every_label_says_who_found_it() -> None:
    """The first alarm in it, and after how many of its rows; or that nobody did, or that it is not judged."""
    found = made_up(events=3, labels=2, begin=500)
    stream, verdict = found.streams[0], found.verdicts[MODEL][0]
    assert stream.labels is not None
    labels, alarms = labels_of(found, 0), alarms_of(found, 0)
    assert [(label.start, label.end) for label in labels] == events_of(stream.labels)
    assert [label.counts for label in labels] == [False, True]
    assert labels[0].found_by is None and labels[1].delay == 4
    assert alarms[labels[1].found_by - 1].label == 2 if labels[1].found_by else False
    assert [alarm.label for alarm in alarms] == [2, None] and len(verdict.spans) == 3
    assert labels_of(found, 0, BASELINES[0])[1].found_by is None


@pytest.mark.parametrize("begin", [0, 20, 26, 356, 362, 366, 367, 368])
def test_an_alarm_lies_in_a_label_where_the_measures_say_so(begin: int) -> None:
    """Also where only its end is judged, and the label has ended before."""
    found = made_up(rows=400, events=2, labels=2, begin=begin)
    stream, verdict = found.streams[0], found.verdicts[MODEL][0]
    assert stream.labels is not None
    counted = judged(verdict.alarmed[begin:], stream.labels[begin:])
    alarms = alarms_of(found, 0)
    assert (len(alarms), sum(alarm.label is None for alarm in alarms)) == (counted.alarms, counted.outside)
    assert sum(label.found_by is not None for label in labels_of(found, 0)) == counted.found


def test_the_leading_features_are_those_of_the_alarms() -> None:
    """What contributes outside of alarms leads nobody astray."""
    found = made_up(width=4)
    outputs = found.verdicts[MODEL][0].outputs
    alarmed = found.verdicts[MODEL][0].alarmed
    outputs["contribution"][:] = np.where(alarmed[:, None], [0.1, 0.2, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0])
    assert leading(found, 0, 3) == [2, 1, 0]


def test_the_document_says_everything_again() -> None:
    """It survives JSON, and the table, the events and the labels can be had back from it."""
    found = backtest(model(), labelled())
    told = document(found, "plant.csv")
    again = json.loads(json.dumps(told, allow_nan=False))
    assert json.dumps(again) == json.dumps(told)
    assert tuple(Row(**row) for row in again["table"]) == found.table
    assert again["model"] == {"name": "plant", "version": "1", "sha256": found.fingerprint}
    for place, entry in enumerate(again["streams"]):
        for name, verdicts in found.verdicts.items():
            assert [(one["start"], one["end"]) for one in entry["events"][name]] == verdicts[place].events
        assert [one["found_by"] for one in entry["labels"]] == [one.found_by for one in labels_of(found, place)]
        assert entry["events"][MODEL][0]["begin"].startswith("2023-11-1")
