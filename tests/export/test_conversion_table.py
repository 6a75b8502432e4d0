"""The tables of docs/conversion.md are what convert says today."""

from __future__ import annotations

from collections.abc import Callable

from .conversion_table import DOCUMENT, tables, with_tables
from .conversions import Case, Outcome


def test_the_document_tells_what_is(converted: Callable[[Case], Outcome]) -> None:
    """Whoever changes what converts, or what a refusal says, makes the document anew: `make docs`."""
    document = DOCUMENT.read_text()
    assert with_tables(document, tables(converted)) == document
