"""relp report RUN|FOLDER, relp report RUN RUN..."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import JsonFlag, log, output_option, print_json


def command(
    folders: Annotated[
        list[Path], typer.Argument(help="A run, comparison, job or diagnosis; or several runs of one task and model.")
    ],
    annotations: Annotated[
        Path | None, typer.Option(help="What features mean: JSON lines (default: contexts and promoted tokens).")
    ] = None,
    output: Annotated[
        Path | None, output_option(help="Default: report.html in the folder; of several, runs/report-….html.")
    ] = None,
    json: JsonFlag = False,
) -> None:
    """One self-contained HTML page of a run (with its circuit, evaluation, tests and robustness), of a comparison, a job or a
    diagnosis, or of several runs side by side.

    Example: relp report runs/ioi

    Example: relp report runs/relp runs/atp runs/exact
    """
    from relp_cli.runs.folders import check_reported

    check_reported(folders)  # what is none is said before torch is imported
    from relp_cli.outputs.reporting import report

    made = report(folders, output, annotations)
    if json:
        print_json(made.as_dict())
        return
    for path in made.files:
        log.print(str(path))
