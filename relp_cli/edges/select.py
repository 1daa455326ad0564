"""Selecting an edge circuit from scores: a threshold, a fraction of the metric, top-n, top-p, or greedily from the logits."""

from __future__ import annotations

import heapq
from typing import Any

import torch
from torch import Tensor

from relp_cli.circuits.circuit import ANY_POSITION, tensor_hash
from relp_cli.circuits.select import KEPT_META, choose
from relp_cli.edges.circuit import EdgeCircuit, counted_edges
from relp_cli.edges.graph import Graph
from relp_cli.edges.scores import KIND, EdgeScores
from relp_cli.errors import RelpError, unknown

PRUNING = ("none", "dangling", "from_input")


def select_edges(
    scores: EdgeScores,
    threshold: float | None = None,
    *,
    greedy: bool = False,
    prune: str = "none",
    sign: str = "absolute",
    aggregate: str = "none",
    union: bool = False,
    from_layer: int = 0,
    **how: Any,
) -> EdgeCircuit:
    """The edges whose score passes; arguments as for `relp.select` (threshold, fraction, top_k, top_p, …), and

    greedy: grow from the logits: of the edges into nodes of the circuit, take the one with the largest score that
            passes, until `top_k` edges are in, or none with |score| > `threshold` is left (Hanna et al. 2024).
    prune:  "none", "dangling" (edges that lead nowhere; changes nothing), "from_input" (also edges that come from
            nowhere; changes nothing under counterfactual ablation only, see EdgeCircuit.prune).
    from_layer: edges into readers of lower layers are never kept.

    Raises: RelpError as `relp.select`, and for greedy selection by anything but top_k or threshold, or per position.
    """
    if prune not in PRUNING:
        raise unknown("pruning", prune, PRUNING)
    given = {k: v for k, v in {"threshold": threshold, **how}.items() if v is not None}
    flat, graph = scores.flat(), scores.graph
    counted = counted_edges(graph, from_layer)[graph.mask]
    allowed = None if from_layer == 0 else counted
    masks, cut, strengths = choose({KIND: flat}, given, sign, aggregate, union, allowed=allowed)
    kept = masks[KIND][0]
    if greedy:
        cut.pop("ties", None)  # it takes the first edge that it reaches
        kept = _greedy(graph, strengths[KIND][0], given, cut["tau"])
    mask = torch.zeros(len(kept), *graph.mask.shape, dtype=torch.bool)
    mask[:, graph.mask] = kept
    meta = {k: scores.meta[k] for k in (*KEPT_META, "positions", "d_model") if k in scores.meta}
    meta["scores"] = tensor_hash(*scores.ranked)
    meta["selection"] = {
        **given, **cut, "sign": sign, "aggregate": aggregate, "union": union, "from_layer": from_layer, "greedy": greedy,
    }  # fmt: skip
    circuit = EdgeCircuit(graph, mask, ANY_POSITION if aggregate == "sum" else scores.labels, meta)
    return circuit if prune == "none" else circuit.prune(prune == "from_input")


def _greedy(graph: Graph, strengths: Tensor, given: dict[str, Any], cut: float) -> Tensor:
    """Bool[1, edge]: grown from the logits."""
    if len(strengths) > 1:
        raise RelpError("greedy selection needs one score per edge; use aggregate=sum, or score with positions=sum")
    if not given.keys() <= {"top_k", "threshold"}:
        raise RelpError("greedy selection takes top_k or threshold")
    n, tau = (given["top_k"], -float("inf")) if "top_k" in given else (graph.n_edges, cut)
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
