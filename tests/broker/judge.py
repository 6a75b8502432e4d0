"""Says whether what came out is what had to come out, without asking the code that is judged.

The reference steps the model's graph by onnxruntime alone, one message a call, each stream by itself, in the order in
which the messages lie in the input topic. Every answer must be there once, in order, equal to the last bit, and so must
the states that the changelog holds in the end.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from statestep.consumers.changelog import MARKER, StateCodec, decode_marker
from statestep.consumers.ports import StateRecord
from statestep.runtime import Contract, StepModel, session_options

from .feed import KIND, PERIOD_SECONDS, READING, TOMBSTONE

Array = np.ndarray[Any, Any]
Place = tuple[int, int]  # (partition, offset) of an input record
GAP_PERIODS = 1.5
MAX_KEY_BYTES = 4096  # of a dead letter
SHOWN = 5  # faults of a kind that a message repeats


class Seen(NamedTuple):
    """A record as it lies in a topic."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: dict[str, bytes]


class Answer(NamedTuple):
    """What an input record must be answered with: a `document`, a null (tombstones), or a dead letter's `reason`."""

    kind: str
    key: bytes | None
    value: bytes | None = None  # of a dead letter
    document: dict[str, Any] | None = None


@dataclass(slots=True)
class Verdict:
    """What was found; each list has a sentence for each fault."""

    messages: int = 0
    answers: int = 0
    streams: int = 0  # that live in the end
    missing: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    disordered: list[str] = field(default_factory=list)
    states: list[str] = field(default_factory=list)

    def faults(self, *, doubles: bool = False) -> str:
        """All that is wrong in a few lines, or nothing; `doubles` are forgiven where delivery is at-least-once."""
        kinds = {"missing": self.missing, "wrong": self.wrong, "disordered": self.disordered, "states": self.states}
        if not doubles:
            kinds["doubled"] = self.doubled
        return "\n".join(
            f"{len(found)} of {self.messages} {kind}: {'; '.join(found[:SHOWN])}"
            for kind, found in kinds.items()
            if found
        )


class Reference:
    """Each stream by itself through the bare graph."""

    def __init__(self, model: bytes, topic: str) -> None:
        loaded = StepModel(model)
        self.contract: Contract = loaded.contract
        self._named = {
            "name": self.contract.name,
            "version": self.contract.model_version,
            "sha256": loaded.fingerprint,
        }
        self._topic = topic
        self._session = ort.InferenceSession(model, session_options())
        self._outputs = [output.name for output in self._session.get_outputs()]
        self.streams: dict[tuple[int, bytes], dict[str, Any]] = {}  # those that live, by (partition, key)

    def answer(self, record: Seen) -> Answer:
        """What `record` must be answered with, after all that were asked before."""
        kind = record.headers[KIND].decode()
        if kind == TOMBSTONE:
            assert record.key is not None
            self.streams.pop((record.partition, record.key), None)
            return Answer(kind, record.key)
        if kind != READING:
            return Answer(kind, None if record.key is None else record.key[:MAX_KEY_BYTES], record.value)
        return Answer(kind, record.key, document=self._step(record))

    def _step(self, record: Seen) -> dict[str, Any]:
        assert record.key is not None and record.value is not None
        message = json.loads(record.value)
        names = self.contract.feature_names
        x = np.array([[message[name] for name in names]]).astype(np.float32)  # [1, F]
        stream = self.streams.setdefault((record.partition, record.key), self._born())
        found = dict(zip(self._outputs, self._session.run(None, {"x": x} | stream["states"]), strict=True))
        stream["states"] = {state.input: found[state.output] for state in self.contract.states}
        stream["step"] += 1
        stream["offset"] = record.offset
        elapsed = 0 if stream["latest"] is None else message["ts"] - stream["latest"]  # seconds
        stream["latest"] = message["ts"] if stream["latest"] is None else max(stream["latest"], message["ts"])
        flags = ["out_of_order"] * (elapsed < 0) + ["gap"] * (elapsed > GAP_PERIODS * PERIOD_SECONDS)

        def named(output: str) -> dict[str, float]:
            return dict(zip(names, found[output][0].tolist(), strict=True))

        return {
            "stream": record.key.decode(),
            "ts": datetime.fromtimestamp(message["ts"], UTC).isoformat().replace("+00:00", "Z"),
            "step": stream["step"],
            "expected": named("expected") if stream["step"] > 1 else None,
            "prediction": named("prediction"),
            "score": found["score"][0].item(),
            "threshold": found["threshold"][0].item(),
            "anomaly": found["anomaly"][0].item(),
            "flags": flags,
            "warm": None,
            "model": self._named,
            "source": {"topic": self._topic, "partition": record.partition, "offset": record.offset},
        }

    def _born(self) -> dict[str, Any]:
        states = {}
        for state in self.contract.states:
            shape = list(state.shape)
            shape.insert(state.batch_axis, 1)
            states[state.input] = np.full(shape, state.initial, state.dtype)
        return {"states": states, "step": 0, "latest": None}


