"""Running a job: group after group, each cell on its own, and the summary from the cell files."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.errors import RelpError, unknown
from relp_cli.evaluation.ablation_table import ablation_row
from relp_cli.evaluation.compare import run_comparison
from relp_cli.evaluation.evaluate import evaluate, excluded_layers
from relp_cli.evaluation.verify import rescore
from relp_cli.features.kinds import FEATURE_KINDS
from relp_cli.files import check_writable, write_atomically
from relp_cli.methods.table import METHODS
from relp_cli.models.folder import local_path, split_revision
from relp_cli.models.load import DTYPES
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.runs.checked import distinct, model_labels
from relp_cli.runs.claims import POLL, Claims
from relp_cli.runs.evaluating import circuits_of, held_out, sweep_points
from relp_cli.runs.job import COSTS, Cell, Group, JobSpec, cell_hash, cells, nodes_of, read_cell, score_spec_of
from relp_cli.runs.known import Known, identity_of
from relp_cli.runs.rundir import provenance
from relp_cli.runs.scoring import Prepared, Session, check_request, default_folder, digest_of, prepare, score_run
from relp_cli.runs.spec import ScoreSpec
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import space_for
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.task import load_task

Report = Callable[[int, int, str], None]


def check_job(job: JobSpec, folder: Path | None = None) -> None:
    """What can be known to be wrong before any cell runs: tasks, methods, their parameters and rules, dictionaries,
    ablations, metrics, the sweep, and models that are there twice. One model of several that does not load fails
    in its own cells. folder: the job's; models that were loaded for it once need not be there any more.

    Raises: RelpError for what no cell could be computed with.
    """
    model_labels(job.models)
    wrong = [problem for model in job.models if (problem := _no_model(model)) is not None]
    known = folder and Known(job, folder)
    if len(wrong) == len(job.models) and not (known and any(map(known.revision, job.models))):
        raise wrong[0]
    distinct("task name", [load_task(task).name for task in job.tasks])
    methods = [*job.methods, *([job.agreement.reference] if job.agreement else [])]
    group = cells(job)[0].group
    for method, kind in itertools.product(methods, job.kinds):
        check_request(score_spec_of(job, group, method, kind))
    if job.dtype not in DTYPES:
        raise unknown("dtype", job.dtype, DTYPES)
    if any(_by_candidates(job, method, kind) for method, kind in itertools.product(methods, job.kinds)):
        _cheap_methods(job)
        if job.baseline != "patch":
            raise RelpError(
                f"exact_candidates patches with the patch prompts' values; this job has baseline '{job.baseline}'"
            )
    if job.evaluate is not None:
        sweep_points(job.evaluate.sweep)
        if job.evaluate.metric is not None:
            METRICS[job.evaluate.metric]
        for kind in job.kinds:
            ablation_row(job.evaluate.ablation, space_for(nodes_of(kind)).name)
            if job.evaluate.ablation == "corpus":
                raise RelpError(
                    "ablation 'corpus' needs a text file, which a job cannot give; use `relp evaluate RUN --corpus`"
                )


def _no_model(name: str) -> RelpError | None:
    try:
        local_path(split_revision(name, None)[0])
    except RelpError as error:
        return error
    return None


def _by_candidates(job: JobSpec, method: str, kind: str) -> bool:
    """Whether a method of a job scores only candidates of this kind: exact patching of neurons and dimensions."""
    exact = method == "act_patch" and job.exact_candidates is not None
    return exact and kind in NODE_KINDS and NODE_KINDS[kind].split == "unit"


def _cheap_methods(job: JobSpec) -> list[str]:
    """The methods that choose candidates for exact patching. Raises RelpError where there is none."""
    cheap = [m for m in job.methods if m != "act_patch" and METHODS[m.partition("+")[0]].signed]
    if not cheap:
        raise RelpError("exact_candidates needs at least one signed method besides act_patch to choose them")
    return cheap


@dataclass
class GroupRun:
    """One group at work: loads its pairs once, scores each method once, on demand."""

    job: JobSpec
    group: Group
    folder: Path
    session: Session

    def __post_init__(self) -> None:
        self._prepared: dict[str, Prepared] = {}
        self._scores: dict[str, Scores] = {}

    def prepared(self, split: str = "discovery") -> Prepared:
        if split not in self._prepared:
            spec = score_spec_of(self.job, self.group, self.job.methods[0])
            if split == "heldout":
                assert self.job.evaluate is not None
                spec = held_out(spec, self.job.evaluate.heldout, self.group.seed, self.job.evaluate.metric)
            self._prepared[split] = prepare(spec, self.session, at_most=split == "heldout")
        return self._prepared[split]

    def identity(self) -> dict[str, str]:
        """What the names in a cell stand for; part of its hash."""
        p = self.prepared()
        names = identity_of(p.task, p.metric, p.model.revision)
        where = self.job.dictionary
        return names | ({"dictionary": self.session.dictionaries(where, p.model).digest} if where else {})

    def scores(self, method: str, kind: str) -> Scores:
        """Scores of one method. Exact patching of neurons and dimensions re-scores the cheap methods' candidates only."""
        if _by_candidates(self.job, method, kind):
            return self._candidates(kind)
        spec = score_spec_of(self.job, self.group, method, kind)
        return self._scored(spec, [k for k in spec.nodes if not _by_candidates(self.job, method, k)])

    def _scored(self, spec: ScoreSpec, kinds: Sequence[str]) -> Scores:
        key = f"{spec.method}/{','.join(kinds)}"
        if key not in self._scores:
            spec = spec.model_copy(update={"nodes": tuple(kinds)})
            folder = default_folder(spec, digest_of(spec, self.prepared(), self.session), self.folder / "scores")
            self._scores[key] = score_run(spec, self.session, folder, prepared=self.prepared())[1]
        return self._scores[key]

    def _candidates(self, kind: str) -> Scores:
        key = f"candidates/{kind}"
        if key not in self._scores:
            assert self.job.exact_candidates is not None
            found = [{kind: self.scores(m, kind)[kind]} for m in _cheap_methods(self.job)]
            p = self.prepared()
            self._scores[key] = rescore(
                p.model, p.pairs, found, self.job.exact_candidates, batch_size=self.job.batch_size
            )
        return self._scores[key]

    def run(self, cell: Cell) -> list[dict[str, Any]]:
        """The rows of one cell: agreement (one row) and/or a faithfulness curve (one row per point)."""
        about = {"task": self.prepared().task.name, "model": cell.group.model, "method": cell.method, "kind": cell.kind,
                 "direction": cell.group.direction, "seed": cell.group.seed}  # fmt: skip
        rows: list[dict[str, Any]] = []
        mine = self.scores(cell.method, cell.kind)
        if self.job.agreement:
            rows += [{**about, "what": "agreement", **r} for r in self._agreement(cell, mine)]
        if self.job.evaluate:
            rows += [{**about, "what": "evaluation", **r} for r in self._curve(cell, mine)]
        return rows

    def _agreement(self, cell: Cell, mine: Scores) -> list[dict[str, Any]]:
        assert self.job.agreement is not None
        p, options = self.prepared(), self.job.agreement
        exact = self.scores(options.reference, cell.kind)
        table = run_comparison(
            p.model, p.pairs, [cell.method], [cell.kind], p.metric, cell.group.direction, options.reference,
            options.top_k, seed=cell.group.seed, scores={options.reference: exact, cell.method: mine},
        ).table  # fmt: skip
        return table.drop(columns=["model", "method", "kind", "direction"]).to_dict("records")  # type: ignore[return-value]

    def _curve(self, cell: Cell, mine: Scores) -> list[dict[str, Any]]:
        assert self.job.evaluate is not None
        options, held = self.job.evaluate, self.prepared("heldout")
        exclude = excluded_layers(mine.units.space, held.model.shape.n_layers, options.exclude_layers)
        more, where = {}, None
        if cell.kind in FEATURE_KINDS:
            assert self.job.dictionary is not None
            more, where = (
                {"errors": FEATURE_KINDS[cell.kind]},
                self.session.dictionaries(self.job.dictionary, held.model),
            )
        circuits = circuits_of(mine.only(nodes_of(cell.kind)), options.sweep, exclude, **more)
        table = evaluate(
            held.model, held.pairs, circuits, options.ablation, exclude, held.metric, cell.group.seed,
            options.random_circuits, dictionary=where, batch_size=self.job.batch_size,
        )  # fmt: skip
        costs = {name: mine.meta[name] for name in COSTS if name in mine.meta}
        return table.assign(**costs).to_dict("records")  # type: ignore[return-value]


