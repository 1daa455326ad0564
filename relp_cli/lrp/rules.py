"""LRP rules as data (paper Table 1, docs/methods.md).

Every rule is a *surrogate*: a function f of the layer's inputs whose gradient is the rule's. `lrp()` puts
`value.detach() + f − f.detach()` in place of the layer's value, so the forward pass cannot change and the backward pass
follows the rule. Two-point rules also read the same site's values in the patch run (`other`); with other = own run they
reduce to a one-point rule or to the plain gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.models.families import Activation
from relp_cli.registry import Registry

Site = Literal["norm", "act", "gate", "attention", "softcap", "linear"]


@dataclass(frozen=True)
class Rule:
    """One row. `fn`'s signature depends on `site` (see the functions below); `default` is the parameter of ε and γ."""

    name: str
    site: Site
    fn: Callable[..., Tensor]
    description: str
    source: str
    two_point: bool = False
    default: float | None = None


# norm: (centred·weight, 1/σ, 1/σ of the other run) → surrogate of the normalised output (bias apart)
def _ln(x: Tensor, inverse: Tensor, _: Tensor | None) -> Tensor:
    return x * inverse


def _ln2(x: Tensor, inverse: Tensor, other: Tensor) -> Tensor:
    return x * (0.5 * (inverse + other))


# act: (pre-activation, activation, pre-activation of the other run) → the slope held constant
def _identity(x: Tensor, act: Activation, _: Tensor | None) -> Tensor:
    return act.ratio(x)


def _act2(x: Tensor, act: Activation, other: Tensor) -> Tensor:
    gap = other - x
    # Below this gap the secant loses more digits to rounding than the midpoint's derivative is wrong by (O(gap²)).
    near = gap.abs() < torch.finfo(x.dtype).eps ** (1 / 3)
    with torch.enable_grad():
        middle = (x + 0.5 * gap).detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(act.fn(middle).sum(), middle)
    return torch.where(near, slope, (act.fn(other) - act.fn(x)) / torch.where(near, torch.ones_like(gap), gap))


# gate: (a, u, a of the other run, u of the other run) → surrogate of the product a·u
def _half(a: Tensor, u: Tensor, *_: Tensor | None) -> Tensor:
    return 0.5 * a * u


def _gate2(a: Tensor, u: Tensor, a_other: Tensor, u_other: Tensor) -> Tensor:
    return 0.5 * (a.detach() + a_other) * u + 0.5 * (u.detach() + u_other) * a


# attention: (pattern, value, pattern of the other run, value of the other run) → surrogate of pattern·value
def _ah(p: Tensor, v: Tensor, *_: Tensor | None) -> Tensor:
    return p.detach() @ v


def _attn2(p: Tensor, v: Tensor, p_other: Tensor, v_other: Tensor) -> Tensor:
    return 0.5 * (p.detach() + p_other) @ v + p @ (0.5 * (v.detach() + v_other))


# softcap: (x, cap) → surrogate of cap·tanh(x/cap)
def _softcap(x: Tensor, cap: float) -> Tensor:
    scaled = x.detach() / cap
    small = scaled.abs() < 1e-4  # tanh(t)/t = 1 − t²/3 + …: below this the quotient is 1 − t²/3 to rounding
    ratio = torch.where(small, 1 - scaled**2 / 3, torch.tanh(scaled) / torch.where(small, torch.ones_like(x), scaled))
    return x * ratio


# linear: (x, weight [out, in], bias, output z, parameter) → surrogate of z
def _epsilon(x: Tensor, weight: Tensor, _: Tensor | None, z: Tensor, eps: float) -> Tensor:
    stabilised = z + eps * torch.where(z < 0, -torch.ones_like(z), torch.ones_like(z))
    return (x @ weight.T) * (z / stabilised).detach()


