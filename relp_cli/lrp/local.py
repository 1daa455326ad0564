"""The joint attention rule `local`: attention's output z = P·V, changing one thing at a time between the two runs.

queries: all keys and values stay the run's; a secant of the softmax between the run's scores and those of the other queries.
keys:    one key at a time, queries and other keys the run's: AtP*'s closed form as a propagation rule.
values:  one at a time, at the mean of the pattern before and after its key changed; keys meet the mean of the two values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relp_cli.precision import wide


def weighed_softmax(s: Tensor, m: Tensor) -> Tensor:
    """m·(S − Σ m·S / Σ m), the softmax's first-order form with weights m in place of the pattern; masked entries (m = 0) stay."""
    s = s.masked_fill(m == 0, 0)
    return m * (s - (m * s).sum(-1, keepdim=True) / m.sum(-1, keepdim=True).clamp_min(torch.finfo(m.dtype).tiny))


def logarithmic_mean(log_a: Tensor, log_b: Tensor) -> Tensor:
    """(a − b)/(ln a − ln b) of numbers given by their logarithms, since patterns underflow where their logarithms do not; a where
    they are equal, 0 where both are 0.
    """
    high, gap = torch.maximum(log_a, log_b), (log_a - log_b).abs()
    mean = high.exp() * torch.where(gap == 0, 1, -torch.expm1(-gap) / torch.where(gap == 0, 1, gap))
    return torch.where(high == -torch.inf, 0, mean)


def log_pattern(scores: Tensor) -> Tensor:
    """ln softmax(scores), in float32 at least."""
    return wide(scores.detach()).log_softmax(-1)


def cap_slope(x: Tensor, other: Tensor, cap: float) -> Tensor:
    """Secant slope of cap·tanh(x/cap) between x and another value."""
    a, b = x / cap, other / cap
    near = (a - b).abs() < torch.finfo(x.dtype).eps ** (1 / 3)  # as for activations
    middle = 1 - torch.tanh((a + b) / 2).square()
    return torch.where(near, middle, (torch.tanh(a) - torch.tanh(b)) / torch.where(near, torch.ones_like(a), a - b))


def local(
    runs: tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    scores: Tensor,
    p: Tensor,
    scale: float,
    cap: float | None,
) -> Tensor:
    """Surrogate of z, Float[batch, head, pos, d_head].

    runs: (q, k, v) of the run (with gradients) and of the other, Float[batch, head, pos, d_head]. scores, p: the run's scores
    and pattern, Float[batch, head, query, key]. cap: the softcap on scores.
    """
    (q, k, v), (q_other, k_other, v_other) = runs
    q_run, k_run, v_run, s, p = (t.detach() for t in (q, k, v, scores, p))
    raw = q_run @ k_run.transpose(-2, -1) * scale

    def moved(new: Tensor) -> tuple[Tensor, Tensor]:
        """How far scores move where q·k becomes `new`, and the slope of that."""
        slope = torch.ones_like(raw) if cap is None else cap_slope(raw, new, cap)
        return slope * (new - raw), slope

    gap, slope = moved(q_other @ k_run.transpose(-2, -1) * scale)
    m = logarithmic_mean(log_pattern(s), log_pattern(s + gap)).to(s.dtype)
    by_queries = weighed_softmax(slope * (q @ k_run.transpose(-2, -1)) * scale, m) @ v_run

    d, slope = moved(q_run @ k_other.transpose(-2, -1) * scale)
    change, per_score, top, without_top = one_key_at_a_time(s, d)
    by_key = per_score * (slope * (q_run @ k.transpose(-2, -1)) * scale)
    # Of each key t: V̄_t − the other keys' mean of V. Others than the top one have P ≤ ½, so that their rest can be divided by.
    rest = torch.where(top, 0, by_key / torch.where(top, torch.ones_like(p), 1 - p))
    others = rest.sum(-1, keepdim=True) * (p @ v_run) - (rest * p) @ v_run
    others = others + (by_key * top).sum(-1, keepdim=True) * (without_top @ v_run)
    by_keys = by_key @ (0.5 * (v_run + v_other)) - others
    return by_queries + by_keys + (p + 0.5 * change) @ v


def without_each_key(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of scores Float[…, query, key]: for each key the logsumexp of the other scores (−inf for a query's only key), which key is
    the top one of its query, and the pattern without that one (0 for an only key).

    The top one is left out of its sum before it is formed; of all others P ≤ ½, so that what is left out is no more than half.
    """
    all_keys = s.logsumexp(-1, keepdim=True)
    top = torch.zeros_like(s, dtype=torch.bool).scatter_(-1, s.argmax(-1, keepdim=True), True)
    without_top = s.masked_fill(top, -torch.inf)
    alone = without_top.amax(-1, keepdim=True) == -torch.inf
    below = torch.where(alone, 0, without_top)
    others = torch.where(
        top, below.logsumexp(-1, keepdim=True), all_keys + torch.log1p(-torch.exp(s - all_keys).masked_fill(top, 0))
    )
    return torch.where(top & alone, -torch.inf, others), top, torch.where(alone, 0, below.softmax(-1))


def one_key_at_a_time(s: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What moving the score of one key t by d_t does, while the others stay: P_t = 1 − σ(a), a = logsumexp of the others − s_t.

    Returns P'_t − P_t = σ(a) − σ(a − d); the same per unit of score (at d = 0 the slope); and of `without_each_key` which key is
    the top one, and the pattern without it. Nothing is 0/0 in these forms where a pattern is saturated (P = 1 to the last bit).
    """
    others, top, without_top = without_each_key(s)
    a = others - s
    b = a - d
    change = torch.where(
        d >= 0,
        torch.sigmoid(a) * torch.sigmoid(-b) * -torch.expm1(-d.clamp_min(0)),
        torch.sigmoid(b) * torch.sigmoid(-a) * torch.expm1(d.clamp_max(0)),
    )
    per_score = torch.where(
        d == 0, torch.sigmoid(a) * torch.sigmoid(-a), change / torch.where(d == 0, torch.ones_like(d), d)
    )
    return change, per_score, top, without_top
