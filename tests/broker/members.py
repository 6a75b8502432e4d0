"""The processes of one application, and a supervisor that starts those again which ask for it by exit code 75.

Who ends with 5 before it has joined the group found no broker to join it with: it is started again too, and counted.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from .service_process import ServiceProcess

RESTART_ME, NO_BROKER = 75, 5
JOINED = " assigned: "  # what the log has as soon as partitions came, or none
STOP_SECONDS = 15.0  # a service promises 10; the rest is the machine's
LOG_TAIL_LINES = 40


class UnexpectedEnd(AssertionError):
    """A service ended by itself, and not with 75; the message has the tail of its log."""


class Members:
    """Services by their names. Leaving the `with` kills what still runs.

    `arguments` gives those of a member by its name and the folder of its state.
    """

    def __init__(self, folder: Path, arguments: Callable[[str, Path], Sequence[str]]) -> None:
        self.lives: Counter[str] = Counter()  # how often each was started
        self.restarts = 0  # after an exit with 75
        self.failed_starts = 0  # of those that were to join while a broker was away
        self._folder = folder
        self._arguments = arguments
        self._running: dict[str, ServiceProcess] = {}
        self._state: dict[str, str] = {}  # whose folder a member has
        self._stack = ExitStack()

    @property
    def names(self) -> list[str]:
        """Those that run, or should."""
        return sorted(self._running)

    def start(self, name: str, state: str = "") -> None:
        """Start a member over the state that it has, or over that of another life."""
        self.lives[name] += 1
        self._state[name] = state or name
        arguments = self._arguments(name, self._folder / self._state[name])
        log = self._folder / f"{name}.{self.lives[name]}.log"
        self._running[name] = self._stack.enter_context(ServiceProcess(log, *arguments))

    def kill(self, name: str) -> None:
        """`kill -9`; nobody starts it again but `start`."""
        self._running.pop(name).kill()

    def terminate(self, name: str) -> int:
        """SIGTERM; gives the exit code, which must be 0, or 75 where it was not done in time.

        A process so young that it has said nothing yet has not heard of signals either, and just ends.
        """
        service = self._running.pop(name)
        service.process.send_signal(signal.SIGTERM)
        try:
            code = service.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise UnexpectedEnd(f"{name} does not end at SIGTERM:\n{tail(service)}") from None
        young = code == -signal.SIGTERM and not service.log
        if code not in (0, RESTART_ME) and not young:
            raise UnexpectedEnd(f"{name} ended with {code} at SIGTERM:\n{tail(service)}")
        return code

    def pause(self, name: str) -> None:
        """SIGSTOP."""
        self._running[name].process.send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """SIGCONT."""
        self._running[name].process.send_signal(signal.SIGCONT)

    def disown(self, name: str) -> ServiceProcess:
        """Let go of a process, so that another may be started under its name."""
        return self._running.pop(name)

    def lose_state(self, name: str) -> None:
        """Delete the folder of a member's state, as a new machine has none."""
        shutil.rmtree(self._folder / name, ignore_errors=True)

    def has_joined(self, name: str) -> bool:
        """Whether partitions have come, or the news that there are none for it."""
        return JOINED in self._running[name].log

    def serving(self) -> list[str]:
        """Who says that it is ready."""
        return [name for name in self.names if self._running[name].is_ready()]

    def wait_until_joining(self, name: str) -> None:
        """Return once a member is about to join the group."""
        self._running[name].wait_for_log("metrics and health at")

    def wait_until_ready(self) -> None:
        """Return once all serve."""
        for service in self._running.values():
            service.wait_until_ready()

    def supervise(self) -> None:
        """Start again whoever ended with 75, or has not come to join; raise `UnexpectedEnd` for any other end."""
        for name, service in list(self._running.items()):
            code = service.process.poll()
            if code == RESTART_ME:
                self.restarts += 1
                self.start(name, self._state[name])
            elif code == NO_BROKER and JOINED not in service.log:
                self.failed_starts += 1
                self.start(name, self._state[name])
            elif code is not None:
                raise UnexpectedEnd(f"{name} ended with {code} by itself:\n{tail(service)}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def tail(service: ServiceProcess) -> str:
    """The last lines of a service's log."""
    return "\n".join(service.log.splitlines()[-LOG_TAIL_LINES:])
