"""The first load of a model file happens in a process that may die, so that a crash there is one sentence here.

What a file may hold is checked by `statestep.runtime.guard`. What only running it can tell (a fault in a kernel of
onnxruntime's, a node that asks for terabytes, a loop without an end) ends a child with limits on time and memory.
Where it is safe the child is a fork of this process, which costs about 12 ms. Elsewhere, and to confirm whatever a
fork did not survive, it is a fresh interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import onnxruntime as ort

from statestep.runtime import ModelError, StepModel, guard, session_options

SECONDS = 30.0  # a network of 500 MB loads in a third of it
MEMORY_BYTES = 2 << 30  # beyond what the process has, and what the file's own size explains
COPIES = 8  # of a file while it is loaded: as bytes, parsed twice, as weights, and packed for the kernels
SENTENCE_BYTES = 4000  # of the child's answer

TRUST = "if it is trusted all the same, pin it by --model-sha256"

FINE, REFUSED, NO_MEMORY = 0, 3, 4  # exit codes of the child

Kind = Literal["step", "graph"]  # a step model is loaded and rehearsed; of any other graph a session is made
Job = Callable[[], None]


class Limits(NamedTuple):
    """What the child may take."""

    seconds: float = SECONDS
    memory_bytes: int = MEMORY_BYTES


class Ending(NamedTuple):
    """How a child ended: its exit code, negative for a signal and None past its time, and what it said."""

    code: int | None
    said: str


def rehearse(
    data: bytes,
    name: str,
    how: Mapping[str, Any] | None = None,
    *,
    kind: Kind = "step",
    limits: Limits | None = None,
    fork: bool | None = None,
) -> None:
    """Load a model's bytes in a child; `how` is what `StepModel` is given beside them.

    `fork` says whether the child is a fork, by default where that is safe. Raises `ModelError`, one sentence, where
    the model is refused, and where the child dies, hangs, or runs out of memory.
    """
    limits = limits or Limits()
    limits = limits._replace(memory_bytes=limits.memory_bytes + COPIES * len(data))
    how = dict(how or {})
    ending = None
    if fork or (fork is None and _fork_is_safe()):
        ending = in_fork(lambda: _load(data, name, how, kind), limits)
    if ending is None or ending.code not in (FINE, REFUSED):  # only a process without a past is believed that
        ending = _in_fresh_process(data, name, how, kind, limits)
    if ending.code != FINE:
        raise ModelError(_sentence(name, ending, limits))


def survived(job: Job, name: str, *, limits: Limits | None = None, fork: bool | None = None) -> None:
    """Try in a fork what comes next for a stranger's graph, beyond loading it; nothing where no fork is safe.

    Raises `ModelError`, one sentence, where the child dies, hangs, or runs out of memory. What `job` itself raises is
    left to the parent, which will meet it too.
    """
    if not (_fork_is_safe() if fork is None else fork):
        return
    limits = limits or Limits()
    ending = in_fork(job, limits)
    if ending.code not in (FINE, REFUSED):
        raise ModelError(_sentence(name, ending, limits, trust="it cannot be used"))


def in_fork(job: Job, limits: Limits) -> Ending:
    """Run `job` in a fork of this process, within limits. What it raises ends as its sentence."""
    receiving, sending = os.pipe()
    with warnings.catch_warnings():
        # Python warns of any thread. onnxruntime's telemetry keeps one from its import on; it sleeps.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _attempt(job, limits, sending)
    os.close(sending)
    said: bytes | None = None
    try:
        said = _read(receiving, time.monotonic() + limits.seconds)
    finally:
        os.close(receiving)
        if said is None:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    return Ending(None if said is None else os.waitstatus_to_exitcode(status), (said or b"").decode(errors="replace"))


def _fork_is_safe() -> bool:
    """Whether no other thread of this process could hold a lock that the child would wait for."""
    return sys.platform == "linux" and threading.active_count() == 1


def _read(receiving: int, deadline: float) -> bytes | None:
    """All that a child says until it ends, None where it does not in time."""
    said = b""
    with selectors.DefaultSelector() as selector:
        selector.register(receiving, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0)):
            if not (more := os.read(receiving, SENTENCE_BYTES)):
                return said
            said += more
    return None


def _in_fresh_process(data: bytes, name: str, how: Mapping[str, Any], kind: Kind, limits: Limits) -> Ending:
    command = [sys.executable, "-P", "-m", __spec__.name]  # -P: nothing in the current folder is imported
    task = pickle.dumps((data, name, how, kind, limits))
    try:
        done = subprocess.run(command, input=task, capture_output=True, timeout=limits.seconds + 10, check=False)
    except subprocess.TimeoutExpired:
        return Ending(None, "")
    except OSError as error:
        return Ending(REFUSED, f"cannot be tried in a process of its own ({error.strerror})")
    lines = (done.stdout or done.stderr).decode(errors="replace").splitlines()
    return Ending(done.returncode, lines[-1] if lines else "")


def _attempt(job: Job, limits: Limits, answer: int) -> NoReturn:
    """The child's whole life: confine itself, do the job, say what was wrong, end without any cleaning up."""
    code, said = REFUSED, ""
    try:
        _confine(limits)
        job()
        code = FINE
    except ModelError as error:
        said = str(error)
    except MemoryError:
        code = NO_MEMORY
    except Exception as error:
        said = f"cannot be loaded ({type(error).__name__}: {guard.first_line(error)})"
    finally:
        with contextlib.suppress(OSError):
            os.write(answer, said.encode(errors="replace")[:SENTENCE_BYTES])
        os._exit(code)


