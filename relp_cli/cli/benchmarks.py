"""`relp evaluate NAME`, where NAME is no run or job but a benchmark: a verb of its own, with its own options.

A run directory of such a name is still evaluated: `relp evaluate ./NAME`.
"""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand

from relp_cli.cli.completion import completing
from relp_cli.errors import RelpError

BENCHMARKS = {  # name → module with the verb's `command`
    "known_circuits": "relp_cli.cli.known_circuits",
    "mib": "relp_cli.cli.mib",
}


class Evaluate(TyperCommand):
    """`relp evaluate`, which leaves a line that begins with a benchmark's name to that benchmark's command."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if not args or args[0] not in BENCHMARKS:
            return super().make_context(info_name, args, parent, **extra)
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command(name=args[0])(completing(args[0], importlib.import_module(BENCHMARKS[args[0]]).command))
        command: Any = typer.main.get_command(app)
        return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)


def refuse_misplaced(target: str) -> None:
    """Raises RelpError for a benchmark's name behind options: these would be read as options of runs and jobs."""
    if target in BENCHMARKS:
        raise RelpError(f"'{target}' stands first, its options behind it: relp evaluate {target} [OPTIONS]")
