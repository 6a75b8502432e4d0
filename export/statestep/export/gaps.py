"""What is best done when a stream was silent: go on as if nothing were missing, bridge the gap, or begin anew.

    hold     the next reading is taken for the next timestep
    bridge   the model steps through the gap first, its own forecasts standing in for the readings
    reset    its states begin anew, but for those that are of the stream rather than of the moment

Which is best hangs on the model and on the length of the gap, so it is measured: readings that are known are left out,
and the forecasts afterwards are compared. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from statestep.export.compare import Array
from statestep.runtime import StepModel
from statestep.runtime.contract import GAP_WAYS

LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200)  # timesteps that are missing; none longer is bridged
AFTER = 10  # forecasts after the gap that are compared
RUN_IN = 256  # timesteps before it
PLACES = 64  # gaps of each length
FEWEST = 8  # of them, or the length is not measured
TAIL = 0.2  # share of each stream, at its end, in which the gaps lie
GAIN = 0.02  # by which share a way must be better than to hold


class Gap(NamedTuple):
    """Where a gap begins."""

    x: Array  # float32 [T, F] of the stream
    row: int  # the first that is missing


def measure(model: StepModel, streams: Mapping[str, Array], *, seed: int = 0) -> dict[str, Any] | None:
    """The table for the contract's `gaps`: RMSE after gaps of every length by each way, and the plan that it gives.

    `streams` (name → [T, F]) are readings that may hold NaN. None where the model cannot step over missing readings,
    or the streams are too short. Errors are in standard deviations of the readings.

    {"measured": [{"missing", "hold", "bridge", "reset"}], "plan": [{"up_to": timesteps | null, "do"}]}
    """
    if model.contract.missing != "own-forecast" or model.contract.output("prediction") is None:
        return None
    rng = np.random.default_rng(seed)
    usable = [np.ascontiguousarray(x, np.float32) for x in streams.values()]
    usable = [x for x in usable if x.ndim == 2 and not np.isinf(x).any()]
    measured = []
    for length in LENGTHS:
        gaps = _places(usable, length, rng)
        if len(gaps) >= FEWEST:
            measured.append({"missing": length} | _errors(model, gaps, length))
    return {"measured": measured, "plan": plan_of(measured)} if measured else None


def plan_of(measured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The best way up to every length; a longer gap than was measured is never bridged.

    >>> plan_of([{"missing": 1, "hold": 1.0, "bridge": 0.9, "reset": 2.0},
    ...          {"missing": 5, "hold": 2.0, "bridge": 3.0, "reset": 1.5}])
    [{'up_to': 1, 'do': 'bridge'}, {'up_to': None, 'do': 'reset'}]
    """
    found: list[dict[str, Any]] = []
    for row in [*measured, {**measured[-1], "missing": None, "bridge": np.inf}]:
        least = min(GAP_WAYS, key=lambda way: row[way])  # used at once
        best = least if row[least] < (1 - GAIN) * row["hold"] else "hold"
        if found and found[-1]["do"] == best:
            found.pop()
        found.append({"up_to": row["missing"], "do": best})
    return found


def _places(streams: Sequence[Array], length: int, rng: np.random.Generator) -> list[Gap]:
    """Gaps at random places in the streams' tails."""
    rooms = []
    for x in streams:
        first = max(round(len(x) * (1 - TAIL)), min(RUN_IN, len(x) // 2), 1)
        rooms += [(x, first, len(x) - length - AFTER)] if first < len(x) - length - AFTER else []
    if not rooms:
        return []
    chosen = [rooms[i] for i in rng.integers(0, len(rooms), PLACES)]
    return [Gap(x, int(rng.integers(first, last))) for x, first, last in chosen]


def _errors(model: StepModel, gaps: Sequence[Gap], length: int) -> dict[str, float]:
    """RMSE of the forecasts after the gap by each way."""
    before = min(RUN_IN, *(gap.row for gap in gaps))
    run_in = np.stack([gap.x[gap.row - before : gap.row] for gap in gaps], axis=1)  # [before, N, F]
    after = np.stack([gap.x[gap.row + length :][: AFTER + 1] for gap in gaps], axis=1)  # [AFTER + 1, N, F]
    prediction = model.contract.output("prediction")
    assert prediction is not None
    names = model.contract.feature_names
    targets = [names.index(name) for name in prediction.features or names]
    unit = np.maximum(np.nanstd(run_in.astype(np.float64), axis=(0, 1)), np.finfo(np.float32).tiny)[targets]  # [K]
    born = [np.stack([value] * len(gaps)) for value in model.initial_states()]
    reached = born
    for row in run_in:
        _, reached = model.step(row, reached)
    bridged = reached
    for _ in range(length):
        _, bridged = model.step(np.full_like(after[0], np.nan), bridged)
    found = {}
    lasting = [state.lasting for state in model.contract.states]
    reset = [value if lasts else begin for value, begin, lasts in zip(reached, born, lasting, strict=True)]
    for way, states in zip(GAP_WAYS, (reached, bridged, reset), strict=True):
        misses = []
        for row, following in pairwise(after):
            outputs, states = model.step(row, states)
            misses.append((outputs[prediction.name] - following[:, targets]) / unit)  # [N, K]
        found[way] = float(f"{np.sqrt(np.nanmean(np.square(np.stack(misses), dtype=np.float64))):.4g}")
    return found
