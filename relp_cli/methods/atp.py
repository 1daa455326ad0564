"""Attribution patching (RelP eq. 2): δn · ∂L/∂n, gradient at the run."""

from __future__ import annotations

from relp_cli.methods.core import differences, gradients, products
from relp_cli.methods.setup import Setup
from relp_cli.methods.table import Params, Result


def atp(setup: Setup, params: Params) -> Result:  # noqa: ARG001 - it has no parameters
    """2 forward + 1 backward for all nodes."""
    source = setup.source_activations()
    at = gradients(setup)
    return Result(products(setup, differences(source, at.values), at.grads))
