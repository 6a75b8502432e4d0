"""The command that tests a model's detector over readings that are known: its flags, the joining of parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from statestep.consumers import show, tables, windows, wiring
from statestep.consumers.config import ConfigError
from statestep.consumers.options import Debug, Key, ModelSha256, Period
from statestep.consumers.terminal import err, out, told


@told
def backtest(
    model: Annotated[Path, typer.Argument(help="The step model.")],
    data: Annotated[str, typer.Option(help="Readings to judge it by: a .csv, .jsonl or .parquet file, .gz too.")],
    out_path: Annotated[Path, typer.Option("--out", help="The report to write, one .html file.")],
    key: Key = None,
    time: Annotated[str | None, typer.Option(help="The column that holds the time; tells the period.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="The column that says which rows are anomalous: 0 or 1, true or false.")
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(
            "--windows",
            help="JSON of the anomalous times: a list of [begin, end], or such a list for each stream or file.",
        ),
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="The readings that the model was fitted on, to calibrate the baselines on.")
    ] = None,
    skip: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of each stream, at its beginning, that is not judged. 0 with --train; 0.15 without, which the "
            "baselines are calibrated on.",
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Also write everything as JSON, for programs.")
    ] = None,
    period: Period = None,
    model_sha256: ModelSha256 = None,
    debug: Debug = False,
) -> None:
    """Show how a model's detector would have done on known readings, beside two baselines, as a report of one file."""
    from statestep.export.backtest import Stream
    from statestep.export.backtest import backtest as test
    from statestep.export.findings import document
    from statestep.export.report_page import page
    from statestep.export.words import HEADINGS, cells, verdict

    _check(out_path, json_path, labels, labelled, time, train, skip)
    loaded = wiring.load_model(model, sha256=model_sha256)
    features = loaded.contract.feature_names
    if labels in features:
        raise ConfigError(f"--labels is {labels!r}, which the model reads as a feature: name the column of labels")
    readings, told_period = tables.load_readings(data, features, key=key, time=time, label=labels)
    if labelled is not None:
        readings = _marked(readings, labelled, data)
    with np.errstate(over="ignore"):  # a reading beyond float32 becomes infinite, and is refused as the service would
        streams = [Stream(name, r.x.astype(np.float32), r.times, r.labels) for name, r in readings.items()]
    training = None
    if train is not None:
        training, _ = tables.load_streams(train, features, key=key)
    with err.status("stepping"):
        found = test(loaded, streams, training=training, skip=skip, period_seconds=period or told_period)
    source = f"the column {labels!r}" if labels else labelled.name if labelled else None
    written = {out_path: page(found, data=Path(data).name, labels=source)}
    if json_path is not None:
        written[json_path] = json.dumps(document(found, Path(data).name), indent=1, allow_nan=False) + "\n"
    for path, text in written.items():
        try:
            path.write_text(text, "utf-8")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
    show.measures(HEADINGS, [cells(row, found.period_seconds) for row in found.table], verdict(found.table), out)
    out.print(f"written: {', '.join(str(path) for path in written)}", soft_wrap=True, highlight=False)


def _check(
    out_path: Path,
    json_path: Path | None,
    labels: str | None,
    labelled: Path | None,
    time: str | None,
    train: str | None,
    skip: float | None,
) -> None:
    """What cannot be is told before the model is stepped, not after it."""
    if out_path.suffix != ".html":
        raise ConfigError(f"--out is {str(out_path)!r}: its name must end in .html")
    for flag, path in (("--out", out_path), ("--json", json_path)):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{flag} is {str(path)!r}: there is no folder {str(path.parent)!r}, make it first")
    if labels is not None and labelled is not None:
        raise ConfigError(f"--labels is {labels!r} and --windows {str(labelled)!r}: give one of them")
    if labelled is not None and time is None:
        raise ConfigError(f"--windows is {str(labelled)!r}, and no row has a time: name its column by --time")
    if skip == 0 and train is None:
        raise ConfigError("--skip is 0, which leaves nothing to calibrate the baselines on: give --train, or skip more")


def _marked(readings: dict[str, tables.Readings], labelled: Path, data: str) -> dict[str, tables.Readings]:
    """Streams with labels where windows say so. A window that holds no row may be a typing error, and is noted."""
    found, empty = {}, 0
    for name, spans in windows.windows_of(labelled, data, list(readings)).items():
        times = readings[name].times
        assert times is not None
        labels, outside = windows.labels_of(spans, times)
        found[name] = readings[name]._replace(labels=labels)
        empty += outside
    if empty:
        err.print(f"[yellow]note:[/yellow] {empty} windows of {labelled} hold no row", highlight=False, soft_wrap=True)
    return found
