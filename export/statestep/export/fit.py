"""Training: from streams of readings to a stream model with a calibrated score.

What is trained is what is streamed: each lane (a stretch of one stream) is walked through in segments, the hidden
state carried from one to the next, and only the gradient is cut between them (truncated backpropagation, Williams and
Peng 1990). Training starts at the last value, for the head starts at zero, and keeps the epoch with the least error on
the validation tails, so it ends no worse than the last value there.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from statestep.export.calibrate import WARM, Calibrated, Judging, calibrated
from statestep.export.compare import Array
from statestep.export.detector import Forecasts
from statestep.export.errors import ExportError
from statestep.export.forecaster import Forecaster, ForecasterConfig
from statestep.export.forecasts import Errors, errors_of, past_of
from statestep.export.forms import StreamModel
from statestep.export.recur import Tensors
from statestep.export.scaling import PerStreamScaling, PooledScaling, Scaling
from statestep.export.series import (
    Block,
    Series,
    blocks_of,
    columns_of,
    enough,
    mean_of,
    ranges_of,
    series_of,
    training_rows,
    unit_of,
)
from statestep.export.weights import reference_of

SCALES = ("pooled", "per-stream")
LANE = 1024  # rows of one stream that are walked through with one carried state
LANES = 16  # lanes side by side in a batch
TAILS = 64  # validation tails side by side
SEGMENT = 64  # rows between two updates of the weights
RUN_IN = 512  # training rows before a validation tail that bring the state up to it
CLIP = 1.0  # largest norm of a gradient
LARGEST_CHANGE = 100.0  # standard deviations; a leap beyond it would teach nothing but its size
SMALLEST_GAIN = 1e-6  # standard deviations
EXAMPLE_ROWS = 400


@dataclass(frozen=True, slots=True)
class Epoch:
    """How training stands after `number` of at most `epochs`. Errors are RMSE in standard units."""

    number: int
    epochs: int
    training_rmse: float
    validation_rmse: float
    best_rmse: float
    seconds: float  # since the start of the training


@dataclass(frozen=True, slots=True)
class Example:
    """The last rows of a stream's validation tail and the forecasts that were made for them, in sensor units."""

    stream: str
    targets: tuple[str, ...]
    seen: Array  # float32 [rows, K]
    expected: Array  # float32 [rows, K]


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained model and what is to be told of it."""

    model: StreamModel
    detector: Calibrated
    errors: Errors  # on the validation tails
    example: Example  # the end of the longest stream, to look at
    history: tuple[Epoch, ...]
    best_epoch: int  # 0 where no epoch was better than the last value
    ranges: dict[str, tuple[float, float]]  # least and greatest training reading of each feature
    rows_training: int
    rows_validation: int
    rows_left_out: int  # rows that were not finite, or in streams of fewer than three rows


class _Lanes(NamedTuple):
    """Stretches of streams side by side: z [T, N, F], the wanted corrections and which of them count [T, N, K]."""

    z: Tensor
    wanted: Tensor
    counts: Tensor

    def part(self, rows: slice, lanes: int | slice | Tensor) -> _Lanes:
        """Some rows of some lanes, or of one, without the axis of lanes."""
        return _Lanes(self.z[rows, lanes], self.wanted[rows, lanes], self.counts[rows, lanes])


class _Options(NamedTuple):
    """How to train."""

    epochs: int
    learning_rate: float
    patience: int
    seed: int
    on_epoch: Callable[[Epoch], None] | None


def fit(
    streams: Mapping[str, Array],
    features: Sequence[str],
    *,
    targets: Sequence[str] | None = None,
    cell: str = "lstm",
    hidden: int = 64,
    layers: int = 1,
    dropout: float = 0.0,
    projection: int | None = None,
    scale: str = "pooled",
    epochs: int = 40,
    learning_rate: float = 5e-3,
    patience: int = 8,
    validation: float = 0.2,
    seed: int = 0,
    threads: int = 1,
    judging: Judging | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """Train a forecaster of the next row's `targets` (all features where None) on `streams`: name → [T, F].

    The last `validation` share of each stream's rows is kept for early stopping (after `patience` epochs without a
    better error) and to measure the detector, which judges as `judging` says. `cell`, `layers` and `projection` are
    those of `ForecasterConfig`: the name of a cell, or one for each layer, as in "lstm,gru". `on_epoch` is told of each
    epoch. The same seed gives the same weights on machines of one kind, whatever their number of cores: more `threads`
    than one round otherwise, and are slower for networks of up to some hundred units.

    Raises `DataError` for data and `ExportError` for settings that cannot be used.
    """
    options = _Options(epochs, learning_rate, patience, seed, on_epoch)
    columns = columns_of(features, targets)
    if scale not in SCALES:
        raise ExportError(f"scale is {scale!r}, it must be one of {list(SCALES)}")
    for name, value in (
        ("epochs", epochs),
        ("patience", patience),
        ("threads", threads),
        ("learning_rate", learning_rate),
    ):
        if not value > 0:
            raise ExportError(f"{name} is {value:g}, it must be above 0")
    config = ForecasterConfig(len(features), columns, cell, hidden, layers, dropout, projection)
    series, left_out = series_of(streams, features, validation)
    blocks = blocks_of(series)
    scaling: Scaling = PerStreamScaling(len(features))
    if scale == "pooled":
        scaling = PooledScaling(torch.from_numpy(mean_of(series)), torch.from_numpy(unit_of(training_rows(series))))
    network = Forecaster(config, seed=seed)
    model = StreamModel(network, scaling, features=tuple(features))
    warm = WARM if model.per_stream else 1
    enough(blocks, warm)
    with _torch_settings(seed, threads):
        training, tails = _lanes(model, blocks, warm)
        _start_at_last_value(network, training)
        history, best = _train(network, training, tails, options)
        pasts = [past_of(model, block) for block in blocks]
        errors = errors_of(model, pasts, warm)
        if best and errors.rmse > errors.last_value_rmse:  # a state may drift over streams longer than the run-in
            _back_to_last_value(network)
            best = 0
            pasts = [past_of(model, block) for block in blocks]
            errors = errors_of(model, pasts, warm)
        known = Forecasts(features=tuple(features), targets=columns, mean=mean_of(series))
        detector = calibrated(pasts, known, judging or Judging(), warm=warm)
        example = _example(model, max(series, key=lambda one: len(one.x)))
    return Fitted(
        model=model,
        detector=detector,
        errors=errors,
        example=example,
        history=tuple(history),
        best_epoch=best,
        ranges=ranges_of(series, features),
        rows_training=sum(one.cut for one in series),
        rows_validation=sum(len(one.x) - one.cut for one in series),
        rows_left_out=left_out,
    )


@contextlib.contextmanager
def _torch_settings(seed: int, threads: int) -> Iterator[None]:
    """Dropout draws from torch's global generator, and its threads are global too: both are left as they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def _lanes(model: StreamModel, blocks: Sequence[Block], warm: int) -> tuple[_Lanes, list[_Lanes]]:
    """The training parts as lanes, and the validation tails, each after its run-in."""
    stretches: list[_Lanes] = []
    tails: list[_Lanes] = []
    for block in blocks:
        x = torch.from_numpy(block.x)
        with torch.no_grad():
            scaled = model.scaling.sequence(x)
        std = model.targets(scaled.std).expand(*x.shape[:2], -1)  # [T, B, K]
        wanted = model.targets(x[1:] - x[:-1]) / std[:-1]  # [T−1, B, K]
        read = ~block.missing[1:][..., list(model.network.targets)]  # [T−1, B, K]
        masks = (block.training(warm), block.validation(warm))  # [T, B]
        counts, later = (torch.from_numpy(read & mask[1:, :, None]) for mask in masks)
        whole = _Lanes(scaled.z[:-1], wanted.clamp(-LARGEST_CHANGE, LARGEST_CHANGE), counts)
        validated = whole._replace(counts=later)
        for stream, (rows, cut) in enumerate(zip(block.rows.tolist(), block.cuts.tolist(), strict=True)):
            for begin in range(0, cut - 1, LANE):
                stretches.append(whole.part(slice(begin, min(begin + LANE, cut - 1)), stream))
            tails.append(validated.part(slice(max(cut - 1 - RUN_IN, 0), rows - 1), stream))
    return _abreast(stretches), [_abreast(tails[i : i + TAILS]) for i in range(0, len(tails), TAILS)]


