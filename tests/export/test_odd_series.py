"""Odd data: a model, or one sentence that names what is wrong; and never a score that is no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from statestep.export import DataError, ExportError, Judging, budget_of, export_step
from statestep.export.fit import fit
from statestep.runtime import Engine, StepModel

Array = np.ndarray[Any, Any]
ROWS = 400


def waves(features: int, scale: float = 1.0, level: float = 0.0, rows: int = ROWS) -> Array:
    rng = np.random.default_rng(features)
    t = np.arange(rows)[:, None] / np.linspace(5, 40, features)
    return level + scale * (np.sin(t) + 0.1 * rng.normal(size=(rows, features)))


def sparse() -> Array:
    x = waves(3)
    x[np.random.default_rng(0).random(x.shape) < 0.4] = np.nan
    return x


def with_infinities() -> Array:
    x = waves(2)
    x[[50, 350], [0, 1]] = [np.inf, -np.inf]
    return x


def late() -> Array:
    """A feature whose first reading comes after half of the rows."""
    x = waves(2)
    x[: ROWS // 2, 1] = np.nan
    return x


GOOD = {
    "one feature": waves(1),
    "constant": np.full((ROWS, 2), 7.25),
    "constant at zero": np.zeros((ROWS, 2)),
    "one of them constant": np.concatenate([waves(1), np.full((ROWS, 1), -3.0)], axis=1),
    "scale 1e-9": waves(2, 1e-9),
    "scale 1e9": waves(2, 1e9),
    "spread 1e-3 at level 1e6": waves(2, 1e-3, 1e6),
    "largest float32": waves(2, 1e37),
    "both scales": np.concatenate([waves(1, 1e-9), waves(1, 1e9)], axis=1),
    "missing readings": sparse(),
    "infinities": with_infinities(),
    "a feature that comes late": late(),
    "whole numbers": np.round(waves(2, 3.0)),
    "steps": np.repeat(np.random.default_rng(1).normal(size=(ROWS // 50, 2)), 50, axis=0),
    "five hundred features": waves(500, rows=120),
    "few rows": waves(2, rows=12),
}
BY_STREAM = (  # those of which a stream's own units might make something else
    "one feature",
    "constant at zero",
    "one of them constant",
    "spread 1e-3 at level 1e6",
    "largest float32",
    "both scales",
    "missing readings",
    "few rows",
)
CASES = [(name, "pooled") for name in GOOD] + [(name, "per-stream") for name in BY_STREAM]
BAD = {
    "a single row": (waves(2, rows=1), "none of the 1 streams has 3 rows"),
    "no rows": (waves(2, rows=0), "none of the 1 streams has 3 rows"),
    "all missing": (np.full((ROWS, 2), np.nan), "none of the 1 streams has 3 rows of finite readings"),
    "one feature all missing": (
        np.concatenate([waves(1), np.full((ROWS, 1), np.nan)], axis=1),
        "feature 'f1' has no reading in any stream",
    ),
    "all infinite": (np.full((ROWS, 2), np.inf), "none of the 1 streams has 3 rows"),
}


def names(x: Array) -> list[str]:
    return [f"f{i}" for i in range(x.shape[1])]


def odd_readings(x: Array) -> Array:
    """What may come later: the series itself, then readings that nobody has seen before."""
    usual = x[np.isfinite(x).all(axis=1)]
    last = usual[-1] if len(usual) else np.nan_to_num(x[-1])
    odd = [last * 0, last + 1, last * 1e6, -last, np.full_like(last, 1e-38), np.full_like(last, np.nan), last]
    with np.errstate(over="ignore"):
        rows = np.concatenate([x, *[np.repeat(row[None], 5, axis=0) for row in odd]]).astype(np.float32)
    return rows[~np.isinf(rows).any(axis=1)]


@pytest.mark.parametrize(("name", "scale"), CASES)
def test_a_model_whose_scores_are_numbers(name: str, scale: str, tmp_path: Path) -> None:
    """It fits, passes its proof, and scores its data and odder data; per-stream scaling may ask for more rows."""
    x = GOOD[name]
    judging = Judging(budget=budget_of("1/200 rows", None))
    try:
        fitted = fit({"a": x}, names(x), hidden=4, epochs=2, scale=scale, judging=judging)
    except DataError as error:
        assert name == "few rows" and scale == "per-stream" and "give longer streams, or use pooled" in str(error)
        return
    made = export_step(fitted.model, tmp_path / "m.onnx", fitted.detector, ranges=fitted.ranges)
    engine = Engine(StepModel.load(made.model))
    refused = 0
    for row in odd_readings(x):
        out = engine.advance([b"a"], row[None])
        refused += int(out.rejected[0])
        if not out.rejected[0]:
            for output in made.contract.outputs:
                assert np.isfinite(out[output.name]).all(), (output.name, row)
    assert refused <= 15  # rows beyond what a float32 can forecast are dead letters, not wrong scores


@pytest.mark.parametrize("name", list(BAD))
def test_one_sentence_names_what_is_wrong(name: str) -> None:
    """Data without anything to learn from is refused before any training."""
    x, sentence = BAD[name]
    with pytest.raises((DataError, ExportError), match=sentence) as caught:
        fit({"a": x}, names(x), hidden=4, epochs=1)
    assert "\n" not in str(caught.value)
