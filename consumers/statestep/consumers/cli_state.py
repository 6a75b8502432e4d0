"""The commands that look at durable states and move them: their flags, the printing."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Annotated, Any

import typer
from rich.markup import escape

from statestep.consumers import config, show_states, state_moves, states, wiring
from statestep.consumers.changelog import StateCodec, look
from statestep.consumers.config import ConfigError, Settings
from statestep.consumers.options import Debug, pair
from statestep.consumers.state_moves import Placing, Terms
from statestep.consumers.state_places import KafkaPlace, Place, StorePlace
from statestep.consumers.states import Held, PartitionRow, StreamRow
from statestep.consumers.store import sync_names
from statestep.consumers.tables import FileError
from statestep.consumers.terminal import err, log_to_stderr, out, told
from statestep.consumers.times import moment

NO_MODEL, NO_TOPIC = Path("no-model.onnx"), "statestep.no-output"  # what these commands have no use for

group = typer.Typer(
    name="state",
    help="Look at durable states and move them: of an application behind Kafka, or of replay --state-dir.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Config = Annotated[Path | None, typer.Option("--config", help="The TOML file of settings that `run` takes.")]
Servers = Annotated[str | None, typer.Option("--bootstrap-servers", help="Kafka brokers, host:port[,…].")]
Input = Annotated[str | None, typer.Option("--input", help="The topic that the application reads.")]
AppId = Annotated[str | None, typer.Option("--app-id", help="The application.")]
Properties = Annotated[Path | None, typer.Option("--client-properties", help="A file of Kafka client properties.")]
Kafka = Annotated[list[str] | None, typer.Option("--kafka", help="A Kafka client property, name=value; repeatable.")]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="The store of a replay, instead of Kafka.")]
Model = Annotated[Path | None, typer.Option("--model", help="The step model, which names the tensors.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Stream = Annotated[str, typer.Argument(help="The stream's name.")]


@group.command("ls")
@told
def list_states(
    config_file: Config = None,
    bootstrap_servers: Servers = None,
    input_topic: Input = None,
    app_id: AppId = None,
    client_properties: Properties = None,
    kafka: Kafka = None,
    state_dir: StateDir = None,
    partition: Annotated[int | None, typer.Option(min=0, help="Only this partition.")] = None,
    streams: Annotated[int, typer.Option(min=0, help="List so many streams too, the stalest first.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List partitions: their sequence, redo, next, and how far behind; and streams: their step, offset and age."""
    with _open(locals()) as (place, _):
        holds = _of(place.read(), partition)
        rows = [states.partition_row(held) for held in holds]
        listed = states.stalest(holds, streams, time.time_ns())
        if as_json:
            found = {"application": place.application, "input": place.input, "partitions": _plain(rows)}
            typer.echo(json.dumps(found | ({"streams": _plain(listed)} if streams else {})))
            return
        show_states.partitions(rows, out)
        if streams:
            out.print()
            show_states.streams(listed, out)


