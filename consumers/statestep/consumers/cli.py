"""The command line: each command's flags, the joining of parts, the printing, and faults turned into exit codes.

Exit codes: 0 done, 2 usage or configuration, 3 bad model or failed proof, 4 data refused, 5 broker, 75 restart me.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import sys
import time as clock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from statestep.consumers import config, files, show, wiring
from statestep.consumers.config import ConfigError
from statestep.consumers.files import FileError
from statestep.consumers.http import PortInUse
from statestep.consumers.pipeline import BadMessage
from statestep.consumers.ports import BrokerError
from statestep.runtime import CapacityError, ModelError, StepModel

app = typer.Typer(
    name="statestep",
    help="Trained recurrent networks as ONNX step models behind Kafka: one message, one timestep, state kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # as markup, [default: …] in a help text would vanish
)
out = Console()
err = Console(stderr=True)

EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 2),
    (PortInUse, 2),
    (CapacityError, 2),
    (ModelError, 3),
    (FileError, 4),
    (BadMessage, 4),
    (BrokerError, 5),
)

Model = Annotated[Path, typer.Option(help="The step model, an .onnx file.")]
Data = Annotated[str, typer.Option(help="Readings: a .csv, .jsonl or .parquet file, or - for JSONL on standard input.")]
Key = Annotated[str | None, typer.Option(help="The column that names the stream. Without it the file is one stream.")]
Time = Annotated[str, typer.Option(help="The column that holds the time: ISO 8601, or a number since 1970.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something goes wrong.")]


def main() -> None:
    """Run the command line."""
    app()


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the faults that a person can mend into one sentence and an exit code; `--debug` shows the rest."""

    @functools.wraps(command)
    def told(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            code = _exit_code(error)
            if code is None or kwargs.get("debug"):
                raise
            err.print(f"[red]error:[/red] {_escaped(error)}", highlight=False, soft_wrap=True)
            raise typer.Exit(code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return told


@app.command()
@_told
def fit(
    data: Annotated[str, typer.Argument(help="Readings: a .csv, .jsonl or .parquet file, .gz too.")],
    out_path: Annotated[Path, typer.Option("--out", help="The step model to write; other files go beside it.")],
    features: Annotated[str, typer.Option(help="Columns to read, separated by commas.")],
    targets: Annotated[str | None, typer.Option(help="Columns to forecast; all features by default.")] = None,
    key: Key = None,
    time: Annotated[str | None, typer.Option(help="The column that holds the time; tells the period.")] = None,
    cell: Annotated[str, typer.Option(help="lstm, gru or rnn.")] = "lstm",
    hidden: Annotated[int, typer.Option(help="Hidden units of a layer.")] = 64,
    layers: Annotated[int, typer.Option(help="Layers.")] = 1,
    dropout: Annotated[float, typer.Option(help="Dropout between layers.")] = 0.0,
    scale: Annotated[str, typer.Option(help="pooled, or per-stream where streams differ in level.")] = "pooled",
    epochs: Annotated[int, typer.Option(help="Epochs at most.")] = 40,
    learning_rate: Annotated[float, typer.Option(help="Step size of Adam.")] = 5e-3,
    patience: Annotated[int, typer.Option(help="Epochs without a better one before training ends.")] = 8,
    validation: Annotated[float, typer.Option(help="Share of each stream's rows kept for validation.")] = 0.2,
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

    columns = _names(features)
    streams, period = files.load_streams(data, columns, key=key, time=time)
    with _training(epochs) as on_epoch:
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
@_told
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
@_told
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
        streams, _ = files.load_streams(data, features, key=key)
    with err.status("stepping"):
        report = prove(model, streams, window=window, sequence=sequence, seed=seed)
    show.report(report, out)
    if not report.passed:
        raise typer.Exit(3)


@app.command()
@_told
def replay(
    model: Model,
    data: Data,
    out_path: Annotated[
        str, typer.Option("--out", help="Predictions: .jsonl, .csv, .parquet, or - for standard output.")
    ],
    key: Key = None,
    time: Time = "ts",
    dead_letters: Annotated[str | None, typer.Option(help="Refused records; beside the output by default.")] = None,
    on_bad_message: Annotated[str, typer.Option(help="dead-letter, skip or fail.")] = "dead-letter",
    max_streams: Annotated[int, typer.Option(min=1, help="Streams remembered at most.")] = 1_000_000,
    debug: Debug = False,
) -> None:
    """Run history through the same service that runs behind Kafka, without a broker."""
    if on_bad_message not in ("dead-letter", "skip", "fail"):
        raise ConfigError(f"--on-bad-message is {on_bad_message!r}: it must be dead-letter, skip or fail")
    _log_to_stderr("warning")
    stop = wiring.stop_on_signals()
    began = clock.monotonic()
    with _counting("replaying") as progress:
        task = progress.add_task("replaying", total=None)
        done = wiring.replay(
            StepModel.load(model),
            data,
            out_path,
            key=key,
            time=time,
            dead_letters=dead_letters,
            policy=on_bad_message,  # type: ignore[arg-type]  # checked above
            max_streams=max_streams,
            stopping=stop.is_set,
            on_batch=lambda batch: progress.advance(task, sum(batch.tally.consumed.values())),
        )
    show.summary(done, clock.monotonic() - began, err)
    if done.refused and on_bad_message == "dead-letter":
        err.print(f"they are in {dead_letters or wiring.dead_letter_path(out_path)}")
    if done.refused and not done.predicted:
        raise FileError(f"{data}: not one of {done.consumed:,} records could be applied")


@app.command()
@_told
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
    _log_to_stderr(settings.log_level)
    stop = wiring.stop_on_signals()
    done = wiring.serve_kafka(settings, stop)
    logging.getLogger("statestep").info(
        "stopped: %d records, %d predictions, %d refused", done.consumed, done.predicted, done.refused
    )


@app.command()
@_told
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
@_told
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


def _exit_code(error: Exception) -> int | None:
    """The exit code of a fault that a person can mend, None for one of ours."""
    for kind, code in EXIT_CODES:
        if isinstance(error, kind):
            return code
    if type(error).__module__.startswith("statestep.export."):
        return {"ExportError": 3, "DataError": 4}.get(type(error).__name__)
    return 2 if isinstance(error, ValueError) and type(error) is ValueError else None


def _need_export(command: str) -> None:
    """`fit` and `export` need torch, which the base package does not bring."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigError(f"statestep {command} needs torch: pip install 'statestep[export]'")


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",") if name.strip()]


@contextmanager
def _training(epochs: int) -> Iterator[Callable[[Any], None]]:
    """A progress bar that follows `fit`'s epochs."""
    with Progress(
        TextColumn("epoch {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"), console=err
    ) as progress:
        task = progress.add_task("training", total=epochs)

        def on_epoch(epoch: Any) -> None:
            found = f"validation RMSE {epoch.validation_rmse:.4f}, best {epoch.best_rmse:.4f}, {epoch.seconds:.0f} s"
            progress.update(task, completed=epoch.number, description=found)

        yield on_epoch


def _escaped(error: Exception) -> str:
    return str(error).replace("[", r"\[")


def _pair(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(f"--kafka is {item!r}: it must be name=value")
    return name, value


def _counting(what: str) -> Progress:
    return Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}"),
        console=err, transient=True,
    )  # fmt: skip


def _log_to_stderr(level: str) -> None:
    """One line an event. kafka-python's own chatter is shown from warnings on."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=err, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("statestep").setLevel(level.upper())
