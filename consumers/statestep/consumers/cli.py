"""The command line: every command by its name.

Exit codes: 0 done, 2 usage or configuration, 3 bad model or failed proof, 4 data refused, 5 broker, 75 restart me.
"""

from __future__ import annotations

import onnxruntime as ort
import typer

from statestep.consumers import cli_backtest, cli_convert, cli_model, cli_state, cli_stream

COMMANDS = (
    cli_model.fit,
    cli_model.export,
    cli_convert.convert,
    cli_model.inspect,
    cli_model.verify,
    cli_backtest.backtest,
    cli_stream.replay,
    cli_stream.run,
    cli_stream.demo,
    cli_stream.fleet,
    cli_stream.bench,
)

app = typer.Typer(
    name="statestep",
    help="Trained recurrent networks as ONNX step models behind Kafka: one message, one timestep, state kept.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # as markup, [default: …] in a help text would vanish
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(cli_state.group)


def main() -> None:
    """Run the command line."""
    ort.disable_telemetry_events()  # the wheel brings a client for it, and nobody asked
    app()
