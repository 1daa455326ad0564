"""Forward pass in plain float64 torch, from a HF state_dict and config: GPT-2, GPT-NeoX, Qwen2, Llama, Gemma-2, and mixtures
of experts (Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE).

Every LRP rule is a `.detach()` in the forward pass: it changes the gradient, never the value. One function, no modules,
no hooks. Each named node passes through `node(...)`, which applies an intervention, if any, and records the tensor
*downstream* of every rule at that place, so `torch.autograd.grad(metric, trace["mlp_out"][2])` is the rule's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

RULES = frozenset({"ln", "identity", "half", "ah", "softcap", "epsilon", "gamma"})
Patch = Mapping[tuple[str, int], Callable[[Tensor], Tensor]]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Trace:
    """Graph-connected tensors, one per layer and kind; b = batch, h = heads, kv = key/value heads, dh = head width.

    resid_pre, attn_out, mlp_out [b pos d] · head (z = pattern·V), query [b pos h dh] · key, value [b pos kv dh] (query
    and key before the rotation) · mlp_neuron (input of the down projection) [b pos d_mlp] · pattern [b h pos pos].
    """

    nodes: dict[str, list[Tensor]]
    logits: Tensor  # [b pos vocab]

    def __getitem__(self, kind: str) -> list[Tensor]:
        return self.nodes[kind]


_LLAMA = {
    "embed": "model.embed_tokens", "final": "model.norm", "layer": "model.layers.{}.", "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_MOE = {k: v for k, v in _LLAMA.items() if k not in ("gate", "up", "down")} | {"moe": "mlp"}
_QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
NAMES: dict[str, dict[str, str]] = {
    "gpt2": {
        "embed": "transformer.wte", "positions": "transformer.wpe", "final": "transformer.ln_f",
        "layer": "transformer.h.{}.", "ln1": "ln_1", "ln2": "ln_2", "qkv": "attn.c_attn", "o": "attn.c_proj",
        "up": "mlp.c_fc", "down": "mlp.c_proj",
    },
    "gpt_neox": {
        "embed": "gpt_neox.embed_in", "final": "gpt_neox.final_layer_norm", "layer": "gpt_neox.layers.{}.",
        "ln1": "input_layernorm", "ln2": "post_attention_layernorm", "qkv": "attention.query_key_value",
        "o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
    },
    "qwen2": _LLAMA,
    "llama": _LLAMA,
    "gemma2": _LLAMA | {
        "ln1_post": "post_attention_layernorm", "ln2": "pre_feedforward_layernorm",
        "ln2_post": "post_feedforward_layernorm",
    },
    "mixtral": _MOE, "qwen2_moe": _MOE, "qwen3_moe": _MOE | _QK_NORM, "olmoe": _MOE | _QK_NORM,
}  # fmt: skip


def _tanh_ratio(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# act(x) / x, analytic: every one of these activations is act(x) = x · ratio(x)
RATIO: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": _tanh_ratio,
    "gelu_pytorch_tanh": _tanh_ratio,
    "gelu": lambda x: 0.5 * torch.erfc(-x / math.sqrt(2)),
    "silu": torch.sigmoid,
    "relu": lambda x: (x > 0).to(x.dtype),
}


def _first(config: Any, *names: str) -> Any:
    return next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)


def stabilise(z: Tensor, eps: float) -> Tensor:
    """z + eps·sign(z) with sign(0) = +1 (Zennit)."""
    return torch.where(z >= 0, z + eps, z - eps)  # where(cond, eps, -eps) would be float32


def linear(x: Tensor, w: Tensor, b: Tensor | None, rules: frozenset[str], epsilon: float, gamma: float) -> Tensor:
    """x·wᵀ + b under the 0-, ε- or γ-rule; w is [out in].

    ε: R_in = x ⊙ Wᵀ(R_out / stab(z)), z with its bias. γ (Zennit's generalised form, stabiliser 1e-6): outputs z > 0
    are explained by x⁺(W + γW⁺) + x⁻(W + γW⁻) + (b + γb⁺), outputs z < 0 by x⁺(W + γW⁻) + x⁻(W + γW⁺) + (b + γb⁻).
    With R = z ⊙ gradient, a rule is the plain gradient of a linear map times a detached coefficient per output.
    """
    z = x @ w.T + (0 if b is None else b)
    if "epsilon" in rules:
        y = z * (z / stabilise(z, epsilon)).detach()
    elif "gamma" in rules:
        pos, neg = x * (x >= 0), x * (x < 0)
        up, down = w + gamma * w.clamp(min=0), w + gamma * w.clamp(max=0)
        bias = torch.zeros_like(w[:, 0]) if b is None else b
        on = pos @ up.T + neg @ down.T + bias + gamma * bias.clamp(min=0)
        off = pos @ down.T + neg @ up.T + bias + gamma * bias.clamp(max=0)
        y = on * ((z > 0) * z / stabilise(on, 1e-6)).detach() + off * ((z < 0) * z / stabilise(off, 1e-6)).detach()
    else:
        return z
    return z.detach() + y - y.detach()


def softcap(x: Tensor, cap: float | None, rule: bool) -> Tensor:
    """cap · tanh(x / cap); under the rule, x times the detached ratio tanh(u) / u, u = x / cap."""
    if not cap:
        return x
    u = x / cap
    return x * torch.where(u == 0, 1.0, torch.tanh(u) / u).detach() if rule else cap * torch.tanh(u)


def moe(x: Tensor, w: Weights, at: str, config: Any, rules: frozenset[str]) -> Tensor:
    """Mixture of experts [b pos d], each expert applied to every token and weighted 0 where it is not among the top k.

    identity and half within every expert; half also at weight × expert output. The choice has no gradient, the routing
    softmax its plain one.
    """

    def half(p: Tensor) -> Tensor:
        return 0.5 * p + 0.5 * p.detach() if "half" in rules else p

    def hidden(gate: Tensor, up: Tensor) -> Tensor:
        ratio = RATIO[config.hidden_act](gate)
        return half(gate * (ratio.detach() if "identity" in rules else ratio) * up)

    probability = (x @ w[at + ".gate.weight"].T).softmax(-1)
    best = probability.topk(config.num_experts_per_tok).indices
    weight = probability * torch.zeros_like(probability).scatter(-1, best, 1.0)
    if config.model_type == "mixtral" or config.norm_topk_prob:
        weight = weight / weight.sum(-1, keepdim=True)
    gate, up = torch.einsum("bpd,eid->bpei", x, w[at + ".experts.gate_up_proj"]).chunk(2, -1)
    outputs = torch.einsum("bpei,edi->bped", hidden(gate, up), w[at + ".experts.down_proj"])
    out = half(weight[..., None] * outputs).sum(-2)
    if config.model_type == "qwen2_moe":
        gate, up, down = (w[f"{at}.shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down"))
        shared = hidden(x @ gate.T, x @ up.T) @ down.T
        out = out + half((x @ w[at + ".shared_expert_gate.weight"].T).sigmoid() * shared)
    return out


def rotate(x: Tensor, config: Any) -> Tensor:
    """Rotary embedding of [b pos heads dh], half-split pairing, on the first `partial_rotary_factor` of dh."""
    par = config.rope_parameters
    assert par.get("rope_type", "default") == "default", f"rope type {par['rope_type']} has no oracle"
    dim = int(x.shape[-1] * par.get("partial_rotary_factor", 1.0))
    freq = par["rope_theta"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * freq  # [pos 1 dim/2]
    a, b, rest = x.split([dim // 2, dim // 2, x.shape[-1] - dim], dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=-1)


def embed(weights: Weights, config: Any, tokens: Tensor) -> Tensor:
    """Token embeddings [b pos d]: what `forward` takes in place of tokens (Gemma-2: scaled; GPT-2: no positions)."""
    table = weights[NAMES[config.model_type]["embed"] + ".weight"].detach().double()
    return table[tokens] * (math.sqrt(config.hidden_size) if config.model_type == "gemma2" else 1.0)


def forward(
    weights: Weights, config: Any, inputs: Tensor, rules: frozenset[str] | set[str] = frozenset(),
    patch: Patch | None = None, *, epsilon: float = 1e-6, gamma: float = 0.25,
) -> Trace:  # fmt: skip
    """Run the model on token ids [b pos] or embeddings [b pos d]; `patch` maps (kind, layer) to a function of the node.

    With [·] = detached: ln: [scale] of every norm, not the mean. identity: act(x) = x·[act(x)/x]. half: p/2 + [p/2] for
    p = act(gate)·up. ah: [pattern]. softcap: x·[ratio]. epsilon, gamma: the linear layers inside the blocks.
    """
    rules, patch = frozenset(rules), dict(patch or {})
    if unknown := rules - RULES or rules >= {"epsilon", "gamma"}:
        raise ValueError(f"unknown or contradictory rules: {unknown}")
    names, family = NAMES[config.model_type], config.model_type
    w = {k: v.detach().double() for k, v in weights.items()}
    heads, kv_heads = config.num_attention_heads, _first(config, "num_key_value_heads") or config.num_attention_heads
    assert not _first(config, "scale_attn_by_inverse_layer_idx"), "no oracle for GPT-2's inverse layer scaling"
    head_dim = _first(config, "head_dim") or config.hidden_size // heads
    scale = (_first(config, "query_pre_attn_scalar") or head_dim) ** -0.5
    norm_eps = _first(config, "layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
    ratio = RATIO[_first(config, "activation_function", "hidden_activation", "hidden_act")]
    nodes: dict[str, list[Tensor]] = {}

    def node(kind: str, layer: int, x: Tensor) -> Tensor:
        x = patch.pop((kind, layer), lambda t: t)(x)
        if torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # constants (embeddings, replaced or detached nodes) become leaves
        nodes.setdefault(kind, []).append(x)
        return x

    def norm(x: Tensor, name: str) -> Tensor:
        if family in ("gpt2", "gpt_neox"):
            x = x - x.mean(-1, keepdim=True)
        s = (x.pow(2).mean(-1, keepdim=True) + norm_eps).sqrt()
        y = x / (s.detach() if "ln" in rules else s) * (w[name + ".weight"] + (family == "gemma2"))
        return y + w.get(name + ".bias", 0.0)

    def project(x: Tensor, name: str) -> Tensor:
        weight = w[name + ".weight"].T if family == "gpt2" else w[name + ".weight"]  # GPT-2 stores [in out]
        return linear(x, weight, w.get(name + ".bias"), rules, epsilon, gamma)

    x = inputs.double() if inputs.is_floating_point() else embed(weights, config, inputs)
    if "positions" in names:
        x = x + w[names["positions"] + ".weight"][: x.shape[1]]
    offset = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])  # query position − key position
    for layer in range(config.num_hidden_layers):
        at = {k: names["layer"].format(layer) + v for k, v in names.items()}
        resid = x = node("resid_pre", layer, x)
        y = norm(x, at["ln1"])
        if "qkv" in at:
            fused = project(y, at["qkv"])  # GPT-2: [q | k | v], each all heads; NeoX: per head [q | k | v]
            fused = fused.unflatten(-1, (3, heads, -1)) if family == "gpt2" else fused.unflatten(-1, (heads, 3, -1))
            q, k, v = fused.unbind(-3 if family == "gpt2" else -2)
        else:
            q, k, v = (project(y, at[i]).unflatten(-1, (-1, head_dim)) for i in "qkv")
        q, k, v = node("query", layer, q), node("key", layer, k), node("value", layer, v)
        if "q_norm" in at:  # of each head (Qwen3) or of all heads together (OLMoE)
            whole = -2 if family == "olmoe" else -1
            q, k = (norm(t.flatten(whole), at[i]).view_as(t) for t, i in ((q, "q_norm"), (k, "k_norm")))
        if "positions" not in names:
            q, k = rotate(q, config), rotate(k, config)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=2) for t in (k, v))
        scores = softcap(
            torch.einsum("bqhd,bkhd->bhqk", q, k) * scale, _first(config, "attn_logit_softcapping"), "softcap" in rules
        )
        sliding = (_first(config, "layer_types") or ["full_attention"] * (layer + 1))[layer] == "sliding_attention"
        hidden = (offset < 0) | (offset >= config.sliding_window) if sliding else offset < 0
        pattern = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        pattern = node("pattern", layer, pattern.detach() if "ah" in rules else pattern)
        z = node("head", layer, torch.einsum("bhqk,bkhd->bqhd", pattern, v))
        attn = project(z.flatten(-2), at["o"])
        x = x + (attn := node("attn_out", layer, norm(attn, at["ln1_post"]) if "ln1_post" in at else attn))
        parallel = family == "gpt_neox" and config.use_parallel_residual
        y = norm(resid if parallel else x, at["ln2"])
        if "moe" in at:
            mlp = moe(y, w, at["moe"], config, rules)
        else:
            a = project(y, at["gate" if "gate" in at else "up"])
            p = a * (ratio(a).detach() if "identity" in rules else ratio(a))
            if "gate" in at:
                p = p * project(y, at["up"])
                p = 0.5 * p + 0.5 * p.detach() if "half" in rules else p
            mlp = project(node("mlp_neuron", layer, p), at["down"])
        x = x + node("mlp_out", layer, norm(mlp, at["ln2_post"]) if "ln2_post" in at else mlp)
    unembed = w.get("lm_head.weight", w.get("embed_out.weight", w[names["embed"] + ".weight"]))
    logits = softcap(norm(x, names["final"]) @ unembed.T, _first(config, "final_logit_softcapping"), "softcap" in rules)
    if patch:
        raise ValueError(f"no such nodes: {sorted(patch)}")
    return Trace(nodes, logits)
