"""About how long a scoring takes on this machine, from a little of it.

Which little depends on what the method repeats: pairs (a few are scored), points of a path (one gradient is timed), steps of a
search or of learning (some are taken, and counted by the progress that they report), patched runs (a forward pass is timed),
or several of these.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from relp_cli.costs.passes import patched_runs
from relp_cli.features.kinds import SCORED
from relp_cli.methods.auto import candidates, set_aside
from relp_cli.methods.memory import begun
from relp_cli.methods.request import chooses_rules
from relp_cli.methods.score import resolve_method
from relp_cli.methods.table import Method, Params, Workload
from relp_cli.models.model import Model
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.runs.spec import ScoreSpec
from relp_cli.scoring import score
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.table import space_for
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import parts_of

TIMED = 8  # pairs at most
SECONDS, STEPS = 3.0, 3  # a search is broken off after both
LATER = 0.55  # of a whole pass: what a patched run takes on average, which starts at its layer
CLOSE = 0.75  # of a gradient with δ (2 forward, 1 backward): what another point of a path takes


@dataclass(frozen=True)
class Duration:
    """seconds, and what was timed."""

    seconds: float
    how: str

    def __str__(self) -> str:
        return f"about {spoken(self.seconds)} here ({self.how})"


def spoken(seconds: float) -> str:
    """12 s, 5 min, 3 h"""
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.0f} h"


@dataclass(frozen=True)
class Timing:
    """One scoring that is to be timed. params: the spec's, dictionaries loaded."""

    model: Model
    pairs: Sequence[PairBatch]
    spec: ScoreSpec
    params: dict[str, Any]
    metric: str

    @property
    def n_pairs(self) -> int:
        return sum(map(len, self.pairs))

    @property
    def few(self) -> PairBatch:
        """The pairs that are timed."""
        first = max(self.pairs, key=len)
        return first.rows(slice(0, min(TIMED, len(first), self.spec.batch_size)))

    def resolved(self) -> tuple[Method, Params]:
        space = space_for(self.spec.nodes)
        own = {name: value for name, value in self.params.items() if name not in space.options}
        return resolve_method(self.spec.method, own, space.name, self.model)

    def scoring(self, batch: PairBatch, method: str, params: dict[str, Any]) -> float:
        """Seconds that scoring a batch took."""
        spec, start = self.spec, time.perf_counter()
        score(self.model, [batch], method, spec.nodes, self.metric, spec.direction, spec.baseline, len(batch), False,
              **params)  # fmt: skip
        return time.perf_counter() - start

    def forward(self, batch: PairBatch) -> float:
        """Seconds that a forward pass over one pair of the batch takes."""
        tokens = batch.to(self.model.device).original
        with torch.no_grad():
            start = time.perf_counter()
            self.model.logits(tokens)
        return (time.perf_counter() - start) / len(batch)


def expected_time(
    model: Model, pairs: Sequence[PairBatch], spec: ScoreSpec, params: dict[str, Any], metric: str = "logit_diff"
) -> Duration | None:
    """None for exact patching of features, whose number is not known before."""
    at = Timing(model, pairs, spec, params, metric)
    row, parsed = at.resolved()
    if row.each and spec.nodes == (SCORED,):
        return None
    at.forward(at.few)  # what the first pass alone takes
    if chooses_rules(spec.method, spec.params.get("rules")):
        return _choosing(at)
    if row.patches is not None:
        return _screening(at, row.patches(parsed))
    if row.by == "all" and (row.each or row.whole):
        return _searching(at, row)
    if row.each:
        return _patching(at)
    return _gradients(at)


def points_of(at: Timing) -> float:
    """How many forward and backward passes over every pair a method of steps takes; 0 for methods of another sort."""
    row, parsed = at.resolved()
    if row.gradients is None:
        return 0
    layers = at.model.shape.n_layers
    sites = {"edges": 2 * layers + 1, "nodes": layers * len(at.spec.nodes)}.get(space_for(at.spec.nodes).name, 0)
    return row.gradients(parsed, Workload(layers, sites))


