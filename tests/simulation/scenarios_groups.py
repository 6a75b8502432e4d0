"""Scenarios of groups, and offsets committed by their members."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from kafka.consumer.subscription_state import ConsumerRebalanceListener
from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.errors import (
    CommitFailedError,
    FencedInstanceIdError,
    KafkaError,
    KafkaTimeoutError,
)
from kafka.structs import ConsumerGroupMetadata, MemberState, OffsetAndMetadata, TopicPartition

from .bench import SESSION_MS, Bench, Member, scenario, settled, transactional, until, write


@scenario
def committed_waits_while_a_transaction_is_open(bench: Bench) -> None:
    """A reader of committed records does not hear of offsets that are about to change; another hears the old ones."""
    topic, group = bench.topic(), bench.name("group")
    tp = TopicPartition(topic, 0)
    member = Member(bench, topic, group)
    settled(bench, 1, member)
    other = bench.consumer(group_id=group, isolation_level="read_uncommitted", enable_auto_commit=False)
    producer = transactional(bench)
    producer.begin_transaction()
    producer.send_offsets_to_transaction({tp: OffsetAndMetadata(3, "", -1)}, member.me)
    with pytest.raises(KafkaTimeoutError):
        member.committed(tp, timeout_ms=500)
    assert other.committed(tp, timeout_ms=5_000) is None
    producer.commit_transaction()
    assert member.committed(tp) == 3


@scenario
def two_members_share_in_two_rounds(bench: Bench) -> None:
    """Cooperative: who came first keeps its share, loses the rest in one round, and the other gets it in the next."""
    topic, group = bench.topic(partitions=2), bench.name("group")
    first = Member(bench, topic, group)
    settled(bench, 2, first)
    begun = first.me.generation_id
    second = Member(bench, topic, group)
    settled(bench, 2, first, second)
    kept, moved = first.owned.copy().pop(), second.owned.copy().pop()
    assert [note for note in first.notes if note[0] != "="] == ["+0,1", f"-{moved}"]
    assert [note for note in second.notes if note[0] != "="] == [f"+{moved}"]
    shrunk = first.notes.index(f"-{moved}")
    assert first.notes[shrunk - 1] == f"={kept}", "the join is told before what it took"
    assert first.notes[shrunk + 1] == f"={kept}", "and the next round follows"
    assert second.notes[second.notes.index(f"+{moved}") - 1] == f"={moved}"
    assert first.me.generation_id == second.me.generation_id >= begun + 2


@scenario
def a_member_that_vanishes_is_replaced(bench: Bench) -> None:
    """After its session timeout a dead member's partitions go to those that are left, and they are told at once."""
    topic, group = bench.topic(partitions=2), bench.name("group")
    first, second = Member(bench, topic, group), Member(bench, topic, group)
    settled(bench, 2, first, second)
    bench.vanish(second)
    settled(bench, 2, first)
    assert first.notes[-1].startswith("+")


@scenario
def a_member_that_leaves_is_replaced_at_once(bench: Bench) -> None:
    """Closing revokes, and leaves: nobody waits for a session timeout."""
    topic, group = bench.topic(partitions=2), bench.name("group")
    first = Member(bench, topic, group, session_timeout_ms=60_000)
    second = Member(bench, topic, group, session_timeout_ms=60_000)
    settled(bench, 2, first, second)
    had = second.owned.copy().pop()
    second.close()
    assert second.notes[-1] == f"-{had}"
    settled(bench, 2, first)


@scenario
def stale_members_cannot_commit(bench: Bench) -> None:
    """A transaction's offsets are refused for a generation that is over and for a member that is unknown."""
    topic, group = bench.topic(partitions=2), bench.name("group")
    tp = TopicPartition(topic, 0)
    first = Member(bench, topic, group)
    settled(bench, 2, first)
    old = first.me
    second = Member(bench, topic, group)
    settled(bench, 2, first, second)
    producer = transactional(bench)
    for stale in (old, old._replace(member_id="stranger"), first.me._replace(generation_id=99)):
        producer.begin_transaction()
        with pytest.raises(CommitFailedError):
            producer.send_offsets_to_transaction({tp: OffsetAndMetadata(1, "", -1)}, stale)
        producer.abort_transaction()
    assert first.committed(tp) is None


