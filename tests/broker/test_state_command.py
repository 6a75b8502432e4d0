"""Goal: `statestep state` over a real broker: what it shows is held, and streams go on elsewhere with the same bits."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kafka import KafkaProducer, TopicPartition
from kafka.errors import KafkaTimeoutError
from typer.testing import CliRunner

from statestep.consumers import state_moves
from statestep.consumers.bench_model import lstm_step
from statestep.consumers.checkpoint import Stop
from statestep.consumers.cli import app
from statestep.consumers.state_moves import Terms
from statestep.consumers.state_places import KafkaPlace
from statestep.runtime import Engine, StepModel

from .service_process import ServiceProcess, TopicReader, wait_until

STREAMS = [b"a", b"b", b"c", b"d"]
HALF = 120


class World:
    """Readings, a model, and applications over topics that can be started again and again."""

    def __init__(self, bootstrap_servers: str, folder: Path) -> None:
        self.bootstrap_servers, self.folder, self.model = bootstrap_servers, folder, folder / "model.onnx"
        self.model.write_bytes(lstm_step(2, 8))
        self.x = np.random.default_rng(23).standard_normal((3 * HALF, 2)).astype(np.float32)  # [N, 2]
        self.keys = [STREAMS[i % 4] for i in range(len(self.x))]
        self.expected = Engine(StepModel.load(self.model)).advance(self.keys, self.x).prediction

    def produce(self, topic: str, begin: int, end: int, partitions: int | None = None) -> None:
        """Readings, each stream's to one partition: by its place in the list, or as producers choose."""
        producer = KafkaProducer(bootstrap_servers=self.bootstrap_servers)
        for i in range(begin, end):
            value = json.dumps(dict(zip(("s0", "s1"), self.x[i].tolist(), strict=True))).encode()
            partition = None if partitions is None else STREAMS.index(self.keys[i]) % partitions
            producer.send(topic, key=self.keys[i], value=value, partition=partition)
        producer.flush()
        producer.close()

    def service(self, topic: str, app_id: str, *more: str) -> ServiceProcess:
        """`statestep run` over a topic."""
        place = ["--bootstrap-servers", self.bootstrap_servers, "--input", topic, "--app-id", app_id]
        arguments = ["--model", str(self.model), *place, "--output", f"{app_id}-out", *more]
        return ServiceProcess(self.folder / f"{app_id}.log", *arguments)

    def outputs(self, app_id: str, count: int) -> list[Any]:
        """What an application has answered, once it is that much; None for a stream that was ended."""
        reader = TopicReader(self.bootstrap_servers, f"{app_id}-out")
        try:
            records = reader.read_until(lambda found: len(found) >= count, f"{count} outputs of {app_id}")
        finally:
            reader.close()
        return [None if record.value is None else json.loads(record.value) for record in records]

    def state(self, name: str, topic: str, app_id: str, *more: str, code: int = 0) -> str:
        """`statestep state`: what it prints; of a command that fails, its sentence."""
        place = ["--bootstrap-servers", self.bootstrap_servers, "--input", topic, "--app-id", app_id]
        root = logging.getLogger()
        logged, level = root.handlers[:], logging.getLogger("statestep").level
        done = CliRunner().invoke(app, ["state", name, *more, *place])
        root.handlers[:] = logged  # a command's log goes to a stderr that is closed by now
        logging.getLogger("statestep").setLevel(level)
        assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
        return done.stdout if code == 0 else done.stderr

    def listed(self, name: str) -> list[dict[str, Any]]:
        """What `ls` says of the partitions of the application of this name, on the topic of this name."""
        rows: list[dict[str, Any]] = json.loads(self.state("ls", name, name, "--json"))["partitions"]
        return rows

    def check(self, outputs: list[Any], begin: int, end: int) -> None:
        """Once each, the predictions of an uninterrupted run over all readings."""
        assert len(outputs) == end - begin
        for stream in STREAMS:
            rows = [i for i in range(begin, end) if self.keys[i] == stream]
            found = [list(o["prediction"].values()) for o in outputs if o["stream"] == stream.decode()]
            np.testing.assert_array_equal(np.array(found, np.float32), self.expected[rows])


@pytest.fixture
def world(bootstrap_servers: str, tmp_path: Path) -> World:
    return World(bootstrap_servers, tmp_path)


