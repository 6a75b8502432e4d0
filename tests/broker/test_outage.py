"""Goal: a broker that goes away costs time and nothing else, and SIGTERM ends the service within 10 s even then."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
from kafka import KafkaAdminClient, KafkaProducer

from statestep.consumers.bench_model import lstm_step
from statestep.runtime import Engine, StepModel

from .kafka_server import KafkaServer
from .service_process import ServiceProcess, TopicReader

READINGS = 120


def produce(bootstrap_servers: str, x: np.ndarray[tuple[int, int], np.dtype[np.float32]]) -> None:
    producer = KafkaProducer(bootstrap_servers=bootstrap_servers)
    for row in x.tolist():
        producer.send("readings", key=b"pump", value=json.dumps(row).encode())
    producer.flush()
    producer.close()


def outputs(bootstrap_servers: str, count: int) -> list[list[float]]:
    """The predictions so far, once there are `count` different ones."""
    reader = TopicReader(bootstrap_servers, "predictions")
    records = reader.read_until(lambda found: len({r.value for r in found}) >= count, f"{count} predictions")
    reader.close()
    return [list(json.loads(value)["prediction"].values()) for value in dict.fromkeys(r.value for r in records)]


def test_an_outage_loses_nothing_and_sigterm_is_obeyed_in_it(kafka: KafkaServer, tmp_path: Path) -> None:
    """The broker is killed and started again under a running service; then it is killed and the service told to end."""
    kafka.start()
    with KafkaAdminClient(bootstrap_servers=kafka.bootstrap_servers) as admin:
        admin.create_topics({"readings": {"num_partitions": 2, "replication_factor": 1}}, wait_for_metadata=True)
    model = tmp_path / "model.onnx"
    model.write_bytes(lstm_step(3, 8))
    x = np.random.default_rng(3).standard_normal((2 * READINGS, 3)).astype(np.float32)  # [N, 3]
    arguments = ["--model", str(model), "--bootstrap-servers", kafka.bootstrap_servers, "--app-id", "outage"]
    arguments += ["--input", "readings", "--output", "predictions"]
    with ServiceProcess(tmp_path / "service.log", *arguments) as service:
        produce(kafka.bootstrap_servers, x[:READINGS])
        assert len(outputs(kafka.bootstrap_servers, READINGS)) == READINGS
        kafka.kill()
        kafka.start()
        produce(kafka.bootstrap_servers, x[READINGS:])
        found = outputs(kafka.bootstrap_servers, 2 * READINGS)
        expected = Engine(StepModel.load(model)).advance([b"pump"] * len(x), x).prediction
        np.testing.assert_array_equal(np.array(found, np.float32), expected)
        kafka.kill()
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(15) in (0, 5, 75), service.log
        assert time.monotonic() - began < 10
