"""Which cells learn to remember: one symbol of eight, asked for 10 to 200 timesteps later, as Markdown and a plot.

    python benchmarks/recall.py [--seeds 1 2 3] [--lags 0 10 20 50 200] [--updates 1000]

A row shows one of eight symbols at every timestep. The first row is marked, the last one asks: the answer is the
symbol of the marked row, whatever came between. Every cell is trained alike, in two ways: *fixed*, on sequences of
the very lag that it is tested on, and *mixed*, on lags drawn from 1 to 200, the short ones as often as the long ones
in orders of size. Runs are appended to the results file, one line each; what is there already is not run again, so
a run that was interrupted goes on, and processes with different seeds may share the file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from statestep.export import cells
from statestep.export.forecaster import CELLS, PROJECTED

SYMBOLS = 8
FEATURES = SYMBOLS + 2  # the symbols, the mark, the question
HIDDEN = 32
BATCH = 32
LEARNING_RATE = 3e-3
CLIP = 1.0  # largest norm of a gradient
LAGS = (10, 20, 50, 200)  # of the test, and of training where it is fixed
BEYOND = (500, 1000)  # lags that no training shows
SHOWN = (10, 50, 200, 1000)  # lags of the table where training mixes them
LONGEST = 200  # lag of training where they are mixed
MIXED = 0  # stands for the lag of such a training
CHECK = 100  # updates between two looks at the accuracy
TESTED = 1000  # held-out sequences of a test
TEST_SEED = 1_000_003  # far from any seed of training
LEARNT = 0.99
LONG_MEMORY = "lstm, long-memory bias"  # the one line that is not trained as torch begins it
NAMES = (*CELLS, LONG_MEMORY)

RESULTS = Path(__file__).parent / "results" / "recall.jsonl"
PLOT = Path(__file__).parents[1] / "docs" / "recall.png"

Record = dict[str, Any]


class Run(NamedTuple):
    """One training: a cell, the lag it is trained on (`MIXED` for all), a seed, and how many updates."""

    cell: str
    lag: int
    seed: int
    updates: int


class Recaller(nn.Module):
    """One recurrent layer, and a linear head that reads its last hidden state."""

    def __init__(self, cell: str):
        super().__init__()
        kind = "lstm" if cell == LONG_MEMORY else cell
        settings = {"proj_size": HIDDEN // 2} if kind == PROJECTED else {}
        self.rnn = CELLS[kind](FEATURES, HIDDEN, 1, **settings)
        self.head = nn.Linear(cells.width_of(self.rnn), SYMBOLS)
        if cell == LONG_MEMORY:
            remember_long(self.rnn)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, F] → what each symbol scores as the answer, [B, 8]."""
        answers: Tensor = self.head(cells.run(self.rnn, x, None)[0][-1])
        return answers

    @property
    def parameters_count(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self.parameters())


def remember_long(lstm: nn.Module) -> None:
    """Biases by which units forget over 1 to `LONGEST` timesteps (Tallec and Ollivier 2018). Torch's are around 0."""
    bias, other = lstm.get_parameter("bias_ih_l0"), lstm.get_parameter("bias_hh_l0")  # [4H], gates i f g o
    with torch.no_grad():
        other[: 2 * HIDDEN] = 0
        bias[HIDDEN : 2 * HIDDEN] = torch.log(torch.empty(HIDDEN).uniform_(1, LONGEST - 1))
        bias[:HIDDEN] = -bias[HIDDEN : 2 * HIDDEN]