@scenario
def nobody_is_fenced_without_generation(bench: Bench) -> None:
    """K4: with the generation -1 and no member id, anybody's offsets are taken, though a group is there."""
    topic, group = bench.topic(), bench.name("group")
    tp = TopicPartition(topic, 0)
    member = Member(bench, topic, group)
    settled(bench, 1, member)
    producer = transactional(bench)
    producer.begin_transaction()
    producer.send_offsets_to_transaction({tp: OffsetAndMetadata(9, "", -1)}, ConsumerGroupMetadata(group))
    producer.commit_transaction()
    assert member.committed(tp) == 9


@scenario
def an_instance_id_is_always_checked(bench: Bench) -> None:
    """With an instance id even the generation -1 is refused while another member holds the instance."""
    topic, group = bench.topic(), bench.name("group")
    tp = TopicPartition(topic, 0)
    member = Member(bench, topic, group, group_instance_id="i")
    settled(bench, 1, member)
    producer = transactional(bench)
    producer.begin_transaction()
    with pytest.raises(FencedInstanceIdError):
        stale = ConsumerGroupMetadata(group, -1, "", "i")
        producer.send_offsets_to_transaction({tp: OffsetAndMetadata(9, "", -1)}, stale)
    producer.abort_transaction()


@scenario
def nobody_checks_who_owns_what(bench: Bench) -> None:
    """K15: a member may commit for a partition that another one owns."""
    topic, group = bench.topic(partitions=2), bench.name("group")
    first, second = Member(bench, topic, group), Member(bench, topic, group)
    settled(bench, 2, first, second)
    foreign = TopicPartition(topic, second.owned.copy().pop())
    producer = transactional(bench)
    producer.begin_transaction()
    producer.send_offsets_to_transaction({foreign: OffsetAndMetadata(4, "", -1)}, first.me)
    producer.commit_transaction()
    assert first.committed(foreign) == 4


@scenario
def positions_outlive_rebalances(bench: Bench) -> None:
    """K8: a partition that is kept keeps its position, whatever was committed."""
    topic, group = bench.topic(partitions=2), bench.name("group")
    producer = bench.producer()
    for partition in (0, 1):
        write(producer, topic, b"a", b"b", b"c", partition=partition)
    first = Member(bench, topic, group)
    until(bench, lambda: len(first.got) == 6, first)
    second = Member(bench, topic, group)
    settled(bench, 2, first, second)
    kept = TopicPartition(topic, first.owned.copy().pop())
    assert first.ask(lambda consumer: consumer.position(kept)) == 3
    assert first.committed(kept) is None
    until(bench, lambda: len(second.got) == 3, first, second)  # and who got the other begins anew


@scenario
def a_static_member_comes_back_unnoticed(bench: Bench) -> None:
    """Who joins under a known instance gets its place without a round; the former one is fenced, and polls on (K7)."""
    topic, group = bench.topic(partitions=2), bench.name("group")
    other = Member(bench, topic, group, group_instance_id="other", session_timeout_ms=20_000)
    former = Member(bench, topic, group, group_instance_id="mine", session_timeout_ms=20_000)
    settled(bench, 2, other, former)
    owned, old = former.owned, former.me
    again = Member(bench, topic, group, group_instance_id="mine", session_timeout_ms=20_000)
    until(bench, lambda: again.owned == owned, again)
    assert again.me.generation_id == old.generation_id
    assert again.me.member_id != old.member_id
    bench.sleep(1.0)
    assert former.error is None
    assert former.me == old
    assert former.owned == owned
    producer = transactional(bench)
    producer.begin_transaction()
    tp = TopicPartition(topic, min(owned))
    with pytest.raises(FencedInstanceIdError):
        producer.send_offsets_to_transaction({tp: OffsetAndMetadata(1, "", -1)}, former.me)
    producer.abort_transaction()
    producer.begin_transaction()
    producer.send_offsets_to_transaction({tp: OffsetAndMetadata(2, "", -1)}, again.me)
    producer.commit_transaction()
    assert other.committed(tp) == 2


@scenario
def a_poll_too_late_loses_the_membership(bench: Bench) -> None:
    """K4: without polls for `max_poll_interval_ms` the membership goes, between two polls; the next poll says so."""
    topic, group = bench.topic(), bench.name("group")
    member = Member(bench, topic, group, max_poll_interval_ms=2_000, heartbeat_interval_ms=200)
    settled(bench, 1, member)
    member.polls = False
    until(bench, lambda: member.me.generation_id == -1, member)
    assert member.me.member_id == ""
    assert member.owned == {0}
    member.polls = True
    settled(bench, 1, member)
    assert "!0" in member.notes


