"""Goal: the configuration that the image carries runs the service, and the commands that it names exist."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from kafka import KafkaProducer
from typer.testing import CliRunner

from statestep.consumers.cli import app
from statestep.consumers.fleet import simulate

from .service_process import ServiceProcess, TopicReader, wait_until

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "consumers" / "statestep" / "consumers" / "models" / "pump.onnx"
CONFIG = ROOT / "deploy" / "statestep.toml"


def test_the_service_runs_with_the_image_s_configuration(
    bootstrap_servers: str, topic: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what a place differs in comes from the environment; readings in, predictions out, ready and counted."""
    name = topic(4)
    place = {
        "MODEL": str(MODEL),
        "BOOTSTRAP_SERVERS": bootstrap_servers,
        "INPUT": name,
        "OUTPUT": f"{name}-out",
        "APP_ID": name,
        "HTTP_HOST": "127.0.0.1",
    }
    for variable, value in place.items():
        monkeypatch.setenv(f"STATESTEP_{variable}", value)
    fleet = simulate(pumps=6, days=0.1, seed=3)
    producer = KafkaProducer(bootstrap_servers=bootstrap_servers)
    sent = [reading for step in range(len(fleet.times)) for reading in fleet.timestep(step)]
    for reading in sent:
        producer.send(name, key=reading.key, value=reading.value)
    producer.flush()
    producer.close()
    with ServiceProcess(tmp_path / "service.log", "--config", str(CONFIG)) as service:
        reader = TopicReader(bootstrap_servers, f"{name}-out")
        records = reader.read_until(lambda found: len(found) >= len(sent), "a prediction for every reading")
        reader.close()
        service.wait_until_ready()
        predictions = 'statestep_predictions_total{model="pump"}'  # counted once the service, too, knows of the commit
        wait_until(lambda: service.metric(predictions) >= len(sent), "the count of predictions")
        assert service.metric(predictions) == len(sent)
        assert json.loads(service.get("/streams"))["streams"] == 6
        service.terminate()
    assert {json.loads(record.value)["stream"] for record in records} == {f"pump-{n:02}" for n in range(1, 7)}


def test_every_setting_of_the_image_is_one() -> None:
    """`--print-config` gives back what the file says."""
    shown = CliRunner().invoke(app, ["run", "--config", str(CONFIG), "--print-config"])
    assert shown.exit_code == 0, shown.output
    given = tomllib.loads(CONFIG.read_text())
    assert given.items() <= tomllib.loads(shown.output).items()


def test_every_command_of_image_and_composition_is_one() -> None:
    """The Dockerfile's CMD, and each command that the composition gives our image, is understood up to its flags."""
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    cmd = next(line for line in dockerfile.splitlines() if line.startswith('CMD ["run"'))
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    ours = [
        service["command"] for service in services.values() if service["image"] == "statestep" and "command" in service
    ]
    for command in [json.loads(cmd.removeprefix("CMD ")), *ours]:
        shown = CliRunner().invoke(app, [*command, "--help"])
        assert shown.exit_code == 0, f"{shlex.join(command)}: {shown.output}"
        known = CliRunner().invoke(app, [command[0], "--help"]).output
        assert all(part in known for part in command if part.startswith("--")), shlex.join(command)
