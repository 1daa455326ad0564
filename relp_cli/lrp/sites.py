"""Where each rule acts: the layers of a model as *sites* with inputs, an output, and the surrogate that a rule puts there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.attention import attention_sites
from relp_cli.lrp.rules import ActiveRule, NormForm
from relp_cli.lrp.site import RuleSite, Values, replace
from relp_cli.models.model import Model
from relp_cli.models.moe import CHOSEN, OUT, X, check_moe, moe_of
from relp_cli.models.offload import parameter
from relp_cli.precision import wide


def build_sites(model: Model, active: list[ActiveRule]) -> list[RuleSite]:
    """All sites of all active rules. Raises RelpError where a rule finds no layer to act on."""
    by_site: dict[str, ActiveRule] = {a.rule.site: a for a in active}
    sites: list[RuleSite] = []
    for kinds, builder in BUILDERS:
        wanted = [by_site.get(kind) for kind in kinds]
        if any(wanted):
            sites += builder(model, *wanted)
    for a in active:
        if not any(str(a) in site.rules for site in sites):
            raise RelpError(f"rule '{a}' matches no layer of {model.name} ({model.family.name})")
    return sites


def _norms(model: Model, rule: ActiveRule) -> list[RuleSite]:
    if missing := model.unscaled_norms:
        raise RelpError(
            f"rule '{rule}' does not reach {len(missing)} norms of {model.name} ({model.family.name}): TransformerLens shows no "
            f"scale at {missing[0]}; leave the rule out (--rules)"
        )
    names = [p.removesuffix(".hook_scale") for p in model.points if p.endswith(".hook_scale")]
    # Of a multimodal model, text never runs the part that sees pictures.
    return [_norm(model, name, rule) for name in names if not name.startswith("vision")]


def _norm(model: Model, name: str, rule: ActiveRule) -> RuleSite:
    component = model.component(name)

    def surrogate(v: Values, _: Tensor, other: Values | None) -> Tensor:
        # Wide: sums of squares of a real model's stream are beyond float16.
        x = wide(centred(component, v["x"]))
        theirs = (wide(other["x"]), other["inverse"]) if other else (None, None)
        form: NormForm = rule.rule.fn(x.detach(), 1 / v["scale"].detach(), *theirs)
        return weighted(component, form(x))

    def record(v: Values) -> dict[str, Tensor]:
        return {"x": centred(component, v["x"]), "inverse": 1 / v["scale"]}

    def value(v: Values, _: Values | None) -> Tensor:
        return numerator(component, v["x"]) / v["scale"] + _bias(component, v["x"])

    reads = {"x": f"{name}.hook_in", "scale": f"{name}.hook_scale"}
    return RuleSite(name, (str(rule),), reads, f"{name}.hook_out", surrogate, record, value)


def _bias(norm: Any, x: Tensor) -> Tensor | float:
    bias = parameter(norm, "bias", x)
    return 0.0 if bias is None else bias


def centred(norm: Any, x: Tensor) -> Tensor:
    """A norm's numerator, its weight apart: x − mean for LayerNorm, x for RMSNorm."""
    return x if norm.uses_rms_norm else x - x.mean(-1, keepdim=True)


def weighted(norm: Any, x: Tensor) -> Tensor:
    """x times a norm's weight."""
    weight = parameter(norm, "weight", x)
    if weight is None:
        return x
    return x * (1 + weight) if norm.uses_weight_offset else x * weight


def numerator(norm: Any, x: Tensor) -> Tensor:
    """What a norm divides by σ."""
    return weighted(norm, centred(norm, x))


def _mlps(model: Model, act: ActiveRule | None, gate: ActiveRule | None) -> list[RuleSite]:
    if gate and not model.shape.gated:
        raise RelpError(f"rule '{gate}' matches no layer of {model.name} ({model.family.name}): its MLP is not gated")
    build = _moe if model.shape.moe else _mlp
    return [build(model, layer, act, gate) for layer in range(model.shape.n_layers)]


def _mlp(model: Model, layer: int, act: ActiveRule | None, gate: ActiveRule | None) -> RuleSite:
    name, gated = f"blocks.{layer}.mlp", model.shape.gated
    hidden = _hidden(model, act, gate)

    def surrogate(v: Values, _: Tensor, other: Values | None) -> Tensor:
        runs = [v] if other is None else [v, other]
        return hidden(*(t for run in runs for t in (run["pre"], run["up"] if gated else None)))

    reads = {"pre": f"{name}.gate.hook_out", "up": f"{name}.in.hook_out"} if gated else {"pre": f"{name}.in.hook_out"}
    rules = tuple(str(r) for r in (act, gate) if r)

    def value(v: Values, _: Values | None) -> Tensor:
        return model.activation.fn(v["pre"]) * (v["up"] if gated else 1)

    return RuleSite(name, rules, reads, f"{name}.out.hook_in", surrogate, dict, value)


