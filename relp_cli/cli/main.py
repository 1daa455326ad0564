"""`relp`: one thin file per verb; this one wires them and turns errors into one line and an exit code."""

from __future__ import annotations

import os
import sys

import typer

from relp_cli import __version__
from relp_cli.cli import (
    bench,
    circuit,
    compare,
    diagnose,
    evaluate,
    exchange,
    job,
    ls,
    overlap,
    report,
    score,
    tasks,
    train_dictionary,
)
from relp_cli.errors import RelpError

app = typer.Typer(
    name="relp",
    help="Circuit discovery for transformer language models: score nodes, select circuits, evaluate and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (score, circuit, evaluate, compare, diagnose, overlap, report, ls, bench):
    app.command(name=module.__name__.rpartition(".")[2])(module.command)
app.command(name="validate")(tasks.validate)
app.command(name="show")(tasks.show)
app.command(name="train-dictionary")(train_dictionary.command)
app.command(name="export")(exchange.export)
app.command(name="import")(exchange.import_)
app.command(name="reproduce")(job.reproduce)


@app.callback(invoke_without_command=True)
def main(version: bool = typer.Option(False, "--version", help="Print the version and stop.")) -> None:
    """Circuit discovery for transformer language models."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def run() -> None:
    """Entry point. Exit codes: 0, 1 (failed), 2 (bad input), 130 (interrupted); never a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app(standalone_mode=True)
    except RelpError as error:
        fail(str(error), error.exit_code)
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # typer turns an interrupt into exit code 130
            raise
        fail("interrupted; the same command again resumes what was finished", 130)
    except Exception as error:
        if os.environ.get("RELP_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        fail(f"{type(error).__name__}: {first} (RELP_DEBUG=1 shows where)", 1)


def fail(message: str, code: int) -> None:
    """One `error:` line on stderr, and the exit code."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    sys.exit(code)
