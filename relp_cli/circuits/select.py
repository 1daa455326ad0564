"""Selecting a circuit from scores: exactly one of a threshold τ, a fraction of the metric, top-k, or top-p."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from relp_cli.circuits.circuit import ANY_POSITION, Circuit, tensor_hash
from relp_cli.errors import RelpError, unknown
from relp_cli.methods.scores import NodeScores, support_sign

SIGNS = ("absolute", "positive", "negative", "signed")
NO_EXAMPLES = "union over examples needs per-example scores; score again with --per-example"
AGGREGATIONS = ("none", "sum")
KEPT_META = (
    "method",
    "params",
    "metric",
    "direction",
    "baseline",
    "model",
    "revision",
    "family",
    "task",
    "task_hash",
    "rules",
)


def select_nodes(
    scores: NodeScores | Mapping[str, NodeScores],
    given: Mapping[str, Any],
    sign: str = "absolute",
    aggregate: str = "none",
    union: bool = False,
    from_layer: int = 0,
) -> Circuit:
    """`relp.select` for node scores; `given` holds the one way of selecting that was asked for."""
    kinds: dict[str, Any] = {scores.kind: scores} if isinstance(scores, NodeScores) else dict(scores)
    if len({s.labels for s in kinds.values()}) != 1:
        raise RelpError("scores of different position axes cannot form one circuit")
    first = next(iter(kinds.values()))
    masks, cut, _ = choose(kinds, given, sign, aggregate, union, from_layer)
    meta = {k: first.meta[k] for k in KEPT_META if k in first.meta}
    meta["scores"] = tensor_hash(*(t for s in kinds.values() for t in s.ranked))
    shared = {"sign": sign, "aggregate": aggregate, "union": union, "from_layer": from_layer}
    meta["selection"] = {**given, **cut, **shared}
    return Circuit(masks, ANY_POSITION if aggregate == "sum" else first.labels, meta)


def choose(
    kinds: Mapping[str, NodeScores],
    how: Mapping[str, Any],
    sign: str,
    aggregate: str,
    union: bool,
    from_layer: int = 0,
    allowed: Tensor | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(kind → Bool mask, what it amounts to, kind → what was compared with τ); see `select` for the arguments.

    What it amounts to: `tau`, with which `threshold` keeps the same nodes; and `ties`, where there are: how many nodes more
    that would be, which score as much as the last that top-k or top-p kept.

    allowed: Bool[unit], units that may be kept at all.
    """
    check_how(how, sign, aggregate, union)
    strengths = {kind: _strength(s, sign, aggregate, union) for kind, s in kinds.items()}
    for s in strengths.values():
        s[:from_layer] = -torch.inf
        if allowed is not None:
            s[..., ~allowed] = -torch.inf
    cut, keep = _cut(strengths, how, next(iter(kinds.values())).meta)
    tau = {"tau": cut} if not keep else _as_threshold(strengths, cut, keep)
    return _masks(strengths, cut, keep), tau, strengths


def _as_threshold(strengths: Mapping[str, Tensor], last: float, keep: int) -> dict[str, Any]:
    """A τ between the last value kept and the next lower one, with as few digits as there can be, and the ties."""
    flat = torch.cat([s.flatten() for s in strengths.values()])
    below, ties = flat[(flat < last) & (flat > -torch.inf)], int((flat >= last).sum()) - keep
    lower = below.max().item() if len(below) else 0.0 if last > 0 else last - 1
    middle = lower + (last - lower) / 2
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 18))
    tau = next((value for value in rounded if lower <= value < last), lower)
    return {"tau": tau, "ties": ties} if ties else {"tau": tau}


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


def _strength(scores: NodeScores, sign: str, aggregate: str, union: bool) -> Tensor:
    """What is compared with τ: Float[layer, pos, *unit], −inf where the sign is not wanted."""
    if union and scores.examples is None:
        raise RelpError(NO_EXAMPLES)
    values = scores.examples if union and scores.examples is not None else scores.mean[None]
    if aggregate == "sum":
        values = values.sum(2, keepdim=True)
    values = values.double()
    if sign == "absolute":
        return values.abs().amax(0)
    if sign == "signed":
        if not scores.meta.get("signed", True):
            raise RelpError(f"{scores.meta.get('method', 'these')} scores have no sign; leave out signed selection")
        return support_sign(scores.meta) * values[0]
    signed = values if sign == "positive" else -values
    return torch.where(signed > 0, signed, -torch.inf).amax(0)


def _cut(strengths: Mapping[str, Tensor], how: Mapping[str, Any], meta: Mapping[str, Any]) -> tuple[float, int | None]:
    """The value to compare with, and for top-k and top-p how many nodes to keep."""
    (name, value), total = next(iter(how.items())), sum(s.numel() for s in strengths.values())
    if value != value:
        raise RelpError(f"{name} is not a number")
    if name == "threshold":
        return float(value), None
    if name == "fraction":
        if "mean_abs_metric" not in meta:
            raise RelpError("these scores do not say the metric's mean size; use an absolute threshold")
        return float(value) * float(meta["mean_abs_metric"]), None
    flat = torch.cat([s.flatten() for s in strengths.values()])
    ranked = flat[flat > -torch.inf].sort(descending=True).values
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


def _masks(strengths: Mapping[str, Tensor], cut: float, keep: int | None) -> dict[str, Tensor]:
    """Above τ, or exactly `keep` nodes: of those that tie at τ, the first in the order of kinds and indices."""
    if keep is None:
        return {kind: s > cut for kind, s in strengths.items()}
    masks = {kind: s >= cut if keep else torch.zeros_like(s, dtype=torch.bool) for kind, s in strengths.items()}
    surplus = sum(int(m.sum()) for m in masks.values()) - keep
    for kind in reversed(list(masks)):
        tied = (strengths[kind] == cut).nonzero()
        for index in reversed(tied.tolist()[-surplus:] if surplus > 0 else []):
            masks[kind][tuple(index)] = False
            surplus -= 1
    return masks
