"""LRP rules as data (paper Table 1, docs/methods.md).

Every rule is a *surrogate*: a function f of the layer's inputs whose gradient is the rule's. `lrp()` puts
`value.detach() + f − f.detach()` in place of the layer's value, so the forward pass cannot change and the backward pass
follows the rule. Two-point rules also read the same site's values in the patch run (`other`); with other = own run they
reduce to a one-point rule or to the plain gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.local import cap_slope, local, logarithmic_mean, weighed_softmax
from relp_cli.models.families import Activation
from relp_cli.registry import Registry

Site = Literal["norm", "act", "gate", "attention", "softmax", "scores", "softcap", "linear"]


@dataclass(frozen=True)
class Rule:
    """One row. `fn`'s signature depends on `site` (see the functions below); `default` is the parameter of ε and γ.

    covers: sites that it leaves nothing to do at.
    """

    name: str
    site: Site
    fn: Callable[..., Any]
    description: str
    source: str
    two_point: bool = False
    default: float | None = None
    covers: tuple[Site, ...] = ()

    @property
    def sites(self) -> set[Site]:
        return {self.site, *self.covers}


@dataclass(frozen=True)
class NormForm:
    """scale·x̂ + coefficient·direction·(direction·x̂), what a norm's surrogate is of the centred stream x̂ (weight and bias
    apart); without direction the first term. All constant: scale, coefficient Float[..., 1], direction Float[..., d].
    """

    scale: Tensor
    direction: Tensor | None = None
    coefficient: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Of x̂, and (the form being symmetric) of a gradient at the norm's output."""
        if self.direction is None or self.coefficient is None:
            return x * self.scale
        return x * self.scale + self.direction * (self.coefficient * (self.direction * x).sum(-1, keepdim=True))


# norm: (x̂, 1/σ, x̂ and 1/σ of the other run) → its form
def _ln(_x: Tensor, inverse: Tensor, *_: Tensor | None) -> NormForm:
    return NormForm(inverse)


def _ln2(_x: Tensor, inverse: Tensor, _x_other: Tensor, other: Tensor) -> NormForm:
    return NormForm(0.5 * (inverse + other))


def _lnx(x: Tensor, inverse: Tensor, x_other: Tensor, other: Tensor) -> NormForm:
    """The product rule for x̂·(1/σ), and the secant of 1/σ: Δ(1/σ) = −(2/d)·(x̄̂·Δx̂)/(σσ'(σ + σ')), with x̄̂ the runs' mean."""
    middle = 0.5 * (x.detach() + x_other)
    return NormForm(0.5 * (inverse + other), middle, -2 / x.shape[-1] * inverse * other / (1 / inverse + 1 / other))


# act: (pre-activation, activation, pre-activation of the other run) → the slope held constant
def _identity(x: Tensor, act: Activation, _: Tensor | None) -> Tensor:
    return act.ratio(x)


def _act2(x: Tensor, act: Activation, other: Tensor) -> Tensor:
    gap = other - x
    # Below this gap the secant loses more digits to rounding than the midpoint's derivative is wrong by (O(gap²)).
    near = gap.abs() < torch.finfo(x.dtype).eps ** (1 / 3)
    # A graph of its own, which keeps what it saves, whatever is done with what the model's graph saves.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda kept: kept):
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


def _half_pv(p: Tensor, v: Tensor, *_: Tensor | None) -> Tensor:
    return 0.5 * p @ v


# scores: (queries, keys, the same of the other run) → surrogate of q·k, unscaled
def _qk2(q: Tensor, k: Tensor, q_other: Tensor, k_other: Tensor) -> Tensor:
    mean_q, mean_k = 0.5 * (q.detach() + q_other), 0.5 * (k.detach() + k_other)
    return mean_q @ k.transpose(-2, -1) + q @ mean_k.transpose(-2, -1)


def _half_qk(q: Tensor, k: Tensor, *_: Tensor | None) -> Tensor:
    return 0.5 * q @ k.transpose(-2, -1)


# softmax: (scores, logarithm of the pattern, that of the other run) → surrogate of the pattern
def _softmax2(s: Tensor, log_p: Tensor, log_other: Tensor) -> Tensor:
    """Exact secant: as Σ ΔP = 0, Δ log Z = Σ m·ΔS / Σ m with m the logarithmic mean of the two patterns."""
    return weighed_softmax(s, logarithmic_mean(log_p, log_other).to(s.dtype))


def _softmax_t2(s: Tensor, *_: Tensor | None) -> Tensor:
    return weighed_softmax(s, (s.detach() / 2).softmax(-1))


# softcap: (x, cap, x of the other run) → surrogate of cap·tanh(x/cap)
def _softcap(x: Tensor, cap: float, _: Tensor | None) -> Tensor:
    scaled = x.detach() / cap
    small = scaled.abs() < 1e-4  # tanh(t)/t = 1 − t²/3 + …: below this the quotient is 1 − t²/3 to rounding
    ratio = torch.where(small, 1 - scaled**2 / 3, torch.tanh(scaled) / torch.where(small, torch.ones_like(x), scaled))
    return x * ratio


