"""The image, the composition and their configuration fit each other and the repository; no docker is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from prometheus_client import CollectorRegistry

from statestep.consumers.config import Settings, load
from statestep.consumers.http import Health, HttpServer, Pages

INSTRUCTIONS = {
    *("FROM", "ARG", "ENV", "LABEL", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "VOLUME", "STOPSIGNAL"),
    *("HEALTHCHECK", "ENTRYPOINT", "CMD"),
}

Instruction = tuple[str, str]


def dockerfile(path: Path) -> list[Instruction]:
    """The instructions of a Dockerfile with their arguments, comments dropped and continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


@pytest.fixture(scope="module")
def stages(deploy: Path) -> list[list[Instruction]]:
    """The instructions of each stage of the image."""
    found: list[list[Instruction]] = []
    for word, rest in dockerfile(deploy / "Dockerfile"):
        if word == "FROM":
            found.append([])
        found[-1].append((word, rest))
    return found


@pytest.fixture(scope="module")
def services(deploy: Path) -> dict[str, dict[str, Any]]:
    """The services of the composition, merge keys resolved."""
    read: dict[str, dict[str, Any]] = yaml.safe_load((deploy / "compose.yaml").read_text())["services"]
    return read


@pytest.fixture(scope="module")
def settings(deploy: Path) -> Settings:
    """The image's configuration as `statestep run` reads it, the environment left out."""
    return load(deploy / "statestep.toml", {}, environ={})


def named(stage: list[Instruction], word: str) -> list[str]:
    """The arguments of every `word` in a stage."""
    return [rest for instruction, rest in stage if instruction == word]


def test_the_image_is_well_formed(stages: list[list[Instruction]]) -> None:
    """Every instruction exists, both stages start from the same pinned slim Python, programs are in exec form."""
    assert {word for stage in stages for word, _ in stage} <= INSTRUCTIONS
    bases = [named(stage, "FROM")[0].split()[0] for stage in stages]
    assert len(set(bases)) == 1 and re.fullmatch(r"python:3\.\d+-slim-\w+", bases[0])
    for word in ("ENTRYPOINT", "CMD"):
        assert all(isinstance(part, str) for part in json.loads(named(stages[-1], word)[0]))


def test_what_the_image_copies_exists(stages: list[list[Instruction]], root: Path, deploy: Path) -> None:
    """Each COPY finds its source in the repository, and the ignore file lets it into the build."""
    ignore = (deploy / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = [line.removeprefix("!") for line in ignore if line.startswith("!")]
    assert "*" in ignore
    sources = [
        source
        for stage in stages
        for rest in named(stage, "COPY")
        if not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (root / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in allowed), f"{source} is not let into the build"


def test_the_wheel_has_all_it_needs(stages: list[list[Instruction]], root: Path) -> None:
    """What pyproject.toml names for the build is copied into the stage that builds the wheel."""
    project = tomllib.loads((root / "pyproject.toml").read_text())
    wanted = [project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"]
    wanted += [package.split("/")[0] for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]]
    copied = {source for rest in named(stages[0], "COPY") for source in rest.split()[:-1]}
    assert set(wanted) <= copied


def test_the_image_holds_no_torch_and_no_root(stages: list[list[Instruction]], root: Path) -> None:
    """What is installed does not need torch, and runs as a numbered user that is not root."""
    installs = [rest for stage in stages for rest in named(stage, "RUN")]
    extras = {name for line in installs for found in re.findall(r"\[(.*?)\]", line) for name in found.split(",")}
    assert len(installs) == 2 and extras == {"compression"}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + [one for name in extras for one in project["optional-dependencies"][name]]
    assert not any(requirement.startswith("torch") for requirement in needed)
    users = [int(part) for part in named(stages[-1], "USER")[0].split(":")]
    assert len(users) == 2 and min(users) > 0


def test_the_image_starts_our_command(stages: list[list[Instruction]], root: Path) -> None:
    """Its entry point is the project's command, with the configuration that the image holds."""
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    assert json.loads(named(stages[-1], "ENTRYPOINT")[0])[0] in scripts
    command, flag, path = json.loads(named(stages[-1], "CMD")[0])
    assert (command, flag) == ("run", "--config")
    assert f"deploy/statestep.toml {path}" in named(stages[-1], "COPY")


@pytest.mark.parametrize(("ready", "code"), [(True, 0), (False, 1)])
def test_the_health_check_tells_ready_from_not_ready(
    stages: list[list[Instruction]], settings: Settings, ready: bool, code: int
) -> None:
    """The image's own check, run against the service's HTTP server: 0 when ready, 1 when not."""
    command = named(stages[-1], "HEALTHCHECK")[0].partition("CMD ")[2]
    python, flag, program = json.loads(command)
    assert (python, flag) == ("python", "-c") and f":{settings.http_port}/" in program
    server = HttpServer(
        CollectorRegistry(), Pages(lambda: Health(True, ready, "a test"), lambda n: {}, lambda k: []), port=0
    )
    try:
        here = program.replace(f":{settings.http_port}/", f":{server.port}/")
        assert subprocess.run([sys.executable, "-c", here], stderr=subprocess.DEVNULL).returncode == code
    finally:
        server.close()


def test_the_parts_agree(services: dict[str, dict[str, Any]], settings: Settings, deploy: Path, root: Path) -> None:
    """Topic, broker, port, path of the model and release of Kafka are the same wherever they are written."""
    fleet, create = services["fleet"]["command"], services["topics"]["command"]
    assert settings.bootstrap_servers == fleet[fleet.index("--bootstrap-servers") + 1]
    assert f"--bootstrap-server={settings.bootstrap_servers}" in create
    assert settings.input == fleet[fleet.index("--topic") + 1]
    assert f"--topic={settings.input}" in create
    assert f"PLAINTEXT://{settings.bootstrap_servers}" in services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
    assert settings.http_host == "0.0.0.0", "Prometheus scrapes from another container"
    assert [port.rpartition(":")[2] for port in services["statestep"]["ports"]] == [str(settings.http_port)]
    mounted = [volume.split(":")[1] for volume in services["statestep"]["volumes"]]
    assert str(settings.model) in mounted
    version = ElementTree.parse(root / "tests/broker/pom.xml").findtext(".//{*}kafka.version")
    assert {services[name]["image"] for name in ("kafka", "topics")} == {f"apache/kafka:{version}"}
    jobs = yaml.safe_load((deploy / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    scraped = [target for job in jobs for target in job.get("dns_sd_configs", ())]
    assert [(target["names"], target["port"]) for target in scraped] == [(["statestep"], settings.http_port)]
    source = yaml.safe_load((deploy / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"][0]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in services


def test_what_the_composition_names_exists(services: dict[str, dict[str, Any]], deploy: Path) -> None:
    """Mounted files, build files, volumes and services depended upon are there."""
    volumes = yaml.safe_load((deploy / "compose.yaml").read_text())["volumes"]
    for name, service in services.items():
        for source in (volume.split(":")[0] for volume in service.get("volumes", ())):
            assert (deploy / source).exists() if source.startswith(".") else source in volumes, f"{name}: {source}"
        if "build" in service:
            assert (deploy / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert set(service.get("depends_on", ())) <= services.keys(), name


def test_the_composition_is_closed_and_pinned(services: dict[str, dict[str, Any]]) -> None:
    """Ports are published on loopback only; images that are not built here have a version."""
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        if "build" in service:
            assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        else:
            assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), f"{name}: {service['image']}"