def judge(
    model: bytes,
    topic: str,
    inputs: Iterable[Seen],
    outputs: Sequence[Seen],
    dead_letters: Sequence[Seen],
    changelog: Sequence[Seen] | None = None,
) -> Verdict:
    """Hold what came out against one uninterrupted run over what went in, each topic's records in their order.

    `changelog` is held against the run's last states, where all services ended in order.
    """
    verdict = Verdict()
    reference = Reference(model, topic)
    owed: dict[Place, Answer] = {}
    ends: dict[int, int] = defaultdict(int)
    for record in inputs:
        assert record.offset == ends[record.partition], f"the input has a hole before {record[:2]}"
        ends[record.partition] += 1
        owed[record.partition, record.offset] = reference.answer(record)
    verdict.messages = len(owed)
    verdict.streams = len(reference.streams)
    verdict.answers = len(outputs) + len(dead_letters)
    answered = _go_through(outputs, owed, verdict, dead=False) | _go_through(dead_letters, owed, verdict, dead=True)
    verdict.missing += [f"{place} ({owed[place].kind})" for place in sorted(owed.keys() - answered)]
    if changelog is not None:
        _compare_states(reference, changelog, ends, verdict)
    return verdict


def _compare_states(reference: Reference, changelog: Sequence[Seen], ends: dict[int, int], verdict: Verdict) -> None:
    """Note where the last record of a stream is not its last state, or a partition's marker not at its end."""
    last = {(record.partition, record.key): record for record in changelog}
    for partition, end in ends.items():
        marker = last.pop((partition, MARKER), None)
        found = None if marker is None or marker.value is None else decode_marker(marker.value)
        if found is None or (found.redo, found.next) != (end, end):
            verdict.states.append(f"the input's partition {partition} ends at {end}, its marker is {found}")
    records = [StateRecord(r.partition, r.key or b"", r.value, r.offset) for r in last.values() if r.value is not None]
    decoded = StateCodec(reference.contract).decode(records)
    held = {place: row for row, place in enumerate(zip(decoded.partitions, decoded.keys, strict=True))}
    verdict.states += [f"{place} is dead or was never born" for place in held.keys() - reference.streams.keys()]
    for place, stream in reference.streams.items():
        if (row := held.get(place)) is None:
            verdict.states.append(f"{place} is not there")
            continue
        found_states = [array[row] for array in decoded.records.states]
        states = [np.take(stream["states"][state.input], 0, state.batch_axis) for state in reference.contract.states]
        same = all(np.array_equal(a, b) for a, b in zip(found_states, states, strict=True))
        numbers = [int(column[row]) for column in (decoded.records.step, decoded.records.time, decoded.records.offset)]
        if not same or numbers != [stream["step"], stream["latest"] * 10**9, stream["offset"]]:
            verdict.states.append(
                f"{place} has step, time and offset {numbers}, tensors {'right' if same else 'wrong'}"
            )


def _go_through(records: Sequence[Seen], owed: dict[Place, Answer], verdict: Verdict, *, dead: bool) -> set[Place]:
    """Note what is wrong with the records of one topic; gives the places that they answer."""
    prefix = "__streams.errors" if dead else "statestep.source"
    last: dict[int, int] = {}
    seen: set[Place] = set()
    for record in records:
        place = int(record.headers[f"{prefix}.partition"]), int(record.headers[f"{prefix}.offset"])
        answer = owed.get(place)
        if answer is None:
            verdict.wrong.append(f"{place} was never asked")
        elif reason := _difference(record, place, answer, dead=dead):
            verdict.wrong.append(f"{place} ({answer.kind}): {reason}")
        if place in seen:
            verdict.doubled.append(f"{place}")
            continue
        seen.add(place)
        partition, offset = place
        if offset < last.get(partition, -1):
            verdict.disordered.append(f"{place} comes after offset {last[partition]}")
        last[partition] = offset
    return seen


def _difference(record: Seen, place: Place, answer: Answer, *, dead: bool) -> str | None:
    """How an answer differs from what was owed, or None."""
    if dead != (answer.kind not in (READING, TOMBSTONE)):
        return "is in the wrong topic"
    if record.partition != place[0]:
        return f"is in partition {record.partition}"
    if record.headers.get(KIND) != answer.kind.encode():
        return "has lost the header of the input"
    if record.key != answer.key:
        return f"has the key {record.key!r}, not {answer.key!r}"
    if dead:
        reason = record.headers["__streams.errors.exception"].decode()
        if reason != answer.kind:
            return f"was refused as {reason}"
        return None if record.value == answer.value else "has another value"
    if answer.document is None or record.value is None:
        return None if answer.document is None and record.value is None else "is null, or should be"
    found = json.loads(record.value)
    apart = [name for name in answer.document.keys() | found.keys() if found.get(name) != answer.document.get(name)]
    if not apart:
        return None
    name = min(apart)
    return f"{name} is {found.get(name)}, not {answer.document.get(name)}"
