"""The simulation notices each rule that is broken on purpose, and has nothing to say where none is."""

from __future__ import annotations

import pytest

from statestep.consumers.service import Service

from .mutants import Edit, Mutant, Scenario, amiss, applied, judge, mutated, run
from .mutations import MUTANTS


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_broken_rule_is_noticed(mutant: Mutant) -> None:
    """One of the scenario's seeds comes to another end, to which the service as it is does not come."""
    again = f"python -m tests.simulation.mutants {mutant.name!r}"
    assert judge(mutant) is not None, f"nobody noticed it in seeds {list(mutant.scenario.seeds)}; again: {again}"


def test_no_rule_is_forgotten() -> None:
    """Names are distinct, or a mutation would be tried in another's place, and no two are the same."""
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
    assert len({mutant.edits for mutant in MUTANTS}) == len(MUTANTS)


def test_a_text_that_is_no_longer_there_fails() -> None:
    """A mutation that changes nothing would be one that nobody can notice."""
    with pytest.raises(ValueError, match="has 0 times the text to replace: 'no such text'"):
        mutated(Service._due, [Edit("statestep.consumers.service:Service._due", "no such text", "")])  # type: ignore[arg-type]


def test_a_mutation_is_taken_back() -> None:
    """What comes after one is the service as it is."""
    before = Service._due.__code__
    with applied([Edit("statestep.consumers.service:Service._due", "return False", "return True")]):
        assert Service._due.__code__ is not before
    assert Service._due.__code__ is before


def test_a_service_that_must_stop_and_goes_on_is_noticed() -> None:
    """A scenario that ends in a sentence is not passed by silence."""
    scenario = Scenario(says="what nobody says")
    assert amiss(scenario, run(scenario, 1)) == "the service goes on, it must stop: what nobody says"
