"""Evaluating a run: its circuit, or a sweep over its scores, on held-out pairs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from relp_cli.edges.exchange import import_circuit, is_eap_ig
from relp_cli.errors import RelpError, unknown
from relp_cli.evaluation.ablation_table import ablation_row
from relp_cli.evaluation.areas import MIB_FRACTIONS
from relp_cli.evaluation.evaluate import evaluate, excluded_layers
from relp_cli.evaluation.minimality import minimality
from relp_cli.features.kinds import SCORED
from relp_cli.files import check_writable, lines_of
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.report.tables import write_table
from relp_cli.runs.checked import score_spec
from relp_cli.runs.rundir import RunDir
from relp_cli.runs.scoring import Session, open_run, prepare_again
from relp_cli.runs.spec import ScoreSpec
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.features import ERRORS, without_errors
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import SPACES, space_of
from relp_cli.tasks.metrics import METRICS

DEFAULT_SWEEP = "log:1e-4:1:15"


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


def evaluate_run(
    path: Path,
    *,
    sweep: str | None = None,
    circuit: Path | None = None,
    pairs: int = 100,
    seed: int = 0,
    metric: str | None = None,
    session: Session,
    errors: str | None = None,
    output: Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Path, pd.DataFrame, tuple[str, ...]]:
    """Evaluate a run's circuit.json (or a given circuit, or a sweep) and write evaluation.csv into the run, or `output`.

    Returns the file, the table, and notes for people. Raises RelpError for circuits of another model or task.
    """
    run, spec, scores = open_run(path)
    if sweep is not None and circuit is not None:
        raise RelpError("give --sweep or --circuit, not both")
    check_evaluation(scores, circuit, errors, metric, options.get("ablation", "mean"), options.get("corpus"))
    if output is not None and (output.is_dir() or output.suffix != ".csv"):
        raise RelpError(f"--output {output}: expected the name of a .csv file for a run's evaluation")
    check_writable(output or run.path)
    if sweep is not None:
        sweep_points(sweep)  # found to be wrong before a model is loaded
    file = circuit or (run.circuit if run.circuit.is_file() and sweep is None else None)
    prepared = prepare_again(held_out(spec, pairs, seed, metric), scores, session, at_most=True)
    exclude = excluded_layers(scores.units.space, prepared.model.shape.n_layers, options.get("exclude_layers"))
    more = {"errors": errors} if errors else {}
    if file:
        read = (
            read_circuit(file, errors, prepared.model) if circuit else own_circuit(run, scores, errors, prepared.model)
        )
        circuits = [read]
    else:
        circuits = circuits_of(scores, sweep or DEFAULT_SWEEP, exclude, **more)
    for what in ("task", "dictionary_hash"):
        theirs = circuits[0].meta.get(what)
        if theirs is not None and theirs != scores.meta.get(what):
            raise RelpError(
                f"circuit {file} was found with {what.replace('_', ' ')} '{theirs}', not '{scores.meta.get(what)}'"
            )
    table = evaluate(
        prepared.model, prepared.pairs, circuits, metric=prepared.metric, seed=seed, progress=progress,
        dictionary=spec.params.get("dictionary"), **options,
    )  # fmt: skip
    notes, whole = list(prepared.notes), circuits[0].n_nodes
    if file and whole > table.n_nodes[0]:
        below = whole - table.n_nodes[0]
        notes.append(f"{below} of the circuit's {whole} nodes lie in the first {exclude} layers, which are not ablated")
    first = circuits[0]
    about = {k: first.meta.get(k, scores.meta[k]) for k in ("task", "model", "method", "direction")}
    about["kind"] = SPACES[first.units.space].called(first.units.kinds)
    for position, (name, value) in enumerate(about.items()):
        table.insert(position, name, value)
    if file:  # so that a report can tell whether this table is of the circuit that the run has by then
        table["circuit"] = first.hash
    out = output or run.path / "evaluation.csv"
    write_table(table, out)
    return out, table, tuple(notes)


def check_evaluation(
    scores: Scores,
    circuit: Path | None,
    errors: str | None,
    metric: str | None,
    ablation: str,
    corpus: Path | None,
) -> None:
    """Raises RelpError for what can be known to be wrong before a model is loaded."""
    if errors is not None and SCORED not in scores:
        raise RelpError("--errors is for feature circuits; this run scored " + ", ".join(scores))
    if errors is not None and errors not in ERRORS:
        raise unknown("choice of error terms", errors, ERRORS)
    if metric is not None:
        METRICS[metric]
    ablation_row(ablation, scores.units.space)
    if corpus is not None:
        lines_of(corpus, "corpus")
    if circuit is not None:
        read_circuit(circuit, errors)


def evaluation_cost(path: Path, sweep: str | None, circuit: Path | None, pairs: int, random: int) -> dict[str, Any]:
    """What an evaluation would cost: circuits (a sweep's points), and forward passes per pair: F(M), F(∅), and F(C) and
    F(M∖C) of every circuit and random circuit. Passes for ablation values (one or two) come on top.
    """
    run, *_ = open_run(path)
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


def minimality_of_run(
    path: Path,
    *,
    circuit: Path | None = None,
    pairs: int = 100,
    seed: int = 0,
    metric: str | None = None,
    session: Session,
    errors: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Path, pd.DataFrame]:
    """Drop the nodes of a run's circuit one by one on held-out pairs and write minimality.csv into the run."""
    run, spec, scores = open_run(path)
    file = circuit or run.circuit
    if not file.is_file():
        raise RelpError(f"run '{path}' has no circuit to drop nodes of; run `relp circuit {path} --threshold …`")
    prepared = prepare_again(held_out(spec, pairs, seed, metric), scores, session, at_most=True)
    chosen = read_circuit(file, errors, prepared.model) if circuit else own_circuit(run, scores, errors, prepared.model)
    table = minimality(
        prepared.model, prepared.pairs, chosen, metric=prepared.metric, seed=seed,
        progress=progress, dictionary=spec.params.get("dictionary"), **options,
    )  # fmt: skip
    out = run.path / "minimality.csv"
    write_table(table, out)
    return out, table