def test_streams_go_on_in_another_application(world: World, topic: Callable[..., str]) -> None:
    """On the same topic where they left off, on another by their keys: outputs as of one run. One is ended by reset."""
    first = topic(2)
    file = str(world.folder / "all.states")
    world.produce(first, 0, HALF, partitions=2)
    with world.service(first, first) as service:
        world.check(world.outputs(first, HALF), 0, HALF)
        service.terminate()
    _expect_shown(world, first)
    world.state("export", first, first, "--out", file)

    second = f"{first}-b"
    world.state("import", first, second, file)
    assert "--replace takes the new" in world.state("import", first, second, file, code=4)
    world.produce(first, HALF, 2 * HALF, partitions=2)
    with world.service(first, second) as service:
        world.check(world.outputs(second, HALF), HALF, 2 * HALF)
        assert "is running (1 members" in world.state("import", first, second, file, "--replace", code=4)
        world.state("reset", first, second, "b", "--yes")
        world.produce(first, 2 * HALF, 2 * HALF + 4, partitions=2)
        last = {o["stream"]: o["step"] for o in world.outputs(second, HALF + 5) if o is not None}
        assert last == {"a": HALF // 2 + 1, "b": 1, "c": HALF // 2 + 1, "d": HALF // 2 + 1}
        service.terminate()

    third = topic(3)
    world.state("import", third, third, file)
    world.produce(third, HALF, 2 * HALF)
    with world.service(third, third) as service:
        world.check(world.outputs(third, HALF), HALF, 2 * HALF)
        service.terminate()


def _expect_shown(world: World, name: str) -> None:
    """What `ls` and `show` say of an application that was stopped after the first half."""
    listed = json.loads(world.state("ls", name, name, "--streams", "9", "--json"))
    for row in listed["partitions"]:
        assert (row["redo"], row["next"], row["committed"]) == (HALF // 2,) * 3
        assert (row["unwritten"], row["behind"], row["streams"]) == (0, 0, 2)
    assert sorted(row["stream"] for row in listed["streams"]) == ["a", "b", "c", "d"]
    engine = Engine(StepModel.load(world.model))
    engine.advance(world.keys[:HALF], world.x[:HALF])
    (shown,) = json.loads(world.state("show", name, name, "c", "--model", str(world.model), "--json"))
    assert (shown["step"], shown["partition"], shown["current"]) == (HALF // 4, 0, True)
    for tensor, rows in zip(shown["tensors"].values(), engine.read([b"c"]).states, strict=True):
        np.testing.assert_array_equal(np.array(tensor["values"], np.float32), rows[0])


def test_an_application_that_is_not_there_is_told(world: World, topic: Callable[..., str]) -> None:
    """Exit 5 and one sentence; looking makes nothing."""
    name = topic(1)
    for _ in range(2):
        assert "is --app-id right, and did it ever run?" in world.state("ls", name, f"{name}-no", code=5)
    assert "does not exist" in world.state("ls", f"{name}-no", name, code=5)


def test_states_that_librdkafka_wrote_go_on_under_kafka_python(world: World, topic: Callable[..., str]) -> None:
    """What is committed by one client is what the other one reads: nothing is in doubt, nothing has to be named."""
    name = topic(2)
    file = str(world.folder / "all.states")
    world.produce(name, 0, HALF, partitions=2)
    with world.service(name, name, "--client", "librdkafka") as service:
        world.outputs(name, HALF)
        service.terminate()
    world.state("export", name, name, "--out", file)
    other = f"{name}-b"
    world.state("import", name, other, file)
    world.produce(name, HALF, 2 * HALF, partitions=2)
    for app_id, begin in ((name, 0), (other, HALF)):
        with world.service(name, app_id) as service:
            world.check(world.outputs(app_id, 2 * HALF - begin), begin, 2 * HALF)
            service.terminate()


def test_nobody_can_come_in_between(world: World, topic: Callable[..., str]) -> None:
    """A killed member is waited for; who joins during an import waits for its end; one that ends early is none."""
    name = topic(1)
    file = str(world.folder / "all.states")
    world.produce(name, 0, HALF, partitions=1)
    with world.service(name, name) as service:
        world.outputs(name, HALF)
        service.terminate()
    world.state("export", name, name, "--out", file)
    assert "--yes is missing" in world.state("reset", name, name, "a", code=2)
    assert "named by the field 'pump'" in world.state("reset", name, name, "a", "--yes", "--key", "pump", code=2)
    assert "has 1, from 0 on" in world.state("reset", name, name, "a", "--yes", "--partition", "1", code=2)
    assert "no state of the stream 'z'" in world.state("reset", name, name, "z", "--yes", code=4)
    with world.service(name, name) as service:
        service.wait_until_ready()
        service.kill()
    assert "is running (1 members" in world.state("import", name, name, file, "--replace", code=4)
    before = world.listed(name)
    wait_until(lambda: _interrupted(world, name, file), "the group to miss its member")
    assert world.listed(name) == before
    world.state("import", name, name, file, "--replace")
    assert [row["sequence"] for row in world.listed(name)] == [before[0]["sequence"] + 1]
    world.produce(name, HALF, 2 * HALF, partitions=1)
    with world.service(name, name) as service:
        world.check(world.outputs(name, 2 * HALF), 0, 2 * HALF)
        service.terminate()


def _interrupted(world: World, name: str, file: str) -> bool:
    """Whether an import got as far as its second look at the group; there it is given up."""

    class Looking(KafkaPlace):
        looks = 0

        def _expect_nobody(self) -> None:
            super()._expect_nobody()
            self.looks += 1
            if self.looks == 2:
                with pytest.raises(KafkaTimeoutError):  # as a service that joined just now
                    self._consumer.committed(TopicPartition(name, 0), metadata=True, timeout_ms=500)
                raise Stop("somebody came")

    try:
        place = Looking({"bootstrap_servers": [world.bootstrap_servers]}, name, name, writing=True)
    except Stop:
        return False
    with closing(place):
        exported = state_moves.read(Path(file).read_bytes().splitlines(keepends=True), file)
        writes = state_moves.plan(exported, place.read(), place.identity(), Terms(replace=True), place.start, "import")
        with pytest.raises(Stop, match="somebody came"):
            place.write(writes)
    return True
