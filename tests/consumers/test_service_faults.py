"""Transactions that fail: what became of one is found out, and a message that no broker takes is found among many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from statestep.consumers import checkpoint
from statestep.consumers.checkpoint import Stop
from statestep.consumers.memory import MemoryBroker, MemorySink, MemorySource
from statestep.consumers.pipeline import BadMessage
from statestep.consumers.ports import Blocked, BrokerError, Fenced, Message, Rejected, Transaction
from statestep.consumers.service import POLL_S
from statestep.consumers.transaction import Limits

from .runs import Clock, Script, answers, expect_rebuilt, expect_whole, filled, marker_of, service, whole


class Choosy(MemorySink):
    """Refuses any transaction with a message of which `refuses` is true."""

    def __init__(self, broker: MemoryBroker, refuses: Callable[[int, int, Message], bool]):
        super().__init__(broker)
        self._refuses = refuses
        self.tries: list[int] = []

    def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
        self.tries.append(len(transaction.messages))
        for (_, partition, offset), message in answers(transaction.messages):
            if self._refuses(partition, offset, message):
                raise Rejected("the message is too large")
        return super().commit(transaction, membership)


class TestDoubt:
    """A transaction that failed counts or does not; the committed offset's sequence tells."""

    @pytest.mark.parametrize("counts", [True, False])
    @pytest.mark.parametrize("at", [0, 1, 2, 5])
    def test_it_is_applied_once_either_way(self, counts: bool, at: int) -> None:
        """One that counts is not applied again, one that does not is taken back and done anew."""
        broker = filled()
        sink = MemorySink(broker)
        real, left = sink.commit, [at]

        def commit(transaction: Transaction, membership: Any) -> Mapping[int, int]:
            if left[0] == 0:
                sink.fail_next(counts=counts)
            left[0] -= 1
            return real(transaction, membership)

        sink.commit = commit  # type: ignore[method-assign]
        run = service(broker, sink=sink)
        summary = run.run()
        assert left[0] < 0
        expect_whole(broker)
        expect_rebuilt(broker)
        assert summary.consumed == 120
        assert summary.consumed == summary.predicted + summary.refused + summary.tombstones

    def test_a_broker_that_is_gone_for_minutes_is_waited_for(self) -> None:
        """The loop polls on without spinning, and goes on where it was once there is an answer."""
        broker, clock = filled(), Clock(0.05)
        sink = MemorySink(broker)
        source = Script(broker, {5: lambda s: sink.fail_next()}, 30)
        real, asked = sink.recover, [0]

        def recover() -> None:
            asked[0] += 1
            if 1 < asked[0] < 60:
                raise BrokerError("nobody answers")
            real()

        sink.recover = recover  # type: ignore[method-assign]
        service(broker, source, sink, clock=clock).run()
        assert asked[0] == 60
        assert source.timeouts.count(POLL_S) > 30
        expect_whole(broker)

    def test_a_partition_that_is_taken_away_meanwhile_is_let_go(self) -> None:
        """Nothing of it is asked or sought; who comes next finds what is committed."""
        broker = filled()
        sink = MemorySink(broker)
        script = {5: lambda s: sink.fail_next(counts=True), 6: lambda s: s.revoke(0, 1, 2)}
        run = service(broker, Script(broker, script, 9), sink)
        run.run()
        assert run.pager.pages().streams(5)["streams"] == 0
        expect_rebuilt(broker)
        service(broker).run()
        expect_whole(broker)

    def test_a_partition_that_goes_and_comes_meanwhile_gives_nothing_before_it_is_back(self) -> None:
        """The transaction that opened it counts, and would let it run; what is read of it then is read once more."""
        broker = filled()
        sink = MemorySink(broker)
        sink.fail_next(counts=True)

        def goes_and_comes(source: Script) -> None:
            source.revoke(1)
            source.assign(1)

        source = Script(broker, {1: goes_and_comes}, 2)
        service(broker, source, sink, limits=Limits(commit_interval_s=0.0, batch_records=200)).run()
        expect_whole(broker)
        expect_rebuilt(broker)

    def test_a_transaction_of_somebody_else_brings_the_partition_back_anew(self) -> None:
        """The sequence is neither ours nor the one before it: what is durable decides, not what is in memory."""
        broker = filled()
        sink = MemorySink(broker)
        real = sink.commit

        def usurped(transaction: Transaction, membership: Any) -> Mapping[int, int]:
            sink.commit = real  # type: ignore[method-assign]
            sink.fail_next()
            service(broker, MemorySource(broker, transaction.offsets)).run()  # another process does them all
            for partition in transaction.offsets:  # and gives them back before this one has heard of it
                broker.owner[partition] = membership
            return real(transaction, membership)

        source = Script(broker, {4: lambda s: setattr(sink, "commit", usurped)}, 12)
        service(broker, source, sink).run()
        expect_whole(broker)
        expect_rebuilt(broker)

    @pytest.mark.parametrize("error", [Fenced("another is at work"), Blocked("a call does not return")])
    def test_what_cannot_be_mended_ends_the_process(self, error: Exception) -> None:
        """Fenced, or blocked though the broker answers: the exception is the caller's, and nothing counts."""
        broker = filled()
        sink = MemorySink(broker)
        for _ in range(2):
            sink.fail_next(error)
        with pytest.raises(type(error), match=str(error)):
            service(broker, sink=sink).run()
        assert broker.messages == []
        service(broker).run()
        expect_whole(broker)


