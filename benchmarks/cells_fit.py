"""What each cell of `fit --cell` costs and gains on one real sensor, as Markdown.

    python benchmarks/cells_fit.py [machine_temperature_system_failure.csv] [--seeds 1 2 3] [--epochs 20]

The CSV is that of the Numenta Anomaly Benchmark, its column `value` the reading; without one the 600 rows of
`tests/data/machine_temperature.csv` are taken. Every cell is trained by `fit` with the same settings, exported, and
timed as a `StepModel`. Trainings are appended to the results file, one line each, and not repeated. Times are measured
afresh in every run of the script, all cells taking turns, for a figure is worth something beside its neighbours only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from statestep.export.fit import Fitted, fit
from statestep.export.forecaster import CELLS, Forecaster
from statestep.export.write import export_step
from statestep.runtime import StepModel

HIDDEN = 32
FEATURE = "temperature"
BATCHES = (1, 256)
ROUNDS = 15
ROUND_SECONDS = 0.05
ROOT = Path(__file__).parents[1]
SLICE = ROOT / "tests" / "data" / "machine_temperature.csv"
RESULTS = Path(__file__).parent / "results" / "cells_fit.jsonl"
KEY = ("data", "cell", "seed", "epochs")

Record = dict[str, Any]
Array = np.ndarray[Any, Any]


def main() -> None:
    """Train what is missing, time every cell, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, nargs="?", default=SLICE)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    data = hashlib.sha256(args.csv.read_bytes()).hexdigest()[:12]
    readings = np.loadtxt(args.csv, delimiter=",", skiprows=1, usecols=1)[:, None]  # [T, 1]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        for cell in CELLS:
            key = (data, cell, seed, args.epochs)
            if key in {tuple(record[name] for name in KEY) for record in read(args.results)}:
                continue
            record = dict(zip(KEY, key, strict=True)) | trained(readings, cell, seed, args.epochs)
            with args.results.open("a") as file:
                file.write(json.dumps(record) + "\n")
    records = [r for r in read(args.results) if (r["data"], r["epochs"]) == (data, args.epochs)]
    print(table([r for r in records if r["seed"] in args.seeds], timed(readings)))
    print(f"\n{len(readings):,} rows (SHA-256 {data}…), {args.epochs} epochs, seeds {args.seeds}.")


def read(path: Path) -> list[Record]:
    """The trainings so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def fitted(readings: Array, cell: str, seed: int, epochs: int) -> Fitted:
    """One training, with the settings that all cells share."""
    # Patience is as long as the training: every cell gets the same number of epochs.
    return fit({"machine": readings}, [FEATURE], cell=cell, hidden=HIDDEN, epochs=epochs, patience=epochs, seed=seed)


def trained(readings: Array, cell: str, seed: int, epochs: int) -> Record:
    """Errors in degrees on the validation tail, and what the training took."""
    begin = time.process_time()
    done = fitted(readings, cell, seed, epochs)
    assert isinstance(done.model.network, Forecaster)
    ours, last = done.errors.by_target[FEATURE]
    return {
        "rmse": ours,
        "last_value_rmse": last,
        "rows": done.errors.rows,
        "best_epoch": done.best_epoch,
        "parameters": sum(weight.numel() for weight in done.model.network.parameters()),
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def timed(readings: Array) -> dict[str, tuple[dict[int, float], int]]:
    """cell → median CPU microseconds a call at each batch, and bytes of the network's state a stream.

    Weights change nothing about the cost, so each cell is trained for one epoch on a few rows.
    """
    with tempfile.TemporaryDirectory() as folder:
        models, sizes = dict[str, StepModel](), dict[str, int]()
        for cell in CELLS:
            made = fitted(readings[:600], cell, seed=1, epochs=1).model
            models[cell] = StepModel.load(export_step(made, Path(folder) / f"{cell}.onnx").model)
            own = {state.input for state in made.network.states}
            sizes[cell] = sum(s.initial_value().nbytes for s in models[cell].contract.states if s.input in own)
    seen: dict[str, dict[int, list[float]]] = {cell: {batch: [] for batch in BATCHES} for cell in CELLS}
    for _ in range(ROUNDS):
        for cell, model in models.items():
            for batch in BATCHES:
                seen[cell][batch].append(round_of(model, readings[:batch].astype(np.float32)))
    return {cell: ({b: statistics.median(v) for b, v in seen[cell].items()}, sizes[cell]) for cell in CELLS}


def round_of(model: StepModel, x: Array) -> float:
    """CPU microseconds a call of `StepModel.step` over x [B, 1], the states carried from call to call."""
    states = [np.stack([value] * len(x)) for value in model.initial_states()]  # [B, …] each
    calls, begin = 0, time.process_time()
    while (spent := time.process_time() - begin) < ROUND_SECONDS:
        _, states = model.step(x, states)
        calls += 1
    return spent / calls * 1e6


def table(records: Sequence[Record], times: Mapping[str, tuple[Mapping[int, float], int]]) -> str:
    """Markdown: a row for each cell, and one for the last value."""
    head = "| cell | validation RMSE, mean | least–greatest | parameters | state, bytes | µs a step, batch 1 |"
    lines = [f"{head} µs a row, batch {BATCHES[1]} | CPU s a training |", f"| --- {'| ---: ' * 7}|"]
    for cell in CELLS:
        own = [record for record in records if record["cell"] == cell]
        errors, (spent, size) = [record["rmse"] for record in own], times[cell]
        lines.append(
            f"| {cell} | {statistics.mean(errors):.4f} | {min(errors):.4f}–{max(errors):.4f} "
            f"| {own[0]['parameters']:,} | {size} | {spent[1]:.1f} | {spent[BATCHES[1]] / BATCHES[1]:.2f} "
            f"| {statistics.mean(record['cpu_seconds'] for record in own):.0f} |"
        )
    return "\n".join([*lines, f"| *last value* | {records[0]['last_value_rmse']:.4f} | | 0 | | | | |"])


if __name__ == "__main__":
    main()