def _gradients(at: Timing) -> Duration:
    """Of methods of a few passes a few pairs are scored; of those of many points, one gradient."""
    few, steps = len(at.few), points_of(at)
    if not steps:
        took = at.scoring(at.few, at.spec.method, at.params)
        return Duration(took / few * at.n_pairs, f"{few} pair{'s were' if few > 1 else ' was'} timed")
    took = at.scoring(at.few, "atp", {k: v for k, v in at.params.items() if k == "dictionary"})
    return Duration(
        took / few * at.n_pairs * (1 + CLOSE * (steps - 1)), f"a gradient of {few} pair{'s' * (few > 1)} was timed"
    )


def _patching(at: Timing) -> Duration:
    return Duration(
        at.forward(at.few) * _runs(at), "as many whole forward passes; most patched runs start later and are shorter"
    )


def _runs(at: Timing) -> int:
    if at.spec.nodes == ("edges",):
        keep = at.params.get("positions") == "keep"  # then each position is patched alone
        each = sum(len(batch) * (len(set(batch.labels)) if keep else 1) for batch in parts_of(at.pairs))
        return Graph.of(at.model.shape).n_edges * each
    kinds = [NODE_KINDS[kind] for kind in at.spec.nodes]
    return sum(patched_runs(at.model, batch, kind, at.spec.baseline) for batch in parts_of(at.pairs) for kind in kinds)


def _screening(at: Timing, share: float) -> Duration:
    """Three estimates of all nodes, and patched runs of a share of them."""
    few = len(at.few)
    estimates = sum(at.scoring(at.few, method, {}) for method in ("atp", "relp", "relp+secant")) / few * at.n_pairs
    exact = at.forward(at.few) * LATER * min(share, 1.0) * _runs(at)
    return Duration(estimates + exact, f"estimates of {few} pairs were timed, and a forward pass for the patched runs")


def _choosing(at: Timing) -> Duration:
    """Every candidate set on the pairs set aside, exact cells, and the others with what was chosen, one set a kind at most."""
    few, baseline = at.few.rows(slice(0, TIMED // 2)), at.spec.baseline
    aside = sum(int(rows.sum()) for rows in set_aside(at.pairs, at.params.get("auto_seed", 0)))
    sets = candidates(at.model, at.spec.nodes, baseline)
    each = [
        at.scoring(few, "relp", {k: v for k, v in vars(how).items() if v is not None}) / len(few)
        for how in sets.values()
    ]
    cells = at.params.get("auto_cells", 256) * len(at.spec.nodes)
    several = (1 + min(len(at.spec.nodes), len(sets))) / 2
    took = aside * sum(each) + cells * LATER * at.forward(few) + (at.n_pairs - aside) * several * sum(each) / len(each)
    return Duration(took, f"{len(sets)} sets of rules were timed on {len(few)} pairs; how many are chosen is a guess")


def _searching(at: Timing, row: Method) -> Duration:
    """Some steps of a search. Those of learning are of one batch, whatever the pairs; a search over edges runs all pairs."""
    first = max(at.pairs, key=len)
    batch = first.rows(slice(0, min(len(first), at.spec.batch_size))) if row.whole else at.few
    seen: list[tuple[float, float]] = []  # (seconds, share that is done)
    start = time.perf_counter()

    def tick(done: int, total: int, _: str) -> None:
        seen.append((time.perf_counter() - start, done / total))

    def enough(_: Any) -> bool:
        return len(seen) > STEPS and seen[-1][0] - seen[0][0] > SECONDS

    spec = at.spec
    with begun(at.model, enough):
        score(at.model, [batch], spec.method, spec.nodes, at.metric, spec.direction, spec.baseline, len(batch), False, tick,
              **at.params)  # fmt: skip
    (before, first_share), (after, last_share) = seen[0], seen[-1]
    share = last_share - first_share
    took = before + ((after - before) / share * (1 - first_share) if share else 0.0)
    took *= 1.0 if row.whole else at.n_pairs / len(batch)
    return Duration(took, f"{len(seen)} steps of {len(batch)} pairs were timed")
