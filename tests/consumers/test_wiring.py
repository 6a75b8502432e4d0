"""What the wiring does to the process itself, seen from outside."""

from __future__ import annotations

import subprocess
import sys

STUCK = """
import threading, time
from statestep.consumers.wiring import restart_when_stuck
began = time.monotonic()
restart_when_stuck(lambda: time.monotonic() - began, limit_s=0.2)
threading.Event().wait(60)
"""
BUSY = STUCK.replace("time.monotonic() - began, limit_s", "0.0, limit_s").replace("wait(60)", "wait(1.0)")


def test_a_loop_that_is_stuck_ends_the_process_so_that_it_is_started_again() -> None:
    """Exit code 75, though the main thread waits for something that never comes."""
    assert subprocess.run([sys.executable, "-c", STUCK], timeout=60).returncode == 75


def test_a_loop_that_comes_round_is_left_alone() -> None:
    assert subprocess.run([sys.executable, "-c", BUSY], timeout=60).returncode == 0
