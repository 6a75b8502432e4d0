"""The faults: each breaks something while messages flow, puts it right again, and says what was seen."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from statestep.consumers.state_places import KafkaPlace

from .cluster import OFFSETS, TRANSACTIONS, Cluster
from .members import RESTART_ME, Members
from .progress import Progress
from .service_process import wait_until

NAMED = ("service-0", "service-1")  # the services with an --instance-id; the others have none
SESSION_SECONDS = 4.0
HEAL_SECONDS = 120.0  # until everything that was sent before a fault's end is answered
NOTICE_SECONDS = 60.0  # until a service knows that its broker is gone, or there again


class Chaos:
    """A run under way: what the faults act on."""

    def __init__(self, cluster: Cluster, app_id: str, members: Members, progress: Progress, rng: random.Random) -> None:
        self.cluster = cluster
        self.app_id = app_id
        self.members = members
        self.progress = progress
        self.rng = rng

    def pass_time(self, low: float, high: float) -> float:
        """Let a drawn number of seconds pass under the supervisor's eye; gives it."""
        seconds = self.rng.uniform(low, high)
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.members.supervise()
            time.sleep(min(left, 0.05))
        return seconds

    def wait_until_serving(self, names: Sequence[str]) -> float:
        """Return once these, and no others, are ready; gives the seconds that it took."""
        began = time.monotonic()

        def settled() -> bool:
            self.members.supervise()
            return self.members.serving() == sorted(names)

        try:
            wait_until(settled, f"ready are {', '.join(names) or 'none'}", NOTICE_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}, but {', '.join(self.members.serving()) or 'none'}") from None
        return time.monotonic() - began

    def wait_until_healed(self) -> float:
        """Return once all that was sent up to now is answered; gives the seconds that it took."""
        began = time.monotonic()
        ends = self.progress.ends()

        def healed() -> bool:
            self.members.supervise()
            return self.progress.reached(ends)

        try:
            wait_until(healed, "all that was sent to be answered", HEAL_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}: the input ends at {ends}, committed is {self.progress.committed}") from None
        return time.monotonic() - began

    def wait_until_written(self) -> None:
        """Return once a restart would have nothing to replay, though partitions may be on their way to other owners."""
        properties = {"bootstrap_servers": self.cluster.bootstrap_servers.split(",")}

        def written() -> bool:
            self.members.supervise()
            return all(h.marker and h.marker.redo == h.marker.next == h.end for h in place.read().values())

        with closing(KafkaPlace(properties, self.app_id, f"{self.app_id}-readings")) as place:
            wait_until(written, "all states to be written", HEAL_SECONDS)

    def joined(self, name: str) -> bool:
        """Whether a service has come as far as the group."""
        self.members.supervise()
        return self.members.has_joined(name)

    def a_member(self) -> str:
        """One of the services, drawn."""
        return self.rng.choice(self.members.names)


def kill_service(chaos: Chaos) -> str:
    name = chaos.a_member()
    chaos.members.kill(name)
    away = chaos.pass_time(0, 1.5 * SESSION_SECONDS)
    chaos.members.start(name)
    return f"{name}, away for {away:.1f} s"


def terminate_service(chaos: Chaos) -> str:
    name = chaos.a_member()
    began = time.monotonic()
    code = chaos.members.terminate(name)
    took = time.monotonic() - began
    chaos.pass_time(0, 2)
    chaos.members.start(name)
    return f"{name}, ended with {code} in {took:.1f} s"


def pause_service(chaos: Chaos) -> str:
    """The zombie: its partitions go to others, who have gone on when it wakes."""
    name = chaos.a_member()
    chaos.members.pause(name)
    chaos.pass_time(SESSION_SECONDS + 1, SESSION_SECONDS + 3)
    took = chaos.wait_until_healed()
    chaos.members.resume(name)
    return f"{name}, the others had caught up {took:.1f} s after the session's end"


def twin_service(chaos: Chaos) -> str:
    """A second process under the name of one that sleeps: the sleeper must find itself fenced, and end.

    Where it slept for longer than its session it may join anew first, which ends the second; its next life ends it.
    """
    name = chaos.rng.choice(sorted(NAMED))
    wait_until(lambda: chaos.joined(name), f"{name} in the group", NOTICE_SECONDS)
    chaos.members.pause(name)
    sleeper = chaos.members.disown(name)
    chaos.members.start(name, state=f"{name}-twin-{chaos.members.lives[name]}")
    chaos.pass_time(1, 4)
    took = chaos.wait_until_healed()
    sleeper.process.send_signal(signal.SIGCONT)

    def ended() -> bool:
        chaos.members.supervise()
        return sleeper.process.poll() is not None

    wait_until(ended, f"the end of {name}, which was fenced", NOTICE_SECONDS)
    code = sleeper.process.returncode
    assert code == RESTART_ME, f"{name} was fenced and ended with {code}:\n{sleeper.log[-4000:]}"
    return f"{name}, its twin had caught up in {took:.1f} s, the sleeper ended with {code}"


