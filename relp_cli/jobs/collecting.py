"""A job's results from its cell files: no model and no torch. JOB/job.json says which job a folder is of."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from relp_cli.errors import RelpError
from relp_cli.files import read_object, write_atomically
from relp_cli.jobs.grid import Cell, Group, JobSpec, cells, read_cell
from relp_cli.jobs.known import Known
from relp_cli.runs.folders import instead

LOST = "there is no result of it in the job's folder: its process died, or wrote to a file system of its own"


@dataclass(frozen=True)
class Collected:
    """All rows of a job's cells, and (cell, error) of those that failed, `missing` ones among them.

    done: how many cells have rows.
    """

    rows: pd.DataFrame
    errors: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    done: int


def collect(paths: dict[Cell, Path], missing: str = LOST) -> Collected:
    """The cell files of one job, in the order of its grid. missing: what is said of cells that have none."""
    read = {cell: read_cell(path) for cell, path in paths.items()}
    rows = [row for content in read.values() for row in (content or {}).get("rows", [])]
    contents = {cell: content or {"error": missing} for cell, content in read.items()}
    errors = tuple((cell.label, content["error"]) for cell, content in contents.items() if "error" in content)
    absent = tuple(cell.label for cell, content in read.items() if content is None)
    return Collected(pd.DataFrame(rows), errors, absent, len(paths) - len(errors))


def cell_paths(known: Known, groups: Collection[Group] | None = None) -> dict[Cell, Path]:
    """Where each cell's file is, or would be; the error of one whose model did not load where it has nothing else."""
    paths = {}
    for cell in cells(known.job):
        if groups is None or cell.group in groups:
            path, unloaded = known.path(cell), known.unloaded(cell)
            paths[cell] = path if path and (path.is_file() or not unloaded.is_file()) else unloaded
    return paths


def keep_job(job: JobSpec, folder: Path) -> None:
    """Say in a folder which job was last run in it, and where, for the relative paths in it."""
    path, content = folder / "job.json", job.model_dump(mode="json")
    with suppress(RelpError):
        if read_object(path).get("job") == content:
            return
    write_atomically(path, json.dumps({"job": content, "folder": str(Path.cwd())}, indent=1) + "\n")


def job_of(folder: Path) -> JobSpec:
    """The job that was last run in a folder. Raises RelpError where there is none, or where its tasks are not found."""
    path = folder / "job.json"
    if not path.is_file():
        raise RelpError(
            f"'{folder}' is not a job's folder (it has no job.json)"
            + (instead(folder) or f"; `relp evaluate JOB -o {folder}` makes one")
        )
    content = read_object(path, "job record")
    try:
        job = JobSpec.model_validate(content.get("job"))
    except ValidationError:
        raise RelpError(
            f"job record {path} was not written by this version of relp; give the job's YAML instead"
        ) from None
    try:
        for task in job.tasks:
            Known(job, folder).task(task)
    except RelpError as error:
        raise RelpError(f"{error} (the job was run in {content.get('folder')})") from None
    return job
