"""The tables of docs/conversion.md, made of what becomes of every graph that the tests convert.

    python -m tests.export.conversion_table

writes them anew between the marks in that file; a test holds the file to it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from statestep.export.against import rounding

from . import graphs, graphs_loops, graphs_odd, graphs_windows
from .conversions import Case, Outcome, fixtures, outcome_of

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "conversion.md"
BEGIN, END = "<!-- made by tests/export/conversion_table.py -->", "<!-- until here -->"
BY_HAND = (*graphs.CASES, *graphs_loops.CASES, *graphs_windows.CASES, *graphs_odd.CASES)


def cases() -> list[Case]:
    """Every graph of the tables, in their order."""
    return [*fixtures(), *BY_HAND]


def tables(of: Callable[[Case], Outcome]) -> str:
    """What converts and what is refused, in Markdown. `of` converts a case."""
    outcomes = [of(case) for case in cases()]
    taken = [(o.case.source, o.case.what, _states(o), _exactness(o)) for o in outcomes if o.made is not None]
    refused = [(o.case.source, o.case.what, o.sentence) for o in outcomes if o.made is None]
    return "\n".join(
        [
            f"### Converts: {len(taken)} graphs",
            "",
            *_table(("made by", "network", "states, without the batch", "stepped = original"), taken),
            "",
            f"### Refused: {len(refused)} graphs",
            "",
            *_table(("made by", "network", "what is said"), refused),
        ]
    )


def with_tables(document: str, made: str) -> str:
    """The document with other tables between its marks."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}"


def _states(outcome: Outcome) -> str:
    assert outcome.made is not None
    parts = []
    for state in outcome.made.contract.states:
        kind = "" if state.dtype == "float32" else f" {state.dtype}"
        parts.append(f"`{state.input}` [{', '.join(map(str, state.shape))}]{kind}")
    return ", ".join(parts)


def _exactness(outcome: Outcome) -> str:
    assert outcome.made is not None and outcome.made.sequence is not None
    rounds = rounding(onnx.load_model(str(outcome.made.sequence)))
    return f"within 1e-5 ({', '.join(rounds)})" if rounds else "bit-equal"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |" for line in lines]


def main() -> None:
    """Write the tables into the document."""
    with tempfile.TemporaryDirectory() as folder:

        def of(case: Case) -> Outcome:
            into = Path(folder) / case.name
            into.mkdir()
            return outcome_of(case, into)

        DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), tables(of)))


if __name__ == "__main__":
    main()