def _softcap2(x: Tensor, cap: float, other: Tensor) -> Tensor:
    return x * cap_slope(x.detach(), other, cap)


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
OURS = "relp (docs/methods.md)"
NO_SCORES: tuple[Site, ...] = ("softmax", "scores")
for _row in (
    Rule("ln", "norm", _ln, "LN-rule: 1/σ held constant, the mean differentiable", "Ali et al. 2022; RelP Table 1"),
    Rule("identity", "act", _identity, "Identity-rule: act(x) = x·[act(x)/x], ratio constant", "RelP Table 1"),
    Rule("half", "gate", _half, "Half-rule: half of a gate's product is constant", "Arras et al. 2019; RelP Table 1"),
    Rule("ah", "attention", _ah, "AH-rule: the attention pattern is constant", "Ali et al. 2022; RelP Table 1",
         covers=NO_SCORES),
    Rule("softcap", "softcap", _softcap, "cap·tanh(x/cap) = x·ratio, ratio constant", OURS),
    Rule("epsilon", "linear", _epsilon, "ε-rule: z/(z + ε·sign z) on linear layers", "Montavon et al. 2019",
         default=1e-2),
    Rule("gamma", "linear", _gamma, "γ-rule: weights w + γ·w⁺ on linear layers", "Montavon et al. 2019", default=0.25),
    Rule("half_pv", "attention", _half_pv, "half of the product pattern·V is constant", "Achtibat et al. 2024"),
    Rule("half_qk", "scores", _half_qk, "half of the product q·k is constant", "Achtibat et al. 2024"),
    Rule("softmax_t2", "softmax", _softmax_t2, "softmax at temperature 2, without the 1/T", "Edin et al. 2025"),
    Rule("ln2", "norm", _ln2, "1/σ is the mean of the two runs'", OURS, True),
    Rule("lnx", "norm", _lnx, "secant of the whole norm between the two runs", OURS, True),
    Rule("act2", "act", _act2, "secant of the activation between the two runs", OURS, True),
    Rule("gate2", "gate", _gate2, "product rule at the two runs' averages", OURS, True),
    Rule("attn2", "attention", _attn2, "pattern·V at the two runs' averages", OURS, True),
    Rule("softmax2", "softmax", _softmax2, "secant of the softmax between the two runs", OURS, True),
    Rule("qk2", "scores", _qk2, "q·k at the two runs' averages", OURS, True),
    Rule("softcap2", "softcap", _softcap2, "secant of the softcap between the two runs", OURS, True),
    Rule("local", "attention", local, "attention as a whole: queries, one key, one value at a time", OURS, True,
         covers=NO_SCORES),
):  # fmt: skip
    RULES.add(_row.name, _row)


@dataclass(frozen=True)
class RuleSet:
    """Rules that go together (`relp+secant`), in place of all others but those on linear layers; a model without gates or
    caps goes without their rules. endpoints, blend: what `relp` does with them unless asked otherwise (`methods.points`).
    """

    name: str
    rules: tuple[str, ...]
    description: str
    source: str
    endpoints: Literal["patch", "position"] = "patch"
    blend: bool = False
    cost: str = "2 forward + 1 backward"


RULE_SETS: Registry[RuleSet] = Registry("rule set")
for _set in (
    RuleSet("secant", ("lnx", "act2", "gate2", "attn2", "softmax2", "qk2", "softcap2"),
            "every layer's secant, one endpoint per changed position, by the node's share", OURS, "position", True,
            "4 + 2c forward + 1 + c backward for c changed positions (5 + 2 where c = 1)"),
    RuleSet("local", ("ln2", "act2", "gate2", "local", "softcap2"), "secants that change one thing at a time", OURS),
    RuleSet("two_point", ("ln2", "act2", "gate2", "attn2"), "secants, but for the softmax and 1/σ", OURS),
    RuleSet("attnlrp", ("ln", "identity", "half", "half_pv", "half_qk"), "AttnLRP's", "Achtibat et al. 2024"),
    RuleSet("gim", ("ln", "half", "half_pv", "half_qk", "softmax_t2"), "GIM's", "Edin et al. 2025"),
):  # fmt: skip
    RULE_SETS.add(_set.name, _set)


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
        if name in RULE_SETS and name not in RULES:
            raise RelpError(
                f"'{name}' is a set of rules, {', '.join(RULE_SETS[name].rules)}: ask for method 'relp+{name}'"
            )
        rule = RULES[name]
        if value and rule.default is None:
            raise RelpError(f"rule '{name}' takes no parameter, got '{text}'")
        try:
            parameter = float(value) if value else rule.default
        except ValueError:
            raise RelpError(f"rule '{name}': expected a number after '=', got '{value}'") from None
        if parameter is not None and not 0 <= parameter < float("inf"):
            raise RelpError(f"rule '{name}': its parameter must be finite and ≥ 0, got {value}")
        clash = next((a for a in active if a.rule.sites & rule.sites), None)
        if clash:
            site = rule.site if rule.site in clash.rule.sites else clash.rule.site
            raise RelpError(f"rules '{clash.rule.name}' and '{name}' both replace the {site}; choose one")
        active.append(ActiveRule(rule, parameter))
    return active
