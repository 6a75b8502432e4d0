"""The command that makes a step model of an ONNX file from elsewhere: its flags, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from statestep.consumers import first_load, show, tables
from statestep.consumers.cli_model import judging_of
from statestep.consumers.config import ConfigError
from statestep.consumers.options import (
    Author,
    Combine,
    Debug,
    Description,
    FalseAlarms,
    Key,
    License,
    Period,
    Rule,
    Smoothing,
    States,
    Units,
    Values,
    constants_of,
    described,
    ends_in_onnx,
    names,
    states_of,
)
from statestep.consumers.terminal import err, out, told
from statestep.runtime import guard


@told
def convert(
    model: Annotated[Path, typer.Argument(help="An ONNX file: a network over sequences, or a step model.")],
    out_path: Annotated[Path, typer.Option("--out", help="The step model to write; its sequence form goes beside it.")],
    features: Annotated[str | None, typer.Option(help="What its columns are, separated by commas.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="The features that its output forecasts for the next row.")
    ] = None,
    prediction: Annotated[str | None, typer.Option(help="The output that forecasts, where there are several.")] = None,
    scaler: Annotated[
        Path | None,
        typer.Option(help='The scaler that it was trained behind, JSON: {"mean": {feature: value}, "std": {…}}.'),
    ] = None,
    output: Annotated[
        Literal["scaled", "raw"], typer.Option(help="With a scaler: whether it forecasts standardised values too.")
    ] = "scaled",
    layout: Annotated[
        Literal["BTF", "TBF", "BFT", "BT", "TB"] | None,
        typer.Option(help="The input's axes (batch, time, feature), where they cannot be told."),
    ] = None,
    state: States = None,
    constant: Values = None,
    weights: Annotated[
        Literal["fp32", "fp16"], typer.Option(help="fp16 stores weights in half the bytes, and computes in fp32.")
    ] = "fp32",
    data: Annotated[
        str | None,
        typer.Option(
            help="Readings that it was trained on: prove it by them, note their ranges and, where it forecasts, "
            "measure an anomaly detector on them."
        ),
    ] = None,
    key: Key = None,
    time: Annotated[str | None, typer.Option(help="The column that holds the time; tells the period.")] = None,
    period: Period = None,
    detector: Annotated[bool, typer.Option(help="Put an anomaly detector behind a forecast.")] = True,
    false_alarms: FalseAlarms = None,
    smoothing: Smoothing = 0.15,
    combine: Combine = "mean",
    rule: Rule = "plain",
    seed: Annotated[int, typer.Option(help="Seed of the random sequences.")] = 0,
    name: Annotated[str | None, typer.Option(help="The model's name; the file's by default.")] = None,
    model_version: Annotated[str, typer.Option(help="The model's version.")] = "1",
    unit: Units = None,
    author: Author = None,
    license: License = None,
    description: Description = None,
    debug: Debug = False,
) -> None:
    """Turn any ONNX network over sequences into a step model that is proven equal to it."""
    from statestep.export.convert import convert as make
    from statestep.export.convert import trial
    from statestep.export.describe import Described
    from statestep.export.scaler import read_scaler

    ends_in_onnx(out_path)
    states, constants = states_of(state), constants_of(constant)
    first_load.rehearse(guard.read(model), str(model), kind="graph")
    first_load.survived(lambda: trial(model, layout=layout, states=states, constants=constants), str(model))
    columns = names(features or "")
    for flag, value in (("--data", data), ("--scaler", scaler), ("--unit", unit)):
        if value and not columns:
            raise ConfigError(f"{flag} is read by the features' names: give them by --features")
    streams, told_period = None, None
    if data is not None:
        streams, told_period = tables.load_streams(data, columns, key=key, time=time)
    about = Described(
        name=name,
        model_version=model_version,
        features=tuple(columns) or None,
        targets=tuple(names(targets)) if targets else None,
        prediction=prediction,
        period_seconds=period or told_period,
        scaler=read_scaler(scaler, columns) if scaler else None,
        forecasts=output,
        judging=judging_of(false_alarms, period or told_period, smoothing, combine, rule) if detector else None,
        **described(columns, unit, author, license, description),
    )
    with err.status("converting and proving"):
        made = make(
            model,
            out_path,
            about,
            layout=layout,
            states=states,
            constants=constants,
            weights=weights,
            data=streams,
            seed=seed,
        )
    show.converted(made, out)
    written = [str(path) for path in (made.model, made.sequence) if path is not None]
    out.print(f"written: {', '.join(written)}", soft_wrap=True, highlight=False)
