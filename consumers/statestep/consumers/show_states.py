"""What `statestep state` prints: plain functions from rows to tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from statestep.consumers.states import PartitionRow, StreamRow

VALUES_SHOWN = 8  # of a tensor


def partitions(rows: Sequence[PartitionRow], console: Console) -> None:
    """How far each partition is."""
    table = _table(
        "partition", "sequence", "redo", "next", "unwritten", "behind", "epoch", "streams", "model", "offset"
    )
    for row in rows:
        table.add_row(*map(_number, row[:8]), "–" if row.model is None else row.model[:8])
    console.print(table)
    console.print(
        "unwritten: messages from redo to next, which a restart applies again; behind: from redo to the input's end",
        soft_wrap=True,
    )
    for row in rows:
        if row.committed != row.next:
            console.print(
                f"[yellow]partition {row.partition}:[/yellow] the committed offset is {_number(row.committed)}, "
                f"the states go with {_number(row.next)}",
                soft_wrap=True,
                highlight=False,
            )


def streams(rows: Sequence[StreamRow], console: Console) -> None:
    """Streams, one a line."""
    table = _table("stream", "partition", "step", "offset", "age", "bytes")
    for row in rows:
        figures = map(_number, (row.partition, row.step, row.offset))
        table.add_row(escape(row.stream), *figures, _age(row.age_s), f"{row.bytes:,}")
    console.print(table)


def stream(one: Mapping[str, Any], console: Console) -> None:
    """All that is known of one stream in one partition, as `state show --json` has it."""
    console.print(f"[bold]{escape(one['stream'])}[/bold] partition {one['partition']}", highlight=False)
    facts = Table.grid(padding=(0, 2))
    current = f"as of offset {one['next']}, all messages before it are in it"
    if not one["current"]:
        current = f"messages {one['redo']} to {one['next']} are applied, those of this stream may not be in it yet"
    rows = {
        "step": one["step"],
        "last message": f"offset {one['offset']}",
        "greatest time": f"{one['ts'] or 'unknown'}, {_age(one['age_s'])} ago" if one["ts"] else "unknown",
        "current": current,
        "state epoch": one["epoch"],
        "model": one["model"],
        "size": f"{one['bytes']:,} bytes",
    }
    for name, tensor in one.get("tensors", {}).items():
        flat = np.asarray(tensor["values"]).ravel()
        values = ", ".join(f"{float(value):g}" for value in flat[:VALUES_SHOWN])
        more = f", … {flat.size - VALUES_SHOWN} more" if flat.size > VALUES_SHOWN else ""
        rows[name] = f"{tensor['dtype']} {'×'.join(map(str, tensor['shape'])) or 'scalar'}: {values}{more}"
    for name, value in rows.items():
        facts.add_row(escape(str(name)), escape(str(value)))
    console.print(facts)


def _table(*names: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))  # fits 80 columns
    for name in names:
        table.add_column(name, justify="left" if name in ("stream", "model") else "right", overflow="fold")
    return table


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)


def _age(seconds: float | None) -> str:
    """A time span for people.

    >>> _age(90), _age(200_000), _age(None)
    ('2 min', '2 d', 'unknown')
    """
    if seconds is None:
        return "unknown"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
