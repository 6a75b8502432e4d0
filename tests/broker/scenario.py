"""Goal: each message advances its stream by one timestep, whoever owns its partition and however that changes.

Method: real readings go to a real broker, streams interleaved at random. Two `statestep run` processes share them;
on the way a third joins, one leaves by SIGTERM and one by `kill -9`. Then, for each stream, the predictions on the
output topic are held against one onnxruntime call over its whole sequence, bit for bit, and against torch.

`python -m tests.broker.scenario BROKER asd|nab FOLDER` plays it with the whole of the data in FOLDER.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from kafka import KafkaAdminClient, KafkaProducer

from statestep.consumers.tables import columns, load_streams
from statestep.export import (
    Forecaster,
    ForecasterConfig,
    Judging,
    PooledScaling,
    StreamModel,
    export_step,
    load,
)
from statestep.export.calibrate import calibrated
from statestep.export.detector import Forecasts
from statestep.export.forecasts import past_of
from statestep.export.series import blocks_of, series_of
from statestep.export.weights import reference_of
from statestep.runtime import session_options

from .service_process import ServiceProcess, TopicReader

Array = np.ndarray[Any, Any]
TORCH_TOLERANCE = 1e-5  # in standard deviations of the feature


@dataclass(frozen=True, slots=True)
class Result:
    """What was seen."""

    messages: int
    doubles: int
    streams: int
    torch_difference: float  # the largest, in standard deviations
    seconds: float
    sigterm_seconds: float


def make_model(streams: Mapping[str, Array], features: tuple[str, ...], folder: Path, hidden: int = 64) -> Path:
    """A forecaster with drawn weights and a detector, both scaled to the data: training would change no claim here."""
    rows = np.concatenate(list(streams.values()))  # [rows, F]
    mean, std = rows.mean(axis=0), np.maximum(rows.std(axis=0), 1e-3)
    network = Forecaster(
        ForecasterConfig(features=len(features), targets=tuple(range(len(features))), hidden=hidden), seed=5
    )
    with torch.no_grad():
        network.gain.fill_(1.0)
    scaling = PooledScaling(torch.tensor(mean), torch.tensor(std))
    model = StreamModel(network, scaling, features=features)
    ranges = {
        name: (float(low), float(high)) for name, low, high in zip(features, rows.min(0), rows.max(0), strict=True)
    }
    known = Forecasts(features=features, targets=network.targets, mean=mean)
    pasts = [past_of(model, block) for block in blocks_of(series_of(streams, features, validation=0.2)[0])]
    detector = calibrated(pasts, known, Judging(rule="likelihood"))
    return export_step(model, folder / "model.onnx", detector, ranges=ranges).model


def play(
    bootstrap_servers: str,
    streams: Mapping[str, Array],
    features: tuple[str, ...],
    folder: Path,
    name: str,
    *,
    partitions: int = 4,
) -> Result:
    """Play the scenario and check every claim; raises AssertionError where one does not hold."""
    began = time.monotonic()
    model = make_model(streams, features, folder)
    topic, output = f"{name}-in", f"{name}-out"
    with KafkaAdminClient(bootstrap_servers=bootstrap_servers) as admin:
        admin.create_topics({topic: {"num_partitions": partitions, "replication_factor": 1}}, wait_for_metadata=True)
    order = interleave({stream: len(x) for stream, x in streams.items()}, seed=1)
    arguments = [
        *("--model", str(model), "--bootstrap-servers", bootstrap_servers, "--app-id", name),
        *("--input", topic, "--output", output, "--batch-records", "256"),
    ]
    total = len(order)
    with ExitStack() as stack:
        producer = KafkaProducer(bootstrap_servers=bootstrap_servers, linger_ms=10, acks="all")
        stack.callback(producer.close)

        def produce(begin: float, end: float) -> None:
            for stream, row in order[round(begin * total) : round(end * total)]:
                document = dict(zip(features, streams[stream][row].tolist(), strict=True)) | {"ts": 1.7e9 + 300 * row}
                producer.send(topic, key=stream.encode(), value=json.dumps(document).encode())
            producer.flush()

        def start(label: str) -> ServiceProcess:
            return stack.enter_context(ServiceProcess(folder / f"{name}-{label}.log", *arguments))

        produce(0.0, 0.3)
        first, second = start("first"), start("second")
        first.wait_until_ready()
        second.wait_until_ready()
        reader = TopicReader(bootstrap_servers, output)
        stack.callback(reader.close)
        reader.read_until(lambda records: len(records) >= 0.2 * total, "a first part of the outputs")
        third = start("third")
        produce(0.3, 0.5)
        third.wait_until_ready()
        reader.read_until(lambda records: len(records) >= 0.4 * total, "outputs while a third joins")
        sigterm_seconds = first.terminate()
        produce(0.5, 0.7)
        reader.read_until(lambda records: len(records) >= 0.6 * total, "outputs after one left")
        produce(0.7, 0.8)
        second.kill()
        produce(0.8, 1.0)
        reader.read_until(lambda records: len(answered(records)) >= total, "every output, after one was killed")
        third.terminate()
    records = reader.records
    doubles = check_delivery(records, total)
    difference = check_bits(records, streams, model)
    return Result(total, doubles, len(streams), difference, time.monotonic() - began, sigterm_seconds)


def interleave(lengths: Mapping[str, int], seed: int) -> list[tuple[str, int]]:
    """(stream, row) of every reading, streams mixed at random, each stream's rows in order."""
    rng = np.random.default_rng(seed)
    names = [name for name, length in lengths.items() for _ in range(length)]
    seen: dict[str, int] = defaultdict(int)
    order = []
    for place in rng.permutation(len(names)).tolist():
        name = names[place]
        order.append((name, seen[name]))
        seen[name] += 1
    return order


