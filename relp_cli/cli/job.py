"""Batch jobs: `relp evaluate JOB.yaml`, and `relp reproduce`, which runs a shipped job and sets the paper's numbers beside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from json import dumps as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from relp_cli.cli.common import (
    DeviceMapOption,
    DeviceOption,
    DryRunFlag,
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
from relp_cli.cli.waiting import waiting
from relp_cli.errors import RelpError, unknown
from relp_cli.models.placement import placed

if TYPE_CHECKING:
    from relp_cli.jobs.collecting import Collected
    from relp_cli.jobs.engine import Options
    from relp_cli.jobs.grid import Group, JobSpec
    from relp_cli.jobs.run import Outcome

MOST_NAMED = 5  # failed cells of one error, by name


def reproduce(
    what: Annotated[str, typer.Argument(help="table5 or figure3")],
    models: Annotated[str | None, typer.Option(help="Only these models (names, or folders of local copies).")] = None,
    methods: Annotated[str | None, typer.Option(help="These methods (default: the paper's and ours).")] = None,
    pairs: Annotated[int | None, count_option(1, help="How many pairs (default: the paper's number).")] = None,
    output: Annotated[Path | None, output_option(help="Job folder (default: runs/JOB).")] = None,
    device: DeviceOption = None,
    device_map: DeviceMapOption = None,
    dry_run: DryRunFlag = False,
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
    run_job(named_job(what, overrides), output, Where(place=placed(device, device_map)), dry_run, json, lenient=True)


def named_job(name: str, overrides: list[str]) -> JobSpec:
    """A shipped job, or a file. Raises RelpError for what is neither."""
    from relp_cli.jobs.grid import load_job

    return load_job(name, overrides)


@dataclass(frozen=True)
class Where:
    """Where a job's cells are computed: by an engine, or as one share of several, or by several processes here."""

    engine: str = "local"
    place: str | None = None
    shard: str | None = None
    workers: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)  # engines' own options

    def options(self) -> Options:
        """What the engine is asked for. Raises RelpError for what does not go together."""
        from relp_cli.jobs.engine import Options
        from relp_cli.jobs.engines import ENGINES

        options = Options(self.place, self.workers, **self.more)
        ENGINES[self.engine]
        options.check(self.engine)
        if self.engine != "local" and self.shard:
            raise RelpError(f"--shard is for --engine local; '{self.engine}' divides the job itself")
        if self.workers and self.place and ":" in self.place:
            raise RelpError(f"--workers gives each process a GPU of its own; --device {self.place} names one for all")
        return options


def run_job(job: JobSpec, output: Path | None, where: Where, dry_run: bool, json: bool, lenient: bool = False) -> None:
    """Run, collect, write tables and figures, print a summary. Exit code 1 where a cell failed (`lenient`: where all
    of them did, for experiments whose models are not expected to be all there); of a shard, where one of its own did."""
    from relp_cli.jobs.check import check_job
    from relp_cli.jobs.collecting import cell_paths, collect, keep_job
    from relp_cli.jobs.grid import cells, groups_of, groups_of_shard
    from relp_cli.jobs.known import Known
    from relp_cli.jobs.shards import shard_of, source_of

    options = where.options()
    folder = output or Path("runs") / job.name
    share = None if where.shard is None else shard_of(where.shard)
    groups = groups_of(job) if share is None else groups_of_shard(job, share.index, share.count)
    check_job(job, folder, elsewhere=where.engine == "ray")
    grid = [cell for cell in cells(job) if cell.group in groups]
    if dry_run:
        summary = {"job": job.name, "folder": str(folder), "cells": len(grid)}
        summary |= {"first": grid[0].label, "last": grid[-1].label} if grid else {}
        print_json(summary) if json else print_fields(summary)
        return
    keep_job(job, folder)
    if share is not None:
        note(f"{share} ({source_of(str(where.shard))}): {len(grid)} of {len(cells(job))} cells")
    outcome = _outcome(job, folder, where, options, groups)
    note_unloaded(outcome.noted)
    part = collect(outcome.paths)
    failed = len(part.errors)  # more than the workers counted, where their files did not come here
    done = outcome.computed + outcome.finished + outcome.failed - failed
    state = f"{done - outcome.finished} cells computed, {outcome.finished} found finished, {failed} failed"
    whole = part if share is None else collect(cell_paths(Known(job, folder, trusting=True)), "not computed yet")
    if share is not None:
        state = f"{share}: {state}"
    if share is not None and whole.missing:
        show_state(part, f"{job.name}: {state}")
        rest = f"{len(whole.missing)} of {len(cells(job))} cells are missing, {whole.missing[0]} first"
        note(f"no tables yet: {rest}; the shard that ends last makes them, or `relp collect`")
        if json:
            print_json({"job": job.name, "folder": str(folder), "state": state, "errors": dict(part.errors),
                        "missing": whole.missing})  # fmt: skip
    else:
        show_job(job, folder, whole, state, json)
    if failed and not (lenient and done):
        raise typer.Exit(1)


def _outcome(job: JobSpec, folder: Path, where: Where, options: Options, groups: list[Group]) -> Outcome:
    """Have the cells of these groups computed."""
    from relp_cli.jobs.engines import ENGINES
    from relp_cli.jobs.run import run_cells
    from relp_cli.runs.scoring import Session

    with progress() as bar:
        if where.workers is not None and where.engine == "local":
            from relp_cli.jobs.workers import cores, places, run_workers, visible_gpus

            n = max(1, min(where.workers, len(groups)))  # one without a group would only wait
            at = places(n, visible_gpus(where.place), cores())
            note(f"{n} workers: {', '.join(place.name for place in at)}")
            return run_workers(job, folder, at, where.place, bar, note, groups)
        if where.shard is not None:
            return run_cells(job, folder, Session(where.place, say=waiting), bar, groups)
        return ENGINES[where.engine](job, folder, options, bar, note)


def note_unloaded(models: Iterable[str]) -> None:
    """Say which models are not on this disk any more."""
    for model in models:
        note(f"{model}: not loaded; its cells are those of the content that it had when it was loaded for this job")


def show_job(job: JobSpec, folder: Path, result: Collected, state: str, json: bool) -> None:
    """Write the tables and figures of what there is, and print them."""
    from relp_cli.jobs.summary import summarise

    files, tables = summarise(job, result.rows, folder, result.errors)
    if json:
        print_json({"job": job.name, "folder": str(folder), "state": state, "errors": dict(result.errors),
                    "files": [str(f) for f in files], "rows": result.rows.to_dict("records")})  # fmt: skip
        return
    _print(tables, files)
    show_state(result, f"{job.name}: {state}")


def show_state(result: Collected, state: str) -> None:
    """What became of the cells, and which of them failed, by error."""
    note(state)
    by_error: dict[str, list[str]] = {}
    for label, error in result.errors:
        by_error.setdefault(error, []).append(label)
    for error, labels in by_error.items():
        rest = len(labels) - MOST_NAMED
        more = f" and {rest} more cells (--json names them)" if rest > 0 else ""
        note(f"WARNING: {', '.join(labels[:MOST_NAMED])}{more}: {error}")


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
