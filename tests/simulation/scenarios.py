"""What clients see of Kafka, told once: each scenario runs over the simulation and over a real broker.

A scenario is a function of a `Bench`, which gives it clients and time; it raises where what it claims does not hold.
`tests/simulation/test_fakes.py` gives it simulated clients, `tests/broker/test_fakes_are_true.py` kafka-python's own.
"""

from __future__ import annotations

from . import scenarios_groups, scenarios_topics, scenarios_transactions
from .bench import SCENARIOS, Bench, Member

__all__ = ["SCENARIOS", "Bench", "Member", "scenarios_groups", "scenarios_topics", "scenarios_transactions"]
