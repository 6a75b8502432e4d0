"""What export is held against: cells and scaling in plain numpy and float64, one gate a line.

The formulas are those of the torch documentation of `nn.LSTM`, `nn.GRU` and `nn.RNN`, of Gers and Schmidhuber (2000)
for peepholes, Greff and others (2017) for coupled gates, Cho and others (2014) for the GRU with its reset before, Ba,
Kiros and Hinton (2016) for layer normalisation, and of Welford (Technometrics 4, 1962). Nothing here is shared with the
code under test. A detector has a twin of its own, in `twin.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Weights = Mapping[str, Array]  # one layer's, by torch's names without the layer's number; a bias may be absent
Step = Callable[[Array, Array, Array, Weights], tuple[Array, Array]]  # x [F], h, c → the next h, c; c is often idle


def layers_of(module: Any) -> list[Weights]:
    """The weights of a torch layer, in float64, for each of its layers."""
    layers: list[dict[str, Array]] = [{} for _ in range(module.num_layers)]
    for name, weight in module.named_parameters():
        own, _, layer = name.rpartition("_l")
        layers[int(layer)][own] = weight.detach().double().numpy()
    return list(layers)


def sigmoid(v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


def norm(v: Array) -> Array:
    return np.asarray((v - v.mean()) / np.sqrt(v.var() + 1e-5))


def products(x: Array, h: Array, w: Weights) -> tuple[Array, Array]:
    """W x + b and R h + b', each [gates · H]."""
    return w["weight_ih"] @ x + w.get("bias_ih", 0.0), w["weight_hh"] @ h + w.get("bias_hh", 0.0)


def rnn_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    given, kept = products(x, h, w)
    return np.tanh(given + kept), c


def relu_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    given, kept = products(x, h, w)
    return np.maximum(given + kept, 0), c


def lstm_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    """torch's order of gates is i, f, g, o."""
    zi, zf, zg, zo = np.split(np.add(*products(x, h, w)), 4)  # [H] each
    i = sigmoid(zi)
    f = sigmoid(zf)
    g = np.tanh(zg)
    o = sigmoid(zo)
    c = f * c + i * g
    return o * np.tanh(c), c


def projected_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    """What leaves is projected, and so is what comes back."""
    wide, c = lstm_step(x, h, c, w)
    return w["weight_hr"] @ wide, c


def peephole_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    """i and f see the old cell state, o the new one."""
    zi, zf, zg, zo = np.split(np.add(*products(x, h, w)), 4)
    pi, pf, po = np.split(w["weight_peephole"], 3)
    i = sigmoid(zi + pi * c)
    f = sigmoid(zf + pf * c)
    g = np.tanh(zg)
    c = f * c + i * g
    o = sigmoid(zo + po * c)
    return o * np.tanh(c), c


def coupled_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    """No forget gate: f = 1 − i. The order of gates is i, g, o."""
    zi, zg, zo = np.split(np.add(*products(x, h, w)), 3)
    i = sigmoid(zi)
    g = np.tanh(zg)
    o = sigmoid(zo)
    c = (1 - i) * c + i * g
    return o * np.tanh(c), c


def peephole_coupled_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    zi, zg, zo = np.split(np.add(*products(x, h, w)), 3)
    pi, po = np.split(w["weight_peephole"], 2)
    i = sigmoid(zi + pi * c)
    g = np.tanh(zg)
    c = (1 - i) * c + i * g
    o = sigmoid(zo + po * c)
    return o * np.tanh(c), c


def layernorm_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    """Each product is normalised over all four gates, and the cell state on its way out."""
    given = w["gain_ih"] * norm(w["weight_ih"] @ x)
    kept = w["gain_hh"] * norm(w["weight_hh"] @ h)
    zi, zf, zg, zo = np.split(given + kept + w.get("bias", 0.0), 4)
    i = sigmoid(zi)
    f = sigmoid(zf)
    g = np.tanh(zg)
    o = sigmoid(zo)
    c = f * c + i * g
    return o * np.tanh(w["gain_c"] * norm(c) + w.get("bias_c", 0.0)), c


def gru_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    """torch's order of gates is r, z, n; r acts after the product with the old state."""
    given, kept = products(x, h, w)
    xr, xz, xn = np.split(given, 3)  # [H] each
    hr, hz, hn = np.split(kept, 3)
    r = sigmoid(xr + hr)
    z = sigmoid(xz + hz)
    n = np.tanh(xn + r * hn)
    return (1 - z) * n + z * h, c


def reset_before_step(x: Array, h: Array, c: Array, w: Weights) -> tuple[Array, Array]:
    """r acts on the old state, before the product."""
    given, kept = products(x, h, w)
    xr, xz, xn = np.split(given, 3)
    hr, hz, _ = np.split(kept, 3)
    _, _, after_reset = np.split(w["weight_hh"], 3)  # [H, H]
    _, _, b = np.split(np.broadcast_to(w.get("bias_hh", np.zeros(1)), kept.shape), 3)
    r = sigmoid(xr + hr)
    z = sigmoid(xz + hz)
    n = np.tanh(xn + after_reset @ (r * h) + b)
    return (1 - z) * n + z * h, c


STEPS: dict[str, Step] = {
    "rnn": rnn_step,
    "rnn-relu": relu_step,
    "lstm": lstm_step,
    "lstm-projected": projected_step,
    "lstm-peephole": peephole_step,
    "lstm-coupled": coupled_step,
    "lstm-peephole-coupled": peephole_coupled_step,
    "lstm-layernorm": layernorm_step,
    "gru": gru_step,
    "gru-reset-before": reset_before_step,
}


def hidden_states(cell: str, layers: Sequence[Weights], x: Array) -> Array:
    """x [T, F] from zero states → the top layer's hidden states [T, H]."""
    return run(cell, layers, x)[0]


def run(
    cell: str, layers: Sequence[Weights], x: Array, states: Sequence[tuple[Array, Array]] | None = None
) -> tuple[Array, list[tuple[Array, Array]]]:
    """x [T, F] from each layer's (h, c), zero where None → the top layer's hidden states, and each layer's last."""
    held = list(states or [(np.zeros(w["weight_hh"].shape[1]), np.zeros(units_of(w))) for w in layers])
    tops = []
    for row in x:
        below = row
        for layer, weights in enumerate(layers):
            held[layer] = STEPS[cell](below, *held[layer], weights)
            below = held[layer][0]
        tops.append(below)
    return np.stack(tops), held


def units_of(weights: Weights) -> int:
    """The hidden units of a layer, which a projection narrows."""
    return int(weights["weight_hr" if "weight_hr" in weights else "weight_hh"].shape[1])


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
