"""The strongest k edges that hang together: an integer program (HiGHS, through `scipy.optimize.milp`).

1. x_e ∈ {0, 1}: edge e is kept; y_v ∈ {0, 1}: node v (a head with its q, k and v, an MLP) is part of the circuit.
2. Maximise Σ strength_e · x_e subject to Σ x_e = k; x_e ≤ y_v for both ends of e; and y_v ≤ Σ x of the edges into v, y_v ≤ Σ x of
   those out of v. `input` and the logits need no y.
3. The graph has no circles, so that every kept edge then lies on a path of kept edges from `input` to the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.spaces.graph import Graph

SECONDS = 60.0
CANDIDATES, PER_EDGE, PER_NODE = 4000, 8, 4


@dataclass(frozen=True)
class Connected:
    """mask: Bool[edge]. share: the kept edges' strength, of that of the k strongest (an upper bound). gap: how much stronger than
    the kept ones, relatively, the best k of the `candidates` may be (0: they are the best).
    """

    mask: Bool[Tensor, " edge"]
    share: float
    gap: float
    candidates: int

    @property
    def about(self) -> dict[str, Any]:
        return {"connected": True, "share_of_strongest": self.share, "gap": self.gap, "candidates": self.candidates}


def connected(graph: Graph, strengths: Float[Tensor, "pos edge"], k: int, seconds: float = SECONDS) -> Connected:
    """The k edges of the largest total strength of which each lies on a path of kept edges from `input` to the logits.

    Of graphs with more than `CANDIDATES` edges, those are considered that are among the strongest (`PER_EDGE` for each edge to
    be kept, at least `CANDIDATES`), among the strongest `PER_NODE` into or out of a node, or edges of the input or the logits.
    Edges without a strength (−inf, NaN) are never kept. seconds: how long to search; the best by then is kept, with its gap.

    Raises: RelpError for strengths per position, and where no k such edges exist or none were found in time.
    """
    if len(strengths) > 1:
        raise RelpError("connected selection needs one score per edge; use aggregate=sum, or score with positions=sum")
    values = strengths[0].double().numpy()
    ends = graph.mask.nonzero().numpy()
    owner = np.full(len(graph.readers), -1)
    for node, columns in graph.nodes.items():
        owner[columns] = node
    tail, head = ends[:, 0], owner[ends[:, 1]]  # nodes by their row among the writers: 0 is the input, −1 the logits
    use = _candidates(values, tail, head, k)
    if not 0 <= k <= len(use):
        raise RelpError(f"top_k must be a whole number from 0 to {len(use)} (edges with a score), got {k}")
    mask = torch.zeros(len(values), dtype=torch.bool)
    if k == 0:
        return Connected(mask, 1.0, 0.0, len(use))
    best = np.sort(values[use])[::-1][:k].sum()
    found = _solve(values[use], tail[use], head[use], k, seconds)
    kept = use[np.round(found.x[: len(use)]) == 1]
    mask[kept] = True
    return Connected(mask, float(values[kept].sum() / best) if best > 0 else 1.0, float(found.mip_gap or 0.0), len(use))


def _candidates(values: np.ndarray, tail: np.ndarray, head: np.ndarray, k: int) -> Int[np.ndarray, " candidate"]:
    scored = np.flatnonzero(values > -np.inf)  # NaN is none either
    order = scored[np.argsort(-values[scored], kind="stable")]
    most = max(CANDIDATES, PER_EDGE * k)
    if len(order) <= most:
        return np.sort(order)
    near = [order[rank < PER_NODE] for rank in (_rank_within(tail[order]), _rank_within(head[order]))]
    ends = order[(tail[order] == 0) | (head[order] == -1)]
    return np.unique(np.concatenate([order[:most], *near, ends]))


def _rank_within(groups: np.ndarray) -> np.ndarray:
    """How many earlier entries are of the same group."""
    at = np.argsort(groups, kind="stable")
    starts = np.r_[0, np.flatnonzero(np.diff(groups[at])) + 1]
    rank = np.empty(len(groups), dtype=int)
    rank[at] = np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))
    return rank


def _solve(values: np.ndarray, tail: np.ndarray, head: np.ndarray, k: int, seconds: float) -> Any:
    edges, nodes = len(values), sorted((set(tail.tolist()) | set(head.tolist())) - {0, -1})
    place = {node: edges + i for i, node in enumerate(nodes)}
    outgoing, incoming = np.flatnonzero(tail > 0), np.flatnonzero(head > 0)
    rows, columns, entries, row = list[Any](), list[Any](), list[Any](), 0
    for at, node in ((outgoing, tail), (incoming, head)):
        own = np.array([place[n] for n in node[at].tolist()], dtype=int)
        # x_e ≤ y_v, a row for each edge.
        rows += [row + np.arange(len(at))] * 2
        columns += [at, own]
        entries += [np.ones(len(at)), -np.ones(len(at))]
        row += len(at)
        # y_v ≤ Σ x_e, a row for each node.
        rows += [row + own - edges, row + np.arange(len(nodes))]
        columns += [at, edges + np.arange(len(nodes))]
        entries += [-np.ones(len(at)), np.ones(len(nodes))]
        row += len(nodes)
    size = edges + len(nodes)
    matrix = coo_array((np.concatenate(entries), (np.concatenate(rows), np.concatenate(columns))), shape=(row, size))
    count = np.r_[np.ones(edges), np.zeros(len(nodes))]
    # Strengths of any scale: the solver's tolerances are absolute.
    scale = np.abs(values).max() or 1.0
    found = milp(
        np.r_[-values / scale, np.zeros(len(nodes))],
        integrality=np.ones(size, dtype=int),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(matrix.tocsr(), -np.inf, 0), LinearConstraint(count, k, k)],
        options={"time_limit": seconds, "mip_rel_gap": 0},
    )
    if found.x is None:
        if found.status == 1:
            raise RelpError(
                f"no {k} connected edges were found in {seconds:g} s; keep fewer or more, or allow more time"
            )
        raise RelpError(f"no {k} of these edges lie on paths from the input to the logits")
    return found
