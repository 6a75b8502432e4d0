"""The Grafana dashboard: every query is PromQL over series that exist, every panel says what it shows."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from .promql import check

Panel = dict[str, Any]

VARIABLES = {"$__rate_interval": "1m", "$__range": "30m", "$job": ".+", "$instance": ".+"}


@pytest.fixture(scope="module")
def dashboard(deploy: Path) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    read: dict[str, Any] = json.loads((deploy / "grafana/dashboards/statestep.json").read_text())
    return read


@pytest.fixture(scope="module")
def panels(dashboard: dict[str, Any]) -> list[Panel]:
    """The panels that show something, rows left out."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def substitute(expression: str) -> str:
    """An expression with Grafana's variables filled in."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, f"{expression} has a variable that the dashboard does not define"
    return expression


def test_every_query_finds_series_of_the_service(panels: list[Panel], known_series: dict[str, set[str]]) -> None:
    """Each expression is valid PromQL, names series and labels that exist, and obeys the job and instance chosen."""
    for panel in panels:
        for target in panel["targets"]:
            for selector in check(substitute(target["expr"]), known_series):
                assert {"job", "instance"} <= selector.labels, f"{panel['title']}: {selector.series}"


def test_counters_and_histograms_are_read_as_rates(panels: list[Panel], known_series: dict[str, set[str]]) -> None:
    """A counter's value is meaningless since a restart sets it to zero: none is read but through a range."""
    for panel in panels:
        for target in panel["targets"]:
            for series, _, ranged in check(substitute(target["expr"]), known_series):
                cumulative = series.endswith(("_total", "_bucket", "_sum", "_count"))
                assert ranged or not cumulative, f"{panel['title']}: {series}"


def test_every_panel_says_what_it_shows(dashboard: dict[str, Any], panels: list[Panel]) -> None:
    """Titles are unique, descriptions are sentences, values have a unit, sources are the one chosen."""
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in panels:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    """Each panel lies within the 24 columns and covers no other."""
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for a, b in combinations(places, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, f"{a} overlaps {b}"


def test_the_dashboard_is_provisioned(dashboard: dict[str, Any], deploy: Path) -> None:
    """Grafana finds it where compose puts it, under an address that stays, read-only, over the data source given."""
    assert dashboard["uid"] == "statestep" and dashboard["editable"] is False
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource", "job", "instance"]
    provisioning = deploy / "grafana/provisioning"
    provider = yaml.safe_load((provisioning / "dashboards/statestep.yaml").read_text())["providers"][0]
    source = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"][0]
    grafana = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]["grafana"]
    folder = provider["options"]["path"]
    assert f"./grafana/dashboards:{folder}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == f"{folder}/statestep.json"
    assert source["type"] == "prometheus" and source["isDefault"] is True
