"""How the parts are joined for each way of running: behind Kafka, over a file, over anything an embedder brings."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector

from statestep.consumers import first_load, tables
from statestep.consumers.broker import KafkaSink, KafkaSource
from statestep.consumers.codec import MAX_DEAD_LETTER_BYTES, MAX_MESSAGE_BYTES, Decoder, Encoder, Fields
from statestep.consumers.config import SHA256, ConfigError, Settings
from statestep.consumers.files import FileSink, FileSource
from statestep.consumers.http import HttpServer
from statestep.consumers.kafka_client import prepare_topics
from statestep.consumers.metrics import Metrics
from statestep.consumers.pipeline import Batch, Pipeline, Policy
from statestep.consumers.ports import Sink, Source
from statestep.consumers.service import Limits, Service, Summary, TimedModel
from statestep.consumers.times import parse_time
from statestep.runtime import Engine, StepModel, guard

log = logging.getLogger("statestep")

STOP_SECONDS = 10.0  # from SIGTERM to the end, come what may
EXIT_RESTART = 75  # EX_TEMPFAIL: the deadline passed, start me again


def load_model(path: str | Path, *, sha256: str | None = None, **how: Any) -> StepModel:
    """Load a step model from a file that nobody has vouched for; `how` is what `StepModel` is given beside the bytes.

    Unless it is pinned by its `sha256`, in hex, it is loaded in a child process first. Raises `ModelError`, one
    sentence, where it is no step model, not the pinned one, or where the child did not survive it.
    """
    if sha256 is not None and not re.fullmatch(SHA256, sha256):
        raise ConfigError(f"--model-sha256 is {sha256!r}: it must be 64 hexadecimal digits")
    data = guard.read(path, sha256)
    if sha256 is None:
        first_load.rehearse(data, str(path), how)
    return StepModel(data, name=str(path), **how)


def build(
    model: StepModel,
    source: Source,
    sink: Sink,
    *,
    metrics: Metrics | None = None,
    fields: Fields | None = None,
    policy: Policy = "dead-letter",
    max_streams: int = 1_000_000,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    dead_letter_max_bytes: int = MAX_DEAD_LETTER_BYTES,
    limits: Limits | None = None,
    start: Callable[[int], int] | None = None,
    on_batch: Callable[[Batch], None] | None = None,
) -> Service:
    """A service over any source and sink, ready to `run`."""
    fields = fields or Fields()
    metrics = metrics or Metrics(CollectorRegistry(), source.topic, model.contract.name)
    metrics.model_info.info(
        {"model": model.contract.name, "version": model.contract.model_version, "sha256": model.fingerprint[:12]}
    )
    timed = TimedModel(model, lambda seconds: metrics.stages.observe([seconds], "infer"))
    pipeline = Pipeline(
        Engine(timed, max_streams),
        Decoder(model.contract, fields, max_message_bytes),
        Encoder(model.contract, model.fingerprint, source.topic),
        policy=policy,
        max_dead_letter_bytes=dead_letter_max_bytes,
    )
    return Service(
        source,
        sink,
        pipeline,
        metrics,
        model.fingerprint,
        start=start,
        limits=limits,
        policy=policy,
        on_batch=on_batch,
    )


def serve_kafka(settings: Settings, stop: threading.Event) -> Summary:
    """Run behind Kafka until `stop` is set. Raises what the parts raise; nothing uncommitted counts."""
    with ExitStack() as stack:
        return _serve_kafka(settings, stop, stack)


def _serve_kafka(settings: Settings, stop: threading.Event, stack: ExitStack) -> Summary:
    """What can fail without a broker comes first, and the port before the group: a second start harms nobody."""
    model = load_model(settings.model, sha256=settings.model_sha256, **settings.by_hand())
    fields = Fields(settings.time, settings.key)
    Decoder(model.contract, fields)  # tells of a clash of names
    properties = settings.kafka_properties()
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)  # CPU, memory and open files of this process
    metrics = Metrics(registry, settings.input, model.contract.name)
    server = HttpServer(registry, host=settings.http_host, port=settings.http_port)
    stack.callback(server.close)
    log.info("metrics and health at %s", server.url)
    partitions = prepare_topics(
        properties,
        settings.app_id,
        settings.input,
        [settings.output, settings.dead_letter_topic],
        create=settings.create_topics,
    )
    source = KafkaSource(settings.input, settings.app_id, properties, partitions[settings.input])
    stack.callback(source.close)
    sink = KafkaSink(settings.app_id, properties, settings.output, settings.dead_letter_topic, partitions)
    stack.callback(sink.close)
    service = build(
        model,
        source,
        sink,
        metrics=metrics,
        fields=fields,
        policy=settings.on_bad_message,
        max_streams=settings.max_streams,
        max_message_bytes=settings.max_message_bytes,
        dead_letter_max_bytes=settings.dead_letter_max_bytes,
        limits=Limits(settings.commit_interval_ms / 1000, settings.batch_records),
        start=lambda partition: _start_offset(settings.start, source, partition),
    )
    server.pages = service.pages()
    log.info("model %s, %s → %s, application %s", model.contract.name, settings.input, settings.output, settings.app_id)
    return service.run(stop.is_set)


def replay(
    model: StepModel,
    data: str,
    out: str,
    *,
    key: str | None = None,
    time: str = "ts",
    dead_letters: str | None = None,
    policy: Policy = "dead-letter",
    max_streams: int = 1_000_000,
    stopping: Callable[[], bool] = lambda: False,
    on_batch: Callable[[Batch], None] | None = None,
) -> Summary:
    """History through the same service, no broker. Raises `tables.FileError` for what a file cannot give."""
    fields = Fields(time, key)
    dead_letters = dead_letters or dead_letter_path(out)
    named = [key] if key else []
    tables.expect_columns(data, [*model.contract.feature_names, *named, *([time] if time != Fields().time else [])])
    _expect_apart(data, out, dead_letters)
    source = FileSource(data, text_columns=[time, *named])
    sink = FileSink(out, dead_letters)
    service = build(
        model,
        source,
        sink,
        fields=fields,
        policy=policy,
        max_streams=max_streams,
        limits=Limits(commit_interval_s=0.0),
        on_batch=on_batch,
    )
    try:
        return service.run(stopping)
    finally:
        source.close()
        sink.close()


def dead_letter_path(out: str) -> str:
    """Where a file's dead letters go: beside it.

    >>> dead_letter_path("predictions.jsonl")
    'predictions.dead-letters.jsonl'
    """
    return "dead-letters.jsonl" if out == "-" else str(Path(out).with_name(f"{tables.stem(out)}.dead-letters.jsonl"))


def _expect_apart(*paths: str) -> None:
    """Refuse to write over what is read, or two things into one file."""
    places = [Path(path).resolve() for path in paths if path != "-"]
    for place in places:
        if places.count(place) > 1:
            raise tables.FileError(
                f"{place}: would be written over; data, predictions and dead letters need a file each"
            )


def stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set; ten seconds later, or at the second signal, the process ends regardless.

    What was not committed by then is done again by the next start.
    """
    stop = threading.Event()

    def end() -> None:
        log.error("not done %g s after the signal; leaving, nothing uncommitted counts", STOP_SECONDS)
        os._exit(EXIT_RESTART)

    def on_signal(number: int, _frame: object) -> None:
        if stop.is_set():
            os._exit(EXIT_RESTART)
        stop.set()
        timer = threading.Timer(STOP_SECONDS - 0.5, end)
        timer.daemon = True
        timer.start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return stop


def _start_offset(start: str, source: KafkaSource, partition: int) -> int:
    """Where a new application begins in a partition."""
    low, high = source.bounds(partition)
    if start == "earliest":
        return low
    if start == "latest":
        return high
    time = parse_time(start)
    assert time is not None, start  # the settings were checked
    return source.offset_at(partition, time // 1_000_000)
