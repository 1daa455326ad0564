"""`--engine slurm`: an array of tasks at the job's folder, which they share, submitted and watched through submitit.

1. Every task is a process at the folder: it takes free groups by claims, and ends when none is free.
2. This process watches the cells' files. Groups that tasks left behind when they died get further tasks, RETRIES times.
3. A task that is preempted, or whose time is up, is queued again by submitit and goes on where it was.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relp_cli.errors import RelpError, unknown, visible
from relp_cli.files import check_writable
from relp_cli.jobs.engine import Options, Say
from relp_cli.jobs.grid import JobSpec, cells
from relp_cli.jobs.known import Known
from relp_cli.jobs.run import Begun, Outcome, Report, run_cells
from relp_cli.jobs.workers import Watched
from relp_cli.runs.scoring import Session

MOST_TASKS = 8  # of an array, unless --workers says how many
RETRIES = 3
MINUTES = 240  # of a task, unless time= says how long; submitit's own would be 5
LOOK = 1.0  # seconds between two looks at the folder
GRACE = 10.0  # seconds in which a task ends that has nothing left to do
SHORT = {"gpus": "gpus_per_node", "cpus": "cpus_per_task", "time": "timeout_min"}
LISTS = ("setup", "teardown", "srun_args")
NOT_OURS = {
    "nodes": "a task is one process",
    "tasks_per_node": "a task is one process",
    "ntasks_per_node": "a task is one process",
    "map_count": "it is --workers",
    "num_gpus": "it is gpus",
    "additional_parameters": "it is a mapping",
}


@dataclass(frozen=True)
class Work:
    """What a task does; submitit pickles it. begun: the folder as it was when the first array was submitted."""

    job: JobSpec
    folder: Path
    place: str | None
    begun: Begun
    wait: bool

    def __call__(self, _: int) -> None:
        run_cells(self.job, self.folder, Session(self.place), begun=self.begun, wait=self.wait)

    def checkpoint(self, number: int) -> Any:
        """The same again: what is finished is found finished."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, number)


def run_on_slurm(job: JobSpec, folder: Path, options: Options, report: Report | None, say: Say) -> Outcome:
    """Compute what is missing by tasks of Slurm, `options.workers` at once.

    Raises: RelpError where submitit or Slurm is not there, and for options that it does not know.
    """
    check_writable(folder)
    executor = _executor(folder / "slurm", job.name, options.slurm)
    begun = Begun.of(folder)
    watched = Watched(Known(job, folder, trusting=True), begun, cells(job))
    before = set(watched.finished())
    for again in range(RETRIES + 1):
        groups = {cell.group for cell in watched.left}
        if not groups:
            break
        if again:
            say(f"WARNING: {len(watched.left)} cells were left behind; submitted again ({again} of {RETRIES})")
        # a first task does not hold its GPU while others work; a later one waits for the claims of the dead to expire
        work = Work(job, folder.resolve(), options.place, begun, wait=again > 0)
        tasks = executor.map_array(work, range(min(options.workers or MOST_TASKS, len(groups))))
        _watch(tasks, watched, report, say)
    return watched.outcome(before)


def _watch(tasks: list[Any], watched: Watched, report: Report | None, say: Say) -> None:
    """Until there is nothing left, or all tasks have ended."""
    ids, folder = _ids(tasks), watched.known.folder
    say(f"submitted: {ids}; logs in {folder / 'slurm'}")
    last: float | None = None
    try:
        while True:
            ended = all(task.done() for task in tasks)
            watched.look()
            if report:
                report(watched.total - len(watched.left), watched.total, f"{watched.known.job.name} on Slurm")
            last = last or (time.monotonic() + GRACE if not watched.left else None)
            if ended or (last and time.monotonic() > last):
                break
            time.sleep(LOOK)
    except KeyboardInterrupt:
        say(
            f"WARNING: {ids} goes on without this process: `scancel {ids.partition('_')[0]}` ends it, `relp collect {folder}` "
            "makes the tables of what there is, the same command again submits tasks for the rest"
        )
        raise
    for task in tasks if watched.left else ():
        if task.exception() is not None:
            say(f"WARNING: task {task.job_id} ended with {task.state}: {_last_line(Path(task.paths.stderr))}")


def _ids(tasks: list[Any]) -> str:
    """`7_[0-3]` for the tasks of array 7."""
    ids = [str(task.job_id) for task in tasks]
    arrays = {text.partition("_")[0] for text in ids}
    return f"{arrays.pop()}_[0-{len(ids) - 1}]" if len(arrays) == 1 < len(ids) else ", ".join(ids)


def _last_line(log: Path) -> str:
    try:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return f"{visible(lines[-1].strip())} ({log})" if lines else f"nothing in its log ({log})"


def _executor(logs: Path, name: str, slurm: tuple[str, ...]) -> Any:
    try:
        import submitit
    except ImportError:
        raise RelpError("--engine slurm needs the package 'submitit': pip install 'relp-cli[slurm]'") from None
    given = dict(_pair(text) for text in slurm)
    cluster = given.pop("cluster", "slurm")
    if cluster not in ("slurm", "local"):
        raise RelpError(f"--slurm cluster={cluster}: expected slurm, or local, which tries it on this machine")
    general = submitit.AutoExecutor._valid_parameters()
    known = general | submitit.SlurmExecutor._valid_parameters()
    parameters: dict[str, Any] = {"name": f"relp-{name}", "timeout_min": MINUTES}
    for key, value in given.items():
        if key not in known or key in NOT_OURS:
            if key in NOT_OURS:
                raise RelpError(f"--slurm {key}: {NOT_OURS[key]}, here")
            raise unknown("--slurm key", key, {*known, *SHORT} - set(NOT_OURS))
        parameters[key if key in general else f"slurm_{key}"] = value
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
    except RuntimeError:
        raise RelpError(
            "--engine slurm: srun is not on this machine; submit where it is (--slurm cluster=local tries it here)"
        ) from None
    try:
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, TypeError, ValueError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise RelpError(f"--slurm {' '.join(slurm)}: {first}") from None
    return executor


def _pair(text: str) -> tuple[str, Any]:
    """`gpus=1` → ("gpus_per_node", 1): the name and the value that submitit takes."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not (key and equals and value):
        raise RelpError(f"--slurm '{text}': expected key=value, for example partition=gpu")
    name = SHORT.get(key, key)
    if name == "timeout_min":
        return name, _minutes(value)
    if name in LISTS:
        return name, [value]
    return name, int(value) if re.fullmatch(r"\d{1,9}", value) else value == "true" if value in (
        "true",
        "false",
    ) else value


def _minutes(text: str) -> int:
    """`90`, `1:30:00` or `1-12:00:00` → minutes. Raises RelpError for anything else."""
    match = re.fullmatch(r"(\d{1,6})|(?:(\d{1,4})-)?(\d{1,4}):(\d\d):(\d\d)", text)
    minutes = 0
    if match:
        whole, days, hours, rest, seconds = (int(group or 0) for group in match.groups())
        minutes = whole + (days * 24 + hours) * 60 + rest + (seconds > 0)
    if not minutes:
        raise RelpError(f"--slurm time={text}: expected minutes, or HOURS:MM:SS, or DAYS-HH:MM:SS")
    return minutes