def lose_state(chaos: Chaos) -> str:
    name = chaos.a_member()
    chaos.members.kill(name)
    chaos.members.lose_state(name)
    chaos.members.start(name)
    return f"{name} starts over an empty folder"


def kill_broker(chaos: Chaos) -> str:
    node = chaos.rng.choice(chaos.cluster.nodes)
    node.kill()
    away = chaos.pass_time(0.5, 6)
    chaos.cluster.restart(node.number)
    return f"node {node.number}, away for {away:.1f} s and until it had caught up"


def pause_broker(chaos: Chaos) -> str:
    node = chaos.rng.choice(chaos.cluster.nodes)
    node.pause()
    away = chaos.pass_time(1, 12)
    node.resume()
    chaos.cluster.wait_until_whole()
    return f"node {node.number}, for {away:.1f} s"


def roll_brokers(chaos: Chaos) -> str:
    for node in chaos.cluster.nodes:
        node.stop()
        chaos.members.supervise()
        chaos.cluster.restart(node.number)
        chaos.members.supervise()
    return "all nodes, one after the other"


def lose_brokers(chaos: Chaos) -> str:
    """All brokers go away at once: who serves polls on, says that it is not ready, and does not end."""
    chaos.wait_until_serving(chaos.members.names)
    ended = chaos.members.restarts, chaos.members.failed_starts
    chaos.cluster.kill()
    noticed = chaos.wait_until_serving([])
    away = noticed + chaos.pass_time(max(15 - noticed, 0), max(20 - noticed, 5))
    assert ended == (chaos.members.restarts, chaos.members.failed_starts), "a service ended for want of a broker"
    chaos.cluster.start()
    return f"all nodes, away for {away:.1f} s; {noticed:.1f} s until nobody was ready"


def storm(chaos: Chaos) -> str:
    """Every two seconds a member joins, and the last but one leaves, in order or not."""
    rounds = chaos.rng.randrange(3, 6)
    guests = [f"guest-{n}" for n in range(rounds)]
    for n in range(rounds + 2):
        if n < rounds:
            chaos.members.start(guests[n])
            chaos.members.wait_until_joining(guests[n])
        if n >= 2:
            leave = chaos.rng.choice([chaos.members.kill, chaos.members.terminate])
            leave(guests[n - 2])
        chaos.pass_time(2, 2)
    return f"{rounds} members came and went"


def move_coordinators(chaos: Chaos) -> str:
    """The leaders of the internal topics move by election, or the node that coordinates the group goes away."""
    how = chaos.rng.choice(["elect", "elect all", "stop", "kill"])
    if how == "elect":
        return f"{chaos.cluster.move_leaders([OFFSETS, TRANSACTIONS])} leaders of the internal topics moved"
    if how == "elect all":
        return f"{chaos.cluster.move_leaders(chaos.cluster.topics())} leaders of all topics moved"
    node = chaos.cluster.node(chaos.cluster.coordinator(chaos.app_id))
    (node.stop if how == "stop" else node.kill)()
    chaos.pass_time(1, 3)
    chaos.cluster.restart(node.number)
    return f"node {node.number}, the group's coordinator: {how}"


KINDS: dict[str, Callable[[Chaos], str]] = {
    "service-kill": kill_service,
    "service-term": terminate_service,
    "service-pause": pause_service,
    "service-twin": twin_service,
    "state-lost": lose_state,
    "broker-kill": kill_broker,
    "broker-pause": pause_broker,
    "broker-rolling": roll_brokers,
    "broker-gone": lose_brokers,
    "rebalance-storm": storm,
    "coordinator-move": move_coordinators,
}


def plan(count: int, rng: random.Random, kinds: Sequence[str] = tuple(KINDS)) -> list[str]:
    """`count` faults in a drawn order, of each kind as many as of any other, or one more."""
    chosen = [kind for _ in range(count // len(kinds)) for kind in kinds]
    chosen += rng.sample(kinds, count % len(kinds))
    rng.shuffle(chosen)
    return chosen
