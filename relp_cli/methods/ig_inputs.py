"""Integrated gradients over the inputs: gradients of every node, averaged while the embeddings move from run to source.

Σ over the nodes resid_pre[0] is L(source) − L(run), up to the quadrature's error (completeness; Sundararajan et al.
2017). For other nodes the same path's gradients are averaged and multiplied with δn.
"""

from __future__ import annotations

from relp_cli.methods.core import products
from relp_cli.methods.path import Path, PathParams, mean_gradients
from relp_cli.methods.setup import Setup
from relp_cli.methods.table import Result


def ig_inputs(setup: Setup, params: PathParams) -> Result:
    """δn · mean_α ∂L/∂n(α). `steps` forward + backward, and 2 forward for δ."""
    path = Path.of(setup)
    mean, _ = mean_gradients(setup, path, params)
    return Result(products(setup, path.deltas, mean))
