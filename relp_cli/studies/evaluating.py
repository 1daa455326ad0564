"""Evaluating a run: its circuit, or a sweep over its scores, on held-out pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from relp_cli import BATCH_SIZE
from relp_cli.edges.exchange import import_circuit, is_eap_ig
from relp_cli.errors import RelpError, unknown
from relp_cli.evaluation.ablation_table import ablation_row
from relp_cli.evaluation.areas import MIB_FRACTIONS
from relp_cli.evaluation.evaluate import check_bounded, evaluate, excluded_layers
from relp_cli.evaluation.minimality import minimality
from relp_cli.features.kinds import SCORED
from relp_cli.files import check_writable, lines_of
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.nodes.kinds import mixed_warning
from relp_cli.report.tables import write_table
from relp_cli.runs.checked import file_label, score_spec
from relp_cli.runs.earlier import Say, keep_earlier, quiet
from relp_cli.runs.made import note_made
from relp_cli.runs.rundir import RunDir
from relp_cli.runs.scoring import Prepared, Session, open_run, prepare_again
from relp_cli.runs.spec import ScoreSpec
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.features import ERRORS, without_errors
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES, space_of
from relp_cli.tasks.counted import pairs_text
from relp_cli.tasks.metrics import METRICS

DEFAULT_SWEEP = "log:1e-4:1:15"
FEW_FOR_MEANS = 50  # pairs: an ablation's means over fewer are said to move the figures


def sweep_points(text: str) -> list[dict[str, float]]:
    """`log:LO:HI:N` or `lin:LO:HI:N` thresholds, or node counts `counts:1,10,100` → keyword arguments of `select`;
    `counts:log:N` (N counts from 1 to all) → N empty ones, and `fractions:mib` or `fractions:.1,.5` → their share (`of`),
    which `circuits_of` turns into counts.

    Raises: RelpError naming the form that was expected.
    """
    form, *parts = text.split(":")
    try:
        if form in ("log", "lin") and len(parts) == 3:
            low, high, n = float(parts[0]), float(parts[1]), int(parts[2])
            if n < 1 or low >= high or (form == "log" and low <= 0):
                raise ValueError
            if not (math.isfinite(low) and math.isfinite(high)):
                raise ValueError
            values = np.geomspace(low, high, n) if form == "log" else np.linspace(low, high, n)
            return [{"threshold": float(v)} for v in values]
        if form == "counts" and len(parts) == 2 and parts[0] == "log" and int(parts[1]) > 1:
            return [{} for _ in range(int(parts[1]))]
        if form == "fractions" and parts:
            fractions = MIB_FRACTIONS if parts == ["mib"] else tuple(float(v) for v in parts[0].split(","))
            if not all(0 < f <= 1 for f in fractions):
                raise ValueError
            return [{"of": f} for f in fractions]
        if form == "counts" and len(parts) == 1:
            counts = [int(v) for v in parts[0].split(",")]
            if min(counts) < 0:
                raise ValueError
            return [{"top_k": c} for c in counts]
    except ValueError:
        pass
    raise RelpError(
        f"sweep '{text}': expected log:1e-4:1:15, lin:0:1:11, counts:1,10,100, counts:log:15 or fractions:mib"
    )


def circuits_of(scores: Scores, sweep: str, from_layer: int = 0, **more: Any) -> list[Any]:
    """One circuit per point of a sweep over the nodes of layers ≥ `from_layer`.

    more: what `select` takes besides, for features.
    Counts beyond the nodes that have a score (the candidates of a re-scoring; all nodes otherwise) mean all of these.
    """
    points = sweep_points(sweep)
    scored = space_of(scores.units).scored(scores, from_layer, **more)
    if not points[0]:
        counts = np.unique(np.geomspace(1, max(scored, 1), len(points)).round().astype(int))
        points = [{"top_k": int(c)} for c in counts]
    if "of" in points[0]:
        points = [{"top_k": int(p["of"] * scored)} for p in points]  # MIB's grid: every fraction stays a point
    elif "top_k" in points[0]:
        points = [{"top_k": k} for k in dict.fromkeys(min(int(p["top_k"]), scored) for p in points)]
    return [select(scores, from_layer=from_layer, **p, **more) for p in points]  # type: ignore[arg-type]


def held_out(spec: ScoreSpec, pairs: int, seed: int, metric: str | None = None) -> ScoreSpec:
    """The same task and model on held-out pairs, disjoint from those that were scored by construction."""
    if spec.split == "all":
        raise RelpError("this run scored split 'all', which leaves no held-out pairs; score with --split discovery")
    split = "heldout" if spec.split == "discovery" else "discovery"
    metric = spec.metric if metric is None else metric
    return score_spec(**spec.model_dump() | {"split": split, "pairs": pairs, "seed": seed, "metric": metric})


@dataclass(frozen=True)
class Evaluation:
    """What `relp evaluate RUN` was asked for. kinds: what a sweep selects from (none: all that were scored). task: another than
    the run's (transfer); the rest is `evaluate`'s.
    """

    sweep: str | None = None
    circuit: Path | None = None
    kinds: tuple[str, ...] = ()
    task: str | None = None
    metric: str | None = None
    pairs: int = 100
    seed: int = 0
    errors: str | None = None
    ablation: str = "mean"
    corpus: Path | None = None
    exclude_layers: int | None = None
    batch_size: int = BATCH_SIZE
    memory: int | None = None
    alone: str = ""

    def check(self, scores: Scores) -> None:
        """Raises RelpError for what can be known to be wrong before a model is loaded."""
        if self.memory is not None:
            check_bounded(self.batch_size, self.corpus)
        if self.sweep is not None and self.circuit is not None:
            raise RelpError("give --sweep or --circuit, not both")
        if self.kinds:
            scores.only(self.kinds)
        if self.errors is not None and SCORED not in scores:
            raise RelpError("--errors is for feature circuits; this run scored " + ", ".join(scores))
        if self.errors is not None and self.errors not in ERRORS:
            raise unknown("choice of error terms", self.errors, ERRORS)
        if self.metric is not None:
            METRICS[self.metric]
        ablation_row(self.ablation, scores.units.space)
        if self.corpus is not None:
            lines_of(self.corpus, "corpus")
        if self.circuit is not None:
            read_circuit(self.circuit, self.errors)
        if self.sweep is not None:
            sweep_points(self.sweep)

    def how(self, exclude: int, dictionary: Any) -> dict[str, Any]:
        """Keywords of `evaluate` and `minimality`."""
        return {"ablation": self.ablation, "exclude_layers": exclude, "seed": self.seed, "corpus": self.corpus,
                "batch_size": self.batch_size, "memory": self.memory, "dictionary": dictionary}  # fmt: skip


@dataclass(frozen=True)
class Ready:
    """A run, the held-out pairs to evaluate it on, and its circuits. file: the one that they are of (None: a sweep)."""

    asked: Evaluation
    run: RunDir
    scores: Scores
    prepared: Prepared
    circuits: list[Circuit]
    file: Path | None
    exclude: int
    dictionary: Any
    transfer: bool

    @property
    def stem(self) -> str:
        """What names the tables of this evaluation: those on another task do not replace the run's own."""
        return "" if not self.transfer else f"-{file_label(self.prepared.task.name)}"

    @property
    def about(self) -> dict[str, Any]:
        """The first columns of a table: what was evaluated, and on which task."""
        first = self.circuits[0]
        about = {k: first.meta.get(k, self.scores.meta[k]) for k in ("task", "model", "method", "direction")}
        kind = SPACES[first.units.space].called(first.units.kinds)
        return {"task": about.pop("task"), "evaluated_on": self.prepared.task.name, **about, "kind": kind}

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for people."""
        notes, about = list(self.prepared.notes), self.about
        if about["task"] != about["evaluated_on"]:
            notes.append(f"transfer: circuits of task {about['task']}, evaluated on {about['evaluated_on']}")
        if self.file and (below := self.circuits[0].n_nodes - self.circuits[0].counted(self.exclude)):
            notes.append(
                f"{below} of the circuit's {self.circuits[0].n_nodes} nodes lie in the first {self.exclude} layers, "
                "which are not ablated"
            )
        if mixed := mixed_warning(self.circuits[0].units.kinds):
            notes.append(mixed)
        n = sum(len(batch) for batch in self.prepared.pairs)
        row = ablation_row(self.asked.ablation, self.scores.units.space)
        if n < FEW_FOR_MEANS and row.means and row.needs_patch:
            notes.append(
                f"the ablation's means are of these {pairs_text(n)}: faithfulness moves with them by more than its interval "
                "says, less so with a hundred pairs or more (docs/results.md)"
            )
        return tuple(notes)


def ready(path: Path, asked: Evaluation, session: Session, output: Path | None = None) -> Ready:
    """Open a run, draw the pairs, and read its circuit.json (or a given circuit), or select the circuits of a sweep.

    Raises: RelpError for what was asked wrongly, and for circuits of another model, or of a task that was not asked for.
    """
    run, spec, scores = open_run(path)
    scores = replace(scores, examples=None, present=None)  # they are large, and nothing asks for them from here on
    asked.check(scores)
    if output is not None and (output.is_dir() or output.suffix != ".csv"):
        raise RelpError(f"--output {output}: expected the name of a .csv file for a run's evaluation")
    check_writable(output or run.path)
    file = asked.circuit or (run.circuit if run.circuit.is_file() and asked.sweep is None else None)
    if asked.kinds and file:
        raise RelpError(
            f"--nodes is for sweeps, {file} has its own kinds: give --sweep, or select it again: relp circuit {path} --nodes "
            f"{','.join(asked.kinds)} …"
        )
    if asked.alone and not (file and file.is_file()):
        why = "a sweep has none" if asked.sweep else f"run `relp circuit {path} --threshold …`"
        raise RelpError(f"run '{path}' has no circuit to {asked.alone}; {why}")
    transfer = asked.task is not None and session.task(asked.task).hash != scores.meta.get("task_hash")
    if transfer:  # a run of all pairs has scored none of the other task
        split = "discovery" if spec.split == "all" else spec.split
        spec = spec.model_copy(update={"task": asked.task, "split": split})
    spec = held_out(spec, asked.pairs, asked.seed, asked.metric)
    prepared = prepare_again(spec, scores, session, session.takes_fewer, same_task=not transfer)
    exclude = excluded_layers(scores.units.space, prepared.model.shape.n_layers, asked.exclude_layers)
    if file:
        own = asked.circuit is None
        circuits = [
            own_circuit(run, scores, asked.errors, prepared.model)
            if own
            else read_circuit(file, asked.errors, prepared.model)
        ]
    else:
        more = {"errors": asked.errors} if asked.errors else {}
        swept = scores.only(asked.kinds) if asked.kinds else scores
        circuits = circuits_of(swept, asked.sweep or DEFAULT_SWEEP, exclude, **more)
    for what in ("dictionary_hash",) if asked.task is not None else ("task", "dictionary_hash"):
        theirs = circuits[0].meta.get(what)
        if theirs is not None and theirs != scores.meta.get(what):
            hint = f"; --task {spec.task} evaluates it there all the same" if what == "task" else ""
            raise RelpError(
                f"circuit {file} was found with {what.replace('_', ' ')} '{theirs}', not '{scores.meta.get(what)}'{hint}"
            )
    where = spec.params.get("dictionary")
    dictionary = session.dictionaries(where, prepared.model) if where else None
    return Ready(asked, run, scores, prepared, circuits, file, exclude, dictionary, transfer)


def evaluate_run(
    at: Ready,
    random_circuits: int = 3,
    output: Path | None = None,
    progress: Progress | None = None,
    say: Say = quiet,
) -> tuple[Path, pd.DataFrame]:
    """Evaluate the circuits and write evaluation.csv into the run, or `output`. Returns the file and the table.

    say: is told what becomes of an evaluation.csv of other settings (`keep_earlier`).
    """
    table = evaluate(
        at.prepared.model, at.prepared.pairs, at.circuits, metric=at.prepared.metric, random_circuits=random_circuits,
        progress=progress, **at.asked.how(at.exclude, at.dictionary),
    )  # fmt: skip
    for position, (name, value) in enumerate(at.about.items()):
        table.insert(position, name, value)
    if at.file:  # so that a report can tell whether this table is of the circuit that the run has by then
        table["circuit"] = at.circuits[0].hash
    out = output or at.run.path / f"evaluation{at.stem}.csv"
    if output is None:
        keep_earlier(out, table, say)
    write_table(table, out)
    if output is None:
        note_made(out)
    return out, table


def minimality_of_run(at: Ready, progress: Progress | None = None) -> tuple[Path, pd.DataFrame]:
    """Drop the nodes of a run's circuit one by one and write minimality.csv into the run."""
    table = minimality(
        at.prepared.model, at.prepared.pairs, at.circuits[0], metric=at.prepared.metric, progress=progress,
        **at.asked.how(at.exclude, at.dictionary),
    )  # fmt: skip
    out = at.run.path / f"minimality{at.stem}.csv"
    write_table(table, out)
    note_made(out, circuit=at.circuits[0].hash)
    return out, table


