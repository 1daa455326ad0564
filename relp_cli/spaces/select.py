"""Selecting a circuit from scores: exactly one of a threshold τ, a fraction of the metric, top-k, or top-p."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from relp_cli.errors import RelpError, unknown
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores, support_sign
from relp_cli.spaces.units import ANY_POSITION

SIGNS = ("absolute", "positive", "negative", "signed")
AGGREGATIONS = ("none", "sum")
NO_EXAMPLES = "union over examples needs per-example scores; score again with --per-example"
KEPT_META = (
    "method", "params", "metric", "direction", "baseline", "model", "revision", "family", "task", "task_hash", "rules",
    "dictionary", "dictionary_hash", "positions", "d_model",
)  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """mask: Bool[pos, unit]. strengths: what was compared with τ.

    amounts: `tau`, with which `threshold` keeps the same units; and `ties`, where there are: how many units more that would
    be, which score as much as the last that top-k or top-p kept, `tied_at`.
    """

    mask: Bool[Tensor, "pos unit"]
    amounts: Mapping[str, Any]
    strengths: Float[Tensor, "pos unit"]

    @property
    def tau(self) -> float:
        return float(self.amounts["tau"])


def choose(
    scores: Scores, how: Mapping[str, float], sign: str, aggregate: str, union: bool, from_layer: int = 0
) -> Chosen:
    """The units that pass; see `relp.select` for the arguments."""
    check_how(how, sign, aggregate, union)
    strengths = strengths_of(scores, sign, aggregate, union)
    strengths[:, ~scores.units.counted(from_layer)] = -torch.inf
    last, keep = _cut(strengths, how, scores.meta)
    amounts = {"tau": last} if not keep else _as_threshold(strengths, last, keep)
    return Chosen(_mask(scores, strengths, last, keep), amounts, strengths)


def _as_threshold(strengths: Tensor, last: float, keep: int) -> dict[str, Any]:
    """A τ between the last value kept and the next lower one, with as few digits as there can be, and the ties."""
    below, ties = strengths[(strengths < last) & (strengths > -torch.inf)], int((strengths >= last).sum()) - keep
    lower = below.max().item() if len(below) else 0.0 if last > 0 else last - 1
    middle = lower + (last - lower) / 2
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 18))
    tau = next((value for value in rounded if lower <= value < last), lower)
    return {"tau": tau, "ties": ties, "tied_at": last} if ties else {"tau": tau}


def circuit_of(scores: Scores, chosen: Chosen, how: Mapping[str, Any], **options: Any) -> Circuit:
    """The circuit of what was chosen; `how` and `options` are recorded."""
    meta = {k: scores.meta[k] for k in KEPT_META if k in scores.meta}
    meta["scores"] = scores.hash
    meta["selection"] = {**how, **chosen.amounts, **options}
    labels = ANY_POSITION if options["aggregate"] == "sum" else scores.labels
    return Circuit(scores.units, chosen.mask, labels, meta)


def check_how(how: Mapping[str, Any], sign: str, aggregate: str, union: bool) -> None:
    """Raises RelpError for ways of selecting that do not exist or do not go together."""
    if len(how) != 1:
        raise RelpError(f"select by exactly one of threshold, fraction, top_k, top_p; got {', '.join(how) or 'none'}")
    for what, value, known in (("sign", sign, SIGNS), ("aggregate", aggregate, AGGREGATIONS)):
        if value not in known:
            raise unknown(what, value, known)
    if union and how.keys() & {"top_k", "top_p"}:
        raise RelpError("union over examples needs a threshold or fraction, not top_k or top_p")
    if sign == "signed" and (union or "top_p" in how):
        raise RelpError("signed selection ranks from support to opposition; it takes no top_p and no union")


def strengths_of(scores: Scores, sign: str, aggregate: str, union: bool = False) -> Float[Tensor, "pos unit"]:
    """What is compared with τ, of each unit's strongest example in a union; −inf where the sign is not wanted, NaN where there is
    no score (`refine`).
    """
    if union and scores.examples is None:
        raise RelpError(NO_EXAMPLES)
    if not union:
        mean = scores.summed(scores.mean)[None] if aggregate == "sum" else scores.dense(scores.mean.double())
        return _of_sign(mean, sign, scores.meta)
    best: Tensor | None = None
    for values in scores.examples if scores.examples is not None else ():
        dense = scores.dense(values.double())
        strength = _of_sign(dense.sum(0, keepdim=True) if aggregate == "sum" else dense, sign, scores.meta)
        best = strength if best is None else torch.maximum(best, strength)
    assert best is not None  # there is at least one example
    return best


def _of_sign(values: Tensor, sign: str, meta: Mapping[str, Any]) -> Tensor:
    """What is compared with τ: |score|, the support of the behaviour, or the score of one sign (−inf of the other)."""
    if sign == "absolute":
        return values.abs()
    if sign == "signed":
        if not meta.get("signed", True):
            raise RelpError(f"{meta.get('method', 'these')} scores have no sign; leave out signed selection")
        return support_sign(meta) * values
    signed = values if sign == "positive" else -values
    return torch.where(signed > 0, signed, -torch.inf)


def _cut(strengths: Tensor, how: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[float, int | None]:
    """The value to compare with, and for top-k and top-p how many units to keep."""
    (name, value), total = next(iter(how.items())), strengths.numel()
    if value != value:
        raise RelpError(f"{name} is not a number")
    if name == "threshold":
        return float(value), None
    if name == "fraction":
        if "mean_abs_metric" not in meta:
            raise RelpError("these scores do not say the metric's mean size; use an absolute threshold")
        return float(value) * float(meta["mean_abs_metric"]), None
    ranked = strengths[strengths > -torch.inf].sort(descending=True).values
    if name == "top_k":
        if int(value) != value or not 0 <= value <= total:
            raise RelpError(f"top_k must be a whole number from 0 to {total} (all nodes), got {value}")
        keep = min(int(value), len(ranked))
    else:
        if not 0 < value <= 1:
            raise RelpError(f"top_p must be in (0, 1], got {value}")
        mass = ranked.cumsum(0)
        # Rounding must not ask for more than there is: p = 1 keeps all that have any mass.
        enough = float(value) * mass[-1] * (1 - 1e-12) if len(ranked) else 0.0
        keep = int((mass < enough).sum()) + 1 if enough > 0 else 0
    return (ranked[keep - 1].item() if keep else float("inf")), keep


def _mask(scores: Scores, strengths: Tensor, tau: float, keep: int | None) -> Bool[Tensor, "pos unit"]:
    """Above τ, or exactly `keep` units: of those that tie at τ, the first in the order of cells."""
    if keep is None:
        return strengths > tau
    if keep == 0:
        return torch.zeros_like(strengths, dtype=torch.bool)
    mask = strengths >= tau
    surplus = int(mask.sum()) - keep
    if surplus > 0:
        pos, unit = scores.units.ordered(len(strengths)).unbind(1)
        tied = (strengths[pos, unit] == tau).nonzero()[-surplus:, 0]
        mask[pos[tied], unit[tied]] = False
    return mask
