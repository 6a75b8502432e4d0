"""`statestep state`: what it shows is what is held, and what it moves goes on with the same bits, or is refused."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from statestep.consumers import config, state_moves, wiring
from statestep.consumers.changelog import MARKER, STREAM, Corrupt, Marker, StateCodec, decode_marker, look, moved
from statestep.consumers.checkpoint import Stop, committed
from statestep.consumers.cli import app
from statestep.consumers.config import ConfigError
from statestep.consumers.ports import Committed, Identity, StateRecord
from statestep.consumers.state_moves import Exported, Terms, read, written
from statestep.consumers.states import Held, find, hold, stalest
from statestep.consumers.tables import FileError
from statestep.runtime import NO_TIME, Engine, Records, StepModel

from ..models import detector, pump

ROWS = 60
PUMPS = ("a", "b", "c")
CODEC = StateCodec(pump().contract)
SAME = Identity("topic-1", 4, True)
OTHER = Identity("topic-2", 3, True)


class World:
    """Readings in two files and in one, and a model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, folder / "pump.onnx"
        self.model.write_bytes(detector())
        self.x = np.random.default_rng(11).normal(0, 2, (2 * ROWS, 2)).round(3).astype(np.float32)  # [N, 2]
        self.keys = [PUMPS[i % 3].encode() for i in range(2 * ROWS)]
        lines = [f"{self.keys[i].decode()},{i * 60},{a},{b}" for i, (a, b) in enumerate(self.x.tolist())]
        for name, part in (("first", lines[:ROWS]), ("second", lines[ROWS:]), ("whole", lines)):
            (folder / f"{name}.csv").write_text("\n".join(["pump,ts,flow,pressure", *part]) + "\n")

    def replay(self, name: str, store: str) -> list[dict[str, Any]]:
        """The outputs of one file, with a store."""
        out = self.folder / f"{name}-{store}.jsonl"
        model = StepModel.load(self.model)
        wiring.replay(model, str(self.folder / f"{name}.csv"), str(out), key="pump", state_dir=self.folder / store)
        return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    return World(tmp_path)


def command(*arguments: str, code: int = 0) -> str:
    """What a command prints; of one that fails, its sentence."""
    root = logging.getLogger()
    logged, level = root.handlers[:], logging.getLogger("statestep").level
    done = CliRunner().invoke(app, ["state", *arguments])
    root.handlers[:] = logged  # a command's log goes to a stderr that is closed by now
    logging.getLogger("statestep").setLevel(level)
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done.stdout if code == 0 else done.stderr


