"""What export is held against: cells, scaling and score in plain numpy and float64, one gate or rule a line.

The formulas are those of the torch documentation of `nn.LSTM`, `nn.GRU` and `nn.RNN`, of Welford (Technometrics 4,
1962), and of the score as `Scoring` states it. Nothing here is shared with the code under test.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Weights = tuple[Array, Array, Array, Array]  # W [gates·H, F], R [gates·H, H], and a bias for each


def sigmoid(v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


def lstm_step(x: Array, h: Array, c: Array, weights: Weights) -> tuple[Array, Array]:
    """x [F], h and c [H] → the next h and c. torch's order of gates is i, f, g, o."""
    w, r, b, b_r = weights
    zi, zf, zg, zo = np.split(w @ x + b + r @ h + b_r, 4)  # [H] each
    i = sigmoid(zi)
    f = sigmoid(zf)
    g = np.tanh(zg)
    o = sigmoid(zo)
    c = f * c + i * g
    return o * np.tanh(c), c


def gru_step(x: Array, h: Array, weights: Weights) -> Array:
    """x [F], h [H] → the next h. torch's order of gates is r, z, n; r acts after the product with the old state."""
    w, r_, b, b_r = weights
    xr, xz, xn = np.split(w @ x + b, 3)  # [H] each
    hr, hz, hn = np.split(r_ @ h + b_r, 3)
    r = sigmoid(xr + hr)
    z = sigmoid(xz + hz)
    n = np.tanh(xn + r * hn)
    return (1 - z) * n + z * h


def rnn_step(x: Array, h: Array, weights: Weights) -> Array:
    """x [F], h [H] → the next h."""
    w, r, b, b_r = weights
    return np.tanh(w @ x + b + r @ h + b_r)


def hidden_states(cell: str, layers: list[Weights], x: Array) -> Array:
    """x [T, F] from zero states → the top layer's hidden states [T, H]."""
    held = [(np.zeros(r.shape[1]), np.zeros(r.shape[1])) for _, r, _, _ in layers]
    tops = []
    for row in x:
        below = row
        for layer, weights in enumerate(layers):
            h, c = held[layer]
            if cell == "lstm":
                held[layer] = lstm_step(below, h, c, weights)
            elif cell == "gru":
                held[layer] = gru_step(below, h, weights), c
            else:
                held[layer] = rnn_step(below, h, weights), c
            below = held[layer][0]
        tops.append(below)
    return np.stack(tops)


def running(x: Array, memory: int) -> tuple[Array, Array]:
    """x [T, F] → mean and variance [T, F] of all rows so far, forgetting exponentially from `memory` rows on."""
    mean, variance = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    means, variances = [], []
    for t, row in enumerate(x):
        n = min(t + 1, memory)
        delta = row - mean
        mean = mean + delta / n
        variance = variance + (delta * (row - mean) - variance) / n
        means.append(mean)
        variances.append(variance)
    return np.stack(means), np.stack(variances)


def scores(x: Array, expected: Array, unit: Array, *, warm: int, alpha: float) -> Array:
    """x, expected [T, K], unit [T, K] or [K]: squared error in units, largest target, exponentially smoothed: [T]."""
    largest = (((x - expected) / unit) ** 2).max(axis=1)  # [T]
    score, out = 0.0, []
    for t, error in enumerate(largest):
        score = alpha * (error if t >= warm else 0.0) + (1 - alpha) * score
        out.append(score)
    return np.array(out)
