"""Circuits by gradient descent on masks: a ranking of all sizes at once (`learned`), and pruning to one size (`hard_concrete`).

learned        s, one per cell. Each step draws a size k; m = σ((s − τ)/T) with τ such that Σm = k. The loss −L of these masked
               runs, over all sizes, makes one ranking that serves them all.
hard_concrete  Louizos et al. 2018: noisy gates z = clamp(σ((log u − log(1 − u) + log α)/β)·(ζ − γ) + γ, 0, 1), u uniform;
               the expected share of open gates, mean σ(log α − β log(−γ/ζ)), is brought to a target by Lagrange multipliers,
               which go up where the rest goes down (Wang et al. 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.methods.learning import LearningParams, learn
from relp_cli.methods.space import Batch
from relp_cli.methods.table import Result

LOW, HIGH, BETA = -0.1, 1.1, 2 / 3  # γ, ζ and β
OPEN = 2.0  # log α at the start: 97 % of the gates are open


class LearnedParams(LearningParams):
    """sizes: how k is drawn from 1 … N − 1, "uniform" or "log" (as often in 1 … 10 as in 10 … 100). temperature: T."""

    sizes: Literal["uniform", "log"] = "uniform"
    temperature: float = Field(default=0.5, gt=0)


class HardConcreteParams(LearningParams):
    """size: the target share of open gates, reached from all over the first `warmup` share of the steps."""

    size: float = Field(default=0.1, gt=0, lt=1)
    warmup: float = Field(default=0.5, ge=0, le=1)


def learned(batches: Sequence[Batch], params: LearnedParams) -> list[Result]:
    """Scores: s, counted from the lowest."""
    return learn(batches, params, lambda start, _: _Sized(start, params))


def hard_concrete(batches: Sequence[Batch], params: HardConcreteParams) -> list[Result]:
    """Scores: log α, counted from the lowest; the metadata says above which score a gate is open more often than not."""
    return learn(batches, params, lambda start, steps: _Gates(start, steps, _effect(batches[0]), params))


def _effect(on: Batch) -> float:
    """|mean L with all units kept − with none|. Raises RelpError where that is 0."""
    with torch.no_grad():
        all_kept, none_kept = (
            on.masked(make(len(on.labels), len(on.units))).mean() for make in (torch.ones, torch.zeros)
        )
    if all_kept == none_kept:
        raise RelpError("the metric is the same with all units kept and with none: there is nothing to prune by")
    return abs((all_kept - none_kept).item())


def sized_mask(s: Float[Tensor, " cell"], k: float, temperature: float) -> Float[Tensor, " cell"]:
    """m = σ((s − τ)/T) with Σm = k, 0 < k; all 1 where k is not below the number of cells.

    Its derivative is that of τ as well: from Σm = k, Σ m′(ds − dτ) = 0, so that dτ = Σ m′ds / Σ m′, m′ = m(1 − m)/T.
    """
    if k >= len(s):
        return torch.ones_like(s)
    with torch.no_grad():
        tau = threshold(s, k, temperature)
        m = torch.sigmoid((s - tau) / temperature)
        slope = m * (1 - m)
        share = slope / slope.sum().clamp_min(torch.finfo(s.dtype).tiny)
    implicit = tau + share @ (s - s.detach())  # the value of τ, and its derivative
    return torch.sigmoid((s - implicit) / temperature)


def threshold(s: Float[Tensor, " cell"], k: float, temperature: float) -> float:
    """τ by bisection; a step of Newton's in place of halving wherever it stays between the bounds."""
    odds = math.log(k / (len(s) - k))
    low, high = s.min().item() - temperature * odds, s.max().item() - temperature * odds  # Σm ≥ k, Σm ≤ k
    tau = (low + high) / 2
    for _ in range(200):
        m = torch.sigmoid((s - tau) / temperature)
        over = m.sum().item() - k
        if abs(over) <= 1e-13 * k:
            break
        low, high = (tau, high) if over > 0 else (low, tau)
        slope = (m * (1 - m)).sum().item()
        newton = tau + temperature * over / slope if slope else low
        before, tau = tau, newton if low < newton < high else (low + high) / 2
        if tau == before:
            break
    return tau


class _Sized:
    """`learning.Learner` of `learned`."""

    def __init__(self, start: Tensor, params: LearnedParams) -> None:
        self.params, self.cells = params, start.clone().requires_grad_()
        self.groups: list[dict[str, Any]] = [{"params": [self.cells]}]

    def draw(self, _: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        k = draw_size(len(self.cells), self.params.sizes, generator)
        return sized_mask(self.cells, k, self.params.temperature), torch.zeros(())

    def about(self) -> dict[str, Any]:
        return {}


def draw_size(n: int, sizes: str, generator: torch.Generator) -> int:
    """k from 1 to n − 1 (at n the mask is 1, whatever s); 1 where there is one cell."""
    u = float(torch.rand((), generator=generator, dtype=torch.float64))
    k = 1 + u * (n - 1) if sizes == "uniform" else n**u
    return min(int(k), max(n - 1, 1))


def gates(log_alpha: Float[Tensor, " cell"], u: Float[Tensor, " cell"]) -> Float[Tensor, " cell"]:
    """Hard concrete gates z for uniform u."""
    soft = torch.sigmoid((u.logit() + log_alpha) / BETA)
    return (soft * (HIGH - LOW) + LOW).clamp(0, 1)


def open_share(log_alpha: Float[Tensor, " cell"]) -> Float[Tensor, " cell"]:
    """P(z > 0) of each gate."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LOW / HIGH))


class _Gates:
    """`learning.Learner` of `hard_concrete`. multipliers: λ₁, λ₂ of scale·(λ₁·d + λ₂·d²), d the expected share less its target,
    in parts of the size asked for. scale: how much L changes from all kept to none: at λ₁ = 1 a gate costs what one of the
    asked number does for L on average, whatever the metric and however many there are.
    """

    def __init__(self, start: Tensor, steps: int, scale: float, params: HardConcreteParams) -> None:
        self.params, self.scale, self.cells = params, scale, (start + OPEN).requires_grad_()
        self.multipliers = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.groups: list[dict[str, Any]] = [
            {"params": [self.cells]}, {"params": [self.multipliers], "maximize": True},
        ]  # fmt: skip
        self.first, self.warm = open_share(self.cells.detach()).mean().item(), params.warmup * steps

    def draw(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        u = torch.rand(self.cells.shape, generator=generator, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
        done = min(1.0, (step + 1) / self.warm) if self.warm else 1.0
        target = self.first + done * (self.params.size - self.first)
        over = (open_share(self.cells).mean() - target) / self.params.size
        return gates(self.cells, u), self.scale * (self.multipliers[0] * over + self.multipliers[1] * over.square())

    def about(self) -> dict[str, Any]:
        share, closed = open_share(self.cells.detach()), BETA * math.log(-LOW / HIGH)
        return {
            "open": int((share > 0.5).sum()), "expected_share": share.mean().item(),
            "threshold": closed - self.cells.min().item() + 1,
        }  # fmt: skip
