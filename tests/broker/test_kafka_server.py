"""The test broker itself: that it answers, keeps its data, and ends when told to, it and no other process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.errors import MessageSizeTooLargeError

from . import kafka_server
from .kafka_server import (
    KafkaServer,
    KafkaServerError,
    answers,
    command_line,
    fetch_jars,
    free_port,
    port_is_open,
    running_pid,
)


def read_all(bootstrap_servers: str, topic: str, count: int) -> list[bytes]:
    """The first `count` values of a topic, or as many as come within 20 s."""
    with KafkaConsumer(
        topic,
        bootstrap_servers=bootstrap_servers,
        auto_offset_reset="earliest",
        consumer_timeout_ms=20_000,
        max_partition_fetch_bytes=kafka_server.RECORD_BYTES_MAX,
        fetch_max_bytes=kafka_server.RECORD_BYTES_MAX,
        check_crcs=False,  # in pure Python it takes seconds for 30 MB
    ) as consumer:
        return [record.value for _, record in zip(range(count), consumer, strict=False)]


def test_records_come_back_in_order(bootstrap_servers: str, topic: Callable[..., str]) -> None:
    """What is produced to a topic of the shared broker is read back, in order."""
    name = topic()
    values = [f"value {i}".encode() for i in range(100)]
    with KafkaProducer(bootstrap_servers=bootstrap_servers) as producer:
        for value in values:
            producer.send(name, value)
        producer.flush()
    assert read_all(bootstrap_servers, name, 100) == values


def test_a_topic_is_as_asked_for(bootstrap_servers: str, topic: Callable[..., str]) -> None:
    """The factory's topics have the partitions and the configuration asked for, and a name of their own each."""
    wide, narrow = topic(partitions=3), topic(config={"max.message.bytes": "1000"})
    with KafkaAdminClient(bootstrap_servers=bootstrap_servers) as admin:
        described = {found["name"]: len(found["partitions"]) for found in admin.describe_topics([wide, narrow])}
    assert described == {wide: 3, narrow: 1}
    with KafkaProducer(bootstrap_servers=bootstrap_servers) as producer:
        producer.send(wide, bytes(2000)).get(timeout=10)
        with pytest.raises(MessageSizeTooLargeError):
            producer.send(narrow, bytes(2000)).get(timeout=10)


def test_a_record_of_30_mb_passes(bootstrap_servers: str, topic: Callable[..., str]) -> None:
    """The broker takes and gives a record as large as the poison tests send."""
    name, value = topic(), os.urandom(30_000_000)
    with KafkaProducer(bootstrap_servers=bootstrap_servers, max_request_size=kafka_server.RECORD_BYTES_MAX) as producer:
        producer.send(name, value).get(timeout=30)
    assert read_all(bootstrap_servers, name, 1) == [value]


@pytest.mark.parametrize("end", [KafkaServer.stop, KafkaServer.kill], ids=["stop", "kill"])
def test_an_acknowledged_record_outlives_the_broker(kafka: KafkaServer, end: Callable[[KafkaServer], None]) -> None:
    """After an orderly stop and after a kill alike, the broker comes back at the same port with its data."""
    kafka.start()
    with KafkaProducer(bootstrap_servers=kafka.bootstrap_servers) as producer:
        with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
            admin.create_topics({"kept": {"num_partitions": 1}}, wait_for_metadata=True)
        producer.send("kept", b"still here").get(timeout=10)
    end(kafka)
    assert running_pid(kafka.data) is None
    assert not port_is_open(kafka.port)
    kafka.start()
    assert read_all(kafka.bootstrap_servers, "kept", 1) == [b"still here"]


def test_a_port_in_use_is_named(kafka: KafkaServer) -> None:
    """Starting on an occupied port fails with a sentence that names it, and leaves its owner alone."""
    in_use = pytest.raises(KafkaServerError, match=f"port {kafka.port} is in use")
    with socket.create_server(("127.0.0.1", kafka.port)), in_use:
        kafka.start()


def test_a_broker_that_fails_shows_its_log(kafka: KafkaServer) -> None:
    """A broker that ends while starting raises with the reason that it logged."""
    (kafka.data / "log").parent.mkdir()
    (kafka.data / "log").write_text("a file where Kafka wants a folder")
    with pytest.raises(KafkaServerError, match="ends with"):
        kafka.start()


def test_a_stale_pid_file_ends_no_stranger(tmp_path: Path) -> None:
    """A process that inherited the number in the pid file is neither taken for the broker nor signalled."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        (tmp_path / "broker.pid").write_text(str(stranger.pid))
        assert running_pid(tmp_path) is None
        assert kafka_server.end_broker(tmp_path, signal.SIGKILL, timeout_seconds=1) is False
        assert stranger.poll() is None
        stranger.communicate(b"\n")


def test_the_command_line_ends_exactly_its_own_broker(kafka: KafkaServer, tmp_path: Path) -> None:
    """`start` outlives its command, `stop` ends that broker, and another broker beside it goes on."""
    kafka.start()
    environment = {name: value for name, value in os.environ.items() if name != kafka_server.BOOTSTRAP_VARIABLE}

    def run(command: str) -> subprocess.CompletedProcess[str]:
        arguments = [command, "--data", str(tmp_path / "other"), "--port", str(free_port())]
        return subprocess.run(
            [sys.executable, kafka_server.__file__, *arguments], env=environment, capture_output=True, text=True
        )

    assert run("status").returncode == 1
    started = run("start")
    assert started.returncode == 0, started.stderr
    pid = running_pid(tmp_path / "other")
    assert pid is not None and "kafka.Kafka" in command_line(pid)
    assert run("status").returncode == 0
    assert run("stop").returncode == 0
    assert command_line(pid) == ""
    assert answers(kafka.bootstrap_servers)


def test_an_existing_broker_is_used_and_left_alone(bootstrap_servers: str, tmp_path: Path) -> None:
    """Where the environment names a broker, `start` checks it and starts nothing, and `stop` leaves it running."""
    for command in ("start", "stop"):
        done = subprocess.run(
            [sys.executable, kafka_server.__file__, command, "--data", str(tmp_path)],
            env={**os.environ, kafka_server.BOOTSTRAP_VARIABLE: bootstrap_servers},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 and bootstrap_servers in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert answers(bootstrap_servers)


def test_a_half_finished_fetch_is_not_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Maven that fails half-way leaves no folder of jars behind, and the next fetch is a whole one."""
    broken = tmp_path / "bin" / "mvn"
    broken.parent.mkdir()
    make_folder = 'for a in "$@"; do case $a in -DoutputDirectory=*) mkdir "${a#*=}"; esac; done'
    broken.write_text(f"#!/bin/sh\n{make_folder}\nexit 1\n")
    broken.chmod(0o755)
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{broken.parent}{os.pathsep}{os.environ['PATH']}")
        with pytest.raises(KafkaServerError, match="could not fetch"):
            fetch_jars(tmp_path / "jars")
    assert list((tmp_path / "jars").iterdir()) == []
    jars = fetch_jars(tmp_path / "jars")
    assert [path.name for path in jars.glob("kafka_2.13-*.jar")] == [f"kafka_2.13-{jars.name}.jar"]
    assert len(list(jars.glob("*.jar"))) > 40
