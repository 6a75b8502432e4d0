"""Detection on twelve application servers: `fit`, the service, the measures; beside what has to be beaten.

    python benchmarks/detection/asd.py DATA [--seeds 3] [--budget 60] [--apps 1,2] [--out results.json]

DATA is the folder with appNN_train.csv.gz and appNN_test.csv.gz (Application Server Dataset of InterFusion, Li et al.,
KDD 2021). For each application the train file is fitted and calibrated on, without a label, and the test file is
only scored. The model goes from `choose` (as `fit --budget` does) through `statestep replay`, the service without a
broker, over both files in a row, so that the test begins with the states of the train file's end. *Last value* and
*value* are judged by the same rules, with the rule that the same search finds for each, by the errors of their own
forecasts alone; *last value, others* has the evidence of the other features too, and shows what the network adds to it;
*random* is noise, smoothed.

Defaults were chosen on applications 1 to 6; what is claimed is claimed of 7 to 12. Needs torch. VUS-PR is taken from
TSB-AD (Liu and Paparrizos, NeurIPS 2024) where it can be imported, and else from our own, which gives the same numbers.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from statestep.consumers import wiring
from statestep.export import export_step
from statestep.export.budget import budget_of
from statestep.export.calibrate import Judging, Past, calibrated, outputs_of
from statestep.export.choose import choose
from statestep.export.detector import Forecasts
from statestep.export.faults import struck
from statestep.export.measures import alarms_per_week, auc_pr, judged, paired_interval, vus_pr
from statestep.export.search import CHOICES, searched
from statestep.export.series import Block, blocks_of, mean_of, series_of
from statestep.runtime import StepModel

APPS = range(1, 13)
REPORTED = range(7, 13)
PERIOD = 300.0  # seconds
BUDGET = "1/week"
BUFFER = 100  # rows
BASELINES = ("last value", "value", "last value, others")  # the last is no baseline: the detector without its network
START_MS = 1_600_000_000_000

Array = np.ndarray[Any, Any]


def load(path: Path) -> tuple[Array, list[str], Array]:
    """Readings float32 [T, F], the features' names, labels bool [T] (all False where the file has none)."""
    with gzip.open(path, "rt") as file:
        head, *rows = csv.reader(file)
    table = np.array(rows, float)
    keep = [i for i, name in enumerate(head) if name not in ("t", "label")]
    labels = table[:, head.index("label")] > 0 if "label" in head else np.zeros(len(table), bool)
    return table[:, keep].astype(np.float32), [head[i] for i in keep], labels


def public_vus_pr(labels: Array, score: Array) -> float:
    """VUS-PR by TSB-AD where it is there."""
    try:
        from TSB_AD.evaluation.basic_metrics import generate_curve
    except ImportError:
        return vus_pr(labels, score, BUFFER)
    return float(generate_curve(labels.astype(int), score, BUFFER, "opt", 250)[7])


def measured(labels: Array, score: Array, alarmed: Array | None) -> dict[str, Any]:
    """Everything that is reported of a score [T] and its alarms, bool [T]."""
    found: dict[str, Any] = {"vus_pr": public_vus_pr(labels, score), "auc_pr": auc_pr(labels, score)}
    if alarmed is not None:
        told = judged(alarmed, labels)
        found |= {"events": told.events, "found": told.found, "alarms": told.alarms, "true_alarms": told.true_alarms}
        found["delays"] = told.delays
        found["alarms_per_week"] = alarms_per_week(told.outside, int((~labels).sum()), PERIOD)
    return found


def through_the_service(model: Path, x: Array, features: list[str], folder: Path) -> tuple[Array, Array]:
    """Score float [T] and whether there is an event, bool [T], of every row of x [T, F], by `statestep replay`."""
    data, out = folder / "data.csv", folder / "predictions.jsonl"
    with data.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ts", *features])
        for t, row in enumerate(x.tolist()):
            writer.writerow([START_MS + t * int(PERIOD * 1000), *row])
    wiring.replay(StepModel.load(model), str(data), str(out))
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == len(x), (len(answers), len(x))
    return np.array([a["score"] for a in answers]), np.array([a.get("event") is not None for a in answers])


