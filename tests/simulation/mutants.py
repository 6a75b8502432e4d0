"""A test of the tests: the service with one rule broken, which the simulation must notice.

    python -m tests.simulation.mutants                  # all: which was caught, by what, from which seed
    python -m tests.simulation.mutants K1 store         # those with such a text in their name

Each mutation replaces text of real functions (`mutations.py` has the list) and meets the scenario that is made for it:
a kind of run, its faults, and what the service as it is says to them. It is caught where a seed comes to another end.
"""

from __future__ import annotations
import __future__

import inspect
import linecache
import multiprocessing
import pkgutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from unittest import mock

from . import harness, plans
from .harness import Outcome, Run

Happens = Callable[[Run], None]

SEEDS = 12  # tried of a scenario that names none, until one catches the mutation
WORKERS = 2
CALM: Mapping[str, Any] = {  # what a scenario's runs are like where it says nothing else
    "directed": None, "partitions": 2, "keys": 6, "processes": 1, "static": False, "exactly_once": True,
    "commit_s": 0.1, "snapshot_s": 2.0, "records": 8, "snapshot_bytes": 1 << 20, "store": False, "store_kept": 0.0,
    "max_streams": 1000, "rate": 0.0, "clocked": 0, "gap_s": 0.08, "transaction_ms": 3000, "session_ms": 2000,
    "poll_ms": 9000, "poisoned": False, "leftovers": False, "sigterm": False, "silent": False,
}  # fmt: skip


class Edit(NamedTuple):
    """Text of one function that is replaced. `where` is `module:function` or `module:Class.method`."""

    where: str
    old: str
    new: str


@dataclass(frozen=True)
class Scenario:
    """A kind of run in which a broken rule shows."""

    settings: Mapping[str, Any] = field(default_factory=dict)  # of the `Plan`
    happens: Happens | None = None  # called when the run has been arranged
    says: str = ""  # what the service as it is ends with, where that is right: it must stop
    feed_s: float = 8.0  # for how long records are written
    calm_s: float = 4.0  # and then nothing befalls the run any more
    bound_s: float = 20.0  # and then all is answered after so long
    clean_s: float = 12.0  # and then no stream is dirty after so long
    seeds: Sequence[int] = range(1, SEEDS + 1)


class Mutant(NamedTuple):
    """A broken rule."""

    name: str
    rule: str
    scenario: Scenario
    edits: tuple[Edit, ...]


def mutant(name: str, rule: str, scenario: Scenario, *edits: tuple[str, str, str]) -> Mutant:
    """A broken rule, of the places, texts and replacements of its edits."""
    return Mutant(name, rule, scenario, tuple(Edit(*edit) for edit in edits))


class Verdict(NamedTuple):
    """What became of a mutation: how it was caught, or nothing."""

    said: str
    seed: int
    seconds: float


def function(where: str) -> FunctionType:
    """The function of that name, as it is now."""
    module, _, path = where.partition(":")
    found: Any = pkgutil.resolve_name(module)
    for name in path.split("."):
        found = inspect.getattr_static(found, name)
    found = getattr(found, "fget", found)
    found = getattr(found, "__func__", found)
    assert isinstance(found, FunctionType), f"{where} is no function"
    return found


def mutated(original: FunctionType, edits: Sequence[Edit]) -> CodeType:
    """The code of a function with its text replaced. Raises ValueError where a text is not there once."""
    source = textwrap.dedent(inspect.getsource(original))
    for edit in edits:
        if source.count(edit.old) != 1:
            raise ValueError(f"{edit.where} has {source.count(edit.old)} times the text to replace: {edit.old!r}")
        source = source.replace(edit.old, edit.new)
    name = f"<mutant of {original.__qualname__}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    found: dict[str, Any] = {}
    code = compile(source, name, "exec", __future__.annotations.compiler_flag)
    exec(code, dict(original.__globals__), found)
    changed: CodeType = inspect.unwrap(found[original.__name__]).__code__
    if changed.co_freevars != original.__code__.co_freevars:
        raise ValueError(f"{original.__qualname__} closes over {original.__code__.co_freevars}")
    return changed


@contextmanager
def applied(edits: Sequence[Edit]) -> Iterator[None]:
    """Have functions do the wrong thing, wherever they have been imported to."""
    by_function: dict[FunctionType, list[Edit]] = {}
    for edit in edits:
        by_function.setdefault(function(edit.where), []).append(edit)
    codes = {original: mutated(original, mine) for original, mine in by_function.items()}
    before = {original: original.__code__ for original in codes}
    try:
        for original, code in codes.items():
            original.__code__ = code
        yield
    finally:
        for original, code in before.items():
            original.__code__ = code


def run(scenario: Scenario, seed: int, trace: bool = False) -> Outcome:
    """One run; the service is whatever it is at the moment."""
    plan, arrange = plans.plan, Run.arrange

    def settled(*args: Any) -> Any:
        return replace(plan(*args), **{**CALM, **scenario.settings})

    def arranged(run: Run) -> None:
        arrange(run)
        if scenario.happens is not None:
            scenario.happens(run)

    heal_s = scenario.feed_s + scenario.calm_s
    changed = {"plan": settled, "FEED_S": scenario.feed_s, "HEAL_S": heal_s}
    changed |= {"BOUND_S": scenario.bound_s, "CLEAN_S": scenario.clean_s}
    assert changed.keys() <= vars(harness).keys()
    with mock.patch.dict(vars(harness), changed), mock.patch.object(Run, "arrange", arranged):
        return harness.run_seed(seed, trace=trace)


def amiss(scenario: Scenario, outcome: Outcome) -> str:
    """In what a run came to another end than it must; empty if in nothing."""
    said = " ".join((outcome.failures or [""])[0].split())
    if scenario.says:
        return "" if scenario.says in said else said or f"the service goes on, it must stop: {scenario.says}"
    return said


def judge(mutant: Mutant) -> Verdict | None:
    """Try the scenario's seeds in turn, until one catches the mutation and says nothing without it."""
    began = time.perf_counter()
    for seed in mutant.scenario.seeds:
        with applied(mutant.edits):
            said = amiss(mutant.scenario, run(mutant.scenario, seed))
        if said and not amiss(mutant.scenario, run(mutant.scenario, seed)):
            return Verdict(said, seed, time.perf_counter() - began)
    return None


def _judged(name: str) -> tuple[str, str, Verdict | None]:
    """A mutation's name, what is wrong with it, and how it was caught."""
    from .mutations import MUTANTS

    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    try:
        verdict = judge(mutant)
    except ValueError as error:
        return name, f"DOES NOT APPLY: {error}", None
    return name, "" if verdict is not None else f"SURVIVES {len(mutant.scenario.seeds)} seeds", verdict


def main(words: Sequence[str]) -> int:
    """Print the table; how many mutations were not caught."""
    from .mutations import MUTANTS

    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    rules = {mutant.name: mutant.rule for mutant in chosen}
    bad = 0
    print(f"{'mutation':58} {'rule':20} {'seed':>4} {'s':>5}  caught by (what is said first, after the simulated time)")
    with multiprocessing.Pool(WORKERS) as pool:
        for name, wrong, verdict in pool.imap(_judged, rules):
            bad += bool(wrong)
            seed, seconds = ("", "") if verdict is None else (verdict.seed, f"{verdict.seconds:.1f}")
            said = wrong if verdict is None else verdict.said
            print(f"{name:58} {rules[name]:20} {seed:>4} {seconds:>5}  {said[:100]}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutations were caught")
    return bad


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
