"""Streams past `max_streams` wait in the local store and come back bit for bit; a store that fails costs nothing."""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from statestep.consumers.changelog import STREAM, StateCodec
from statestep.consumers.memory import MemoryBroker, MemorySink, MemorySource
from statestep.consumers.metrics import Metrics
from statestep.consumers.pipeline import split_key
from statestep.consumers.service import Service
from statestep.consumers.store import Store, StoreError
from statestep.consumers.transaction import Limits
from statestep.runtime import CLEAN, CapacityError

from .runs import MODEL, Clock, Crash, Crashing, answers, expect_rebuilt, service

ROOM = 8
LIMITS = Limits(0.0, 50, snapshot_interval_s=0.2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.open(tmp_path / "store", "test")
    yield made
    made.close()


def crowd(count: int = 200, streams: int = 20, seed: int = 3) -> MemoryBroker:
    """Many streams over two partitions, which come in turn and at random; some end."""
    rng, broker = np.random.default_rng(seed), MemoryBroker(2)
    for number in range(count):
        flow, pressure = rng.normal(0, 2, 2)
        value: bytes | None = json.dumps({"flow": flow, "pressure": pressure, "ts": 60 * number}).encode()
        if number % 23 == 7:
            value = None
        broker.append(int(rng.integers(2)), b"k%d" % rng.integers(streams), value)
    return broker


def expect_as_with_room(broker: MemoryBroker) -> None:
    """The messages of a run that had room for all of its streams."""
    roomy = MemoryBroker(2)
    for log in broker.log:
        for record in log:
            roomy.append(record.partition, record.key, record.value)
    service(roomy).run()
    found, expected = answers(broker.messages), answers(roomy.messages)
    assert len(found) == len(dict(found)), "an answer is doubled"
    assert dict(found) == dict(expected)
    expect_rebuilt(broker)


def watched(run: Service) -> list[bytes]:
    """What leaves memory from here on: only clean streams, of which the store has the very bits."""
    engine, spill, left = run._engine, run._spill, list[bytes]()
    drop = engine.drop
    codec = StateCodec(MODEL.contract)

    def watch(keys: Sequence[bytes]) -> None:
        leaving = list(keys)
        assert (engine.first_dirty(leaving) == CLEAN).all()
        assert spill.store is not None
        for stream in leaving:
            partition, key = split_key(stream)
            [record] = codec.encode(partition, [key], engine.read([stream]), run._partitions.running[partition].epoch)
            assert spill.store.fetch(partition, [STREAM + key]) == {record.key: record.value}
        left.extend(leaving)
        drop(leaving)

    evict = spill._evict

    def watching(count: int, needed: Container[bytes]) -> None:
        engine.drop = watch  # type: ignore[method-assign]
        try:
            evict(count, needed)
        finally:
            engine.drop = drop  # type: ignore[method-assign]

    spill._evict = watching  # type: ignore[method-assign]
    return left


@pytest.mark.parametrize("batch", [1, 5, 50])
@pytest.mark.parametrize("interval_s", [0.0, 0.2, 3600.0])
def test_more_streams_than_there_is_room_for(store: Store, batch: int, interval_s: float) -> None:
    """They leave and come back with equal bits, whatever the pace; dirty ones never leave; memory is bounded."""
    broker, registry = crowd(), CollectorRegistry()
    limits = Limits(0.0, batch, snapshot_interval_s=interval_s)
    run = service(
        broker, limits=limits, store=store, max_streams=ROOM, metrics=Metrics(registry, "memory"), clock=Clock()
    )
    left = watched(run)
    run.run()
    assert len(left) > 20
    assert len(run._engine) <= ROOM
    assert (registry.get_sample_value("statestep_spilled_streams") or 0) > 0
    expect_as_with_room(broker)


def test_without_a_store_there_is_no_room(store: Store) -> None:
    """The same records then stop the service, and the store lets it go on where it stopped."""
    broker = crowd()
    with pytest.raises(CapacityError, match="max_streams is 8"):
        service(broker, max_streams=ROOM, limits=LIMITS).run()
    service(broker, max_streams=ROOM, limits=LIMITS, store=store).run()
    expect_as_with_room(broker)


def test_a_restart_leaves_what_has_no_room_in_the_store(store: Store) -> None:
    """At most half of the table is filled at once; the next record of any stream finds its state all the same."""
    broker = crowd()
    service(broker, store=store, max_streams=ROOM, limits=LIMITS).run()
    more = crowd(260)
    for log, known in zip(more.log, broker.log, strict=True):
        for record in log[len(known) :]:
            broker.append(record.partition, record.key, record.value)
    run = service(broker, store=store, max_streams=ROOM, limits=LIMITS)
    run.run()
    assert run.summary.replayed == 0
    expect_as_with_room(broker)


def test_a_store_that_is_behind_reads_on(store: Store) -> None:
    """Another member had the partitions meanwhile: only what it wrote is read, from where the store left off."""
    broker = crowd(100)
    service(broker, store=store, max_streams=ROOM, limits=LIMITS).run()
    position = store.position(0)
    assert position == len(broker.changelog[0])
    more = crowd(200)
    for log, known in zip(more.log, broker.log, strict=True):
        for record in log[len(known) :]:
            broker.append(record.partition, record.key, record.value)
    service(broker).run()
    assert store.position(0) == position
    service(broker, store=store, max_streams=ROOM, limits=LIMITS).run()
    assert store.position(0) == len(broker.changelog[0])
    expect_as_with_room(broker)


def test_a_transaction_of_which_only_the_news_was_lost_is_in_the_store(store: Store) -> None:
    """What it wrote can leave memory like all else, though nobody said where the changelog stands after it."""
    broker = crowd()
    sink = MemorySink(broker)
    for number in range(60):
        sink.fail_next(counts=number % 2 == 0)
    run = service(broker, sink=sink, store=store, max_streams=ROOM, limits=Limits(0.0, 5, snapshot_interval_s=0.2))
    left = watched(run)
    run.run()
    assert left
    expect_as_with_room(broker)


def test_a_store_that_is_ahead_of_a_crash_is_read_on(store: Store) -> None:
    """Killed before and after commits: the store holds what is committed and nothing else."""
    broker = crowd()
    for at in range(3, 30, 3):
        crashing = Crashing(broker, "commit", at, at % 2 == 0)
        try:
            service(broker, crashing, crashing, store=store, max_streams=ROOM, limits=LIMITS).run()
        except Crash:
            continue
    service(broker, store=store, max_streams=ROOM, limits=LIMITS).run()
    expect_as_with_room(broker)


@pytest.mark.parametrize("at", [1, 2, 5, 12])
@pytest.mark.parametrize("method", ["apply", "fetch", "load", "forget", "count"])
def test_a_store_that_fails_is_given_up(store: Store, method: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it was asked: the states that only it had come from the changelog, and no bit differs.

    Where there is no room without it, the service stops, and what is durable is whole.
    """
    broker, registry = crowd(), CollectorRegistry()
    service(broker, MemorySource(broker, [0]), limits=LIMITS).run()
    left, real = [at], getattr(store, method)

    def failing(*args: Any) -> Any:
        left[0] -= 1
        if left[0] <= 0:
            raise StoreError("the disk is full", "full")
        return real(*args)

    monkeypatch.setattr(store, method, failing)
    run = service(broker, store=store, max_streams=ROOM, limits=LIMITS, metrics=Metrics(registry))
    try:
        run.run()
    except CapacityError:
        expect_rebuilt(broker)
        service(broker).run()
    failed = left[0] <= 0
    assert registry.get_sample_value("statestep_store_failures_total") == failed
    assert (run._spill.store is None) == failed
    expect_as_with_room(broker)


def test_nothing_is_applied_between_the_loss_of_the_store_and_the_restore(store: Store) -> None:
    """A stream that only the store had must not begin anew, not even in the very round in which the store is lost."""
    broker = crowd()
    run = service(broker, store=store, max_streams=ROOM, limits=Limits(0.0, 5, snapshot_interval_s=0.0))
    for _ in range(12):
        run._round(False)
    assert run._spill._waiting.total() > 0
    step, lost = run._restorer.step, [False]

    def fail(now_s: float) -> Any:
        if not lost[0]:
            lost[0] = True
            raise StoreError("the disk is full", "full")
        return step(now_s)

    run._restorer.step = fail  # type: ignore[method-assign]
    count = len(broker.messages)
    run._round(False)
    assert lost[0] and len(broker.messages) == count
    run._engine.table.capacity = 100  # without a store all must have room
    run.run()
    expect_as_with_room(broker)
