"""What a scoring run will cost, before it starts: nodes, passes and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from relp_cli.features.kinds import SCORED
from relp_cli.features.load import load_dictionaries
from relp_cli.lrp.rules import RULE_SETS
from relp_cli.methods.request import chooses_rules
from relp_cli.methods.table import METHODS, row_of
from relp_cli.models.model import Model
from relp_cli.models.offload import resident
from relp_cli.nodes.access import units
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind
from relp_cli.runs.spec import ScoreSpec
from relp_cli.spaces.graph import Graph
from relp_cli.tasks.pairs import PairBatch
from relp_cli.tasks.parts import parts_of


def describe_cost(model: Model, pairs: Sequence[PairBatch], spec: ScoreSpec) -> dict[str, Any]:
    """nodes per kind, forward and backward passes over one pair, and the memory that activations and scores need."""
    kinds = [NODE_KINDS[k] for k in spec.nodes if k in NODE_KINDS]
    parts = parts_of(pairs)
    positions = max(len(set(b.labels)) for b in parts)
    if several := any(b.several for b in pairs):  # an answer's positions and a foil's stand on one axis
        positions = len({label for b in parts for label in b.labels})
    nodes = {k.name: model.shape.n_layers * positions * units(model, k) for k in kinds}
    if spec.nodes == (SCORED,):
        found = load_dictionaries(str(spec.params.get("dictionary")), model)
        nodes = {SCORED: positions * sum(d.n_features + 1 for d in found.values())}
    n_pairs, n_runs = (sum(map(len, batches)) for batches in (pairs, parts))
    if spec.nodes == ("edges",):
        keep = spec.params.get("positions") == "keep"
        return _edges_cost(model, n_pairs, n_runs, positions if keep else 1, spec)
    row = row_of(spec.method)
    forwards = f"{cost_of(spec.method)} per pair ({n_pairs} pairs)"
    if chooses_rules(spec.method, spec.params.get("rules")):
        forwards += "; to choose rules, another such pass per candidate set and 256 exactly patched cells"
    if several:
        forwards += ", for answer and foil each"
    if row.each:
        runs = sum(patched_runs(model, b, k, spec.baseline) for b in parts for k in kinds) + 2 * n_runs
        forwards = f"at most {runs:,} patched runs of one pair, each from its patch on ({n_pairs} pairs)"
        if spec.nodes == (SCORED,):
            each = "pair, of its answer and its foil," if several else "pair"
            forwards = f"a run per feature, position and {each} where it differs between the prompts ({n_pairs} pairs)"
    return {
        "pairs": n_pairs,
        "nodes": nodes,
        "forwards": forwards,
        "memory": f"{resident(model.hf) / 2**20:.0f} MiB for weights, {sum(nodes.values()) * 8 * 2 / 2**20:.1f} MiB for scores",
    }


def patched_runs(model: Model, batch: PairBatch, kind: NodeKind, baseline: str) -> int:
    """How many (node, pair) cells differ between source and run at most: none before the first token that does, and in the last
    layer those alone that the last position reads.
    """
    differs = torch.ones_like(batch.original, dtype=torch.bool)
    if baseline == "patch" and batch.patch is not None:
        differs = (batch.original != batch.patch).cumsum(1) > 0
    labels = [torch.tensor([label == one for one in batch.labels]) for label in dict.fromkeys(batch.labels)]
    cells, last = sum(int(differs[:, at].any(1).sum()) for at in labels), int(differs[:, -batch.read :].sum())
    n = model.shape.n_layers
    return units(model, kind) * (n * cells if kind.attended else (n - 1) * cells + last)


def cost_of(method: str) -> str:
    """Passes of a method, or of the rule set that was added to it."""
    name, *extra = method.split("+")
    return next((RULE_SETS[e].cost for e in extra if e in RULE_SETS), METHODS[name].cost)


def _edges_cost(model: Model, n_pairs: int, n_runs: int, positions: int, spec: ScoreSpec) -> dict[str, Any]:
    """The same for edges: exact methods run the model once per edge (and position), of answers of several tokens twice."""
    edges, row = Graph.of(model.shape).n_edges, row_of(spec.method)
    exact = edges * positions if row.each else None
    return {
        "pairs": n_pairs,
        "nodes": {"edges": edges * positions},
        "forwards": f"{cost_of(spec.method)} per pair ({n_pairs} pairs)"
        if exact is None
        else f"{(exact + 2) * n_runs:,} runs of one pair ({n_pairs} pairs)",
        "memory": f"{edges * positions * 8 * 2 / 2**20:.1f} MiB for scores",
    }
