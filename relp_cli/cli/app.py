"""`relp`: one thin file per verb; this one wires them."""

from __future__ import annotations

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
    init,
    job,
    ls,
    overlap,
    report,
    robustness,
    schema,
    score,
    tasks,
    test,
    train_dictionary,
)
from relp_cli.cli.benchmarks import Evaluate
from relp_cli.cli.waiting import waiting

QUICK = ("ls", "validate", "init", "schema")  # load no torch, mostly
app = typer.Typer(
    name="relp",
    help="Circuit discovery for transformer language models: score nodes, select circuits, evaluate and compare them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (score, circuit, evaluate, test, robustness, compare, diagnose, overlap, report, ls, bench, init, schema):
    kind = Evaluate if module is evaluate else None
    app.command(name=module.__name__.rpartition(".")[2], cls=kind)(module.command)
app.command(name="validate")(tasks.validate)
app.command(name="show")(tasks.show)
app.command(name="train-dictionary")(train_dictionary.command)
app.command(name="export")(exchange.export)
app.command(name="import")(exchange.import_)
app.command(name="reproduce")(job.reproduce)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and stop.")
) -> None:
    """Circuit discovery for transformer language models."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    verb = context.invoked_subcommand
    if verb not in (None, *QUICK) and not {"-h", "--help"} & set(sys.argv):
        waiting(f"relp {verb}: loading torch …")
