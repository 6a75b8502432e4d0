"""Many seeds, in two processes: `python -m tests.simulation SEEDS=0..10000`; what came of it goes to results.jsonl.

`SEEDS=17 -v` runs one and prints all that happens in it; `AT=kind:point` aims all of them at one point.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

from .harness import Outcome, run_seed

RESULTS = Path(__file__).with_name("results.jsonl")
PROCESSES = 2


def seeds(text: str) -> range:
    """`17` is one seed, `0..500` those from 0 to 499.

    >>> list(seeds("3..5"))
    [3, 4]
    """
    first, dots, end = text.partition("..")
    return range(int(first), int(end) if dots else int(first) + 1)


def outcomes(wanted: range, directed: str | None) -> Iterator[Outcome]:
    """Each seed's, as they come."""
    with multiprocessing.get_context("spawn").Pool(PROCESSES, maxtasksperchild=500) as pool:
        yield from pool.imap_unordered(partial(run_seed, directed=directed), wanted, chunksize=10)


def told(outcome: Outcome) -> str:
    """A failure, and how to see it again."""
    aimed = f" AT={outcome.directed}" if outcome.directed else ""
    lines = "\n  ".join(outcome.failures)
    return f"seed {outcome.seed}{aimed}:\n  {lines}\n  again: python -m tests.simulation SEEDS={outcome.seed}{aimed} -v"


def main(arguments: list[str]) -> int:
    """0 if all held."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    wanted, directed = seeds(given.get("SEEDS", "0..500")), given.get("AT")
    if "-v" in arguments:
        for seed in wanted:
            outcome = run_seed(seed, directed=directed, trace=True)
            print(*outcome.trace, told(outcome) if outcome.failures else f"seed {seed} held", sep="\n")
        return 0
    began, failed, commits, restores, restarts = time.monotonic(), [], 0, 0, 0
    struck = Counter[str]()
    for number, outcome in enumerate(outcomes(wanted, directed), 1):
        commits, restores, restarts = (
            commits + outcome.commits,
            restores + outcome.restores,
            restarts + outcome.restarts,
        )
        for point, found in outcome.points.items():
            struck.update({f"{kind}:{point}": count for kind, count in found.items() if kind != "reached"})
        if outcome.failures:
            failed.append(outcome.seed)
            print(told(outcome), flush=True)
        if number % 500 == 0:
            print(f"{number} of {len(wanted)} seeds, {len(failed)} failed, {commits} commits", flush=True)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "release": version("statestep"),
        "seeds": given.get("SEEDS", "0..500"),
        "at": directed,
        "seconds": round(time.monotonic() - began, 1),
        "commits": commits,
        "restores": restores,
        "restarts": restarts,
        "failures": sorted(failed),
        "struck": dict(sorted(struck.items())),
    }
    with RESULTS.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{len(wanted)} seeds, {commits} commits, {restores} restores: {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
