"""What a detector does in a timestep: rules of a few nodes each, with state pairs, and `rows`, which joins them.

Per feature there is *evidence*, squared and without a unit, 1 being usual. The largest of

    error    the forecast's error in units of its usual size
    others   how far a reading is from what the other readings of its row say, in units of that error's usual size; of a
             lone feature they say nothing but its mean, so it is called its level
    range    how far it is beyond all that training has seen, in twentieths of that range
    stuck    for how long it has not moved, in units of the longest such time of training

is smoothed, s ← α·e + (1−α)·s (Roberts, Technometrics 1, 1959), and the features' log(1 + s) are combined to the score:
their mean, the mean of the largest quarter, or the largest. A rule may set that against the stream's own past: by
*likelihood* (after Ahmad et al., Neurocomputing 262, 2017) or *conformal*, a rank in a ring of scores, with an
exponential tail beyond it. What lies over the threshold begins an *event*, which some calm timesteps end. The threshold
moves slowly, so that events come as often as was asked for (after Gibbs and Candès, NeurIPS 2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from statestep.export.detector import LEAST_VARIANCE, LEVEL, Detector, Forecasts
from statestep.export.scaler import LIMIT
from statestep.export.terms import Term, Terms
from statestep.runtime import NO_TIME

MARGIN = 0.05  # of the range that training has seen, on either side of it
LEAST_MARGIN = 0.05  # standard deviations; a feature that never moved may move so little
REACH = 10.0  # standard units; a reading further out says no more about the others
FASTEST = 4.0  # usual sizes; what is further off moves what is usual of a stream no more than that
FEWEST = 8.0  # timesteps that what is usual of a stream is a mean of at least
LARGEST = float(np.finfo(np.float32).max)  # a finite reading makes no number that is not
TINY = 1e-30  # a decaying state is cut to zero here, long before it becomes a denormal number, which is slow
LEAST_SQUARE = 1e-6  # of a stream's own errors, in its own standard units; from 0 a unit could not grow again
STUCK = 4.0  # evidence of a sensor that has not moved for as long as was possible
GAIN = 0.05  # by which share an event raises the threshold
LOWEST, HIGHEST = 0.5, 4.0  # of the calibrated threshold
SLOW = 1 / 500  # weight of the newest timestep in what is watched for drift
DRIFTED = 0.5  # share of late timesteps that are not as in training
SHORT = 0.2  # weight of the newest score in the likelihood's short mean
TAIL = 0.1  # of the ring's scores: their excess is the scale of the exponential tail
LEAST_SCALE = 1e-6

States = Mapping[str, Term]
Values = dict[str, Term]


class Given(NamedTuple):
    """What a detector reads of one timestep of B streams."""

    x: Term  # [B, F] where a reading was missing, what stands in for it
    missing: Term  # bool [B, F]
    prediction: Term  # [B, K] for the next timestep
    z: Term | None  # [B, F] and
    std: Term | None  # [B, F] in each stream's own standard units
    time: Term  # int64 [B, 1] ns since the epoch


def stood_in(d: Forecasts, g: Terms, x: Term, states: States) -> tuple[Term, Term]:
    """x [B, F] with NaN where readings are missing → x with the stream's own forecasts there, and bool [B, F] where.

    A feature that is not forecast keeps its last reading.
    """
    count = len(d.targets)
    places = [d.targets.index(k) if k in d.targets else count + k for k in range(d.width)]
    known = g.columns(g.joined(states["forecast"], states["last"]), places)  # [B, F]
    missing = g.node("IsNaN", x)
    return g.where(missing, known, x), missing


def rows(d: Forecasts, g: Terms, given: Given, states: States) -> tuple[Values, Values]:
    """One timestep: outputs, and next states by the name of the state."""
    after: Values = {"forecast": given.prediction, "last": g.where(given.missing, states["last"], given.x)}
    out: Values = {"expected": states["forecast"]}
    if not isinstance(d, Detector):
        return out, after
    judged = states["seen"] >= g.whole(d.warm)  # [B, 1]
    after["seen"] = g.smallest(states["seen"] + g.whole(1), g.whole(max(d.warm, d.window)))
    z = given.z or g.clipped((given.x - d.mean) / d.std, -LIMIT, LIMIT)  # [B, F]
    evidence = _evidence(d, g, given, z, states, out, after)  # [B, F] each
    logs = _smoothed(d, g, evidence, judged, given.missing, states, after)  # [B, F]
    plain = _combined(d, g, logs)  # [B, 1]
    score = _against_own_past(d, g, plain, states, after)
    threshold = _threshold(d, g, states)
    blank = g.most(1.0 - g.cast(given.missing, "float32")) < 0.5  # [B, 1] a timestep without any reading
    over = (score > threshold) & judged  # [B, 1]
    total = g.total(logs, d.width)  # [B, 1]
    out |= {"score": g.flat(score), "threshold": g.flat(threshold), "anomaly": g.flat(over)}
    out["contribution"] = logs / g.largest(total, TINY)
    out["reason"] = _reason(d, g, evidence)
    _event(d, g, score / threshold, over, judged, blank, given.time, states, out, after)
    _drift(d, g, z, plain, judged, given.missing, states, out, after)
    return out, after


def _evidence(d: Detector, g: Terms, given: Given, z: Term, states: States, out: Values, after: Values) -> Values:
    """Each kind of evidence that there is, [B, F]."""
    found = {"error": _error(d, g, given, states, after)}
    if d.others is not None:
        assert d.others_spread is not None
        said = g.clipped(z, -REACH, REACH) @ d.others.astype(np.float32)  # [B, F]
        found["others" if d.width > 1 else LEVEL] = _apart(
            d, g, g.clipped((z - said) / d.others_spread, -LIMIT, LIMIT), given, states, after
        )
        related = given.x + (said - z) * (d.std if given.std is None else given.std)
        out["related"] = g.clipped(related, -LARGEST, LARGEST)
    if d.low is not None:
        assert d.high is not None
        margin = np.maximum(MARGIN * (d.high - d.low), LEAST_MARGIN)  # [F]
        beyond = g.largest((d.low - margin) - z, z - (d.high + margin), 0.0)
        beyond = g.smallest(beyond / margin, LIMIT)
        found["range"] = beyond * beyond
    if d.still is not None:
        limit = np.where(np.isfinite(d.still), np.maximum(d.still, 1.0), LIMIT)  # [F]
        run = g.smallest(g.where(given.x == states["last"], states["still"] + 1.0, 0.0), LIMIT)  # [B, F]
        after["still"] = g.where(given.missing, states["still"], run)
        ratio = run / limit
        found["stuck"] = g.where(ratio > 1.0, STUCK * (ratio * ratio), 0.0)
    return found


def _apart(d: Detector, g: Terms, apart: Term, given: Given, states: States, after: Values) -> Term:
    """How far a reading is from what the others say, squared, [B, F]; less what is usual of this stream.

    Streams differ a little in how their features belong together. What is usual is a mean over the window, from which
    one timestep moves it by `FASTEST` usual sizes at most, so that a fault becomes usual slowly.
    """
    usual = states["usual_apart"]
    count = g.clipped(g.cast(states["seen"], "float32") + 1.0, FEWEST, float(d.window))  # [B, 1]
    moved = usual + g.clipped(apart - usual, -FASTEST, FASTEST) / count
    after["usual_apart"] = g.where(given.missing, usual, _cut(g, moved))
    off = apart - usual
    return off * off


def _error(d: Detector, g: Terms, given: Given, states: States, after: Values) -> Term:
    """The squared error of the forecast for this timestep, [B, F]; 0 for a feature that is not forecast."""
    targets = list(d.targets)
    plain = targets == list(range(d.width))
    of = (lambda value: value) if plain else (lambda value: g.columns(value, targets))
    miss = of(given.x) - states["forecast"]  # [B, K]
    if d.per_stream:
        assert given.std is not None
        miss = g.clipped(miss / of(given.std), -LIMIT, LIMIT)
        square = miss * miss
        after["usual_error"] = _own_unit(d, g, square, of(given.missing), states)
        error = g.smallest(square / g.largest(states["usual_error"], LEAST_SQUARE), LIMIT)
    else:
        miss = g.clipped(miss / (d.std[targets] * d.spread), -LIMIT, LIMIT)
        error = miss * miss
    if plain:
        return error
    places = [targets.index(k) if k in targets else len(targets) for k in range(d.width)]
    return g.columns(g.joined(error, g.most(error) * 0.0), places)


def _own_unit(d: Detector, g: Terms, square: Term, missing: Term, states: States) -> Term:
    """A stream's own mean squared error, [B, K]: plainly while it is warming, over the window from there on."""
    before, age = states["usual_error"], g.cast(states["seen"], "float32")
    warmed = states["seen"] >= g.whole(d.warm)  # [B, 1]
    weight = g.where(warmed, 1.0 / max(d.window, d.warm), 1.0 / g.largest(age, 1.0))
    now = g.where(warmed, g.smallest(square, FASTEST**2 * before), square)
    moved = g.largest(before + (now - before) * weight, LEAST_SQUARE)
    return g.where(missing | (states["seen"] == g.whole(0)), before, moved)  # at its birth it had no forecast