@scenario
def blocking_questions_are_refused_in_a_listener(bench: Bench) -> None:
    """A listener that asks the broker anything gets an error, and `poll` hands it on; local calls are allowed."""
    topic, group = bench.topic(), bench.name("group")
    tp = TopicPartition(topic, 0)
    seen: list[str] = []

    class Asking(ConsumerRebalanceListener):  # type: ignore[misc]
        def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
            consumer.pause(tp)
            consumer.seek(tp, 0)
            seen.append("local")
            consumer.committed(tp)

        def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
            pass

    settings = {"partition_assignment_strategy": (CooperativeStickyAssignor(),), "enable_auto_commit": False}
    consumer = bench.consumer(group_id=group, **settings)
    consumer.subscribe([topic], listener=Asking())
    with pytest.raises(KafkaError, match="rebalance callback"):
        for _ in range(400):
            consumer.poll(timeout_ms=100)
    assert seen == ["local"]
    assert consumer.paused() == {tp}


@scenario
def positions_outlive_aborts(bench: Bench) -> None:
    """K8: what was polled does not come again by itself after an abort; seeking brings it back."""
    topic, group = bench.topic(), bench.name("group")
    tp = TopicPartition(topic, 0)
    write(bench.producer(), topic, b"a", b"b")
    member = Member(bench, topic, group)
    until(bench, lambda: len(member.got) == 2, member)
    producer = transactional(bench)
    producer.begin_transaction()
    producer.send_offsets_to_transaction({tp: OffsetAndMetadata(2, "", -1)}, member.me)
    producer.abort_transaction()
    bench.sleep(1.0)
    assert len(member.got) == 2
    assert member.ask(lambda consumer: consumer.position(tp)) == 2
    member.ask(lambda consumer: consumer.seek(tp, 0))
    until(bench, lambda: len(member.got) == 4, member)


@scenario
def a_join_that_ends_between_polls_is_begun_anew(bench: Bench) -> None:
    """K16: members that are busy between polls make each other join without end, though nobody comes or goes."""
    topic, group = bench.topic(partitions=2), bench.name("group")
    settings = {"partition_assignment_strategy": (CooperativeStickyAssignor(),), "heartbeat_interval_ms": 200}
    first, second = (bench.consumer(group_id=group, enable_auto_commit=False, **settings) for _ in range(2))
    for consumer in (first, second):
        consumer.subscribe([topic])
        consumer.topics()
    until(bench, lambda: bool(first.poll(timeout_ms=100) or first.assignment()))
    generations: set[int] = set()
    for _ in range(1000):
        if len(generations) >= 8:
            return
        for consumer in (first, second):
            consumer.poll(timeout_ms=20)
        generations.add(first.group_metadata().generation_id)
    raise AssertionError(f"they settled in {generations}")


@scenario
def a_join_for_new_partitions_is_forgotten(bench: Bench) -> None:
    """K17: a leader's join for added partitions that ends between two polls is never taken up, and heartbeats cease.

    The group gives the member up in time, and it polls on what it had, as if nothing were.
    """
    topic, group = bench.topic(), bench.name("group")
    settings = {"partition_assignment_strategy": (CooperativeStickyAssignor(),), "metadata_max_age_ms": 300}
    times = {"session_timeout_ms": SESSION_MS, "heartbeat_interval_ms": 300}
    consumer = bench.consumer(group_id=group, enable_auto_commit=False, **settings, **times)
    consumer.subscribe([topic])
    for _ in range(50):
        consumer.poll(timeout_ms=100)
    assert consumer.group_metadata().state == MemberState.STABLE
    begun = consumer.group_metadata().generation_id
    bench.admin().create_partitions({topic: 2})
    for _ in range(100):
        consumer.poll(timeout_ms=0)
        bench.sleep(0.2)
        if consumer.group_metadata().generation_id != begun:
            break
    for _ in range(60):
        consumer.poll(timeout_ms=100)
    assert consumer.assignment() == {TopicPartition(topic, 0)}
    now = consumer.group_metadata()
    assert (now.generation_id, now.state) == (begun + 1, MemberState.REBALANCING)
    other = Member(bench, topic, group)
    settled(bench, 2, other)
