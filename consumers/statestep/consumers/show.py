"""What the commands print: plain functions from results to rich tables and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from statestep.consumers.bench import EngineRow, ServiceRow
from statestep.consumers.curve import curve
from statestep.consumers.report import Summary
from statestep.consumers.show_detector import detector
from statestep.runtime import Contract, StepModel

if TYPE_CHECKING:
    from statestep.export.choose import Choice
    from statestep.export.convert import Converted
    from statestep.export.fit import Fitted
    from statestep.export.forecasts import Errors
    from statestep.export.verify import Report

MARKS = {True: "[green]✓[/green]", False: "[red]✗[/red]", None: "[yellow]–[/yellow]"}


def contract(model: StepModel, console: Console, *, forgets: str | None = None) -> None:
    """A step model as a person reads it. `forgets` is its memory in a sentence."""
    held = model.contract
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, fact in _facts(model, held):
        facts.add_row(name, escape(fact))
    console.print(facts)
    console.print()
    features = _table("feature", "unit", "seen in training", "forecast")
    forecast = held.output("prediction")
    named = set(forecast.features or held.feature_names) if forecast else set()
    for feature in held.features:
        seen = "" if feature.min is None or feature.max is None else f"{feature.min:g} … {feature.max:g}"
        features.add_row(escape(feature.name), escape(feature.unit or ""), seen, "yes" if feature.name in named else "")
    console.print(features)
    states = _table("state in → out", "shape", "dtype", "starts at", "bytes a stream")
    for state in held.states:
        value = state.initial_value()
        start = f"{float(value.flat[0]):g}" if np.all(value == value.flat[0]) else "given values"
        shape = "×".join(map(str, state.shape)) or "scalar"
        states.add_row(escape(f"{state.input} → {state.output}"), shape, state.dtype, start, f"{value.nbytes:,}")
    console.print(states)
    outputs = _table("output", "meaning")
    for output in held.outputs:
        outputs.add_row(escape(output.name), output.role or "its own")
    console.print(outputs)
    if held.gaps is not None:
        console.print(f"where a stream was silent: {gaps(held.gaps)}", highlight=False)
    if held.detector is not None:
        detector(held.detector, held.period_seconds, console)
    if held.memory is not None:
        memory(held.memory, forgets or "", console)


def gaps(held: Mapping[str, Any]) -> str:
    """What a model's plan does about gaps, in words.

    >>> gaps({"plan": [{"up_to": 2, "do": "hold"}, {"up_to": 50, "do": "bridge"}, {"up_to": None, "do": "reset"}]})
    'up to 2 missing timesteps hold, up to 50 bridge, else reset'
    """
    *steps, last = held["plan"]
    if not steps:
        return f"always {last['do']}"
    first, *more = [
        f"up to {step['up_to']}{' missing timesteps' * (not n)} {step['do']}" for n, step in enumerate(steps)
    ]
    return ", ".join([first, *more, f"else {last['do']}"])


def memory(held: Mapping[str, Any], forgets: str, console: Console) -> None:
    """How soon a model forgets: a sentence, and the curve that it was read from."""
    console.print()
    console.print("memory", style="bold")
    console.print(forgets, highlight=False)
    found = held.get("curve", {})
    if lines := curve(found.get("steps", []), found.get("gap", [])):
        console.print("how far apart streams with different pasts are, in standard deviations (a score: in its")
        console.print("threshold), after so many timesteps of the same readings:")
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def choice(found: Choice, console: Console) -> None:
    """One network and rule that a search has tried."""
    how = found.tried.judging
    rule = f"smoothing {how.alpha:g}, {how.combine} of features, {how.rule}{', others of the row' * how.others}"
    console.print(
        f"{found.network}; {rule}: finds {found.tried.share:.0%} of the synthetic faults",
        highlight=False,
        soft_wrap=True,
    )


def fitted(found: Fitted, console: Console) -> None:
    """How training went."""
    left_out = f", {found.rows_left_out:,} left out" if found.rows_left_out else ""
    console.print(
        f"trained on {found.rows_training:,} rows, validated on {found.errors.rows:,}{left_out}; "
        f"kept epoch {found.best_epoch} of {len(found.history)}",
        highlight=False,
    )
    errors(found.errors, console)


def errors(found: Errors, console: Console) -> None:
    """A model's validation error beside the last value's, and a warning where it loses."""
    table = _table("validation RMSE", "model", "last value", "")
    table.add_row("all, standardised", f"{found.rmse:.4f}", f"{found.last_value_rmse:.4f}", "")
    for target, (ours, last) in found.by_target.items():
        table.add_row(
            escape(target), f"{ours:.4g}", f"{last:.4g}", "[yellow]last value is better[/yellow]" * (ours > last)
        )
    console.print(table)
    if found.losing:
        console.print(
            f"[yellow]warning:[/yellow] on {len(found.losing)} of {len(found.by_target)} targets the last value "
            "forecasts better than the model: more data, other features or fewer units may help"
        )


def converted(made: Converted, console: Console) -> None:
    """What became of a graph: its states, and the proof."""
    held = made.contract
    states = ", ".join(f"{state.input} → {state.output}" for state in held.states)
    if made.proof is None:
        console.print(f"a step model already, its states: {escape(states)}", soft_wrap=True, highlight=False)
    else:
        proof = made.proof
        how = "bit-equal" if proof.exact else f"within {proof.largest:.1g} of each output's spread"
        sizes = f"lengths {', '.join(map(str, proof.lengths))}, batches {', '.join(map(str, proof.batches))}"
        console.print(f"states lifted: {escape(states)}", soft_wrap=True, highlight=False)
        console.print(
            f"stepped = original: {how} over {proof.timesteps:,} timesteps ({sizes}), from zero and from random states",
            soft_wrap=True,
            highlight=False,
        )
    if made.weights_cost is not None:
        console.print(
            f"weights in float16: outputs change by {made.weights_cost:.1g} of their spread at most", highlight=False
        )
    if held.output("prediction") is None:
        console.print(
            "[yellow]note:[/yellow] no output is named as the forecast, so all come out under “outputs”: "
            "name it by --prediction, or by --targets",
            soft_wrap=True,
        )
    report(made.report, console)


def report(found: Report, console: Console) -> None:
    """What `verify` found, one line a check, the speed last."""
    console.print(f"[bold]{escape(found.name)}[/bold]")
    for check in found.checks:
        console.print(f" {MARKS[check.passed]} {escape(check.name)}: {escape(check.detail)}", highlight=False)
    for speed in found.speeds:
        each = speed.microseconds / speed.batch
        console.print(f"   {speed.batch:>5} streams a step: {speed.microseconds:,.1f} µs, {each:.2f} µs a stream")


def measures(headings: Sequence[str], rows: Iterable[Sequence[str]], verdict: str, console: Console) -> None:
    """How detectors did, a line each, the first being the model's; and in a sentence which of them is best."""
    table = _table(*headings[:1])
    for heading in headings[1:]:
        table.add_column(heading, justify="right", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*map(escape, row), style="bold" if number == 0 else None)
    console.print(table)
    console.print(verdict, highlight=False, markup=False)