def _abreast(stretches: Sequence[_Lanes]) -> _Lanes:
    """Stretches [T, …] side by side: [T, N, …], the shorter filled with rows that do not count."""
    z, wanted, counts = (nn.utils.rnn.pad_sequence(list(parts)) for parts in zip(*stretches, strict=True))
    return _Lanes(z, wanted, counts)


def _example(model: StreamModel, one: Series) -> Example:
    rows = min(EXAMPLE_ROWS, len(one.x) - one.cut)
    expected = reference_of(model)(one.x[:, None])["prediction"][-rows - 1 : -1, 0]  # [rows, K]
    return Example(one.name, model.target_names, one.x[-rows:, list(model.network.targets)], expected)


def _back_to_last_value(network: Forecaster) -> None:
    """A head of zeros corrects nothing."""
    nn.init.zeros_(network.head.weight)
    nn.init.zeros_(network.head.bias)


def _start_at_last_value(network: Forecaster, training: _Lanes) -> None:
    """Set the gain to the usual size of a change, and the head to zero."""
    squares = torch.where(training.counts, training.wanted.double().square(), 0.0).sum((0, 1))  # [K]
    usual = (squares / training.counts.sum((0, 1)).clamp(min=1)).sqrt()
    if training.counts.any():
        network.gain.copy_(usual.clamp(min=SMALLEST_GAIN))
    _back_to_last_value(network)


