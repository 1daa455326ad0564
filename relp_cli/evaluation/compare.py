"""Comparing methods with exact patching: the numbers of the paper's Table 5 and Figure 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from relp_cli.evaluation.agreement import agreement
from relp_cli.methods.score import COMPONENTS, Progress, score
from relp_cli.methods.scores import Scores
from relp_cli.models.model import Model
from relp_cli.tasks.pairs import PairBatch


@dataclass(frozen=True)
class Comparison:
    """table: one row per method and node kind; scores: method → Scores, the reference among them."""

    table: pd.DataFrame
    scores: dict[str, Scores]


def compare(
    model: Model, pairs: Sequence[PairBatch], methods: Sequence[str] = ("atp", "relp"), **options: Any
) -> pd.DataFrame:
    """`run_comparison(...)`'s table."""
    return run_comparison(model, pairs, methods, **options).table


def run_comparison(
    model: Model,
    pairs: Sequence[PairBatch],
    methods: Sequence[str],
    nodes: Sequence[str] = COMPONENTS,
    metric: str = "logit_diff",
    direction: str = "noising",
    reference: str = "act_patch",
    top_k: int = 10,
    bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
    scores: dict[str, Scores] | None = None,
) -> Comparison:
    """Score with every method and with the reference, and say how well they agree, per node kind.

    scores: results that exist already (method → Scores); only the missing ones are computed.
    """
    done = dict(scores or {})
    for method in dict.fromkeys([reference, *methods]):
        if method not in done:
            done[method] = score(model, pairs, method, nodes, metric, direction, keep_examples=True, progress=progress)
    rows = []
    for method in methods:
        unsigned = not done[method].meta["signed"]
        for kind in nodes:
            result = agreement(done[method][kind], done[reference][kind], top_k, bootstrap, seed, unsigned)
            cost = done[method].meta
            rows.append(
                {"model": model.name, "method": method, "kind": kind, **asdict(result)}
                | {c: cost[c] for c in ("forwards_per_pair", "backwards_per_pair", "seconds")}
                | {"direction": direction, "metric": metric}
            )
    return Comparison(pd.DataFrame(rows), done)
