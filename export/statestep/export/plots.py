"""Two pictures of a training: how the error fell, and what the forecasts look like beside what was seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from statestep.export.fit import Epoch, Example

MOST_TARGETS = 4  # in one picture
SEEN, EXPECTED, GUIDE = "#4d4d4d", "#d95f02", "#999999"
DOTS_PER_INCH = 120


def plot_loss(path: str | Path, history: Sequence[Epoch], *, best_epoch: int, last_value_rmse: float) -> None:
    """Draw the errors of training and validation by epoch, in standard units, with the last value's for a measure.

    `best_epoch` is the one whose weights were kept; 0 stands for the last value itself.
    """
    numbers = [epoch.number for epoch in history]
    figure, axes = _figure(rows=1, height=3.6)
    axes[0].plot(numbers, [epoch.training_rmse for epoch in history], color=SEEN, label="training")
    axes[0].plot(numbers, [epoch.validation_rmse for epoch in history], color=EXPECTED, label="validation")
    axes[0].axhline(last_value_rmse, color=GUIDE, linestyle="--", linewidth=1, label="last value, validation")
    if best_epoch:
        best = history[best_epoch - 1]
        axes[0].plot(best.number, best.validation_rmse, "o", color=EXPECTED, label=f"kept: epoch {best_epoch}")
    axes[0].set(xlabel="epoch", ylabel="RMSE, standard deviations", title="One-step error")
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].legend(frameon=False, fontsize="small")
    _write(figure, path)


def plot_forecast(path: str | Path, example: Example) -> None:
    """Draw the end of a stream's validation tail and the forecasts that were made for it, target by target."""
    shown = example.targets[:MOST_TARGETS]
    figure, axes = _figure(rows=len(shown), height=1.2 + 1.9 * len(shown))
    for column, (target, plot) in enumerate(zip(shown, axes, strict=True)):
        plot.plot(example.seen[:, column], color=SEEN, linewidth=1.6, label="seen")
        plot.plot(example.expected[:, column], color=EXPECTED, linewidth=1, label="forecast, one step before")
        plot.set_ylabel(target)
    left = len(example.targets) - len(shown)
    more = f" ({left} more targets not shown)" if left else ""
    axes[0].set_title(f"Stream {example.stream}: the last {len(example.seen)} rows of validation{more}")
    axes[0].legend(frameon=False, fontsize="small", ncols=2, loc="upper left")
    axes[-1].set_xlabel("timestep")
    figure.align_ylabels()
    _write(figure, path)


def _figure(rows: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(8, height), layout="constrained")
    FigureCanvasAgg(figure)  # no window system and no global state, unlike pyplot
    axes = [figure.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for plot in axes:
        plot.spines[["top", "right"]].set_visible(False)
        plot.grid(axis="y", color="#eeeeee")
        plot.margins(x=0.01)
    return figure, axes


def _write(figure: Figure, path: str | Path) -> None:
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
