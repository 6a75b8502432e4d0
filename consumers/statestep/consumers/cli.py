"""The command line: each command's flags, the joining of parts, the printing, and faults turned into exit codes.

Exit codes: 0 done, 2 usage or configuration, 3 bad model or failed proof, 4 data refused, 5 broker, 75 restart me.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time as clock
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from statestep.consumers import config, show, tables, wiring
from statestep.consumers.config import ConfigError
from statestep.consumers.pipeline import Policy
from statestep.consumers.tables import FileError
from statestep.consumers.terminal import counting, err, log_to_stderr, out, told, training
from statestep.runtime import StepModel

app = typer.Typer(
    name="statestep",
    help="Trained recurrent networks as ONNX step models behind Kafka: one message, one timestep, state kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # as markup, [default: …] in a help text would vanish
)
Model = Annotated[Path, typer.Option(help="The step model, an .onnx file.")]
Data = Annotated[str, typer.Option(help="Readings: a .csv, .jsonl or .parquet file, or - for JSONL on standard input.")]
Key = Annotated[str | None, typer.Option(help="The column that names the stream. Without it the file is one stream.")]
Time = Annotated[str, typer.Option(help="The column that holds the time: ISO 8601, or a number since 1970.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something goes wrong.")]


def main() -> None:
    """Run the command line."""
    app()


@app.command()
@told
def fit(
    data: Annotated[str, typer.Argument(help="Readings: a .csv, .jsonl or .parquet file, .gz too.")],
    out_path: Annotated[Path, typer.Option("--out", help="The step model to write; other files go beside it.")],
    features: Annotated[str, typer.Option(help="Columns to read, separated by commas.")],
    targets: Annotated[str | None, typer.Option(help="Columns to forecast; all features by default.")] = None,
    key: Key = None,
    time: Annotated[str | None, typer.Option(help="The column that holds the time; tells the period.")] = None,
    cell: Annotated[Literal["lstm", "gru", "rnn"], typer.Option(help="The recurrent cell.")] = "lstm",
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of a layer.")] = 64,
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 1,
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
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    name: Annotated[str | None, typer.Option(help="The model's name; the file's by default.")] = None,
    model_version: Annotated[str, typer.Option(help="The model's version.")] = "1",
    debug: Debug = False,
) -> None:
    """Train a forecaster with its anomaly score, and write it as a step model that is proven."""
    _need_export("fit")
    from statestep.export import export_step
    from statestep.export.fit import fit as train
    from statestep.export.plots import plot_forecast, plot_loss

    _ends_in_onnx(out_path)
    columns = _names(features)
    streams, period = tables.load_streams(data, columns, key=key, time=time)
    with training(epochs) as on_epoch:
        fitted = train(
            streams,
            columns,
            targets=_names(targets) if targets else None,
            cell=cell,
            hidden=hidden,
            layers=layers,
            dropout=dropout,
            scale=scale,
            epochs=epochs,
            learning_rate=learning_rate,
            patience=patience,
            validation=validation,
            seed=seed,
            on_epoch=on_epoch,
        )
    with err.status("writing and proving"):
        exported = export_step(
            fitted.model,
            out_path,
            name=name,
            model_version=model_version,
            ranges=fitted.ranges,
            period_seconds=period,
            trained_on=f"{Path(data).name}: {fitted.rows_training:,} rows of {len(streams):,} streams",
        )
        errors = fitted.errors
        plots = out_path.with_suffix(".loss.png"), out_path.with_suffix(".forecast.png")
        plot_loss(plots[0], fitted.history, best_epoch=fitted.best_epoch, last_value_rmse=errors.last_value_rmse)
        plot_forecast(plots[1], fitted.example)
    show.fitted(fitted, out)
    show.report(exported.report, out)
    written = [exported.model, exported.sequence, *([exported.weights] if exported.weights else []), *plots]
    out.print(f"written: {', '.join(str(path) for path in written)}", soft_wrap=True, highlight=False)


@app.command()
@told
def export(
    factory: Annotated[str, typer.Argument(help="The module, or what makes it: pkg.mod:name.")],
    weights: Annotated[Path, typer.Option(help="Its trained weights, a state_dict saved by torch.")],
    out_path: Annotated[Path, typer.Option("--out", help="The step model to write; its sequence form goes beside it.")],
    features: Annotated[str, typer.Option(help="What the columns of its input are, separated by commas.")],
    targets: Annotated[str | None, typer.Option(help="What it forecasts; all features by default.")] = None,
    scaler: Annotated[Path | None, typer.Option(help='JSON: {"mean": {feature: value}, "std": {…}}.')] = None,
    output: Annotated[
        Literal["scaled", "raw"], typer.Option(help="Whether it forecasts standardised values or the sensor's own.")
    ] = "scaled",
    batch_first: Annotated[bool | None, typer.Option(help="Input as [B, T, F]; told from its layers.")] = None,
    data: Annotated[str | None, typer.Option(help="Readings that calibrate the anomaly score.")] = None,
    key: Key = None,
    time: Annotated[str | None, typer.Option(help="The column that holds the time; tells the period.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name; the file's by default.")] = None,
    model_version: Annotated[str, typer.Option(help="The model's version.")] = "1",
    debug: Debug = False,
) -> None:
    """Turn a trained torch module of your own into a step model that is proven equal to it."""
    _need_export("export")
    from statestep.export import export_step, load_module, load_weights, read_scaler
    from statestep.export.lift import lift

    _ends_in_onnx(out_path)
    columns = _names(features)
    streams, period = tables.load_streams(data, columns, key=key, time=time) if data else (None, None)
    module = load_module(factory)
    load_weights(module, weights)
    with err.status("writing and proving"):
        lifted = lift(
            module,
            features=columns,
            targets=_names(targets) if targets else None,
            batch_first=batch_first,
            scaler=read_scaler(scaler, columns) if scaler else None,
            output=output,
            data=streams,
        )
        exported = export_step(
            lifted.model,
            out_path,
            name=name,
            model_version=model_version,
            ranges=lifted.ranges,
            period_seconds=period,
        )
    if lifted.errors is not None:
        show.errors(lifted.errors, out)
    show.report(exported.report, out)
    out.print(f"written: {exported.model}, {exported.sequence}", soft_wrap=True, highlight=False)


@app.command()
@told
def inspect(
    model: Annotated[Path, typer.Argument(help="The step model.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the contract as JSON, for programs.")] = False,
    debug: Debug = False,
) -> None:
    """Print a step model's contract: its features, states and outputs."""
    found = StepModel.load(model)
    if as_json:
        typer.echo(
            json.dumps(json.loads(found.contract.to_json()) | {"sha256": found.fingerprint, "opset": found.opset})
        )
    else:
        show.contract(found, out)