def source_of(record: Any) -> tuple[int, int]:
    """The (partition, offset) that an output answers."""
    headers = dict(record.headers)
    return int(headers["statestep.source.partition"]), int(headers["statestep.source.offset"])


def answered(records: Sequence[Any]) -> set[tuple[int, int]]:
    """The input records that have an output."""
    return {source_of(record) for record in records}


def check_delivery(records: list[Any], total: int) -> int:
    """None is missing; a double says what the first said. Gives the number of doubles."""
    values: dict[tuple[int, int], bytes] = {}
    for record in records:
        assert values.setdefault(source_of(record), record.value) == record.value, f"two answers to {source_of(record)}"
    assert len(values) == total, f"{total - len(values)} of {total} outputs are missing"
    return len(records) - total


def check_bits(records: list[Any], streams: Mapping[str, Array], model: Path) -> float:
    """Each stream's predictions are the offline run's, bit for bit; gives the largest difference from torch."""
    documents = {source_of(record): json.loads(record.value) for record in records}
    by_stream: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _, document in sorted(documents.items()):
        by_stream[document["stream"]].append(document)
    session = ort.InferenceSession(str(model.with_suffix(".sequence.onnx")), session_options())
    saved = load(model.with_suffix(".pt"))
    assert isinstance(saved.scaling, PooledScaling)
    reference, std = reference_of(saved), saved.scaling.std.numpy()
    largest = 0.0
    for stream, x in streams.items():
        found = by_stream[stream]
        assert [document["step"] for document in found] == list(range(1, len(x) + 1)), stream
        sequence = x.astype(np.float32)[:, None]  # [T, 1, F]
        offline = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": sequence}), strict=True))
        got = np.array([list(document["prediction"].values()) for document in found], np.float32)  # [T, F]
        np.testing.assert_array_equal(
            got, offline["prediction"][:, 0], err_msg=f"{stream}: streamed and offline differ"
        )
        scores = np.array([document["score"] for document in found], np.float32)
        np.testing.assert_array_equal(scores, offline["score"][:, 0], err_msg=f"{stream}: the scores differ")
        apart = np.abs(got - reference(sequence)["prediction"][:, 0]) / std
        largest = max(largest, float(apart.max()))
    assert largest < TORCH_TOLERANCE, f"{largest} standard deviations from torch"
    return largest


def asd(folder: Path) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The application servers of `folder`, a stream each: whole train files, or the slices in `tests/data`."""
    streams: dict[str, Array] = {}
    features: tuple[str, ...] = ()
    for path in sorted([*folder.glob("app*_train.csv*"), *folder.glob("asd_app*.csv*")]):
        features = tuple(name for name in columns(str(path)) or () if name not in ("t", "label"))
        streams |= load_streams(str(path), features)[0]
    return streams, features


def main() -> None:
    """Play with the whole of the data."""
    bootstrap_servers, kind, folder = sys.argv[1:]
    if kind == "asd":
        streams, features = asd(Path(folder))
    else:
        path = str(Path(folder) / "machine_temperature_system_failure.csv")
        streams, features = load_streams(path, ["value"])[0], ("value",)
    with tempfile.TemporaryDirectory() as work:
        print(play(bootstrap_servers, streams, features, Path(work), f"{kind}-{int(time.time())}"))


if __name__ == "__main__":
    main()
