"""A falling curve in characters: how far apart streams of different pasts are, by the timesteps that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCKS = " ▁▂▃▄▅▆▇█"
WIDTH = 60  # columns of the plot; with its labels it fits into 80
SMALLEST, LARGEST = -6, 4  # decades that are worth a row


def curve(steps: Sequence[int], gaps: Sequence[float], width: int = WIDTH) -> list[str]:
    """The lines of a plot: columns are timesteps, spaced by their logarithm, and each row is a decade of the gap.

    `gaps` are those at `steps`, which rise. What has no curve, for want of points or of any gap, has no lines.

    >>> print("\\n".join(curve([1, 10, 100], [1.0, 0.1, 0.01], width=12)))
     0.1 │█▇▅▄▂▁
    0.01 │██████▇▆▄▃▁
         └┬─────┬────┬
          1     10   100
    """
    shown = [(math.log(step), gap) for step, gap in zip(steps, gaps, strict=True) if step >= 1]
    positive = [math.log10(gap) for _, gap in shown if gap > 0]
    if len(shown) < 2 or not positive or shown[-1][0] <= 0:
        return []
    top = min(max(math.ceil(max(positive)), SMALLEST + 1), LARGEST)
    bottom = max(min(math.floor(min(positive)), top - 1), SMALLEST)
    last = shown[-1][0]
    heights = [_height(shown, last * column / (width - 1)) for column in range(width)]
    labels = [_number(10.0**decade) for decade in range(bottom, top)]
    margin = max(map(len, labels))
    rows = []
    for decade in range(top - 1, bottom - 1, -1):
        cells = [BLOCKS[round(8 * min(max(height - decade, 0), 1))] for height in heights]
        rows.append(f"{labels[decade - bottom]:>{margin}} │{''.join(cells)}".rstrip())
    return rows + _axis(math.exp(last), width, margin)


def _height(shown: Sequence[tuple[float, float]], place: float) -> float:
    """log10 of the gap at `place` on the axis, between the points that were measured."""
    for (left, before), (right, after) in pairwise(shown):
        if place <= right + 1e-9:
            low, high = (math.log10(gap) if gap > 0 else -math.inf for gap in (after, before))
            share = (place - left) / (right - left)
            if low == -math.inf:
                return high if share < 1e-9 else low
            return high + (low - high) * share
    return -math.inf


def _axis(last: float, width: int, margin: int) -> list[str]:
    """The ticks at powers of ten, and the numbers below them."""
    ticks, numbers, free = ["─"] * width, [" "] * (width + 12), 0
    for power in range(math.floor(math.log10(last) + 1e-9) + 1):
        column = round((width - 1) * power * math.log(10) / math.log(last))
        ticks[column] = "┬"
        label = f"{10**power:,}"
        if column >= free:
            numbers[column : column + len(label)] = label
            free = column + len(label) + 1
    return [f"{'':>{margin}} └{''.join(ticks)}", f"{'':>{margin}}  {''.join(numbers)}".rstrip()]


def _number(value: float) -> str:
    return f"{value:g}" if 1e-4 <= value < 1e5 else f"{value:.0e}".replace("e-0", "e-")
