"""What a message costs: CPU microseconds by stage, the engine alone and the whole service through memory adapters.

Every figure stands beside raw batched onnxruntime from the same run, since a ratio travels between machines and an
absolute time does not. Raw means: one session, inputs prepared, distinct streams, nothing gathered or kept.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from statestep.consumers.bench_model import lstm_step
from statestep.consumers.checkpoint import Progress
from statestep.consumers.codec import Decoder, Encoder, Fields
from statestep.consumers.memory import MemoryBroker
from statestep.consumers.pipeline import Pipeline
from statestep.consumers.ports import Record
from statestep.consumers.timed import keep_freed_memory
from statestep.runtime import Engine, StepModel

Array = np.ndarray[Any, Any]

SIZES = ((8, 64, 1), (25, 128, 2))  # features, hidden units, layers
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)
STREAMS = (2_000, 10_000, 100_000)
REPEATS = 15  # rounds, raw and engine in turn, so that a machine whose speed drifts slows both; medians count
ROUND_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class EngineRow:
    """The engine alone against raw onnxruntime."""

    model: str
    streams: int
    batch: int
    raw_us: float  # CPU µs a row
    engine_us: float  # CPU µs a row, commit included
    wall_us: float  # the same by the wall clock
    ratio: float  # how much of raw onnxruntime's rate the engine reaches: the median over pairs of rounds


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """One message's way through the memory adapters."""

    model: str
    batch: int
    stages: dict[str, float]  # CPU µs a message: decode, gather, infer, scatter, rest, encode
    messages_per_second: float  # by CPU time of one process


@dataclass(slots=True)
class Watch:
    """CPU seconds by label, around calls of an object's methods."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def around(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, counted under `label`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.process_time_ns()
            result = call(*args, **kwargs)
            self.seconds[label] += (time.process_time_ns() - began) / 1e9
            return result

        return timed


def engine_rows(
    sizes: Sequence[tuple[int, int, int]] = SIZES,
    batches: Sequence[int] = BATCHES,
    streams: Sequence[int] = STREAMS,
) -> Iterator[EngineRow]:
    """Measure the engine alone: every batch over the first number of streams, batch 1024 over the others."""
    keep_freed_memory()  # as the service does
    for features, hidden, layers in sizes:
        model = StepModel(lstm_step(features, hidden, layers))
        for count in streams:
            for batch in batches if count == streams[0] else [b for b in batches if b == 1024]:
                yield _engine_row(model, batch, max(batch, count))


def service_rows(
    sizes: Sequence[tuple[int, int, int]] = SIZES, batches: Sequence[int] = BATCHES, streams: int = STREAMS[0]
) -> Iterator[ServiceRow]:
    """Measure decode, advance and encode over JSON messages of distinct streams within a batch."""
    for features, hidden, layers in sizes:
        data = lstm_step(features, hidden, layers)
        for batch in batches:
            yield _service_row(StepModel(data), batch, max(batch, streams))


def _engine_row(model: StepModel, batch: int, streams: int) -> EngineRow:
    rng = np.random.default_rng(0)
    features = len(model.contract.features)
    engine = Engine(model, streams)
    keys = [b"pump-%d" % number for number in range(streams)]
    engine.advance(keys, rng.standard_normal((streams, features), np.float32))
    engine.commit()
    calls = [[keys[i] for i in rng.permutation(streams)[:batch]] for _ in range(16)]
    x = rng.standard_normal((batch, features), np.float32)  # [B, F]
    prepared = [engine.read(call).states for call in calls]  # what each call's streams remember, each [B, …]

    def raw() -> None:
        for states in prepared:
            model.step(x, states)

    def advance() -> None:
        for call in calls:
            engine.advance(call, x)
            engine.commit()

    rows = batch * len(calls)
    rounds = np.array([[*_timed(raw, rows), *_timed(advance, rows)] for _ in range(REPEATS)]) * 1e6  # [rounds, 4]
    raw_cpu, _, cpu, wall = np.median(rounds, axis=0).tolist()
    ratio = float(np.median(rounds[:, 0] / rounds[:, 2]))
    return EngineRow(model.contract.name, streams, batch, raw_cpu, cpu, wall, ratio)


def _service_row(model: StepModel, batch: int, streams: int) -> ServiceRow:
    watch = Watch()
    engine = Engine(model, streams)
    table = engine.table
    model.step = watch.around("infer", model.step)  # type: ignore[method-assign]
    table.gather = watch.around("gather", table.gather)  # type: ignore[method-assign]
    table.scatter = watch.around("scatter", table.scatter)  # type: ignore[method-assign]
    contract = model.contract
    pipeline = Pipeline(engine, Decoder(contract, Fields()), Encoder(contract, model.fingerprint, "sensors"))
    records = list(_records(model, batch, streams))
    decode, advance, encode = (
        watch.around(name, call)
        for name, call in (("decode", pipeline.decode), ("advance", pipeline.advance), ("encode", pipeline.encode))
    )
    progress = {0: Progress(sequence=0, next=0, position=0, redo=0, epoch=0)}
    best: tuple[float, dict[str, float]] = (np.inf, {})
    for _ in range(REPEATS):
        watch.seconds.clear()
        began, done = time.process_time(), 0
        while time.process_time() - began < ROUND_SECONDS:
            for call in records:
                encode(advance(call, decode(call), progress))
                engine.commit()
                done += len(call)
        total = (time.process_time() - began) / done
        best = min(
            best, (total, {name: value / done * 1e6 for name, value in watch.seconds.items()}), key=lambda b: b[0]
        )
    total, stages = best
    stages["rest"] = stages.pop("advance") - stages["gather"] - stages["infer"] - stages["scatter"]
    order = ("decode", "gather", "infer", "scatter", "rest", "encode")
    return ServiceRow(contract.name, batch, {name: stages[name] for name in order}, 1 / total)


def _records(model: StepModel, batch: int, streams: int) -> Iterator[list[Record]]:
    """Calls of distinct streams, about 150 bytes a message for 8 features."""
    rng = np.random.default_rng(1)
    broker = MemoryBroker(1)
    names = model.contract.feature_names
    for _ in range(max(1, 4096 // batch)):
        for stream in rng.permutation(streams)[:batch].tolist():
            values = ", ".join(
                f'"{name}": {value:.4f}' for name, value in zip(names, rng.normal(size=len(names)), strict=True)
            )
            broker.append(0, b"pump-%d" % stream, f'{{"ts": "2026-01-01T00:00:00Z", {values}}}'.encode())
    log = broker.log[0]
    yield from (log[i : i + batch] for i in range(0, len(log), batch))


def _timed(work: Callable[[], None], rows: int) -> tuple[float, float]:
    """(CPU, wall) seconds a row, over rounds that are long enough to be read off a clock."""
    rounds, cpu, wall = 0, time.process_time(), time.perf_counter()
    while time.process_time() - cpu < ROUND_SECONDS:
        work()
        rounds += 1
    return (time.process_time() - cpu) / rounds / rows, (time.perf_counter() - wall) / rounds / rows
