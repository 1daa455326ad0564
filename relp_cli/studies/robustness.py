"""`relp robustness`: the same study over again with other pairs, phrasings, ablations, thresholds and methods.

1. Every method scores the pairs of every template (run directories under RUN/robustness, reused when they verify).
2. Per resample of the pairs and point of the sweep, a circuit of each; per ablation, its faithfulness on held-out pairs of that
   template, resampled with them.
3. How much of the variance of faithfulness each choice accounts for, and the circuit that most settings agree on.
4. With tasks: the circuit of each, without positions, on the held-out pairs of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation_table import ablation_row
from relp_cli.evaluation.evaluate import Ablating, ablator, evaluate, excluded_layers, measured
from relp_cli.evaluation.robustness import consensus, variance_table
from relp_cli.files import check_writable
from relp_cli.methods.request import Progress
from relp_cli.methods.score import shared_params
from relp_cli.nodes.kinds import mixed_warning
from relp_cli.report.tables import write_table
from relp_cli.runs.checked import distinct, score_spec
from relp_cli.runs.made import note_made
from relp_cli.runs.scoring import (
    Prepared,
    Session,
    check_request,
    open_run,
    prepare,
    prepare_again,
    scored_below,
)
from relp_cli.runs.spec import ScoreSpec
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.select import KEPT_META
from relp_cli.spaces.table import space_for
from relp_cli.statistics import resample_counts
from relp_cli.studies.evaluating import circuits_of, held_out, sweep_points
from relp_cli.tasks.metrics import METRICS

FACTORS = ("method", "template", "pairs", "threshold", "ablation")


@dataclass(frozen=True)
class Grid:
    """The settings, and what else `relp robustness` takes. share: of the circuits that keep a unit of the consensus.
    tasks: of the transfer matrix. keep: share of the units that its circuits have. pairs: held-out ones, over all templates.
    """

    methods: tuple[str, ...]
    ablations: tuple[str, ...]
    sweep: str
    resamples: int = 5
    share: float = 0.5
    tasks: tuple[str, ...] = ()
    keep: float = 0.25
    pairs: int = 100
    seed: int = 0
    exclude_layers: int | None = None
    batch_size: int = BATCH_SIZE

    def check(self, spec: ScoreSpec) -> dict[str, ScoreSpec]:
        """Method → its scoring. Raises RelpError for what can be known to be wrong before a model is loaded."""
        for what, names in (("method", self.methods), ("ablation", self.ablations), ("task", self.tasks)):
            distinct(what, names)
        for name in ("share", "keep"):
            if not 0 < getattr(self, name) <= 1:
                raise RelpError(f"--{name} {getattr(self, name)}: expected a number above 0 and up to 1")
        if not sweep_points(self.sweep)[0]:
            raise RelpError(f"--sweep {self.sweep}: expected log:…, lin:…, counts:1,10 or fractions:.1,.5")
        if len(self.tasks) == 1:
            raise RelpError(f"--tasks {self.tasks[0]}: a transfer matrix needs two tasks at least")
        for ablation in self.ablations:
            if ablation_row(ablation, space_for(spec.nodes).name).name == "corpus":
                raise RelpError("--ablations corpus: needs a file; use relp evaluate --ablation corpus --corpus FILE")
        held_out(spec, self.pairs, self.seed)
        space = space_for(spec.nodes)
        others = tuple(m for m in self.methods if m != spec.method)
        params = shared_params(others, {k: v for k, v in spec.params.items() if k in space.options}, space)
        specs = {
            m: score_spec(
                **spec.model_dump() | {"method": m, "keep_examples": True, "params": params.get(m, spec.params)}
            )
            for m in self.methods
        }
        for one in specs.values():
            check_request(one)
        return specs


@dataclass(frozen=True)
class Robust:
    """settings: one row per setting. variance: one per factor. transfer: task × task. files: what was written."""

    settings: pd.DataFrame
    variance: pd.DataFrame
    circuit: Circuit
    transfer: pd.DataFrame | None
    files: tuple[Path, ...]
    notes: tuple[str, ...]


def robustness_of_run(path: Path, grid: Grid, session: Session, progress: Progress | None = None) -> Robust:
    """Run the grid and write robustness.csv, robustness-variance.csv, consensus.json and robustness-transfer.csv into the run."""
    run, spec, scores = open_run(path)
    specs = grid.check(spec)
    check_writable(run.path)
    tasks = [session.task(name) for name in grid.tasks]
    distinct("task name", [task.name for task in tasks])
    prepared = prepare_again(spec, scores, session)
    exclude = excluded_layers(scores.units.space, prepared.model.shape.n_layers, grid.exclude_layers)
    parts, notes = _templates(spec, session)
    root = run.path / "robustness"
    values, sizes, circuits, said = _values(specs, parts, grid, exclude, session, root, progress)
    notes += [line for line in said if line.partition(": ")[2] not in prepared.notes]
    levels = {
        "method": list(specs),
        "template": [str(i + 1) for i in range(len(parts))],
        "pairs": [f"resample {i + 1}" for i in range(grid.resamples)],
        "threshold": [", ".join(f"{k}={v:g}" for k, v in point.items()) for point in sweep_points(grid.sweep)],
        "ablation": list(grid.ablations),
    }
    settings = pd.DataFrame(
        {**{name: levels[name][i] for name, i in zip(FACTORS, at, strict=True)},
         "n_nodes": int(sizes[at[:-1]]), "faithfulness": float(values[at])}
        for at in np.ndindex(values.shape)
    )  # fmt: skip
    files = [run.path / "robustness.csv", run.path / "consensus.json", run.path / "robustness-variance.csv"]
    write_table(settings, files[0])
    note_made(files[0])
    meta = {k: scores.meta[k] for k in KEPT_META if k in scores.meta} | {"method": "consensus"}
    agreed = consensus(circuits, grid.share, meta)
    agreed.save(files[1])
    variance = variance_table(values, levels)
    write_table(variance, files[2])
    transfer = None
    if mixed := mixed_warning(agreed.units.kinds):
        notes.append(mixed)
    if tasks:
        transfer, said = _transfer(spec, grid, exclude, session, root, progress)
        notes += said
        files.append(run.path / "robustness-transfer.csv")
        write_table(transfer, files[-1])
    return Robust(settings, variance, agreed, transfer, tuple(files), tuple(dict.fromkeys([*prepared.notes, *notes])))


def grid_cost(path: Path, grid: Grid) -> dict[str, Any]:
    """Settings, circuits, and forward passes per held-out pair of the grid; scoring and transfer come on top."""
    _, spec, _ = open_run(path)
    grid.check(spec)
    templates = len(_texts(Session(), spec))
    each = len(grid.methods) * grid.resamples * len(sweep_points(grid.sweep))
    return {
        "templates": templates,
        "circuits": each * templates,
        "settings": each * templates * len(grid.ablations),
        "forward passes per held-out pair": (each + 2) * len(grid.ablations),
    }


def _texts(session: Session, spec: ScoreSpec) -> Sequence[Any]:
    """A task's templates; of a file of pairs, one that is none."""
    return session.task(spec.task).text.templates or (None,)


