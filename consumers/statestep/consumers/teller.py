"""Reads events off what a model puts out, and off the state of a stream that ends in the middle of one.

A detector counts an event's timesteps in the output of that role: n at the n-th, −n at the n-th that is its last. All
but `event` may be absent from a model; where it is, nothing is told. Nothing is remembered here: what is told follows
from a row's outputs, or from a stream's record, whoever processes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from statestep.consumers.batch import Array, Row
from statestep.consumers.events import Event, Phase, Told, Why, event_id, level_of
from statestep.consumers.times import moment
from statestep.runtime import NO_TIME, Advanced, Contract, Records

NAMED = 5  # features at most that an answer names
STATUS = ("warming", "calibrated", "drifting")  # where a contract does not say what the numbers stand for


class _Seen(NamedTuple):
    """What is known of an event at some timestep."""

    steps: int  # as the model puts it out
    since: int = NO_TIME
    severity: float | None = None


class Teller:
    """What is told of the events of one model's streams, which read one topic."""

    def __init__(self, contract: Contract, topic: str):
        self._topic = topic
        self._places = {name: place for place, name in enumerate(contract.feature_names)}
        self._reasons = words(contract, "evidence", ())
        self._columns = {role: _columns(contract, role) for role in ("contribution", "reason", "related", "expected")}
        inputs = [state.input for state in contract.states]
        held = {role: contract.output(role) for role in ("event", "since", "severity")}
        self._held = {role: inputs.index(o.state) for role, o in held.items() if o is not None and o.state is not None}

    @property
    def reads_records(self) -> bool:
        """Whether the contract says which state holds a stream's event."""
        return "event" in self._held

    def tell(self, rows: Sequence[Row], out: Advanced, kept: Array) -> dict[int, Told]:
        """What is to be told of those of `rows` [n] that belong to an event, by place; `kept` [n] are theirs in `out`.

        Most rows belong to none, and cost a comparison.
        """
        if (counts := out.role("event")) is None:
            return {}
        hit = np.flatnonzero(counts[kept])  # [m] in `rows`
        if not hit.size:
            return {}
        at = kept[hit]  # [m] in `out`
        found = zip(
            counts[at].astype(int).tolist(), _of(out, "since", at, NO_TIME), _of(out, "severity", at, None), strict=True
        )
        steps, whys = out.step[at].tolist(), self._whys([rows[place] for place in hit.tolist()], out, at)
        told = {}
        for place, seen, step, why in zip(hit.tolist(), found, steps, whys, strict=True):
            record, observation = rows[place]
            event = self._event(record.partition, observation.key, _Seen(*seen), step)
            told[place] = Told(event, why)
        return told

    def standing(self, partition: int, key: bytes, held: Records) -> Event | None:
        """The event that a stream is in, by its record (one row); None where it is in none or nothing can be read."""
        if not self.reads_records:
            return None
        found = {role: held.states[place].reshape(-1)[0].item() for role, place in self._held.items()}
        if not found["event"]:
            return None
        seen = _Seen(int(found["event"]), found.get("since", NO_TIME), found.get("severity"))
        return self._event(partition, key, seen, int(held.step[0]))

    def feature(self, column: int) -> str | None:
        """The feature of a column of the contributions; None for −1."""
        return list(self._columns["contribution"])[column] if column >= 0 else None

    def _event(self, partition: int, key: bytes, seen: _Seen, step: int) -> Event:
        """The event of a stream at its timestep `step`."""
        count, since, severity = seen
        steps = abs(count)
        phase: Phase = "end" if count < 0 else "begin" if count == 1 else "on"
        name = event_id(self._topic, partition, key, step - steps + 1, since)
        return Event(name, phase, moment(since), steps, severity, None if severity is None else level_of(severity))

    def _whys(self, rows: Sequence[Row], out: Advanced, at: Array) -> list[list[Why]]:
        """For each row the features that make its score."""
        shares = out.role("contribution")
        if shares is None:
            return [[] for _ in rows]
        order = np.argsort(-shares[at], axis=1, kind="stable")[:, :NAMED].tolist()  # [m, at most NAMED]
        numbers = {role: found[at].tolist() for role in self._columns if (found := out.role(role)) is not None}
        first = out.first[at].tolist()  # at its first timestep a stream had no forecast
        names = list(self._columns["contribution"])
        made = []
        for n, row in enumerate(rows):
            mine = {role: values[n] for role, values in numbers.items() if not (role == "expected" and first[n])}
            chosen = [place for place in order[n] if mine["contribution"][place] > 0]
            made.append([self._why(names[place], row, mine) for place in chosen])
        return made

    def _why(self, feature: str, row: Row, mine: Mapping[str, list[Any]]) -> Why:
        """One feature of one row; `mine` are the row's outputs by role."""

        def of(role: str) -> Any:
            place = self._columns[role].get(feature)
            return mine[role][place] if place is not None and role in mine else None

        seen, related, reason = row.observation.values[self._places[feature]], of("related"), of("reason")
        return Why(
            feature,
            of("contribution"),
            self._reasons[reason] if reason is not None and 0 <= reason < len(self._reasons) else None,
            None if seen is None or math.isnan(seen) else seen,
            of("expected"),
            msgspec.UNSET if related is None else related,
        )


def words(contract: Contract, name: str, otherwise: Sequence[str]) -> tuple[str, ...]:
    """What the numbers of an output stand for, as the contract's `detector` lists it.

    >>> from statestep.runtime import Feature, State
    >>> contract = Contract("m", (Feature("a"),), (State("h", "g", (1,)),), (), detector={"evidence": ["error"]})
    >>> words(contract, "evidence", ()), words(contract, "status", STATUS)[0]
    (('error',), 'warming')
    """
    found = (contract.detector or {}).get(name)
    return tuple(map(str, found)) if isinstance(found, list | tuple) else tuple(otherwise)


def _columns(contract: Contract, role: str) -> dict[str, int]:
    """The features that an output has a column for, each with its place."""
    output = contract.output(role)
    names = () if output is None else output.features or contract.feature_names
    return {name: place for place, name in enumerate(names)}


def _of(out: Advanced, role: str, at: Array, otherwise: Any) -> list[Any]:
    """An output of each of the rows at `at` [m], or what stands for it where the model has none."""
    found = out.role(role)
    return [otherwise] * len(at) if found is None else found[at].tolist()
