"""Edges in plain float64 torch: one forward pass in which every reader's input can be edited, head by head.

Each query, key and value of each head is computed from its own copy of the residual stream, norm included, one after the
other, so that nothing here is shared with how the package forms them. Scores and circuits follow by their definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .forward import NAMES, RATIO, Weights, _first, embed, rotate, softcap
from .scores import Metric, pick

Edit = Callable[[str, Tensor, Mapping[str, Tensor]], Tensor]  # (reader, stream, written so far) → its input


@dataclass(frozen=True)
class EdgeTrace:
    """written: writer → [b pos d], what it adds to the residual stream; logits [b pos vocab]."""

    written: dict[str, Tensor]
    logits: Tensor


def same(_: str, x: Tensor, __: Mapping[str, Tensor]) -> Tensor:
    return x


def run(
    weights: Weights, config: Any, inputs: Tensor, edit: Edit = same, rules: frozenset[str] | set[str] = frozenset()
) -> EdgeTrace:
    """Forward pass on token ids [b pos] or embeddings [b pos d]. rules: ln, identity, half, ah, softcap (see forward.py)."""
    names, family = NAMES[config.model_type], config.model_type
    w = {k: v.detach().double() for k, v in weights.items()}
    heads, kv_heads = config.num_attention_heads, _first(config, "num_key_value_heads") or config.num_attention_heads
    dh = _first(config, "head_dim") or config.hidden_size // heads
    scale = (_first(config, "query_pre_attn_scalar") or dh) ** -0.5
    eps = _first(config, "layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
    ratio = RATIO[_first(config, "activation_function", "hidden_activation", "hidden_act")]
    written: dict[str, Tensor] = {}

    def scale_of(x: Tensor) -> Tensor:
        if family in ("gpt2", "gpt_neox"):
            x = x - x.mean(-1, keepdim=True)
        s = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return s.detach() if "ln" in rules else s

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if family in ("gpt2", "gpt_neox") else x
        return centred / scale_of(x) * (w[name + ".weight"] + (family == "gemma2")) + w.get(name + ".bias", 0.0)

    def matrix(name: str) -> tuple[Tensor, Tensor]:
        """[in out] and the bias."""
        m = w[name + ".weight"] if family == "gpt2" else w[name + ".weight"].T
        return m, w.get(name + ".bias", torch.zeros(m.shape[1], dtype=m.dtype))

    def part(at: Mapping[str, str], which: int, head: int) -> tuple[Tensor, Tensor]:
        """Columns of one head's query (0), key (1) or value (2) projection; a group of heads shares keys and values."""
        if "qkv" in at:
            m, b = matrix(at["qkv"])
            first = which * heads * dh + head * dh if family == "gpt2" else (head * 3 + which) * dh
        else:
            m, b = matrix(at["qkv"[which]])
            first = (head if which == 0 else head // (heads // kv_heads)) * dh
        return m[:, first : first + dh], b[first : first + dh]

    x = inputs if inputs.is_floating_point() else embed(weights, config, inputs)
    written["input"] = x
    if "positions" in names:
        x = x + w[names["positions"] + ".weight"][: x.shape[1]]
    offset = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    for layer in range(config.num_hidden_layers):
        at = {k: names["layer"].format(layer) + v for k, v in names.items()}
        out_matrix, out_bias = matrix(at["o"])
        before, outs = x, []
        for head in range(heads):
            qkv = []
            for which, letter in enumerate("qkv"):
                m, b = part(at, which, head)
                y = norm(edit(f"a{layer}.h{head}<{letter}>", before, written), at["ln1"]) @ m + b
                if which < 2 and "positions" not in names:
                    y = rotate(y[:, :, None], config)[:, :, 0]
                qkv.append(y)
            raw = qkv[0] @ qkv[1].transpose(1, 2) * scale
            raw = softcap(raw, _first(config, "attn_logit_softcapping"), "softcap" in rules)
            sliding = (_first(config, "layer_types") or ["full_attention"] * (layer + 1))[layer] == "sliding_attention"
            hidden = (offset < 0) | (offset >= config.sliding_window) if sliding else offset < 0
            pattern = raw.masked_fill(hidden, -torch.inf).softmax(-1)
            z = (pattern.detach() if "ah" in rules else pattern) @ qkv[2]
            outs.append(z @ out_matrix[head * dh : (head + 1) * dh])
        attn = sum(outs) + out_bias
        if "ln1_post" in at:  # each run's own scale, the same for all heads
            own = scale_of(attn)
            factor = (w[at["ln1_post"] + ".weight"] + 1) / own
            outs, attn = [o * factor for o in outs], norm(attn, at["ln1_post"])
        for head, o in enumerate(outs):
            written[f"a{layer}.h{head}"] = o
        x = x + attn
        parallel = family == "gpt_neox" and config.use_parallel_residual
        seen = {k: v for k, v in written.items() if not (parallel and k.startswith(f"a{layer}."))}
        y = norm(edit(f"m{layer}", before if parallel else x, seen), at["ln2"])
        m, b = matrix(at["gate" if "gate" in at else "up"])
        a = y @ m + b
        p = a * (ratio(a).detach() if "identity" in rules else ratio(a))
        if "gate" in at:
            m, b = matrix(at["up"])
            p = p * (y @ m + b)
            p = 0.5 * p + 0.5 * p.detach() if "half" in rules else p
        m, b = matrix(at["down"])
        mlp = p @ m + b
        written[f"m{layer}"] = norm(mlp, at["ln2_post"]) if "ln2_post" in at else mlp
        x = x + written[f"m{layer}"]
    unembed = w.get("lm_head.weight", w.get("embed_out.weight", w[names["embed"] + ".weight"]))
    logits = norm(edit("logits", x, written), names["final"]) @ unembed.T
    return EdgeTrace(written, softcap(logits, _first(config, "final_logit_softcapping"), "softcap" in rules))


def edges_of(trace_of: Callable[[Edit], EdgeTrace]) -> list[tuple[str, str]]:
    """(writer, reader) for every reader and what was written before it reads."""
    found: list[tuple[str, str]] = []

    def look(reader: str, x: Tensor, written: Mapping[str, Tensor]) -> Tensor:
        layer = reader.partition(".")[0][1:]
        own = [w for w in written if reader.startswith("a") and w.startswith(f"a{layer}.")]
        found.extend((u, reader) for u in written if u not in own)
        return x

    trace_of(look)
    return found


def edge_patch(
    weights: Weights, config: Any, original: Tensor, patch: Tensor, metric: Metric, direction: str = "noising",
    position: int | None = None,
) -> dict[tuple[str, str], Tensor]:  # fmt: skip
    """(u, v) → L(run with u(other) − u(base) added to v's input) − L(run), per example; at all positions or one.

    Every edge is b rows of one batch: rows of a forward pass know nothing of each other.
    """
    base, other = pick(direction, original, patch)
    plain, source = run(weights, config, base), run(weights, config, other)
    at = slice(None) if position is None else slice(position, position + 1)
    edges = edges_of(lambda edit: run(weights, config, base, edit))
    changes = torch.zeros(len(edges), *plain.written["input"].shape, dtype=torch.float64)
    for change, (u, _) in zip(changes, edges, strict=True):
        change[:, at] = (source.written[u] - plain.written[u])[:, at]

    def edit(reader: str, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        into = torch.tensor([v == reader for _, v in edges])[:, None, None, None]
        return x + (changes * into).flatten(0, 1)

    logits = run(weights, config, base.repeat(len(edges), 1), edit).logits.unflatten(0, (len(edges), -1))
    return {edge: metric(own) - metric(plain.logits) for edge, own in zip(edges, logits, strict=True)}


def reader_gradients(
    weights: Weights, config: Any, inputs: Tensor, metric: Metric, rules: frozenset[str] | set[str] = frozenset()
) -> dict[str, Tensor]:
    """reader → ∂L/∂(its input) [b pos d], by autograd on its own copy of the stream."""
    copies: dict[str, Tensor] = {}

    def edit(reader: str, x: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        copies[reader] = torch.zeros_like(x).requires_grad_()
        return x + copies[reader]

    loss = metric(run(weights, config, inputs, edit, rules).logits).sum()
    grads = torch.autograd.grad(loss, list(copies.values()), materialize_grads=True, allow_unused=True)
    return dict(zip(copies, grads, strict=True))


def circuit_logits(
    weights: Weights, config: Any, inputs: Tensor, kept: set[tuple[str, str]], ablated: Mapping[str, Tensor]
) -> Tensor:
    """Each reader's input is its stream plus Σ over the edges that are not kept of u(ablated) − u(running)."""

    def edit(reader: str, x: Tensor, written: Mapping[str, Tensor]) -> Tensor:
        layer = reader.partition(".")[0][1:]
        for u, value in written.items():
            sibling = reader.startswith("a") and u.startswith(f"a{layer}.")
            if not sibling and (u, reader) not in kept:
                x = x + (ablated[u] - value)
        return x

    return run(weights, config, inputs, edit).logits
