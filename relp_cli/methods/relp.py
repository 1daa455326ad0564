"""Relevance patching (RelP eq. 3): δn · ρ_n, where ρ is the gradient of the model under LRP rules."""

from __future__ import annotations

import torch
from pydantic import Field

from relp_cli.errors import RelpError
from relp_cli.lrp.context import Recorded, recording
from relp_cli.lrp.rules import RULES, TWO_POINT, parse_rules
from relp_cli.methods.core import differences, gradients, products
from relp_cli.methods.setup import Setup
from relp_cli.methods.table import Params, Result
from relp_cli.models.model import Model
from relp_cli.nodes.access import Activations


class RelpParams(Params):
    """rules: rule names, None for the family's preset (paper Table 4), or "auto" (`methods/auto.py`): chosen per node kind
    on pairs set aside, of which auto_cells (pair, node) cells a kind are patched exactly; auto_seed draws both.
    """

    rules: tuple[str, ...] | None = None
    auto_cells: int = Field(default=256, ge=16)
    auto_seed: int = 0


def relp(setup: Setup, params: RelpParams) -> Result:
    """2 forward + 1 backward for all nodes; two-point rules read the forward pass that gives δ."""
    rules = params.rules if params.rules is not None else setup.model.family.rules
    source, other = recorded_source(setup, rules)
    at = gradients(setup, rules, other)
    return Result(products(setup, differences(source, at.values), at.grads), at.applied)


def recorded_source(setup: Setup, rules: tuple[str, ...]) -> tuple[Activations, Recorded | None]:
    """n(source), and what two-point rules among `rules` need of that pass (None without such rules).

    Raises: RelpError for two-point rules where no patch prompt is run.
    """
    if any(a.rule.two_point for a in parse_rules(rules)) and setup.baseline != "patch":
        raise RelpError(f"two-point rules need a patch prompt, not baseline '{setup.baseline}'")
    with torch.no_grad(), recording(setup.model, rules) as other:
        source = setup.source_activations()
    return source, other or None


def with_extra_rules(model: Model, rules: tuple[str, ...], extra: list[str]) -> tuple[str, ...]:
    """`relp+ah`, `relp+two_point`: rules added to a set, each in place of the one that acts on the same kind of layer."""
    if "auto" in extra:
        if extra != ["auto"]:
            raise RelpError(f"rules 'auto' stand alone, got +{'+'.join(extra)}")
        return ("auto",)
    for name in extra:
        added = [r for r in TWO_POINT if r != "gate2" or model.shape.gated] if name == "two_point" else [name]
        for rule in added:
            site = RULES[rule.partition("=")[0]].site
            rules = (*(r for r in rules if RULES[r.partition("=")[0]].site != site), rule)
    return rules
