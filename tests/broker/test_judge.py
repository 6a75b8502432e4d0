"""Goal: the judge of the chaos runs passes what is right and finds what is not, or those runs would prove nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest

from statestep.consumers.changelog import MARKER, StateCodec
from statestep.consumers.memory import MemoryBroker, MemoryChangelog, MemorySink, MemorySource
from statestep.consumers.ports import StateRecord
from statestep.consumers.wiring import build
from statestep.runtime import StepModel

from ..models import detector
from .feed import BAD, KIND, MAX_MESSAGE_BYTES, PERIOD_SECONDS, READING, TOMBSTONE, messages
from .judge import Seen, judge

COUNT = 1500
MODEL = detector(period_seconds=PERIOD_SECONDS)
Topic = list[Seen]
World = tuple[Topic, Topic, Topic, Topic]


@pytest.fixture(scope="module")
def world() -> World:
    """What goes in, and the outputs, dead letters and states that the real service makes of it in memory."""
    broker = MemoryBroker(partitions=3, topic="readings")
    for fed in islice(messages(seed=4, partitions=3), COUNT):
        broker.append(fed.partition, fed.key, fed.value, headers=((KIND, fed.kind.encode()),))
    adapters = MemorySource(broker), MemorySink(broker), MemoryChangelog(broker)
    build(StepModel(MODEL), *adapters, max_message_bytes=MAX_MESSAGE_BYTES).run()
    inputs = [Seen(p, r.offset, r.key, r.value, dict(r.headers)) for p, log in enumerate(broker.log) for r in log]
    outputs, dead = (
        [Seen(m.partition, place, m.key, m.value, dict(m.headers)) for place, m in enumerate(found)]
        for found in (broker.outputs, broker.dead_letters)
    )
    changelog = [Seen(p, r.offset, r.key, r.value, {}) for p, log in enumerate(broker.changelog) for r in log]
    return inputs, outputs, dead, changelog


def test_an_uninterrupted_run_is_right(world: World) -> None:
    """The bare graph, one message a call, says the same as the service; and the feed held every kind of message."""
    found = judge(MODEL, "readings", *world)
    assert found.faults() == ""
    assert found.messages == found.answers == COUNT
    kinds = {record.headers[KIND].decode() for record in world[0]}
    assert kinds == {READING, TOMBSTONE} | {reason for reason, _ in BAD}
    flags = {flag for record in world[1] if record.value for flag in json.loads(record.value)["flags"]}
    assert flags == {"out_of_order", "gap"}
    values = [record.value for record in world[0] if record.headers[KIND] == READING.encode()]
    assert len(set(values)) < len(values), "no duplicates were fed"


def lose_an_output(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    del outputs[700]


def double_an_output(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    outputs.insert(900, outputs[700])


def swap_two_outputs(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    place = next(i for i in range(700, len(outputs)) if outputs[i].partition == outputs[i + 1].partition)
    outputs[place : place + 2] = [outputs[place + 1], outputs[place]]


def turn_one_bit(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    """The last one of a float32's 24 bits."""
    document = json.loads(outputs[700].value or b"")
    document["prediction"]["flow"] *= 1 + 2**-23
    outputs[700] = outputs[700]._replace(value=json.dumps(document).encode())


def skip_a_step(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    """As if the state of one message had been lost."""
    document = json.loads(outputs[700].value or b"")
    document["step"] -= 1
    outputs[700] = outputs[700]._replace(value=json.dumps(document).encode())


def take_the_next_ones_answer(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    place = next(i for i in range(700, len(outputs)) if outputs[i].key == outputs[i + 1].key)
    outputs[place] = outputs[place]._replace(value=outputs[place + 1].value)


def lose_a_tombstone(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    outputs.remove(next(record for record in outputs if record.value is None))


def answer_a_tombstone(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    place = next(i for i, record in enumerate(outputs) if record.value is None)
    outputs[place] = outputs[place]._replace(value=outputs[0].value)


def move_to_another_partition(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    outputs[700] = outputs[700]._replace(partition=outputs[700].partition + 1)


def answer_what_nobody_asked(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    headers = outputs[700].headers | {"statestep.source.offset": b"100000"}
    outputs.append(outputs[700]._replace(headers=headers))


def lose_a_dead_letter(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    del dead[50]


def double_a_dead_letter(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    dead.append(dead[50])


def cut_a_dead_letter(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    place = next(i for i, record in enumerate(dead) if record.value)
    dead[place] = dead[place]._replace(value=(dead[place].value or b"")[:-1])


def refuse_for_another_reason(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    dead[50] = dead[50]._replace(headers=dead[50].headers | {"__streams.errors.exception": b"bad-luck"})


def last_of(changelog: Topic, wanted: Callable[[Seen], bool]) -> int:
    return max(i for i, record in enumerate(changelog) if wanted(record))


def lose_the_last_state(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    """What is left is that of an earlier message."""
    del changelog[last_of(changelog, lambda record: record.key == b"severywhere")]


def turn_one_bit_of_a_state(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    """With a right checksum, as of a stream that was stepped wrongly."""
    rewrite(changelog, b"everywhere", bit=1)


def keep_the_state_of_a_stream_that_has_none(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    rewrite(changelog, b"ghost", bit=0)


def rewrite(changelog: Topic, key: bytes, bit: int) -> None:
    """Write the state of a stream once more, under `key` and with the last bit of each number turned or not."""
    codec = StateCodec(StepModel(MODEL).contract)
    record = changelog[last_of(changelog, lambda record: record.key == b"severywhere")]
    found = codec.decode([StateRecord(record.partition, b"severywhere", record.value)])
    found.records.states[0].view(np.int32)[...] ^= bit
    [written] = codec.encode(record.partition, [key], found.records, int(found.epochs[0]))
    changelog.append(record._replace(key=written.key, value=written.value))


def lose_the_last_marker(outputs: Topic, dead: Topic, changelog: Topic) -> None:
    del changelog[last_of(changelog, lambda record: record.key == MARKER)]


@pytest.mark.parametrize(
    ("doctor", "fault"),
    [
        (lose_an_output, "missing"),
        (double_an_output, "doubled"),
        (swap_two_outputs, "disordered"),
        (turn_one_bit, "wrong"),
        (skip_a_step, "wrong"),
        (take_the_next_ones_answer, "wrong"),
        (lose_a_tombstone, "missing"),
        (answer_a_tombstone, "wrong"),
        (move_to_another_partition, "wrong"),
        (answer_what_nobody_asked, "wrong"),
        (lose_a_dead_letter, "missing"),
        (double_a_dead_letter, "doubled"),
        (cut_a_dead_letter, "wrong"),
        (refuse_for_another_reason, "wrong"),
        (lose_the_last_state, "states"),
        (turn_one_bit_of_a_state, "states"),
        (keep_the_state_of_a_stream_that_has_none, "states"),
        (lose_the_last_marker, "states"),
    ],
)
def test_a_doctored_output_is_found(world: World, doctor: Callable[[Topic, Topic, Topic], None], fault: str) -> None:
    """One change to a right output gives just one fault, of the kind that it is."""
    inputs, *others = world
    outputs, dead, changelog = (list(topic) for topic in others)
    doctor(outputs, dead, changelog)
    found = judge(MODEL, "readings", inputs, outputs, dead, changelog)
    assert [name for name in ("missing", "doubled", "wrong", "disordered", "states") if getattr(found, name)] == [fault]
    assert len(getattr(found, fault)) == 1
    assert fault in found.faults()
    assert (found.faults(doubles=True) == "") == (fault == "doubled")
