"""Paths in the first block's input embeddings, from the run to its source, and gradients averaged along them.

1. The path is x(α) = x_run + α·(x_source − x_run), with x the values at `blocks.0.hook_in`.
2. A quadrature rule turns `steps` into points α and weights that sum to 1.
3. The points are further rows of the batch; as many run at once as `chunk_tokens` allows.
4. Gradients of every node at every point are summed with the weights as they come; nothing is kept per point.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from relp_cli.lrp.context import Recorded
from relp_cli.methods.core import Gradients, differences, gradients
from relp_cli.methods.relp import recorded_source
from relp_cli.methods.setup import Setup
from relp_cli.methods.table import Params
from relp_cli.nodes.access import Activations
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.precision import wide

QuadratureRule = Literal["left", "right", "midpoint", "trapezoid", "gauss_legendre"]
RESID = NODE_KINDS["resid_pre"]


class PathParams(Params):
    """steps: m, intervals of the path. rule: left, right (error O(1/m)), midpoint, trapezoid (O(1/m²); trapezoid has
    m + 1 points) or gauss_legendre. chunk_tokens: how many tokens one pass may hold (points are rows of the batch).
    """

    steps: int = Field(default=10, ge=1)
    rule: QuadratureRule = "midpoint"
    chunk_tokens: int = Field(default=16384, gt=0)


def quadrature(rule: QuadratureRule, steps: int) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Points α in [0, 1] (0 = run, 1 = source), ascending, and their weights."""
    if rule == "gauss_legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (points + 1) / 2, weights / 2
    if rule == "trapezoid":
        weights = np.full(steps + 1, 1 / steps)
        weights[[0, -1]] /= 2
        return np.arange(steps + 1) / steps, weights
    shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[rule]
    return (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)


@dataclass(frozen=True)
class Path:
    """start, end: first block's input Float[batch, pos, d_model] of run and source; values, source: n(run), n(source);
    other: what two-point rules need of the source's pass.
    """

    start: Float[Tensor, "batch pos d_model"]
    end: Float[Tensor, "batch pos d_model"]
    values: Activations
    source: Activations
    other: Recorded | None = None

    @classmethod
    def of(cls, setup: Setup, rules: tuple[str, ...] = ()) -> Path:
        """2 forward passes (1 with a mean baseline). With a zero or mean baseline the path ends at that value."""
        wide = setup if RESID in setup.kinds else replace(setup, kinds=(*setup.kinds, RESID))
        source, other = recorded_source(wide, rules)
        values = wide.run_activations()
        return cls(values[RESID.name][0], source[RESID.name][0], values, source, other)

    @property
    def deltas(self) -> Activations:
        return differences(self.source, self.values)

    def at(self, alphas: Sequence[float] | np.ndarray) -> Float[Tensor, "rows pos d_model"]:
        """x(α) for every α and pair: rows are [α, batch] flattened."""
        start, end = wide(self.start), wide(self.end)
        points = start + start.new_tensor(np.asarray(alphas)).view(-1, 1, 1, 1) * (end - start)
        return points.flatten(0, 1).to(self.start.dtype)


def chunks(n: int, setup: Setup, chunk_tokens: int) -> list[slice]:
    """`n` copies of the batch cut into pieces of at most `chunk_tokens` tokens (at least one copy each)."""
    size = max(1, chunk_tokens // setup.run.numel())
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def along(
    setup: Setup, path: Path, alphas: np.ndarray, chunk_tokens: int, rules: Sequence[str] = ()
) -> Iterator[tuple[slice, Gradients]]:
    """Values and gradients of all nodes at the given points, chunk by chunk; rows are [α, batch] flattened."""
    for part in chunks(len(alphas), setup, chunk_tokens):
        k = part.stop - part.start
        other = path.other and {
            site: {key: v.repeat(k, *[1] * (v.ndim - 1)) for key, v in values.items()}
            for site, values in path.other.items()
        }
        yield part, gradients(setup, rules, other, setup.run.repeat(k, 1), path.at(alphas[part]))


def mean_gradients(
    setup: Setup, path: Path, params: PathParams, rules: Sequence[str] = ()
) -> tuple[Activations, dict[str, int]]:
    """Σ_α w_α·∂L/∂n(α), as [kind][layer] Float[batch, pos, width], and the rules applied (rule → layers)."""
    alphas, weights = quadrature(params.rule, params.steps)
    total: Activations = {}
    applied: dict[str, int] = {}
    for part, at in along(setup, path, alphas, params.chunk_tokens, rules):
        applied = at.applied
        w = wide(path.start).new_tensor(weights[part])
        for kind, layers in at.grads.items():
            summed = [torch.einsum("a,ab...->b...", w, wide(g).unflatten(0, (len(w), -1))) for g in layers]
            before = total.get(kind)
            total[kind] = summed if before is None else [a + b for a, b in zip(before, summed, strict=True)]
    return total, applied
