"""The scrape configuration and the alerts, under promtool and under a real Prometheus that scrapes a real page."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from prometheus_client import start_http_server

from statestep.consumers.metrics import Metrics

from .promql import check
from .test_dashboard import VARIABLES

PROMETHEUS_SECONDS = 60.0  # to start and to have scraped twice, on a busy machine


@pytest.fixture(scope="module")
def tools(root: Path) -> Path:
    """The folder with promtool and prometheus, filled by `make setup`."""
    subprocess.run([root / "tests/deploy/get_prometheus.sh"], check=True)
    return root / ".tools/bin"


@pytest.fixture(scope="module")
def alerts(deploy: Path) -> list[dict[str, Any]]:
    """The alert rules."""
    groups = yaml.safe_load((deploy / "prometheus/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(tools: Path, *arguments: str | Path) -> None:
    """Run promtool; what it complains of fails the test."""
    run = subprocess.run([tools / "promtool", *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_promtool_accepts_the_configuration(tools: Path, deploy: Path) -> None:
    """`promtool check` accepts the scrape configuration and the rules that it names."""
    promtool(tools, "check", "config", deploy / "prometheus/prometheus.yml")
    promtool(tools, "check", "rules", deploy / "prometheus/alerts.yml")


def test_alerts_fire_when_they_should_and_only_then(tools: Path, deploy: Path, alerts: list[dict[str, Any]]) -> None:
    """`promtool test rules` passes, and its cases hold one that fires and one that does not for every alert."""
    cases = deploy / "prometheus/alerts_test.yml"
    promtool(tools, "test", "rules", cases)
    checked = [case for test in yaml.safe_load(cases.read_text())["tests"] for case in test["alert_rule_test"]]
    fires = {case["alertname"] for case in checked if case["exp_alerts"]}
    silent = {case["alertname"] for case in checked if not case["exp_alerts"]}
    assert fires == silent == {rule["alert"] for rule in alerts}


def test_alerts_watch_series_of_the_service(alerts: list[dict[str, Any]], known_series: dict[str, set[str]]) -> None:
    """Each alert's expression names series and labels that exist."""
    for rule in alerts:
        check(rule["expr"], known_series)


def test_every_alert_is_explained(alerts: list[dict[str, Any]], deploy: Path) -> None:
    """Each alert has a severity, two sentences, and a section in deploy/README.md on what to do."""
    readme = (deploy / "README.md").read_text()
    for rule in alerts:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert {"summary", "description"} <= rule["annotations"].keys()
        assert f"`{rule['alert']}`" in readme, rule["alert"]


@pytest.fixture
def prometheus(tools: Path, deploy: Path, metrics: Metrics, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus under our configuration that scrapes `metrics`; only where to find it is changed."""
    page, thread = start_http_server(0, addr="127.0.0.1", registry=metrics.registry)
    shutil.copy(deploy / "prometheus/alerts.yml", tmp_path)
    config = yaml.safe_load((deploy / "prometheus/prometheus.yml").read_text())
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "statestep")
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{page.server_port}"]}]
    config["scrape_configs"] = [job]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with (tmp_path / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [tools / "prometheus", *arguments, f"--web.listen-address={address}"], stdout=log, stderr=log
        )
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(timeout=30)
        page.shutdown()
        page.server_close()
        thread.join()


def fetch(url: str) -> Any:
    """The `data` of an answer of Prometheus's API; None while it does not listen yet."""
    try:
        with urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]
    except (URLError, ConnectionError):
        return None


def query(prometheus: str, expression: str) -> list[Any]:
    """What an expression yields now."""
    data = fetch(f"{prometheus}/api/v1/query?{urlencode({'query': expression})}")
    return list(data["result"]) if data else []


def test_a_real_prometheus_reads_what_the_service_counts(prometheus: str, metrics: Metrics, deploy: Path) -> None:
    """Scraped under our configuration, counts arrive, every alert is evaluated, every panel finds data."""
    metrics.produced.inc(41)
    metrics.scores.observe([0.5, 20.0], "pump")
    expressions = panel_expressions(deploy)
    empty = dict.fromkeys(expressions)
    deadline = time.monotonic() + PROMETHEUS_SECONDS
    while empty and time.monotonic() < deadline:
        metrics.produced.inc()
        metrics.refused("dead-letter", "malformed", 1)
        empty = {name: None for name in empty if not query(prometheus, name)}
        time.sleep(0.1)
    assert not empty, f"panels without data: {list(empty)}"

    produced = query(prometheus, 'statestep_records_produced_total{job="statestep"}')
    assert [series["metric"]["topic"] for series in produced] == ["sensors"]
    assert float(produced[0]["value"][1]) > 41
    below_ten = query(prometheus, 'statestep_anomaly_score_bucket{model="pump", le="10.0"}')
    assert [series["value"][1] for series in below_ten] == ["1"]

    rules = [rule for group in fetch(f"{prometheus}/api/v1/rules")["groups"] for rule in group["rules"]]
    assert rules and {rule["health"] for rule in rules} == {"ok"}


def panel_expressions(deploy: Path) -> list[str]:
    """Every expression of the dashboard, over a window that a test can wait for."""
    variables = {**VARIABLES, "$__rate_interval": "10s", "$__range": "10s"}
    dashboard = json.loads((deploy / "grafana/dashboards/statestep.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    for name, value in variables.items():
        found = [expression.replace(name, value) for expression in found]
    return found
