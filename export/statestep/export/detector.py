"""A detector: its numbers, its states, its outputs. `rules.py` says what it does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from statestep.export.compare import Array
from statestep.runtime import NO_TIME, State

COMBINES = ("mean", "top", "max")
RULES = ("plain", "likelihood", "conformal")
EVIDENCE = ("error", "others", "range", "stuck")
LEVEL = "level"  # what `others` is for a lone feature, of which they say nothing: how far it is from its usual level
BESIDE = ("others", LEVEL)  # evidence that is not by the forecast, but by the output `related`
STATUS = ("warming", "calibrated", "drifting")  # the output `status` is a place in here
LEAST_VARIANCE = 1e-12  # of scores, which are logarithms

HELD = {"event": "length", "since": "began", "severity": "peak"}  # by role, the state that holds what was put out last

Made = tuple[str, tuple[str, ...] | None, str]  # an output: name and role, its features, dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecasts:
    """What is known of any model with forecasts: F features, the columns of K of them, what begins in their stead.

    It is no detector: it tells what was expected, and lets the model's own forecast stand in for a missing reading.
    """

    features: tuple[str, ...]
    targets: tuple[int, ...]
    mean: Array  # [F] of training: stands in for readings before there is a forecast

    @property
    def width(self) -> int:
        """How many features there are."""
        return len(self.features)

    @property
    def states(self) -> tuple[State, ...]:
        """Every state pair."""
        begin = np.asarray(self.mean, np.float32)
        return (
            State("forecast", "next_forecast", (len(self.targets),), initial=begin[list(self.targets)].tolist()),
            State("last", "next_last", (self.width,), initial=begin.tolist()),
        )

    @property
    def outputs(self) -> tuple[Made, ...]:
        """Every output."""
        return (("expected", tuple(self.features[column] for column in self.targets), "float32"),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Detector(Forecasts):
    """All numbers of a detector. Units are standard deviations of the features unless something else is said.

    With `per_stream` the standard units are each stream's own, from the forecaster's graph, and so is the usual size
    of its errors, learnt as it goes, beginning with `spread`.
    """

    std: Array  # [F] in sensor units
    spread: Array  # [K] usual size of an error
    per_stream: bool = False
    others: Array | None = None  # [F, F] column j says feature j by the others, its own weight 0
    others_spread: Array | None = None  # [F] usual size of that error
    low: Array | None = None  # [F] least and
    high: Array | None = None  # [F] greatest reading of training
    usual_low: Array | None = None  # [F] between which and
    usual_high: Array | None = None  # [F] 99 % of training lie
    still: Array | None = None  # [F] timesteps without a change that training makes possible; inf: not judged
    alpha: float = 0.15  # weight of the newest evidence: about 1 / alpha timesteps of memory
    combine: str = "mean"
    rule: str = "plain"
    window: int = 256  # timesteps of a stream's own past that count
    past: Array | None = None  # [window] scores that a stream's past begins with, for the rules that look at it
    usual_score: float = math.inf  # a tenth of the calibration's scores lie above it
    threshold: float = 1.0
    every: int | None = None  # timesteps between two false alarms, as asked for; None: the threshold stays
    calm: int = 10  # timesteps below the threshold that end an event
    warm: int = 1  # timesteps of a stream before it is judged

    @property
    def states(self) -> tuple[State, ...]:
        """Every state pair."""
        found = [*Forecasts.states.fget(self)]  # type: ignore[attr-defined]  # slots leave no room for super()
        found.append(State("seen", "next_seen", (1,), dtype="int64", initial=0))
        found.append(State("error", "next_error", (self.width,)))
        if self.per_stream:
            own = np.square(np.asarray(self.spread, np.float32)).tolist()
            found.append(State("usual_error", "next_usual_error", (len(self.targets),), initial=own, lasting=True))
        if self.others is not None:
            found.append(State("usual_apart", "next_usual_apart", (self.width,), lasting=True))
        if self.still is not None:
            found.append(State("still", "next_still", (self.width,)))
        if self.rule != "plain":
            assert self.past is not None
            past = np.asarray(self.past, np.float32)
            if self.rule == "likelihood":
                past = np.array([past.mean(), past.mean(), max(float(past.var()), LEAST_VARIANCE)], np.float32)
            found.append(State("scores", "next_scores", past.shape, initial=past.tolist(), lasting=True))
        if self.usual_low is not None:
            found.append(State("outside", "next_outside", (self.width + 1,), lasting=True))
        for name, initial in (("length", 0), ("quiet", 0), ("began", int(NO_TIME))):
            found.append(State(name, f"next_{name}", (1,), dtype="int64", initial=initial))
        ticks = State("ticks", "next_ticks", (1,), dtype="int64", initial=0, lasting=True)
        return (*found, ticks, State("peak", "next_peak", (1,)))

    @property
    def outputs(self) -> tuple[Made, ...]:
        """Every output."""
        found: list[Made] = [
            *Forecasts.outputs.fget(self),  # type: ignore[attr-defined]
            ("score", None, "float32"),
            ("threshold", None, "float32"),
            ("anomaly", None, "bool"),
            ("contribution", self.features, "float32"),
            ("reason", self.features, "int64"),
        ]
        if self.others is not None:
            found.append(("related", self.features, "float32"))
        found += [("event", None, "int64"), ("since", None, "int64"), ("severity", None, "float32")]
        found.append(("status", None, "int64"))
        if self.usual_low is not None:
            found += [("drift", self.features, "float32"), ("score_drift", None, "float32")]
        return tuple(found)

    @property
    def evidence(self) -> tuple[str, ...]:
        """The kinds of evidence that it looks at; the output `reason` is a place in here."""
        there = (True, self.others is not None, self.low is not None, self.still is not None)
        found = tuple(name for name, is_there in zip(EVIDENCE, there, strict=True) if is_there)
        return tuple(LEVEL if name == "others" and self.width == 1 else name for name in found)
