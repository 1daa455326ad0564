"""Where a job's groups run: in this process, or on a Ray cluster (extra `ray`). Both write the same cell files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from relp_cli.errors import RelpError
from relp_cli.registry import Registry
from relp_cli.runs.job import JobSpec
from relp_cli.runs.jobrun import Outcome, Report, run_cells
from relp_cli.runs.scoring import Session

Engine = Callable[[JobSpec, Path, "str | None", "Report | None"], Outcome]
ENGINES: Registry[Engine] = Registry("engine")


def local(job: JobSpec, folder: Path, place: str | None, report: Report | None) -> Outcome:
    """One cell after the other in this process; models and tasks are loaded once."""
    return run_cells(job, folder, Session(place), report)


def ray(job: JobSpec, folder: Path, place: str | None, report: Report | None) -> Outcome:
    """One Ray task per model; `folder` must be on a file system that all workers share."""
    try:
        import ray as cluster
    except ImportError:
        raise RelpError("--engine ray needs the package 'ray': pip install 'relp-cli[ray]'") from None
    cluster.init(ignore_reinit_error=True, log_to_driver=False)
    remote = cluster.remote(run_cells)
    parts = [job.model_copy(update={"models": (model,)}) for model in job.models]
    pending = [remote.remote(part, folder.resolve(), Session(place)) for part in parts]
    outcomes: list[Outcome] = []
    while pending:
        ready, pending = cluster.wait(pending)
        outcomes += cluster.get(ready)
        if report:
            report(len(outcomes), len(parts), f"{job.name}: models")
    by_cell = {cell: path for outcome in outcomes for cell, path in outcome.paths.items()}
    counts = {name: sum(getattr(o, name) for o in outcomes) for name in ("computed", "finished", "failed")}
    return Outcome(by_cell, **counts)


ENGINES.add("local", local)
ENGINES.add("ray", ray)