@app.command()
@told
def verify(
    model: Annotated[Path, typer.Argument(help="The step model.")],
    data: Annotated[str | None, typer.Option(help="Readings to step over, beside drawn ones.")] = None,
    key: Key = None,
    window: Annotated[int | None, typer.Option(min=1, help="Also compare with predictions from windows of N.")] = None,
    sequence: Annotated[bool, typer.Option(help="Compare with the sequence file beside the model.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the drawn sequences.")] = 0,
    debug: Debug = False,
) -> None:
    """Prove on this machine that stepping equals the whole sequence and that batches do not matter."""
    from statestep.export.verify import verify as prove

    streams = None
    if data is not None:
        features = StepModel.load(model).contract.feature_names
        streams, _ = tables.load_streams(data, features, key=key)
    with err.status("stepping"):
        report = prove(model, streams, window=window, sequence=sequence, seed=seed)
    show.report(report, out)
    if not report.passed:
        raise typer.Exit(3)


@app.command()
@told
def replay(
    model: Model,
    data: Data,
    out_path: Annotated[
        str, typer.Option("--out", help="Predictions: .jsonl, .csv, .parquet, or - for standard output.")
    ],
    key: Key = None,
    time: Time = "ts",
    dead_letters: Annotated[str | None, typer.Option(help="Refused records; beside the output by default.")] = None,
    on_bad_message: Annotated[Policy, typer.Option(help="What happens to a refused record.")] = "dead-letter",
    max_streams: Annotated[int, typer.Option(min=1, help="Streams remembered at most.")] = 1_000_000,
    debug: Debug = False,
) -> None:
    """Run history through the same service that runs behind Kafka, without a broker."""
    log_to_stderr("warning")
    stop = wiring.stop_on_signals()
    began = clock.monotonic()
    with counting() as progress:
        task = progress.add_task("replaying", total=None)
        done = wiring.replay(
            StepModel.load(model),
            data,
            out_path,
            key=key,
            time=time,
            dead_letters=dead_letters,
            policy=on_bad_message,
            max_streams=max_streams,
            stopping=stop.is_set,
            on_batch=lambda batch: progress.advance(task, sum(batch.tally.consumed.values())),
        )
    show.summary(done, clock.monotonic() - began, err)
    if done.refused and on_bad_message == "dead-letter":
        err.print(f"they are in {escape(dead_letters or wiring.dead_letter_path(out_path))}", soft_wrap=True)
    if stop.is_set() and data != "-":  # a pipe has no other end than a signal
        err.print("[yellow]interrupted:[/yellow] what was read by then is predicted, the rest is not")
        raise typer.Exit(130)
    if done.refused and not done.predicted:
        raise FileError(f"{data}: not one of {done.consumed:,} records could be applied")


