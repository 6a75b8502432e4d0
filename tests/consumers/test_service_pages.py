"""What the HTTP server asks of a running service: health, the streams by score, by age and by key."""

from __future__ import annotations

import json
import threading

import pytest

from statestep.consumers.memory import MemoryBroker, MemorySink
from statestep.consumers.ports import BrokerError
from statestep.consumers.transaction import Limits

from .runs import Clock, Crash, Crashing, Script, answers, expect_whole, filled, service


class Silent(MemorySink):
    """A sink whose broker does not answer for so many questions about what became of a transaction."""

    def __init__(self, broker: MemoryBroker, times: int):
        super().__init__(broker)
        self._times = times + 1  # the first is asked before anything

    def recover(self) -> None:
        self._times -= 1
        if 0 <= self._times < 5:
            raise BrokerError("nobody answers")


class TestPages:
    """What the HTTP server asks while the loop runs."""

    def test_health_follows_the_life_of_a_service(self) -> None:
        """Waiting for partitions, restoring, serving, draining: ready only while it serves."""
        broker = filled(bad=False)
        crashing = Crashing(broker, "poll", 3, False)
        with pytest.raises(Crash):
            service(broker, crashing, crashing, limits=Limits(0.0, 120, snapshot_interval_s=3600.0)).run()
        seen: list[str] = []
        source = Script(broker, {}, 10_000)
        run = service(broker, source)
        assert run.pager.pages().health().reason == "waiting for partitions"

        def stopping() -> bool:
            health = run.pager.pages().health()
            assert health.live
            assert health.ready == (health.reason == "serving")
            seen.append(health.reason)
            return source.count > 25

        run.run(stopping)
        told = [reason for i, reason in enumerate(seen) if i == 0 or reason != seen[i - 1]]
        assert told[0] == "waiting for partitions"
        assert told[1].startswith("restoring partitions [")
        assert told[-1] == "serving"
        assert run.pager.pages().health().reason == "finishing, then stopping"

    def test_while_the_outcome_of_a_transaction_is_not_known_it_is_not_ready(self) -> None:
        """The broker is gone: the loop goes round, so it is live, and says what it waits for."""
        broker, clock, seen = filled(), Clock(), set()
        sink = Silent(broker, 5)
        run = service(broker, sink=sink, clock=clock, on_batch=lambda batch: sink.fail_next())

        def stopping() -> bool:
            health = run.pager.pages().health()
            seen.add((health.live, health.ready, health.reason))
            clock.now_s += 1.0
            return False

        run.run(stopping)
        assert (True, False, "waiting for the broker, to know what became of a transaction") in seen
        expect_whole(broker)

    def test_a_loop_that_is_stuck_is_not_live(self) -> None:
        """Three minutes without a round, longer than a transaction may take, and whoever restarts processes is told."""
        clock = Clock(1e-4)
        run = service(filled(), clock=clock)
        run.run()
        clock.now_s += 181
        health = run.pager.pages().health()
        assert (health.live, health.ready, health.reason) == (False, False, "the loop has not come round for 181 s")

    def test_streams_are_shown_by_score_by_age_and_by_key(self) -> None:
        """The highest scores, the stalest streams, one key on every partition, all as of the last batch."""
        broker = filled(bad=False)
        run = service(broker)
        run.run()
        last = {}
        for (_, partition, _), message in answers(broker.messages):
            last[partition, message.key] = json.loads(message.value or b"")
        pages = run.pager.pages()
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
        """In a slot that was another's the score is that of its own last record, or none if that was not replayed."""
        broker = filled(bad=False)
        script = {4: lambda s: s.revoke(0, 1, 2), 5: lambda s: (s.assign(2), s.assign(1), s.assign(0))}
        limits = Limits(0.0, 60, snapshot_interval_s=3600.0)
        run = service(broker, Script(broker, script, 8), limits=limits)
        run.run()
        assert run.summary.replayed > 30
        documents = [
            (p, message.key, json.loads(message.value or b"")) for (_, p, _), message in answers(broker.messages)
        ]
        last = {(partition, (key or b"").decode()): document["score"] for partition, key, document in documents}
        shown = run.pager.pages().streams(100)["highest_scores"]
        assert len(shown) == len(last)
        scores = [(row["score"], last[row["partition"], row["stream"]]) for row in shown]
        assert all(score in (None, own) for score, own in scores)
        assert any(score is not None for score, _ in scores)

    def test_a_rejected_record_leaves_the_score_as_it_was(self) -> None:
        """The page shows what the stream remembers, and a record whose result is not finite is not remembered."""
        broker = MemoryBroker(1)
        for value in (b"[1, 2]", b"[9, 2]", b"[3e38, 2]"):
            broker.append(0, b"k", value)
        run = service(broker)
        run.run()
        (row,) = run.pager.pages().stream(b"k")
        assert (row["step"], row["score"]) == (2, json.loads(broker.outputs[1].value or b"")["score"])
        assert row["score"] > 0

    def test_streams_without_time_are_never_stale(self) -> None:
        """What has no time cannot be the oldest; its row says null."""
        broker = MemoryBroker(1)
        broker.append(0, b"timeless", b"[1, 2]")
        broker.append(0, b"timed", b'{"flow": 1, "pressure": 2, "ts": 5}')
        run = service(broker)
        run.run()
        assert [row["stream"] for row in run.pager.pages().streams(9)["stalest"]] == ["timed"]
        assert run.pager.pages().stream(b"timeless")[0]["ts"] is None

    def test_pages_may_be_asked_from_other_threads_at_any_time(self) -> None:
        """A thread that asks without pause, while streams come, go and are rebuilt, always gets whole rows."""
        broker = filled(600)
        script = {n: (lambda s: s.revoke(0)) if n % 8 else (lambda s: s.assign(0)) for n in range(4, 60, 4)}
        run, stop, faults = service(broker, Script(broker, script, 64)), threading.Event(), []

        def ask() -> None:
            while not stop.is_set():
                try:
                    shown = run.pager.pages().streams(50)
                    assert all(row["step"] >= 1 for row in shown["highest_scores"])
                    run.pager.pages().stream(b"k1")
                    run.pager.pages().health()
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