def _train(
    network: Forecaster, training: _Lanes, tails: Sequence[_Lanes], options: _Options
) -> tuple[list[Epoch], int]:
    """Train in place and restore the best epoch: what happened, and which it was (0: none beat the last value)."""
    begin = time.monotonic()
    order = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.epochs, options.learning_rate / 20)
    best, best_epoch, kept = _rmse(network, tails), 0, copy.deepcopy(network.state_dict())
    history: list[Epoch] = []
    for number in range(1, options.epochs + 1):
        error_training = _update(network, training, optimiser, order)
        error = _rmse(network, tails)
        slower.step()
        if error < best:
            best, best_epoch, kept = error, number, copy.deepcopy(network.state_dict())
        history.append(Epoch(number, options.epochs, error_training, error, best, time.monotonic() - begin))
        if options.on_epoch is not None:
            options.on_epoch(history[-1])
        if number - best_epoch >= options.patience:
            break
    network.load_state_dict(kept)
    network.eval()
    return history, best_epoch


def _update(network: Forecaster, lanes: _Lanes, optimiser: torch.optim.Optimizer, order: torch.Generator) -> float:
    """One epoch over lanes in random company: their RMSE in standard units, as met on the way."""
    network.train()
    squares, count = 0.0, 0
    shuffled = torch.randperm(lanes.z.shape[1], generator=order)  # [N]
    for first in range(0, len(shuffled), LANES):
        states: Tensors | None = None
        for begin in range(0, len(lanes.z), SEGMENT):
            z, wanted, counts = lanes.part(slice(begin, begin + SEGMENT), shuffled[first : first + LANES])
            if not counts.any():
                continue
            given, after = network(z, states)  # [S, n, K]
            states = tuple(state.detach() for state in after)
            miss = given - wanted  # [S, n, K]
            loss = (miss / network.gain)[counts].square().mean()  # every target weighs the same
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), CLIP)
            optimiser.step()
            squares, count = squares + float(miss.detach()[counts].square().sum()), count + int(counts.sum())
    return math.sqrt(squares / max(count, 1))


def _rmse(network: Forecaster, tails: Sequence[_Lanes]) -> float:
    """RMSE over the validation tails in standard units."""
    network.eval()
    squares, count = 0.0, 0
    with torch.no_grad():
        for z, wanted, counts in tails:
            miss = (network(z)[0] - wanted)[counts]
            squares, count = squares + float(miss.square().sum()), count + miss.numel()
    return math.sqrt(squares / max(count, 1))
