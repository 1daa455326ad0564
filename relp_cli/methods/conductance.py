"""Conductance: Σ over steps of ∂L/∂n(α) · (n(α_{j+1}) − n(α_j)) while the embeddings move from run to source.

Over a cut (resid_pre of one layer, all positions; the edges into the logits) the sum tends to L(source) − L(run), the same
for every layer (Dhamdhere et al. 2018); attn_out, mlp_out and neurons are no cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from torch import Tensor

from relp_cli.methods.points import PathParams, QuadratureRule, embeddings, quadrature
from relp_cli.methods.space import Batch
from relp_cli.methods.table import Result


class ConductanceParams(PathParams):
    """steps: m, increments along the path. rule: where each increment's gradient is taken; left, right (error O(1/m))
    and trapezoid (O(1/m²)) cost m + 1 forward + backward; midpoint and gauss_legendre m + 1 further forwards.
    chunk_tokens: how many tokens one pass may hold.
    """

    rule: QuadratureRule = "trapezoid"


def conductance(on: Batch, params: ConductanceParams) -> Result:
    """Per unit; δ does not enter: what moves the unit is the path."""
    between = params.rule in ("midpoint", "gauss_legendre")
    total: dict[str, Tensor] = {}
    for weight, scores in (_in_cells if between else _on_grid)(on, params):
        for key, value in scores.items():
            total[key] = total[key] + weight * value if key in total else weight * value
    return Result(total)


def _on_grid(on: Batch, params: ConductanceParams) -> Iterator[tuple[float, Mapping[str, Tensor]]]:
    """Gradients at the ends of each increment: the left, the right, or the mean of both."""
    left = {"left": 1.0, "right": 0.0, "trapezoid": 0.5}[params.rule]
    alphas = np.arange(params.steps + 1) / params.steps
    last = None
    for _, at in on.passes(embeddings(on, alphas, np.ones(len(alphas)))):
        if last is not None:
            for weight, end in ((left, last), (1 - left, at)):
                if weight:
                    yield weight, on.product(last.values, at.values, end)
        last = at


def _in_cells(on: Batch, params: ConductanceParams) -> Iterator[tuple[float, Mapping[str, Tensor]]]:
    """Gradients inside each increment. A cell is as long as its point's weight, which puts the point inside it."""
    alphas, weights = quadrature(params.rule, params.steps)
    ends = np.concatenate([[0.0], np.cumsum(weights)])
    values = on.readings(embeddings(on, ends, np.ones(len(ends))))
    start = next(values)
    for (_, at), end in zip(on.passes(embeddings(on, alphas, weights)), values, strict=True):
        yield 1.0, on.product(start, end, at)
        start = end