class TestRejected:
    """A message that is refused for what it is."""

    def test_it_is_found_by_halving_and_becomes_a_dead_letter(self) -> None:
        """Its stream has advanced, all other answers are as ever, and later ones of its stream too."""
        broker, cursed = filled(bad=False), (1, 17)
        sink = Choosy(broker, lambda partition, offset, message: (partition, offset) == cursed and not message.dead)
        service(broker, sink=sink, limits=Limits(0.0, 120)).run()
        other = filled(bad=False)
        service(other).run()
        expected, found = dict(answers(other.messages)), dict(answers(broker.messages))
        assert found.keys() ^ expected.keys() == {(False, *cursed), (True, *cursed)}
        assert all(message == expected[place] for place, message in found.items() if place in expected)
        dead = found[True, *cursed]
        assert dict(dead.headers)["__streams.errors.exception"] == b"undeliverable"
        assert dead.value == broker.log[1][17].value
        assert len([size for size in sink.tries if size]) < 30
        expect_rebuilt(broker)

    def test_a_dead_letter_that_is_refused_goes_bare(self) -> None:
        """Without the record's bytes and headers, so that at least its place is known."""
        broker = filled()
        at = next((p, o) for (dead, p, o) in whole(120) if dead)
        sink = Choosy(broker, lambda p, o, message: (p, o) == at and message.value is not None and bool(message.value))
        run = service(broker, sink=sink)
        run.run()
        found = dict(answers(broker.messages))
        assert found.keys() == whole(120).keys()
        assert not found[True, *at].value
        assert Counter(message == whole(120)[place] for place, message in found.items())[False] == 1

    def test_one_that_is_refused_even_so_stops_the_service(self) -> None:
        """The sentence names its place; nothing behind it was passed by."""
        broker = filled()
        sink = Choosy(broker, lambda partition, offset, message: (partition, offset) == (0, 4))
        with pytest.raises(Stop, match="refuses even a bare dead letter for partition 0, offset 4"):
            service(broker, sink=sink).run()
        assert max((o for (_, p, o), _ in answers(broker.messages) if p == 0), default=0) < 4
        expect_rebuilt(broker)
        service(broker).run()
        expect_whole(broker)

    @pytest.mark.parametrize("policy", ["skip", "fail"])
    def test_other_policies_hold_for_it_too(self, policy: Any) -> None:
        """Passed by and counted, or the end of the run: never silent."""
        broker = filled(bad=False)
        sink = Choosy(broker, lambda partition, offset, message: (partition, offset) == (0, 4))
        run = service(broker, sink=sink, policy=policy)
        if policy == "fail":
            with pytest.raises(BadMessage, match="partition 0, offset 4: no broker takes its output"):
                run.run()
        else:
            run.run()
            assert run.summary.reasons["undeliverable"] == 1
            assert len(broker.messages) == 119

    def test_states_that_are_refused_stop_the_service(self) -> None:
        """There is no dead letter for a state; the sentence names the topic's setting."""
        broker = filled()

        class Small(MemorySink):
            def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
                if any(state.value is not None and len(state.key) > 1 for state in transaction.states):
                    raise Rejected("the state is too large")
                return super().commit(transaction, membership)

        with pytest.raises(Stop, match=r"refuses the states of a stream.*raise max\.message\.bytes of the changelog"):
            service(broker, sink=Small(broker)).run()
        expect_rebuilt(broker)


def test_a_compacted_input_has_every_state_written_at_once() -> None:
    """Replaying it would not do, so nothing is left to replay after any transaction."""
    broker = filled()
    broker.identity = broker.identity._replace(is_log=False)
    redos: list[tuple[int, int]] = []

    class Watching(MemorySink):
        def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
            positions = super().commit(transaction, membership)
            redos.extend((seen.redo, seen.next) for p in transaction.offsets if (seen := marker_of(broker, p)))
            return positions

    service(broker, sink=Watching(broker), limits=Limits(0.0, 7, snapshot_interval_s=3600.0)).run()
    assert redos and all(redo == behind for redo, behind in redos)
    expect_whole(broker)


def test_every_commit_has_the_sequence_of_its_marker() -> None:
    """It rises by one for each partition of a transaction; redo and next never fall."""
    broker, seen = filled(), dict[int, tuple[int, int, int]]()

    class Watching(MemorySink):
        def commit(self, transaction: Transaction, membership: Any) -> Mapping[int, int]:
            positions = super().commit(transaction, membership)
            assert {state.partition for state in transaction.states} == set(transaction.offsets)
            for partition, committed in transaction.offsets.items():
                found = marker_of(broker, partition)
                assert found is not None and committed == checkpoint.committed(found)
                before = seen.get(partition, (found.sequence - 1, 0, 0))
                assert found.sequence == before[0] + 1
                assert (found.redo >= before[1], found.next >= before[2]) == (True, True)
                seen[partition] = (found.sequence, found.redo, found.next)
            return positions

    service(broker, MemorySource(broker), Watching(broker), limits=Limits(0.0, 5, snapshot_interval_s=1.0)).run()
    assert len(seen) == 3