@dataclass(frozen=True)
class Outcome:
    """paths: every cell's file; computed, finished (found done) and failed count cells; noted: models that are not on this
    disk, whose cells are those of the content that was noted when they were loaded."""

    paths: dict[Cell, Path]
    computed: int
    finished: int
    failed: int
    noted: tuple[str, ...] = ()


def run_cells(job: JobSpec, folder: Path, session: Session, report: Report | None = None) -> Outcome:
    """Compute what is missing, each cell on its own: a failure is recorded in its file and tried again next time.

    Several processes at one folder share its groups by claims: each cell is computed once, each process waits for all.

    Raises: RelpError where the folder cannot be written to.
    """
    check_writable(folder)
    known, claims, states = Known(job, folder), Claims(folder / "claims"), dict[Cell, tuple[Path, str]]()
    grid = cells(job)
    before = {path: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.json")}
    for model in job.models:  # one model after the other, so that one is in memory at a time
        waiting = list(dict.fromkeys(cell.group for cell in grid if cell.group.model == model))
        while waiting:
            left = []
            for group in waiting:
                of_group = [cell for cell in grid if cell.group == group]
                with claims.claim(_group_hash(job, group)) as ours:
                    if not ours:
                        left.append(group)  # another process is at it
                        continue
                    run = GroupRun(job, group, folder, session)
                    for cell in of_group:
                        states[cell] = _tried(cell, known, before) or _run_cell(cell, run, known)
                        if report:
                            report(len(states), len(grid), f"{job.name}: {group.task}, {group.model}")
            if waiting := left:
                time.sleep(POLL)
        session.forget()
    counted = Counter(state for _, state in states.values())
    paths = {cell: states[cell][0] for cell in grid}
    return Outcome(paths, counted["computed"], counted["finished"], counted["failed"], tuple(sorted(known.noted)))


def _group_hash(job: JobSpec, group: Group) -> str:
    """The name of a group's claim: of all that it asks for, so that two jobs in one folder do not wait for each other."""
    return cell_hash(job, Cell(group, job.methods[0], job.kinds[0]))


def _tried(cell: Cell, known: Known, before: dict[Path, int]) -> tuple[Path, str] | None:
    """A cell's file where it failed in another process since this one began: it is not tried once more by each of them."""
    for path in (known.path(cell), known.unloaded(cell)):
        if (
            path
            and path.is_file()
            and before.get(path) != path.stat().st_mtime_ns
            and "error" in (read_cell(path) or {})
        ):
            return path, "failed"
    return None


def _run_cell(cell: Cell, group: GroupRun, known: Known) -> tuple[Path, str]:
    """The file of a cell, and what became of it. A model is loaded only for what is not finished."""
    path, started = known.path(cell), time.perf_counter()
    if path and "rows" in (read_cell(path) or {}):
        return path, "finished"
    content: dict[str, Any] = {"cell": cell.label}
    path, state = known.unloaded(cell), "computed"
    try:
        identity = group.identity()
        known.note(cell.group.model, identity["revision"])
        path = path.with_name(f"{cell_hash(group.job, cell, **identity)}.json")
        if "rows" in (read_cell(path) or {}):
            return path, "finished"
        content["rows"] = group.run(cell)
    except (RelpError, RuntimeError, ValueError, OSError, MemoryError) as error:
        content["error"], state = " ".join(str(error).split()) or type(error).__name__, "failed"
    content |= {"seconds": round(time.perf_counter() - started, 3), "provenance": provenance()}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path, state


@dataclass(frozen=True)
class Collected:
    """All rows of a job's cells, and (cell, error) of those that failed."""

    rows: pd.DataFrame
    errors: tuple[tuple[str, str], ...]


def collect(paths: dict[Cell, Path]) -> Collected:
    """The cell files of one job, in the order of its grid."""
    lost = {"error": "its result is not in the job's folder here: all workers must share that file system"}
    contents = {cell: read_cell(path) or lost for cell, path in paths.items()}
    rows = [row for content in contents.values() for row in content.get("rows", [])]
    errors = tuple((cell.label, content["error"]) for cell, content in contents.items() if "error" in content)
    return Collected(pd.DataFrame(rows), errors)
