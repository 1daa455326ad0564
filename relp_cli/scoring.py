"""`score`: the public entry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from relp_cli import BATCH_SIZE
from relp_cli.config.memory import bytes_of
from relp_cli.errors import RelpError, check_keywords, near
from relp_cli.methods.auto import score_auto
from relp_cli.methods.request import Progress, Request, check_memory
from relp_cli.methods.score import COMPONENTS, resolve_method, score_units
from relp_cli.methods.table import default_nodes, row_of
from relp_cli.methods.unfinished import Unfinished
from relp_cli.models.model import Model, expect_model
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.table import space_for
from relp_cli.tasks.pairs import PairBatch, batches_of


def score(
    model: Model,
    pairs: Sequence[PairBatch] | PairBatch,
    method: str = "relp",
    nodes: str | Sequence[str] = COMPONENTS,
    metric: str | Callable[..., Any] = "logit_diff",
    direction: str = "noising",
    baseline: str = "patch",
    batch_size: int = BATCH_SIZE,
    keep_examples: bool | None = None,
    progress: Progress | None = None,
    unfinished: Unfinished | None = None,
    memory: str | int | None = None,
    **params: Any,
) -> Scores:
    """Score nodes, edges or features of a model on prompt pairs.

    pairs:     batches of one token length each, or one batch alone.
    method:    a row of `METHODS`, with `+rule` added for relp variants (`relp+ah`, `relp+two_point`, `relp+auto`).
    nodes:     rows of `NODE_KINDS`; all come from one pass. Or ["edges"], or ["feature"] for the features and error
               terms of a `dictionary=`. By default edges for methods that score nothing else (`eap`). One may stand alone.
    metric:    a row of `METRICS`, or a function (logits Float[batch, vocab], answer, foil Int[batch, k]) → Float[batch]
               (`tasks.metrics.metric_of`); results record it as `own:NAME`, which no file or command line takes for a metric.
    direction: "noising" (the original runs, patch values go in) or "denoising" (the reverse).
    baseline:  what n(x_p) is: "patch", "zero", or "mean" over all given originals per position.
    unfinished: where this scoring leaves what it knows, and takes up what an interrupted one of the same request left.
    memory:    "8GB": choose batches and passes whose peak stays below it, libraries and weights included (`methods.memory`); not
               together with batch_size. Results record `tokens_per_pass`.
    params:    the method's own parameters (`rules=[...]` for relp), and the space's (`methods.score.score_units`);
               unknown ones are errors.

    Returns Scores: kind → mean, variance, n [layer, pos, *unit], per example where it fits (`keep_examples`).
    Raises: RelpError for unknown names, bad parameters, pairs that share no position axis or have no patch prompt where one is
    needed, and a function as metric of which every score is exactly 0.
    """
    expect_model(model)
    pairs, nodes = batches_of(pairs), _kinds(nodes)
    of_method = row_of(method).parameters()
    if not isinstance(batch_size, int) or batch_size < 1:
        raise RelpError(f"batch_size: expected a number of pairs from 1 up, got {batch_size!r}")
    if tuple(nodes) == COMPONENTS:
        nodes = default_nodes(method, COMPONENTS)
    limit = None if memory is None else bytes_of(memory)
    request = Request(metric, direction, baseline, batch_size, keep_examples, progress, unfinished, limit)
    space = space_for(nodes)
    own = {name: value for name, value in params.items() if name not in space.options}
    check_keywords(score, [key for key in own if not near(key, of_method)])
    row, parsed = resolve_method(method, own, space.name, model)
    check_memory(row, parsed, method, request)
    if getattr(parsed, "rules", None) == ("auto",):
        scores = score_auto(model, pairs, parsed, nodes, replace(request, unfinished=None))  # type: ignore[arg-type]
    else:
        scores = score_units(model, pairs, method, nodes, request, **params)
    if callable(metric) and not bool(scores.mean.any()):
        raise RelpError(
            f"metric '{scores.meta['metric']}': every score is exactly 0; it is constant, or its gradient vanishes where "
            f"'{method}' evaluates it"
        )
    return scores


def _kinds(nodes: Any) -> list[str]:
    if isinstance(nodes, str):
        return [nodes]
    if not isinstance(nodes, Iterable):
        raise RelpError(f"nodes: expected names of node kinds, got a {type(nodes).__name__}")
    kinds = list(nodes)
    if not kinds:
        raise RelpError("nodes: expected at least one node kind, for example 'mlp_out'; `relp ls nodes` lists them")
    return kinds
