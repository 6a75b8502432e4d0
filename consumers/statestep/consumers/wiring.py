"""How the parts are joined for each way of running: behind Kafka, over a file, over anything an embedder brings."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from secrets import token_hex
from time import monotonic, sleep
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector

from statestep.consumers import first_load, tables
from statestep.consumers.batch import Batch
from statestep.consumers.checkpoint import Policies
from statestep.consumers.codec import MAX_DEAD_LETTER_BYTES, MAX_MESSAGE_BYTES, Decoder, Encoder, Fields
from statestep.consumers.config import SHA256, SPANS, ConfigError, Settings, span
from statestep.consumers.files import FileSink, FileSource
from statestep.consumers.http import HttpServer
from statestep.consumers.kafka_changelog import KafkaChangelog
from statestep.consumers.kafka_sink import KafkaSink
from statestep.consumers.kafka_source import KafkaSource
from statestep.consumers.kafka_topics import prepare_topics
from statestep.consumers.memory import MemoryBroker, MemoryChangelog
from statestep.consumers.metrics import Metrics
from statestep.consumers.pages import LIVE_S
from statestep.consumers.pipeline import Pipeline, Policy
from statestep.consumers.ports import Changelog, Sink, Source
from statestep.consumers.report import Summary
from statestep.consumers.semantics import semantics
from statestep.consumers.service import Service
from statestep.consumers.store import Store, StoreError
from statestep.consumers.store_changelog import StoreChangelog
from statestep.consumers.timed import TimedModel
from statestep.consumers.times import parse_time
from statestep.consumers.transaction import Limits
from statestep.runtime import Engine, Silence, StepModel, guard, silence_of
from statestep.runtime.silence import GAP_PERIODS

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
    changelog: Changelog,
    *,
    metrics: Metrics | None = None,
    fields: Fields | None = None,
    policy: Policy = "dead-letter",
    events: bool = False,
    silence: Silence | None = None,
    max_streams: int = 1_000_000,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
    dead_letter_max_bytes: int = MAX_DEAD_LETTER_BYTES,
    limits: Limits | None = None,
    policies: Policies | None = None,
    start: Callable[[int], int] | None = None,
    store: Store | None = None,
    by_hand: Mapping[str, Any] | None = None,
    on_batch: Callable[[Batch], None] | None = None,
    clock: Callable[[], float] = monotonic,
) -> Service:
    """A service over any source, sink and changelog, ready to `run`.

    `store` is a local copy of the changelog, `by_hand` what was said of the model beside its file. With `events` the
    sink is given their beginnings and ends, too. `silence` says what is done where a stream was silent.
    """
    fields = fields or Fields()
    metrics = metrics or Metrics(CollectorRegistry(), source.topic, model.contract.name)
    metrics.expect(model.contract)
    metrics.model_info.info(
        {"model": model.contract.name, "version": model.contract.model_version, "sha256": model.fingerprint[:12]}
    )
    metrics.partitions.set(source.partitions)
    timed = TimedModel(model, lambda seconds: metrics.stages.observe([seconds], "infer"))
    pipeline = Pipeline(
        Engine(timed, max_streams, silence),
        Decoder(model.contract, fields, max_message_bytes),
        Encoder(model.contract, model.fingerprint, source.topic),
        policy=policy,
        max_dead_letter_bytes=dead_letter_max_bytes,
        events=events,
    )
    limits = limits or Limits()
    if limits.snapshot_interval_s and sink.keeps_states and not model.batch_invariant:
        log.warning("%s: a row's result depends on its batch, so every state is written at once", model.contract.name)
        limits = replace(limits, snapshot_interval_s=0.0)
    if events and model.contract.output("event") is None:
        log.warning("%s: the model tells of no events, so none will be sent", model.contract.name)
    quiet = None if silence is None else asdict(silence)
    affecting = {"fields": asdict(fields), "max_message_bytes": max_message_bytes, "model": by_hand, "silence": quiet}
    return Service(
        source,
        sink,
        changelog,
        pipeline,
        metrics,
        model=model.fingerprint,
        writer=token_hex(8),
        semantics=semantics(model.fingerprint, affecting),
        policies=policies,
        start=start,
        limits=limits,
        policy=policy,
        store=store,
        on_batch=on_batch,
        clock=clock,
    )


def silence_for(model: StepModel, on_gap: str, expire_after: str | None) -> Silence | None:
    """What the model and two settings say of silence. Raises `ConfigError`."""
    expire_s = span("--expire-after", expire_after, SPANS)
    period_s = model.contract.period_seconds
    if expire_s is not None and period_s is not None and expire_s <= GAP_PERIODS * period_s:
        raise ConfigError(
            f"--expire-after is {expire_after}, and {model.contract.name} has a timestep every {period_s:g} s, so that "
            "each message would begin a new stream: allow for more than a gap"
        )
    try:
        return silence_of(model.contract, on_gap=on_gap, expire_s=expire_s)
    except ValueError as error:
        raise ConfigError(f"--on-gap is {on_gap}: {error}") from None


def serve_kafka(settings: Settings, stop: threading.Event) -> Summary:
    """Run behind Kafka until `stop` is set. Raises what the parts raise; nothing uncommitted counts."""
    with ExitStack() as stack:
        return _serve_kafka(settings, stop, stack)


def _serve_kafka(settings: Settings, stop: threading.Event, stack: ExitStack) -> Summary:
    """What can fail without a broker comes first, and the port before the group: a second start harms nobody."""
    model = load_model(settings.model, sha256=settings.model_sha256, **settings.by_hand())
    fields = Fields(settings.time, settings.key)
    Decoder(model.contract, fields)  # tells of a clash of names
    silence = silence_for(model, settings.on_gap, settings.expire_after)
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
        [settings.output, settings.dead_letter_topic, *([settings.events] if settings.events else [])],
        create=settings.create_topics,
    )
    source, sink, changelog = _kafka(settings, properties, partitions)
    for part in (source, sink, changelog):
        stack.callback(part.close)
    store = None if settings.state_dir is None else _local_store(settings, metrics)
    if store is not None:
        stack.callback(store.close)
    service = build(
        model,
        source,
        sink,
        changelog,
        store=store,
        by_hand=settings.by_hand(),
        metrics=metrics,
        fields=fields,
        policy=settings.on_bad_message,
        events=settings.events is not None,
        silence=silence,
        max_streams=settings.max_streams,
        max_message_bytes=settings.max_message_bytes,
        dead_letter_max_bytes=settings.dead_letter_max_bytes,
        limits=Limits(
            commit_interval_s=settings.commit_interval_ms / 1000,
            batch_records=settings.batch_records,
            batch_bytes=settings.batch_bytes,
            snapshot_interval_s=settings.snapshot_interval_ms / 1000,
            snapshot_bytes=settings.snapshot_bytes,
        ),
        policies=Policies(settings.on_offset_mismatch, settings.on_model_change, settings.on_semantics_change),
        start=lambda partition: _start_offset(settings.start, source, partition),
    )
    server.pages = service.pager.pages()
    restart_when_stuck(service.pager.silent_s)
    log.info("model %s, %s → %s, application %s", model.contract.name, settings.input, settings.output, settings.app_id)
    return service.run(stop.is_set)


def _kafka(
    settings: Settings, properties: dict[str, Any], partitions: dict[str, int]
) -> tuple[Source, Sink, Changelog]:
    """The adapters of the client that was chosen."""
    member: dict[str, Any] = {"instance_id": settings.instance_id, "session_timeout_ms": settings.session_timeout_ms}
    writer: dict[str, Any] = {
        "events": settings.events,
        "instance_id": settings.instance_id,
        "guarantee": settings.guarantee,
        "transaction_timeout_ms": settings.transaction_timeout_ms,
    }
    topics = (settings.output, settings.dead_letter_topic, partitions)
    if settings.client == "librdkafka":
        from statestep.consumers import librdkafka  # an extra

        return (
            librdkafka.LibrdkafkaSource(
                settings.input, settings.app_id, properties, partitions[settings.input], **member
            ),
            librdkafka.LibrdkafkaSink(settings.input, settings.app_id, properties, *topics, **writer),
            librdkafka.LibrdkafkaChangelog(settings.app_id, properties),
        )
    return (
        KafkaSource(settings.input, settings.app_id, properties, partitions[settings.input], **member),
        KafkaSink(settings.input, settings.app_id, properties, *topics, **writer),
        KafkaChangelog(settings.app_id, properties),
    )


def _local_store(settings: Settings, metrics: Metrics) -> Store | None:
    """The local copy of the changelog: made anew where it cannot be trusted, done without where it cannot be made."""
    assert settings.state_dir is not None
    identity = f"{settings.app_id} {settings.input}"
    for attempt in range(2):
        try:
            return Store.open(settings.state_dir, identity)
        except StoreError as error:
            log.warning("the local store %s is %s: %s", settings.state_dir, ("dropped", "not used")[attempt], error)
            metrics.store_failures.inc()
            if attempt == 0:
                Store.discard(settings.state_dir)
    return None


def replay(
    model: StepModel,
    data: str,
    out: str,
    *,
    key: str | None = None,
    time: str = "ts",
    dead_letters: str | None = None,
    events: str | None = None,
    on_gap: str = "measured",
    expire_after: str | None = None,
    policy: Policy = "dead-letter",
    max_streams: int = 1_000_000,
    state_dir: Path | None = None,
    policies: Policies | None = None,
    by_hand: Mapping[str, Any] | None = None,
    stopping: Callable[[], bool] = lambda: False,
    on_batch: Callable[[Batch], None] | None = None,
) -> Summary:
    """History through the same service, no broker. Raises `tables.FileError` for what a file cannot give.

    With a `state_dir` states, position and outputs count together: a run that ends early is gone on with by the next.
    """
    fields = Fields(time, key)
    dead_letters = dead_letters or dead_letter_path(out)
    named = [key] if key else []
    tables.expect_columns(data, [*model.contract.feature_names, *named, *([time] if time != Fields().time else [])])
    _expect_apart(data, out, dead_letters, *([events] if events else []))
    silence = silence_for(model, on_gap, expire_after)
    with ExitStack() as stack:
        store = None
        changelog: Changelog = MemoryChangelog(MemoryBroker(1))  # nothing is kept
        if state_dir is not None:
            store = Store.open(state_dir, "replay", durable=True)
            stack.callback(store.close)
            changelog = StoreChangelog(store)
        source = FileSource(data, text_columns=[time, *named], store=store)
        stack.callback(source.close)
        sink = FileSink(out, dead_letters, store, events)
        stack.callback(sink.close)
        service = build(
            model,
            source,
            sink,
            changelog,
            fields=fields,
            policy=policy,
            events=events is not None,
            silence=silence,
            max_streams=max_streams,
            limits=Limits(commit_interval_s=0.0 if store is None else 0.5),
            policies=policies,
            by_hand=by_hand,
            on_batch=on_batch,
        )
        return service.run(stopping)


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
                f"{place}: would be written over; data, predictions, dead letters and events need a file each"
            )


def restart_when_stuck(silent_s: Callable[[], float], limit_s: float = LIVE_S) -> None:
    """End the process with 75, in a thread of its own, once its loop was silent for too long.

    Some calls of kafka-python wait without an end for their I/O thread. What was not committed is done again.
    """

    def watch() -> None:
        while silent_s() < limit_s:
            sleep(min(limit_s, 1.0))
        log.error("the loop has not come round for %g s: a client call is stuck; leaving, to be started again", limit_s)
        os._exit(EXIT_RESTART)

    threading.Thread(target=watch, name="watchdog", daemon=True).start()


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


def _start_offset(start: str, source: Source, partition: int) -> int:
    """Where a new application begins in a partition."""
    low, high = source.bounds(partition)
    if start == "earliest":
        return low
    if start == "latest":
        return high
    time = parse_time(start)
    assert time is not None, start  # the settings were checked
    return source.offset_at(partition, time // 1_000_000)