def _confine(limits: Limits) -> None:
    """Limits on memory and time that end this process, and silence: what a crash prints is told by the parent."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    if sys.platform == "win32":
        return
    import resource

    _limit(resource.RLIMIT_CORE, 0)
    busy = int(limits.seconds) + 1
    _limit(resource.RLIMIT_CPU, busy, busy + 1)  # ends the child even where the parent is gone
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + limits.memory_bytes)


def _limit(what: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit of this process, for good."""
    import resource

    before = resource.getrlimit(what)[1]
    allowed = [soft if hard is None else hard, *([] if before == resource.RLIM_INFINITY else [before])]
    resource.setrlimit(what, (min(soft, *allowed), min(allowed)))


def _load(data: bytes, name: str, how: Mapping[str, Any], kind: Kind) -> None:
    """What the parent is going to do."""
    if kind == "step":
        StepModel(data, name=name, **how)
        return
    guard.parse(data, name)
    try:
        ort.InferenceSession(data, session_options(), providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception as error:  # onnxruntime raises a class of its own for every kind of fault
        raise ModelError(f"{name}: onnxruntime cannot load it: {guard.first_line(error)}") from None


def _sentence(name: str, ending: Ending, limits: Limits, *, trust: str = TRUST) -> str:
    """Why a model is refused, with a way out for one that is trusted all the same."""
    if ending.code is None or ending.code == -getattr(signal, "SIGXCPU", 0):
        return f"{name}: was not loaded within {limits.seconds:g} s by a process of its own; {trust}"
    if ending.code in (NO_MEMORY, -9):  # 9, SIGKILL: the system itself had none left
        return f"{name}: takes more than {limits.memory_bytes >> 20:,} MiB of memory to load; {trust}"
    if ending.code < 0:
        return f"{name}: crashes onnxruntime ({_signal(-ending.code)} in a process of its own); do not run it"
    if ending.code == REFUSED and ending.said.startswith(f"{name}: "):
        return ending.said
    return f"{name}: {ending.said or 'cannot be loaded by a process of its own'}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _main() -> NoReturn:
    """The fresh interpreter: a task on standard input, the answer on standard output."""
    data, name, how, kind, limits = pickle.load(sys.stdin.buffer)  # the parent's own words
    _attempt(lambda: _load(data, name, how, kind), limits, os.dup(1))


if __name__ == "__main__":
    _main()
