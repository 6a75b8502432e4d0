"""A detector in plain numpy, float64: one stream, one timestep at a time. The graphs are held to it.

A graph computes in float32, and so a number that lies within a rounding of what it is compared with may fall on the
other side there. The twin says where it is sure that none of its comparisons was so close. Of the code under test it
has the numbers that are set, and no formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from statestep.export import rules
from statestep.export.detector import LEAST_VARIANCE, Detector
from statestep.export.scaler import LIMIT
from statestep.runtime import NO_TIME

Array = np.ndarray[Any, Any]
Forecast = Callable[[int, Array], Array]  # stream, x [F] without holes → [K]

NEAR = 1e-5  # of what is compared, or of 1
NEAR_RANK = 2e-6  # of two scores in a ring


@dataclass(frozen=True, slots=True)
class Told:
    """Outputs by role [T, B, …], and where they must be a graph's too."""

    outputs: dict[str, Array]
    sure: Array  # bool [T, B] no comparison so far was close
    ranked: Array  # bool [T, B] nor was any of a score with the ring
    reasoned: Array  # bool [T, B, F] nor any between two kinds of evidence


def run(
    d: Detector,
    x: Array,
    prediction: Array | Forecast,
    z: Array | None = None,
    std: Array | None = None,
    times: Array | None = None,
) -> Told:
    """x [T, B, F] with NaN where readings are missing, forecasts [T, B, K] or what makes them of a stream's rows,
    each stream's own units z and std [T, B, F], times int64 [T, B]."""
    steps, batch = x.shape[:2]
    rows: list[list[dict[str, Any]]] = []
    streams = [Stream(d) for _ in range(batch)]
    for t in range(steps):
        rows.append([])
        for b, stream in enumerate(streams):
            whole = stream.filled(x[t, b])
            made = prediction(b, whole) if callable(prediction) else prediction[t, b]
            units = (None, None) if z is None or std is None else (z[t, b], std[t, b])
            time = int(NO_TIME) if times is None else int(times[t, b])
            rows[t].append(stream.step(x[t, b], whole, made, units, time))
    told = {name: np.array([[row[name] for row in step] for step in rows]) for name in rows[0][0]}
    return Told(told, told.pop("sure"), told.pop("ranked"), told.pop("reasoned"))


