"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from statestep.consumers.config import ConfigError

Model = Annotated[Path, typer.Option(help="The step model, an .onnx file.")]
ModelSha256 = Annotated[str | None, typer.Option(help="The SHA-256 of the model file; any other file is refused.")]
Data = Annotated[str, typer.Option(help="Readings: a .csv, .jsonl or .parquet file, or - for JSONL on standard input.")]
Key = Annotated[str | None, typer.Option(help="The column that names the stream. Without it the file is one stream.")]
Time = Annotated[str, typer.Option(help="The column that holds the time: ISO 8601, or a number since 1970.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something goes wrong.")]


def names(listed: str) -> list[str]:
    """Names separated by commas.

    >>> names("flow, pressure")
    ['flow', 'pressure']
    """
    return [name.strip() for name in listed.split(",") if name.strip()]


def pair(item: str, flag: str) -> tuple[str, str]:
    """A flag's name=value, taken apart at the first equals sign.

    >>> pair("sr=16000", "--set")
    ('sr', '16000')
    """
    name, equals, value = item.partition("=")
    if not (name and equals):
        raise ConfigError(f"{flag} is {item!r}: it must be name=value")
    return name, value


def ends_in_onnx(path: Path) -> None:
    """Told before an hour of training, not after it."""
    if path.suffix != ".onnx":
        raise ConfigError(f"--out is {str(path)!r}: its name must end in .onnx")
