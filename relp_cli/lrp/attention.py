"""Where rules act in attention: scores (and their softcap), softmax, pattern·values, or all of it at once (`local`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from relp_cli.lrp.local import log_pattern
from relp_cli.lrp.rules import ActiveRule
from relp_cli.lrp.site import RuleSite, Values, replace
from relp_cli.models.model import Model
from relp_cli.precision import wide


def attention_sites(
    model: Model,
    attention: ActiveRule | None,
    softmax: ActiveRule | None,
    scores: ActiveRule | None,
    softcap: ActiveRule | None,
) -> list[RuleSite]:
    """Those of every layer, and the softcap of the final logits."""
    sites: list[RuleSite] = []
    capped = softcap if model.shape.attn_softcap else None
    whole = attention is not None and attention.rule.name == "local"
    for layer in range(model.shape.n_layers):
        name = f"blocks.{layer}.attn"
        if attention is not None and whole:
            sites.append(_local(model, name, attention, capped))
            continue
        if scores or capped:
            sites.append(_scores(model, name, scores, capped))
        if softmax:
            sites.append(_softmax(name, softmax))
        if attention:
            sites.append(_pattern_values(model, name, attention))
    if softcap and model.shape.final_softcap:
        sites.append(_final_softcap(softcap, model.shape.final_softcap))
    return sites


def _pattern_values(model: Model, name: str, rule: ActiveRule) -> RuleSite:
    def surrogate(v: Values, y: Tensor, other: Values | None) -> Tensor:
        z = rule.rule.fn(
            v["pattern"],
            by_head(model, v["value"]),
            other and other["pattern"],
            other and by_head(model, other["value"]),
        )
        return merged(z, y)

    def value(v: Values, _: Values | None) -> Tensor:
        return (v["pattern"] @ by_head(model, v["value"])).transpose(1, 2).flatten(2)

    reads = {"pattern": f"{name}.hook_pattern", "value": f"{name}.v.hook_out"}
    return RuleSite(name, (str(rule),), reads, f"{name}.o.hook_in", surrogate, dict, value)


def _softmax(name: str, rule: ActiveRule) -> RuleSite:
    def surrogate(v: Values, _: Tensor, other: Values | None) -> Tensor:
        return rule.rule.fn(v["scores"], log_pattern(v["scores"]), other and other["log_pattern"])

    reads, write = {"scores": f"{name}.hook_attn_scores"}, f"{name}.hook_pattern"
    return RuleSite(
        f"{name}.softmax", (str(rule),), reads, write, surrogate,
        lambda v: {"log_pattern": log_pattern(v["scores"])}, lambda v, _: v["scores"].softmax(-1),
    )  # fmt: skip


def _scores(model: Model, name: str, rule: ActiveRule | None, capped: ActiveRule | None) -> RuleSite:
    """q·k and its softcap. A mask and ALiBi are constants, which stand in the value and in no gradient."""
    read, cap = Products.of(model, name), model.shape.attn_softcap

    def surrogate(v: Values, _: Tensor, other: Values | None) -> Tensor:
        q, k = read.queries_and_keys(v)
        theirs = None if other is None else read.expanded(other["q"], other["k"])
        raw = read.scores(q, k)
        if rule:
            raw = replace(raw, rule.rule.fn(q, k, *(theirs or (None, None))) * read.scale)
        if capped:
            return capped.rule.fn(raw, cap, theirs and read.scores(*theirs))
        return raw if cap is None else cap * torch.tanh(raw / cap)

    def record(v: Values) -> dict[str, Tensor]:
        q, k = read.raw(v)
        return {"q": q, "k": k, "scores": v["scores"]}

    def value(v: Values, other: Values | None) -> Tensor:
        raw = read.scores(*read.queries_and_keys(v))
        if cap is not None:
            return cap * torch.tanh(raw / cap)
        if other is None:
            return raw
        return raw + (other["scores"] - read.scores(*read.expanded(other["q"], other["k"])))

    write = f"{name}.hook_attn_scores"
    rules = tuple(str(r) for r in (rule, capped) if r)
    return RuleSite(f"{name}.scores", rules, read.points, write, surrogate, record, value, {"scores": write})


def _local(model: Model, name: str, rule: ActiveRule, capped: ActiveRule | None) -> RuleSite:
    read = Products.of(model, name)

    def surrogate(v: Values, y: Tensor, other: Values | None) -> Tensor:
        assert other is not None  # two-point rules are not run without
        run = (*read.queries_and_keys(v), wide(by_head(model, v["value"])))
        theirs = (*read.expanded(other["q"], other["k"]), wide(by_head(model, other["value"])))
        z = rule.rule.fn((run, theirs), wide(v["scores"]), wide(v["pattern"]), read.scale, model.shape.attn_softcap)
        return merged(z, y)

    def record(v: Values) -> dict[str, Tensor]:
        q, k = read.raw(v)
        return {"q": q, "k": k, "value": v["value"], "scores": v["scores"]}

    def value(v: Values, other: Values | None) -> Tensor:
        """pattern·V, with the pattern made of queries and keys, so that these are compared as well."""
        assert other is not None
        scores = _scores(model, name, None, None).value(v, other)
        scores = torch.where(masked(v["scores"]), v["scores"], scores)
        return (scores.softmax(-1) @ wide(by_head(model, v["value"]))).transpose(1, 2).flatten(2)

    points = {**read.points, "value": f"{name}.v.hook_out", "pattern": f"{name}.hook_pattern"}
    reads = {**points, "scores": f"{name}.hook_attn_scores"}
    rules = tuple(str(r) for r in (rule, capped) if r)
    return RuleSite(name, rules, reads, f"{name}.o.hook_in", surrogate, record, value)


def masked(scores: Tensor) -> Tensor:
    """Where attention scores stand for nothing."""
    return scores <= torch.finfo(scores.dtype).min / 4


def _final_softcap(rule: ActiveRule, cap: float) -> RuleSite:
    return RuleSite(
        "final.softcap", (str(rule),), {"x": "unembed.hook_out"}, "logits",
        lambda v, _y, other: rule.rule.fn(v["x"], cap, other and other["x"]), dict,
        lambda v, _: cap * torch.tanh(v["x"] / cap),
    )  # fmt: skip


@dataclass(frozen=True)
class Products:
    """How a layer's queries and keys are read as they meet: per head, rotated, Float[batch, head, pos, d_head].

    points: input name → hook point. raw: of these inputs (keys of key/value heads). scale: of their products.
    """

    points: dict[str, str]
    raw: Callable[[Values], tuple[Tensor, Tensor]]
    scale: float

    @classmethod
    def of(cls, model: Model, name: str) -> Products:
        component: Any = model.component(name)
        original = component.original_component
        scales = (getattr(original, key, None) for key in ("scaling", "softmax_scale", "inv_norm_factor"))
        scale = next((float(s) for s in scales if s is not None), model.shape.d_head**-0.5)
        rotate = getattr(component, "_apply_rotary_pos_emb", None)  # where the bridge rotates, between two hook points
        if rotate is None and f"{name}.hook_rot_q" in model.points:
            points = {"q": f"{name}.hook_rot_q", "k": f"{name}.hook_rot_k"}
            return cls(points, lambda v: (v["q"], v["k"]), scale)
        points = {"q": f"{name}.q.hook_out", "k": f"{name}.k.hook_out"}
        if rotate is None or f"{name}.hook_cos" not in model.points:
            return cls(points, lambda v: (by_head(model, v["q"]), by_head(model, v["k"])), scale)
        points |= {"cos": f"{name}.hook_cos", "sin": f"{name}.hook_sin"}
        return cls(points, lambda v: rotate(by_head(model, v["q"]), by_head(model, v["k"]), v["cos"], v["sin"]), scale)

    def queries_and_keys(self, v: Values) -> tuple[Tensor, Tensor]:
        """Of a run's inputs, one key per query head."""
        return self.expanded(*self.raw(v))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scaled products, before cap, bias and mask: Float[batch, head, query, key]."""
        return q @ k.transpose(-2, -1) * self.scale

    @staticmethod
    def expanded(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """In float32 at least: products before scaling are large, and what is read of them are small differences."""
        return wide(q), wide(k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def by_head(model: Model, value: Tensor) -> Tensor:
    """[batch, pos, heads·d_head] → [batch, query head, pos, d_head], as attention uses queries, keys and values: clipped where
    the model clips (`clip_qkv` of OLMo and MPT), each key/value head serving its group of query heads.
    """
    if model.shape.clip_qkv is not None:
        value = value.clamp(-model.shape.clip_qkv, model.shape.clip_qkv)
    per_kv = value.unflatten(-1, (-1, model.shape.d_head)).transpose(1, 2)
    return per_kv.repeat_interleave(model.shape.n_heads // per_kv.shape[1], dim=1)


def merged(z: Tensor, like: Tensor) -> Tensor:
    """[batch, head, pos, d_head] → as attention hands it on."""
    return z.transpose(1, 2).reshape(like.shape)
