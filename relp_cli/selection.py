"""`select`: the public entry, which hands on to what selects nodes, edges or sparse features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relp_cli.errors import RelpError, check_keywords
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import whole_of
from relp_cli.spaces.table import space_of

MORE = ("greedy", "connected", "prune", "errors")  # what spaces take besides


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
) -> Circuit:
    """The nodes whose score passes.

    threshold: keep |score| > τ (paper's T_N): −1 keeps all, inf none.
    fraction:  τ as a fraction of mean |L(x_o)| (Transluce; 0.005 there).
    top_k:     the k largest. top_p: the fewest that hold a fraction p of the total |score|.
    sign:      "absolute", or only "positive" / "negative" scores (noising: negative = supports the behaviour), or "signed":
               ranked from support to opposition, as MIB does (threshold: keeps what supports by more than τ).
    aggregate: "none" (per position) or "sum" over a pair's positions (Marks et al.), averaged over all pairs: a node is then in
               everywhere or nowhere.
    union:     a node is in if it passes for *any* example instead of on average (threshold and fraction only).
    from_layer: nodes of lower layers are never kept (an evaluation that excludes them counts none of them).

    more:      for edge scores: greedy, connected, prune (`spaces.edges`); for features: errors (`spaces.features`).

    Scores of several kinds, or a mapping of them, are ranked together.
    Raises: RelpError unless exactly one way of selecting is given and its value makes sense.
    """
    how = {"threshold": threshold, "fraction": fraction, "top_k": top_k, "top_p": top_p}
    given: dict[str, float] = {k: v for k, v in how.items() if v is not None}
    options = {"sign": sign, "aggregate": aggregate, "union": union, "from_layer": from_layer}
    if not (hasattr(scores, "whole") or (isinstance(scores, Mapping) and scores)):
        raise RelpError(f"expected scores (relp.score, relp.Scores.load), got a {type(scores).__name__}")
    check_keywords(select, [key for key in more if key not in MORE], MORE)
    for key, value in given.items():
        if not isinstance(value, int | float):
            raise RelpError(f"{key}: expected a number, got {value!r}")
    whole = scores.whole if hasattr(scores, "whole") else whole_of(scores)
    return space_of(whole.units).select(whole, given, options, **{k: v for k, v in more.items() if v is not None})
