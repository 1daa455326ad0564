"""Scores to select from, made of others: without units of unstable sign, and the average of several runs' ranks.

A unit that is not to be selected has the score NaN, which passes no threshold and has no rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from scipy.stats import rankdata
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.select import AGGREGATIONS, SIGNS, strengths_of
from relp_cli.spaces.units import ANY_POSITION
from relp_cli.statistics import resample_counts
from relp_cli.tasks.shared import PROMPT_OF

DRAWS = 1000
MOST_AT_ONCE = 1 << 24  # numbers: as many draws are worked out together as stay below
OF_ONE_RUN = ("params", "rules", "mean_abs_metric", "scores", "n_prompts", PROMPT_OF)


def stable_signs(
    scores: Scores, confidence: float, aggregate: str = "none", draws: int = DRAWS, seed: int = 0
) -> Bool[Tensor, " column"]:
    """Whether a column's mean has the sign that it has over all pairs in at least a share `confidence` of bootstrap resamples of
    the pairs. A mean of 0 has no sign. aggregate "sum": of a unit's means, summed over positions, for all its columns.

    Raises: RelpError for scores without signs or without single examples, and for a share that is no share above ½.
    """
    if not 0.5 < confidence <= 1:
        raise RelpError(f"expected a confidence above 0.5 and up to 1, got {confidence:g}")
    if aggregate not in AGGREGATIONS:
        raise unknown("aggregate", aggregate, AGGREGATIONS)
    if not scores.meta.get("signed", True):
        raise RelpError(f"{scores.meta.get('method', 'these')} scores have no sign")
    if scores.examples is None or scores.present is None:
        raise RelpError("stable signs need per-example scores; score again with --per-example")
    _, unit = torch.unique(scores.cells % len(scores.units), return_inverse=True)

    def signs(counts: Tensor) -> Tensor:
        totals = counts @ scores.examples.double()  # type: ignore[union-attr]
        if aggregate == "sum":
            totals = totals.new_zeros(len(counts), int(unit.max()) + 1).index_add_(1, unit, totals)[:, unit]
        return totals.sign()

    whole = signs(torch.ones(1, len(scores.examples), dtype=torch.float64))[0]
    drawn = torch.from_numpy(resample_counts(len(scores.examples), draws, seed, scores.prompts)).double()
    agreeing = torch.zeros(len(whole), dtype=torch.long)
    for some in drawn.split(max(1, MOST_AT_ONCE // max(len(whole), 1))):
        agreeing += (signs(some) == whole).sum(0)
    # Not agreeing / draws ≥ confidence: 0.95 of 1000 is 950 in numbers, and a little more in floating point.
    return (whole != 0) & (agreeing >= confidence * draws - 1e-9)


def only_stable(
    scores: Scores, confidence: float, aggregate: str = "none", draws: int = DRAWS, seed: int = 0
) -> tuple[Scores, int]:
    """The scores without the units whose sign is not stable (`stable_signs`), and how many columns are left."""
    kept = stable_signs(scores, confidence, aggregate, draws, seed)
    return replace(scores, mean=torch.where(kept, scores.mean, torch.nan)), int(kept.sum())


def rank_average(parts: Sequence[Scores], sign: str = "absolute", aggregate: str = "none") -> Scores:
    """Scores of the same units from several runs (methods, seeds, tasks) as one: a unit's is the mean over runs of the share of
    units that rank no higher than it does, ties halfway, in (0, 1]. It has none where one of the runs gives it none.

    sign: what is ranked (`relp.select`): |score|, scores of one sign, or from support to opposition. aggregate "sum": units
    without positions, so that runs may have different ones.

    Raises: RelpError for runs of different models, units or positions; of different directions where signs are told apart.
    """
    for what, value, known in (("sign", sign, SIGNS), ("aggregate", aggregate, AGGREGATIONS)):
        if value not in known:
            raise unknown(what, value, known)
    first = parts[0]
    for other in parts[1:]:
        for key in ("model", "revision"):
            if first.meta.get(key) != other.meta.get(key):
                raise RelpError(f"runs of different {key}s: '{first.meta.get(key)}' and '{other.meta.get(key)}'")
        if other.units != first.units:
            raise RelpError(f"runs of different units: {', '.join(first)} and {', '.join(other)}")
        if other.labels != first.labels and aggregate == "none":
            raise RelpError("runs of different positions: --aggregate sum averages units without positions")
        if sign in ("positive", "negative") and other.meta.get("direction") != first.meta.get("direction"):
            raise RelpError(f"runs of both directions, in which a {sign} score is not the same; use --signed")
    ranked = []
    for part in parts:
        strength = strengths_of(part, sign, aggregate)
        wanted = strength > -torch.inf
        lowest = torch.where(wanted, strength, -torch.inf).flatten()
        share = torch.from_numpy(rankdata(lowest.numpy(), "average")).view_as(strength) / strength.numel()
        ranked.append(torch.where(wanted, share, torch.nan))
    mean = torch.stack(ranked).mean(0).flatten()
    meta: dict[str, Any] = {k: v for k, v in first.meta.items() if k not in OF_ONE_RUN}
    meta |= {"signed": False, "method": "rank average of " + ", ".join(str(part.meta.get("method")) for part in parts)}
    labels, axis = (ANY_POSITION, "all") if aggregate == "sum" else (first.labels, first.axis)
    n = torch.tensor([sum(int(part.n.max()) for part in parts)] * len(labels))
    meta["n_pairs"] = int(n[0])  # of all runs, as n is
    return Scores(first.units, labels, axis, n, mean, torch.full_like(mean, torch.nan), meta=meta)
