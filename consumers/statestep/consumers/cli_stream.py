"""The commands that run streams through a step model: their flags, the joining of parts, the printing."""

from __future__ import annotations

import logging
import time as clock
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from statestep.consumers import config, show, wiring
from statestep.consumers.checkpoint import ModelChange, OffsetMismatch, Policies, SemanticsChange
from statestep.consumers.config import ConfigError
from statestep.consumers.options import (
    Columns,
    Data,
    Debug,
    ExpireAfter,
    Key,
    Model,
    ModelSha256,
    OnGap,
    States,
    Time,
    Values,
    by_hand,
    constants_of,
    pair,
)
from statestep.consumers.pipeline import Policy
from statestep.consumers.tables import FileError
from statestep.consumers.terminal import counting, err, log_to_stderr, out, told


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
    events: Annotated[
        str | None, typer.Option(help="The beginning and the end of every event: .jsonl, or - for standard output.")
    ] = None,
    on_gap: OnGap = "measured",
    expire_after: ExpireAfter = None,
    on_bad_message: Annotated[Policy, typer.Option(help="What happens to a refused record.")] = "dead-letter",
    max_streams: Annotated[int, typer.Option(min=1, help="Streams remembered at most.")] = 1_000_000,
    state_dir: Annotated[
        Path | None, typer.Option(help="Keep states here, so that a run that ends early can be gone on with.")
    ] = None,
    on_model_change: Annotated[ModelChange, typer.Option(help="Another model over kept states.")] = "reject",
    on_semantics_change: Annotated[SemanticsChange, typer.Option(help="Another setting over them.")] = "reject",
    on_offset_mismatch: Annotated[OffsetMismatch, typer.Option(help="A file that does not go with them.")] = "stop",
    state: States = None,
    constant: Values = None,
    features: Columns = None,
    model_sha256: ModelSha256 = None,
    debug: Debug = False,
) -> None:
    """Run history through the same service that runs behind Kafka, without a broker."""
    log_to_stderr("warning")
    stop = wiring.stop_on_signals()
    known = by_hand(state, constant, features)
    loaded = wiring.load_model(model, sha256=model_sha256, **known)  # before the progress bar's thread: it may fork
    began = clock.monotonic()
    with counting() as progress:
        task = progress.add_task("replaying", total=None)
        done = wiring.replay(
            loaded,
            data,
            out_path,
            key=key,
            time=time,
            dead_letters=dead_letters,
            events=events,
            on_gap=on_gap,
            expire_after=expire_after,
            policy=on_bad_message,
            max_streams=max_streams,
            state_dir=state_dir,
            policies=Policies(on_offset_mismatch, on_model_change, on_semantics_change),
            by_hand=known,
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


@told
def run(
    config_file: Annotated[Path | None, typer.Option("--config", help="A TOML file of settings.")] = None,
    model: Annotated[Path | None, typer.Option(help="The step model.")] = None,
    model_sha256: ModelSha256 = None,
    state: States = None,
    constant: Values = None,
    features: Columns = None,
    bootstrap_servers: Annotated[str | None, typer.Option(help="Kafka brokers, host:port[,…].")] = None,
    input_topic: Annotated[str | None, typer.Option("--input", help="The topic to read.")] = None,
    output: Annotated[str | None, typer.Option(help="The topic for predictions.")] = None,
    app_id: Annotated[str | None, typer.Option(help="Names group, client and own topics.")] = None,
    dead_letters: Annotated[str | None, typer.Option(help="Dead letter topic; <app-id>-dlq by default.")] = None,
    events: Annotated[str | None, typer.Option(help="A topic for the beginning and the end of every event.")] = None,
    start: Annotated[str | None, typer.Option(help="Where a new app id begins: earliest, latest or a time.")] = None,
    create_topics: Annotated[bool | None, typer.Option(help="Create the topics written to where missing.")] = None,
    key: Annotated[str | None, typer.Option(help="The field that names the stream; else the record's key.")] = None,
    time: Annotated[str | None, typer.Option(help="The field that holds the time; ts by default.")] = None,
    on_gap: Annotated[
        str | None, typer.Option(help="Where a stream was silent: measured (the model's plan), hold, bridge or reset.")
    ] = None,
    expire_after: ExpireAfter = None,
    on_bad_message: Annotated[str | None, typer.Option(help="dead-letter, skip or fail.")] = None,
    guarantee: Annotated[str | None, typer.Option(help="exactly-once or at-least-once.")] = None,
    client: Annotated[str | None, typer.Option(help="kafka-python, or librdkafka, an extra.")] = None,
    instance_id: Annotated[
        str | None, typer.Option(help="A lasting name of this process: a restart under it takes over at once.")
    ] = None,
    max_streams: Annotated[int | None, typer.Option(help="Streams in memory at most.")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="A local copy of the states, for quick restarts and more streams than memory.")
    ] = None,
    batch_records: Annotated[int | None, typer.Option(help="Records committed together at most.")] = None,
    batch_bytes: Annotated[int | None, typer.Option(help="Bytes of these records at most.")] = None,
    commit_interval_ms: Annotated[int | None, typer.Option(help="How long a record waits for others.")] = None,
    snapshot_interval_ms: Annotated[
        int | None, typer.Option(help="How old a state may grow before it is written; 0 writes each at once.")
    ] = None,
    snapshot_bytes: Annotated[int | None, typer.Option(help="Bytes of states in one transaction at most.")] = None,
    session_timeout_ms: Annotated[
        int | None, typer.Option(help="Silence after which the group drops this process.")
    ] = None,
    transaction_timeout_ms: Annotated[
        int | None, typer.Option(help="Silence after which the broker aborts a transaction.")
    ] = None,
    on_model_change: Annotated[str | None, typer.Option(help="Another model over old states: reject or cold.")] = None,
    on_semantics_change: Annotated[
        str | None, typer.Option(help="Other settings or releases over a replay: reject, replay or cold.")
    ] = None,
    on_offset_mismatch: Annotated[
        str | None, typer.Option(help="A group's offset that does not go with the states: stop, marker, cold or skip.")
    ] = None,
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
        flags["kafka"] = dict(pair(item, "--kafka") for item in kafka)
    if state:
        flags["states"] = dict(pair(item, "--state") for item in state)
    flags["constants"] = constants_of(constant)
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
        writer = fleet_producer.open_topic({"bootstrap_servers": bootstrap_servers.split(",")}, topic)
        try:
            count = fleet_producer.produce_fleet(
                writer.write, seed=seed, pumps=pumps, days=days, speed=speed, stopping=stop.is_set
            )
        finally:
            writer.close()
    err.print(f"{count:,} readings")


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
