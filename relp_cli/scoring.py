"""`score`: the public entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from relp_cli import BATCH_SIZE
from relp_cli.methods.auto import score_auto
from relp_cli.methods.request import Progress, Request
from relp_cli.methods.score import COMPONENTS, resolve_method, score_units
from relp_cli.methods.table import default_nodes
from relp_cli.methods.unfinished import Unfinished
from relp_cli.models.model import Model
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import space_for
from relp_cli.tasks.pairs import PairBatch


def score(
    model: Model,
    pairs: Sequence[PairBatch],
    method: str = "relp",
    nodes: Sequence[str] = COMPONENTS,
    metric: str = "logit_diff",
    direction: str = "noising",
    baseline: str = "patch",
    batch_size: int = BATCH_SIZE,
    keep_examples: bool | None = None,
    progress: Progress | None = None,
    unfinished: Unfinished | None = None,
    **params: Any,
) -> Scores:
    """Score nodes, edges or features of a model on prompt pairs.

    method:    a row of `METHODS`, with `+rule` added for relp variants (`relp+ah`, `relp+two_point`, `relp+auto`).
    nodes:     rows of `NODE_KINDS`; all come from one pass. Or ["edges"], or ["feature"] for the features and error
               terms of a `dictionary=`. By default edges for methods that score nothing else (`eap`).
    direction: "noising" (the original runs, patch values go in) or "denoising" (the reverse).
    baseline:  what n(x_p) is: "patch", "zero", or "mean" over all given originals per position.
    unfinished: where this scoring leaves what it knows, and takes up what an interrupted one of the same request left.
    params:    the method's own parameters (`rules=[...]` for relp), and the space's (`methods.score.score_units`);
               unknown ones are errors.

    Returns Scores: kind → mean, variance, n [layer, pos, *unit], per example where it fits (`keep_examples`).
    Raises: RelpError for unknown names, bad parameters, and pairs that share no position axis.
    """
    if tuple(nodes) == COMPONENTS:
        nodes = default_nodes(method, COMPONENTS)
    request = Request(metric, direction, baseline, batch_size, keep_examples, progress, unfinished)
    space = space_for(nodes)
    own = {name: value for name, value in params.items() if name not in space.options}
    _, parsed = resolve_method(method, own, space.name, model)
    if getattr(parsed, "rules", None) == ("auto",):
        return score_auto(model, pairs, parsed, nodes, replace(request, unfinished=None))  # type: ignore[arg-type]
    return score_units(model, pairs, method, nodes, request, **params)
