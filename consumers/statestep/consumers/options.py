"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from statestep.consumers.config import ConfigError, features_of, output_of
from statestep.runtime import State, silence

Model = Annotated[Path, typer.Option(help="The step model, an .onnx file.")]
ModelSha256 = Annotated[str | None, typer.Option(help="The SHA-256 of the model file; any other file is refused.")]
Data = Annotated[str, typer.Option(help="Readings: a .csv, .jsonl or .parquet file, or - for JSONL on standard input.")]
Key = Annotated[str | None, typer.Option(help="The column that names the stream. Without it the file is one stream.")]
Time = Annotated[str, typer.Option(help="The column that holds the time: ISO 8601, or a number since 1970.")]
OnGap = Annotated[
    silence.OnGap,
    typer.Option(
        help="Where a stream was silent: what the model measured as best, or go on, or bridge the gap by the model's "
        "own forecasts, or begin anew."
    ),
]
ExpireAfter = Annotated[
    str | None, typer.Option(help="A stream that was silent for so long, by event time, is a new one: 12h, 7d.")
]
States = Annotated[
    list[str] | None,
    typer.Option("--state", help="A state pair of a model without a contract, in=out or in=out:AXIS; repeatable."),
]
ModuleStates = Annotated[
    list[str] | None,
    typer.Option(
        "--state",
        help="A state of a module forward(x, *states) → (y, *new_states), in order: in=out:WIDTH, or in=out:2x64 for "
        "[B, 2, 64]; repeatable.",
    ),
]
Cell = Annotated[
    str,
    typer.Option(
        help="The recurrent cell: rnn, rnn-relu, lstm, lstm-projected, lstm-peephole, lstm-coupled, "
        "lstm-peephole-coupled, lstm-layernorm, gru or gru-reset-before; or one for each layer, lstm,gru."
    ),
]
Values = Annotated[
    list[str] | None, typer.Option("--set", help="Fix an input that never changes, name=value; repeatable.")
]
Columns = Annotated[
    str | None,
    typer.Option("--features", help="Of a model without a contract: its features, separated by commas, or how many."),
]
Units = Annotated[list[str] | None, typer.Option("--unit", help="A feature's unit, name=unit; repeatable.")]
Period = Annotated[
    float | None, typer.Option(min=1e-9, help="Seconds between two timesteps; else told by the column of --time.")
]
FalseAlarms = Annotated[
    str | None,
    typer.Option(
        help="How many false alarms of a stream are acceptable: 1/week, 2/month, 1/5000 rows, or a quantile of the "
        "scores such as 0.999. By default 1/week, or 0.999 where the period is not known."
    ),
]
Smoothing = Annotated[
    float, typer.Option(min=1e-6, max=1, help="Weight of the newest evidence: 0.1 remembers about ten timesteps.")
]
Combine = Annotated[
    Literal["mean", "top", "max"],
    typer.Option(help="What of the features makes the score: all, the most unusual quarter, or the most unusual one."),
]
Rule = Annotated[
    Literal["plain", "likelihood", "conformal"],
    typer.Option(help="Whether a score is judged as it is, or against the stream's own late scores."),
]
Author = Annotated[str | None, typer.Option(help="Who made the model.")]
License = Annotated[str | None, typer.Option(help="Its licence, as an SPDX name: Apache-2.0.")]
Description = Annotated[str | None, typer.Option(help="What it is for, in a sentence.")]
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


def states_of(given: Sequence[str] | None) -> dict[str, str | tuple[str, int]] | None:
    """State pairs as `StepModel` takes them.

    >>> states_of(["h=hn", "state=stateN:1"])
    {'h': 'hn', 'state': ('stateN', 1)}
    """
    return {name: output_of(output) for name, output in (pair(item, "--state") for item in given or ())} or None


def module_states_of(given: Sequence[str] | None) -> list[State] | None:
    """The states of a torch module in step form, as `lift` takes them.

    >>> [state.shape for state in module_states_of(["h0=hn:64", "m0=mn:2x64"])]
    [(64,), (2, 64)]
    """
    states = []
    for name, value in (pair(item, "--state") for item in given or ()):
        output, _, sizes = value.rpartition(":")
        shape = sizes.split("x")
        if not output or not all(size.isdecimal() and int(size) for size in shape):
            raise ConfigError(f"--state is '{name}={value}': it must be in=out:WIDTH, as in h0=hn:64")
        states.append(State(name, output, tuple(int(size) for size in shape)))
    return states or None


def constants_of(given: Sequence[str] | None) -> dict[str, Any] | None:
    """Constant inputs as `StepModel` takes them: numbers, true or false, or lists of them.

    >>> constants_of(["sr=16000", "flags=[true, false]"])
    {'sr': 16000, 'flags': [True, False]}
    """
    found = {}
    for item in given or ():
        name, text = pair(item, "--set")
        try:
            found[name] = json.loads(text)
        except ValueError:
            raise ConfigError(f"--set is {item!r}: the value must be a number, true or false, or a list") from None
    return found or None


def described(
    features: Sequence[str],
    unit: Sequence[str] | None,
    author: str | None,
    license: str | None,
    description: str | None,
) -> dict[str, Any]:
    """What is said of a model in its contract, as `export_step` takes it. A unit of no feature is told before training.

    >>> described(["flow"], ["flow=m3/h"], None, "MIT", None)["units"]
    {'flow': 'm3/h'}
    """
    units = dict(pair(item, "--unit") for item in unit or ())
    if strangers := [name for name in units if name not in features]:
        raise ConfigError(f"--unit is of {strangers[0]!r}: it must be of one of the features {', '.join(features)}")
    return {"units": units, "author": author, "license": license, "description": description}


def by_hand(state: Sequence[str] | None, constant: Sequence[str] | None, features: str | None) -> dict[str, Any]:
    """What was said of a model that its file does not say, as `StepModel` takes it."""
    return {"states": states_of(state), "constants": constants_of(constant), "features": features_of(features)}


def ends_in_onnx(path: Path) -> None:
    """Told before an hour of training, not after it."""
    if path.suffix != ".onnx":
        raise ConfigError(f"--out is {str(path)!r}: its name must end in .onnx")
