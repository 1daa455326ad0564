"""Circuits of edges: grown greedily from the logits, and without the edges that lead nowhere."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.graph import Graph


def greedy(
    graph: Graph, strengths: Float[Tensor, "pos edge"], how: Mapping[str, Any], tau: float
) -> Bool[Tensor, "1 edge"]:
    """Of the edges into nodes of the circuit, the one with the largest strength, until `top_k` are in, or none above τ is
    left (Hanna et al. 2024). Raises RelpError for other ways of selecting, and for strengths per position.
    """
    if len(strengths) > 1:
        raise RelpError("greedy selection needs one score per edge; use aggregate=sum, or score with positions=sum")
    if not how.keys() <= {"top_k", "threshold"}:
        raise RelpError("greedy selection takes top_k or threshold")
    n, tau = (how["top_k"], -float("inf")) if "top_k" in how else (graph.n_edges, tau)
    values = torch.full(graph.mask.shape, -torch.inf, dtype=torch.float64)
    values[graph.mask] = strengths[0].double()
    heap: list[tuple[float, int, int]] = []
    kept, entered = torch.zeros_like(graph.mask), set()

    def enter(node: int) -> None:
        entered.add(node)
        for reader in graph.nodes.get(node, []):
            for writer in (values[:, reader] > tau).nonzero()[:, 0].tolist():
                heapq.heappush(heap, (-values[writer, reader].item(), writer, reader))

    enter(-1)
    count = 0
    while heap and count < n:
        _, writer, reader = heapq.heappop(heap)
        kept[writer, reader] = True
        count += 1
        if writer not in entered:
            enter(writer)
    return kept[graph.mask][None]


def prune(circuit: Circuit, from_input: bool = False) -> Circuit:
    """Without the edges that lead nowhere.

    Edges into nodes that do not reach the logits within the circuit change nothing, whatever the ablation, and go.
    from_input: edges out of nodes that `input` does not reach go too. This leaves the circuit's behaviour as it is
    only under counterfactual ablation, where such a node computes its patch value anyway; under zero or mean
    ablation a node that reads nothing but ablated values is not itself ablated, and its edges count.
    Over several positions a head connects any position to any other, and under post-norms the heads of a layer share
    a scale, so that what one of them reads matters to all: fewer edges are pruned, never more.
    """
    graph: Graph = circuit.units.structure
    mask = graph.dense(circuit.mask)
    mask = mask & _leads_out(graph, mask)
    if from_input:
        mask = mask & _comes_in(graph, mask)
        mask = mask & _leads_out(graph, mask)
    selection = {**circuit.meta.get("selection", {}), "pruned": "from_input" if from_input else "dangling"}
    return replace(circuit, mask=mask[:, graph.mask], meta={**circuit.meta, "selection": selection})


def _leads_out(graph: Graph, mask: Tensor) -> Bool[Tensor, " reader"]:
    """Readers whose node reaches the logits over edges of the mask at any position (heads move between positions)."""
    edges = mask.any(0)
    useful = torch.zeros(len(graph.readers), dtype=torch.bool)
    useful[-1] = True
    for rows in reversed(graph.together):  # a node's readers all stand before those of its own output
        if (edges[rows] & useful).any():
            useful[[reader for row in rows for reader in graph.nodes[row]]] = True
    return useful


def _comes_in(graph: Graph, mask: Tensor) -> Bool[Tensor, "writer 1"]:
    """Writers that the input reaches over edges of the mask at any position."""
    edges = mask.any(0)
    reached = torch.zeros(len(graph.writers), dtype=torch.bool)
    reached[0] = True
    for rows in graph.together:
        columns = [reader for row in rows for reader in graph.nodes[row]]
        reached[rows] = bool((edges[:, columns] & reached[:, None]).any())
    return reached[:, None]