def baseline(name: str, train: Array, both: Array, features: list[str], start: Judging, seed: int) -> dict[str, Array]:
    """A baseline's outputs over both files, by the rule that the search finds for it.

    A baseline is judged by the errors of its own forecast; `start.others` adds the evidence of the other features.
    """
    series, _ = series_of({"app": train}, features, 0.2)
    known = Forecasts(features=tuple(features), targets=tuple(range(len(features))), mean=mean_of(series))

    def forecast(block: Block) -> Past:
        x = block.x if name.startswith("last value") else np.broadcast_to(known.mean.astype(np.float32), block.x.shape)
        return Past(block, np.ascontiguousarray(x))

    pasts, lanes = [forecast(block) for block in blocks_of(series)], struck(series, seed=seed)
    free = {key: values for key, values in CHOICES.items() if key != "others"}
    found = searched(forecast(lanes.clean), forecast(lanes.faulty), lanes.faults, pasts, known, start, choices=free)
    detector = calibrated(pasts, known, found.judging).detector
    whole, _ = series_of({"app": both}, features, 0.2)
    return {role: value[:, 0] for role, value in outputs_of(detector, forecast(blocks_of(whole)[0])).items()} | {
        "rule": np.array(str(found.judging))
    }


def one(job: tuple[Path, int, int, float]) -> dict[str, Any]:
    """One application under one seed."""
    data, app, seed, seconds = job
    train, features, _ = load(data / f"app{app:02d}_train.csv.gz")
    test, names, labels = load(data / f"app{app:02d}_test.csv.gz")
    assert names == features
    both, began = np.concatenate([train, test]), time.monotonic()
    start = Judging(budget=budget_of(BUDGET, PERIOD))
    chosen = choose({"app": train}, features, seconds=seconds, judging=start, seed=seed)
    found: dict[str, Any] = {"app": app, "seed": seed, "rule": str(chosen.judging), "tried": len(chosen.choices)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        fitted = chosen.fitted
        export_step(
            fitted.model, path, fitted.detector, ranges=fitted.ranges, period_seconds=PERIOD, data={"app": train}
        )
        score, alarmed = through_the_service(path, both, features, Path(folder))
    begin = len(train)
    found["model"] = measured(labels, score[begin:], alarmed[begin:])
    for name in BASELINES:
        plain = Judging(budget=start.budget, others=name == "last value, others")
        given = baseline(name, train, both, features, plain, seed)
        found[name] = measured(labels, given["score"][begin:], given["event"][begin:] != 0)
        found[name]["rule"] = str(given["rule"])
    noise = np.random.default_rng(seed).random(len(both))
    smooth = np.convolve(noise, 0.1 * 0.9 ** np.arange(100))[: len(both)]
    found["random"] = measured(labels, smooth[begin:], None)
    found["seconds"] = round(time.monotonic() - began)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """What is reported, as Markdown."""
    apps = sorted({r["app"] for r in results})

    def by_app(name: str, field: str, which: list[int]) -> Array:
        return np.array([np.mean([r[name][field] for r in results if r["app"] == app]) for app in which])

    reported = [app for app in apps if app in REPORTED]
    lines = ["| | VUS-PR all | VUS-PR 7–12 | AUC-PR 7–12 | events found 7–12 | precision | false alarms a week |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name in ("model", *BASELINES, "random"):
        every, late = by_app(name, "vus_pr", apps), by_app(name, "vus_pr", reported)
        cells = [name, _with_interval(every), _with_interval(late), f"{by_app(name, 'auc_pr', reported).mean():.3f}"]
        some = [r[name] for r in results if r["app"] in reported]
        if name == "random":
            cells += ["", "", ""]
        else:
            found, events = sum(r["found"] for r in some), sum(r["events"] for r in some)
            alarms, true = sum(r["alarms"] for r in some), sum(r["true_alarms"] for r in some)
            cells += [f"{found} of {events}", f"{true / max(alarms, 1):.2f}"]
            cells.append(f"{np.mean([r['alarms_per_week'] for r in some]):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    for name in BASELINES:
        for words, which in (("7–12", reported), ("all", apps)):
            if len(which) > 1:
                apart = by_app("model", "vus_pr", which) - by_app(name, "vus_pr", which)
                low, high = paired_interval(apart.tolist())
                lines.append(f"\nmodel − {name}, {words}: {apart.mean():+.3f}, 95 % interval [{low:+.3f}, {high:+.3f}]")
    return "\n".join(lines)


def _with_interval(values: Array) -> str:
    if len(values) < 2:
        return f"{values.mean():.3f}" if len(values) else ""
    low, high = paired_interval(values.tolist())
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Run, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of search for an application")
    parser.add_argument("--apps", default=",".join(map(str, APPS)))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    apps = [int(app) for app in given.apps.split(",")]
    jobs = [(given.data, app, seed, given.budget) for seed in range(given.seeds) for app in apps]
    results = []
    with ProcessPoolExecutor(given.workers) as pool:
        for found in pool.map(one, jobs):
            results.append(found)
            shown = {name: round(found[name]["vus_pr"], 3) for name in ("model", *BASELINES, "random")}
            print(found["app"], found["seed"], shown, f"{found['seconds']} s", found["rule"], flush=True)
            if given.out:
                given.out.write_text(json.dumps(results))
    print(table(results))


if __name__ == "__main__":
    main()
