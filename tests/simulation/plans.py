"""What kind of run a seed makes: how many processes, which settings, how often something happens to them."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .invariants import RECORD
from .schedules import DIRECTED


@dataclass(frozen=True)
class Plan:
    """What kind of run a seed makes."""

    directed: str | None
    partitions: int
    keys: int
    processes: int
    static: bool
    exactly_once: bool
    commit_s: float
    snapshot_s: float
    records: int
    snapshot_bytes: int
    store: bool
    store_kept: float  # how often it outlives its process
    max_streams: int
    rate: float  # of faults at points
    clocked: int  # faults by the clock
    gap_s: float  # between two records
    transaction_ms: int
    session_ms: int
    poll_ms: int
    poisoned: bool
    leftovers: bool
    sigterm: bool  # at the end, instead of waiting until nothing is dirty
    silent: bool  # streams fall silent, and are new ones or forgotten after a while


def plan(seed: int, chance: random.Random, directed: str | None) -> Plan:
    """Draw one. Every other seed is directed."""
    if directed is None and seed % 2:
        directed = DIRECTED[seed // 2 % len(DIRECTED)]
    store, keys = chance.random() < 0.25, chance.randint(2, 10)
    records = chance.choice((1, 3, 8, 40))
    spills = store and chance.random() < 0.7
    return Plan(
        directed=directed,
        partitions=chance.randint(1, 3),
        keys=keys,
        processes=max(chance.randint(1, 3), 2 if directed else 1),
        static=(chance.random() < 0.4 and not (directed and directed.endswith("consumer.leave")))
        or bool(directed and directed.endswith("admin.describe_groups")),
        exactly_once=chance.random() < 0.85,
        commit_s=chance.choice((0.05, 0.1, 0.2)),
        snapshot_s=chance.choice((0.0, 0.3, 2.0, 2.0, 6.0)),
        records=min(records, 4) if spills else records,
        snapshot_bytes=chance.choice((RECORD.size, 4 * RECORD.size, 1 << 20)),
        store=store,
        store_kept=chance.choice((0.0, 0.5, 1.0)),
        max_streams=chance.choice((8, 12)) if spills else 1000,
        rate=0.0 if directed and chance.random() < 0.5 else chance.choice((0.0005, 0.003, 0.01)),
        clocked=0 if directed else chance.randint(0, 4),
        gap_s=chance.choice((0.03, 0.08, 0.2)),
        transaction_ms=chance.choice((3000, 5000)),
        session_ms=chance.choice((2000, 4000)),
        poll_ms=chance.choice((9000, 20_000)),
        poisoned=chance.random() < 0.1,
        leftovers=chance.random() < 0.1,
        sigterm=chance.random() < 0.5,
        silent=random.Random(f"silent {seed}").random() < 0.25,
    )
