"""A worker of `--engine ray`: one model's groups, cell by cell. It needs nothing of the driver's disk and keeps no files.

Tasks come with their content. Models and dictionaries are loaded on the worker's machine, by hub name or from a path there.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from relp_cli import __version__
from relp_cli.jobs.grid import Cell, JobSpec
from relp_cli.jobs.group import Computed, compute
from relp_cli.models.catalog import embedded_names
from relp_cli.runs.scoring import Session
from relp_cli.tasks.task import Task, load_task


@dataclass(frozen=True)
class Parcel:
    """What is sent to every worker: the job, the same with the driver's paths made absolute, and the tasks."""

    job: JobSpec
    resolved: JobSpec
    tasks: dict[str, Task]
    place: str | None

    @classmethod
    def of(cls, job: JobSpec, place: str | None) -> Parcel:
        """Raises RelpError for a task that is not there, or is none."""
        # a task's folder is where the tokenizer folders that it names are looked for
        return cls(job, resolved(job), {name: load_task(_absolute(name)) for name in job.tasks}, place)


def resolved(job: JobSpec) -> JobSpec:
    """The job with relative paths of models, dictionaries and runs resolved in this process's folder. Names stay."""
    params = {
        method: values | ({"start": os.path.abspath(values["start"])} if values.get("start") else {})
        for method, values in job.params.items()
    }
    return job.model_copy(
        update={
            "models": tuple(map(_absolute, job.models)),
            "dictionary": job.dictionary and _absolute(job.dictionary),
            "ids_of": job.ids_of and _absolute(job.ids_of),
            "params": params,
        }
    )


def _absolute(name: str) -> str:
    """A path, which is there or can be nothing else, as an absolute one; any other name as it is."""
    path = Path(name).expanduser()
    if name in embedded_names():
        return name
    return os.path.abspath(path) if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 else name


@dataclass(frozen=True)
class Machine:
    """Where a worker is, and what it may use."""

    name: str
    pid: int
    gpus: str | None
    version: str

    @classmethod
    def this(cls) -> Machine:
        return cls(platform.node(), os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), __version__)


class Worker:
    """The actor: `begin` a group, then `next` as often as it has wanted cells."""

    def __init__(self, parcel: Parcel) -> None:
        self.parcel, self.session = parcel, Session(parcel.place, tasks=dict(parcel.tasks))

    def begin(self, wanted: Sequence[Cell], finished: Collection[str]) -> Machine:
        """wanted: cells of one group. finished: names of cell files that need not be computed again."""
        self._last, self._results = wanted[-1], self._run(wanted, finished)
        return Machine.this()

    def next(self) -> Computed:
        """The next wanted cell; where it failed, its error says on which machine."""
        computed = next(self._results)
        if computed.cell == self._last:
            self._results.close()
        if computed.content and "error" in computed.content:
            error = f"{computed.content['error']} (on {platform.node()})"
            return replace(computed, content=computed.content | {"error": error})
        return computed

    def _run(self, wanted: Sequence[Cell], finished: Collection[str]) -> Generator[Computed]:
        """Scores are kept below a folder that is gone with the group's last cell."""
        with TemporaryDirectory(prefix="relp-") as folder:
            yield from compute(self.parcel.job, wanted, self.session, Path(folder), finished, self.parcel.resolved)
