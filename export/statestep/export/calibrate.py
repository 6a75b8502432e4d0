"""What is measured on data, not learnt: a detector's units, its ranges, its threshold. Needs no torch.

The scores that it is calibrated on are computed by the detector's own nodes, over forecasts of the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from statestep.export.budget import Budget, Tail, threshold_for
from statestep.export.compare import Array, Outputs
from statestep.export.compose import alone
from statestep.export.detector import STATUS, Detector, Forecasts
from statestep.export.errors import ExportError
from statestep.export.rules import FEWEST, REACH
from statestep.export.series import Block, unit_of
from statestep.export.surgery import session

SPREAD_FLOOR = 1e-3  # standard deviations; a forecast is never held to more than a thousandth of the spread
LEAST_THRESHOLD = math.log(2.0)  # the score of errors that are usual
WARM = 30  # timesteps until a stream's own units mean something
RIDGE = 0.1  # of a feature's variance, added to it: how little the others are trusted where data are few
USUAL = (0.005, 0.995)  # quantiles of training readings
USUAL_SCORE = 0.9  # quantile of the calibration's scores
STILL = 2.0  # times the longest that a sensor did not move in training
LEAST_STILL = 12  # timesteps
NEVER_MOVES = 0.25  # of a stream's length without a change: such a sensor may rest for as long as it likes


@dataclass(frozen=True, slots=True)
class Past:
    """Streams side by side with the forecasts that a model made for them, from their births."""

    block: Block  # x [T, B, F]
    prediction: Array  # float32 [T, B, K] for each next timestep
    z: Array | None = None  # float32 [T, B, F] and
    std: Array | None = None  # float32 [T, B, F] in each stream's own standard units


@dataclass(frozen=True, slots=True)
class Judging:
    """How a detector is to judge; the rest is measured."""

    alpha: float = 0.15
    combine: str = "mean"
    rule: str = "plain"
    others: bool = True  # whether readings are also held against their rows, a lone feature's against its level
    window: int = 256
    budget: Budget = field(default_factory=Budget)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A detector, and what is to be told of how it was calibrated."""

    detector: Detector
    tail: Tail
    rows: int  # that the threshold was taken from
    budget: Budget

    def told(self) -> dict[str, Any]:
        """The document for a contract's `detector`."""
        d, tail = self.detector, self.tail
        return {
            "evidence": list(d.evidence),
            "status": list(STATUS),
            "alpha": d.alpha,
            "combine": d.combine,
            "rule": d.rule,
            "scale": "per-stream" if d.per_stream else "pooled",
            "threshold": float(f"{d.threshold:.6g}"),
            "every": d.every,
            "quantile": None if d.every else self.budget.quantile,
            "calm": d.calm,
            "warm": d.warm,
            "rows": self.rows,
            "tail": None if tail.counted else {"over": float(f"{tail.over:.4g}"), "scale": float(f"{tail.scale:.4g}")},
        }


def calibrated(pasts: Sequence[Past], known: Forecasts, how: Judging, *, warm: int = 1) -> Calibrated:
    """Measure a detector for the model that made these forecasts, `known` being what is known of it anyway.

    Usual sizes of errors and the threshold come from the validation tails, the rest from the training parts, for a
    model's errors are smaller where it was trained. Raises `ExportError` for settings that cannot be.
    """
    return with_threshold(measured(pasts, known, how, warm=warm), pasts, how)


def measured(pasts: Sequence[Past], known: Forecasts, how: Judging, *, warm: int = 1) -> Detector:
    """A detector that has its units and ranges, and no threshold yet."""
    if not 0 < how.alpha <= 1:
        raise ExportError(f"alpha is {how.alpha}, it must be above 0 and at most 1")
    per_stream = pasts[0].z is not None
    trained = [past.block.training(warm) for past in pasts]  # bool [T, B] each
    held_out = [past.block.validation(warm) for past in pasts]
    read = [np.where(past.block.missing, np.nan, past.block.x) for past in pasts]  # [T, B, F] each
    seen = np.concatenate([x[mask] for x, mask in zip(read, trained, strict=True)])  # [rows, F]
    std = unit_of(seen)  # [F]
    z = [
        (x - known.mean) / std if past.z is None else np.where(past.block.missing, np.nan, past.z)
        for x, past in zip(read, pasts, strict=True)
    ]  # [T, B, F] each
    training = np.concatenate([each[mask] for each, mask in zip(z, trained, strict=True)]).astype(np.float64)
    tails = np.concatenate([each[mask] for each, mask in zip(z, held_out, strict=True)]).astype(np.float64)
    misses = [_misses(past, known.targets, std)[mask] for past, mask in zip(pasts, held_out, strict=True)]
    others = _others(training) if how.others else None
    every = np.concatenate([training, tails])  # [rows, F]
    return Detector(
        features=known.features,
        targets=known.targets,
        mean=known.mean,
        std=std,
        spread=_usual(np.concatenate(misses)),
        per_stream=per_stream,
        others=others,
        others_spread=None if others is None else _usual(_apart(z, others, how.window, held_out)),
        low=np.nanmin(every, axis=0),
        high=np.nanmax(every, axis=0),
        usual_low=np.nanquantile(training, USUAL[0], axis=0),
        usual_high=np.nanquantile(training, USUAL[1], axis=0),
        still=_still(pasts),
        alpha=how.alpha,
        combine=how.combine,
        window=how.window,
        calm=max(round(1 / how.alpha), 1),
        warm=warm,
        threshold=math.inf,
    )


