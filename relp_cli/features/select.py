"""Selecting a feature circuit from scores: features and error terms of all sites ranked together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from relp_cli.circuits.circuit import ANY_POSITION, tensor_hash
from relp_cli.circuits.select import KEPT_META, NO_EXAMPLES, check_how, choose
from relp_cli.errors import RelpError, unknown
from relp_cli.features.circuit import ERRORS, FeatureCircuit, counted_sites, must_count
from relp_cli.features.scores import FeatureScores
from relp_cli.methods.scores import NodeScores


def select_features(
    scores: FeatureScores,
    threshold: float | None = None,
    *,
    errors: str = "all",
    sign: str = "absolute",
    aggregate: str = "none",
    union: bool = False,
    from_layer: int = 0,
    **how: Any,
) -> FeatureCircuit:
    """The features and error terms whose score passes; arguments as for `relp.select` (threshold, fraction, top_k, …), and

    errors: "all", "residual" (error terms of attention and MLP are no nodes) or "none".

    Raises: RelpError as `relp.select`.
    """
    if edges := [name for name in ("greedy", "prune") if name in how]:
        raise RelpError(f"--{edges[0]} is for edge circuits")
    if errors not in ERRORS:
        raise unknown("choice of error terms", errors, ERRORS)
    given = {k: v for k, v in {"threshold": threshold, **how}.items() if v is not None}
    check_how(given, sign, aggregate, union)
    ranked = scores
    if union:
        if scores.examples is None:
            raise RelpError(NO_EXAMPLES)
        ranked = scores.examples.strongest(scores, sign, aggregate)
    must_count(scores.sites, from_layer)
    sites = counted_sites(scores.sites, from_layer)
    empty = FeatureCircuit(
        {s: torch.zeros(len(scores.labels), n, dtype=torch.bool) for s, n in zip(scores.sites, scores.sizes, strict=True)},
        {s: torch.zeros(len(scores.labels), dtype=torch.bool) for s in scores.sites}, scores.labels, errors,
    )  # fmt: skip
    # One entry per site: choose() ranks any number of kinds together and takes layers along the first axis.
    entries = {f"{s.name}/feature": _as_nodes(ranked, ranked.dense(s)) for s in sites}
    entries |= {
        f"{s.name}/error": _as_nodes(ranked, ranked.error_mean[ranked.at(s)][:, None])
        for s in sites
        if empty.has_error(s)
    }
    masks, cut, _ = choose(entries, given, sign, aggregate, union=False)
    width = 1 if aggregate == "sum" else len(scores.labels)
    features = {s: masks[f"{s.name}/feature"][0] if s in sites else m[:width] for s, m in empty.features.items()}
    kept = {
        s: masks[f"{s.name}/error"][0, :, 0] if f"{s.name}/error" in masks else m[:width]
        for s, m in empty.errors.items()
    }
    meta = {k: scores.meta[k] for k in (*KEPT_META, "dictionary", "dictionary_hash") if k in scores.meta}
    meta["scores"] = tensor_hash(*scores.ranked)
    meta["selection"] = {
        **given,
        **cut,
        "sign": sign,
        "aggregate": aggregate,
        "union": union,
        "from_layer": from_layer,
        "errors": errors,
    }
    return FeatureCircuit(features, kept, ANY_POSITION if aggregate == "sum" else scores.labels, errors, meta)


def _as_nodes(scores: FeatureScores, mean: Tensor) -> NodeScores:
    """Float[pos, unit] as the scores of one layer."""
    values = mean[None]
    return NodeScores(
        "feature", values, torch.zeros_like(values), scores.n, scores.labels, scores.axis, meta=scores.meta
    )
