"""Running a job in this process: groups that no other process claims, their cells computed and written one by one."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from relp_cli.files import check_writable, write_atomically
from relp_cli.runs.claims import POLL, Claims
from relp_cli.runs.job import Cell, Group, JobSpec, cell_hash, cells, groups_of, read_cell
from relp_cli.runs.jobgroup import Computed, compute
from relp_cli.runs.known import Known
from relp_cli.runs.scoring import Session

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Outcome:
    """paths: every cell's file; computed, finished (found done) and failed count cells; noted: models that are not on this
    disk, whose cells are those of the content that was noted when they were loaded."""

    paths: dict[Cell, Path]
    computed: int
    finished: int
    failed: int
    noted: tuple[str, ...] = ()


def run_cells(
    job: JobSpec, folder: Path, session: Session, report: Report | None = None, groups: Sequence[Group] | None = None
) -> Outcome:
    """Compute what is missing, each cell on its own: a failure is recorded in its file and tried again next time.

    groups: only these (default: all). Several processes at one folder share them by claims: each cell is computed once.
    A process takes free groups of the model that it holds, then those of the model that fewest others are at; it waits
    only while all that is left is claimed, and ends when every group is done.

    Raises: RelpError where the folder cannot be written to.
    """
    check_writable(folder)
    work = _Work(job, Known(job, folder), session, list(groups_of(job) if groups is None else groups), report)
    claims = Claims(folder / "claims")
    names = {group: _claim_name(job, group) for group in work.waiting}
    while work.waiting:
        taken = claims.names()
        claimed = {group for group, name in names.items() if name in taken}
        for group in work.freest_first(claimed):
            with claims.claim(names[group]) as ours:
                if ours:
                    work.do(group)
            if ours or group not in claimed:
                break  # what is free has changed
        else:
            time.sleep(POLL)
    session.forget()
    states = [work.states[cell][1] for cell in work.cells]
    paths = {cell: work.states[cell][0] for cell in work.cells}
    counts = {what: states.count(what) for what in ("computed", "finished", "failed")}
    return Outcome(paths, **counts, noted=tuple(sorted(work.known.noted)))


class _Work:
    """What one process has to do, has done, and holds in memory: one model at a time."""

    def __init__(
        self, job: JobSpec, known: Known, session: Session, groups: list[Group], report: Report | None
    ) -> None:
        self.job, self.known, self.session, self.report = job, known, session, report
        self.waiting, self.held, self.states = groups, "", dict[Cell, tuple[Path, str]]()
        self.cells = [cell for cell in cells(job) if cell.group in groups]
        self._before = {path: path.stat().st_mtime_ns for path in (known.folder / "cells").glob("*.json")}

    def freest_first(self, claimed: set[Group]) -> list[Group]:
        """Unclaimed groups first; among them those of the model in memory, then of the models that fewest are at."""
        busy = Counter(group.model for group in claimed)
        return sorted(self.waiting, key=lambda group: (group in claimed, group.model != self.held, busy[group.model]))

    def do(self, group: Group) -> None:
        """What is not done of a group."""
        of_group = [cell for cell in self.cells if cell.group == group]
        self.states |= {cell: state for cell in of_group if (state := self._state(cell))}
        wanted = [cell for cell in of_group if cell not in self.states]
        if wanted and group.model != self.held:
            self.session.forget()
            self.held = group.model
        there = _there(wanted, self.known)
        for computed in compute(self.job, wanted, self.session, self.known.folder / "scores", there):
            self.states[computed.cell] = write(self.known, computed)
            if self.report:
                self.report(len(self.states), len(self.cells), f"{self.job.name}: {group.task}, {group.model}")
        self.waiting.remove(group)

    def _state(self, cell: Cell) -> tuple[Path, str] | None:
        """A cell's file where it is finished, or failed elsewhere since this process began: it is not tried by each."""
        path = self.known.path(cell)
        if path and "rows" in (read_cell(path) or {}):
            return path, "finished"
        for tried in filter(None, (path, self.known.unloaded(cell))):
            new = tried.is_file() and self._before.get(tried) != tried.stat().st_mtime_ns
            if new and "error" in (read_cell(tried) or {}):
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


def _claim_name(job: JobSpec, group: Group) -> str:
    """Of all that a group asks for, so that two jobs in one folder do not wait for each other."""
    return cell_hash(job, Cell(group, job.methods[0], job.kinds[0]))


def _there(wanted: list[Cell], known: Known) -> set[str]:
    """Names of finished cells' files, if there are cells whose file is not known before their model is loaded."""
    if all(known.path(cell) for cell in wanted):
        return set()
    return {path.name for path in (known.folder / "cells").glob("*.json") if "rows" in (read_cell(path) or {})}