@app.command()
@told
def run(
    config_file: Annotated[Path | None, typer.Option("--config", help="A TOML file of settings.")] = None,
    model: Annotated[Path | None, typer.Option(help="The step model.")] = None,
    bootstrap_servers: Annotated[str | None, typer.Option(help="Kafka brokers, host:port[,…].")] = None,
    input_topic: Annotated[str | None, typer.Option("--input", help="The topic to read.")] = None,
    output: Annotated[str | None, typer.Option(help="The topic for predictions.")] = None,
    app_id: Annotated[str | None, typer.Option(help="Names group, client and own topics.")] = None,
    dead_letters: Annotated[str | None, typer.Option(help="Dead letter topic; <app-id>-dlq by default.")] = None,
    start: Annotated[str | None, typer.Option(help="Where a new app id begins: earliest, latest or a time.")] = None,
    create_topics: Annotated[bool | None, typer.Option(help="Create output topics where missing.")] = None,
    key: Annotated[str | None, typer.Option(help="The field that names the stream; else the record's key.")] = None,
    time: Annotated[str | None, typer.Option(help="The field that holds the time; ts by default.")] = None,
    on_bad_message: Annotated[str | None, typer.Option(help="dead-letter, skip or fail.")] = None,
    max_streams: Annotated[int | None, typer.Option(help="Streams remembered at most.")] = None,
    batch_records: Annotated[int | None, typer.Option(help="Records committed together at most.")] = None,
    commit_interval_ms: Annotated[int | None, typer.Option(help="How long a record waits for others.")] = None,
    max_message_bytes: Annotated[int | None, typer.Option(help="A larger value is a dead letter.")] = None,
    dead_letter_max_bytes: Annotated[int | None, typer.Option(help="A dead letter's value is cut to this.")] = None,
    http_host: Annotated[str | None, typer.Option(help="Where metrics and health are served.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Their port; 0 takes a free one.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    client_properties: Annotated[Path | None, typer.Option(help="A file of Kafka client properties.")] = None,
    kafka: Annotated[list[str] | None, typer.Option(help="A Kafka client property, name=value; repeatable.")] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the settings and end.")] = False,
    debug: Debug = False,
) -> None:
    """Run behind Kafka: every message advances its stream by one timestep and comes out as a prediction."""
    given = dict(locals())
    flags = {name: given[name] for name in config.Settings.model_fields if name in given and name != "kafka"}
    flags["input"] = input_topic
    if kafka:
        flags["kafka"] = dict(_pair(item) for item in kafka)
    settings = config.load(config_file, flags)
    if print_config:
        typer.echo(config.describe(settings))
        return
    log_to_stderr(settings.log_level)
    stop = wiring.stop_on_signals()
    done = wiring.serve_kafka(settings, stop)
    logging.getLogger("statestep").info(
        "stopped: %d records, %d predictions, %d refused", done.consumed, done.predicted, done.refused
    )


@app.command()
@told
def demo(
    pumps: Annotated[int, typer.Option(min=1, help="How many pumps.")] = 48,
    days: Annotated[float, typer.Option(min=0.01, help="Simulated days.")] = 5.0,
    speed: Annotated[float, typer.Option(min=0, help="Simulated seconds a second; 0 is as fast as it goes.")] = 21_600,
    seed: Annotated[int | None, typer.Option(help="Seed of the fleet; random by default.")] = None,
    http_port: Annotated[int | None, typer.Option(help="Port of the metrics; 9464 or a free one by default.")] = None,
    debug: Debug = False,
) -> None:
    """Watch a simulated fleet of pumps go wrong: no broker, no torch, no data needed."""
    from statestep.consumers.demo import run_demo

    run_demo(pumps=pumps, days=days, speed=speed, seed=seed, http_port=http_port, console=out)


@app.command()
@told
def fleet(
    topic: Annotated[str | None, typer.Option(help="The topic to send to; made where it is missing.")] = None,
    bootstrap_servers: Annotated[str, typer.Option(help="Kafka brokers, host:port[,…].")] = "localhost:9092",
    out_path: Annotated[Path | None, typer.Option("--out", help="A CSV file to write instead.")] = None,
    pumps: Annotated[int, typer.Option(min=1, help="How many pumps.")] = 48,
    days: Annotated[float | None, typer.Option(min=0.01, help="Simulated days; to a topic without end.")] = None,
    speed: Annotated[float, typer.Option(min=0, help="Simulated seconds a second; 0 is as fast as it goes.")] = 300,
    seed: Annotated[int, typer.Option(help="Seed of the fleet.")] = 0,
    debug: Debug = False,
) -> None:
    """Simulate a fleet of pumps, with faults: its readings into a topic, or into a CSV file."""
    from statestep.consumers import fleet_producer

    if (topic is None) == (out_path is None):
        raise ConfigError("a fleet goes to --topic or to --out, give one of them")
    stop = wiring.stop_on_signals()
    if out_path is not None:
        count = fleet_producer.write_fleet(out_path, seed=seed, pumps=pumps, days=days or 5.0)
    else:
        assert topic is not None
        sink = fleet_producer.open_topic({"bootstrap_servers": bootstrap_servers.split(",")}, topic)
        try:
            count = fleet_producer.produce_fleet(
                sink, seed=seed, pumps=pumps, days=days, speed=speed, stopping=stop.is_set
            )
        finally:
            sink.close()
    err.print(f"{count:,} readings")


@app.command()
@told
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Only 8→64×1 at batch 64 and 1024.")] = False,
    debug: Debug = False,
) -> None:
    """Measure CPU microseconds a message by stage, and the engine against raw onnxruntime."""
    from statestep.consumers import bench as measure

    chosen: dict[str, Any] = {"sizes": measure.SIZES[:1], "batches": (64, 1024)} if quick else {}
    streams = measure.STREAMS[:1] if quick else measure.STREAMS
    with err.status("measuring the engine"):
        engine = list(measure.engine_rows(**chosen, streams=streams))
    show.engine_table(engine, out)
    out.print()
    with err.status("measuring the service"):
        service = list(measure.service_rows(**chosen))
    show.service_table(service, out)


def _need_export(command: str) -> None:
    """`fit` and `export` need torch, which the base package does not bring."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"statestep {command} needs torch: pip install 'statestep[export]'")


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


def _pair(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(f"--kafka is {item!r}: it must be name=value")
    return name, value


def _ends_in_onnx(path: Path) -> None:
    """Told before an hour of training, not after it."""
    if path.suffix != ".onnx":
        raise ConfigError(f"--out is {str(path)!r}: its name must end in .onnx")
