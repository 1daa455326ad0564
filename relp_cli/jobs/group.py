"""Computing a group's cells: what comes out is returned, one cell after the other; who writes it is the caller's."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relp_cli.errors import OUT_OF_MEMORY, RelpError, out_of_memory
from relp_cli.evaluation.compare import run_comparison
from relp_cli.evaluation.evaluate import evaluate, excluded_layers
from relp_cli.evaluation.verify import rescore
from relp_cli.features.kinds import FEATURE_KINDS
from relp_cli.jobs.check import by_candidates, cheap_methods
from relp_cli.jobs.grid import COSTS, Cell, Group, JobSpec, cell_file, nodes_of, score_spec_of, unloaded_file
from relp_cli.jobs.known import identity_of
from relp_cli.runs.rundir import provenance
from relp_cli.runs.scoring import Prepared, Session, prepare, scored_below
from relp_cli.runs.spec import ScoreSpec
from relp_cli.spaces.scores import Scores
from relp_cli.studies.evaluating import circuits_of, held_out


@dataclass(frozen=True)
class Computed:
    """What became of one cell, picklable.

    file: its name below JOB/cells. content: what that file holds, `rows` or `error` among it; None where it was there.
    identity: what the cell's names stood for (`identity_of`); {} where its model or task did not load.
    """

    cell: Cell
    file: str
    content: dict[str, Any] | None
    identity: dict[str, str]


def compute(
    job: JobSpec,
    wanted: Sequence[Cell],
    session: Session,
    runs: Path,
    there: Collection[str] = (),
    resolved: JobSpec | None = None,
) -> Iterator[Computed]:
    """The cells `wanted` of one group, each as soon as it is done. Nothing is written but score runs below `runs`.

    runs: where score runs are kept; one that is there already is not computed again. Any folder of this machine.
    there: names of finished cells' files, for cells whose file's name only loading the model tells.
    resolved: the job with paths as this process finds them (default: as they are); results are named as in `job`.
    A cell fails on its own, with an `error`, also where the fault is the program's; RELP_DEBUG raises that.
    """
    if not wanted:
        return
    asked, at = wanted[0].group, resolved or job
    group = GroupRun(at, replace(asked, model=at.models[job.models.index(asked.model)]), session, runs)
    for cell in wanted:
        started, identity, file = time.perf_counter(), dict[str, str](), unloaded_file(job, cell)
        content: dict[str, Any] = {"cell": cell.label}
        try:
            identity = group.identity()
            file = cell_file(job, cell, identity)
            if file in there:
                yield Computed(cell, file, None, identity)
                continue
            content["rows"] = group.run(cell)
        except (RelpError, RuntimeError, ValueError, OSError, MemoryError) as error:
            content["error"] = (
                OUT_OF_MEMORY if out_of_memory(error) else " ".join(str(error).split()) or type(error).__name__
            )
        except Exception as error:
            if os.environ.get("RELP_DEBUG"):
                raise
            content["error"] = f"{type(error).__name__}: {' '.join(str(error).split())} (RELP_DEBUG=1 shows where)"
        content |= {"seconds": round(time.perf_counter() - started, 3), "provenance": provenance()}
        yield Computed(cell, file, content, identity)


@dataclass
class GroupRun:
    """One group at work: loads its pairs once, scores each method once, on demand, below `runs`."""

    job: JobSpec
    group: Group
    session: Session
    runs: Path

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
        p, where = self.prepared(), self.job.dictionary
        dictionary = self.session.dictionaries(where, p.model).digest if where else None
        return identity_of(p.task.hash, p.metric, p.model.revision, dictionary)

    def scores(self, method: str, kind: str) -> Scores:
        """Scores of one method. Exact patching of neurons and dimensions re-scores the cheap methods' candidates only."""
        if by_candidates(self.job, method, kind):
            return self._candidates(kind)
        spec = score_spec_of(self.job, self.group, method, kind)
        return self._scored(spec, [k for k in spec.nodes if not by_candidates(self.job, method, k)])

    def _scored(self, spec: ScoreSpec, kinds: Sequence[str]) -> Scores:
        key = f"{spec.method}/{','.join(kinds)}"
        if key not in self._scores:
            spec = spec.model_copy(update={"nodes": tuple(kinds)})
            if self.job.memory is not None:
                self._scores.clear()  # they are in files, and would be beside this method's passes
            self._scores[key] = scored_below(self.runs, spec, self.prepared(), self.session)[1]
        return self._scores[key]

    def _candidates(self, kind: str) -> Scores:
        key = f"candidates/{kind}"
        if key not in self._scores:
            assert self.job.exact_candidates is not None
            found = [{kind: self.scores(m, kind)[kind]} for m in cheap_methods(self.job)]
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
        if self.job.agreement:
            rows += [{**about, "what": "agreement", **r} for r in self._agreement(cell)]
        if self.job.evaluate:
            rows += [{**about, "what": "evaluation", **r} for r in self._curve(cell)]
        return rows

    def _agreement(self, cell: Cell) -> list[dict[str, Any]]:
        assert self.job.agreement is not None
        p, options = self.prepared(), self.job.agreement
        both = cell.method, options.reference
        for method in both:  # each on its own: with a limit to memory the other one is not held meanwhile
            self.scores(method, cell.kind)
        mine, exact = (self.scores(method, cell.kind) for method in both)
        table = run_comparison(
            p.model, p.pairs, [cell.method], [cell.kind], p.metric, cell.group.direction, options.reference,
            options.top_k, seed=cell.group.seed, scores={options.reference: exact, cell.method: mine},
        ).table  # fmt: skip
        return table.drop(columns=["model", "method", "kind", "direction"]).to_dict("records")  # type: ignore[return-value]

    def _curve(self, cell: Cell) -> list[dict[str, Any]]:
        assert self.job.evaluate is not None
        mine = self.scores(cell.method, cell.kind)
        if self.job.memory is not None:
            self._scores.clear()
            mine = replace(mine, examples=None, present=None)
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
            memory=self.job.memory,
        )  # fmt: skip
        costs = {name: mine.meta[name] for name in COSTS if name in mine.meta}
        return table.assign(**costs).to_dict("records")  # type: ignore[return-value]
