"""Scores and circuit evaluation in float64 from `forward` alone; each function restates its docs/methods.md definition.

Every score estimates L(M(base | do(n ← n(other)))) − L(M(base)), per example: [batch, layer, pos, *unit]. noising:
base = original, other = patch; denoising: base = patch, other = original. A metric maps logits [b pos vocab] to [b].
Vector kinds and heads are summed over d_model / d_head; neurons are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .forward import Trace, Weights, embed, forward

KINDS = ("resid_pre", "attn_out", "mlp_out", "head", "query", "key", "value", "mlp_neuron")
Metric = Callable[[Tensor], Tensor]
Scores = dict[str, Tensor]


def logit_diff(answer: Tensor, foil: Tensor) -> Metric:
    """logit[answer] − logit[foil] at the last position; answer, foil: token ids [b]."""

    def metric(logits: Tensor) -> Tensor:
        right, wrong = (logits[:, -1].gather(-1, ids[:, None])[:, 0] for ids in (answer, foil))
        return right - wrong

    return metric


def pick(direction: str, original: Tensor, patch: Tensor) -> tuple[Tensor, Tensor]:
    """(base, other) prompts."""
    return {"noising": (original, patch), "denoising": (patch, original)}[direction]


def gradients(trace: Trace, metric: Metric, kinds: Sequence[str]) -> dict[str, list[Tensor]]:
    """∂(Σ over the batch of L)/∂node; zero where no path is left (e.g. queries under ah)."""
    nodes = [(kind, t) for kind in kinds for t in trace[kind]]
    loss = metric(trace.logits).sum()
    flat = torch.autograd.grad(loss, [t for _, t in nodes], allow_unused=True, materialize_grads=True)
    return {kind: [g for (k, _), g in zip(nodes, flat, strict=True) if k == kind] for kind in kinds}


def _stack(kind: str, layers: Sequence[Tensor]) -> Tensor:
    return torch.stack([t if kind == "mlp_neuron" else t.sum(-1) for t in layers], 1).detach()


def relp(
    weights: Weights, config: Any, original: Tensor, patch: Tensor, metric: Metric, rules: frozenset[str] | set[str],
    kinds: Sequence[str] = KINDS, direction: str = "noising", baseline: str = "patch", **lrp: float,
) -> Scores:  # fmt: skip
    """(n(other) − n(base)) · ρ at base; ρ = the gradient under `rules`. lrp: epsilon=, gamma=.

    baseline: "patch", or in place of n(other) "zero" or "mean" (of n(base) over the batch, per position)."""
    base_ids, other_ids = pick(direction, original, patch)
    base, other = (forward(weights, config, ids, rules, None, **lrp) for ids in (base_ids, other_ids))
    grads = gradients(base, metric, kinds)

    def delta(n: Tensor, o: Tensor) -> Tensor:
        return {"patch": o, "zero": torch.zeros_like(n), "mean": n.mean(0, keepdim=True)}[baseline] - n

    return {
        kind: _stack(kind, [delta(n, o) * g for n, o, g in zip(base[kind], other[kind], grads[kind], strict=True)])
        for kind in kinds
    }


def atp(
    weights: Weights, config: Any, original: Tensor, patch: Tensor, metric: Metric, kinds: Sequence[str] = KINDS,
    direction: str = "noising", baseline: str = "patch",
) -> Scores:  # fmt: skip
    """(n(other) − n(base)) · plain gradient at base."""
    return relp(weights, config, original, patch, metric, frozenset(), kinds, direction, baseline)


def ig_inputs(
    weights: Weights, config: Any, original: Tensor, patch: Tensor, metric: Metric, steps: int, rule: str = "midpoint",
    kinds: Sequence[str] = KINDS, direction: str = "noising", rules: frozenset[str] | set[str] = frozenset(),
) -> Scores:  # fmt: skip
    """(n(other) − n(base)) · mean over α of the gradient with embeddings at base + α(other − base).

    α = (k + s)/steps, k = 0..steps−1; s = 0 left, 1 right, ½ midpoint; α = 0 is the base prompt."""
    start, end = (embed(weights, config, ids) for ids in pick(direction, original, patch))
    shift = {"left": 0.0, "right": 1.0, "midpoint": 0.5}[rule]
    alphas = (torch.arange(steps, dtype=torch.float64) + shift) / steps
    at = start + alphas.view(-1, 1, 1, 1) * (end - start)  # every step is a row of one batch: [steps b pos d]

    def summed(logits: Tensor) -> Tensor:
        return torch.stack([metric(one) for one in logits.unflatten(0, (steps, -1))])

    grads = gradients(forward(weights, config, at.flatten(0, 1), rules), summed, kinds)
    total = {kind: [g.unflatten(0, (steps, -1)).sum(0) for g in layers] for kind, layers in grads.items()}
    base, other = forward(weights, config, start), forward(weights, config, end)
    return {
        kind: _stack(kind, [(o - n) * g / steps for n, o, g in zip(base[kind], other[kind], total[kind], strict=True)])
        for kind in kinds
    }


@torch.no_grad()
def act_patch(
    weights: Weights, config: Any, original: Tensor, patch: Tensor, metric: Metric, kinds: Sequence[str] = KINDS,
    direction: str = "noising", chunk: int = 512,
) -> Scores:  # fmt: skip
    """L(base with one (layer, pos, unit) at n(other)) − L(base), exactly; `chunk` interventions share a forward."""
    ids, other_ids = pick(direction, original, patch)
    base, other = forward(weights, config, ids), forward(weights, config, other_ids)
    clean = metric(base.logits)
    scores: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    for kind in kinds:
        for layer, target in enumerate(other[kind]):
            units = target.shape[1:] if kind == "mlp_neuron" else target.shape[1:-1]
            rows = []
            for index in torch.arange(units.numel()).split(chunk):
                one = torch.nn.functional.one_hot(index, units.numel()).bool().view(len(index), 1, *units)
                one = one if kind == "mlp_neuron" else one[..., None]

                def swap(t: Tensor, one: Tensor = one, target: Tensor = target) -> Tensor:
                    return torch.where(one, target, t.unflatten(0, (len(one), -1))).flatten(0, 1)

                run = forward(weights, config, ids.repeat(len(index), 1), patch={(kind, layer): swap})
                rows += [metric(logits) - clean for logits in run.logits.unflatten(0, (len(index), -1))]
            scores[kind].append(torch.stack(rows, 1).view(len(ids), *units))
    return {kind: torch.stack(layers, 1) for kind, layers in scores.items()}


@torch.no_grad()
def faithfulness(
    weights: Weights, config: Any, prompts: Tensor, patch_prompts: Tensor, metric: Metric,
    circuit: Mapping[str, Tensor], exclude: int = 0, ablation: str = "mean",
) -> dict[str, float]:  # fmt: skip
    """F(C) = mean L over `prompts` with every node outside C ablated at once; circuit: kind → Bool[layer pos *unit].

    Ablation values: "mean" of the activation over `patch_prompts`, per position; "zero"; "patch" (the run of the
    example's own patch prompt). Only the circuit's kinds are ablated; layers < exclude run unablated everywhere.
    faithfulness = (F_C − F_∅) / (F_M − F_∅), completeness = the same for the complement; ratios of means."""
    source = forward(weights, config, patch_prompts)
    value = {"mean": lambda t: t.mean(0, keepdim=True), "zero": torch.zeros_like, "patch": lambda t: t}[ablation]

    def f(masks: Mapping[str, Tensor]) -> float:
        patch = {}
        for kind, mask in masks.items():
            for layer in range(exclude, len(mask)):
                keep = mask[layer] if kind == "mlp_neuron" else mask[layer][..., None]
                fill = value(source[kind][layer])
                patch[kind, layer] = lambda t, keep=keep, fill=fill: torch.where(keep, t, fill)
        return metric(forward(weights, config, prompts, patch=patch).logits).mean().item()

    out = {
        "F_M": f({}),
        "F_C": f(circuit),
        "F_empty": f({k: torch.zeros_like(m) for k, m in circuit.items()}),
        "F_complement": f({k: ~m for k, m in circuit.items()}),
    }
    span = out["F_M"] - out["F_empty"]
    return out | {
        "faithfulness": (out["F_C"] - out["F_empty"]) / span,
        "completeness": (out["F_complement"] - out["F_empty"]) / span,
    }
