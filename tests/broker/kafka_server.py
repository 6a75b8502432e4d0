"""A real Kafka broker (one node, KRaft mode) from the jars that Maven fetches: no docker, and data where we say.

Tests start their own on a free port through conftest.py; `make kafka` starts one for a person:

    python tests/broker/kafka_server.py start|stop|status|fetch [--port 9092] [--data .kafka]

It needs Java 17 or later and, the first time, Maven; on Debian as root it installs them. Where the environment
names STATESTEP_TEST_BOOTSTRAP_SERVERS, that broker is used instead and nothing is started or stopped.
Exit codes: 0 done, 1 the broker failed (`status`: none runs), 2 a tool is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.etree import ElementTree

from kafka import KafkaAdminClient
from kafka.errors import KafkaError

POM = Path(__file__).with_name("pom.xml")
KAFKA_DIR = Path(__file__).resolve().parents[2] / ".kafka"
BOOTSTRAP_VARIABLE = "STATESTEP_TEST_BOOTSTRAP_SERVERS"
CLUSTER_ID = "c3RhdGVzdGVwLWthZmthIQ"  # base64 of 16 bytes, as Kafka wants it; any would do
JAVA_MINIMUM = 17
JVM_OPTIONS = [
    *("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),  # a small broker that is up within seconds
    *("-Dorg.slf4j.simpleLogger.showDateTime=true", "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS"),
]
RECORD_BYTES_MAX = 48 * 1024 * 1024  # the tests send records of 20 and 30 MB
LOG_TAIL_LINES = 30
POLL_SECONDS = 0.05


class KafkaServerError(RuntimeError):
    """The broker, or the fetching of its jars, failed; the message says how and shows the log's tail."""


class MissingToolError(KafkaServerError):
    """Java or Maven is missing and could not be installed; the message says what to install."""


