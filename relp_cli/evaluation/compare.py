"""Comparing methods with exact patching: the numbers of the paper's Table 5 and Figure 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pandas as pd
import torch

from relp_cli import BATCH_SIZE
from relp_cli.errors import RelpError
from relp_cli.evaluation.agreement import agreement, largest
from relp_cli.methods.request import Progress
from relp_cli.methods.score import COMPONENTS, shared_params
from relp_cli.models.model import Model
from relp_cli.scoring import score
from relp_cli.spaces.scores import KindScores, Scores
from relp_cli.spaces.table import space_for, space_of
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
    baseline: str = "patch",
    batch_size: int = BATCH_SIZE,
    **params: Any,
) -> Comparison:
    """Score with every method and with the reference, and say how well they agree, per node kind.

    params: of methods and of the space; each goes to all methods that have it.

    scores: results that exist already (method → Scores); only the missing ones are computed.
    All methods are compared on the pairs that each of them scored (`relp+auto` sets pairs aside to choose its rules on).
    """
    if top_k < 1:
        raise RelpError(f"top_k: expected at least 1, got {top_k}")
    done = dict(scores or {})
    missing = [method for method in dict.fromkeys([reference, *methods]) if method not in done]
    for method, given in shared_params(missing, params, space_for(nodes)).items():
        done[method] = score(
            model, pairs, method, nodes, metric, direction, baseline, batch_size, True, progress, **given
        )
    compared = _on_common_pairs(done)
    rows = []
    for method in methods:
        unsigned = not done[method].meta["signed"]
        for kind in nodes:
            estimate, exact = (compared[m].table(kind) for m in (method, reference))
            result = agreement(estimate, exact, top_k, bootstrap, seed, unsigned)
            if kind == "feature":
                result = replace(result, axis=f"site × {estimate.axis} × feature or error term")
            if kind == "edges":
                result = replace(result, axis="edges" + ("" if len(estimate.labels) == 1 else f" × {estimate.axis}"))
            if kind in ("edges", "feature") and result.largest:
                result = replace(result, largest=_named(compared[reference], exact, largest(exact, unsigned)))
            cost = done[method].meta
            rows.append(
                {"model": model.name, "method": method, "kind": kind, **asdict(result)}
                | {c: cost[c] for c in ("forwards_per_pair", "backwards_per_pair", "seconds")}
                | {"direction": direction, "metric": metric, "reference": reference}
            )
    return Comparison(pd.DataFrame(rows), done)


def _named(scores: Scores, exact: KindScores, at: int) -> str:
    """An edge or feature by its name, with its position where there are several."""
    position, unit = divmod(at, len(scores.units))
    (name,) = space_of(scores.units).names(scores.units, [unit])
    return name if len(exact.labels) == 1 else f"{name}, {exact.labels[position]}"


def _on_common_pairs(done: Mapping[str, Scores]) -> dict[str, Scores]:
    """Method → scores over the pairs that every method has; the same objects where that is all of them."""
    out = dict(done)
    present = [scores.present.any(-1) for scores in out.values() if scores.present is not None]
    if len(present) < len(out) or len({len(m) for m in present}) > 1:
        return out  # nothing kept per pair, or other pairs: `agreement` says what is wrong
    common = torch.stack(present).all(0)
    return out if common.all() else {method: scores.among(common) for method, scores in out.items()}
