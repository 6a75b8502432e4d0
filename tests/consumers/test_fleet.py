"""The simulated fleet is the same for a seed, believable, and wrong exactly where its faults say."""

import json
from collections import Counter

import numpy as np
import pytest

from statestep.consumers.fleet import KINDS, PERIOD_SECONDS, QUIET_STEPS, SENSORS, START_NS, simulate

SEEDS = range(8)


def test_a_seed_gives_one_fleet() -> None:
    """The same seed gives the same readings, faults and messages; another seed gives others."""
    first, again, other = (simulate(pumps=5, days=3, seed=seed) for seed in (11, 11, 12))
    assert first.faults == again.faults
    np.testing.assert_array_equal(first.values, again.values)
    assert list(first.messages()) == list(again.messages())
    assert not np.array_equal(first.values, other.values)


def test_a_fault_changes_its_readings_and_nothing_else() -> None:
    """The faulty fleet equals the clean one of its seed but for the sensors and times that its faults name."""
    faulty, clean = (simulate(pumps=40, days=20, seed=3, faulty=faulty) for faulty in (True, False))
    assert clean.faults == ()
    named = np.zeros(clean.values.shape, bool)  # [T, P, 3]
    for fault in faulty.faults:
        named[fault.start : fault.end, fault.pump, fault.sensor] = True
        span = slice(fault.start, fault.end)
        assert (faulty.values[span, fault.pump, fault.sensor] != clean.values[span, fault.pump, fault.sensor]).any()
    np.testing.assert_array_equal(faulty.values[~named], clean.values[~named])


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_fault_is_what_it_is_called(kind: str) -> None:
    """A spike and a drift add what they say, evenly growing for a drift; stuck repeats; a drop-out reads zero."""
    faulty, clean = (simulate(pumps=40, days=40, seed=5, faulty=faulty) for faulty in (True, False))
    faults = [fault for fault in faulty.faults if fault.kind == kind]
    assert len(faults) > 10
    for fault in faults:
        place = (slice(fault.start, fault.end), fault.pump, fault.sensor)
        read, true = faulty.values[place], clean.values[place]  # each [end - start]
        if kind == "stuck":
            assert set(read.tolist()) == {faulty.values[fault.start - 1, fault.pump, fault.sensor]}
        elif kind == "drop-out":
            assert not read.any()
        else:
            share = np.linspace(1 / len(read), 1, len(read)) if kind == "drift" else np.ones(len(read))
            unclipped = read > 0  # a sensor reads nothing below zero
            half_a_digit = 0.5 * 10.0 ** -SENSORS[fault.sensor].decimals
            np.testing.assert_allclose(
                (read - true)[unclipped], (share * fault.size)[unclipped], atol=2.1 * half_a_digit
            )


def test_faults_come_one_at_a_time_with_quiet_between() -> None:
    """On each pump a day without a fault comes first and after each; each fault's length is within its kind's."""
    for seed in SEEDS:
        fleet = simulate(pumps=20, days=30, seed=seed)
        for pump in range(20):
            end = 0
            for fault in (fault for fault in fleet.faults if fault.pump == pump):
                assert fault.start - end >= QUIET_STEPS, f"seed {seed}: {fault}"
                least, most = KINDS[fault.kind].steps
                assert least <= fault.end - fault.start <= most
                end = fault.end
            assert end <= len(fleet.times)
    kinds = Counter(fault.kind for seed in SEEDS for fault in simulate(seed=seed).faults)
    assert min(kinds.values()) > 0.1 * kinds.total()


def test_sensors_are_correlated_and_noisy() -> None:
    """Load drives all sensors: pairwise |correlation| over 0.8. Noise is a good part of the change in five minutes."""
    values = simulate(pumps=10, days=10, seed=1, faulty=False).values.reshape(-1, 10, 3)
    correlation = np.corrcoef(values.reshape(-1, 3).T)  # [3, 3]
    assert (np.abs(correlation) > 0.8).all()
    change = np.diff(values, axis=0).std(axis=(0, 1))  # [3]
    noise = np.sqrt(2) * np.array([sensor.noise for sensor in SENSORS])
    assert (noise / change > 0.7).all()
    assert (noise < change).all()


def test_load_has_the_day_in_it() -> None:
    """At four in the morning flow is far below its level at eight in the evening, on every day."""
    flow = simulate(pumps=20, days=7, seed=2, faulty=False).values[..., 0].mean(axis=1).reshape(7, 24, 12).mean(axis=2)
    assert (flow[:, 20] > 1.8 * flow[:, 3]).all()


def test_messages_carry_the_readings_bit_for_bit() -> None:
    """Each pump's messages parse to the float32 readings and times of the arrays, in time order, pumps shuffled."""
    fleet = simulate(pumps=4, days=1.5, seed=9)
    names = [sensor.name for sensor in SENSORS]
    rows = list(fleet.messages())
    assert [when for _, _, when in rows] == sorted(when for _, _, when in rows)
    for column, key in enumerate(fleet.keys):
        mine = [(json.loads(value), when) for other, value, when in rows if other == key]
        read = np.array([[reading[name] for name in names] for reading, _ in mine], np.float32)  # [T, 3]
        np.testing.assert_array_equal(read, fleet.values[:, column])
        assert [when * 1_000_000 for _, when in mine] == fleet.times.tolist()
        stamps = np.array([reading["ts"].removesuffix("Z") for reading, _ in mine], "datetime64[ns]")
        np.testing.assert_array_equal(stamps.astype(np.int64), fleet.times)
    orders = {tuple(key for key, _, _ in rows[at : at + 4]) for at in range(0, len(rows), 4)}
    assert len(orders) == 24


def test_time_starts_where_asked_and_goes_by_five_minutes() -> None:
    """`start_ns` moves the fleet in time, the hour of day with it."""
    noon = START_NS + 12 * 3600 * 10**9
    fleet = simulate(pumps=30, days=1, seed=4, start_ns=noon, faulty=False)
    assert fleet.times[0] == noon
    assert set(np.diff(fleet.times).tolist()) == {PERIOD_SECONDS * 10**9}
    midnight = simulate(pumps=30, days=1, seed=4, faulty=False)
    assert fleet.values[:12, :, 0].mean() > midnight.values[:12, :, 0].mean() + 10


def test_a_fleet_of_nothing_is_refused() -> None:
    """No pump or no timestep is a ValueError that says so."""
    with pytest.raises(ValueError, match="fleet of 0 pumps"):
        simulate(pumps=0, seed=1)
    with pytest.raises(ValueError, match=r"over 0\.0 days"):
        simulate(days=0.0, seed=1)
