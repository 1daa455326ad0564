"""relp report RUN"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import log, output_option


def command(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    annotations: Annotated[
        Path | None, typer.Option(help="What features mean: JSON lines (default: contexts and promoted tokens).")
    ] = None,
    output: Annotated[Path | None, output_option(help="Default: report.html in the run.")] = None,
) -> None:
    """Figures and one self-contained HTML page of a run.

    Example: relp report runs/ioi
    """
    from relp_cli.runs.reporting import report_run

    for path in report_run(run, output, annotations):
        log.print(str(path))