def summary(done: Summary, seconds: float, console: Console) -> None:
    """What a replay did."""
    rate = done.consumed / seconds if seconds > 0 else 0.0
    console.print(
        f"{done.consumed:,} records → {done.predicted:,} predictions in {seconds:.1f} s ({rate:,.0f} a second)"
        + (f", {done.anomalies:,} anomalous" if done.anomalies else "")
        + (f" ({done.events:,} events begun)" if done.events else "")
        + (f", {done.tombstones:,} streams ended" if done.tombstones else "")
    )
    if done.refused:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(done.reasons.items()))
        console.print(f"[yellow]{done.refused:,} records refused[/yellow]: {reasons}")


def engine_table(rows: Iterable[EngineRow], console: Console) -> None:
    """The engine against raw onnxruntime."""
    table = _table("model", "streams", "batch", "raw µs/row", "engine µs/row", "wall µs/row", "of raw")
    for row in rows:
        figures = (f"{row.raw_us:.2f}", f"{row.engine_us:.2f}", f"{row.wall_us:.2f}", f"{row.ratio:.2f}")
        table.add_row(row.model, f"{row.streams:,}", f"{row.batch:,}", *figures)
    console.print(table)


def service_table(rows: Sequence[ServiceRow], console: Console) -> None:
    """The stages of a message."""
    stages = list(rows[0].stages)
    table = _table("model", "batch", *(f"{stage}\nµs" for stage in stages), "messages\na second")
    for row in rows:
        table.add_row(
            row.model, f"{row.batch:,}", *(f"{row.stages[s]:.2f}" for s in stages), f"{row.messages_per_second:,.0f}"
        )
    console.print(table)


def _facts(model: StepModel, held: Contract) -> Iterable[tuple[str, str]]:
    yield "model", f"{held.name}, version {held.model_version}"
    yield "sha256", model.fingerprint
    yield "opset", str(model.opset)
    yield "missing values", "the model's own forecast stands in" if held.missing == "own-forecast" else "refused"
    if held.period_seconds is not None:
        yield "period", f"{held.period_seconds:g} s"
    yield "horizon", f"{held.horizon} timestep" + "s" * (held.horizon != 1)
    if held.parity is not None:
        steps, apart = held.parity["steps"], held.parity["max_abs_difference"]
        yield (
            f"proven against {held.parity.get('against', 'torch')}",
            f"largest difference {apart:.2g} over {steps:,} steps",
        )
    if held.memory is not None:
        yield (
            "warm",
            "cannot be told, it forgets too slowly"
            if held.warm_after is None
            else f"from timestep {held.warm_after:,} of a stream on",
        )
    for name in ("description", "trained_on", "author", "producer", "license"):
        if value := getattr(held, name):
            yield name.replace("_", " "), str(value)


def _table(*names: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in names:
        numeric = any(word in name for word in ("µs", "bytes", "batch", "streams", "of raw", "second"))
        # Folded where the console is narrow: rich would cut a long name.
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    return table
