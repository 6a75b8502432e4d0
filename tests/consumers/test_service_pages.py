"""What the HTTP server asks of a running service: health, the streams by score, by age and by key."""

from __future__ import annotations

import json
import threading

import pytest

from statestep.consumers.memory import MemoryBroker
from statestep.consumers.service import Limits

from .runs import (
    Script,
    answers,
    filled,
    service,
)


class TestPages:
    """What the HTTP server asks while the loop runs."""

    def test_health_follows_the_life_of_a_service(self) -> None:
        """Waiting for partitions, replaying, serving, draining: ready only while it serves."""
        broker = filled(bad=False)
        service(broker).run()
        for log in broker.log:
            broker.append(log[0].partition, b"k0", b"[1, 2]")
        seen: list[str] = []
        source = Script(broker, {}, 10_000)
        run = service(broker, source, limits=Limits(0.0, 40))
        assert run.pages().health().reason == "waiting for partitions"

        def stopping() -> bool:
            health = run.pages().health()
            assert health.live
            assert health.ready == (health.reason == "serving")
            seen.append(health.reason)
            return source.count > 12

        run.run(stopping)
        told = [reason for i, reason in enumerate(seen) if i == 0 or reason != seen[i - 1]]
        assert told[0] == "waiting for partitions"
        assert told[1].startswith("replaying history of partitions [0, 1, 2]")
        assert told[-1] == "serving"
        assert run.pages().health().reason == "finishing, then stopping"

    def test_a_loop_that_is_stuck_is_not_live(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Three minutes without a round, longer than a flush may take, and whoever restarts processes is told."""
        run = service(filled())
        run.run()
        later = run._looped_at + 181
        monkeypatch.setattr("statestep.consumers.service.time.monotonic", lambda: later)
        health = run.pages().health()
        assert (health.live, health.ready, health.reason) == (False, False, "the loop has not come round for 181 s")

    def test_streams_are_shown_by_score_by_age_and_by_key(self) -> None:
        """The highest scores, the stalest streams, one key on every partition, all as of the last batch."""
        broker = filled(bad=False)
        run = service(broker)
        run.run()
        last = {}
        for (_, partition, _), message in answers(broker.messages):
            last[partition, message.key] = json.loads(message.value or b"")
        pages = run.pages()
        assert pages.streams(100)["streams"] == len(last)
        highest = pages.streams(100)["highest_scores"]
        assert [row["score"] for row in highest] == sorted((d["score"] for d in last.values()), reverse=True)
        assert pages.streams(2)["highest_scores"] == highest[:2]
        stalest = pages.streams(3)["stalest"]
        assert [row["ts"] for row in stalest] == sorted(d["ts"] for d in last.values())[:3]
        for row in highest:
            document = last[row["partition"], row["stream"].encode()]
            assert {name: row[name] for name in ("step", "ts", "score", "stream")} == {
                name: document[name] for name in ("step", "ts", "score", "stream")
            }
        assert [row["partition"] for row in pages.stream(b"k1")] == sorted(p for p, key in last if key == b"k1")
        assert pages.stream(b"nobody") == []

    def test_a_stream_that_came_back_shows_its_own_score(self) -> None:
        """Replayed after a rebalance, in a slot that was another's: the score is that of its own last record."""
        broker = filled(bad=False)
        script = {9: lambda s: s.revoke(0, 1, 2), 10: lambda s: (s.assign(2), s.assign(1), s.assign(0))}
        run, quiet = service(broker, Script(broker, script, 11), limits=Limits(0.0, 60)), service(filled(bad=False))
        run.run()
        quiet.run()
        assert run.summary.replayed == 120
        assert run.pages().streams(100)["highest_scores"] == quiet.pages().streams(100)["highest_scores"]

    def test_a_rejected_record_leaves_the_score_as_it_was(self) -> None:
        """The page shows what the stream remembers, and a record whose result is not finite is not remembered."""
        broker = MemoryBroker(1)
        for value in (b"[1, 2]", b"[9, 2]", b"[3e38, 2]"):
            broker.append(0, b"k", value)
        run = service(broker)
        run.run()
        (row,) = run.pages().stream(b"k")
        assert (row["step"], row["score"]) == (2, json.loads(broker.outputs[1].value or b"")["score"])
        assert row["score"] > 0

    def test_streams_without_time_are_never_stale(self) -> None:
        """What has no time cannot be the oldest; its row says null."""
        broker = MemoryBroker(1)
        broker.append(0, b"timeless", b"[1, 2]")
        broker.append(0, b"timed", b'{"flow": 1, "pressure": 2, "ts": 5}')
        run = service(broker)
        run.run()
        assert [row["stream"] for row in run.pages().streams(9)["stalest"]] == ["timed"]
        assert run.pages().stream(b"timeless")[0]["ts"] is None

    def test_pages_may_be_asked_from_other_threads_at_any_time(self) -> None:
        """A thread that asks without pause, while streams come, go and are rebuilt, always gets whole rows."""
        broker = filled(600)
        script = {n: (lambda s: s.revoke(0)) if n % 8 else (lambda s: s.assign(0)) for n in range(4, 60, 4)}
        run, stop, faults = service(broker, Script(broker, script, 64)), threading.Event(), []

        def ask() -> None:
            while not stop.is_set():
                try:
                    shown = run.pages().streams(50)
                    assert all(row["step"] >= 1 for row in shown["highest_scores"])
                    run.pages().stream(b"k1")
                    run.pages().health()
                except Exception as fault:
                    faults.append(fault)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            run.run()
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert faults == []
