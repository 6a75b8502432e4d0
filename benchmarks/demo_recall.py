"""How well the demo's model sees the demo's faults: recall by kind and false alarms over fresh seeds, as Markdown.

    python benchmarks/demo_recall.py [--seeds 20] [--first-seed 20000]

Each seed is one fleet as `statestep demo` shows it (48 pumps, 5 days), stepped through the `Engine`, its alarms judged
as in `statestep.consumers.alarms`. No seed was used to train the model or to choose anything about it or the fleet.
Beside the model stands the last value as the forecast, under the same rules and calibrated on the same healthy fleets
with the same budget, without the evidence of the other sensors: what is gained by a model that knows how they belong
together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from statestep.consumers.alarms import AlarmLog, Answer, Verdict, judge
from statestep.consumers.fleet import KINDS, PERIOD_SECONDS, Fleet, simulate
from statestep.export.backtest import judging_of
from statestep.export.calibrate import Past, measured, outputs_of, with_threshold
from statestep.export.detector import Forecasts
from statestep.export.series import Series, block_of
from statestep.runtime import Contract, Engine, StepModel

HEALTHY_SEEDS = range(1001, 1041)  # those of the model's threshold; for all that is measured of the last value

Ratios = np.ndarray[Any, np.dtype[np.float64]]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many fleets (default 20)")
    parser.add_argument("--first-seed", type=int, default=20_000)
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    model = StepModel.load(str(files("statestep.consumers") / "models" / "pump.onnx"))
    ways = {
        "the demo's model": lambda fleet: stepped(model, fleet),
        "last value": last_value(HEALTHY_SEEDS, model.contract),
    }
    faulty, healthy = ([simulate(seed=seed, faulty=faulty) for seed in seeds] for faulty in (True, False))
    print(
        table(
            {way: [verdict(fleet, score(fleet)) for fleet in faulty] for way, score in ways.items()},
            {way: [verdict(fleet, score(fleet)) for fleet in healthy] for way, score in ways.items()},
        )
    )
    print(f"\nSeeds {seeds[0]} to {seeds[-1]}.")


def stepped(model: StepModel, fleet: Fleet) -> Ratios:
    """The model's scores in thresholds, [T, P]."""
    engine, keys = Engine(model), fleet.keys
    rows = []
    for x in fleet.values:  # [P, 3]
        out = engine.advance(keys, x)
        rows.append(out["score"] / out["threshold"])
        engine.commit()
    return np.array(rows, np.float64)


def last_value(healthy: Iterable[int], contract: Contract) -> Callable[[Fleet], Ratios]:
    """The scores in thresholds where each forecast is the value before, [T, P]."""
    fleets = [simulate(seed=seed, faulty=False) for seed in healthy]
    targets = tuple(range(len(contract.features)))
    mean = np.mean([fleet.values.mean(axis=(0, 1), dtype=np.float64) for fleet in fleets], axis=0)  # [3]
    known = Forecasts(features=contract.feature_names, targets=targets, mean=mean)
    pasts = [past(fleet, len(fleet.values) // 2) for fleet in fleets]
    how = judging_of(contract)
    detector = with_threshold(measured(pasts, known, how), [past(fleet, 1) for fleet in fleets], how).detector

    def ratios(fleet: Fleet) -> Ratios:
        given = outputs_of(detector, past(fleet, 1))
        return np.asarray(given["score"] / given["threshold"], np.float64)

    return ratios


def past(fleet: Fleet, cut: int) -> Past:
    """A fleet with its last values as forecasts; `cut` parts what is measured on."""
    streams = {key.decode(): fleet.values[:, pump] for pump, key in enumerate(fleet.keys)}
    block = block_of([Series(name, x, np.isnan(x), cut) for name, x in streams.items()])
    return Past(block, block.x)


def verdict(fleet: Fleet, ratios: Ratios) -> Verdict:
    """The alarms that scores [T, P] raise, against the fleet's faults."""
    names = [key.decode() for key in fleet.keys]
    log = AlarmLog()
    for step, row in enumerate(ratios.tolist()):
        for name, ratio in zip(names, row, strict=True):
            log.see(name, step, ratio, ratio > 1)
    return judge(fleet.faults, log.all(), dict.fromkeys(names, len(ratios)), names)


def table(faulty: Mapping[str, Sequence[Verdict]], healthy: Mapping[str, Sequence[Verdict]]) -> str:
    """Markdown: a row for each kind of fault, one for all, two for false alarms."""
    lines = [f"| | injected | {' | '.join(f'{way}: seen | median delay' for way in faulty)} |"]
    lines.append(f"| --- {'| ---: ' * (1 + 2 * len(faulty))}|")
    for kinds, title in [*(((kind,), kind) for kind in KINDS), (tuple(KINDS), "**all**")]:
        cells = [seen([a for v in one for a in v.answers if a.fault.kind in kinds]) for one in faulty.values()]
        injected = sum(fault.fault.kind in kinds for v in next(iter(faulty.values())) for fault in v.answers)
        lines.append(f"| {title} | {injected} | {' | '.join(cells)} |")
    for fleets, title in ((faulty, "at quiet times of these fleets"), (healthy, "on the same fleets without faults")):
        cells = [f"{false_alarms(one)} |" for one in fleets.values()]
        lines.append(f"| false alarms a pump-week, {title} | | {' | '.join(cells)} |")
    return "\n".join(lines)


def seen(answers: Sequence[Answer]) -> str:
    """Two cells: how many faults were seen, and how long after their start half of these were."""
    delays = [answer.alarm.raised - answer.fault.start for answer in answers if answer.alarm is not None]
    if not delays:
        return f"0 of {len(answers)} | –"
    return f"{len(delays)} ({len(delays) / len(answers):.0%}) | {np.median(delays) * PERIOD_SECONDS / 60:.0f} min"


def false_alarms(verdicts: Sequence[Verdict]) -> str:
    """How many a week of quiet pump."""
    false, weeks = sum(len(v.false) for v in verdicts), sum(v.quiet_weeks for v in verdicts)
    return f"{false / weeks:.3f} ({false} in {weeks:.0f} weeks)"


if __name__ == "__main__":
    main()