def main() -> None:
    """Run what is missing, print the tables, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lags", type=int, nargs="+", default=[MIXED, *LAGS], help="of training, 0 for mixed")
    parser.add_argument("--updates", type=int, default=1000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path, default=PLOT)
    parser.add_argument("--only-run", action="store_true", help="no tables and no plot")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for run in missing(plan(args.seeds, args.lags, args.updates), read(args.results)):
        with args.results.open("a") as file:
            file.write(json.dumps(train(run)) + "\n")
    if not args.only_run:
        records = [record for record in read(args.results) if record["updates"] == args.updates]
        print(table(records))
        draw(args.plot, records)


def plan(seeds: Sequence[int], lags: Sequence[int], updates: int) -> Iterator[Run]:
    """Seed by seed, so that a run that is cut short leaves whole seeds."""
    for seed in seeds:
        for lag in lags:
            yield from (Run(cell, lag, seed, updates) for cell in NAMES)


def read(path: Path) -> list[Record]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(runs: Iterator[Run], records: Sequence[Record]) -> list[Run]:
    """The runs that have no result."""
    done = {Run(*(record[field] for field in Run._fields)) for record in records}
    return [run for run in runs if run not in done]


def sequences(lag: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x [lag + 1, count, F] and the answers [count]: the symbol that each sequence showed `lag` rows before its end."""
    symbols = torch.randint(SYMBOLS, (lag + 1, count), generator=generator)
    x = torch.zeros(lag + 1, count, FEATURES)
    x[..., :SYMBOLS] = nn.functional.one_hot(symbols, SYMBOLS)
    x[0, :, SYMBOLS] = 1
    x[-1, :, SYMBOLS + 1] = 1
    return x, symbols[0]


def train(run: Run) -> Record:
    """Train one network: its accuracy by lag on held-out sequences, and by update on the way."""
    torch.manual_seed(run.seed)
    generator = torch.Generator().manual_seed(run.seed)
    network = Recaller(run.cell)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    lags, begin, curve = LAGS if run.lag == MIXED else (run.lag,), time.process_time(), []
    for update in range(1, run.updates + 1):
        x, answers = sequences(run.lag or drawn_lag(generator), BATCH, generator)
        loss: Any = nn.functional.cross_entropy(network(x), answers)  # torch does not type its `backward`
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), CLIP)
        optimiser.step()
        if update % CHECK == 0:
            curve.append(min(accuracy(network, lag, BATCH * 8) for lag in lags))
    tested = (*lags, *BEYOND) if run.lag == MIXED else lags
    return {
        **run._asdict(),
        "parameters": network.parameters_count,
        "accuracy": {str(lag): accuracy(network, lag, TESTED) for lag in tested},
        "curve": curve,  # every `CHECK` updates, of the worst lag
        "cpu_seconds": round(time.process_time() - begin, 1),
    }


def drawn_lag(generator: torch.Generator) -> int:
    """A lag of 1 to `LONGEST`, its logarithm spread evenly."""
    return round(math.exp(float(torch.rand((), generator=generator)) * math.log(LONGEST)))


def accuracy(answer: Callable[[Tensor], Tensor], lag: int, count: int) -> float:
    """The share of `count` held-out sequences whose answer is right."""
    x, answers = sequences(lag, count, torch.Generator().manual_seed(TEST_SEED + lag))
    with torch.no_grad():
        return float((answer(x).argmax(-1) == answers).float().mean())


def scores(records: Sequence[Record], cell: str, trained: int, tested: int) -> list[float]:
    """Accuracies of one cell over its seeds."""
    return [r["accuracy"][str(tested)] for r in records if r["cell"] == cell and r["lag"] == trained]


def updates_until_learnt(record: Record) -> int | None:
    """The first look from which on every look saw what is to be learnt at all lags; None if there is none."""
    below = [number for number, seen in enumerate(record["curve"], 1) if seen < LEARNT]
    looks = below[-1] + 1 if below else 1
    return looks * CHECK if looks <= len(record["curve"]) else None


def table(records: Sequence[Record]) -> str:
    """Markdown: a row for each cell; mean accuracy, and least to greatest over seeds where they differ."""
    fixed = " | ".join(f"fixed {lag}" for lag in LAGS)
    mixed = " | ".join(f"mixed {lag:,}" for lag in SHOWN)
    lines = [f"| cell | parameters | {fixed} | {mixed} | updates until learnt, mixed |"]
    lines.append(f"| --- {'| ---: ' * (2 + len(LAGS) + len(SHOWN))}|")
    for cell in NAMES:
        own = [record for record in records if record["cell"] == cell]
        if not own:
            continue
        shown = [spread(scores(own, cell, lag, lag)) for lag in LAGS]
        shown += [spread(scores(own, cell, MIXED, lag)) for lag in SHOWN]
        learnt = ", ".join(str(updates_until_learnt(r) or "–") for r in own if r["lag"] == MIXED)
        lines.append(f"| {cell} | {own[0]['parameters']:,} | {' | '.join(shown)} | {learnt} |")
    return "\n".join([*lines, "", trainings(records)])


