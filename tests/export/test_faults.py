"""Synthetic faults: where they lie, what they change, and that the search among rules finds what it should."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from statestep.export.budget import Budget
from statestep.export.calibrate import Judging, Past, measured
from statestep.export.detector import Forecasts
from statestep.export.faults import KINDS, LENGTHS, WANTED, Fault, struck
from statestep.export.search import CHOICES, MARGIN, Tried, searched, tried
from statestep.export.series import Block, Series, blocks_of, mean_of


def wandering(rows: int, features: int, seed: int) -> Series:
    """Slow noise, each feature with its own level and spread; 30 % of the rows are its tail."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(rows, features))
    for t in range(1, rows):
        noise[t] += 0.8 * noise[t - 1]
    x = (10.0 ** np.arange(features) + noise * 2.0 ** np.arange(features)).astype(np.float32)
    return Series(f"s{seed}", x, np.zeros(x.shape, bool), round(rows * 0.7))


def last_value(block: Block) -> Past:
    return Past(block, block.x)


@pytest.mark.parametrize("features", [1, 3])
def test_faults_lie_in_the_tails_and_change_nothing_else(features: int) -> None:
    """Outside of faults the lanes are the streams' own rows; inside something differs; the run-in is untouched."""
    made = struck([wandering(3000, features, 1), wandering(2000, features, 2)], seed=3)
    times = made.faulty.x.shape[1] // 2
    lanes = [made.clean.x[:, i] for i in (0, 1) for _ in range(times)]
    if not np.array_equal(made.faulty.x[:64, 0], lanes[0][:64]):  # streams may come in another order
        lanes = lanes[times:] + lanes[:times]
    assert len(made.faults) >= WANTED
    wrong = np.zeros(made.faulty.x.shape[:2], bool)
    for fault in made.faults:
        assert made.faulty.cuts[fault.lane] <= fault.start < fault.end <= made.faulty.rows[fault.lane]
        assert fault.end - fault.start <= LENGTHS[1]
        wrong[fault.start : fault.end, fault.lane] = True
    differs = np.stack([(made.faulty.x[:, n] != lanes[n]).any(axis=1) for n in range(len(lanes))], axis=1)
    assert not (differs & ~wrong).any()
    for fault in made.faults:
        if fault.kind != "stuck":  # which a reading that rests does not show
            assert differs[fault.start : fault.end, fault.lane].any(), fault
    assert {fault.kind for fault in made.faults} == set(KINDS) - ({"torn"} if features == 1 else set())


def test_one_seed_is_one_set_of_faults() -> None:
    """The same faults for everything that is compared."""
    series = [wandering(1000, 2, 1)]
    one, twin, other = (struck(series, seed=seed) for seed in (4, 4, 5))
    assert one.faults == twin.faults and np.array_equal(one.faulty.x, twin.faulty.x)
    assert one.faults != other.faults


def test_a_short_stream_has_a_fault_too() -> None:
    """Tails that are shorter than a fault and its quiet hold one each."""
    made = struck([wandering(60, 2, seed) for seed in range(5)], seed=0)
    assert {fault.lane for fault in made.faults} == set(range(made.faulty.x.shape[1]))


def _setting() -> tuple[Past, Past, tuple[Fault, ...], list[Past], Forecasts]:
    series = [wandering(4000, 6, 1)]
    made = struck(series, seed=0)
    known = Forecasts(features=tuple("abcdef"), targets=tuple(range(6)), mean=mean_of(series))
    pasts = [last_value(block) for block in blocks_of(series)]
    return last_value(made.clean), last_value(made.faulty), made.faults, pasts, known


def test_the_search_leaves_a_default_only_for_clearly_more() -> None:
    """What it ends at is the start, or finds at least the margin more for each setting that it changed."""
    clean, faulty, faults, pasts, known = _setting()
    start, told = Judging(budget=Budget(every=2000)), list[Tried]()

    def all_of_them(one: Tried) -> bool:
        told.append(one)
        return True

    best = searched(clean, faulty, faults, pasts, known, start, goes_on=all_of_them)
    assert told[0].judging == start and len(told) == 1 + sum(len(choices) - 1 for choices in CHOICES.values())
    changed = sum(getattr(best.judging, name) != getattr(start, name) for name in CHOICES)
    assert best.share >= told[0].share + MARGIN * changed
    assert best.share == max(one.share for one in told if one.judging == best.judging)


def test_the_search_ends_when_it_is_told_to() -> None:
    """After the third try no fourth is made."""
    clean, faulty, faults, pasts, known = _setting()
    told: list[Tried] = []

    def three(one: Tried) -> bool:
        told.append(one)
        return len(told) < 3

    searched(clean, faulty, faults, pasts, known, Judging(), goes_on=three)
    assert len(told) == 3


def test_a_better_forecast_finds_more() -> None:
    """The forecast that knows how the readings wander beats one that is off by a noise of its own."""
    clean, faulty, faults, pasts, known = _setting()
    how = Judging(others=False, budget=Budget(every=2000))
    rng = np.random.default_rng(0)

    def worse(past: Past) -> Past:
        unit = 6 * past.block.x.std(axis=(0, 1))
        return replace(past, prediction=(past.prediction + rng.normal(size=past.prediction.shape) * unit).astype("f4"))

    good = tried(clean, faulty, faults, measured(pasts, known, how), how)
    bad = tried(worse(clean), worse(faulty), faults, measured([worse(p) for p in pasts], known, how), how)
    assert good.share > bad.share + 0.1