class KafkaServer:
    """One broker over one data directory, which outlives it: `start` after `stop` or `kill` finds its topics again.

    `with KafkaServer(data) as kafka:` starts it and, at the end, kills it: what a test wrote need not be kept.
    """

    def __init__(self, data: Path, port: int | None = None) -> None:
        self.data = data.resolve()
        self.port = free_port() if port is None else port
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        """`host:port`, as Kafka clients take it."""
        return f"127.0.0.1:{self.port}"

    def properties(self) -> str:
        """The broker's configuration, one `name=value` a line."""
        return as_properties(server_settings(self.data / "log", self.port, free_port()))

    def start(self, timeout_seconds: float = 60) -> None:
        """Start the broker and return once it answers a metadata request; raise KafkaServerError otherwise."""
        self.begin()
        self.wait_until_it_answers(timeout_seconds)

    def begin(self) -> None:
        """Start the broker's process, and wait for nothing."""
        if running_pid(self.data) is not None:
            raise KafkaServerError(f"a broker already runs over {self.data}; stop it first.")
        if port_is_open(self.port):
            raise KafkaServerError(f"port {self.port} is in use by another program; choose another with --port.")
        self.data.mkdir(parents=True, exist_ok=True)
        self.process = launch(self.data, self.properties(), self.data / "server.log")

    def wait_until_it_answers(self, timeout_seconds: float = 60) -> None:
        """Return once the broker answers a metadata request; otherwise kill it and raise KafkaServerError."""
        assert self.process is not None, "begin comes first"
        log = self.data / "server.log"
        try:
            deadline = time.monotonic() + timeout_seconds
            while not (port_is_open(self.port) and answers(self.bootstrap_servers)):
                if self.process.poll() is not None:
                    raise KafkaServerError(f"Kafka ended while starting; its log {log} ends with:\n{log_tail(log)}")
                if time.monotonic() > deadline:
                    raise KafkaServerError(
                        f"Kafka did not answer within {timeout_seconds:g} s; its log {log} ends with:\n{log_tail(log)}"
                    )
                time.sleep(POLL_SECONDS)
        except BaseException:  # Ctrl-C too: nobody would end it later
            self.kill()
            raise

    def stop(self, timeout_seconds: float = 30) -> None:
        """Shut the broker down in order, as an operator would; harmless where it does not run."""
        self._end(signal.SIGTERM, timeout_seconds)

    def kill(self) -> None:
        """End the broker as a power cut would; harmless where it does not run."""
        self._end(signal.SIGKILL, timeout_seconds=10)

    def _end(self, how: signal.Signals, timeout_seconds: float) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout_seconds)
            self.process = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def launch(data: Path, configuration: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a broker's process over a data directory, formatted first where it is new, and note its process id."""
    java, class_path = find_java(), f"{fetch_jars(KAFKA_DIR / 'jars')}/*"
    properties = data / "server.properties"
    properties.write_text(configuration)
    with log.open("wb") as output:
        if not (data / "log" / "meta.properties").exists():  # to format again changes nothing, and takes seconds
            format_storage = ["kafka.tools.StorageTool", "format", "--ignore-formatted", "-t", CLUSTER_ID]
            command = [java, "-cp", class_path, *format_storage, "-c", str(properties)]
            if subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode != 0:
                raise KafkaServerError(f"Kafka could not format {data}; its log {log} ends with:\n{log_tail(log)}")
        process = subprocess.Popen(
            [java, *JVM_OPTIONS, "-cp", class_path, "kafka.Kafka", str(properties)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that Ctrl-C in the terminal reaches the tests and not their broker
        )
    (data / "broker.pid").write_text(f"{process.pid}\n")
    return process


def server_settings(log_dir: Path, port: int, controller_port: int) -> dict[str, object]:
    """The broker's configuration: loopback only, one replica of everything, quick to start and to rebalance."""
    return {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{controller_port}",
        "controller.listener.names": "CONTROLLER",
        "listeners": f"PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": log_dir,
        # One node, so one replica; few partitions, since each is a folder to create and to load.
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 4,
        # A missing topic must be an error, as on a well-kept cluster.
        "auto.create.topics.enable": "false",
        # The data sets are years old, and retention goes by a record's time: by default they would vanish.
        "log.retention.ms": -1,
        "message.max.bytes": RECORD_BYTES_MAX,
        "replica.fetch.max.bytes": RECORD_BYTES_MAX,
        "socket.request.max.bytes": 2 * RECORD_BYTES_MAX,
        # No waiting: tests form groups all the time, and notice a killed member within a second if they ask to.
        "group.initial.rebalance.delay.ms": 0,
        "group.min.session.timeout.ms": 1000,
        # After a kill the broker is admitted again once its former self is given up: 9 s by default.
        "broker.session.timeout.ms": 4000,
        "broker.heartbeat.interval.ms": 500,
        "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,  # 128 MiB by default, a quarter of our heap
    }


def as_properties(settings: dict[str, object]) -> str:
    """Settings as a Java properties file."""
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def answers(bootstrap_servers: str) -> bool:
    """Whether a broker answers a metadata request there and counts itself as alive."""
    try:
        with KafkaAdminClient(bootstrap_servers=bootstrap_servers, bootstrap_timeout_ms=5000) as admin:
            return bool(admin.describe_cluster()["brokers"])
    except KafkaError:
        return False


def running_pid(data: Path) -> int | None:
    """The process id of the broker over `data`, or None; never that of a stranger who inherited the number."""
    try:
        pid = int((data / "broker.pid").read_text())
    except (FileNotFoundError, ValueError):
        return None
    return pid if command_line(pid).endswith(f" {data / 'server.properties'}") else None


def command_line(pid: int) -> str:
    """The command line of a process, by spaces; empty where it has ended."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ").strip()
        except (FileNotFoundError, ProcessLookupError):
            return ""
    ps = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    return subprocess.run(ps, capture_output=True, text=True).stdout.strip()


def end_broker(data: Path, how: signal.Signals, timeout_seconds: float) -> bool:
    """Signal the broker over `data` and wait until it is gone; False where none runs."""
    pid = running_pid(data)
    if pid is None:
        return False
    os.kill(pid, how)
    deadline = time.monotonic() + timeout_seconds
    while running_pid(data) is not None:
        if time.monotonic() > deadline:
            raise KafkaServerError(f"the broker, process {pid}, still runs {timeout_seconds:g} s after {how.name}.")
        time.sleep(POLL_SECONDS)
    (data / "broker.pid").unlink(missing_ok=True)
    return True


def fetch_jars(folder: Path) -> Path:
    """The folder of Kafka's jars, fetched with Maven the first time; a half-finished fetch is never taken for one."""
    version = ElementTree.parse(POM).findtext(".//{*}kafka.version")
    assert version is not None, "pom.xml names kafka.version"
    jars = folder / version
    if jars.is_dir():
        return jars
    find_java()
    maven = shutil.which("mvn") or (install_on_debian(["maven"]) and shutil.which("mvn"))
    if not maven:
        raise MissingToolError("Maven (mvn) was not found; install it, for example the package maven, and try again.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetching-") as unfinished:
        goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={unfinished}/jars"]
        run = subprocess.run([maven, "-B", "-q", "-f", str(POM), *goal], capture_output=True, text=True)
        if run.returncode != 0:
            raise KafkaServerError(f"Maven could not fetch Kafka {version}; it says:\n{run.stdout[-2000:]}")
        if not jars.is_dir():  # another test run may have been quicker
            Path(unfinished, "jars").rename(jars)
    return jars


def find_java() -> str:
    """The path of a Java that runs Kafka 4, from JAVA_HOME or PATH; installed first on Debian as root."""
    java = installed_java()
    if java is None and install_on_debian(["default-jre-headless"]):
        java = installed_java()
    if java is None:
        raise MissingToolError(
            f"Java {JAVA_MINIMUM} or later was not found; install it, for example the package openjdk-17-jre-headless."
        )
    return java


def installed_java() -> str | None:
    """JAVA_HOME's Java, else PATH's, whichever first is at least JAVA_MINIMUM by what it says of itself."""
    home = os.environ.get("JAVA_HOME")
    for java in (shutil.which("java", path=f"{home}/bin") if home else None, shutil.which("java")):
        text = subprocess.run([java, "-version"], capture_output=True, text=True).stderr if java else ""
        found = re.search(r'version "(\d+)', text)
        if found and int(found[1]) >= JAVA_MINIMUM:
            return java
    return None


def install_on_debian(packages: list[str]) -> bool:
    """Install Debian packages where we may (as root, with apt-get); False where we may not or it fails."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return False
    print(f"installing {' '.join(packages)} with apt-get …", file=sys.stderr)
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "-qq", "update"], env=quiet, stdout=subprocess.DEVNULL)
    install = ["apt-get", "-qq", "install", "--no-install-recommends", *packages]
    return subprocess.run(install, env=quiet, stdout=subprocess.DEVNULL).returncode == 0


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def port_is_open(port: int) -> bool:
    """Whether anybody listens on a TCP port of the loopback interface."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def log_tail(log: Path) -> str:
    """The last lines of a log file."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def run_command(command: str, data: Path, port: int) -> int:
    """Carry out one command of the command line; return its exit code."""
    external = os.environ.get(BOOTSTRAP_VARIABLE)
    if external and command != "fetch":
        alive = answers(external)
        print(f"{BOOTSTRAP_VARIABLE} names {external}, which {'answers' if alive else 'does not answer'}.")
        return 0 if alive or command == "stop" else 1
    pid = running_pid(data)
    if command == "fetch":
        print(f"Kafka's jars are in {fetch_jars(KAFKA_DIR / 'jars')}.")
    elif command == "stop":
        ended = end_broker(data, signal.SIGTERM, timeout_seconds=30)
        print(f"Kafka, process {pid}, has stopped." if ended else f"no broker runs over {data}.")
    elif pid is not None:
        print(f"Kafka runs as process {pid} over {data}.")
    elif command == "status":
        print(f"no broker runs over {data}.")
        return 1
    else:
        server = KafkaServer(data, port)
        server.start()
        assert server.process is not None
        print(f"Kafka answers at {server.bootstrap_servers}, process {server.process.pid}, log {data}/server.log.")
    return 0


def main() -> int:
    """Read the command line, carry it out, and put errors in one sentence."""
    parser = argparse.ArgumentParser(description="A single-node Kafka broker for development and tests.")
    parser.add_argument("command", choices=["start", "stop", "status", "fetch"])
    parser.add_argument("--port", type=int, default=9092, help="port of the broker on 127.0.0.1 (%(default)s)")
    parser.add_argument("--data", type=Path, default=KAFKA_DIR, help="folder of its data, log and pid file")
    arguments = parser.parse_args()
    try:
        return run_command(arguments.command, arguments.data.resolve(), arguments.port)
    except KafkaServerError as error:
        print(f"kafka: {error}", file=sys.stderr)
        return 2 if isinstance(error, MissingToolError) else 1


if __name__ == "__main__":
    sys.exit(main())
