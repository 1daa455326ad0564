"""Comparisons as runs: every method's scores are a run directory below the output folder, reused when they verify."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli.errors import RelpError
from relp_cli.evaluation.compare import run_comparison
from relp_cli.files import check_writable
from relp_cli.methods.request import Progress
from relp_cli.methods.score import shared_params
from relp_cli.methods.table import same_method
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.report.figures import heatmaps
from relp_cli.report.tables import write_table
from relp_cli.runs.checked import distinct, file_label, model_labels, score_spec
from relp_cli.runs.made import note_made
from relp_cli.runs.pairs import pair_records
from relp_cli.runs.rundir import RunDir
from relp_cli.runs.scoring import (
    Prepared,
    Session,
    check_request,
    open_run,
    prepare,
    prepare_again,
    scored_below,
    scoring_notes,
)
from relp_cli.runs.spec import ScoreSpec, method_names
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import space_for

WIDEST = ("float64", "float32", "float16", "bfloat16")  # first: by the bits of their fractions


@dataclass(frozen=True)
class CompareOptions:
    """What `relp compare` takes besides its tasks.

    params: of methods and spaces; each goes to all methods that have it. common: the fields of `ScoreSpec` besides.
    """

    models: tuple[str, ...]
    methods: tuple[str, ...]
    nodes: tuple[str, ...]
    reference: str
    top_k: int
    params: dict[str, Any]
    common: dict[str, Any]

    @property
    def all_methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([self.reference, *self.methods]))

    def specs(self, task: str, model: str) -> dict[str, ScoreSpec]:
        """Method → its scoring of a task on a model. Raises RelpError for what no method could be scored with."""
        params = shared_params(self.all_methods, self.params, space_for(self.nodes))
        return {
            method: score_spec(
                task=task, model=model, method=method, nodes=self.nodes, keep_examples=True, params=params[method],
                **self.common,
            )
            for method in self.all_methods
        }  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One table over all cells, the files written, and notes for people."""

    table: pd.DataFrame
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def checked_cells(tasks: Sequence[str], options: CompareOptions, session: Session) -> list[dict[str, ScoreSpec]]:
    """Per task × model, the scorings of a comparison by method. Raises RelpError for what can be known to be wrong of any."""
    for what, names in (("task", tasks), ("method", options.methods), ("node kind", options.nodes)):
        distinct(what, names)
    model_labels(options.models)
    distinct("task name", [session.task(t).name for t in tasks])  # a misspelt one is found before the first is scored
    cells = [options.specs(task, model) for task in tasks for model in options.models]
    for spec in (spec for specs in cells for spec in specs.values()):
        check_request(spec)
    return cells


def compare_tasks(
    tasks: Sequence[str], options: CompareOptions, folder: Path, session: Session, progress: Progress | None
) -> Compared:
    """Score every task × model with every method and the reference; write compare.csv and heatmaps per task × model."""
    cells = checked_cells(tasks, options, session)
    labels = model_labels(options.models)
    check_writable(folder)
    tables, files, notes, made = [], [], [], []
    for specs in cells:
        spec = specs[options.reference]
        prepared = prepare(spec, session)
        label = labels[spec.model]
        notes += [f"{label}, {prepared.task.name}: {line}" for line in prepared.notes]
        root = folder / "scores"
        scored = {method: _scored(root, one, prepared, session, progress) for method, one in specs.items()}
        scores = {method: one for method, (_, one) in scored.items()}
        runs = {method: os.path.relpath(run.path, folder) for method, (run, _) in scored.items()}
        made.append({"task": prepared.task.name, "model": label, "runs": runs, "reference": options.reference})
        notes += [
            f"{label}, {prepared.task.name}: {line}" for found in scores.values() for line in scoring_notes(found)
        ]
        limited = spec.memory is not None
        for methods in [(method,) for method in options.methods] if limited else [options.methods]:
            both = (options.reference, *methods)
            whole = {method: open_run(scored[method][0].path)[2] for method in both} if limited else scores
            result = run_comparison(
                prepared.model, prepared.pairs, methods, options.nodes, prepared.metric, spec.direction,
                options.reference, options.top_k, seed=spec.seed, scores=whole,
            )  # fmt: skip
            result.table.insert(0, "task", prepared.task.name)
            tables.append(result.table.assign(model=label))
            del whole, result  # before the next ones are read
        files += _figure(prepared, label, scores, spec, folder)
    table = pd.concat(tables, ignore_index=True)
    path = folder / "compare.csv"
    write_table(table, path)
    note_made(path, cells=made, notes=notes)
    return Compared(table, (path, *files), tuple(notes))


