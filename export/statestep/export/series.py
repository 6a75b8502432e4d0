"""Streams of readings made ready: checked, cut in a training part and a validation tail, and padded. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from statestep.export.compare import Array
from statestep.export.errors import DataError, ExportError

FEWEST_ROWS = 3  # of a stream: one to forecast in training, one in validation, and one before them
CONSTANT = 1e-6  # a feature whose spread is below this share of its level does not move
PADDING = 0.5  # a stream shorter than this share of its block's longest begins a new block
BLOCK_STREAMS = 256


@dataclass(frozen=True, slots=True)
class Series:
    """One stream: the first `cut` rows are for training, the others for validation."""

    name: str
    x: Array  # float32 [T, F], finite: where a reading is missing, the last one goes on
    missing: Array  # bool [T, F]
    cut: int


@dataclass(frozen=True, slots=True)
class Block:
    """Streams of like length, side by side: x [T, B, F]; behind a stream's last row its last row goes on."""

    x: Array  # float32 [T, B, F]
    missing: Array  # bool [T, B, F]
    rows: Array  # int64 [B]
    cuts: Array  # int64 [B]

    def training(self, warm: int) -> Array:
        """Which rows are in a training part and have a forecast to judge, made after `warm` rows: bool [T, B]."""
        t = np.arange(len(self.x))[:, None]
        mask: Array = (t >= max(warm, 1)) & (t < self.cuts)
        return mask

    def validation(self, warm: int) -> Array:
        """The same of the validation tails: bool [T, B]."""
        t = np.arange(len(self.x))[:, None]
        mask: Array = (t >= max(warm, 1)) & (t >= self.cuts) & (t < self.rows)
        return mask


def columns_of(features: Sequence[str], targets: Sequence[str] | None) -> tuple[int, ...]:
    """The columns of the targets among the features."""
    if len(set(features)) != len(features) or not features:
        raise ExportError(f"the features are {list(features)}, there must be one or more and each once")
    named = features if targets is None else targets
    unknown = [target for target in named if target not in features]
    if unknown:
        raise ExportError(f"target {unknown[0]!r} is not among the features {list(features)}")
    return tuple(features.index(target) for target in dict.fromkeys(named))


def series_of(streams: Mapping[str, Array], features: Sequence[str], validation: float) -> tuple[list[Series], int]:
    """Check `streams` (name → [T, F] readings) and cut them; also the number of rows that were left out.

    NaN is a missing reading. Rows that hold an infinity are left out: the service sends such messages to the dead
    letters, so a stream goes on without them there too. A stream of fewer than three rows has nothing to train and
    validate on, and is left out as well. Raises `DataError` where a shape is wrong, nothing is left, or a feature has
    no reading at all.
    """
    if not 0 < validation < 1:
        raise DataError(f"validation is {validation}, it must be a share of the rows above 0 and below 1")
    series, left_out = [], 0
    for name, readings in streams.items():
        if readings.ndim != 2 or readings.shape[1] != len(features):
            raise DataError(
                f"stream {name!r} has readings of shape {list(readings.shape)}, {len(features)} features need "
                f"[rows, {len(features)}]"
            )
        with np.errstate(over="ignore"):  # a reading beyond float32 becomes infinite, and is left out
            x = np.ascontiguousarray(readings, np.float32)
        x = x[~np.isinf(x).any(axis=1)]
        if len(x) < FEWEST_ROWS or np.isnan(x).all():
            left_out += len(readings)
            continue
        left_out += len(readings) - len(x)
        series.append(Series(name, x, np.isnan(x), min(max(round(len(x) * (1 - validation)), 2), len(x) - 1)))
    if not series:
        raise DataError(
            f"there is nothing to fit on: none of the {len(streams)} streams has {FEWEST_ROWS} rows of finite readings"
        )
    absent = np.all([one.missing.all(axis=0) for one in series], axis=0)  # [F]
    if absent.any():
        raise DataError(f"feature {features[int(absent.argmax())]!r} has no reading in any stream: leave it out")
    return _filled(series), left_out


def _filled(series: Sequence[Series]) -> list[Series]:
    """The last reading in place of a missing one; before the first, the mean of all streams."""
    if not any(one.missing.any() for one in series):
        return list(series)
    mean = np.nanmean(np.concatenate([one.x for one in series]).astype(np.float64), axis=0)  # [F]
    found = []
    for one in series:
        last = np.where(one.missing, -1, np.arange(len(one.x))[:, None])  # [T, F] where it was read last
        last = np.maximum.accumulate(last, axis=0)
        x = np.where(last < 0, mean, np.take_along_axis(one.x, np.maximum(last, 0), axis=0)).astype(np.float32)
        found.append(replace(one, x=x))
    return found


def blocks_of(series: Sequence[Series]) -> list[Block]:
    """Put streams of like length side by side, so that one call of the network runs many."""
    groups: list[list[Series]] = []
    for one in sorted(series, key=lambda one: -len(one.x)):
        if not groups or len(one.x) < PADDING * len(groups[-1][0].x) or len(groups[-1]) == BLOCK_STREAMS:
            groups.append([])
        groups[-1].append(one)
    return [block_of(group) for group in groups]


def enough(blocks: Sequence[Block], warm: int) -> None:
    """Raise `DataError` unless training and validation both have a row whose forecast can be judged."""
    for part, rows in (("training", Block.training), ("validation", Block.validation)):
        if not any(bool(rows(block, warm).any()) for block in blocks):
            longest = max(int(block.rows.max()) for block in blocks)
            raise DataError(
                f"the longest stream has {longest} rows, which leaves no {part} row after the {warm} that are needed "
                "to know a stream's own spread: give longer streams, or use pooled scaling"
            )


def unit_of(x: Array) -> Array:
    """The standard deviation of each feature over rows [rows, F], NaN where a reading is missing: float64 [F].

    A feature that does not move gets its level for one (1 at level 0): nothing is known of its spread.
    """
    wide = x.astype(np.float64)
    mean, std = np.nanmean(wide, axis=0), np.nanstd(wide, axis=0)
    level = np.where(mean == 0, 1.0, np.abs(mean))
    return np.where(std <= CONSTANT * np.abs(mean), level, std)


def training_rows(series: Sequence[Series]) -> Array:
    """The training parts of all streams, what stands in for missing readings among them: float64 [rows, F]."""
    return np.concatenate([one.x[: one.cut] for one in series]).astype(np.float64)


def mean_of(series: Sequence[Series]) -> Array:
    """The mean of each feature over all training parts: float64 [F]."""
    mean: Array = training_rows(series).mean(axis=0)
    return mean


def block_of(group: Sequence[Series]) -> Block:
    """Streams side by side, whatever their lengths."""
    longest = max(len(one.x) for one in group)
    ends = [((0, longest - len(one.x)), (0, 0)) for one in group]
    x = np.stack([np.pad(one.x, end, mode="edge") for one, end in zip(group, ends, strict=True)], axis=1)
    missing = np.stack([np.pad(one.missing, end) for one, end in zip(group, ends, strict=True)], axis=1)
    return Block(x, missing, np.array([len(one.x) for one in group]), np.array([one.cut for one in group]))


def ranges_of(series: Sequence[Series], features: Sequence[str]) -> dict[str, tuple[float, float]]:
    """The least and the greatest reading of each feature in the training parts."""
    low = np.min([one.x[: one.cut].min(axis=0) for one in series], axis=0)  # [F]
    high = np.max([one.x[: one.cut].max(axis=0) for one in series], axis=0)  # [F]
    return {name: (float(low[k]), float(high[k])) for k, name in enumerate(features)}
