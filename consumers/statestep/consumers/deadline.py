"""A deadline for calls that have none: some of a Kafka client's wait for ever once their broker is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from statestep.consumers.ports import Blocked


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What `call` gives or raises, or `Blocked` once `seconds` have passed by the monotonic clock.

    The call runs in a daemon thread of its own. Where it does not return in time it is left to itself: nothing can
    end it, so whatever it holds must not be used again, and the process should end before long.

    >>> within(5.0, lambda: 6 * 7)
    42
    """
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # also KeyboardInterrupt: it is raised where it can be dealt with
            errors.append(error)

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise Blocked(f"a call of the Kafka client did not return within {seconds:g} s; what it was doing is undecided")
    return results[0]
