"""Which rule to judge by, chosen without labels: the one that finds synthetic faults at the stated false-alarm budget.

Synthetic faults resemble real ones only roughly. So the search starts at defaults that were chosen on real, labelled
data, and leaves one of them only for something that finds clearly more (`MARGIN`). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from statestep.export.calibrate import Judging, Past, measured, outputs_of, with_threshold
from statestep.export.compare import Array
from statestep.export.detector import Detector, Forecasts
from statestep.export.faults import Fault

MARGIN = 0.15  # of all faults, that another choice must find more
CHOICES: dict[str, tuple[float | str | bool, ...]] = {
    "others": (True, False),
    "alpha": (0.15, 0.3, 0.05),
    "combine": ("mean", "top", "max"),
    "rule": ("plain", "likelihood", "conformal"),
}
FEW = 4  # features from which on the largest quarter is more than one


@dataclass(frozen=True, slots=True)
class Tried:
    """A way to judge, and the share of the faults that it finds, of each kind."""

    judging: Judging
    found: dict[str, float]

    @property
    def share(self) -> float:
        """Every kind counts alike."""
        return float(np.mean(list(self.found.values())))


def searched(
    clean: Past,
    faulty: Past,
    faults: Sequence[Fault],
    pasts: Sequence[Past],
    known: Forecasts,
    start: Judging,
    *,
    warm: int = 1,
    choices: Mapping[str, Sequence[float | str | bool]] = CHOICES,
    goes_on: Callable[[Tried], bool] = lambda _: True,
) -> Tried:
    """Choose one setting after the other.

    `clean` and `faulty` are a model's forecasts for `Struck` lanes, `pasts` those for whole streams, on which the
    detector is measured; `choices` says which settings are free. `goes_on` is told of each try, and ends the search by
    False.
    """
    best = tried(clean, faulty, faults, measured(pasts, known, start, warm=warm), start)
    if not goes_on(best):
        return best
    for name, values in choices.items():
        for choice in values:
            judging = replace(best.judging, **{name: choice})  # type: ignore[arg-type]
            if not _differs(name, choice, best.judging, known):
                continue
            found = tried(clean, faulty, faults, measured(pasts, known, judging, warm=warm), judging)
            if found.share > best.share + MARGIN:
                best = found
            if not goes_on(found):
                return best
    return best


def _differs(name: str, choice: object, best: Judging, known: Forecasts) -> bool:
    """Whether a choice would judge in another way."""
    if known.width == 1 and name == "combine":
        return False
    return choice != getattr(best, name) and not (choice == "top" and known.width < FEW)


def tried(clean: Past, faulty: Past, faults: Sequence[Fault], base: Detector, judging: Judging) -> Tried:
    """The share of the faults, of each kind, that a detector finds with the threshold that keeps the budget on `clean`.

    A fault is found where the score rises over the threshold while it lasts.
    """
    detector = with_threshold(base, [clean], judging).detector
    scores = outputs_of(detector, faulty)["score"]  # [T, N]
    hits = [_found(scores[:, fault.lane] > detector.threshold, fault) for fault in faults]
    kinds = sorted({fault.kind for fault in faults})
    of_kind = {kind: [hit for hit, fault in zip(hits, faults, strict=True) if fault.kind == kind] for kind in kinds}
    return Tried(judging, {kind: float(np.mean(found)) for kind, found in of_kind.items()})


def _found(over: Array, fault: Fault) -> bool:
    """Whether `over` [T] begins to hold within the fault."""
    return bool(over[fault.start : fault.end].any()) and not over[fault.start - 1]
