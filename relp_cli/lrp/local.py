"""The joint attention rule `local`: attention's output z = P·V, changing one thing at a time between the two runs.

queries: all keys and values stay the run's; a secant of the softmax between the run's scores and those of the other queries.
keys:    one key at a time, queries and other keys the run's: AtP*'s closed form as a propagation rule.
values:  one at a time, at the mean of the pattern before and after its key changed; keys meet the mean of the two values.
"""

from __future__ import annotations

import torch
from torch import Tensor


def weighed_softmax(s: Tensor, m: Tensor) -> Tensor:
    """m·(S − Σ m·S / Σ m), the softmax's first-order form with weights m in place of the pattern; masked entries (m = 0) stay."""
    s = s.masked_fill(m == 0, 0)
    return m * (s - (m * s).sum(-1, keepdim=True) / m.sum(-1, keepdim=True).clamp_min(torch.finfo(m.dtype).tiny))


def logarithmic_mean(a: Tensor, b: Tensor) -> Tensor:
    """(a − b)/(ln a − ln b) of numbers ≥ 0; a where they are equal, 0 where one is 0."""
    low, high = torch.minimum(a, b).detach(), torch.maximum(a, b).detach()
    gap = torch.log1p((high - low) / low)  # ∞ where low is 0, NaN where both are
    return torch.where(low == high, high, torch.where(low == 0, 0, high * -torch.expm1(-gap) / gap))


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
    m = logarithmic_mean(p, (s + gap).softmax(-1))
    by_queries = weighed_softmax(slope * (q @ k_run.transpose(-2, -1)) * scale, m) @ v_run

    d, slope = moved(q_run @ k_other.transpose(-2, -1) * scale)
    d = d.masked_fill(p == 0, 0)
    far = d.clamp(-80, 80)  # beyond which the share below is 1 or its weight 0 to rounding, and exp overflows
    # u/(1+u) with u = P·(e^d − 1), in the form that does not overflow
    up = p * -torch.expm1(-far) / (torch.exp(-far) * (1 - p) + p)
    down = p * torch.expm1(far) / (1 + p * torch.expm1(far))
    moves = torch.where(far > 0, up, down)
    kappa = torch.where(d == 0, p, moves / torch.where(d == 0, torch.ones_like(d), d))
    by_key = kappa * (slope * (q_run @ k.transpose(-2, -1)) * scale)
    mean_v = 0.5 * (v_run + v_other)
    by_keys = by_key @ mean_v - (by_key * p) @ (mean_v - v_run) - by_key.sum(-1, keepdim=True) * (p @ v_run)
    return by_queries + by_keys + (p + 0.5 * moves * (1 - p)) @ v
