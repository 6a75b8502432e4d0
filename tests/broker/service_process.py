"""`statestep run` as processes of their own, and readers of the topics that they write."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kafka import KafkaConsumer, TopicPartition

# A member that was killed is missed after 6 s, the least that a broker allows, instead of 45.
QUICK = ("--kafka", "session.timeout.ms=6000", "--kafka", "heartbeat.interval.ms=1000")
DEADLINE_SECONDS = 60.0


class ServiceProcess:
    """One `statestep run`; whatever it says goes to a log file. Leaving the `with` kills what still runs."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log_path = log
        self._log = log.open("wb")
        command = [sys.executable, "-m", "statestep.consumers", "run", "--http-port", "0", *QUICK, *arguments]
        self.process = subprocess.Popen(command, stderr=self._log, stdout=self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()

    @property
    def log(self) -> str:
        """What it has said so far."""
        return self.log_path.read_text(errors="replace")

    @property
    def url(self) -> str:
        """Where its HTTP port is."""
        self.wait_for_log("metrics and health at")
        found = re.search(r"metrics and health at (\S+)", self.log)
        assert found is not None
        return found.group(1)

    def get(self, path: str) -> str:
        """A page of its HTTP port."""
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def metric(self, sample: str) -> float:
        """The value of a sample as the page spells it, labels and all; 0.0 if it is not there."""
        found = re.search(rf"^{re.escape(sample)} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found.group(1)) if found else 0.0

    def wait_for_log(self, pattern: str) -> None:
        """Return once its log has `pattern`."""
        wait_until(lambda: re.search(pattern, self.log) is not None or self.process.poll() is not None, pattern)
        assert re.search(pattern, self.log), f"it ended with {self.process.returncode} before {pattern!r}:\n{self.log}"

    def is_ready(self) -> bool:
        """Whether it says that it serves; one without an HTTP port yet does not."""
        if "metrics and health at" not in self.log:
            return False
        try:
            self.get("/readyz")
        except OSError:
            return False
        return True

    def wait_until_ready(self) -> None:
        """Return once it serves."""

        def ready() -> bool:
            assert self.process.poll() is None, self.log
            return self.is_ready()

        wait_until(ready, "ready")

    def terminate(self) -> float:
        """SIGTERM; gives the seconds that it took to end, and sees that it ended well."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(DEADLINE_SECONDS) == 0, self.log
        return time.monotonic() - began

    def kill(self) -> None:
        """`kill -9`."""
        self.process.kill()
        self.process.wait()


class TopicReader:
    """Everything that was written to a topic, as a reader of committed records sees it."""

    def __init__(self, bootstrap_servers: str, topic: str) -> None:
        self.records: list[Any] = []
        self._consumer = KafkaConsumer(
            bootstrap_servers=bootstrap_servers,
            isolation_level="read_committed",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        wait_until(lambda: bool(self._consumer.partitions_for_topic(topic)), f"topic {topic}")
        self._consumer.assign([TopicPartition(topic, p) for p in self._consumer.partitions_for_topic(topic)])
        self._consumer.seek_to_beginning()

    def read_until(self, enough: Callable[[Sequence[Any]], bool], what: str) -> list[Any]:
        """Read on until `enough` of the records so far."""

        def look() -> bool:
            for batch in self._consumer.poll(timeout_ms=200).values():
                self.records += batch
            return enough(self.records)

        wait_until(look, what)
        return self.records

    def close(self) -> None:
        """Let go."""
        self._consumer.close()


def wait_until(done: Callable[[], bool], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    """Return once `done()`; an AssertionError that names `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
