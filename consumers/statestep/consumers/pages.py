"""The service as the HTTP server shows it, asked from the server's own threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from statestep.consumers.board import Board
from statestep.consumers.http import Health, Pages
from statestep.consumers.pipeline import Pipeline

LIVE_S = 180.0  # a loop that has not come round for longer is stuck: all it waits for has shorter deadlines


class Pager:
    """What the loop tells of itself, and the three questions that the pages ask."""

    def __init__(self, pipeline: Pipeline, lock: AbstractContextManager[object], clock: Callable[[], float]):
        """`lock` is held while streams change, and while a page looks at them."""
        self.board = Board(pipeline.engine, pipeline.teller)
        self.joined = False
        self._engine = pipeline.engine
        self._lock = lock
        self._clock = clock
        self._looped_s = clock()
        self._serving: Sequence[int] = ()
        self._restoring: Sequence[int] = ()
        self._doubt = self._draining = False
        self._settled = True

    def looped(self, now_s: float) -> None:
        """The loop has come round."""
        self._looped_s = now_s

    def restored(self, partition: int) -> None:
        """The streams of a partition were put into memory from what is durable."""
        with self._lock:
            self.board.forget(partition)

    def tell(
        self, serving: Sequence[int], restoring: Sequence[int], settled: bool, doubt: bool, draining: bool
    ) -> None:
        """How the loop stands: partitions that run, partitions whose states come back, whether the group is at rest
        and its coordinator there, what it waits for."""
        self._serving, self._restoring = serving, restoring
        self._settled, self._doubt, self._draining = settled, doubt, draining

    def pages(self) -> Pages:
        """The pages, for the server."""
        return Pages(self._health, self._streams, self._stream)

    def silent_s(self) -> float:
        """How long the loop has not come round."""
        return self._clock() - self._looped_s

    def _health(self) -> Health:
        silent = self.silent_s()
        live = silent < LIVE_S
        if not live:
            reason = f"the loop has not come round for {silent:.0f} s"
        elif self._draining:
            reason = "finishing, then stopping"
        elif self._doubt:
            reason = "waiting for the broker, to know what became of a transaction"
        elif not self.joined:
            reason = "waiting for partitions"
        elif not self._settled:
            reason = "waiting for the group to come to rest, or for its broker"
        elif self._restoring:
            reason = f"restoring partitions {list(self._restoring)}"
        else:
            reason = "serving"
        return Health(live, live and reason == "serving", reason)

    def _streams(self, count: int) -> dict[str, Any]:
        with self._lock:
            return {
                "streams": len(self._engine),
                "highest_scores": self.board.highest(count),
                "stalest": self.board.stalest(count),
            }

    def _stream(self, key: bytes) -> list[dict[str, Any]]:
        with self._lock:
            return self.board.show(key, sorted(self._serving))
