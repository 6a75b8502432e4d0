"""A call with a deadline gives what it gives, raises what it raises, and is left to itself when it does neither."""

from __future__ import annotations

import threading
import time

import pytest

from statestep.consumers.deadline import within
from statestep.consumers.ports import Blocked


def test_a_call_that_returns_in_time_is_as_without() -> None:
    """Its result, None among them, and its error come through as they are."""
    assert within(5.0, lambda: None) is None
    with pytest.raises(KeyError, match="k"):
        within(5.0, lambda: dict[str, int]()["k"])


def test_a_call_that_blocks_is_given_up_in_time() -> None:
    """The caller is told within the deadline; the thread is no reason for the process to stay."""
    release, began = threading.Event(), time.monotonic()
    with pytest.raises(Blocked, match=r"did not return within 0\.1 s"):
        within(0.1, release.wait)
    assert time.monotonic() - began < 5.0
    left = [thread for thread in threading.enumerate() if thread.name == "within"]
    assert left
    assert all(thread.daemon for thread in left)
    release.set()
    for thread in left:
        thread.join(5.0)
