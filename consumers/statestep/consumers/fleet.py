"""A simulated fleet of water pumps: sensor readings every five minutes, with faults whose time and place are known.

Pure numpy: the same seed gives the same fleet. What happens in a pump, and why a forecaster of it has to remember:

1. *Load* follows the hour of day (a morning and an evening peak), a demand that all pumps share and one of its own.
2. *Flow* is proportional to load, *pressure* falls along the pump's curve as flow rises, the *motor's temperature*
   follows load with a lag of three quarters of an hour, over the air of the pump house.
3. Pumps differ a little; every sensor adds white noise. So the best forecast weighs all three sensors over the last
   hours, and a sensor that leaves the others shows in it.

A fault changes one sensor's reading, never the pump: a *spike* (one to three readings), a *drift* (grows evenly, then
is put right), a *stuck* sensor (repeats its last reading), a *drop-out* (reads zero).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

PERIOD_SECONDS = 300
STEPS_PER_HOUR = 3600 // PERIOD_SECONDS
STEPS_PER_DAY = 24 * STEPS_PER_HOUR
START_NS = 1_767_571_200_000_000_000  # 2026-01-05 00:00 UTC, a Monday
PORTION_RECORDS = 4096  # once a portion has them it is handed out: a pace that cannot be kept does not pile up
IDLE_SECONDS = 0.01  # for whoever is handed an empty portion, before the next one
QUIET_STEPS = STEPS_PER_DAY  # without a fault at a pump's start and between two of its faults
MEAN_WAIT_STEPS = 8 * STEPS_PER_DAY  # from the end of that quiet to the next fault, on average

Array = np.ndarray[Any, np.dtype[np.float64]]


class Sensor(NamedTuple):
    """What a pump reports: a column of the readings."""

    name: str
    unit: str
    decimals: int  # as the sensor gives them
    noise: float  # standard deviation of its white noise, in its unit
    differs: float  # standard deviation of a pump's constant difference, in its unit


SENSORS = (
    Sensor("flow_m3h", "m³/h", 1, 3.0, 1.5),
    Sensor("pressure_bar", "bar", 2, 0.06, 0.03),
    Sensor("motor_c", "°C", 1, 0.6, 0.4),
)


# The end of a message: a reading in JSON with as many digits as its sensor gives.
BODY = ",".join(f'"{sensor.name}":%.{sensor.decimals}f' for sensor in SENSORS)


class Kind(NamedTuple):
    """How long a kind of fault lasts and how large it is, each drawn evenly between two bounds."""

    steps: tuple[int, int]  # both included
    size: tuple[float, float]  # in standard deviations of the sensor's noise


KINDS = {
    "spike": Kind((1, 3), (6.0, 20.0)),
    "drift": Kind((6 * STEPS_PER_HOUR, 24 * STEPS_PER_HOUR), (6.0, 15.0)),  # the size that it has grown to at its end
    "stuck": Kind((4 * STEPS_PER_HOUR, 12 * STEPS_PER_HOUR), (0.0, 0.0)),
    "drop-out": Kind((STEPS_PER_HOUR // 2, 3 * STEPS_PER_HOUR), (0.0, 0.0)),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One sensor of one pump that reads wrong in the timesteps `start` to `end`, the last not included."""

    pump: int
    sensor: int
    kind: str
    start: int
    end: int
    size: float  # what is added, in the sensor's unit; 0 for the kinds that replace the reading


class Reading(NamedTuple):
    """One message of a pump: all its sensors at one timestep."""

    key: bytes
    value: bytes  # JSON
    time_ms: int  # since the epoch


