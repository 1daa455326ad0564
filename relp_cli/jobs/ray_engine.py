"""`--engine ray`: a job's groups on the workers of a Ray cluster; this process, the driver, writes the cells.

1. Workers are actors that hold one model each, with the CPUs and GPUs that they are given for themselves.
2. Each gets a group of its model, then the next; models without a worker come first, then those with most groups waiting.
3. Cells come back one by one and are written at once. Of a group whose worker died, what is missing is given to a new worker;
   a group at which more than RETRIES workers died fails on its own.
"""

from __future__ import annotations

import math
import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relp_cli import __version__
from relp_cli.errors import RelpError, RunFailed, visible
from relp_cli.files import check_writable
from relp_cli.jobs.engine import Options, Say
from relp_cli.jobs.grid import Cell, Group, JobSpec, cells, groups_of, is_finished
from relp_cli.jobs.group import Computed
from relp_cli.jobs.known import Known
from relp_cli.jobs.ray_worker import Machine, Parcel, Worker
from relp_cli.jobs.run import Outcome, Report, failure, finished_files, write

RETRIES = 3  # workers that may die at one group and be replaced
REACHED = 10.0  # seconds in which a cluster's address must answer
LOOK = 1.0  # seconds between two looks at what the cluster has room for


def run_on_ray(job: JobSpec, folder: Path, options: Options, report: Report | None, say: Say) -> Outcome:
    """Compute what is missing on the cluster at `options.address` (None: RAY_ADDRESS, the one that this machine is in, or one
    that is started here for this job).

    Raises: RelpError where ray is not installed, the cluster is not reached, or none of its nodes has room for one worker;
    RunFailed where no worker can start.
    """
    check_writable(folder)
    ray = _ray()
    driver = _Driver(ray, job, folder, options, report, say)
    if not driver.waiting:  # a finished job needs no cluster
        return driver.outcome()
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):  # Ray's pages about a death are on stdout
        ours = not ray.is_initialized()
        if ours:
            _connect(ray, options.address)
        try:
            driver.run()
        finally:
            if ours:
                ray.shutdown()
    return driver.outcome()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Of the calls behind one that failed: its error is a line of ours.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        import ray
    except ImportError:
        raise RelpError("--engine ray needs the package 'ray': pip install 'relp-cli[ray]'") from None
    return ray


def _connect(ray: Any, address: str | None) -> None:
    host, colon, port = (address or "").rpartition(":")
    try:
        if host and colon and port.isdigit() and "/" not in host:  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), REACHED).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        where = f"--address {address}" if address else "Ray"
        why = getattr(error, "strerror", None) or _line(error)
        raise RelpError(f"{where}: {why} (is it running? RAY_AUTH_MODE=token where it asks for one)") from None


