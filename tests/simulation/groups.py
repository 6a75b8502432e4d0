"""A simulated group coordinator: classic groups with static members, and the offsets that they commit.

It answers joins and syncs late, when the others have come, so these take a function to answer to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from kafka.errors import (
    FencedInstanceIdError,
    IllegalGenerationError,
    KafkaError,
    RebalanceInProgressError,
    UnknownMemberIdError,
    UnstableOffsetCommitError,
)
from kafka.structs import OffsetAndMetadata, TopicPartition

from .world import World

Offsets = Mapping[TopicPartition, OffsetAndMetadata]


class Joined(NamedTuple):
    """The answer to a join; `members` is empty for all but the leader."""

    generation: int
    member_id: str
    leader: str
    members: dict[str, Any]  # what each brought along, by member id


JoinAnswer = Callable[[Joined | KafkaError], None]
SyncAnswer = Callable[[Any], None]  # an assignment, or a KafkaError


class Member:
    """A member as the coordinator knows it."""

    def __init__(self, member_id: str, instance: str | None, session_s: float, rebalance_s: float, brought: Any):
        self.member_id = member_id
        self.instance = instance
        self.session_s = session_s
        self.rebalance_s = rebalance_s
        self.brought = brought
        self.assignment: Any = None
        self.expires = 0.0
        self.join: JoinAnswer | None = None  # waits for the round to complete
        self.sync: SyncAnswer | None = None  # waits for the leader's assignment


class Group:
    """One group. States are Kafka's own."""

    def __init__(self, world: World):
        self.world = world
        self.state: Literal["Empty", "PreparingRebalance", "CompletingRebalance", "Stable"] = "Empty"
        self.generation = 0
        self.members: dict[str, Member] = {}
        self.instances: dict[str, str] = {}  # static members' ids, by instance
        self.leader: str | None = None
        self.offsets: dict[TopicPartition, OffsetAndMetadata] = {}
        self.pending: dict[int, dict[TopicPartition, OffsetAndMetadata]] = {}  # of open transactions, by producer
        self._round = 0
        self._made = 0

    # Membership

    def join(
        self,
        member_id: str,
        instance: str | None,
        session_s: float,
        rebalance_s: float,
        brought: Any,
        answer: JoinAnswer,
    ) -> None:
        """Join or rejoin. `brought` is what the leader's assignor gets to see of this member."""
        if not member_id:
            self._join_new(instance, session_s, rebalance_s, brought, answer)
            return
        try:
            member = self._known(member_id, instance)
        except KafkaError as error:
            answer(error)
            return
        same = member.brought == brought
        member.brought = brought
        member.session_s, member.rebalance_s = session_s, rebalance_s
        if self.state == "PreparingRebalance":
            member.join = answer
            self._maybe_complete()
        elif same and (self.state == "CompletingRebalance" or member_id != self.leader):
            self._alive(member)
            answer(self._joined(member))
        else:
            member.join = answer
            self._prepare()

    def _join_new(
        self, instance: str | None, session_s: float, rebalance_s: float, brought: Any, answer: JoinAnswer
    ) -> None:
        self._made += 1
        member = Member(f"{instance or 'member'}-{self._made}", instance, session_s, rebalance_s, brought)
        former = self.members.pop(self.instances.get(instance, ""), None) if instance is not None else None
        self.members[member.member_id] = member
        if instance is not None:
            self.instances[instance] = member.member_id
        if former is not None:
            member.assignment = former.assignment
            if former.join is not None:
                former.join(FencedInstanceIdError())
            if former.sync is not None:
                former.sync(FencedInstanceIdError())
            was_leader = self.leader == former.member_id
            if was_leader:
                self.leader = member.member_id
            if self.state == "Stable":  # its place is its own: no round is begun
                self._alive(member)
                answer(self._joined(member)._replace(leader="", members={}))
                return
        member.join = answer
        if self.state == "PreparingRebalance":
            self._maybe_complete()
        else:
            self._prepare()

    def sync(self, member_id: str, instance: str | None, generation: int, given: Any, answer: SyncAnswer) -> None:
        """Get the assignment; the leader brings those of all (`given`, by member id)."""
        try:
            member = self._known(member_id, instance)
        except KafkaError as error:
            answer(error)
            return
        if generation != self.generation:
            answer(IllegalGenerationError())
        elif self.state == "PreparingRebalance":
            answer(RebalanceInProgressError())
        elif self.state == "Stable":
            self._alive(member)
            answer(member.assignment)
        else:
            member.sync = answer
            if member_id == self.leader:
                self.state = "Stable"
                for each in self.members.values():
                    each.assignment = given.get(each.member_id)
                    waiting, each.sync = each.sync, None
                    self._alive(each)
                    if waiting is not None:
                        waiting(each.assignment)

    def heartbeat(self, member_id: str, instance: str | None, generation: int) -> None:
        """Raises what the member is to know."""
        member = self._known(member_id, instance)
        if generation != self.generation:
            raise IllegalGenerationError
        self._alive(member)
        if self.state == "PreparingRebalance":
            raise RebalanceInProgressError

    def leave(self, member_id: str) -> None:
        """A dynamic member says good-bye."""
        if member_id in self.members:
            self._remove(self.members[member_id])

    def leave_instance(self, instance: str) -> None:
        """Somebody says good-bye for a static member; of one that is not there nothing is heard."""
        if instance in self.instances:
            self._remove(self.members[self.instances[instance]])

    def describe(self) -> dict[str, Any]:
        """As a description of groups has it."""

        def assigned(member: Member) -> dict[str, Any]:
            partitions = [] if member.assignment is None else member.assignment.partitions()
            return {"assigned_partitions": [{"topic": tp.topic, "partitions": [tp.partition]} for tp in partitions]}

        members = [
            {"member_id": m.member_id, "group_instance_id": m.instance, "member_assignment": assigned(m)}
            for m in self.members.values()
        ]
        return {"error": None, "group_state": self.state, "members": members}

    def _known(self, member_id: str, instance: str | None) -> Member:
        if instance is not None:
            current = self.instances.get(instance)
            if current is None:
                raise UnknownMemberIdError
            if current != member_id:
                raise FencedInstanceIdError
        if member_id not in self.members:
            raise UnknownMemberIdError
        return self.members[member_id]

    def _alive(self, member: Member) -> None:
        """A member was heard of: its session goes on."""
        fresh = member.expires == 0.0
        member.expires = self.world.now + member.session_s
        if fresh:
            self._watch(member)

    def _watch(self, member: Member) -> None:
        def look() -> None:
            if self.members.get(member.member_id) is not member:
                return
            if member.join is not None:  # one that waits for the round is not given up
                member.expires = self.world.now + member.session_s
            if member.expires <= self.world.now:
                self._remove(member)
            else:
                self._watch(member)

        self.world.at(member.expires, look)

    def _remove(self, member: Member) -> None:
        del self.members[member.member_id]
        if member.instance is not None and self.instances.get(member.instance) == member.member_id:
            del self.instances[member.instance]
        for waiting in (member.join, member.sync):
            if waiting is not None:
                waiting(UnknownMemberIdError())
        if self.leader == member.member_id:
            self.leader = None
        if self.state in ("Stable", "CompletingRebalance"):
            self._prepare()
        else:
            self._maybe_complete()

    # Rounds

    def _prepare(self) -> None:
        """Begin a round: all are asked, by their heartbeats, to join again."""
        for member in self.members.values():
            waiting, member.sync = member.sync, None
            if waiting is not None:
                waiting(RebalanceInProgressError())
        self.state = "PreparingRebalance"
        self._round += 1
        current = self._round
        longest_s = max((member.rebalance_s for member in self.members.values()), default=0.0)

        def give_up() -> None:
            if self.state == "PreparingRebalance" and self._round == current:
                self._complete()

        self.world.at(self.world.now + longest_s, give_up)
        self._maybe_complete()

    def _maybe_complete(self) -> None:
        if self.state == "PreparingRebalance" and all(m.join is not None for m in self.members.values()):
            self._complete()

    def _complete(self) -> None:
        for member in [m for m in self.members.values() if m.join is None and m.instance is None]:
            del self.members[member.member_id]  # static ones stay until their session ends
        self.generation += 1
        if not self.members:
            self.state = "Empty"
            self.leader = None
            return
        here = [m.member_id for m in self.members.values() if m.join is not None]
        if not here:  # nobody came: the static members that are left are waited for again
            self.generation -= 1
            self._prepare_later()
            return
        if self.leader not in here:
            self.leader = here[0]
        self.state = "CompletingRebalance"
        for member in list(self.members.values()):
            answer, member.join = member.join, None
            if answer is not None:
                self._alive(member)
                answer(self._joined(member))

    def _prepare_later(self) -> None:
        self.world.at(self.world.now + 1.0, lambda: self._prepare() if self.state == "PreparingRebalance" else None)

    def _joined(self, member: Member) -> Joined:
        assert self.leader is not None
        leads = member.member_id == self.leader
        members = {m.member_id: m.brought for m in self.members.values()} if leads else {}
        return Joined(self.generation, member.member_id, self.leader, members)

    # Offsets

    def commit(self, member_id: str, instance: str | None, generation: int, offsets: Offsets) -> None:
        """A consumer's own commit; it counts as a heartbeat."""
        if generation >= 0 or member_id or instance is not None:
            member = self._known(member_id, instance)
            if generation != self.generation:
                raise IllegalGenerationError
            self._alive(member)
        elif self.state != "Empty":
            raise UnknownMemberIdError
        if self.state == "CompletingRebalance":
            raise RebalanceInProgressError
        self.offsets.update(offsets)

    def commit_in_transaction(
        self, producer_id: int, member_id: str, instance: str | None, generation: int, offsets: Offsets
    ) -> None:
        """Offsets that count once the producer's transaction is committed.

        Without member id, generation and instance nothing at all is checked; nor is it ever checked who owns what.
        """
        if generation >= 0 or member_id or instance is not None:
            self._known(member_id, instance)
            if generation != self.generation:
                raise IllegalGenerationError
        self.pending.setdefault(producer_id, {}).update(offsets)

    def mark(self, producer_id: int, commit: bool) -> None:
        """A transaction's marker has come."""
        offsets = self.pending.pop(producer_id, {})
        if commit:
            self.offsets.update(offsets)

    def committed(self, partition: TopicPartition, stable: bool) -> OffsetAndMetadata | None:
        """What was committed last; `UnstableOffsetCommitError` while a transaction is about to change it."""
        if stable and any(partition in offsets for offsets in self.pending.values()):
            raise UnstableOffsetCommitError
        return self.offsets.get(partition)
