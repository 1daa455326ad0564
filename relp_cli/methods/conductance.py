"""Conductance: Σ over steps of ∂L/∂n(α) · (n(α_{j+1}) − n(α_j)) while the embeddings move from run to source.

Over a cut (resid_pre of one layer, all positions) the sum tends to L(source) − L(run), the same for every layer
(Dhamdhere et al. 2018); attn_out, mlp_out and neurons are no cuts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from relp_cli.methods.core import PerExample, gradients, products
from relp_cli.methods.path import Path, PathParams, QuadratureRule, along, chunks, quadrature
from relp_cli.methods.setup import Setup
from relp_cli.methods.table import Result
from relp_cli.nodes.access import Activations, capture
from relp_cli.precision import wide


class ConductanceParams(PathParams):
    """steps: m, increments along the path. rule: where each increment's gradient is taken; left, right (error O(1/m))
    and trapezoid (O(1/m²)) cost m + 1 forward + backward; midpoint and gauss_legendre m + 1 further forwards.
    chunk_tokens: how many tokens one pass may hold.
    """

    rule: QuadratureRule = "trapezoid"


def conductance(setup: Setup, params: ConductanceParams) -> Result:
    """Per node; δn does not enter: what moves the node is the path."""
    path = Path.of(setup)
    between = params.rule in ("midpoint", "gauss_legendre")
    return Result((_in_cells if between else _on_grid)(setup, path, params))


def _on_grid(setup: Setup, path: Path, params: ConductanceParams) -> PerExample:
    """Gradients at the ends of each increment: the left, the right, or the mean of both."""
    left = {"left": 1.0, "right": 0.0, "trapezoid": 0.5}[params.rule]
    total: PerExample = {}
    last: tuple[Activations, Activations] | None = None  # values and gradients at the point before this chunk
    for part, at in along(setup, path, np.arange(params.steps + 1) / params.steps, params.chunk_tokens):
        values, grads = (_by_point(a, part.stop - part.start) for a in (at.values, at.grads))
        if last is not None:
            values, grads = _join(last[0], values), _join(last[1], grads)
        steps = {k: [v[1:] - v[:-1] for v in layers] for k, layers in values.items()}
        slopes = {k: [left * g[:-1] + (1 - left) * g[1:] for g in layers] for k, layers in grads.items()}
        _add(total, setup, steps, slopes)
        last = tuple({k: [v[-1:] for v in layers] for k, layers in a.items()} for a in (values, grads))  # type: ignore[assignment]
    return total


def _in_cells(setup: Setup, path: Path, params: ConductanceParams) -> PerExample:
    """Gradients inside each increment. A cell is as long as its point's weight, which puts the point inside it."""
    points, weights = quadrature(params.rule, params.steps)
    edges = np.concatenate([[0.0], np.cumsum(weights)])
    total: PerExample = {}
    for part in chunks(len(points), setup, params.chunk_tokens):
        size = part.stop - part.start
        at = gradients(setup, tokens=setup.run.repeat(size, 1), leaf=path.at(points[part]))
        values = _by_point(_values(setup, path, edges[part.start : part.stop + 1]), size + 1)
        steps = {k: [v[1:] - v[:-1] for v in layers] for k, layers in values.items()}
        _add(total, setup, steps, _by_point(at.grads, size))
    return total


def _values(setup: Setup, path: Path, alphas: np.ndarray) -> Activations:
    """n(α) for every node, rows [α, batch] flattened (forward passes only)."""
    setup.passes.forward += len(alphas)
    leaf = path.at(alphas)
    at_leaf = setup.model.hooks({"blocks.0.hook_in": lambda _: leaf})
    with torch.no_grad(), at_leaf, capture(setup.model, setup.kinds) as seen:
        setup.model.logits(setup.run.repeat(len(alphas), 1))
    return seen


def _by_point(values: Activations, n: int) -> Activations:
    return {k: [wide(v).unflatten(0, (n, -1)) for v in layers] for k, layers in values.items()}


def _join(a: Activations, b: Activations) -> Activations:
    return {k: [torch.cat(pair) for pair in zip(a[k], b[k], strict=True)] for k in b}


def _add(total: PerExample, setup: Setup, steps: Activations, slopes: Activations) -> None:
    summed = {k: [_dot(s, g) for s, g in zip(steps[k], slopes[k], strict=True)] for k in steps}
    ones = {k: [torch.ones_like(v) for v in layers] for k, layers in summed.items()}
    for kind, scores in products(setup, summed, ones).items():
        total[kind] = total[kind] + scores if kind in total else scores


def _dot(step: Tensor, slope: Tensor) -> Tensor:
    """Σ over points of step·slope: Float[batch, pos, width]."""
    return torch.einsum("a...,a...->...", step, wide(slope))