def _smoothed(
    d: Detector, g: Terms, evidence: Values, judged: Term, missing: Term, states: States, after: Values
) -> Term:
    """log(1 + s) of the smoothed evidence s, [B, F]."""
    strongest = g.largest(*evidence.values()) if len(evidence) > 1 else evidence["error"]
    moved = d.alpha * g.where(judged, strongest, 0.0) + (1 - d.alpha) * states["error"]
    moved = g.where(missing, states["error"], moved)  # what is missing says nothing
    after["error"] = g.where(moved < TINY, 0.0, moved)
    return g.log1p(after["error"], d.width)


def _combined(d: Detector, g: Terms, logs: Term) -> Term:
    """[B, F] → [B, 1]."""
    if d.width == 1:
        return logs
    if d.combine == "max":
        return g.most(logs)
    if d.combine == "mean":
        return g.mean(logs, d.width)
    count = math.ceil(d.width / 4)
    return g.mean(g.highest(logs, count), count)


def _against_own_past(d: Detector, g: Terms, plain: Term, states: States, after: Values) -> Term:
    """The score by the rule, [B, 1]: `plain` itself, or how unusual it is among the stream's own late scores."""
    if d.rule == "plain":
        return plain
    held, quiet = states["scores"], states["length"] == g.whole(0)  # an event does not become usual
    if d.rule == "likelihood":
        short, mean, variance = (g.columns(held, [k]) for k in range(3))  # [B, 1]
        now, weight = _cut(g, SHORT * plain + (1 - SHORT) * short), 1 / d.window
        apart = plain - mean
        spread = (1 - weight) * (variance + weight * (apart * apart))
        moved = g.joined(now, _cut(g, mean + weight * apart), g.largest(spread, LEAST_VARIANCE))
        after["scores"] = g.where(quiet, moved, g.joined(now, mean, variance))
        return g.largest((now - mean) / g.node("Sqrt", variance), 0.0)
    after["scores"] = g.where(quiet, g.joined(g.columns(held, range(1, d.window)), plain), held)
    count = max(math.ceil(TAIL * d.window), 2)
    top = g.highest(held, count)  # [B, count]
    edge = g.columns(top, [count - 1])  # [B, 1]
    scale = g.largest(g.mean(top - edge, count), LEAST_SCALE)
    rank = g.total(g.cast(held >= plain, "float32"), d.window)  # [B, 1]
    share = -np.log10((np.arange(d.window + 1) + 1) / (d.window + 1))  # [window + 1] of each rank
    inside = g.node("Gather", g.constant(share), g.cast(rank, "int64"), axis=0)  # [B, 1]
    beyond = (plain - edge) / (scale * math.log(10)) + math.log10((d.window + 1) / count)
    return g.where(plain > edge, beyond, inside)