class Stream:
    """What is remembered of one stream."""

    def __init__(self, d: Detector):
        self.d = d
        begin = d.mean.astype(np.float32).astype(np.float64)
        self.forecast, self.last = begin[list(d.targets)], begin
        self.seen = self.count = 0  # the first up to `warm`
        self.smooth = np.zeros(d.width)
        self.usual = np.square(d.spread)
        self.apart_as_ever, self.run = np.zeros(d.width), np.zeros(d.width)
        self.ring = [] if d.past is None else [float(score) for score in d.past.astype(np.float32)]
        if d.rule == "likelihood":
            self.short, self.mean = float(np.mean(self.ring)), float(np.mean(self.ring))
            self.variance = max(float(np.var(self.ring)), LEAST_VARIANCE)
        self.outside, self.outside_score = np.zeros(d.width), 0.0
        self.length, self.quiet, self.began, self.peak = 0, 0, int(NO_TIME), 0.0
        self.ticks = 0
        self.sure = self.ranked = True

    def filled(self, x: Array) -> Array:
        """x [F] with the forecasts in its holes, and the last reading where there is none."""
        known = self.last.copy()
        known[list(self.d.targets)] = self.forecast
        return np.where(np.isnan(x), known, x)

    def step(self, given: Array, x: Array, prediction: Array, units: tuple[Any, Any], time: int) -> dict[str, Any]:
        """One timestep: given [F], x [F] the same without holes, prediction [K], its own z and std [F]."""
        d, missing = self.d, np.isnan(given)
        z, std = units if d.per_stream else (np.clip((x - d.mean) / d.std, -LIMIT, LIMIT), d.std)
        out: dict[str, Any] = {"expected": self.forecast}
        self.ranked, judged = True, self.seen >= d.warm
        evidence = self.evidence(x, z, std, missing, out)
        strongest = np.max(list(evidence.values()), axis=0)
        moved = d.alpha * (strongest if judged else 0.0) + (1 - d.alpha) * self.smooth
        moved[moved < rules.TINY] = 0.0
        self.smooth = np.where(missing, self.smooth, moved)
        logs = np.log1p(self.smooth)
        plain = combined(logs, d.combine)
        level = d.threshold * self.factor()
        score, least, most = self.score(plain)
        over = bool(score > level) and judged
        self.sure &= not judged or (self.apart(least, level) and self.apart(most, level))
        out |= {"score": score, "threshold": level, "anomaly": over}
        out["contribution"] = logs / max(logs.sum(), rules.TINY)
        out |= self.reason(evidence)
        self.event(out, over, judged, score / level, time, bool(missing.all()))
        self.drift(out, z, plain, judged, missing)
        self.forecast, self.last = np.asarray(prediction, np.float64), np.where(missing, self.last, x)
        self.seen, self.count = min(self.seen + 1, d.warm), self.count + 1
        return out | {"sure": self.sure, "ranked": self.sure and self.ranked}

    def apart(self, one: Any, other: Any) -> bool:
        """Whether two numbers, or any of two arrays, are further from each other than rounding brings them."""
        gap = np.abs(np.subtract(one, other))
        return bool((gap > NEAR * np.maximum(1.0, np.abs(other))).all())

    def evidence(self, x: Array, z: Array, std: Array, missing: Array, out: dict[str, Any]) -> dict[str, Array]:
        """By kind, [F] each."""
        d, found = self.d, {"error": np.zeros(self.d.width)}
        for k, column in enumerate(d.targets):
            miss = x[column] - self.forecast[k]
            if not d.per_stream:
                found["error"][column] = np.clip(miss / (d.std[column] * d.spread[k]), -LIMIT, LIMIT) ** 2
                continue
            square = np.clip(miss / std[column], -LIMIT, LIMIT) ** 2
            found["error"][column] = min(square / max(self.usual[k], rules.LEAST_SQUARE), LIMIT)
            if self.seen == 0 or missing[column]:
                continue
            warmed = self.seen >= d.warm
            newest = min(square, rules.FASTEST**2 * self.usual[k]) if warmed else square
            self.usual[k] += (newest - self.usual[k]) / (max(d.window, d.warm) if warmed else self.seen)
        if d.others is not None and d.others_spread is not None:
            said = np.clip(z, -rules.REACH, rules.REACH) @ d.others
            off = np.clip((z - said) / d.others_spread, -LIMIT, LIMIT) - self.apart_as_ever
            found["others" if d.width > 1 else "level"] = np.square(off)
            step = np.clip(off, -rules.FASTEST, rules.FASTEST) / min(max(self.count + 1, rules.FEWEST), d.window)
            self.apart_as_ever = self.apart_as_ever + np.where(missing, 0, step)
            out["related"] = x + (said - z) * std
        if d.low is not None and d.high is not None:
            margin = np.maximum(rules.MARGIN * (d.high - d.low), rules.LEAST_MARGIN)
            beyond = np.maximum(np.maximum(d.low - margin - z, z - d.high - margin), 0)
            found["range"] = np.minimum(beyond / margin, LIMIT) ** 2
        if d.still is not None:
            resting = np.where(x == self.last, self.run + 1, 0)
            limit = np.maximum(d.still, 1)  # inf: it may rest for ever
            found["stuck"] = np.where(resting > limit, rules.STUCK * np.square(resting / limit), 0)
            self.run = np.where(missing, self.run, resting)
        return found

    def reason(self, evidence: dict[str, Array]) -> dict[str, Array]:
        """Which of the kinds that there are is the largest, the earlier of two that are equal."""
        kinds = np.stack(list(evidence.values()))  # [kinds, F]
        ranks = np.sort(kinds, axis=0)
        clear = len(kinds) == 1 or (ranks[-1] == 0) | (ranks[-1] - ranks[-2] > 1e-4 * ranks[-1])
        return {"reason": kinds.argmax(axis=0), "reasoned": np.broadcast_to(clear, ranks[-1].shape)}

    def score(self, plain: float) -> tuple[float, float, float]:
        """The score by the rule, and the least and the most that it may be, for ranks that are close."""
        d, quiet = self.d, self.length == 0
        if d.rule == "plain":
            return plain, plain, plain
        if d.rule == "likelihood":
            self.short = rules.SHORT * plain + (1 - rules.SHORT) * self.short
            score = max((self.short - self.mean) / math.sqrt(self.variance), 0.0)
            if quiet:
                apart = plain - self.mean
                self.mean += apart / d.window
                self.variance = max((1 - 1 / d.window) * (self.variance + apart**2 / d.window), LEAST_VARIANCE)
            return score, score, score
        score, least, most = (rarity(self.ring, plain, off) for off in (0.0, -NEAR_RANK, NEAR_RANK))
        self.ranked = most - least < 0.5 * math.log10(1 + 1 / (d.window + 1))
        if quiet:
            self.ring = [*self.ring[1:], plain]
        return score, least, most

    def factor(self) -> float:
        """How far the ticks have moved the threshold."""
        share = rules.GAIN * self.ticks / self.d.every if self.d.every else 0.0
        return min(max(1 + share, rules.LOWEST), rules.HIGHEST)

    def event(self, out: dict[str, Any], over: bool, judged: bool, ratio: float, time: int, blank: bool) -> None:
        """It begins, goes on through shorter calm, and ends; in a timestep without a reading it only goes on."""
        d = self.d
        begins = over and self.length == 0 and not blank
        if d.every is not None and not blank:
            self.ticks += (d.every if begins else 0) - judged
            low, high = (round((bound - 1) / rules.GAIN) * d.every for bound in (rules.LOWEST, rules.HIGHEST))
            self.ticks = min(max(self.ticks, low), high)
        if begins:
            self.began, self.peak = time, ratio
        out |= {"event": 0, "since": int(NO_TIME), "severity": 0.0}
        if not begins and self.length == 0:
            return
        self.sure &= self.ranked  # the score may be the event's highest
        self.length += 1
        self.quiet = self.quiet if blank else 0 if over else self.quiet + 1
        self.peak = max(self.peak, ratio)
        ends = self.quiet >= d.calm and not blank
        out |= {"event": -self.length if ends else self.length, "since": self.began, "severity": self.peak}
        if ends:
            self.length, self.quiet, self.began, self.peak = 0, 0, int(NO_TIME), 0.0

    def drift(self, out: dict[str, Any], z: Array, plain: float, judged: bool, missing: Array) -> None:
        """The shares of late timesteps that are not as in training, and the status."""
        d, drifting = self.d, False
        if d.usual_low is not None and d.usual_high is not None:
            odd = (z < d.usual_low) | (z > d.usual_high)
            self.sure &= self.apart(z, d.usual_low) and self.apart(z, d.usual_high)
            self.outside = np.where(missing, self.outside, self.outside + rules.SLOW * (odd - self.outside))
            if judged:
                self.outside_score += rules.SLOW * ((plain > d.usual_score) - self.outside_score)
                self.sure &= self.apart(plain, d.usual_score)
            highest = max(*self.outside, self.outside_score)
            drifting = judged and highest > rules.DRIFTED
            self.sure &= self.apart(highest, rules.DRIFTED)
            out |= {"drift": self.outside, "score_drift": self.outside_score}
        out["status"] = int(judged) + int(drifting)


def combined(logs: Array, how: str) -> float:
    """logs [F] → their mean, their largest, or the mean of the largest quarter."""
    falling = np.sort(logs)[::-1]
    return float({"mean": falling, "max": falling[:1], "top": falling[: math.ceil(len(logs) / 4)]}[how].mean())


def rarity(ring: list[float], plain: float, off: float) -> float:
    """−log10 of the share of scores that are no lower, with an exponential tail above the highest ones.

    `off` is added to a score in all comparisons but with its very equal: where nothing is read, it stays to the bit.
    """
    width, falling = len(ring), sorted((score + off * (score == plain) for score in ring), reverse=True)
    plain += off
    count = max(math.ceil(rules.TAIL * width), 2)
    edge = falling[count - 1]
    if plain <= edge:
        return -math.log10((sum(score >= plain for score in falling) + 1) / (width + 1))
    scale = max(sum(score - edge for score in falling[:count]) / count, rules.LEAST_SCALE)
    return (plain - edge) / scale / math.log(10) + math.log10((width + 1) / count)