def evaluation_cost(
    path: Path, sweep: str | None, circuit: Path | None, pairs: int, random: int, kinds: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What an evaluation would cost: circuits (a sweep's points), and forward passes per pair: F(M), F(∅), and F(C) and
    F(M∖C) of every circuit and random circuit. Passes for ablation values (one or two) come on top.
    """
    run, _, scores = open_run(path)
    if kinds:
        scores.only(kinds)
    alone = circuit is not None or (sweep is None and run.circuit.is_file())
    count = 1 if alone else len(sweep_points(sweep or DEFAULT_SWEEP))
    return {
        "circuits": count,
        "held-out pairs": f"at most {pairs}",
        "forward passes per pair": 2 + 2 * count * (1 + random),
    }


def read_circuit(path: Path, errors: str | None = None, model: Model | None = None) -> Circuit:
    """A circuit file of any space, or one that EAP-IG or MIB wrote (its graph must be the model's).

    errors: without some of its error terms (a row of spaces.features.ERRORS).
    """
    if is_eap_ig(path):
        return import_circuit(path, model)[0]
    circuit = Circuit.load(path)
    if errors is None:
        return circuit
    if circuit.units.space != "features":
        raise RelpError(f"--errors is for feature circuits; {path} is one of {circuit.units.space}")
    return without_errors(circuit, errors)


def own_circuit(run: RunDir, scores: Scores, errors: str | None = None, model: Model | None = None) -> Circuit:
    """A run's circuit.json. Raises RelpError where it was selected from other scores than the run's, or is of another
    model or graph, or cannot be read.
    """
    circuit = read_circuit(run.circuit, errors, model)
    theirs = circuit.meta.get("scores")
    other = next((w for w in ("model", "revision") if circuit.meta.get(w, scores.meta[w]) != scores.meta[w]), None)
    if not set(circuit.units.blocks) <= set(scores.units.blocks):
        other = "graph" if circuit.units.space == "edges" else other or "scores"
    elif theirs is not None and theirs != scores.only([k for k in scores if k in circuit.units.kinds]).hash:
        other = other or "scores"
    if other is not None:
        which = "other scores" if other == "scores" else f"another {other}"
        raise RelpError(
            f"circuit {run.circuit} is of {which} than this run's; select it again: relp circuit {run.path}"
        )
    return circuit
