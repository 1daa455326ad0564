"""Where each rule acts: the layers of a model as *sites* with inputs, an output, and the surrogate that a rule puts there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.rules import ActiveRule
from relp_cli.models.model import Model
from relp_cli.models.moe import CHOSEN, OUT, X, moe_of

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class RuleSite:
    """One layer: `reads` are hook points (input name → point), `write` the point whose value the surrogate replaces.

    surrogate(inputs, y, other) → f, where `other` holds the same site's `record`ed values in the patch run.
    record(inputs) → what a two-point rule needs of the patch run.
    value(inputs) → what stands at `write` by the formula that the surrogate was made for; `lrp` compares the two.
    """

    name: str
    rules: tuple[str, ...]
    reads: Mapping[str, str]
    write: str
    surrogate: Callable[[Values, Tensor, Values | None], Tensor]
    record: Callable[[Values], dict[str, Tensor]]
    value: Callable[[Values], Tensor]


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
        return rule.rule.fn(centred(component, v["x"]), 1 / v["scale"].detach(), other and other["inverse"])

    return RuleSite(
        name,
        (str(rule),),
        {"x": f"{name}.hook_in", "scale": f"{name}.hook_scale"},
        f"{name}.hook_out",
        surrogate,
        lambda v: {"inverse": 1 / v["scale"]},
        lambda v: centred(component, v["x"]) / v["scale"] + _bias(component),
    )


def _bias(norm: Any) -> Tensor | float:
    bias: Tensor | None = getattr(norm, "bias", None)
    return 0.0 if bias is None else bias


def centred(norm: Any, x: Tensor) -> Tensor:
    """A norm's numerator times its weight: (x − mean)·w for LayerNorm, x·w (or x·(1 + w)) for RMSNorm."""
    weight = getattr(norm, "weight", None)
    if not norm.uses_rms_norm:
        x = x - x.mean(-1, keepdim=True)
    if weight is None:
        return x
    return x * (1 + weight) if norm.uses_weight_offset else x * weight


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

    def value(v: Values) -> Tensor:
        return model.activation.fn(v["pre"]) * (v["up"] if gated else 1)

    return RuleSite(name, rules, reads, f"{name}.out.hook_in", surrogate, dict, value)


def _moe(model: Model, layer: int, act: ActiveRule | None, gate: ActiveRule | None) -> RuleSite:
    """A mixture of experts: `act` and `gate` as in any gated MLP, and `gate` again at weight × expert output. The choice of
    experts is constant, and the router's softmax has its plain gradient.
    """
    moe, hidden = moe_of(model, layer), _hidden(model, act, gate)

    def within(pre: Tensor, up: Tensor, *other: Tensor) -> Tensor:
        # A value, and not only a gradient: the product with the weight reads it.
        return replace(model.activation.fn(pre) * up, hidden(pre, up, *other))

    def weigh(weight: Tensor, output: Tensor, *other: Tensor) -> Tensor:
        return gate.rule.fn(weight, output, *other) if gate else weight * output

    def surrogate(v: Values, _: Tensor, other: Values | None) -> Tensor:
        return moe.output(v["x"], v["chosen"], within, weigh, None if other is None else other["x"])

    rules = tuple(str(r) for r in (act, gate) if r)
    at = f"blocks.{layer}."
    reads = {"x": at + X, "chosen": at + CHOSEN}

    def value(v: Values) -> Tensor:
        return moe.output(v["x"], v["chosen"], lambda pre, up: model.activation.fn(pre) * up, torch.mul)

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


def _attentions(model: Model, rule: ActiveRule) -> list[RuleSite]:
    return [_attention(model, f"blocks.{layer}.attn", rule) for layer in range(model.shape.n_layers)]


def _attention(model: Model, name: str, rule: ActiveRule) -> RuleSite:
    def surrogate(v: Values, y: Tensor, other: Values | None) -> Tensor:
        z = rule.rule.fn(
            v["pattern"],
            by_head(model, v["value"]),
            other and other["pattern"],
            other and by_head(model, other["value"]),
        )
        return z.transpose(1, 2).reshape(y.shape)

    def value(v: Values) -> Tensor:
        return (v["pattern"] @ by_head(model, v["value"])).transpose(1, 2).flatten(2)

    reads = {"pattern": f"{name}.hook_pattern", "value": f"{name}.v.hook_out"}
    return RuleSite(name, (str(rule),), reads, f"{name}.o.hook_in", surrogate, dict, value)


def by_head(model: Model, value: Tensor) -> Tensor:
    """[batch, pos, kv_heads·d_head] → [batch, head, pos, d_head], as attention uses values: clipped where the model clips
    (`clip_qkv` of OLMo and MPT), each key/value head serving its group of query heads.
    """
    if model.shape.clip_qkv is not None:
        value = value.clamp(-model.shape.clip_qkv, model.shape.clip_qkv)
    per_kv = value.unflatten(-1, (-1, model.shape.d_head)).transpose(1, 2)
    return per_kv.repeat_interleave(model.shape.n_heads // per_kv.shape[1], dim=1)


def _softcaps(model: Model, rule: ActiveRule) -> list[RuleSite]:
    sites = []
    cap, final = model.shape.attn_softcap, model.shape.final_softcap
    for layer in range(model.shape.n_layers if cap else 0):
        name = f"blocks.{layer}.attn"

        def raw(v: Values, name: str = name) -> Tensor:
            q, k = v["q"], v["k"].repeat_interleave(model.shape.n_heads // v["k"].shape[1], dim=1)
            return (q @ k.transpose(-2, -1)) * model.component(name).original_component.scaling

        def attention(v: Values, _y: Tensor, _: Values | None, raw: Callable[[Values], Tensor] = raw) -> Tensor:
            # Masked scores (−inf or the dtype's minimum) stay what they are: value.detach() + f − f.detach().
            return rule.rule.fn(raw(v), cap)

        def value(v: Values, raw: Callable[[Values], Tensor] = raw, cap: float = cap or 1.0) -> Tensor:
            return cap * torch.tanh(raw(v) / cap)

        reads = {"q": f"{name}.hook_rot_q", "k": f"{name}.hook_rot_k"}
        sites.append(
            RuleSite(f"{name}.softcap", (str(rule),), reads, f"{name}.hook_attn_scores", attention, dict, value)
        )
    if final:
        reads = {"x": "unembed.hook_out"}
        sites.append(
            RuleSite(
                "final.softcap", (str(rule),), reads, "logits", lambda v, _y, _: rule.rule.fn(v["x"], final), dict,
                lambda v: final * torch.tanh(v["x"] / final),
            )
        )  # fmt: skip
    return sites


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

    def value(v: Values) -> Tensor:
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
    return layer.weight.T if type(layer).__name__ == "Conv1D" else layer.weight, layer.bias


def replace(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value` going forward, the gradient of `surrogate` (which a float32 scale may have widened) going backward."""
    return value.detach() + (surrogate - surrogate.detach()).to(value.dtype)


BUILDERS: tuple[tuple[tuple[str, ...], Callable[..., list[RuleSite]]], ...] = (
    (("norm",), _norms),
    (("act", "gate"), _mlps),
    (("attention",), _attentions),
    (("softcap",), _softcaps),
    (("linear",), _linears),
)