def trainings(records: Sequence[Record]) -> str:
    """How many seeds stand behind the figures: least to most over cells, which differ where a run was cut short."""
    said = []
    for lag in (*LAGS, MIXED):
        counts = {sum((r["cell"], r["lag"]) == (cell, lag) for r in records) for cell in NAMES}
        said.append(
            f"{f'fixed {lag}' if lag else 'mixed'}: {'–'.join(str(n) for n in sorted({min(counts), max(counts)}))}"
        )
    return f"Seeds behind each figure: {', '.join(said)}."


def spread(values: Sequence[float]) -> str:
    """Mean, and the range where there is one.

    >>> spread([0.5, 1.0]), spread([1.0, 1.0])
    ('.75 (.50–1.00)', '1.00')
    """
    if not values:
        return ""
    mean, least, most = (
        f"{value:.2f}".removeprefix("0") for value in (sum(values) / len(values), min(values), max(values))
    )
    return mean if least == most else f"{mean} ({least}–{most})"


# Paul Tol's colours for lines, told apart by the colour-blind; related cells share a colour and differ in dashes.
STYLES: dict[str, tuple[str, str, str]] = {  # cell → colour, dashes, marker
    "rnn": ("#CC3311", "-", "o"),
    "rnn-relu": ("#CC3311", "--", "s"),
    "lstm": ("#0077BB", "-", "o"),
    "lstm-projected": ("#0077BB", "--", "s"),
    "lstm-peephole": ("#33BBEE", "-", "^"),
    "lstm-coupled": ("#009988", "-", "v"),
    "lstm-peephole-coupled": ("#009988", "--", "D"),
    "lstm-layernorm": ("#000000", "-", "P"),
    "gru": ("#EE7733", "-", "o"),
    "gru-reset-before": ("#EE7733", "--", "s"),
    LONG_MEMORY: ("#AA4499", ":", "*"),
}


def draw(path: Path, records: Sequence[Record]) -> None:
    """Accuracy by lag, a line a cell, the band from the worst seed to the best."""
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    panel(left, records, {lag: lag for lag in LAGS}, "trained on this lag alone")
    panel(right, records, dict.fromkeys((*LAGS, *BEYOND), MIXED), f"trained on lags of 1 to {LONGEST}, mixed")
    right.axvspan(LONGEST, BEYOND[-1] * 1.15, color="#f2f2f2", zorder=0)
    right.annotate("longer than in training", (LONGEST * 1.06, 0.02), fontsize="small", color="#555555")
    left.set_ylabel("accuracy on held-out sequences")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, format="png")


def panel(axes: Axes, records: Sequence[Record], lags: dict[int, int], title: str) -> None:
    """One way of training. `lags`: the lag that is tested → the lag of training."""
    for number, (cell, (colour, dashes, marker)) in enumerate(STYLES.items()):
        found = {tested: scores(records, cell, trained, tested) for tested, trained in lags.items()}
        # Each cell a little aside, so that lines which lie on each other can be told apart.
        x = [tested * 1.012 ** (number - len(STYLES) / 2) for tested, values in found.items() if values]
        kept = [values for values in found.values() if values]
        axes.fill_between(x, [min(v) for v in kept], [max(v) for v in kept], color=colour, alpha=0.08, linewidth=0)
        mean = [sum(v) / len(v) for v in kept]
        axes.plot(x, mean, color=colour, linestyle=dashes, marker=marker, markersize=4.5, linewidth=1.4, label=cell)
    axes.axhline(1 / SYMBOLS, color="#777777", linestyle="-.", linewidth=1, label="chance, 1 in 8", zorder=1)
    axes.set(xscale="log", ylim=(0, 1.04), xlabel="lag, timesteps", title=title)
    axes.set_xticks(list(lags), [f"{lag:,}" for lag in lags])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")


if __name__ == "__main__":
    main()
