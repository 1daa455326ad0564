"""Faithfulness and completeness of edge circuits; the table's columns are those of node circuits, `n_nodes` counts edges.

F(M): nothing ablated; F(∅): all edges ablated; F(C), F(M∖C): the edges outside, inside the circuit ablated. An ablated
edge carries its writer's ablated value minus what the writer writes in that very run (`edges.run`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from relp_cli.circuits.circuit import ANY_POSITION, positions_of
from relp_cli.edges.ablation import EdgeAblation
from relp_cli.edges.check import check_once
from relp_cli.edges.circuit import EdgeCircuit, counted_edges
from relp_cli.edges.graph import Graph
from relp_cli.edges.run import edge_logits
from relp_cli.edges.scores import EdgeScores
from relp_cli.edges.select import select_edges
from relp_cli.edges.stream import Written
from relp_cli.errors import RelpError
from relp_cli.evaluation.areas import MIB_FRACTIONS, areas
from relp_cli.evaluation.ratios import Values, ratio_table, tau_of
from relp_cli.methods.request import Progress
from relp_cli.models.model import Model
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch


def evaluate_edges(
    model: Model,
    pairs: Sequence[PairBatch],
    circuits: Sequence[EdgeCircuit],
    ablation: str = "mean",
    exclude_layers: int = 0,
    metric: str | None = None,
    seed: int = 0,
    random_circuits: int = 0,
    bootstrap: int = 1000,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """One row per circuit; arguments as for `relp.evaluate`.

    exclude_layers: edges into readers of that many first layers are never ablated and not counted.
    Raises: RelpError for circuits of another model or graph, or with positions that the pairs do not have.
    """
    graph = Graph.of(model.shape)
    if not 0 <= exclude_layers < graph.n_layers:
        raise RelpError(f"exclude_layers must be from 0 to {graph.n_layers - 1}, got {exclude_layers}")
    for circuit in circuits:
        check_edge_circuit(model, graph, circuit)
    check_once(model, pairs[0])
    row = METRICS[metric or str(circuits[0].meta.get("metric", "logit_diff"))]
    values_of = EdgeAblation.prepare(model, pairs, ablation)
    everything = [
        *circuits,
        *(c.random_like(seed + i, exclude_layers) for c in circuits for i in range(random_circuits)),
    ]
    counted = counted_edges(graph, exclude_layers)
    values = Values(len(everything))
    chunks = [chunk.to(model.device) for batch in pairs for chunk in batch.split(32)]
    for done, chunk in enumerate(chunks):
        ablated = values_of.values(model, chunk)
        with torch.no_grad():
            full = model.logits(chunk.original)

        def value(cut: Tensor, chunk: PairBatch = chunk, full: Tensor = full, ablated: Written = ablated) -> Tensor:
            logits = edge_logits(model, graph, chunk.original, (cut & counted).to(model.device), ablated)
            return row.fn(logits, chunk.answer, chunk.foil, full)

        values.add("full", 0, row.fn(full, chunk.answer, chunk.foil, full))
        values.add("empty", 0, value(counted[None]))
        for i, circuit in enumerate(everything):
            mask = at_positions(circuit, chunk)
            values.add("circuit", i, value(~mask))
            values.add("complement", i, value(mask))
        if progress:
            progress(done + 1, len(chunks), "evaluate")
    about = [
        {
            "n_nodes": int((c.mask & counted).sum()),
            "n_possible": int(counted.sum()) * len(c.labels),
            "tau": tau_of(c.meta),
        }
        | {
            "ablation": ablation,
            "metric": row.name,
            "exclude_layers": exclude_layers,
            "note": _pruning_note(c, ablation),
        }
        for c in circuits
    ]
    return ratio_table(values, about, random_circuits, seed, bootstrap)


def _pruning_note(circuit: EdgeCircuit, ablation: str) -> str:
    pruned = circuit.meta.get("selection", {}).get("pruned") == "from_input"
    return "pruned for counterfactual ablation" if pruned and ablation != "counterfactual" else ""


def check_edge_circuit(model: Model, graph: Graph, circuit: EdgeCircuit) -> None:
    """Raises RelpError unless the circuit is of this model and its graph."""
    for what, mine in (("model", model.name), ("revision", model.revision)):
        theirs = circuit.meta.get(what)
        if theirs is not None and theirs != mine:
            raise RelpError(f"this circuit was found on {what} '{theirs}', not on '{mine}'")
    if replace(circuit.graph, post_norm=graph.post_norm) != graph:  # imported circuits do not say the latter
        raise RelpError(f"this circuit's graph ({_size(circuit.graph)}) is not that of {model.name} ({_size(graph)})")


def _size(graph: Graph) -> str:
    return f"{graph.n_layers} {'parallel ' if graph.parallel else ''}layers of {graph.n_heads} heads"


def at_positions(circuit: EdgeCircuit, batch: PairBatch) -> Tensor:
    """A circuit's mask at the positions of one batch: Bool[pos, writer, reader], one position where it is the same at all."""
    if circuit.labels in (ANY_POSITION, tuple(str(i) for i in range(batch.n_pos))):
        return circuit.mask
    return circuit.mask[positions_of(circuit.labels, batch)]


def edge_curve(
    model: Model,
    pairs: Sequence[PairBatch],
    scores: EdgeScores,
    fractions: Sequence[float] = MIB_FRACTIONS,
    greedy: bool = False,
    prune: str = "none",
    **options: object,
) -> tuple[pd.DataFrame, float, float]:
    """Faithfulness of the ⌊fraction · edges⌋ first edges, and MIB's (CPR, CMD) over the fractions asked for: CPR of the
    edges ranked from support to opposition, CMD of those ranked by |score|.

    greedy, prune: as `select_edges`; options: as `evaluate_edges`. The table gets two first columns, `ranking` ("signed",
    "absolute"; only the latter for scores without sign, which serves both) and `fraction`.
    """
    rankings = ("signed", "absolute") if scores.meta.get("signed", True) else ("absolute",)
    points = [(sign, f) for sign in rankings for f in fractions]
    circuits = []
    for sign, f in points:
        circuit = select_edges(scores, top_k=int(f * scores.n_edges), greedy=greedy, prune=prune, sign=sign)
        circuits.append(replace(circuit, meta={**circuit.meta, "fraction": f}))
    table = evaluate_edges(model, pairs, circuits, **options)  # type: ignore[arg-type]
    table.insert(0, "fraction", [f for _, f in points])
    table.insert(0, "ranking", [sign for sign, _ in points])
    faithful = [table[table.ranking == sign].faithfulness.tolist() for sign in (rankings[0], rankings[-1])]
    return table, areas(list(fractions), faithful[0])[0], areas(list(fractions), faithful[1])[1]