def _gamma(x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor, gamma: float) -> Tensor:
    """Generalised γ-rule: what agrees in sign with the output is favoured, for inputs of either sign."""
    up, down = weight + gamma * weight.clamp(min=0), weight + gamma * weight.clamp(max=0)
    positive, negative = x.clamp(min=0), x.clamp(max=0)
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    bias = zero if bias is None else bias
    for_positive = positive @ up.T + negative @ down.T
    for_negative = positive @ down.T + negative @ up.T
    surrogate = torch.where(z > 0, for_positive, for_negative)
    total = surrogate.detach() + torch.where(z > 0, bias + gamma * bias.clamp(min=0), bias + gamma * bias.clamp(max=0))
    tiny = 1e-6
    stabilised = total + tiny * torch.where(total < 0, -torch.ones_like(z), torch.ones_like(z))
    return surrogate * (z / stabilised).detach()


RULES: Registry[Rule] = Registry("rule")
for _row in (
    Rule("ln", "norm", _ln, "LN-rule: 1/σ held constant, the mean differentiable", "Ali et al. 2022; RelP Table 1"),
    Rule("identity", "act", _identity, "Identity-rule: act(x) = x·[act(x)/x], ratio constant", "RelP Table 1"),
    Rule("half", "gate", _half, "Half-rule: half of a gate's product is constant", "Arras et al. 2019; RelP Table 1"),
    Rule("ah", "attention", _ah, "AH-rule: the attention pattern is constant", "Ali et al. 2022; RelP Table 1"),
    Rule("softcap", "softcap", _softcap, "cap·tanh(x/cap) = x·ratio, ratio constant", "relp (docs/methods.md)"),
    Rule(
        "epsilon", "linear", _epsilon, "ε-rule: z/(z + ε·sign z) on linear layers", "Montavon et al. 2019", default=1e-2
    ),
    Rule("gamma", "linear", _gamma, "γ-rule: weights w + γ·w⁺ on linear layers", "Montavon et al. 2019", default=0.25),
    Rule("ln2", "norm", _ln2, "1/σ is the mean of the two runs'", "relp (docs/methods.md)", two_point=True),
    Rule(
        "act2", "act", _act2, "secant of the activation between the two runs", "relp (docs/methods.md)", two_point=True
    ),
    Rule("gate2", "gate", _gate2, "product rule at the two runs' averages", "relp (docs/methods.md)", two_point=True),
    Rule("attn2", "attention", _attn2, "pattern·V at the two runs' averages", "relp (docs/methods.md)", two_point=True),
):
    RULES.add(_row.name, _row)

TWO_POINT = tuple(name for name, row in RULES.items() if row.two_point)


@dataclass(frozen=True)
class ActiveRule:
    """A rule with its parameter, written `name` or `name=value` (`gamma=0.5`)."""

    rule: Rule
    parameter: float | None

    def __str__(self) -> str:
        return self.rule.name if self.parameter is None else f"{self.rule.name}={self.parameter:g}"


def parse_rules(names: list[str] | tuple[str, ...]) -> list[ActiveRule]:
    """Rule names to rows. Raises RelpError for unknown names, bad parameters, and two rules at one kind of site."""
    active: list[ActiveRule] = []
    for text in names:
        name, _, value = text.strip().partition("=")
        rule = RULES[name]
        if value and rule.default is None:
            raise RelpError(f"rule '{name}' takes no parameter, got '{text}'")
        try:
            parameter = float(value) if value else rule.default
        except ValueError:
            raise RelpError(f"rule '{name}': expected a number after '=', got '{value}'") from None
        if parameter is not None and not 0 <= parameter < float("inf"):
            raise RelpError(f"rule '{name}': its parameter must be finite and ≥ 0, got {value}")
        clash = next((a for a in active if a.rule.site == rule.site), None)
        if clash:
            raise RelpError(f"rules '{clash.rule.name}' and '{name}' both replace the {rule.site}; choose one")
        active.append(ActiveRule(rule, parameter))
    return active