@group.command()
@told
def show(
    stream: Stream,
    config_file: Config = None,
    bootstrap_servers: Servers = None,
    input_topic: Input = None,
    app_id: AppId = None,
    client_properties: Properties = None,
    kafka: Kafka = None,
    state_dir: StateDir = None,
    model: Model = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what is durable of a stream, in each partition that has it; with --model its tensors too."""
    with _open(locals()) as (place, settings):
        codec, names, _ = _codec(model, settings)
        found = [_described(held, key, codec, names) for held, key in states.find(place.read().values(), stream)]
    if as_json:
        typer.echo(json.dumps(found))
        return
    for one in found:
        show_states.stream(one, out)
    if codec is None:
        err.print("--model names the model and shows the tensors", highlight=False)


@group.command()
@told
def export(
    out_path: Annotated[Path, typer.Option("--out", help="The file to write.")],
    stream: Annotated[str | None, typer.Argument(help="One stream; all by default.")] = None,
    config_file: Config = None,
    bootstrap_servers: Servers = None,
    input_topic: Input = None,
    app_id: AppId = None,
    client_properties: Properties = None,
    kafka: Kafka = None,
    state_dir: StateDir = None,
    debug: Debug = False,
) -> None:
    """Write one stream or all into a file, from which they go on elsewhere bit for bit. Stop the application before."""
    with _open(locals()) as (place, _):
        holds = list(place.read().values())
        exported = state_moves.export(place.application, place.input, place.identity(), holds, stream)
    partial = out_path.with_name(out_path.name + ".part")
    try:
        with partial.open("wb") as file:
            file.writelines(state_moves.written(exported))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(out_path)
        sync_names(out_path.resolve().parent)
    except OSError as error:
        raise FileError(f"{out_path}: cannot be written: {error.strerror}") from None
    n, header = exported.header.streams, exported.header
    err.print(f"{n:,} streams of {escape(header.application)}, model {header.model[:12]}", highlight=False)


@group.command("import")
@told
def import_states(
    file: Annotated[Path, typer.Argument(help="What `state export` wrote.")],
    config_file: Config = None,
    bootstrap_servers: Servers = None,
    input_topic: Input = None,
    app_id: AppId = None,
    client_properties: Properties = None,
    kafka: Kafka = None,
    state_dir: StateDir = None,
    data: Annotated[str | None, typer.Option(help="With a new --state-dir: the file that is read there.")] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="Where streams go: a number, or same as they were. By default as they were where the input is the "
            "same topic, else by murmur2 of the key, as producers choose."
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Where a new application begins: earliest, latest or a time. By default where the states left off if "
            "the input is the same topic, else earliest."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace streams that have a state there.")] = False,
    any_model: Annotated[bool, typer.Option("--any-model", help="Take another model's, if the tensors fit.")] = False,
    any_offset: Annotated[
        bool, typer.Option("--any-offset", help="Take states of another place in the topic.")
    ] = False,
    model: Annotated[Path | None, typer.Option(help="The target's step model.")] = None,
    debug: Debug = False,
) -> None:
    """Let streams go on in this application, which must not be running, as they would have where they come from."""
    try:
        with file.open("rb") as lines:
            exported = state_moves.read(lines, str(file))
    except OSError as error:
        raise FileError(f"{file}: cannot be read: {error.strerror}") from None
    placing = _placing(partition)
    with _open(locals(), writing=True) as (place, settings):
        codec, _, fingerprint = _codec(model, settings)
        layout = None if codec is None else codec.layout
        terms = Terms(placing, start, replace, any_model, any_offset, fingerprint, layout)
        writes = state_moves.plan(exported, place.read(), place.identity(), terms, place.start, token_hex(8))
        place.write(writes)
    for write in writes:
        err.print(
            f"partition {write.partition}: {len(write.states) - 1:,} streams, which go on at offset "
            f"{write.offset.offset}; transaction {write.offset.metadata}",
            highlight=False,
        )


@group.command()
@told
def reset(
    stream: Stream,
    config_file: Config = None,
    bootstrap_servers: Servers = None,
    input_topic: Input = None,
    app_id: AppId = None,
    client_properties: Properties = None,
    kafka: Kafka = None,
    key: Annotated[str | None, typer.Option(help="The field that names the stream, as `run` has it.")] = None,
    partition: Annotated[int | None, typer.Option(min=0, help="Only there, or where it has no state yet.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    debug: Debug = False,
) -> None:
    """End a stream by a tombstone on the input topic: after all messages sent so far it begins anew."""
    with _open(locals()) as (place, settings):
        assert settings is not None and isinstance(place, KafkaPlace)
        if settings.key is not None:
            raise ConfigError(
                f"streams are named by the field {settings.key!r}, and a tombstone has no value to hold one; stop the "
                "application and import an earlier state of the stream with --replace, or begin with a new --app-id"
            )
        name, partitions = _to_end(place, stream, partition)
        where = f"partition{'s' * (len(partitions) > 1)} {', '.join(map(str, partitions))} of {place.input}"
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError("--yes is missing: there is no terminal to ask at")
            typer.confirm(f"End the stream {stream} by a tombstone on {where}?", abort=True, err=True)
        place.end(name, partitions)
    err.print(f"sent a tombstone for {escape(stream)} to {escape(where)}", highlight=False)


def _to_end(place: KafkaPlace, stream: str, partition: int | None) -> tuple[bytes, list[int]]:
    """The key of a stream, and the partitions where it lives or is said to."""
    holds = place.read()
    if partition is not None and partition not in holds:
        raise ConfigError(f"--partition is {partition}: {place.input} has {len(holds)}, from 0 on")
    if partition is not None and not holds[partition].streams.keys() & {stream.encode("utf-8", "surrogatepass")}:
        return stream.encode("utf-8", "surrogatepass"), [partition]
    found = states.find(_of(holds, partition), stream)
    return found[0][1], [held.partition for held, key in found if key == found[0][1]]


@contextmanager
def _open(given: dict[str, Any], writing: bool = False) -> Iterator[tuple[Place, Settings | None]]:
    """The place that a command's flags name, and the settings where it is Kafka's."""
    log_to_stderr("warning")
    directory = given.get("state_dir")
    if directory is not None:
        if any(given[name] is not None for name in ("config_file", "bootstrap_servers", "input_topic", "app_id")):
            raise ConfigError("--state-dir is the store of a replay, so leave out what names an application of Kafka's")
        with closing(StorePlace(directory, writing=writing, data=given.get("data"))) as store:
            yield store, None
        return
    if given.get("data") is not None:
        raise ConfigError("--data goes with --state-dir")
    flags = {name: given.get(name) for name in ("bootstrap_servers", "app_id", "client_properties", "model", "key")}
    flags["input"] = given["input_topic"]
    if given["kafka"]:
        flags["kafka"] = dict(pair(item, "--kafka") for item in given["kafka"])
    settings = config.load(given["config_file"], flags, otherwise={"model": NO_MODEL, "output": NO_TOPIC})
    properties, chatter = settings.kafka_properties(), logging.getLogger("kafka")
    level = chatter.level
    chatter.setLevel(logging.CRITICAL)  # the client calls an error what it then tries again
    try:
        with closing(KafkaPlace(properties, settings.app_id, settings.input, writing=writing)) as application:
            yield application, settings
    finally:
        chatter.setLevel(level)


def _codec(model: Path | None, settings: Settings | None) -> tuple[StateCodec | None, list[str], str | None]:
    """What reads a model's tensors, their names and its fingerprint, if a model was named."""
    path = model if settings is None else settings.model
    if path is None or path == NO_MODEL:
        return None, [], None
    how = {} if settings is None else {"sha256": settings.model_sha256, **settings.by_hand()}
    loaded = wiring.load_model(path, **how)
    return StateCodec(loaded.contract), [state.input for state in loaded.contract.states], loaded.fingerprint


def _placing(given: str | None) -> Placing:
    if given is None or given == "same":
        return given  # type: ignore[return-value]  # mypy does not narrow a string to a literal
    if not given.isdecimal():
        raise ConfigError(f"--partition is {given!r}: it must be a number, or same")
    return int(given)


def _of(holds: dict[int, Held], partition: int | None) -> list[Held]:
    if partition is not None and partition not in holds:
        raise ConfigError(f"--partition is {partition}: there are {len(holds)}, from 0 on")
    return list(holds.values()) if partition is None else [holds[partition]]


def _plain(rows: Sequence[PartitionRow | StreamRow]) -> list[dict[str, Any]]:
    return [row._asdict() for row in rows]


def _described(held: Held, key: bytes, codec: StateCodec | None, names: Sequence[str]) -> dict[str, Any]:
    """A stream in one partition, as JSON has it."""
    assert held.marker is not None
    record, seen = held.streams[key], held.marker
    head = look(record)
    when = moment(head.time)
    found: dict[str, Any] = {
        **states.stream_row(record, time.time_ns())._asdict(),
        "ts": None if when is None else when.isoformat(),
        "epoch": head.epoch,
        "model": seen.model,
        "redo": seen.redo,
        "next": seen.next,
        "current": seen.redo == seen.next or head.offset >= seen.next - 1,
    }
    if codec is not None:
        if codec.layout != head.layout:
            raise ConfigError(f"--model is of other tensors than the states of model {seen.model[:12]}")
        tensors = zip(names, codec.decode([record]).records.states, strict=True)
        found["tensors"] = {
            name: {"dtype": str(rows.dtype), "shape": list(rows.shape[1:]), "values": rows[0].tolist()}
            for name, rows in tensors
        }
    return found