def _moe(model: Model, layer: int, act: ActiveRule | None, gate: ActiveRule | None) -> RuleSite:
    """A mixture of experts: `act` and `gate` as in any gated MLP, and `gate` again at weight × expert output. The choice of
    experts is constant, and the router's softmax has its plain gradient.
    """
    hidden = _hidden(model, act, gate)
    check_moe(model, layer)

    def within(pre: Tensor, up: Tensor, *other: Tensor) -> Tensor:
        # A value, and not only a gradient: the product with the weight reads it.
        return replace(model.activation.fn(pre) * up, hidden(pre, up, *other))

    def weigh(weight: Tensor, output: Tensor, *other: Tensor) -> Tensor:
        return gate.rule.fn(weight, output, *other) if gate else weight * output

    def surrogate(v: Values, _: Tensor, other: Values | None) -> Tensor:
        return moe_of(model, layer).output(v["x"], v["chosen"], within, weigh, None if other is None else other["x"])

    rules = tuple(str(r) for r in (act, gate) if r)
    at = f"blocks.{layer}."
    reads = {"x": at + X, "chosen": at + CHOSEN}

    def value(v: Values, _: Values | None) -> Tensor:
        return moe_of(model, layer).output(
            v["x"], v["chosen"], lambda pre, up: model.activation.fn(pre) * up, torch.mul
        )

    return RuleSite(f"{at}mlp", rules, reads, at + OUT, surrogate, dict, value)


def _hidden(model: Model, act: ActiveRule | None, gate: ActiveRule | None) -> Callable[..., Tensor]:
    """(pre, up or None[, the same of the other run]) → surrogate of an MLP's hidden units, act(pre) or act(pre)·up."""
    activation = model.activation

    def activated(x: Tensor, other: Tensor | None) -> Tensor:
        if act is None:
            return activation.fn(x)
        # The value must stay act(x) where a gate multiplies it, also for slopes that are not act(x)/x.
        slope = act.rule.fn(x.detach(), activation, other)
        return replace(activation.fn(x.detach()), x * slope)

    def hidden(
        pre: Tensor, up: Tensor | None, pre_other: Tensor | None = None, up_other: Tensor | None = None
    ) -> Tensor:
        a = activated(pre, pre_other)
        if up is None:
            return a
        if gate is None:
            return a * up
        return gate.rule.fn(a, up, None if pre_other is None else activation.fn(pre_other), up_other)

    return hidden


def _linears(model: Model, rule: ActiveRule) -> list[RuleSite]:
    if model.shape.moe:
        raise RelpError(
            f"rule '{rule}' does not reach the experts' linear layers of {model.name} ({model.family.name}); leave it out"
        )
    parts = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.in", "mlp.out", *(["mlp.gate"] if model.shape.gated else [])]
    return [_linear(model, f"blocks.{n}.{part}", rule) for n in range(model.shape.n_layers) for part in parts]


def _linear(model: Model, name: str, rule: ActiveRule) -> RuleSite:
    def surrogate(v: Values, z: Tensor, _: Values | None) -> Tensor:
        weight, bias = linear_parameters(model, name, v["x"].shape[-1], z.shape[-1])
        return rule.rule.fn(v["x"], weight, bias, z.detach(), rule.parameter)

    def value(v: Values, _: Values | None) -> Tensor:
        weight, bias = linear_layer(model, name)
        return v["x"] @ weight.T + (0 if bias is None else bias)

    return RuleSite(name, (str(rule),), {"x": f"{name}.hook_in"}, f"{name}.hook_out", surrogate, dict, value)


def linear_parameters(model: Model, name: str, d_in: int, d_out: int) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] of a linear layer, whichever way round the architecture stores it (GPT-2: [in, out])."""
    weight, bias = linear_layer(model, name)
    if weight.shape != (d_out, d_in):
        raise RelpError(f"model {model.name}: {name} has weight {tuple(weight.shape)}, expected {(d_out, d_in)}")
    return weight, bias


def linear_layer(model: Model, name: str) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias [out] as they are."""
    layer = model.component(name).original_component
    weight, bias = (parameter(layer, part, model.device) for part in ("weight", "bias"))
    assert weight is not None
    return weight.T if type(layer).__name__ == "Conv1D" else weight, bias


BUILDERS: tuple[tuple[tuple[str, ...], Callable[..., list[RuleSite]]], ...] = (
    (("norm",), _norms),
    (("act", "gate"), _mlps),
    (("attention", "softmax", "scores", "softcap"), attention_sites),
    (("linear",), _linears),
)
