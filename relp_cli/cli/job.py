"""Batch jobs: `relp evaluate JOB.yaml`, and `relp reproduce`, which runs a shipped job and sets the paper's numbers beside."""

from __future__ import annotations

from json import dumps as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relp_cli.cli.common import (
    DeviceMapOption,
    DeviceOption,
    JsonFlag,
    comma,
    count_option,
    log,
    note,
    out,
    output_option,
    print_fields,
    print_json,
    progress,
)
from relp_cli.errors import RelpError, unknown
from relp_cli.models.placement import placed

if TYPE_CHECKING:
    from relp_cli.runs.job import JobSpec


def reproduce(
    what: Annotated[str, typer.Argument(help="table5 or figure3")],
    models: Annotated[str | None, typer.Option(help="Only these models (names, or folders of local copies).")] = None,
    methods: Annotated[str | None, typer.Option(help="These methods (default: the paper's and ours).")] = None,
    pairs: Annotated[int | None, count_option(1, help="How many pairs (default: the paper's number).")] = None,
    output: Annotated[Path | None, output_option(help="Job folder (default: runs/JOB).")] = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    json: JsonFlag = False,
) -> None:
    """Run the paper's experiment on every model that loads, and print our numbers beside the published ones.

    Example: relp reproduce table5 --models gpt2 --methods atp,relp,relp+secant
    """
    if what not in ("table5", "figure3"):
        raise unknown("experiment", what, ("table5", "figure3"))
    given = {
        "models": models and comma(models, "--models"),
        "methods": methods and comma(methods, "--methods"),
        "pairs": pairs,
    }
    overrides = [f"{key}={to_json(value)}" for key, value in given.items() if value is not None]
    run_job(named_job(what, overrides), output, "local", placed(device, device_map), False, json, lenient=True)


def named_job(name: str, overrides: list[str]) -> JobSpec:
    """A shipped job, or a file. Raises RelpError for what is neither."""
    from relp_cli.runs.job import load_job

    if not Path(name).exists() and "/" in name and not name.endswith((".yaml", ".yml")):
        raise RelpError(f"run '{name}' does not exist; `relp ls runs` lists runs, `relp score` makes one")
    return load_job(name, overrides)


def run_job(
    job: JobSpec,
    output: Path | None,
    engine: str,
    place: str | None,
    dry_run: bool,
    json: bool,
    lenient: bool = False,
) -> None:
    """Run, collect, write tables and figures, print a summary. Exit code 1 where a cell failed (`lenient`: where all
    of them did, for experiments whose models are not expected to be all there)."""
    from relp_cli.runs.collecting import collect
    from relp_cli.runs.job import cells
    from relp_cli.runs.jobcheck import check_job

    folder = output or Path("runs") / job.name
    check_job(job, folder)
    if dry_run:
        grid = cells(job)
        summary = {
            "job": job.name,
            "folder": str(folder),
            "cells": len(grid),
            "first": grid[0].label,
            "last": grid[-1].label,
        }
        print_json(summary) if json else print_fields(summary)
        return
    from relp_cli.runs.engines import ENGINES
    from relp_cli.runs.summary import summarise

    with progress() as bar:
        outcome = ENGINES[engine](job, folder, place, bar)
    result = collect(outcome.paths)
    files, tables = summarise(job, result.rows, folder, result.errors)
    failed = len(result.errors)  # more than the workers counted, where their files did not come here
    done = outcome.computed + outcome.finished + outcome.failed - failed
    state = f"{done - outcome.finished} cells computed, {outcome.finished} found finished, {failed} failed"
    if json:
        print_json({"job": job.name, "folder": str(folder), "state": state, "errors": dict(result.errors),
                    "files": [str(f) for f in files], "rows": result.rows.to_dict("records")})  # fmt: skip
    else:
        _print(tables, files)
        note(f"{job.name}: {state}")
        for model in outcome.noted:
            note(f"{model}: not loaded; its cells are those of the content that it had when it was loaded for this job")
        by_error: dict[str, list[str]] = {}
        for label, error in result.errors:
            by_error.setdefault(error, []).append(label)
        for error, labels in by_error.items():
            more = f" and {len(labels) - 1} more cells" if len(labels) > 1 else ""
            note(f"WARNING: {labels[0]}{more}: {error}")
    if failed and not (lenient and done):
        raise typer.Exit(1)


def _print(tables: list[tuple[str, Any]], files: list[Path]) -> None:
    from relp_cli.cli.tables import show_agreement
    from relp_cli.report.tables import show

    for title, table in tables:
        if title == "agreement":
            show_agreement(table)
        else:
            show(table, out, title)
    for path in files:
        log.print(str(path))
