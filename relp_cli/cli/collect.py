"""relp collect JOB | FOLDER"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from relp_cli.cli.common import JsonFlag, output_option
from relp_cli.cli.job import named_job, note_unloaded, show_job
from relp_cli.errors import RelpError


def command(
    target: Annotated[str, typer.Argument(help="A job's folder, a JOB.yaml, or a shipped job's name.")],
    output: Annotated[Path | None, output_option(help="The folder of a JOB.yaml (default: runs/JOB).")] = None,
    override: Annotated[list[str], typer.Option("--override", help="As the job was run: models=\\[tiny-gpt2]")] = [],  # noqa: B006
    json: JsonFlag = False,
) -> None:
    """Make a job's tables and figures from its cell files, which shards or workers have left; no model is loaded.

    Cells that failed or are missing are named, and the exit code is 1.

    Example: relp collect runs/table5_tiny
    """
    from relp_cli.jobs.collecting import cell_paths, collect, job_of
    from relp_cli.jobs.known import Known
    from relp_cli.runs.folders import check_job_name

    if Path(target).is_dir():
        if output or override:
            raise RelpError(f"{'--output' if output else '--override'} is for a JOB.yaml; '{target}' is a folder")
        folder, job = Path(target), job_of(Path(target))
    else:
        check_job_name(target, "a job's folder", "job.json")
        job = named_job(target, override)
        folder = output or Path("runs") / job.name
        if not folder.is_dir():
            raise RelpError(f"job '{job.name}' was not run in {folder}; `relp evaluate {target}` runs it")
    known = Known(job, folder, trusting=True)
    result = collect(cell_paths(known), "not computed yet")
    note_unloaded(sorted(known.noted))
    failed, missing = len(result.errors) - len(result.missing), len(result.missing)
    show_job(job, folder, result, f"{result.done} cells finished, {failed} failed, {missing} missing", json)
    if failed or missing:
        raise typer.Exit(1)
