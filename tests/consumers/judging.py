"""A small model that judges: the last value as the forecast, and behind it a real detector with all it can tell."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from onnx import helper

from statestep.consumers.memory import MemoryBroker
from statestep.export.compose import Ports, composed
from statestep.export.detector import STATUS, Detector
from statestep.runtime import Contract, Feature, Output, StepModel

from ..models import FEATURES, graph, stamped

HELD = {"event": "length", "since": "began", "severity": "peak"}  # by role, the state that holds it
WARM, CALM = 3, 3
PERIOD_SECONDS = 60
PARTITIONS = 3
DETECTOR = Detector(
    features=FEATURES,
    targets=(0,),  # pressure is not forecast
    mean=np.array([0.0, 5.0]),
    std=np.array([1.0, 2.0]),
    spread=np.array([0.5]),
    others=np.array([[0.0, 0.5], [0.5, 0.0]]),
    others_spread=np.array([1.0, 1.0]),
    low=np.array([-4.0, -4.0]),
    high=np.array([4.0, 4.0]),
    usual_low=np.array([-2.5, -2.5]),
    usual_high=np.array([2.5, 2.5]),
    still=np.array([8.0, 8.0]),
    alpha=0.5,
    usual_score=1.0,
    threshold=1.6,
    every=500,
    calm=CALM,
    warm=WARM,
)


@cache
def judging(without: tuple[str, ...] = (), *, held: bool = True) -> bytes:
    """The model's bytes. `without` are roles that its contract lacks; `held`: it says which states hold events."""
    last = graph(
        [helper.make_node("Gather", ["x", "targets"], ["prediction"], axis=1)],
        {"x": ("float32", ["B", 2])},
        {"prediction": ("float32", ["B", 1])},
        {"targets": np.array([0])},
    )
    made = composed(last, DETECTOR, Ports())
    outputs = [replace(o, state=HELD.get(o.role or "") if held else None) for o in made.outputs]
    outputs.append(Output("prediction", role="prediction", features=FEATURES[:1]))
    contract = Contract(
        name="judge",
        features=tuple(Feature(name) for name in FEATURES),
        states=made.states,
        outputs=tuple(output for output in outputs if output.role not in without),
        missing="own-forecast",
        time_input=made.time,
        period_seconds=PERIOD_SECONDS,
        detector={"evidence": list(DETECTOR.evidence), "status": list(STATUS), "every": DETECTOR.every},
    )
    return stamped(made.graph, contract)


@cache
def judge(without: tuple[str, ...] = (), *, held: bool = True) -> StepModel:
    """`judging`, loaded."""
    return StepModel(judging(without, held=held))


def reading(flow: float | None, pressure: float | None = 5.0, minute: int | None = None) -> bytes:
    """One message; what is None is null, and without a minute there is no time."""
    document: dict[str, Any] = {"flow": flow, "pressure": pressure}
    return json.dumps(document if minute is None else document | {"ts": PERIOD_SECONDS * minute}).encode()


def troubled(count: int = 400, seed: int = 0) -> MemoryBroker:
    """Streams over three partitions that spike now and then, with nulls, tombstones and bad messages among them."""
    chance, broker = np.random.default_rng(seed), MemoryBroker(PARTITIONS)
    for number in range(count):
        flow, pressure = chance.normal(0, 0.3), 5 + chance.normal(0, 0.6)
        if chance.random() < 0.06:
            flow += chance.choice([-1, 1]) * chance.uniform(4, 30)
        key, partition = b"k%d" % chance.integers(3), int(chance.integers(PARTITIONS))
        value: bytes | None = reading(flow, None if chance.random() < 0.05 else pressure, number)
        if chance.random() < 0.02:
            value = None
        elif chance.random() < 0.02:
            value = b"{"
        broker.append(partition, key, value, timestamp_ms=1000 * PERIOD_SECONDS * number)
    return broker