def with_threshold(base: Detector, pasts: Sequence[Past], how: Judging) -> Calibrated:
    """The detector with the threshold that keeps the budget on the validation tails of `pasts`."""
    scores = tail_scores(base, pasts)
    past = _spread_out(np.concatenate(scores), how.window)
    ready = replace(base, rule=how.rule, past=past, usual_score=float(np.quantile(np.concatenate(scores), USUAL_SCORE)))
    if how.rule != "plain":
        scores = tail_scores(ready, pasts)
    tail = threshold_for(scores, how.budget, ready.calm)
    least = LEAST_THRESHOLD if how.rule == "plain" else 1.0
    done = replace(ready, threshold=max(tail.threshold, least), every=how.budget.every)
    return Calibrated(done, tail, sum(map(len, scores)), how.budget)


def outputs_of(d: Forecasts, past: Past) -> Outputs:
    """What a detector makes of streams: its outputs by role, [T, B, …]."""
    feeds = {"x": past.block.x, "prediction": past.prediction}
    if past.z is not None and past.std is not None:
        feeds |= {"z": past.z, "std": past.std}
    names = [role for role, _, _ in d.outputs]
    return dict(zip(names, session(alone(d)).run(names, feeds), strict=True))


def tail_scores(d: Detector, pasts: Sequence[Past]) -> list[Array]:
    """The scores over the validation tail of each stream that has one: float64 [rows] each."""
    found = []
    for past in pasts:
        scores = outputs_of(d, past)["score"].astype(np.float64)  # [T, B]
        mask = past.block.validation(d.warm)
        found += [scores[mask[:, stream], stream] for stream in range(scores.shape[1]) if mask[:, stream].any()]
    return found


def _misses(past: Past, targets: Sequence[int], std: Array) -> Array:
    """x − expected in standard units: [T, B, K], NaN where x is missing; the first row had no forecast and is 0."""
    x = np.where(past.block.missing, np.nan, past.block.x)[..., list(targets)]
    miss = np.zeros(x.shape)
    miss[1:] = x[1:].astype(np.float64) - past.prediction[:-1]
    return miss / (std[list(targets)] if past.std is None else past.std[..., list(targets)])


def _usual(errors: Array) -> Array:
    """The root mean square of errors [rows, N] in standard units, floored, without those that are NaN: [N]."""
    count = np.maximum((~np.isnan(errors)).sum(axis=0), 1)  # [N]
    usual: Array = np.sqrt(np.nansum(np.square(errors.astype(np.float64)), axis=0) / count)
    return np.maximum(usual, SPREAD_FLOOR)


def _others(training: Array) -> Array:
    """Each feature by the others of its row, by ridge regression: weights [F, F].

    All of them come from one inverse: with P the inverse of the features' second moments, the weight of k in j is
    −P[k, j] / P[j, j].
    """
    near = np.clip(np.nan_to_num(training), -REACH, REACH)  # what is missing is as usual
    moments = near.T @ near / len(near)  # [F, F]
    precision = np.linalg.inv(moments + RIDGE * np.eye(len(moments)))
    weights: Array = -precision / np.diag(precision)  # [F, F]
    np.fill_diagonal(weights, 0.0)
    return weights


def _apart(z: Sequence[Array], weights: Array, window: int, masks: Sequence[Array]) -> Array:
    """How far readings are from what the others say, less what is usual of their stream: [rows, F] under the masks.

    `z` has a [T, B, F] for each mask [T, B]. The same mean over the window as in `rules.py`, without its bound.
    """
    found = []
    for each, mask in zip(z, masks, strict=True):
        apart = each - np.clip(np.nan_to_num(each), -REACH, REACH) @ weights  # [T, B, F]
        usual = np.zeros(apart.shape[1:])  # [B, F]
        for t, row in enumerate(apart):
            off = row - usual
            usual += np.nan_to_num(off) / min(max(t + 1, FEWEST), window)
            apart[t] = off
        found.append(apart[mask])
    return np.concatenate(found)


def _still(pasts: Sequence[Past]) -> Array:
    """For how many timesteps each feature may stay the same before that is odd; inf where it often rests: [F]."""
    width = pasts[0].block.x.shape[-1]
    limit = np.zeros(width)
    for past in pasts:
        x, rows, missing = past.block.x, past.block.rows, past.block.missing
        run = np.zeros(x.shape[1:])  # [B, F]
        for t in range(1, len(x)):
            same = (x[t] == x[t - 1]) & (t < rows)[:, None]
            run = np.where(missing[t], run, np.where(same, run + 1, 0))
            limit = np.maximum(limit, run.max(axis=0))
            limit = np.where((run > NEVER_MOVES * rows[:, None]).any(axis=0) & (run > 1).any(axis=0), np.inf, limit)
    return np.maximum(STILL * limit, LEAST_STILL)


def _spread_out(scores: Array, count: int) -> Array:
    """`count` scores that stand for all of them, in an order that favours neither high nor low ones: [count]."""
    rising = np.quantile(scores, (np.arange(count) + 0.5) / count)
    return np.asarray(np.random.default_rng(0).permutation(rising))