def room(nodes: Iterable[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """How many workers the living nodes of a cluster hold, each with its CPUs and GPUs on one node."""
    total = 0
    for node in nodes:
        has = node["Resources"] if node["Alive"] else {}
        total += min(
            math.floor(has.get(name, 0) / each + 1e-9) for name, each in (("CPU", cpus), ("GPU", gpus)) if each
        )
    return total


@dataclass
class _Hired:
    """A worker: the actor, its group at work, and the calls that are not answered yet, `begin` first."""

    actor: Any
    model: str
    group: Group | None = None
    calls: list[Any] = field(default_factory=list)
    machine: Machine | None = None

    @property
    def place(self) -> str:
        return f" on {self.machine.name}" if self.machine else ""


class _Driver:
    def __init__(self, ray: Any, job: JobSpec, folder: Path, options: Options, report: Report | None, say: Say) -> None:
        self.ray, self.job, self.options, self.report, self.say = ray, job, options, report, say
        self.known, self.cells = Known(job, folder), cells(job)
        self.states: dict[Cell, tuple[Path, str]] = {}
        for cell in self.cells:
            path = self.known.path(cell)
            if path and is_finished(path):
                self.states[cell] = path, "finished"
        self.noted = set(self.known.noted)
        self.waiting = [group for group in groups_of(job) if self.left(group)]
        self.hired: list[_Hired] = []
        self.deaths: Counter[Group] = Counter()
        self.begun = False
        self.cpus, self.gpus = options.cpus or 1, options.gpus or 0.0

    def left(self, group: Group) -> list[Cell]:
        return [cell for cell in self.cells if cell.group == group and cell not in self.states]

    def run(self) -> None:
        if self.options.gpus is None and self.options.place != "cpu":
            self.gpus = float(any(node["Alive"] and node["Resources"].get("GPU") for node in self.ray.nodes()))
        place = self.options.place or (None if self.gpus else "cpu")  # not on a GPU that it was not given
        self._check_room()
        self.parcel = self.ray.put(Parcel.of(self.job, place))
        while self.waiting or self.hired:
            self._staff()
            first = {worker.calls[0]: worker for worker in self.hired}
            ready, _ = self.ray.wait(list(first), num_returns=1, timeout=LOOK)
            for call in ready:
                self._take(first[call])

    def outcome(self) -> Outcome:
        return Outcome.of({cell: self.states[cell] for cell in self.cells}, self.noted)

    def _check_room(self) -> None:
        if self.options.workers is None and not self._room():
            what = f"{self.cpus} CPUs" + (f" and {self.gpus:g} GPUs" if self.gpus else "")
            raise RelpError(
                f"no node of the Ray cluster has the {what} of one worker (--cpus-per-worker, --gpus-per-worker); where nodes "
                "come on demand, --workers N asks for them"
            )

    def _room(self) -> int:
        return room(self.ray.nodes(), self.cpus, self.gpus)

    def _staff(self) -> None:
        """Give idle workers a group of their model, let go of those that have none left, and hire where there is room."""
        for worker in [worker for worker in self.hired if worker.group is None]:
            own = next((group for group in self.waiting if group.model == worker.model), None)
            if own is None:
                self._release(worker)
            else:
                self._begin(worker, own)
        most = self.options.workers or max(1, self._room())
        while self.waiting and len(self.hired) < most:
            at = Counter(worker.model for worker in self.hired)
            queued = Counter(group.model for group in self.waiting)
            group = min(self.waiting, key=lambda group: (at[group.model], -queued[group.model]))
            actor = self.ray.remote(Worker).options(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0)
            worker = _Hired(actor.remote(self.parcel), group.model)
            self.hired.append(worker)
            self._begin(worker, group)

    def _begin(self, worker: _Hired, group: Group) -> None:
        self.waiting.remove(group)
        wanted = self.left(group)
        finished = finished_files(wanted, self.known)
        worker.group = group
        worker.calls = [worker.actor.begin.remote(wanted, finished), *(worker.actor.next.remote() for _ in wanted)]

    def _release(self, worker: _Hired) -> None:
        self.hired.remove(worker)
        with suppress(Exception):  # it may be dead
            self.ray.kill(worker.actor)

    def _take(self, worker: _Hired) -> None:
        """The answer to a worker's first open call."""
        assert worker.group is not None
        errors = self.ray.exceptions
        try:
            answer = self.ray.get(worker.calls.pop(0))
        except errors.RayTaskError as error:  # no fault of its input, as every cell of the group would meet it
            cause = error.cause or error
            self._fail(worker.group, f"{type(cause).__name__}: {_line(cause)}{worker.place}")
            self._release(worker)
        except errors.RayError as error:
            if getattr(error, "actor_init_failed", False) and not self.begun:
                raise RunFailed(f"no Ray worker can start: {_line(error, last=True)}") from None
            self._died(worker, worker.group)
        else:
            if isinstance(answer, Machine):
                self._meet(worker, answer)
            else:
                self._keep(answer)
            if not worker.calls:
                worker.group = None

    def _meet(self, worker: _Hired, machine: Machine) -> None:
        self.begun, worker.machine = True, machine
        if machine.version != __version__:
            raise RunFailed(f"Ray worker on {machine.name}: it has relp {machine.version}, the driver {__version__}")

    def _keep(self, computed: Computed) -> None:
        self.states[computed.cell] = write(self.known, computed)
        if self.report:
            self.report(len(self.states), len(self.cells), f"{self.job.name} on Ray")

    def _died(self, worker: _Hired, group: Group) -> None:
        self._release(worker)
        self.deaths[group] += 1
        deaths, name = self.deaths[group], f"{group.task}, {group.model}, seed {group.seed}"
        if deaths > RETRIES:
            self._fail(group, f"{deaths} workers died{worker.place} at its group (out of memory?)")
        else:
            self.waiting.insert(0, group)
            self.say(f"WARNING: a Ray worker died{worker.place} at {name}; another one goes on ({deaths} of {RETRIES})")

    def _fail(self, group: Group, error: str) -> None:
        """Every cell of a group that has no result fails."""
        for cell in self.left(group):
            self._keep(failure(self.known, cell, error))


def _line(error: BaseException, last: bool = False) -> str:
    """Ray's message, of which the first line (of a worker's traceback the last one) says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return visible(lines[-1 if last else 0])