@dataclass(frozen=True, slots=True)
class Fleet:
    """The readings of all pumps, and what is wrong with them."""

    seed: int
    values: np.ndarray[Any, np.dtype[np.float32]]  # [T, pumps, 3] as the sensors give them, rounded
    times: np.ndarray[Any, np.dtype[np.int64]]  # [T] ns since the epoch
    faults: tuple[Fault, ...]  # by start

    @property
    def keys(self) -> list[bytes]:
        """The pumps' stream keys, in the order of the second axis of `values`."""
        return [b"pump-%02d" % (pump + 1) for pump in range(self.values.shape[1])]

    def messages(self) -> Iterator[Reading]:
        """Every reading, by time.

        >>> next(simulate(pumps=1, days=1, seed=7).messages()).value
        b'{"ts":"2026-01-05T00:00:00Z","flow_m3h":52.2,"pressure_bar":7.19,"motor_c":24.6}'
        """
        for step in range(len(self.times)):
            yield from self.timestep(step)

    def timestep(self, step: int, time_ns: int | None = None) -> list[Reading]:
        """What the pumps send at one timestep, in any order; `time_ns` puts another time on it than the simulated."""
        time_ns = int(self.times[step]) if time_ns is None else time_ns
        when = datetime.fromtimestamp(time_ns // 1_000_000 / 1000, UTC).isoformat(timespec="auto")
        head = f'{{"ts":"{when.removesuffix("+00:00")}Z",'
        keys, rows = self.keys, self.values[step].tolist()
        order = np.random.default_rng((self.seed, 3, step)).permutation(len(keys)).tolist()
        bodies = [(head + BODY % tuple(rows[pump]) + "}").encode() for pump in order]
        return [Reading(keys[pump], body, time_ns // 1_000_000) for pump, body in zip(order, bodies, strict=True)]


def simulate(pumps: int = 48, days: float = 5.0, *, seed: int, faulty: bool = True, start_ns: int = START_NS) -> Fleet:
    """A fleet over `days` from `start_ns` (ns since the epoch). Without `faulty` it is the same fleet, in order.

    Raises ValueError for less than one pump or one timestep.

    >>> fleet = simulate(pumps=2, days=1, seed=7)
    >>> fleet.values.shape, fleet.values.dtype.name
    ((288, 2, 3), 'float32')
    """
    steps = round(days * STEPS_PER_DAY)
    if pumps < 1 or steps < 1:
        raise ValueError(f"a fleet of {pumps} pumps over {days} days has no readings; ask for at least 1 of each")
    times = start_ns + np.arange(steps, dtype=np.int64) * (PERIOD_SECONDS * 1_000_000_000)  # [T]
    hours = times / 3.6e12 % 24  # [T]
    truth = _pumps(hours, pumps, np.random.default_rng((seed, 0)))  # [T, P, 3]
    noise = np.random.default_rng((seed, 1)).normal(size=truth.shape)
    readings = truth + noise * np.array([sensor.noise for sensor in SENSORS])  # [T, P, 3]
    faults = _draw(pumps, steps, np.random.default_rng((seed, 2))) if faulty else ()
    for fault in faults:
        _apply(fault, readings[:, fault.pump, fault.sensor])
    columns = [np.round(readings[..., column], sensor.decimals) for column, sensor in enumerate(SENSORS)]
    values = np.stack(columns, axis=-1).clip(min=0).astype(np.float32)  # [T, P, 3]
    return Fleet(seed, values, times, faults)


def play(
    fleet: Fleet,
    speed: float,
    *,
    stamp: Callable[[], int] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[list[Reading]]:
    """The fleet's readings in portions: all that are due whenever one is asked for, maybe none.

    `speed` is simulated seconds a second; at 0 everything is due. `stamp` gives the time, in ns since the epoch, that
    is put on a timestep as it falls due, in place of the simulated one.
    """
    began = clock()
    portion: list[Reading] = []
    for step in range(len(fleet.times)):
        while len(portion) >= PORTION_RECORDS or (speed and step * PERIOD_SECONDS > (clock() - began) * speed):
            yield portion
            portion = []
        portion += fleet.timestep(step, stamp() if stamp else None)
    yield portion


def _pumps(hours: Array, pumps: int, rng: np.random.Generator) -> Array:
    """What a perfect sensor would read: [T, pumps, 3]. `hours` is the hour of day [T]."""
    shape = (len(hours), pumps)
    rhythm = 0.6 - 0.25 * np.cos((hours - 3) * 2 * np.pi / 24) - 0.13 * np.cos((hours - 2) * 4 * np.pi / 24)  # [T]
    demand = rhythm[:, None] + 0.04 * _wander((len(hours), 1), 6.0, rng)  # [T, 1]
    load = (demand + 0.03 * _wander(shape, 2.0, rng)).clip(0.15, 1.15)  # [T, P] 1 is the nominal load
    air = 18 + 1.0 * np.sin((hours - 9) * 2 * np.pi / 24)[:, None] + 0.4 * _wander((len(hours), 1), 24.0, rng)  # [T, 1]
    warmth = _lagged(38 * load**1.5, 0.75)  # [T, P] kelvins above the air
    truth: Array = np.stack([150 * load, 7.6 - 2.4 * load**2, air + warmth], axis=-1)  # [T, P, 3]
    differences: Array = rng.normal(size=(pumps, len(SENSORS))) * np.array(
        [sensor.differs for sensor in SENSORS]
    )  # [P, 3]
    return truth + differences


def _wander(shape: tuple[int, int], hours: float, rng: np.random.Generator) -> Array:
    """Noise of unit spread that forgets over `hours`, along the first axis (an AR(1), from its long-run spread)."""
    keep = np.exp(-1 / (hours * STEPS_PER_HOUR))
    noise: Array = rng.normal(size=shape)
    noise[1:] *= np.sqrt(1 - keep**2)
    for t in range(1, len(noise)):
        noise[t] += keep * noise[t - 1]
    return noise


def _lagged(drive: Array, hours: float) -> Array:
    """`drive` [T, P] as something with a time constant of `hours` follows it, from where it would rest."""
    keep = np.exp(-1 / (hours * STEPS_PER_HOUR))
    follows = drive.copy()
    for t in range(1, len(follows)):
        follows[t] = keep * follows[t - 1] + (1 - keep) * drive[t]
    return follows


def _draw(pumps: int, steps: int, rng: np.random.Generator) -> tuple[Fault, ...]:
    """Faults that begin and end within `steps`, on each pump one at a time with quiet between."""
    faults = []
    for pump in range(pumps):
        start = QUIET_STEPS + int(rng.exponential(MEAN_WAIT_STEPS))
        while start < steps:
            name = list(KINDS)[rng.integers(len(KINDS))]
            kind = KINDS[name]
            end = start + int(rng.integers(*kind.steps, endpoint=True))
            sensor = int(rng.integers(len(SENSORS)))
            size = float(rng.uniform(*kind.size) * rng.choice((-1, 1))) * SENSORS[sensor].noise
            if end <= steps:
                faults.append(Fault(pump, sensor, name, start, end, size))
            start = end + QUIET_STEPS + int(rng.exponential(MEAN_WAIT_STEPS))
    return tuple(sorted(faults, key=lambda fault: fault.start))


def _apply(fault: Fault, readings: Array) -> None:
    """Change one sensor's `readings` [T], in place."""
    span = slice(fault.start, fault.end)
    length = fault.end - fault.start
    if fault.kind == "spike":
        readings[span] += fault.size
    elif fault.kind == "drift":
        readings[span] += fault.size * np.arange(1, length + 1) / length
    elif fault.kind == "stuck":
        readings[span] = readings[fault.start - 1]
    else:
        readings[span] = 0.0
