"""Goal: the topic of events holds each beginning and each end once, whatever befalls a service of either client."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka import KafkaProducer

from statestep.consumers.memory import MemoryBroker
from statestep.consumers.ports import Message

from ..consumers import runs
from ..consumers.judging import PARTITIONS, judge, judging, troubled
from .service_process import ServiceProcess, TopicReader


def sent(bootstrap_servers: str, topic: str, broker: MemoryBroker, upto: float) -> None:
    """The records of a broker in memory, up to a share of each partition that was not sent before."""
    producer = KafkaProducer(bootstrap_servers=bootstrap_servers)
    for partition, log in enumerate(broker.log):
        done = 0 if upto < 1 else len(log) // 2
        for record in log[done : int(len(log) * upto)]:
            producer.send(topic, record.value, record.key, partition=partition, timestamp_ms=record.timestamp_ms)
    producer.flush()
    producer.close()


def expected(broker: MemoryBroker) -> list[Message]:
    """What the same records give in memory, where nothing ever fails."""
    runs.service(broker, model=judge(), events=True).run()
    return broker.messages


@pytest.mark.parametrize("client", ["kafka-python", "librdkafka"])
def test_each_event_is_told_once_though_the_service_is_killed(
    bootstrap_servers: str, topic: Callable[..., str], tmp_path: Path, client: str
) -> None:
    """To the byte what a run in memory tells, in the input's partitions and order; the topic is made by the service."""
    name = topic(PARTITIONS)
    broker = troubled(400)
    broker.topic = name
    (tmp_path / "judge.onnx").write_bytes(judging())
    arguments = ["--model", str(tmp_path / "judge.onnx"), "--bootstrap-servers", bootstrap_servers, "--client", client]
    arguments += ["--app-id", name, "--input", name, "--output", f"{name}-out", "--events", f"{name}-events"]
    wanted = expected(broker)
    sent(bootstrap_servers, name, broker, 0.5)
    half = sum(len(log) // 2 for log in broker.log)
    with ServiceProcess(tmp_path / "service.log", *arguments, "--snapshot-interval-ms", "3600000") as service:
        reader = TopicReader(bootstrap_servers, f"{name}-out")
        reader.read_until(lambda found: len(found) >= half * 0.9, "outputs of the first half")
        service.kill()
    sent(bootstrap_servers, name, broker, 1.0)
    with ServiceProcess(tmp_path / "service.log", *arguments) as service:
        outputs = [message for message in wanted if not (message.dead or message.event)]
        reader.read_until(lambda found: len(found) >= len(outputs), "all outputs")
        reader.close()
        told = TopicReader(bootstrap_servers, f"{name}-events")
        events = [message for message in wanted if message.event]
        told.read_until(lambda found: len(found) >= len(events), "all events")
        told.close()
        service.terminate()
    for found, messages in ((reader.records, outputs), (told.records, events)):
        for partition in range(PARTITIONS):
            assert [(r.key, r.value) for r in found if r.partition == partition] == [
                (m.key, m.value) for m in messages if m.partition == partition
            ]
    phases = [json.loads(record.value)["phase"] for record in told.records]
    assert phases.count("begin") > phases.count("end") > 5
