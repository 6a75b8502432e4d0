"""`fit --budget`: the network and the rule that find synthetic faults best within a given time. No label is needed.

First the rule is chosen for the default network (`search.py`), then other networks are trained and judged by that rule.
What is chosen is measured and calibrated as any other fit is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from statestep.export.calibrate import WARM, Judging, Past, calibrated, measured
from statestep.export.compare import Array
from statestep.export.detector import Forecasts
from statestep.export.faults import Struck, struck
from statestep.export.fit import Fitted, fit
from statestep.export.forecasts import past_of
from statestep.export.search import Tried, searched, tried
from statestep.export.series import Series, blocks_of, mean_of, series_of

NETWORKS: tuple[dict[str, Any], ...] = (  # what a network differs in from the one that was asked for
    {"hidden": 0.5},
    {"hidden": 2.0},
    {"learning_rate": 0.4},
    {"learning_rate": 2.0},
    {"layers": 2},
)
MARGIN = 0.03  # of all faults, that another network must find more


@dataclass(frozen=True, slots=True)
class Choice:
    """One network and rule that was tried."""

    network: str  # in words
    tried: Tried


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen, and all that was tried, in order."""

    fitted: Fitted
    judging: Judging
    choices: tuple[Choice, ...]

    def told(self) -> dict[str, Any]:
        """What the contract's `detector` says of the search."""
        share = max(choice.tried.share for choice in self.choices if choice.tried.judging == self.judging)
        return {"tried": len(self.choices), "faults_found": round(share, 3)}


def choose(
    streams: Mapping[str, Array],
    features: Sequence[str],
    *,
    seconds: float,
    judging: Judging | None = None,
    validation: float = 0.2,
    seed: int = 0,
    on_choice: Callable[[Choice], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    **network: Any,
) -> Chosen:
    """Fit within about `seconds`; the first network is trained in any case. `network` is as `fit` takes it.

    How much is tried hangs on the time, so two runs may choose differently. `on_choice` is told of each try. Raises as
    `fit` does.
    """
    begin = clock()
    judging = judging or Judging()
    best = fit(streams, features, judging=judging, validation=validation, seed=seed, **network)
    spent = clock() - begin
    series, _ = series_of(streams, features, validation)
    lanes = struck(series, seed=seed)
    choices: list[Choice] = []

    def goes_on(words: str, found: Tried) -> bool:
        choices.append(Choice(words, found))
        on_choice(choices[-1])
        return clock() - begin < seconds

    seen = _seen(best, series, lanes)
    winner = searched(
        seen.clean,
        seen.faulty,
        lanes.faults,
        seen.pasts,
        seen.known,
        judging,
        warm=seen.warm,
        goes_on=partial(goes_on, _words(network)),
    )
    for change in NETWORKS:
        if clock() - begin + spent > seconds:
            break
        other = _changed(network, change)
        made = fit(streams, features, judging=judging, validation=validation, seed=seed, **other)
        theirs = _seen(made, series, lanes)
        base = measured(theirs.pasts, theirs.known, winner.judging, warm=theirs.warm)
        found = tried(theirs.clean, theirs.faulty, lanes.faults, base, winner.judging)
        goes_on(_words(other), found)
        if found.share > winner.share + MARGIN:
            best, seen, winner = made, theirs, found
    if winner.judging != judging:
        best = replace(best, detector=calibrated(seen.pasts, seen.known, winner.judging, warm=seen.warm))
    return Chosen(best, winner.judging, tuple(choices))


class _Seen(NamedTuple):
    """What one fit forecasts: for whole streams, and for the lanes without faults and with them."""

    pasts: list[Past]
    clean: Past
    faulty: Past
    known: Forecasts
    warm: int


def _seen(fitted: Fitted, series: Sequence[Series], lanes: Struck) -> _Seen:
    model = fitted.model
    known = Forecasts(features=model.features, targets=model.network.targets, mean=mean_of(series))
    pasts = [past_of(model, block) for block in blocks_of(series)]
    warm = WARM if model.per_stream else 1
    return _Seen(pasts, past_of(model, lanes.clean), past_of(model, lanes.faulty), known, warm)


def _changed(network: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The network with a size or rate times a factor, or another number of layers."""
    given = {"hidden": 64, "learning_rate": 5e-3, "layers": 1} | dict(network)
    changed = {
        name: value if name == "layers" else type(given[name])(given[name] * value) for name, value in change.items()
    }
    return dict(network) | changed


def _words(network: Mapping[str, Any]) -> str:
    """What a network is, in short.

    >>> _words({"hidden": 32})
    'lstm 1 × 32, rate 0.005'
    """
    given = {"cell": "lstm", "hidden": 64, "layers": 1, "learning_rate": 5e-3} | dict(network)
    return f"{given['cell']} {given['layers']} × {given['hidden']}, rate {given['learning_rate']:g}"
