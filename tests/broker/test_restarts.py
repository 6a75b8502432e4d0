"""Goal: what is found at start decides rightly: a clean restart goes on, and a topic that was cut anew is refused."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.structs import OffsetAndMetadata

from statestep.consumers.bench_model import lstm_step
from statestep.runtime import Engine, StepModel

from .service_process import ServiceProcess, TopicReader, wait_until

STREAMS = [b"a", b"b", b"c", b"d"]


class World:
    """A topic, a model, and a service over both that can be started again and again."""

    def __init__(self, bootstrap_servers: str, name: str, folder: Path) -> None:
        self.bootstrap_servers, self.name, self.folder = bootstrap_servers, name, folder
        self.model = folder / "model.onnx"
        self.model.write_bytes(lstm_step(2, 8))
        self.x = np.random.default_rng(5).standard_normal((400, 2)).astype(np.float32)  # [N, 2]
        self.keys = [STREAMS[i % 4] for i in range(len(self.x))]
        self.sent = 0

    def produce(self, count: int) -> None:
        """The next `count` readings, each stream's always to one partition."""
        producer = KafkaProducer(bootstrap_servers=self.bootstrap_servers)
        for i in range(self.sent, self.sent + count):
            value = json.dumps(dict(zip(("s0", "s1"), self.x[i].tolist(), strict=True))).encode()
            producer.send(self.name, key=self.keys[i], value=value, partition=STREAMS.index(self.keys[i]) % 2)
        producer.flush()
        producer.close()
        self.sent += count

    def service(self, *more: str) -> ServiceProcess:
        """`statestep run` over the topic."""
        arguments = ["--model", str(self.model), "--bootstrap-servers", self.bootstrap_servers]
        arguments += ["--app-id", self.name, "--input", self.name, "--output", f"{self.name}-out"]
        return ServiceProcess(self.folder / "service.log", *arguments, *more)

    def read_all(self) -> list[dict[str, object]]:
        """Every output so far, once there is one for each reading."""
        reader = TopicReader(self.bootstrap_servers, f"{self.name}-out")
        records = reader.read_until(lambda found: len(found) >= self.sent, "an output for every reading")
        reader.close()
        return [json.loads(record.value) for record in records]

    def check(self, outputs: list[dict[str, object]], begin: int = 0) -> None:
        """Each stream's predictions are those of an uninterrupted run that began with reading `begin`."""
        expected = Engine(StepModel.load(self.model)).advance(self.keys[begin : self.sent], self.x[begin : self.sent])
        for stream in STREAMS:
            rows = [i for i, key in enumerate(self.keys[begin : self.sent]) if key == stream]
            found = [list(o["prediction"].values()) for o in outputs if o["stream"] == stream.decode()]  # type: ignore[attr-defined]
            np.testing.assert_array_equal(np.array(found[-len(rows) :], np.float32), expected.prediction[rows])


@pytest.fixture
def world(bootstrap_servers: str, topic: Callable[..., str], tmp_path: Path) -> World:
    return World(bootstrap_servers, topic(2), tmp_path)


def test_a_restart_goes_on_with_the_same_bits(world: World) -> None:
    """Stopped and started: no output is missing or doubled, states are as if nothing had happened, and it says so."""
    world.produce(150)
    with world.service() as service:
        world.read_all()
        service.terminate()
    world.produce(150)
    with world.service() as service:
        outputs = world.read_all()
        replayed = f'statestep_records_replayed_total{{topic="{world.name}"}}'
        assert service.metric(replayed) == 0, "a stop by SIGTERM leaves nothing to replay"
        service.terminate()
    assert len(outputs) == 300
    world.check(outputs)


def test_a_killed_service_goes_on_with_the_same_bits(world: World) -> None:
    """What was not in the changelog yet is replayed, in silence."""
    world.produce(150)
    with world.service("--snapshot-interval-ms", "3600000") as service:  # no state is written before the kill
        world.read_all()
        service.kill()
    world.produce(150)
    with world.service() as service:
        outputs = world.read_all()
        replayed = f'statestep_records_replayed_total{{topic="{world.name}"}}'
        wait_until(lambda: service.metric(replayed) > 0, "messages that are counted as replayed")
        service.terminate()
    assert len(outputs) == 300
    world.check(outputs)


def delete_before(world: World, offset: int) -> None:
    """What retention does, in both partitions."""
    with KafkaAdminClient(bootstrap_servers=world.bootstrap_servers) as admin:
        admin.delete_records({TopicPartition(world.name, p): offset for p in range(2)})