def _templates(spec: ScoreSpec, session: Session) -> tuple[list[ScoreSpec], list[str]]:
    """The same scoring of each template's pairs alone, as many of each, and what the templates are."""
    task, texts = session.task(spec.task), _texts(session, spec)
    if len(texts) == 1:
        return [spec], []
    parts = []
    for i, template in enumerate(texts):
        name = f"{spec.task}#{i + 1}"  # no task has this name: it stands for itself in this session alone
        session.tasks[name] = replace(task, text=replace(task.text, templates=(template,)), hash=f"{task.hash}-{i + 1}")
        parts.append(spec.model_copy(update={"task": name, "pairs": -(-spec.pairs // len(texts))}))
    return parts, [f"template {i + 1}: {text}" for i, text in enumerate(task.spec.templates)]


def _values(
    specs: dict[str, ScoreSpec],
    parts: list[ScoreSpec],
    grid: Grid,
    exclude: int,
    session: Session,
    root: Path,
    progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray, list[Circuit], list[str]]:
    """Faithfulness Float[method, template, resample, point, ablation], sizes without the last axis, all circuits, and notes on
    each template's pairs.
    """
    n_points, shape = len(sweep_points(grid.sweep)), (len(specs), len(parts), grid.resamples)
    values = np.full((*shape, n_points, len(grid.ablations)), np.nan)
    sizes, everything, notes = np.zeros((*shape, n_points), dtype=int), [], []
    for t, part in enumerate(parts):
        prepared = prepare(part, session, at_most=True)
        circuits = []
        for m in specs.values():
            one = m.model_copy(update={"task": part.task, "pairs": part.pairs})
            _, scores = scored_below(root, one, prepared, session, progress)
            for c in _resampled(scores, grid, exclude, n_points):
                circuits += c
        sizes[:, t] = np.reshape([c.counted(exclude) for c in circuits], (len(specs), grid.resamples, n_points))
        everything += circuits
        held = prepare(held_out(part, -(-grid.pairs // len(parts)), grid.seed), session, session.takes_fewer)
        notes += [f"template {t + 1}: {line}" for line in (*prepared.notes, *held.notes)]
        for a, ablation in enumerate(grid.ablations):
            found = _faithfulness(held, circuits, ablation, grid, exclude, part.params.get("dictionary"), progress)
            values[:, t, :, :, a] = found.reshape(len(specs), grid.resamples, n_points)
    return values, sizes, everything, notes


def _resampled(scores: Scores, grid: Grid, exclude: int, n_points: int) -> Iterator[list[Circuit]]:
    """Per resample of the pairs, a circuit per point of the sweep."""
    if scores.examples is None or scores.present is None:
        raise RelpError(f"robustness resamples pairs, and {scores.meta['method']} scores no single ones; leave it out")
    for draw in resample_counts(len(scores.present), grid.resamples, grid.seed, scores.prompts):
        weights = scores.examples.new_tensor(draw)
        circuits = circuits_of(scores.weighed(weights), grid.sweep, exclude)
        if len(circuits) != n_points:
            raise RelpError(f"--sweep {grid.sweep}: some of its points are the same circuit here; give fewer")
        yield circuits


def _faithfulness(
    held: Prepared,
    circuits: list[Circuit],
    ablation: str,
    grid: Grid,
    exclude: int,
    dictionary: Any,
    progress: Progress | None,
) -> np.ndarray:
    """Float[circuit]: the circuits go through the resamples, point by point within one, and the pairs with them."""
    run = ablator(
        held.model, held.pairs, circuits, Ablating(ablation, exclude, grid.seed, None, dictionary, grid.batch_size)
    )
    values = measured(run, held.model, METRICS[held.metric], circuits, held.pairs, progress, complements=0)
    draws = resample_counts(values.n, grid.resamples, grid.seed + 1, values.prompts)
    full, empty = draws @ values.get("full"), draws @ values.get("empty")
    out, points = np.empty(len(circuits)), len(sweep_points(grid.sweep))
    for i in range(len(circuits)):
        r = i // points % grid.resamples
        gap = full[r] - empty[r]
        tiny = 1e-6 * max(abs(full[r]), abs(empty[r]), 1e-12)
        out[i] = (draws[r] @ values.get("circuit", i) - empty[r]) / gap if abs(gap) > tiny else np.nan
    return out


def _transfer(
    spec: ScoreSpec, grid: Grid, exclude: int, session: Session, root: Path, progress: Progress | None
) -> tuple[pd.DataFrame, list[str]]:
    """Faithfulness of every task's circuit (rows), by the run's method, on every task (columns). The circuits keep a share of the
    units, at all positions: tasks do not have the same ones.
    """
    found, held, notes = {}, {}, []
    for task in grid.tasks:
        one = spec.model_copy(update={"task": task, "metric": None})
        prepared = prepare(one, session, at_most=True)
        _, scores = scored_below(root, one, prepared, session, progress)
        count = math.ceil(grid.keep * int(scores.units.counted(exclude).sum()))
        aggregate = {} if scores.axis == "all" else {"aggregate": "sum"}
        found[prepared.task.name] = select(scores, top_k=count, from_layer=exclude, **aggregate)  # type: ignore[arg-type]
        held[prepared.task.name] = prepare(held_out(one, grid.pairs, grid.seed), session, session.takes_fewer)
        notes += [f"{prepared.task.name}: {line}" for line in (*prepared.notes, *held[prepared.task.name].notes)]
    rows = []
    for name, circuit in found.items():
        row: dict[str, Any] = {"found on": name, "n_nodes": circuit.counted(exclude)}
        for other, on in held.items():
            table = evaluate(
                on.model, on.pairs, circuit, grid.ablations[0], exclude, on.metric, grid.seed, bootstrap=0,
                dictionary=spec.params.get("dictionary"), batch_size=grid.batch_size,
            )  # fmt: skip
            row[other] = float(table.faithfulness.iloc[0])
        rows.append(row)
    return pd.DataFrame(rows), notes
