"""The real service over a simulated Kafka: 500 seeds, half of them aimed at one point each, and what they reach."""

from __future__ import annotations

import pytest

from . import schedules
from .harness import run_seed

SEEDS = 500
CHUNK = 25


@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_commit_of_every_seed_holds(first: int) -> None:
    """All invariants after every commit, whatever happens; all is answered once faults have healed."""
    for seed in range(first, first + CHUNK):
        outcome = run_seed(seed)
        told = "\n".join(outcome.failures)
        assert not outcome.failures, (
            f"seed {seed} ({outcome.directed}):\n{told}\nagain: make simulate SEEDS={seed} ARGS=-v"
        )
        assert outcome.struck or outcome.directed is None, f"seed {seed}: nobody came by {outcome.directed}"
        assert outcome.commits


def test_seeds_are_aimed_at_everything_that_can_happen() -> None:
    """Each kind of fault at each point that adapters come by is some seed's, and no other point is ever reached."""
    assert len(schedules.DIRECTED) <= SEEDS // 2
    aimed = {run_aim(seed) for seed in range(1, SEEDS, 2)}
    assert aimed == set(schedules.DIRECTED)
    reached = {point for seed in range(0, 40, 2) for point in run_seed(seed).points}
    assert reached <= set(schedules.REACHED)


def run_aim(seed: int) -> str:
    """What a seed is aimed at."""
    return schedules.DIRECTED[seed // 2 % len(schedules.DIRECTED)]


def test_a_seed_tells_the_same_again() -> None:
    """A run is a function of its seed, so a failure can be looked at."""
    first, again = run_seed(2, trace=True), run_seed(2, trace=True)
    assert first.trace == again.trace
    assert len(first.trace) > 100


def test_each_commit_is_held_to_the_reference_by_the_shortcut_and_in_full() -> None:
    """The streams are rebuilt in full after some of the commits, so that the shortcut is held to account."""
    outcome = run_seed(4)
    assert 0 < outcome.rebuilt < outcome.commits


def test_a_static_member_that_dies_between_two_rounds_deals_out_what_it_left_to_nobody() -> None:
    """Kafka gives it its last assignment back without a round; it looks, gives its place up, and all is dealt out."""
    outcomes = (run_seed(seed, directed="kill-after:consumer.sync") for seed in range(300))
    outcome = next(o for o in outcomes if o.failures or "admin.remove_group_members" in o.points)
    assert not outcome.failures, outcome.failures