def test_history_that_was_written_as_states_may_go(world: World) -> None:
    """Retention may take what was answered: states are in the changelog."""
    world.produce(200)
    with world.service() as service:
        world.read_all()
        service.terminate()
    delete_before(world, 100)
    world.produce(100)
    with world.service() as service:
        outputs = world.read_all()
        service.terminate()
    assert len(outputs) == 300
    world.check(outputs)


def test_messages_that_retention_took_unread_stop_the_service(world: World) -> None:
    """Exit 4 and one sentence, also after a second look; `skip` keeps the states and leaves the messages out."""
    world.produce(200)
    with world.service() as service:
        world.read_all()
        service.terminate()
    world.produce(200)
    delete_before(world, 150)
    with world.service() as service:
        assert service.process.wait(60) == 4
        assert "kept only from 150" in service.log and "--on-offset-mismatch" in service.log
    with world.service("--on-offset-mismatch", "skip") as service:
        reader = TopicReader(world.bootstrap_servers, f"{world.name}-out")
        reader.read_until(lambda found: len(found) >= 300, "the outputs of what was kept")
        reader.close()
        assert "were deleted unread" in service.log
        service.terminate()


def test_history_deleted_under_a_running_service_stops_it(world: World) -> None:
    """What retention took before it was read is not passed over in silence."""
    world.produce(200)
    with world.service("--snapshot-interval-ms", "100") as service:
        world.read_all()
        wait_until(lambda: service.metric("statestep_dirty_streams") == 0, "all states to be written")
        service.process.send_signal(signal.SIGSTOP)
        # A fetch that was under way would be answered with what is now produced, and nothing would be lost. It comes
        # back empty after fetch.max.wait.ms, 500, which nobody but the broker can see.
        time.sleep(1.0)
        world.produce(200)
        delete_before(world, 150)
        service.process.send_signal(signal.SIGCONT)
        assert service.process.wait(60) == 4
        assert "kept only from 150" in service.log


def test_offsets_set_by_another_tool_need_a_word(world: World) -> None:
    """An operator who sets the group to offset 50 is asked what is meant; `cold` starts the streams anew there."""
    world.produce(200)
    with world.service() as service:
        world.read_all()
        service.terminate()
    consumer = KafkaConsumer(bootstrap_servers=world.bootstrap_servers, group_id=world.name, enable_auto_commit=False)
    partitions = [TopicPartition(world.name, p) for p in range(2)]
    consumer.assign(partitions)
    consumer.commit({tp: OffsetAndMetadata(50, "", -1) for tp in partitions})
    consumer.close()
    with world.service() as service:
        assert service.process.wait(60) == 4
        assert "offset 50 is committed" in service.log
    with world.service("--on-offset-mismatch", "cold") as service:
        reader = TopicReader(world.bootstrap_servers, f"{world.name}-out")
        records = reader.read_until(lambda found: len(found) >= 300, "100 more outputs")
        reader.close()
        service.terminate()
    world.check([json.loads(record.value) for record in records[200:]], begin=100)


def test_another_model_over_old_states_needs_a_word(world: World) -> None:
    """Exit 4; `cold` goes on where the other stopped, with streams begun anew."""
    world.produce(100)
    with world.service() as service:
        world.read_all()
        service.terminate()
    world.model.write_bytes(world.model.read_bytes() + b"\x72\x00")  # a metadata entry, empty: another fingerprint
    world.produce(100)
    with world.service() as service:
        assert service.process.wait(60) == 4
        assert "the states were made by model" in service.log
    with world.service("--on-model-change", "cold") as service:
        outputs = world.read_all()
        service.terminate()
    assert len(outputs) == 200
    world.check(outputs[100:], begin=100)


def test_more_partitions_are_refused_at_start(world: World) -> None:
    """Keys have moved away from their states: exit 4 and one sentence."""
    world.produce(20)
    with world.service() as service:
        world.read_all()
        service.terminate()
    with KafkaAdminClient(bootstrap_servers=world.bootstrap_servers) as admin:
        admin.create_partitions({world.name: 3})
    with world.service() as service:
        assert service.process.wait(60) == 5
        assert "has 2 partitions and the input" in service.log and "use another --app-id" in service.log


def test_more_partitions_are_refused_while_running(world: World) -> None:
    """As soon as one of them is assigned: exit 4 and one sentence."""
    world.produce(20)
    with world.service("--kafka", "metadata.max.age.ms=1000") as service:
        service.wait_until_ready()
        with KafkaAdminClient(bootstrap_servers=world.bootstrap_servers) as admin:
            admin.create_partitions({world.name: 3})
        wait_until(lambda: service.process.poll() is not None, "the end of the service")
        assert service.process.returncode == 4
        assert "partition 2" in service.log and "was added" in service.log
