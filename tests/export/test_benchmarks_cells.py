"""The recall task of `benchmarks/recall.py` asks what it says it asks, and its trainings can be gone on with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def recall() -> ModuleType:
    """The script, loaded from where it lies."""
    spec = importlib.util.spec_from_file_location("benchmarks_recall", BENCHMARKS / "recall.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def drawn(recall: ModuleType, lag: int, count: int = 4000, seed: int = 0) -> tuple[Tensor, Tensor]:
    x, answers = recall.sequences(lag, count, torch.Generator().manual_seed(seed))
    return x, answers


@pytest.mark.parametrize("lag", [1, 10, 50, 200])
def test_the_answer_is_the_symbol_shown_that_many_rows_before_the_last(recall: ModuleType, lag: int) -> None:
    """A rule that looks `lag` rows back is always right; one that looks anywhere else is right by chance."""
    x, answers = drawn(recall, lag, count=2000)
    symbols = x[..., : recall.SYMBOLS].argmax(-1)  # [T, B]
    assert torch.equal(symbols[-1 - lag], answers)
    for row in {1, lag // 2 + 1, lag}:  # every other row is drawn on its own
        assert float((symbols[row] == answers).float().mean()) == pytest.approx(1 / 8, abs=0.03)


def test_only_the_first_row_is_marked_and_only_the_last_one_asks(recall: ModuleType) -> None:
    """The mark and the question stand once in each sequence, and every row shows exactly one symbol."""
    x, _ = drawn(recall, 20, count=50)
    marks, questions = x[..., recall.SYMBOLS], x[..., recall.SYMBOLS + 1]  # [T, B]
    assert bool((marks[0] == 1).all()) and float(marks.sum()) == 50
    assert bool((questions[-1] == 1).all()) and float(questions.sum()) == 50
    assert bool((x[..., : recall.SYMBOLS].sum(-1) == 1).all())


def test_a_perfect_rule_solves_it_and_a_blind_one_is_at_chance(recall: ModuleType) -> None:
    """`accuracy` is 1 for whoever reads the marked row, and an eighth for whoever reads all rows but that one."""
    assert recall.accuracy(lambda x: x[0, :, : recall.SYMBOLS], 50, 4000) == 1
    blind = recall.accuracy(lambda x: x[1:, :, : recall.SYMBOLS].sum(0), 50, 4000)
    assert blind == pytest.approx(1 / 8, abs=0.03)


def test_an_untrained_network_is_at_chance(recall: ModuleType) -> None:
    """Nothing but training tells a network the answer."""
    torch.manual_seed(0)
    assert recall.accuracy(recall.Recaller("lstm"), 10, 4000) == pytest.approx(1 / 8, abs=0.05)


def test_what_is_learnt_is_the_marked_symbol(recall: ModuleType) -> None:
    """A GRU learns a lag of two from zero in 400 updates, and knows nothing once the marked symbol is hidden."""
    torch.manual_seed(0)
    network = recall.Recaller("gru")
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(400):
        x, answers = recall.sequences(2, 32, generator)
        optimiser.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(network(x), answers))
        optimiser.step()
    assert recall.accuracy(network, 2, 1000) > 0.95

    def hidden(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, :, : recall.SYMBOLS] = 0
        answers: Tensor = network(x)
        return answers

    assert recall.accuracy(hidden, 2, 1000) < 0.25


def test_mixed_lags_are_of_every_size(recall: ModuleType) -> None:
    """Drawn lags stay within 1 to 200, and about half of them lie below the geometric middle, 14."""
    generator = torch.Generator().manual_seed(0)
    lags = torch.tensor([recall.drawn_lag(generator) for _ in range(4000)])
    assert int(lags.min()) == 1 and int(lags.max()) <= recall.LONGEST and int(lags.max()) > 150
    assert float((lags <= 14).float().mean()) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("cell", ["rnn", "lstm-projected", "lstm-layernorm", "lstm, long-memory bias"])
def test_a_training_repeats_itself_and_is_not_run_twice(recall: ModuleType, cell: str) -> None:
    """The same run gives the same record but for the time it took, and a record that is there is not missing."""
    run = recall.Run(cell, 5, 1, 2)
    first, second = (recall.train(run) | {"cpu_seconds": 0} for _ in range(2))
    assert first == second and list(first["accuracy"]) == ["5"]
    assert recall.missing(iter([run, run._replace(seed=2)]), [first]) == [run._replace(seed=2)]


def test_the_long_memory_bias_opens_the_forget_gate(recall: ModuleType) -> None:
    """At a state of zero its units forget over 2 to 200 timesteps; those of torch's own beginning over 1 to 3."""

    def times(cell: str) -> Tensor:
        torch.manual_seed(0)
        rnn = recall.Recaller(cell).rnn
        units = slice(recall.HIDDEN, 2 * recall.HIDDEN)  # of the forget gate
        bias: Tensor = (rnn.bias_ih_l0 + rnn.bias_hh_l0).detach()[units]  # [H]
        return 1 / (1 - torch.sigmoid(bias))

    long, usual = times(recall.LONG_MEMORY), times("lstm")
    assert float(long.min()) >= 2 and float(long.max()) <= recall.LONGEST and float(long.median()) > 50
    assert float(usual.min()) >= 1 and float(usual.max()) <= 3


def test_until_learnt_counts_from_the_look_that_lasts(recall: ModuleType) -> None:
    """A network that had it and lost it has not learnt it."""
    looks = {"all": [1.0, 1.0], "late": [0.5, 1.0], "lost": [1.0, 0.5], "again": [1.0, 0.5, 1.0]}
    found = {name: recall.updates_until_learnt({"curve": curve}) for name, curve in looks.items()}
    assert found == {"all": 100, "late": 200, "lost": None, "again": 300}


@pytest.mark.parametrize("document", ["benchmarks/README.md", "docs/cells.md"])
def test_the_published_table_is_that_of_the_results(recall: ModuleType, document: str) -> None:
    """Every row of the documents' table follows from the committed results, three trainings behind each figure."""
    records = recall.read(recall.RESULTS)
    assert recall.trainings(records).count(": 3") == len(recall.LAGS) + 1
    rows = [line for line in recall.table(records).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(recall.NAMES)
    assert "\n".join(rows) in (BENCHMARKS.parent / document).read_text()
