"""MIB's measures on local copies of its data sets: methods, or runs that exist, scored on one split and evaluated on another.

Scores are run directories below the output folder, and what circuits do on the held-out pairs is kept beside them, pair by
pair: the same command again computes neither anew.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from relp_cli import __version__
from relp_cli.costs.passes import describe_cost
from relp_cli.errors import RelpError
from relp_cli.evaluation.mib import MIB_FRACTIONS, SPACES_OF_MIB, MibValues, mib_measures, mib_values
from relp_cli.files import check_writable, read_json, write_atomically
from relp_cli.methods.request import Progress
from relp_cli.methods.score import shared_params
from relp_cli.report.tables import write_table
from relp_cli.runs.checked import distinct, file_label, model_labels, score_spec
from relp_cli.runs.scoring import (
    Prepared,
    Session,
    check_request,
    open_run,
    prepare,
    scored_below,
    scoring_notes,
)
from relp_cli.runs.spec import ScoreSpec
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES, space_for
from relp_cli.studies.evaluating import held_out
from relp_cli.tasks.generate import TooFewPairs
from relp_cli.tasks.mib import mib_folders, read_mib
from relp_cli.tasks.source import mib_source
from relp_cli.tasks.task import Task, task_of

METRIC = "logit_diff"  # MIB's m
COSTS = ("forwards_per_pair", "backwards_per_pair", "seconds")


@dataclass(frozen=True)
class MibOptions:
    """What `relp evaluate mib` takes besides its data.

    params: of methods and spaces; each goes to all methods that have it. common: the fields of `ScoreSpec` besides.
    heldout: how many pairs to evaluate on, at most; on: MIB's split of them. runs: evaluated in place of methods.
    """

    model: str
    methods: tuple[str, ...]
    nodes: tuple[str, ...]
    params: dict[str, Any]
    common: dict[str, Any]
    heldout: int
    on: str | None = None
    runs: tuple[Path, ...] = ()
    bootstrap: int = 1000

    def specs(self, task: str) -> dict[str, ScoreSpec]:
        """Method → its scoring of a data set. Raises RelpError for what no method could be scored with."""
        space = space_for(self.nodes)
        check_space(space.name)
        params = shared_params(self.methods, self.params, space)
        return {
            method: score_spec(
                task=task, model=self.model, method=method, nodes=self.nodes, params=params[method], keep_examples=False,
                **self.common,
            )
            for method in self.methods
        }  # fmt: skip


@dataclass(frozen=True)
class MibResult:
    """table: a row per data set and method; curves: one per ranking and fraction besides; notes for people."""

    table: pd.DataFrame
    curves: pd.DataFrame
    files: tuple[Path, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Entry:
    """Scores to be measured on a data set: what tables call them, what they were scored with, and they (None: to be)."""

    label: str
    spec: ScoreSpec
    scores: Scores | None


@dataclass
class _Work:
    """An evaluation under way. Methods share the pairs of their data set."""

    options: MibOptions
    folder: Path
    session: Session
    progress: Progress | None

    def __post_init__(self) -> None:
        self._prepared: dict[str, Prepared] = {}

    def prepared(self, spec: ScoreSpec) -> Prepared:
        key = spec.model_copy(
            update={"method": "", "params": {}, "nodes": (), "batch_size": 1, "memory": None, "direction": "noising"}
        )
        if str(key) not in self._prepared:
            self._prepared[str(key)] = prepare(spec, self.session, at_most=True)
        return self._prepared[str(key)]

    def scores(self, entry: _Entry) -> tuple[Scores, list[str]]:
        """The scores, and notes on them and the pairs that they are of."""
        if entry.scores is not None:
            return entry.scores, []
        prepared = self.prepared(entry.spec)
        _, scores = scored_below(self.folder / "scores", entry.spec, prepared, self.session, self.progress)
        return scores, [*prepared.notes, *scoring_notes(scores)]

    def values(self, entry: _Entry, name: str, scores: Scores) -> tuple[MibValues, list[str]]:
        """What the circuits do on the held-out pairs: from a file where that is of the same pairs and scores."""
        spec = entry.spec
        if spec.task != name and self.session.tasks[name].hash != scores.meta.get("task_hash"):  # a run of another task
            spec = spec.model_copy(update={"split": "discovery"})
        spec = spec.model_copy(update={"task": name})
        spec = held_out(spec, self.options.heldout, spec.seed, METRIC)
        prepared = self.prepared(spec)
        then, now = scores.meta.get("revision"), prepared.model.revision
        if then != now:
            raise RelpError(
                f"model '{spec.model}': the content has changed since {entry.label} was scored (revision {now}, then {then}); "
                "score again"
            )
        digest = spec.digest(
            task_hash=prepared.task.hash, revision=now, on=str(self.options.on), scores=scores.hash,
            metadata=str(scores.meta.get("hash")), relp=__version__,
        )  # fmt: skip
        names = (prepared.task.name, entry.spec.method, digest[:8])
        path = self.folder / "circuits" / f"{'-'.join(map(file_label, names))}.json"
        values = _kept(path, digest)
        if values is None:
            values = mib_values(
                prepared.model, prepared.pairs, scores, METRIC, batch_size=spec.batch_size, progress=self.progress
            )
            write_atomically(path, json.dumps({"hash": digest, "values": values.as_dict()}))
        return values, list(prepared.notes)


def check_space(space: str) -> None:
    """Raises RelpError for units that MIB does not measure."""
    if space not in SPACES_OF_MIB:
        raise RelpError(
            f"MIB measures {' and '.join(SPACES_OF_MIB)}, not {space}: --nodes edges, head,mlp_out, mlp_neuron, …"
        )


def evaluate_mib(
    root: Path, options: MibOptions, folder: Path, place: str | None = None, progress: Progress | None = None
) -> MibResult:
    """Measure every method, or run, on every data set of a folder; write mib.csv and mib-curves.csv.

    A data set without any pair that the model can use is left out, with a warning; where that is all of them, it is an error.
    Raises: RelpError for bad input, before a model is loaded where that can be known.
    """
    session, names = Session(place), data_sets(root, options)
    session.tasks |= names
    entries = {name: _entries(name, options) for name in names}
    check_writable(folder)
    work, model = _Work(options, folder, session, progress), model_labels([options.model])[options.model]
    rows, curves, notes, failed = list[dict[str, Any]](), list[pd.DataFrame](), list[str](), list[RelpError]()
    for name, task in names.items():
        try:
            for entry in entries[name]:
                scores, about_scores = work.scores(entry)
                values, about_values = work.values(entry, name, scores)
                summary, table = mib_measures(values, entry.spec.seed, options.bootstrap)
                about = {"data": task.name, "model": model, **_about(entry, scores, task)}
                rows.append({**about, **summary, **{k: scores.meta.get(k, float("nan")) for k in COSTS}})
                curves.append(table.assign(**about)[[*about, *table.columns]])
                notes += [f"{task.name}: {line}" for line in _of_both(about_scores, about_values)]
        except TooFewPairs as error:
            if error.count:
                raise
            failed.append(error)
            notes.append(f"WARNING: {task.name} is left out: {error}")
    if not rows:
        raise failed[0]
    files = (folder / "mib.csv", folder / "mib-curves.csv")
    table, curve = pd.DataFrame(rows), pd.concat(curves, ignore_index=True)
    for path, content in zip(files, (table, curve), strict=True):
        write_table(content, path)
    return MibResult(table, curve, files, tuple(dict.fromkeys(notes)))


def data_sets(root: Path, options: MibOptions) -> dict[str, Task]:
    """Path → task of every data set, checked. Raises RelpError for bad files and splits, and two of one name."""
    sources = {str(place): mib_source(read_mib(place), options.on) for place in mib_folders(root)}
    distinct("data set", [source.text.spec.name for source in sources.values()])
    return {place: task_of(source) for place, source in sources.items()}


def mib_cost(root: Path, options: MibOptions, place: str | None = None) -> dict[str, Any]:
    """What an evaluation would cost: pairs, what scoring takes, and forward passes per held-out pair and method, at most."""
    session, names = Session(place), data_sets(root, options)
    session.tasks |= names
    out: dict[str, Any] = {}
    for name, task in names.items():
        for entry in _entries(name, options):
            prepared = prepare(entry.spec, session, at_most=True)
            cost = {} if entry.scores is not None else describe_cost(prepared.model, prepared.pairs, entry.spec)
            out[f"{task.name}, {entry.label}"] = {
                **cost,
                "held-out pairs": f"at most {options.heldout}",
                "forward passes per held-out pair": f"at most {3 + 2 * (len(MIB_FRACTIONS) - 1)}",
            }
    return out


def model_of(runs: Sequence[Path]) -> str:
    """The one model that runs are of. Raises RelpError for runs of several, and of units that MIB does not measure."""
    found = [(path, *open_run(path)[1:]) for path in runs]
    for path, spec, scores in found:
        check_space(scores.units.space)
        if spec.model != found[0][1].model:
            raise RelpError(f"runs {runs[0]} and {path} are of different models; expected one")
    return found[0][1].model


def _entries(name: str, options: MibOptions) -> list[_Entry]:
    """The methods of one data set, or the runs. Raises RelpError for what cannot be scored or measured."""
    if not options.runs:
        specs = options.specs(name)
        for spec in specs.values():
            check_request(spec)
        return [_Entry(method, spec, None) for method, spec in specs.items()]
    distinct("run", [str(path.resolve()) for path in options.runs])
    found = [(path, *open_run(path)[1:]) for path in options.runs]
    labels = [spec.method for _, spec, _ in found]
    return [
        _Entry(spec.method if labels.count(spec.method) == 1 else f"{spec.method} ({path})", spec, scores)
        for path, spec, scores in found
    ]


def _about(entry: _Entry, scores: Scores, task: Task) -> dict[str, Any]:
    """transfer: whether they are scores of another task (or of what was then in this one's files)."""
    return {
        "method": entry.label,
        "kind": SPACES[scores.units.space].called(scores.units.kinds),
        "scored_on": scores.meta.get("task", "?"),
        "transfer": scores.meta.get("task_hash") != task.hash,
        "direction": scores.meta.get("direction", "?"),
    }


def _of_both(discovery: list[str], heldout: list[str]) -> list[str]:
    """Notes on the two splits; what is said of one alone says of which."""
    alone = {
        "discovery": [n for n in discovery if n not in heldout],
        "held out": [n for n in heldout if n not in discovery],
    }
    return [n for n in discovery if n in heldout] + [f"{of}: {n}" for of, lines in alone.items() for n in lines]


def _kept(path: Path, digest: str) -> MibValues | None:
    """The values in a file, if they are those of this digest; a damaged file is none."""
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        return MibValues.from_dict(content["values"]) if content["hash"] == digest else None
    except (RelpError, KeyError, TypeError):
        return None
