"""`relp`: one thin file per verb; this one wires them."""

from __future__ import annotations

import sys

import typer

from relp_cli import __version__
from relp_cli.cli import (
    bench,
    circuit,
    collect,
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
from relp_cli.cli.completion import completing
from relp_cli.cli.help import fold_help
from relp_cli.cli.waiting import waiting

QUICK = ("ls", "validate", "init", "schema", "collect")  # load no torch, mostly
app = typer.Typer(
    name="relp",
    help="Circuit discovery for transformer language models: score nodes, select circuits, evaluate and compare them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS = {
    **{
        module.__name__.rpartition(".")[2]: module.command
        for module in (score, circuit, evaluate, test, robustness, compare, diagnose, overlap, report, ls, bench, init, schema)
    },
    "validate": tasks.validate, "show": tasks.show, "train-dictionary": train_dictionary.command,
    "export": exchange.export, "import": exchange.import_, "reproduce": job.reproduce,
    "collect": collect.command,
}  # fmt: skip
for name, command in VERBS.items():
    app.command(name=name, cls=Evaluate if name == "evaluate" else None)(completing(name, command))


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context, version: bool = typer.Option(False, "--version", help="Print the version and stop.")
) -> None:
    """Circuit discovery for transformer language models."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    verb = context.invoked_subcommand
    if {"-h", "--help"} & set(sys.argv):
        fold_help()
    elif verb not in (None, *QUICK):
        waiting(f"relp {verb}: loading torch …")