def test_what_is_shown_is_what_is_held(world: World) -> None:
    """Against an engine that saw the same rows: step, last offset, and every bit of every tensor."""
    world.replay("first", "old")
    engine = Engine(StepModel.load(world.model))
    engine.advance(world.keys[:ROWS], world.x[:ROWS])
    expected = engine.read([name.encode() for name in PUMPS])
    listed = json.loads(command("ls", "--state-dir", "old", "--streams", "2", "--json"))
    (partition,) = listed["partitions"]
    assert (partition["redo"], partition["next"], partition["committed"], partition["streams"]) == (ROWS, ROWS, ROWS, 3)
    assert [stream["stream"] for stream in listed["streams"]] == ["a", "b"]  # the stalest of three
    assert [stream["offset"] for stream in listed["streams"]] == [ROWS - 3, ROWS - 2]
    names = [state.input for state in StepModel.load(world.model).contract.states]
    for i, name in enumerate(PUMPS):
        (shown,) = json.loads(command("show", name, "--state-dir", "old", "--model", "pump.onnx", "--json"))
        assert (shown["step"], shown["offset"], shown["current"]) == (ROWS // 3, ROWS - 3 + i, True)
        for tensor, rows in zip(names, expected.states, strict=True):
            found = np.array(shown["tensors"][tensor]["values"], rows.dtype)
            np.testing.assert_array_equal(found, rows[i], strict=True)
    assert f"as of offset {ROWS}" in command("show", "b", "--state-dir", "old", "--model", "pump.onnx")
    assert "unwritten" in command("ls", "--state-dir", "old", "--streams", "9")


def test_streams_go_on_elsewhere_with_the_same_bits(world: World) -> None:
    """Exported after half of the rows and imported where the other half is read: as if it had been one file."""
    whole = world.replay("whole", "whole")
    world.replay("first", "old")
    command("export", "--state-dir", "old", "--out", "all.states")
    command("import", "all.states", "--state-dir", "new", "--data", "second.csv")
    again = world.replay("second", "new")
    assert len(again) == ROWS
    for found, expected in zip(again, whole[ROWS:], strict=True):
        assert {**found, "source": None} == {**expected, "source": None}


def test_one_stream_goes_alone(world: World) -> None:
    """The others begin anew where it went."""
    whole = world.replay("whole", "whole")
    world.replay("first", "old")
    command("export", "b", "--state-dir", "old", "--out", "b.states")
    command("import", "b.states", "--state-dir", "new", "--data", "second.csv")
    again = world.replay("second", "new")
    assert next(row["step"] for row in again if row["stream"] == "a") == 1
    expected = [row["prediction"] for row in whole[ROWS:] if row["stream"] == "b"]
    assert [row["prediction"] for row in again if row["stream"] == "b"] == expected


def test_faults_are_one_sentence(world: World) -> None:
    """Exit codes as elsewhere: 2 for usage, 4 for data that is refused."""
    world.replay("first", "old")
    command("export", "--state-dir", "old", "--out", "all.states")
    assert "there is no store in it" in command("ls", "--state-dir", "nowhere", code=2)
    assert not Path("nowhere").exists()
    assert "leave out" in command("ls", "--state-dir", "old", "--app-id", "x", code=2)
    assert "--bootstrap-servers is missing" in command("ls", "--app-id", "x", "--input", "y", code=2)
    assert "no state of the stream 'z'" in command("show", "z", "--state-dir", "old", code=4)
    assert "there are 1" in command("ls", "--state-dir", "old", "--partition", "3", code=2)
    assert "--data is missing" in command("import", "all.states", "--state-dir", "new", code=2)
    assert "--replace" in command("import", "all.states", "--state-dir", "old", code=4)
    assert "cannot be read" in command("import", "no.states", "--state-dir", "old", code=4)
    assert "no file of states" in command("import", "first.csv", "--state-dir", "old", code=4)
    assert "must be a number, or same" in command(
        "import", "all.states", "--state-dir", "old", "--partition", "x", code=2
    )
    Path("other.onnx").write_bytes(detector(seed=8, name="other"))
    told = command(
        "import", "all.states", "--state-dir", "new", "--data", "second.csv", "--model", "other.onnx", code=4
    )
    assert "--any-model takes them" in told
    command("import", "all.states", "--state-dir", "old", "--replace")


def test_the_settings_of_run_will_do_and_fewer_too(tmp_path: Path) -> None:
    """What the file says of model and output counts; what nobody says is filled in."""
    place = 'bootstrap_servers = "h:1"\ninput = "in"\napp_id = "app"\n'
    few, whole = tmp_path / "few.toml", tmp_path / "whole.toml"
    few.write_text(place)
    whole.write_text(place + 'model = "m.onnx"\noutput = "out"\n')
    filled = {"model": "none", "output": "nowhere"}
    found = [config.load(path, {}, {}, otherwise=filled) for path in (few, whole)]
    assert [(str(s.model), s.output) for s in found] == [("none", "nowhere"), ("m.onnx", "out")]
    with pytest.raises(ConfigError, match="--model is missing"):
        config.load(few, {}, {})


def test_a_store_in_use_is_told(world: World) -> None:
    """By its lock, of whatever process."""
    world.replay("first", "old")
    code = "from statestep.consumers.store import Store; s = Store.open('old', 'replay'); print('in', flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "in\n"
        assert "another process uses it" in command("ls", "--state-dir", "old", code=2)
        holder.communicate("\n")
    command("ls", "--state-dir", "old")


def record(partition: int, key: bytes, *, time: int = 0, offset: int = 5, epoch: int = 0) -> StateRecord:
    """A stream's record, with numbers that tell it from others."""
    rng = np.random.default_rng([partition, *key])
    states = [rng.normal(size=(1, *s.shape)).astype(s.dtype) for s in pump().contract.states]
    one = [np.array([n]) for n in (7, time, offset)]
    return CODEC.encode(partition, [key], Records(states, *one), epoch)[0]


plan = partial(state_moves.plan, writer="import")


def held(partition: int, *keys: bytes, next: int = 10, identity: Identity = SAME, **changed: Any) -> Held:
    """A partition at rest."""
    values: dict[str, Any] = {"sequence": 3, "redo": next, "next": next, "epoch": 2, "records": 0, "semantics": "5e"}
    values |= {
        "topic_id": identity.topic_id,
        "partitions": identity.partitions,
        "model": "f0" * 32,
        "writer": "service",
    }
    marker = Marker(**(values | changed))
    records = {STREAM + key: record(partition, key, epoch=marker.epoch) for key in keys}
    return hold(partition, records, marker, committed(marker))


def empty(partitions: int) -> dict[int, Held]:
    """A new application's."""
    return {p: hold(p, {}, None, None) for p in range(partitions)}


def exported() -> Exported:
    return state_moves.export("app", "input", SAME, [held(0, b"a", b"b"), held(1, b"c"), held(2), held(3)])


def nowhere(partition: int, word: str) -> int:
    raise AssertionError("nobody has to ask where to begin")


def test_an_import_writes_what_a_transaction_would() -> None:
    """One sequence on, next where it was, and each record at the offset before it, under the target's epoch."""
    target = {p: held(p, b"z", epoch=5, sequence=8) for p in range(4)}
    writes = plan(exported(), target, SAME, Terms(), nowhere)
    assert [write.partition for write in writes] == [0, 1]
    for write in writes:
        *states, last = write.states
        assert last.key == MARKER and last.value is not None
        marker = decode_marker(last.value)
        assert (marker.sequence, marker.redo, marker.next, marker.epoch) == (9, 10, 10, 5)
        assert write.offset == Committed(10, "9 import")
        for state in states:
            head = look(state)
            assert (head.epoch, head.offset, head.step) == (5, 9, 7)
            before, after = (CODEC.decode([r]).records.states for r in (record(write.partition, state.key[1:]), state))
            for one, other in zip(before, after, strict=True):
                np.testing.assert_array_equal(one, other, strict=True)


def test_a_new_application_begins_where_the_states_left_off() -> None:
    """On the same topic; on another one where it is told to, or at its beginning."""
    writes = plan(exported(), empty(4), SAME, Terms(), nowhere)
    assert [(write.partition, write.offset) for write in writes] == [(p, Committed(10, "0 import")) for p in range(4)]
    asked: list[tuple[int, str]] = []

    def start(partition: int, word: str) -> int:
        asked.append((partition, word))
        return 40 + partition

    for word, terms in (("earliest", Terms()), ("latest", Terms(start="latest"))):
        asked.clear()
        writes = plan(exported(), empty(3), OTHER, terms, start)
        assert asked == [(write.partition, word) for write in writes]
        assert all(write.offset.offset == 40 + write.partition for write in writes)


def test_streams_go_where_their_messages_go() -> None:
    """By murmur2 on another topic, whose values for these keys are those of Kafka's own tests; else as they were."""
    assert state_moves.place(b"abc", 2**31) == 479470107
    assert state_moves.place(b"21", 2**31) == -973932308 & 0x7FFFFFFF

    def where(writes: list[state_moves.Write]) -> dict[bytes, int]:
        return {s.key[1:]: s.partition for write in writes for s in write.states if s.key != MARKER}

    by_hash = {key: state_moves.place(key, 3) for key in (b"a", b"b", b"c")}
    assert where(plan(exported(), empty(3), OTHER, Terms(), lambda p, word: 0)) == by_hash
    kept = {b"a": 0, b"b": 0, b"c": 1}
    assert where(plan(exported(), empty(3), OTHER, Terms("same"), lambda p, word: 0)) == kept
    assert where(plan(exported(), empty(3), OTHER, Terms(2), lambda p, word: 0)) == dict.fromkeys(kept, 2)
    assert where(plan(exported(), empty(4), SAME, Terms(), nowhere)) == kept
    with pytest.raises(ConfigError, match="no partition 3"):
        plan(exported(), empty(3), OTHER, Terms(3), nowhere)
    doubled = state_moves.export("app", "input", SAME, [held(0, b"a"), held(1, b"a")])
    with pytest.raises(Stop, match="comes from two partitions"):
        plan(doubled, empty(3), OTHER, Terms(), lambda p, word: 0)


@pytest.mark.parametrize(
    ("change", "terms", "why"),
    [
        (lambda: {"next": 12}, Terms(), "messages 10 to 12 would be left out"),
        (lambda: {"next": 8}, Terms(), "messages 8 to 10 would be applied twice"),
        (lambda: {"redo": 9, "next": 10, "records": 1}, Terms(), "states of messages 9 to 10 are not written"),
        (lambda: {"model": "aa" * 32}, Terms(), "made by model f0f0"),
        (lambda: {"partitions": 5}, Terms(), "not the one that its streams began with"),
    ],
)
def test_streams_that_could_not_go_on_are_refused(change: Callable[[], Any], terms: Terms, why: str) -> None:
    """Rather than to go on with other bits than where they come from."""
    with pytest.raises(Stop, match=why):
        plan(exported(), {p: held(p, **change()) for p in range(4)}, SAME, terms, nowhere)


def test_a_person_can_insist() -> None:
    """On another offset, on a model whose tensors fit, on replacing; not on tensors that do not fit."""
    plan(exported(), {p: held(p, next=12) for p in range(4)}, SAME, Terms(any_offset=True), nowhere)
    plan(exported(), {p: held(p, b"a") for p in range(4)}, SAME, Terms(replace=True), nowhere)
    others = {p: held(p, model="aa" * 32) for p in range(4)}
    plan(exported(), others, SAME, Terms(any_model=True, layout=CODEC.layout), nowhere)
    with pytest.raises(ConfigError, match="needs --model"):
        plan(exported(), others, SAME, Terms(any_model=True), nowhere)
    with pytest.raises(Stop, match="have other tensors"):
        plan(exported(), others, SAME, Terms(any_model=True, layout="00" * 8), nowhere)


def test_only_what_is_at_rest_is_exported() -> None:
    """Not while it moves, nor with states unwritten, nor where the offset is another's."""
    moving = held(0, b"a")
    moving.moving = True
    elsewhere = held(0, b"a")
    elsewhere.committed = Committed(50, "")
    for one, why in (
        (moving, "being written"),
        (held(0, b"a", redo=4, records=2), "stop the application by SIGTERM"),
        (elsewhere, "offset 50 is committed"),
        (hold(0, {}, None, None), "no states yet"),
    ):
        with pytest.raises(Stop, match=why):
            state_moves.export("app", "input", SAME, [one])


def test_records_of_another_epoch_are_void() -> None:
    """They are neither listed nor found, and their epoch is not used again."""
    marker = held(0, epoch=4).marker
    values = {STREAM + b"old": record(0, b"old", epoch=3), STREAM + b"new": record(0, b"new", epoch=4)}
    assert list(hold(0, values, marker, None).streams) == [b"new"]
    assert hold(0, values, None, None).epochs == 4


def test_the_stalest_come_first() -> None:
    """By event time, whatever the partition; what has no time comes last."""
    marker = held(0, epoch=0).marker
    times = {b"x": 30, b"y": NO_TIME, b"z": 10}
    values = {STREAM + key: record(0, key, time=time) for key, time in times.items()}
    rows = stalest([hold(0, values, marker, None)], 9, now_ns=10**9 + 10)
    assert [row.stream for row in rows] == ["z", "x", "y"]
    assert [row.age_s for row in rows] == [1.0, (10**9 - 20) / 1e9, None]


def test_a_stream_is_found_by_the_name_that_is_shown() -> None:
    """Also one whose bytes are no text."""
    ((_, key),) = find([held(0, b"\xff\x00")], "\\xff\x00")
    assert key == b"\xff\x00"


def test_damage_to_a_file_is_found() -> None:
    """Each byte flipped, each length cut: refused, or but a name for people has changed."""
    lines = list(written(exported()))
    whole = b"".join(lines)
    numbered = [record._replace(offset=number) for number, record in enumerate(exported().records, 2)]
    assert read(lines, "f") == Exported(exported().header, numbered)
    rng = random.Random(5)
    for at in range(len(whole)):
        bad = bytearray(whole)
        bad[at] ^= 1 << rng.randrange(8)
        try:
            found = read(bytes(bad).splitlines(keepends=True), "f")
        except FileError as error:
            assert str(error).startswith("f: ")
        else:
            assert at > len(lines[0]) and found == read(lines, "f"), f"seed 5: byte {at} passed unnoticed"
    for length in range(len(whole) - 1):
        with pytest.raises(FileError):
            read(whole[:length].splitlines(keepends=True), "f")


def test_a_later_format_is_refused() -> None:
    """By its number, not as damage."""
    first = next(written(exported())).replace(b'"statestep-states":1', b'"statestep-states":2')
    with pytest.raises(FileError, match="has format 2, this release reads 1"):
        read([first], "f")


def test_a_moved_record_is_no_one_elses() -> None:
    """Its checksum covers the new partition: read as the old one's, it is corrupt."""
    there = moved(record(0, b"a"), 3, 1, 9)
    assert CODEC.decode([there]).partitions == [3]
    with pytest.raises(Corrupt):
        look(there._replace(partition=0))
