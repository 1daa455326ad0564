"""Where a job's groups are computed: a table of engines. All leave the same cell files in the job's folder."""

from __future__ import annotations

from pathlib import Path

from relp_cli.jobs.engine import Engine, Options, Say
from relp_cli.jobs.grid import JobSpec
from relp_cli.jobs.ray_engine import run_on_ray
from relp_cli.jobs.run import Outcome, Report, run_cells
from relp_cli.jobs.slurm_engine import run_on_slurm
from relp_cli.registry import Registry
from relp_cli.runs.scoring import Session

ENGINES: Registry[Engine] = Registry("engine")


def local(job: JobSpec, folder: Path, options: Options, report: Report | None, _: Say) -> Outcome:
    """One cell after the other in this process; models and tasks are loaded once."""
    return run_cells(job, folder, Session(options.place), report)


ENGINES.add("local", local)
ENGINES.add("ray", run_on_ray)
ENGINES.add("slurm", run_on_slurm)
