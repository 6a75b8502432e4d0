"""How well the demo's model sees the demo's faults: recall by kind and false alarms over fresh seeds, as Markdown.

    python benchmarks/demo_recall.py [--seeds 20] [--first-seed 20000]

Each seed is one fleet as `statestep demo` shows it (48 pumps, 5 days), stepped through the `Engine`, its alarms judged
as in `statestep.consumers.alarms`. No seed was used to train the model or to choose anything about it or the fleet.
Beside the model stands the last value as the forecast, with the same score and a threshold at the same quantile of
healthy readings: what is gained by a network that knows how the sensors belong together.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from statestep.consumers.alarms import AlarmLog, Answer, Verdict, judge
from statestep.consumers.fleet import KINDS, PERIOD_SECONDS, Fleet, simulate
from statestep.runtime import Engine, StepModel

ALPHA = 0.1  # of the score's smoothing, as in the model
QUANTILE = 0.99998  # of healthy scores, where the model's threshold is too
HEALTHY_SEEDS = range(1001, 1041)  # those of the model; for the last value's spread and threshold

Ratios = np.ndarray[Any, np.dtype[np.float64]]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="how many fleets (default 20)")
    parser.add_argument("--first-seed", type=int, default=20_000)
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    model = StepModel.load(str(files("statestep.consumers") / "models" / "pump.onnx"))
    ways = {"the demo's model": lambda fleet: stepped(model, fleet), "last value": last_value(HEALTHY_SEEDS)}
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


def last_value(healthy: Iterable[int]) -> Callable[[Fleet], Ratios]:
    """The same score where each forecast is the value before, its spread and threshold from `healthy` seeds."""
    changes = np.concatenate([change(simulate(seed=seed, faulty=False)) for seed in healthy], axis=1)  # [T, N, 3]
    spread = np.sqrt((changes**2).mean(axis=(0, 1)))  # [3]
    threshold = np.quantile(smoothed(changes / spread), QUANTILE)
    return lambda fleet: smoothed(change(fleet) / spread) / threshold


def change(fleet: Fleet) -> Ratios:
    """Each reading less the one before, [T, P, 3]; 0 at first."""
    return np.diff(fleet.values.astype(np.float64), axis=0, prepend=fleet.values[:1])


def smoothed(miss: Ratios) -> Ratios:
    """Errors in spreads [T, P, 3] → scores [T, P]: the largest square, smoothed as the model does it."""
    scores: Ratios = (miss**2).max(axis=-1)
    scores[0] *= ALPHA
    for t in range(1, len(scores)):
        scores[t] = ALPHA * scores[t] + (1 - ALPHA) * scores[t - 1]
    return scores


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
