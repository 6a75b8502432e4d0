"""The report of a backtest: it needs nothing else, escapes every name, and shows every number and every event."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from statestep.export.backtest import BASELINES, MODEL, Backtest, Row, backtest
from statestep.export.detector import EVIDENCE
from statestep.export.findings import alarms_of, labels_of
from statestep.export.report_page import LINES, PICTURES, STREAMS, page
from statestep.export.words import REASONS, calibration, cells, verdict
from statestep.runtime import Output

from .backtests import labelled, made_up, model
from .test_chart import drawn

VOID = {"meta", "br", "link", "img", "input"}
SHAPES = {"path", "rect", "line", "circle"}  # which SVG closes at once
EVIL = "<script>alert('\"&')</script>"


class Read(HTMLParser):
    """The elements of a page, its words, and whether every tag is closed in its turn."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open, f"{self._open} are not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def of(self, tag: str, kind: str | None = None) -> list[dict[str, str | None]]:
        return [a for t, a in self.found if t == tag and (kind is None or kind in str(a.get("class")).split())]

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def rows_of(html: str, kind: str) -> list[list[str]]:
    """The cells of every line of the first table of a kind."""
    table = html.split(f'<table class="{kind}">')[1].split("</table>")[0].split("<tbody>")[1]
    return [
        [" ".join(Read(f"<p>{cell}</p>").text) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", line)]
        for line in table.split("</tr>")[:-1]
    ]


def test_it_needs_nothing_else() -> None:
    """No address, no file, no font and no script from elsewhere; a link leads to a place in the page that is there."""
    html = page(backtest(model(), labelled()), data="plant.csv", labels="windows.json")
    assert not re.search(r"(?i)https?:|//[a-z]|@import|@font-face|<link|<img|<iframe|\bsrc=|fetch\(|import\(", html)
    assert set(re.findall(r"url\(([^)]*)\)", html)) == {"#hatch"}
    read = Read(html)
    anchors = {attrs["id"] for _, attrs in read.found if "id" in attrs}
    leads = {attrs["href"] for _, attrs in read.found if "href" in attrs}
    assert leads and all(str(where).removeprefix("#") in anchors for where in leads)
    assert len(anchors) == sum("id" in attrs for _, attrs in read.found), "an id stands twice"
    assert len(read.of("script")) == len(read.of("style")) == 1
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_every_name_is_escaped() -> None:
    """Of streams, features, units, the model, the files: each is shown as it is, and none is a tag."""
    found = made_up(names=(EVIL, "<b>", "a&b"), width=3)
    features = tuple(replace(feature, unit="<i>") for feature in found.contract.features)
    contract = replace(found.contract, name=EVIL, model_version="<2>", features=features, trained_on=EVIL)
    streams = tuple(replace(stream, name=EVIL) for stream in found.streams)
    html = page(replace(found, contract=contract, streams=streams), data=EVIL, labels=EVIL)
    read = Read(html)
    assert len(read.of("script")) == 1 and not {tag for tag, _ in read.found} & {"i"}
    # head, title, data, labels, trained on, stream, score's title: in words; and in attributes for readouts
    assert read.words.count(EVIL) >= 7 and "a&b, <i>" in read.words
    assert str(read.of("svg", "stack")[0]["aria-label"]).startswith(EVIL)
    assert any(attrs.get("data-name") == EVIL for attrs in read.of("path", "seen"))


@pytest.mark.parametrize("begin", [0, 500])
def test_every_event_is_there(begin: int) -> None:
    """In the table with its reasons, in the picture with its band, and from near."""
    found = made_up(events=7, labels=3, begin=begin)
    html = page(found, data="x.csv")
    read = Read(html)
    alarms, labels = alarms_of(found, 0), labels_of(found, 0)
    assert len(alarms) == len(found.verdicts[MODEL][0].events) == (7 if not begin else 5)
    lines = rows_of(html, "alarms")
    assert [line[0] for line in lines] == [str(alarm.number) for alarm in alarms]
    for line, alarm in zip(lines, alarms, strict=True):
        assert alarm.level in line[3] and f"{alarm.severity:.1f}"[:-1] in line[3]
        assert line[4] == (str(alarm.label) if alarm.label else "outside")
        assert all(f"{why.feature}" in line[5] and f"{100 * why.share:.0f} %" in line[5] for why in alarm.why)
    assert [line[3].split()[0] for line in rows_of(html, "labels")] == ["not" if begin else "found"] * 2 + ["found"]
    stack = html.split('<svg class="stack"')[1].split("</svg>")[0]
    kinds = Counter(re.findall(r'<rect class="([^"]*)"', stack))
    theirs = sum(len(found.verdicts[name][0].events) for name in BASELINES)
    assert (kinds["label"], kinds["label-rail"]) == (len(labels), len(labels))
    assert (kinds["alarm"], kinds["alarm-rail"]) == (len(alarms) + theirs, len(alarms))
    assert kinds["veil"] == bool(begin)
    assert len(read.of("svg", "near")) == len(read.of("figure", "card")) == len(alarms)


def test_bands_stand_over_their_rows() -> None:
    """On the axis that the readout is told of, to a tenth of a pixel."""
    found = made_up(rows=900, events=4)
    html = page(found, data="x.csv")
    stack = html.split('<svg class="stack"')[1].split("</svg>")[0]
    low, high, start, stop = (float(v) for v in re.findall(r"data-x='\[(.*?)\]'", stack)[0].split(","))
    rails = re.findall(r'<rect class="alarm-rail" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', stack)
    times = found.streams[0].times
    assert times is not None
    expected = [(a.start, a.end) for a in sorted(alarms_of(found, 0), key=lambda a: -a.severity)]
    for (left, width), (first, end) in zip(rails, expected, strict=True):
        edges = [(times[first] / 1e9 - 150), (times[end - 1] / 1e9 + 150)]
        pixels = [start + (edge - low) / (high - low) * (stop - start) for edge in edges]
        assert [float(left), float(left) + float(width)] == pytest.approx(pixels, abs=0.11)


def test_a_spike_is_in_the_picture_of_a_long_stream() -> None:
    """The line of the readings reaches both edges of its panel, though 40 rows share a pixel."""
    found = made_up(rows=40_000, width=1)
    found.streams[0].x[23_456] = 500.0
    stack = page(found, data="x.csv").split('<svg class="stack"')[1]
    seen = re.findall(r'<path class="seen" d="([^"]*)" data-name="m00" data-y="([^"]*)"', stack)
    (d, scale) = seen[0]
    low, high, bottom, top = (float(v) for v in scale.strip("[]").split(","))
    points = np.concatenate(drawn(d))
    highest = low + (points[:, 1].min() - bottom) / (top - bottom) * (high - low)
    assert highest == pytest.approx(500, rel=0.01) and len(points) < 2100


def test_the_table_is_the_backtests() -> None:
    """Digit by digit; the model's line is set off; the sentence is there."""
    found = backtest(model(), labelled())
    html = page(found, data="plant.csv", labels="x")
    assert rows_of(html, "measures") == [cells(row, found.period_seconds) for row in found.table]
    row = found.table[0]
    assert cells(row, 300.0)[1:4] == [f"{row.vus_pr:.3f}", f"{row.auc_pr:.3f}", f"{row.found} of {row.events}"]
    assert [attrs.get("class") for tag, attrs in Read(html).found if tag == "tr"].count("model") == 1
    words = Read(html).words
    assert verdict(found.table) in words and found.fingerprint in words and "plant, version 1" in words
    for line in calibration(found):
        assert line in words


def table(model_vus: float | None, *others: float | None) -> list[Row]:
    names = (MODEL, *BASELINES)
    return [Row(n, v, v, 3, 2, 9, 0.5, 0.6, 4.0, 3, 1.5) for n, v in zip(names, (model_vus, *others), strict=True)]


@pytest.mark.parametrize(
    ("vus", "words"),
    [
        ((0.5, 0.4, 0.3), "The model beats both baselines: VUS-PR 0.500, above last value (0.400) and value (0.300)."),
        ((0.3, 0.4, 0.2), "The model beats only one baseline: VUS-PR 0.300, above value (0.200), not above last value"),
        ((0.3, 0.3, 0.4), "The model beats neither baseline: VUS-PR 0.300, not above last value (0.300) or value (0.4"),
        ((None, None, None), "The model raised 9 alarms, 1.5 a week of one stream. Without labels nobody can say"),
    ],
)
def test_the_verdict_is_told_in_words(vus: tuple[float | None, ...], words: str) -> None:
    """Equal is not better."""
    assert verdict(table(*vus)).startswith(words)


def test_without_labels_and_alarms_it_says_so() -> None:
    """No line of a table is empty, and nothing is called outside of labels that are not there."""
    found = made_up(events=0, labels=0)
    streams = tuple(replace(stream, labels=None, times=None) for stream in found.streams)
    read = Read(page(replace(found, streams=streams, period_seconds=None), data="x.csv"))
    assert "No alarm." in read.words and "outside" not in read.words.split("How it was calibrated")[0]
    assert not read.of("rect", "label") and not read.of("table", "alarms")


@pytest.mark.parametrize("gone", ["expected", "contribution", "reason"])
def test_a_detector_that_tells_less_is_shown_too(gone: str) -> None:
    """Scores and events suffice."""
    found = made_up()
    verdict = found.verdicts[MODEL][0]
    told = replace(verdict, outputs={role: value for role, value in verdict.outputs.items() if role != gone})
    contract = replace(found.contract, outputs=tuple(o for o in found.contract.outputs if o.role != gone))
    html = page(replace(found, contract=contract, verdicts=found.verdicts | {MODEL: (told,)}), data="x.csv")
    assert len(rows_of(html, "alarms")) == 5


def test_from_near_a_reading_stands_beside_what_it_is_set_against() -> None:
    """What the others say where these are the reason, else the forecast; and the edges of training that it left."""
    found = made_up(width=1, events=3)
    found.streams[0].x[20:22, 0] = (9.0, -9.0)  # in the first event, beyond what training saw
    outputs = found.verdicts[MODEL][0].outputs
    outputs["related"] = found.streams[0].x + 50
    contract = replace(found.contract, outputs=(*found.contract.outputs, Output("related", role="related")))
    for place, reason in enumerate(EVIDENCE):
        outputs["reason"][:] = place
        html = page(replace(found, contract=contract), data="x.csv")
        near = html.split('<svg class="near"')[1].split("</svg>")[0]
        scale = re.findall(r'class="expected" [^>]*data-y="\[([^"]*)\]"', near)[0]
        assert (float(scale.split(",")[1]) > 40) == (reason == "others")
        assert REASONS[reason] in near and near.count('class="miss"') == 1
        assert near.count('class="edge"') == (2 if reason == "range" else 0)


def test_gaps_and_constant_features_are_drawn() -> None:
    """Nothing of a picture is NaN, whatever is missing."""
    found = made_up(width=3)
    found.streams[0].x[:, 0], found.streams[0].x[:, 1] = 7.0, np.nan
    found.streams[0].x[5, 2] = np.inf
    for role in ("score", "threshold", "expected", "contribution"):
        found.verdicts[MODEL][0].outputs[role][300:420] = np.nan
    html = page(found, data="x.csv")
    assert not re.search(
        r"(?i)[\"' >,-]nan|\binf\b", html.split("<style>")[0] + html.split("</style>")[1].split("<script>")[0]
    )


def test_a_dozen_streams_are_shown_and_the_others_counted() -> None:
    """Those with most alarms and labels first."""
    quiet, busy = made_up(rows=300, streams=20, events=2), made_up(rows=300, streams=20, events=6)
    verdicts = {n: (*quiet.verdicts[n][:17], *busy.verdicts[n][17:]) for n in quiet.verdicts}
    html = page(replace(quiet, verdicts=verdicts), data="x.csv")
    heads = re.findall(r"<h2>(stream \d+)</h2>", html)
    assert heads == [f"stream {n}" for n in (17, 18, 19, *range(9))] and len(heads) == STREAMS
    assert "8 of 20 streams are left out below" in html and "16 alarms lie in them" in html


def size(found: Backtest) -> int:
    return len(page(found, data="x.csv").encode())


def test_sizes_are_bounded() -> None:
    """25,000 rows of 20 features stay below 3 MB whatever lies in them; more rows hardly matter, nor do more events."""
    usual = size(made_up(rows=25_000, width=20, events=300, labels=20))
    assert usual < 1_500_000
    assert size(made_up(rows=100_000, width=20, events=300, labels=20)) < 1.1 * usual
    many = made_up(rows=100_000, width=2, events=3000, labels=0)
    html = page(many, data="x.csv")
    assert len(rows_of(html, "alarms")) == LINES and "2,500 more are left out" in html
    assert html.count('class="card"') == PICTURES and len(html) < 1_500_000
    assert size(made_up(rows=25_000 // 12, width=20, streams=12, events=20)) < 5_000_000


def test_the_same_backtest_gives_the_same_bytes() -> None:
    """No clock, no place and no order of a dictionary shows in it."""
    found = backtest(model(), labelled())
    again = backtest(model(), labelled())
    assert page(found, data="x.csv") == page(again, data="x.csv")
