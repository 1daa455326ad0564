"""`select`: the public entry, which hands on to what selects nodes, edges or sparse features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relp_cli.circuits.select import select_nodes
from relp_cli.edges.scores import EdgeScores
from relp_cli.edges.select import select_edges
from relp_cli.errors import RelpError
from relp_cli.features.scores import FeatureScores
from relp_cli.features.select import select_features


def select(
    scores: Any,
    threshold: float | None = None,
    *,
    fraction: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    sign: str = "absolute",
    aggregate: str = "none",
    union: bool = False,
    from_layer: int = 0,
    **more: Any,
) -> Any:
    """The nodes whose score passes.

    threshold: keep |score| > τ (paper's T_N): −1 keeps all, inf none.
    fraction:  τ as a fraction of mean |L(x_o)| (Transluce; 0.005 there).
    top_k:     the k largest. top_p: the fewest that hold a fraction p of the total |score|.
    sign:      "absolute", or only "positive" / "negative" scores (noising: negative = supports the behaviour), or "signed":
               ranked from support to opposition, as MIB does (threshold: keeps what supports by more than τ).
    aggregate: "none" (per position) or "sum" over positions (Marks et al.): a node is then in everywhere or nowhere.
    union:     a node is in if it passes for *any* example instead of on average (threshold and fraction only).
    from_layer: nodes of lower layers are never kept (an evaluation that excludes them counts none of them).

    more:      for edge scores: greedy, prune (`edges.select.select_edges`); for features: errors (`features.select`).

    One NodeScores gives a Circuit of that kind, a mapping a mixed one (ranked together), EdgeScores an EdgeCircuit,
    FeatureScores a FeatureCircuit.
    Raises: RelpError unless exactly one way of selecting is given and its value makes sense.
    """
    how = {"threshold": threshold, "fraction": fraction, "top_k": top_k, "top_p": top_p}
    given: dict[str, Any] = {k: v for k, v in how.items() if v is not None}
    shared: dict[str, Any] = {"sign": sign, "aggregate": aggregate, "union": union, "from_layer": from_layer}
    only = next(iter(scores.values())) if isinstance(scores, Mapping) and len(scores) == 1 else scores
    if isinstance(only, EdgeScores):
        return select_edges(only, **given, **shared, **more)
    if isinstance(only, FeatureScores):
        return select_features(only, **given, **shared, **more)
    if more:
        raise RelpError(f"only edge and feature circuits can be selected with {', '.join(more)}")
    return select_nodes(scores, given, **shared)
