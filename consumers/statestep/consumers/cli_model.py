"""The commands that make step models and look at them: their flags, the joining of parts, the printing."""

from __future__ import annotations

import importlib.util
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from statestep.consumers import first_load, show, tables, wiring
from statestep.consumers.config import ConfigError, span
from statestep.consumers.options import (
    Author,
    Cell,
    Columns,
    Combine,
    Debug,
    Description,
    FalseAlarms,
    Key,
    License,
    ModelSha256,
    ModuleStates,
    Period,
    Rule,
    Smoothing,
    States,
    Units,
    Values,
    by_hand,
    described,
    ends_in_onnx,
    module_states_of,
    names,
)
from statestep.consumers.terminal import err, out, told, training
from statestep.runtime import guard

if TYPE_CHECKING:
    from statestep.export.calibrate import Judging


@told
def fit(
    data: Annotated[str, typer.Argument(help="Readings: a .csv, .jsonl or .parquet file, .gz too.")],
    out_path: Annotated[Path, typer.Option("--out", help="The step model to write; other files go beside it.")],
    features: Annotated[str, typer.Option(help="Columns to read, separated by commas.")],
    targets: Annotated[str | None, typer.Option(help="Columns to forecast; all features by default.")] = None,
    key: Key = None,
    time: Annotated[str | None, typer.Option(help="The column that holds the time; tells the period.")] = None,
    cell: Cell = "lstm",
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of a layer.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers, where --cell is one name.")] = 1,
    projection: Annotated[
        int | None, typer.Option(min=1, help="What an lstm-projected layer puts out; half its hidden units by default.")
    ] = None,
    dropout: Annotated[float, typer.Option(min=0, max=0.9, help="Dropout between layers.")] = 0.0,
    scale: Annotated[
        Literal["pooled", "per-stream"], typer.Option(help="per-stream where streams differ in level and spread.")
    ] = "pooled",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs at most.")] = 40,
    learning_rate: Annotated[float, typer.Option(min=1e-9, help="Step size of Adam.")] = 5e-3,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better one before training ends.")] = 8,
    validation: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Share of each stream's rows kept for validation.")
    ] = 0.2,
    false_alarms: FalseAlarms = None,
    smoothing: Smoothing = 0.15,
    combine: Combine = "mean",
    rule: Rule = "plain",
    budget: Annotated[
        str | None,
        typer.Option(help="Search for the network and rule that find synthetic faults best, for so long: 5m, 1h."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    name: Annotated[str | None, typer.Option(help="The model's name; the file's by default.")] = None,
    model_version: Annotated[str, typer.Option(help="The model's version.")] = "1",
    unit: Units = None,
    period: Period = None,
    author: Author = None,
    license: License = None,
    description: Description = None,
    debug: Debug = False,
) -> None:
    """Train a forecaster with its anomaly score, and write it as a step model that is proven."""
    need_export("fit")
    from statestep.export import export_step
    from statestep.export.choose import choose
    from statestep.export.fit import fit as train
    from statestep.export.plots import plot_forecast, plot_loss
    from statestep.export.words import counted

    ends_in_onnx(out_path)
    known_cells(cell, layers)
    seconds = span("--budget", budget, "90s, 5m or 1h")
    columns = names(features)
    about = described(columns, unit, author, license, description)
    streams, told_period = tables.load_streams(data, columns, key=key, time=time)
    settings: dict[str, Any] = {
        "judging": judging_of(false_alarms, period or told_period, smoothing, combine, rule),
        "targets": names(targets) if targets else None,
        "cell": cell,
        "hidden": hidden,
        "layers": layers,
        "dropout": dropout,
        "projection": projection,
        "scale": scale,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "patience": patience,
        "validation": validation,
        "seed": seed,
    }
    with training(epochs) as on_epoch:
        if seconds is None:
            fitted = train(streams, columns, **settings, on_epoch=on_epoch)
        else:
            tell = partial(show.choice, console=err)
            fitted = choose(streams, columns, seconds=seconds, **settings, on_epoch=on_epoch, on_choice=tell).fitted
    with err.status("writing and proving"):
        exported = export_step(
            fitted.model,
            out_path,
            fitted.detector,
            name=name,
            model_version=model_version,
            ranges=fitted.ranges,
            period_seconds=period or told_period,
            trained_on=f"{Path(data).name}: {fitted.rows_training:,} rows of {counted(len(streams), 'stream')}",
            data=streams,
            **about,
        )
        errors = fitted.errors
        plots = out_path.with_suffix(".loss.png"), out_path.with_suffix(".forecast.png")
        plot_loss(plots[0], fitted.history, best_epoch=fitted.best_epoch, last_value_rmse=errors.last_value_rmse)
        plot_forecast(plots[1], fitted.example)
    show.fitted(fitted, out)
    show.report(exported.report, out)
    written = [exported.model, exported.sequence, *([exported.weights] if exported.weights else []), *plots]
    out.print(f"written: {', '.join(str(path) for path in written)}", soft_wrap=True, highlight=False)


@told
def export(
    factory: Annotated[str, typer.Argument(help="The module, or what makes it: pkg.mod:name.")],
    weights: Annotated[Path, typer.Option(help="Its trained weights: .safetensors, or a state_dict by torch.save.")],
    out_path: Annotated[Path, typer.Option("--out", help="The step model to write; its sequence form goes beside it.")],
    features: Annotated[str, typer.Option(help="What the columns of its input are, separated by commas.")],
    targets: Annotated[str | None, typer.Option(help="What it forecasts; all features by default.")] = None,
    scaler: Annotated[Path | None, typer.Option(help='JSON: {"mean": {feature: value}, "std": {…}}.')] = None,
    output: Annotated[
        Literal["scaled", "raw"], typer.Option(help="Whether it forecasts standardised values or the sensor's own.")
    ] = "scaled",
    batch_first: Annotated[bool | None, typer.Option(help="Input as [B, T, F]; told from its layers.")] = None,
    state: ModuleStates = None,
    data: Annotated[str | None, typer.Option(help="Readings on which an anomaly detector is measured.")] = None,
    key: Key = None,
    time: Annotated[str | None, typer.Option(help="The column that holds the time; tells the period.")] = None,
    false_alarms: FalseAlarms = None,
    smoothing: Smoothing = 0.15,
    combine: Combine = "mean",
    rule: Rule = "plain",
    name: Annotated[str | None, typer.Option(help="The model's name; the file's by default.")] = None,
    model_version: Annotated[str, typer.Option(help="The model's version.")] = "1",
    unit: Units = None,
    period: Period = None,
    author: Author = None,
    license: License = None,
    description: Description = None,
    debug: Debug = False,
) -> None:
    """Turn a trained torch module of your own into a step model that is proven equal to it."""
    need_export("export")
    from statestep.export import export_step, load_module, load_weights, read_scaler
    from statestep.export.lift import lift

    ends_in_onnx(out_path)
    columns = names(features)
    states = module_states_of(state)
    about = described(columns, unit, author, license, description)
    streams, told_period = tables.load_streams(data, columns, key=key, time=time) if data else (None, None)
    judging = judging_of(false_alarms, period or told_period, smoothing, combine, rule)
    module = load_module(factory)
    load_weights(module, weights)
    with err.status("writing and proving"):
        lifted = lift(
            module,
            features=columns,
            targets=names(targets) if targets else None,
            states=states,
            batch_first=batch_first,
            scaler=read_scaler(scaler, columns) if scaler else None,
            output=output,
            data=streams,
            judging=judging,
        )
        exported = export_step(
            lifted.model,
            out_path,
            lifted.detector,
            name=name,
            model_version=model_version,
            ranges=lifted.ranges,
            period_seconds=period or told_period,
            data=streams,
            **about,
        )
    if lifted.errors is not None:
        show.errors(lifted.errors, out)
    show.report(exported.report, out)
    out.print(f"written: {exported.model}, {exported.sequence}", soft_wrap=True, highlight=False)


@told
def inspect(
    model: Annotated[Path, typer.Argument(help="The step model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the contract as JSON, for programs.")] = False,
    state: States = None,
    constant: Values = None,
    features: Columns = None,
    model_sha256: ModelSha256 = None,
    debug: Debug = False,
) -> None:
    """Print a step model's contract: its features, states and outputs, and how soon it forgets."""
    from statestep.export.horizon import in_words

    found = wiring.load_model(model, sha256=model_sha256, **by_hand(state, constant, features))
    if as_json:
        typer.echo(
            json.dumps(json.loads(found.contract.to_json()) | {"sha256": found.fingerprint, "opset": found.opset})
        )
    else:
        show.contract(found, out, forgets=in_words(found.contract.memory) if found.contract.memory else None)


@told
def verify(
    model: Annotated[Path, typer.Argument(help="The step model.")],
    data: Annotated[str | None, typer.Option(help="Readings to step over, beside drawn ones.")] = None,
    key: Key = None,
    window: Annotated[int | None, typer.Option(min=1, help="Also compare with predictions from windows of N.")] = None,
    sequence: Annotated[bool, typer.Option(help="Compare with the sequence file beside the model.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the drawn sequences.")] = 0,
    state: States = None,
    constant: Values = None,
    features: Columns = None,
    model_sha256: ModelSha256 = None,
    debug: Debug = False,
) -> None:
    """Prove on this machine that stepping equals the whole sequence and that batches do not matter."""
    from statestep.export.against import sequence_path
    from statestep.export.verify import verify as prove

    loaded = wiring.load_model(model, sha256=model_sha256, **by_hand(state, constant, features))
    if sequence and sequence_path(model).exists():
        reference = sequence_path(model)
        first_load.rehearse(guard.read(reference), str(reference), kind="graph")
    streams = None
    if data is not None:
        streams, _ = tables.load_streams(data, loaded.contract.feature_names, key=key)
    with err.status("stepping"):
        report = prove(model, streams, window=window, sequence=sequence, seed=seed, loaded=loaded)
    show.report(report, out)
    if not report.passed:
        raise typer.Exit(3)


def judging_of(false_alarms: str | None, period: float | None, smoothing: float, combine: str, rule: str) -> Judging:
    """How a detector is to judge; what cannot be is told before training.

    >>> judging_of("1/day", 300.0, 0.1, "mean", "plain").budget.every
    288
    """
    from statestep.export.budget import DEFAULT, QUANTILE, budget_of
    from statestep.export.calibrate import Judging
    from statestep.export.errors import ExportError

    otherwise = str(QUANTILE) if period is None else DEFAULT
    try:
        budget = budget_of(false_alarms or otherwise, period)
    except ExportError as error:
        raise ConfigError(f"--false-alarms: {error}") from None
    return Judging(alpha=smoothing, combine=combine, rule=rule, budget=budget)


def need_export(command: str) -> None:
    """`fit` and `export` need torch, which the base package does not bring."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"statestep {command} needs torch: pip install 'statestep[export]'")


def known_cells(cell: str, layers: int) -> None:
    """An unknown cell is told before any data is read."""
    from statestep.export.errors import ExportError
    from statestep.export.forecaster import kinds_of

    try:
        kinds_of(cell, layers)
    except ExportError as error:
        raise ConfigError(f"--{error}") from None
