"""RelP's coefficients averaged along the path of integrated gradients: δn · mean_α ρ_n(α).

At α = 0 the coefficients are RelP's: one left step is `relp` exactly, for every rule set. Two-point rules stand between
the path's point and the source run.
"""

from __future__ import annotations

from relp_cli.methods.core import products
from relp_cli.methods.path import Path, PathParams, mean_gradients
from relp_cli.methods.setup import Setup
from relp_cli.methods.table import Result


class RelpIgParams(PathParams):
    """As ig_inputs; rules: rule names, or None for the family's preset (paper Table 4)."""

    rules: tuple[str, ...] | None = None


def relp_ig(setup: Setup, params: RelpIgParams) -> Result:
    """`steps` forward + backward, and 2 forward for δ."""
    rules = params.rules if params.rules is not None else setup.model.family.rules
    path = Path.of(setup, rules)
    mean, applied = mean_gradients(setup, path, params, rules)
    return Result(products(setup, path.deltas, mean), applied)
