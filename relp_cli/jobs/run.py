"""Running a job in this process: groups that no other process claims, their cells computed and written one by one."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from relp_cli.files import check_writable, write_atomically
from relp_cli.jobs.claims import MOST_DEATHS, POLL, Claims, counts
from relp_cli.jobs.grid import Cell, Group, JobSpec, cell_hash, cells, groups_of, is_finished, read_cell
from relp_cli.jobs.group import Computed, compute
from relp_cli.jobs.known import Known
from relp_cli.runs.rundir import provenance
from relp_cli.runs.scoring import Session

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Begun:
    """A job's folder as it was when work at it began: what failed since, or killed processes since, is not tried again.

    claims: how many there were of each name; cells: file name → mtime (ns).
    """

    claims: dict[str, int]
    cells: dict[str, int]

    @classmethod
    def of(cls, folder: Path) -> Begun:
        cell_files = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
        return cls(dict(counts(folder / "claims")), cell_files)

    def since(self, path: Path) -> bool:
        """Whether a cell's file was written since."""
        return path.is_file() and self.cells.get(path.name) != path.stat().st_mtime_ns


@dataclass(frozen=True)
class Outcome:
    """paths: every cell's file; computed, finished (found done) and failed count cells; noted: models that are not on this
    disk, whose cells are those of the content that was noted when they were loaded."""

    paths: dict[Cell, Path]
    computed: int
    finished: int
    failed: int
    noted: tuple[str, ...] = ()

    @classmethod
    def of(cls, states: Mapping[Cell, tuple[Path, str]], noted: Iterable[str]) -> Outcome:
        """states: every cell's file, and "computed", "finished" or "failed"."""
        count = Counter(state for _, state in states.values())
        paths = {cell: path for cell, (path, _) in states.items()}
        return cls(paths, count["computed"], count["finished"], count["failed"], tuple(sorted(noted)))


def run_cells(
    job: JobSpec,
    folder: Path,
    session: Session,
    report: Report | None = None,
    groups: Sequence[Group] | None = None,
    begun: Begun | None = None,
    wait: bool = True,
) -> Outcome:
    """Compute what is missing, each cell on its own: a failure is recorded in its file and tried again next time.

    groups: only these (default: all). begun: the folder as it was when the first of several processes began (default: now).
    Several processes at one folder share groups by claims: each cell is computed once.
    A process takes free groups of the model that it holds, then those of the model that fewest others are at; it waits
    only while all that is left is claimed, and ends when every group is done; unless `wait`, when no group is free: its outcome
    is then of the cells that it has seen done.

    Raises: RelpError where the folder cannot be written to.
    """
    check_writable(folder)
    begun = begun or Begun.of(folder)
    work = _Work(job, Known(job, folder), session, list(groups_of(job) if groups is None else groups), begun, report)
    claims = Claims(folder / "claims", begun.claims)
    names = {group: _claim_name(job, group) for group in work.waiting}
    while work.waiting:
        taken = counts(claims.folder)
        claimed = {group for group, name in names.items() if name in taken}
        left = set(work.waiting)
        while left:
            group = next(group for group in work.freest_first(claimed) if group in left)
            with claims.claim(names[group]) as ours:
                if ours:
                    work.do(group, claims.deaths(names[group]), partial(claims.lost, names[group]))
            if ours:
                break  # what is free has changed
            left.remove(group)
            claimed.add(group)  # as a file server's listing may not say for a while
        else:
            if not wait:
                break
            time.sleep(POLL)
    session.forget()
    states = {cell: work.states[cell] for cell in work.cells if cell in work.states}
    return Outcome.of(states, work.known.noted)


class _Work:
    """What one process has to do, has done, and holds in memory: one model at a time."""

    def __init__(
        self,
        job: JobSpec,
        known: Known,
        session: Session,
        groups: list[Group],
        begun: Begun,
        report: Report | None,
    ) -> None:
        self.job, self.known, self.session, self.begun, self.report = job, known, session, begun, report
        self.waiting, self.held, self.states = groups, "", dict[Cell, tuple[Path, str]]()
        self.cells = [cell for cell in cells(job) if cell.group in groups]

    def freest_first(self, claimed: set[Group]) -> list[Group]:
        """Unclaimed groups first; among them those of the model in memory, then of the models that fewest are at."""
        busy = Counter(group.model for group in claimed)
        return sorted(self.waiting, key=lambda group: (group in claimed, group.model != self.held, busy[group.model]))

    def do(self, group: Group, deaths: int, lost: Callable[[], bool]) -> None:
        """What is not done of a group; it fails where computing it killed so many processes that it would kill this one.

        lost: whether another process goes on with it, to which it is then left.
        """
        of_group = [cell for cell in self.cells if cell.group == group]
        self.states |= {cell: state for cell in of_group if (state := self._state(cell))}
        wanted = [cell for cell in of_group if cell not in self.states]
        if deaths >= MOST_DEATHS:
            results: Iterable[Computed] = [given_up(self.known, cell, deaths) for cell in wanted]
        else:
            if wanted and group.model != self.held:
                self.session.forget()
                self.held = group.model
            there = finished_files(wanted, self.known)
            results = compute(self.job, wanted, self.session, self.known.folder / "scores", there)
        for computed in results:
            if lost():
                return
            self.states[computed.cell] = write(self.known, computed)
            if self.report:
                self.report(len(self.states), len(self.cells), f"{self.job.name}: {group.task}, {group.model}")
        self.waiting.remove(group)

    def _state(self, cell: Cell) -> tuple[Path, str] | None:
        """A cell's file where it is finished, or failed elsewhere since the work began: it is not tried by each process."""
        path = self.known.path(cell)
        if path and is_finished(path):
            return path, "finished"
        for tried in filter(None, (path, self.known.unloaded(cell))):
            if self.begun.since(tried) and "error" in (read_cell(tried) or {}):
                return tried, "failed"
        return None


def write(known: Known, computed: Computed) -> tuple[Path, str]:
    """Write one computed cell to its job's folder; its file, and "computed", "failed", or "finished" where it was there."""
    path = known.folder / "cells" / computed.file
    if computed.identity:
        known.note(computed.cell.group.model, computed.identity)
    if computed.content is None:
        return path, "finished"
    write_atomically(path, json.dumps(computed.content, indent=1, ensure_ascii=False) + "\n")
    return path, "failed" if "error" in computed.content else "computed"


def given_up(known: Known, cell: Cell, deaths: int) -> Computed:
    """The failure of a cell at which processes die."""
    error = f"{deaths} processes died while they computed this group (out of memory?); the same command tries it again"
    return failure(known, cell, error)


def failure(known: Known, cell: Cell, error: str) -> Computed:
    """A cell that was not computed, and why."""
    path = known.path(cell) or known.unloaded(cell)
    return Computed(cell, path.name, {"cell": cell.label, "error": error, "provenance": provenance()}, {})


def _claim_name(job: JobSpec, group: Group) -> str:
    """Of all that a group asks for, so that two jobs in one folder do not wait for each other."""
    return cell_hash(job, Cell(group, job.methods[0], job.kinds[0]))


def finished_files(wanted: Sequence[Cell], known: Known) -> set[str]:
    """Names of finished cells' files, if there are cells whose file is not known before their model is loaded."""
    if all(known.path(cell) for cell in wanted):
        return set()
    return {path.name for path in (known.folder / "cells").glob("*.json") if is_finished(path)}
