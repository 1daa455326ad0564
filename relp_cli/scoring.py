"""`score`: the public entry, which hands on to what scores nodes, edges or sparse features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from relp_cli.edges.score import score_edges
from relp_cli.errors import RelpError
from relp_cli.features.score import score_features
from relp_cli.methods.auto import score_auto
from relp_cli.methods.request import Progress, Request
from relp_cli.methods.score import COMPONENTS, resolve_method, score_nodes
from relp_cli.methods.scores import Scores
from relp_cli.models.model import Model
from relp_cli.tasks.pairs import PairBatch

FEATURES = (("feature",), ("feature", "feature_error"))


def score(
    model: Model,
    pairs: Sequence[PairBatch],
    method: str = "relp",
    nodes: Sequence[str] = COMPONENTS,
    metric: str = "logit_diff",
    direction: str = "noising",
    baseline: str = "patch",
    batch_size: int = 32,
    keep_examples: bool | None = None,
    progress: Progress | None = None,
    **params: Any,
) -> Scores:
    """Score nodes or edges of a model on prompt pairs.

    method:    a row of `METHODS`, with `+rule` added for relp variants (`relp+ah`, `relp+two_point`, `relp+auto`).
    nodes:     rows of `NODE_KINDS`; all come from one pass. Or ["edges"], for methods on edges, or ["feature"], for
               the features and error terms of a `dictionary=`.
    direction: "noising" (the original runs, patch values go in) or "denoising" (the reverse).
    baseline:  what n(x_p) is: "patch", "zero", or "mean" over all given originals per position.
    params:    the method's own parameters (`rules=[...]` for relp); unknown ones are errors.

    Returns Scores: kind → mean, variance, n [layer, pos, *unit], per example where it fits (`keep_examples`).
    Raises: RelpError for unknown names, bad parameters, and pairs that share no position axis.
    """
    request = Request(metric, direction, baseline, batch_size, keep_examples, progress)
    if tuple(nodes) == ("edges",):
        return score_edges(model, pairs, method, request, **params)
    if tuple(nodes) in FEATURES:
        return score_features(model, pairs, method, request, **params)
    row, parsed = resolve_method(model, method, params)
    if getattr(parsed, "rules", None) != ("auto",):
        return score_nodes(model, pairs, method, nodes, request, **params)
    if row.name != "relp":
        raise RelpError(f"rules 'auto' are chosen for method relp only, got '{method}'")
    return score_auto(model, pairs, parsed, nodes, request)  # type: ignore[arg-type]