def _scored(
    root: Path, spec: ScoreSpec, prepared: Prepared, session: Session, progress: Progress | None
) -> tuple[RunDir, Scores]:
    """A run and its scores; with a limit to memory without single examples, which would be beside the next method's passes."""
    run, scores = scored_below(root, spec, prepared, session, progress)
    return run, scores if spec.memory is None else replace(scores, examples=None, present=None)


def compare_runs(paths: Sequence[Path], options: CompareOptions, folder: Path, place: str | None = None) -> Compared:
    """Compare runs that exist; one of them must be of the reference method. Of runs in several dtypes, the reference is the one
    of that method in the widest.
    """
    distinct("run", [str(path.resolve()) for path in paths])
    runs = [open_run(path) for path in paths]
    dtypes = [spec.dtype for _, spec, _ in runs]
    anew: dict[str, Any] = {"method": "", "params": {}, "keep_examples": None, "dtype": dtypes[0], "memory": None}
    specs = [spec.model_copy(update=anew) for _, spec, _ in runs]
    for path, spec in zip(paths[1:], specs[1:], strict=True):
        different = [k for k in ScoreSpec.model_fields if getattr(spec, k) != getattr(specs[0], k)]
        if different:
            raise RelpError(f"runs {paths[0]} and {path} cannot be compared: they differ in {', '.join(different)}")
    for what, noun in (("task_hash", "tasks"), ("revision", "models"), ("dictionary_hash", "dictionaries")):
        for path, (_, _, scores) in zip(paths, runs, strict=True):
            if scores.meta.get(what) != runs[0][2].meta.get(what):
                raise RelpError(f"runs {paths[0]} and {path} cannot be compared: they are of different {noun} ({what})")
    names = method_names([spec for _, spec, _ in runs])
    ranked = [
        (WIDEST.index(spec.dtype), name)
        for name, (_, spec, _) in zip(names, runs, strict=True)
        if same_method(spec.method, options.reference)
    ]
    references = [name for rank, name in ranked if rank == min(ranked)[0]]
    if len(references) > 1:
        raise RelpError(f"{len(references)} of these runs are of the reference '{options.reference}'; give one")
    by_method = {
        name if names.count(name) == 1 else f"{name} ({path})": scores
        for name, path, (_, _, scores) in zip(names, paths, runs, strict=True)
    }
    if not references:
        raise RelpError(f"no run of '{options.reference}' among these; score one, or choose another --reference")
    reference = references[0]
    methods = [m for m in by_method if m != reference]
    if not methods:
        raise RelpError("only the reference run was given; expected at least one other method")
    prepared = prepare_again(specs[0].model_copy(update={"method": runs[0][1].method}), runs[0][2], Session(place))
    first = runs[0][2].meta
    result = run_comparison(
        prepared.model, prepared.pairs, methods, tuple(runs[0][2]), first["metric"], first["direction"],
        reference, options.top_k, seed=options.common["seed"], scores=by_method,
    )  # fmt: skip
    result.table.insert(0, "task", first["task"])
    path = folder / "compare.csv"
    write_table(result.table, path)
    at = {name: os.path.relpath(run, folder) for name, run in zip(by_method, paths, strict=True)}
    cell = {"task": first["task"], "model": prepared.model.name, "runs": at, "reference": reference}
    note_made(path, cells=[cell], notes=prepared.notes)
    return Compared(result.table, (path,), prepared.notes)


def _figure(
    prepared: Prepared, model: str, scores: dict[str, Scores], reference: ScoreSpec, folder: Path
) -> list[Path]:
    kinds = [k for k in reference.nodes if k in NODE_KINDS and NODE_KINDS[k].split == "vector"]
    if not kinds:
        return []
    task = prepared.task.name
    path = folder / f"heatmaps-{file_label(task)}-{file_label(model)}-{reference.direction}.png"
    title = f"{task}, {model}, {reference.direction}"
    records = pair_records(prepared.model.tokenizer, prepared.pairs, prepared.behaviour, prepared.metric)
    heatmaps(scores, kinds, path, title, shared_tokens(records, scores[reference.method]))
    return [path]


def shared_tokens(records: Mapping[str, Any], scores: Scores) -> list[str]:
    """Under each position label the token that all pairs have there (`pair_records`), "" where they differ."""
    return [records["shared"].get(label, "") for label in scores.labels]