def _cut(g: Terms, value: Term) -> Term:
    """Nothing where next to nothing is left."""
    return g.where(g.node("Abs", value) < TINY, 0.0, value)


def _threshold(d: Detector, g: Terms, states: States) -> Term:
    """[B, 1], moved by the stream's ticks: an event is `every` ticks up, a timestep is one down."""
    share = g.cast(states["ticks"], "float32") * (GAIN / d.every if d.every else 0.0)
    return d.threshold * g.clipped(share + 1.0, LOWEST, HIGHEST)


def _reason(d: Detector, g: Terms, evidence: Values) -> Term:
    """The kind of each feature's strongest evidence at this timestep: int64 [B, F], a place in `d.evidence`."""
    found = g.node("Concat", *(g.node("Unsqueeze", value, g.whole([2])) for value in evidence.values()), axis=2)
    assert tuple(evidence) == d.evidence, (tuple(evidence), d.evidence)
    return g.node("ArgMax", found, axis=2, keepdims=0)


def _event(
    d: Detector,
    g: Terms,
    ratio: Term,
    over: Term,
    judged: Term,
    blank: Term,
    time: Term,
    states: States,
    out: Values,
    after: Values,
) -> None:
    """Where an event begins, goes on and ends.

    `event` counts its timesteps: n at its n-th, −n at the n-th that is its last, 0 outside. `severity` is the highest
    score so far in units of the threshold. A timestep without any reading begins none and ends none.
    """
    none, one = g.whole(0), g.whole(1)
    length = states["length"]  # [B, 1] timesteps so far
    on = length > none
    begins = over & ~(on | blank)
    quiet = g.where(blank, states["quiet"], g.where(over, none, states["quiet"] + one))
    ends = on & ~blank & (quiet >= g.whole(d.calm))
    goes_on = begins | (on & ~ends)
    count = g.where(begins, one, length + one)
    since = g.where(begins, time, states["began"])
    peak = g.where(begins, ratio, g.largest(states["peak"], ratio))
    after["length"] = g.where(goes_on, count, none)
    after["quiet"] = g.where(goes_on, quiet, none)
    after["began"] = g.where(goes_on, since, g.whole(int(NO_TIME)))
    after["peak"] = g.where(goes_on, peak, 0.0)
    shown = goes_on | ends
    out["event"] = g.flat(g.where(ends, g.node("Neg", count), after["length"]))
    out["since"] = g.flat(g.where(shown, since, g.whole(int(NO_TIME))))
    out["severity"] = g.flat(g.where(shown, peak, 0.0))
    if d.every is None:
        after["ticks"] = g.node("Identity", states["ticks"])
        return
    moved = states["ticks"] + g.where(begins, g.whole(d.every), none) - g.cast(judged & ~blank, "int64")
    low, high = (int((bound - 1) / GAIN * d.every) for bound in (LOWEST, HIGHEST))
    after["ticks"] = g.node("Min", g.node("Max", moved, g.whole(low)), g.whole(high))


def _drift(
    d: Detector, g: Terms, z: Term, plain: Term, judged: Term, missing: Term, states: States, out: Values, after: Values
) -> None:
    """The share of late timesteps that are not as in training: readings by feature, and the score; and the status."""
    status = g.cast(judged, "int64")
    if d.usual_low is not None:
        assert d.usual_high is not None
        odd = g.cast((z - d.usual_low < 0.0) | (z - d.usual_high > 0.0), "float32")  # [B, F]
        high = g.cast(plain > d.usual_score, "float32")  # [B, 1]
        before = states["outside"]  # [B, F + 1]
        moved = before + SLOW * (g.joined(odd, high) - before)
        held = g.joined(missing, ~judged)
        after["outside"] = g.where(held, before, g.where(moved < TINY, 0.0, moved))
        out["drift"] = g.columns(after["outside"], range(d.width))
        out["score_drift"] = g.flat(g.columns(after["outside"], [d.width]))
        drifting = judged & (g.most(after["outside"]) > DRIFTED)
        status = status + g.cast(drifting, "int64")
    out["status"] = g.flat(status)
