"""What every engine is: a function that has a job's cells computed somewhere, and leaves their files in the job's folder."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from relp_cli.errors import RelpError
from relp_cli.jobs.grid import JobSpec
from relp_cli.jobs.run import Outcome, Report

Say = Callable[[str], None]  # takes a line for people


@dataclass(frozen=True)
class Options:
    """What is asked of an engine.

    place: of every worker's models (`placement.placed`). workers: how many at once (None: the engine's own choice).
    address, cpus, gpus: of Ray, the latter two per worker. slurm: `key=value` of the submission.
    """

    place: str | None = None
    workers: int | None = None
    address: str | None = None
    cpus: int | None = None
    gpus: float | None = None
    slurm: tuple[str, ...] = ()

    def check(self, engine: str) -> None:
        """Raises RelpError for options that would do nothing, or that no worker could be given."""
        for name, (option, of) in OF_ENGINE.items():
            if getattr(self, name) not in (None, ()) and engine != of:
                raise RelpError(f"{option} is for --engine {of}, not {engine}")
        if self.gpus is not None and not math.isfinite(self.gpus):
            raise RelpError(f"--gpus-per-worker {self.gpus}: expected a number")
        if engine != "local" and self.place and ":" in self.place:
            raise RelpError(f"--device {self.place}: a worker sees its own GPUs only; give --device cuda")


OF_ENGINE = {
    "address": ("--address", "ray"),
    "cpus": ("--cpus-per-worker", "ray"),
    "gpus": ("--gpus-per-worker", "ray"),
    "slurm": ("--slurm", "slurm"),
}
Engine = Callable[[JobSpec, Path, Options, "Report | None", Say], Outcome]
