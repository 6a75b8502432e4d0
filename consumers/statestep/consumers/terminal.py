"""What every command shares: two consoles, faults as one sentence and an exit code, the log, a progress bar."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from statestep.consumers.changelog import Corrupt
from statestep.consumers.checkpoint import Stop
from statestep.consumers.config import ConfigError
from statestep.consumers.http import PortInUse
from statestep.consumers.pipeline import BadMessage
from statestep.consumers.ports import Blocked, BrokerError, Fenced
from statestep.consumers.tables import FileError
from statestep.runtime import CapacityError, ContractError, ModelError

out = Console()
err = Console(stderr=True)

EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 2),
    (PortInUse, 2),
    (CapacityError, 2),
    (ModelError, 3),
    (ContractError, 3),
    (FileError, 4),
    (BadMessage, 4),
    (Stop, 4),
    (Corrupt, 4),
    (BrokerError, 5),
    (Fenced, 75),
    (Blocked, 75),
)


def told(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the faults that a person can mend into one sentence and an exit code; `--debug` shows the rest."""

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            code = _exit_code(error)
            if code is None or kwargs.get("debug"):
                raise
            err.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(code) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None

    return guarded


def _exit_code(error: Exception) -> int | None:
    """The exit code of a fault that a person can mend, None for one of ours."""
    for kind, code in EXIT_CODES:
        if isinstance(error, kind):
            return code
    if type(error).__module__.startswith("statestep.export."):
        return {"ExportError": 3, "DataError": 4}.get(type(error).__name__)
    return 2 if isinstance(error, ValueError) and type(error) is ValueError else None


@contextmanager
def training(epochs: int) -> Iterator[Callable[[Any], None]]:
    """A progress bar that follows `fit`'s epochs."""
    with Progress(
        TextColumn("epoch {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}"), console=err
    ) as progress:
        task = progress.add_task("training", total=epochs)

        def on_epoch(epoch: Any) -> None:
            found = f"validation RMSE {epoch.validation_rmse:.4f}, best {epoch.best_rmse:.4f}, {epoch.seconds:.0f} s"
            progress.update(task, completed=epoch.number, description=found)

        yield on_epoch


def counting() -> Progress:
    """A line that counts records while nobody knows how many there will be."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,.0f}")
    return Progress(*columns, console=err, transient=True, disable=not err.is_terminal)


def log_to_stderr(level: str) -> None:
    """One line an event. kafka-python's own chatter is shown from warnings on."""
    if sys.stderr.isatty():
        handler: logging.Handler = RichHandler(console=err, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("statestep").setLevel(level.upper())
