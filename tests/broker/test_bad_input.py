"""Goal: nothing that arrives stops a partition or is lost, and what cannot work says so in one sentence.

Method: a real broker and `statestep run` as a process; good messages of three streams lie between bad ones of every
kind.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaProducer

from statestep.consumers.bench_model import lstm_step
from statestep.runtime import Engine, StepModel

from .kafka_server import free_port
from .service_process import ServiceProcess, TopicReader, wait_until

HUGE_BYTES = 20_000_000
BAD: list[tuple[str, bytes | None, bytes]] = [  # reason, key, value
    ("malformed", b"a", b"not json"),
    ("malformed", b"a", b'{"s0": 1, "s1": 2'),
    ("missing-feature", b"a", b'{"s0": 1}'),
    ("missing-feature", b"a", b'{"s0": 1, "s1": null}'),
    ("wrong-type", b"a", b'{"s0": "1.5", "s1": 2}'),
    ("non-finite", b"a", b'{"s0": NaN, "s1": 2}'),
    ("out-of-range", b"a", b'{"s0": 1e39, "s1": 2}'),
    ("no-key", None, b'{"s0": 1, "s1": 2}'),
    ("too-large", b"a", b'{"s0": 1, "s1": 2, "pad": "' + b"x" * HUGE_BYTES + b'"}'),
    ("empty", b"a", b""),
    ("bad-time", b"a", b'{"s0": 1, "s1": 2, "ts": "yesterday"}'),
    ("wrong-shape", b"a", b"[1, 2, 3]"),
]


def header(record: Any, name: str) -> str:
    return str(dict(record.headers)[name].decode())


def test_bad_messages_are_dead_letters_and_the_others_unharmed(
    bootstrap_servers: str, topic: Callable[..., str], tmp_path: Path
) -> None:
    """in = predicted + dead letters; each dead letter has its reason and its bytes; streams are as if alone."""
    name = topic(1, {"max.message.bytes": "30000000"})
    model_path = tmp_path / "model.onnx"
    model_path.write_bytes(lstm_step(2, 8))
    rng = np.random.default_rng(11)
    good = rng.standard_normal((3 * len(BAD), 2)).round(3)  # [N, 2]
    keys = [b"abc"[i % 3 : i % 3 + 1] for i in range(len(good))]
    producer = KafkaProducer(bootstrap_servers=bootstrap_servers, max_request_size=30_000_000)
    for place, (_, key, value) in enumerate(BAD):
        for i in range(3 * place, 3 * place + 3):
            producer.send(name, key=keys[i], value=json.dumps({"s0": good[i, 0], "s1": good[i, 1]}).encode())
        producer.send(name, key=key, value=value, headers=[("origin", b"test")])
    producer.flush()
    producer.close()

    arguments = ["--model", str(model_path), "--bootstrap-servers", bootstrap_servers, "--app-id", name]
    arguments += ["--input", name, "--output", f"{name}-out"]
    with ServiceProcess(tmp_path / "service.log", *arguments) as service:
        outputs = TopicReader(bootstrap_servers, f"{name}-out")
        outputs.read_until(lambda records: len(records) >= len(good), "predictions of the good messages")
        dead = TopicReader(bootstrap_servers, f"{name}-dlq")
        dead.read_until(lambda records: len(records) >= len(BAD), "dead letters")
        labels = f'topic="{name}"'
        consumed = f'statestep_records_consumed_total{{partition="0",{labels}}}'
        wait_until(lambda: service.metric(consumed) >= len(good) + len(BAD), "the count of records")
        assert service.metric(consumed) == len(good) + len(BAD)
        assert service.metric('statestep_predictions_total{model="lstm-2-8x1"}') == len(good)
        for reason in {reason for reason, _, _ in BAD}:
            sample = f'statestep_dead_letters_total{{reason="{reason}",{labels}}}'
            assert service.metric(sample) == sum(other == reason for other, _, _ in BAD), reason
        service.terminate()
    outputs.close()
    dead.close()

    engine = Engine(StepModel.load(model_path))
    expected = engine.advance(keys, good.astype(np.float32)).prediction
    got = [list(json.loads(record.value)["prediction"].values()) for record in outputs.records]
    np.testing.assert_array_equal(np.array(got, np.float32), expected)
    assert [header(record, "__streams.errors.exception") for record in dead.records] == [r for r, _, _ in BAD]
    for record, (reason, key, value) in zip(dead.records, BAD, strict=True):
        assert record.key == key
        assert header(record, "origin") == "test"
        assert header(record, "__streams.errors.topic") == name
        if reason == "too-large":
            assert len(record.value) == 900_000 and value.startswith(record.value)
            assert header(record, "statestep.original.value.size") == str(len(value))
            assert header(record, "statestep.original.value.sha256") == hashlib.sha256(value).hexdigest()
        else:
            assert record.value == value


def run(*arguments: str) -> tuple[int, str, float]:
    """The exit code, what it said, and the seconds that `statestep run` took."""
    began = time.monotonic()
    command = [sys.executable, "-m", "statestep.consumers", "run", "--http-port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr, time.monotonic() - began


def sentences(said: str) -> list[str]:
    """The lines that are not log events."""
    return [line for line in said.splitlines() if " INFO " not in line and " WARNING " not in line]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(lstm_step(2, 8))
    return path


def test_a_missing_input_topic_is_exit_5(bootstrap_servers: str, model: Path) -> None:
    """One sentence that names the topic, within 30 s, and no topic was made."""
    code, said, seconds = run(
        *("--model", str(model), "--bootstrap-servers", bootstrap_servers, "--app-id", "nobody"),
        *("--input", "no-such-topic", "--output", "out-of-nothing"),
    )
    assert (code, seconds < 30) == (5, True), said
    assert len(sentences(said)) == 1 and "'no-such-topic' does not exist" in said


def test_no_broker_is_exit_5(model: Path) -> None:
    """One sentence that names the address, within 30 s."""
    address = f"127.0.0.1:{free_port()}"
    code, said, seconds = run(
        *("--model", str(model), "--bootstrap-servers", address, "--app-id", "x", "--input", "i", "--output", "o"),
    )
    assert (code, seconds < 30) == (5, True), said
    assert len(sentences(said)) == 1 and address in said


def test_missing_output_topics_can_be_refused(bootstrap_servers: str, topic: Callable[..., str], model: Path) -> None:
    """`--no-create-topics` makes a missing output topic an error that names it."""
    name = topic(2)
    code, said, _ = run(
        *("--model", str(model), "--bootstrap-servers", bootstrap_servers, "--app-id", name, "--no-create-topics"),
        *("--input", name, "--output", f"{name}-out"),
    )
    assert code == 5 and f"'{name}-out' does not exist" in said


@pytest.mark.parametrize("damage", ["truncated", "no state", "not ONNX", "absent"])
def test_a_bad_model_is_exit_3(model: Path, damage: str) -> None:
    """One sentence, before any broker is asked."""
    whole = model.read_bytes()
    if damage == "truncated":
        model.write_bytes(whole[: len(whole) // 2])
    elif damage == "not ONNX":
        model.write_bytes(b"\x89PNG" * 100)
    elif damage == "no state":
        model.write_bytes(stateless())
    else:
        model.unlink()
    code, said, _ = run(
        *("--model", str(model), "--bootstrap-servers", "127.0.0.1:1", "--app-id", "x"),
        *("--input", "i", "--output", "o"),
    )
    assert code == 3, said
    assert len(sentences(said)) == 1 and str(model) in said


def stateless() -> bytes:
    """A valid graph that remembers nothing."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Tanh", ["x"], ["y"])], "g", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(made.SerializeToString())
