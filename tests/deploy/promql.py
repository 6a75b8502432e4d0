"""What a PromQL expression asks for: the series and labels that must exist for it to find anything."""

from __future__ import annotations

from typing import NamedTuple

import promql_parser


class Selector(NamedTuple):
    """One series that an expression reads, and the labels that it is chosen by."""

    series: str
    labels: set[str]
    ranged: bool  # read over a range, as inside rate()


def selectors(expression: str) -> tuple[list[Selector], set[str]]:
    """The selectors of an expression, and the labels that it aggregates by. Raises ValueError if it is not PromQL."""
    found: list[Selector] = []
    grouped: set[str] = set()
    in_range = False

    def visit(node: object) -> bool:
        nonlocal in_range
        if isinstance(node, promql_parser.MatrixSelector):
            in_range = True  # the walk visits its selector next
        elif isinstance(node, promql_parser.VectorSelector):
            assert node.name, f"{expression}: a selector without the name of a series"
            labels = {matcher.name for matcher in node.matchers.matchers}
            found.append(Selector(node.name, labels, in_range))
            in_range = False
        elif isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            grouped.update(node.modifier.labels)
        return True

    promql_parser.walk(promql_parser.parse(expression), visit)
    return found, grouped


def check(expression: str, known: dict[str, set[str]]) -> list[Selector]:
    """Assert that every series and label of an expression exists; give its selectors."""
    found, grouped = selectors(expression)
    for series, labels, _ in found:
        assert series in known, f"{expression}: there is no series {series}"
        assert labels <= known[series], f"{expression}: {series} has no label {labels - known[series]}"
    everywhere = {label for series, _, _ in found for label in known[series]}
    assert grouped <= everywhere, f"{expression}: no label {grouped - everywhere} to aggregate by"
    return found
