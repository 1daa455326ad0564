"""AtP* (Kramár et al. 2024): attribution patching without its two known blind spots.

1. QK fix, for queries and keys: the attention scores are computed with the source's queries (or keys) in place of the
   run's, by the model itself, so rotary embeddings, grouped keys, softcaps and windows are the model's own. Where a norm
   over all heads couples them (OLMo-2), one head is replaced at a time, and what it does to all heads is its own.
2. The softmax is then redone exactly, for one query or one key at a time; only what follows the pattern is linear.
3. GradDrop, for all kinds: the gradient is taken once per layer with that layer's contribution held constant, and the
   absolute scores are averaged, so that a direct and an indirect effect that cancel are still seen. Unsigned.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.local import without_each_key
from relp_cli.methods.core import Gradients, PerExample, differences, must_reach, products, refuse_metric
from relp_cli.methods.setup import Setup
from relp_cli.methods.space import Batch
from relp_cli.methods.table import Params, Result
from relp_cli.models.model import Hook
from relp_cli.nodes.access import Activations, capture, units
from relp_cli.nodes.attention import (
    PATTERN,
    QUERIES_AND_KEYS,
    attention_scores,
    heads_are_coupled,
    scores_with,
    softmax,
    with_one,
)
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.precision import wide


class AtpStarParams(Params):
    """qk_fix: recompute the softmax exactly for queries and keys. grad_drop: average |score| over dropped layers."""

    qk_fix: bool = True
    grad_drop: bool = True


def atp_star(on: Batch, params: AtpStarParams) -> Result:
    """2 forward + 1 backward (with grad_drop: per layer); with qk_fix + 1 forward for queries and 1 for keys (one per head
    where a norm couples the heads).

    Raises: RelpError for queries or keys of a model whose attention scores cannot be read and verified.
    """
    setup, n_layers = on.setup, on.model.shape.n_layers
    dropped = [frozenset([layer]) for layer in range(n_layers)] if params.grad_drop else [frozenset[int]()]
    fixed = [k.name for k in setup.kinds if k.name in ("query", "key")] if params.qk_fix else []
    source = setup.source_activations()
    kinds = (*setup.kinds, *(k for k in (*QUERIES_AND_KEYS, PATTERN) if fixed and k not in setup.kinds))
    taken = replace(setup, kinds=kinds)  # now: kl's reference is a pass of its own, which would be read as well
    reading: AbstractContextManager[list[Tensor]] = attention_scores(setup.model) if fixed else nullcontext([])
    with reading as before:
        runs = layer_drop_gradients(taken, dropped)
    run = runs[0].values
    deltas = differences(source, {k.name: run[k.name] for k in setup.kinds})
    slopes = [at.grads[PATTERN.name] for at in runs] if fixed else []
    exact = {name: fixed_scores(setup, name, source, run, before, slopes) for name in fixed}
    total: PerExample = {}
    for i, (dropping, at) in enumerate(zip(dropped, runs, strict=True)):
        scores = products(setup, deltas, at.grads) | {name: each[i] for name, each in exact.items()}
        for name, value in scores.items():
            kept = value.abs() * _outside(name, value, dropping) if params.grad_drop else value
            total[name] = total[name] + kept if name in total else kept
    if params.grad_drop:
        total = {name: value / _n_drops(name, n_layers) for name, value in total.items()}
    return Result(total, meta={"signed": not params.grad_drop, "qk_fix": bool(fixed), "grad_drop": params.grad_drop})


def _n_drops(kind: str, n_layers: int) -> int:
    """K of docs/methods.md: how many layers can be dropped without dropping the node itself."""
    k = n_layers if NODE_KINDS[kind].between_layers else n_layers - 1
    if k == 0:
        raise RelpError(
            f"grad_drop: {kind} nodes of a one-layer model have no other layer to drop; use grad_drop=false"
        )
    return k


def _outside(kind: str, scores: Tensor, dropping: Collection[int]) -> Tensor:
    """1 for the layers whose nodes a dropped layer does not contain, along the layer axis."""
    inside = torch.tensor([not NODE_KINDS[kind].between_layers and n in dropping for n in range(scores.shape[1])])
    return (~inside).to(scores).view(1, -1, *[1] * (scores.ndim - 2))


def layer_drop_gradients(setup: Setup, dropped: Sequence[Collection[int]]) -> list[Gradients]:
    """∂L/∂n with the contributions (attn_out + mlp_out) of some layers held constant; one backward per set.

    Gradients at attn_out and mlp_out are taken downstream of the cut: with all layers dropped they are direct effects.
    """
    refuse_metric(setup)
    dropping: set[int] = set()
    with torch.enable_grad():
        with _gates(setup, dropping), capture(setup.model, setup.kinds) as values:
            logits = setup.model.logits(setup.run)
        metric = setup.value(logits)
        setup.seen["run"] = metric.detach()
        setup.passes.forward += 1
        flat = [(kind, layer, v) for kind, layers in values.items() for layer, v in enumerate(layers)]
        detached = {kind: [v.detach() for v in layers] for kind, layers in values.items()}
        out = []
        for layers_ in dropped:
            dropping.clear()
            dropping.update(layers_)
            grads = torch.autograd.grad(metric.sum(), [v for *_, v in flat], retain_graph=True, allow_unused=True)
            setup.passes.backward += 1
            by_kind: Activations = {kind: [] for kind in values}
            for (kind, layer, _), grad in zip(flat, grads, strict=True):
                by_kind[kind].append(must_reach(grad, kind, layer, ()))
            out.append(Gradients(detached, by_kind, metric.detach(), {}))
    return out


@contextmanager
def _gates(setup: Setup, dropping: Collection[int]) -> Iterator[None]:
    """While open, layers' contributions pass gates; a backward pass stops at the gates of `dropping`'s layers."""

    def gate(layer: int) -> Hook:
        def hook(value: Tensor) -> Tensor:
            inner = value.view_as(value)
            inner.register_hook(lambda g: torch.zeros_like(g) if layer in dropping else g)
            return inner.view_as(inner)

        return hook

    layers = range(setup.model.shape.n_layers)
    with setup.model.hooks(
        [(f"blocks.{n}.{name}", gate(n)) for n in layers for name in ("hook_attn_out", "hook_mlp_out")]
    ):
        yield


def fixed_scores(
    setup: Setup, kind: str, source: Activations, run: Activations, before: list[Tensor], slopes: Sequence[list[Tensor]]
) -> list[Float[Tensor, "batch layer slot head"]]:
    """The QK fix for all queries or all keys, once per set of slopes (∂L/∂pattern, one tensor per layer)."""
    model, node = setup.model, NODE_KINDS[kind]
    held = {k.name: run[k.name] for k in QUERIES_AND_KEYS}
    coupled = heads_are_coupled(model, node)
    moves = (with_one(model, node, run[kind], source[kind], h) for h in range(units(model, node)))
    found: list[list[Tensor]] = [[] for _ in slopes]
    for values in moves if coupled else [source[kind]]:
        setup.passes.forward += 1
        after = scores_with(model, setup.run, held | {kind: values})
        for columns, slope in zip(found, slopes, strict=True):
            columns.append(_effects(kind, before, after, slope))
    if coupled:  # what a head does to any head
        return [setup.to_slots(torch.stack([c.sum(-1) for c in columns], -1)) for columns in found]
    shape = (units(model, node), -1)  # a key serves its group of query heads
    return [setup.to_slots(c.unflatten(-1, shape).sum(-1)) for (c,) in found]


def _effects(
    kind: str, before: list[Tensor], after: list[Tensor], slope: list[Tensor]
) -> Float[Tensor, "batch layer pos query_head"]:
    function = query_effects if kind == "query" else key_effects
    return torch.stack([function(b, a, g) for b, a, g in zip(before, after, slope, strict=True)], 1).transpose(-1, -2)


def query_effects(before: Tensor, after: Tensor, grad: Tensor) -> Float[Tensor, "batch head pos"]:
    """Σ_k (P' − P)·∂L/∂P for each query; before, after, grad: Float[batch, head, query, key]."""
    return ((softmax(after) - softmax(before)) * wide(grad)).sum(-1)


def key_effects(before: Tensor, after: Tensor, grad: Tensor) -> Float[Tensor, "batch head pos"]:
    """The same for each key t on its own: Σ_{q ≥ t} (P'_qt − P_qt)·(g_qt − ḡ_qt), with ḡ_qt the other keys' mean of g.

    Only t's score moves, so the others keep their proportions: P_qt = sigmoid(s_qt − o_qt), o_qt = logsumexp of the other
    scores, and ḡ does not change. (With u = P_qt·expm1(s'_qt − s_qt) that is u/(1+u)·(g_qt − Σ_j P_qj·g_qj); where P_qt → 1, the
    saturated case, this form is 0/0 in floating point: the sum rounds to g_qt.)
    """
    lowest = torch.finfo(wide(before).dtype).min / 4  # of masked keys; differences stay finite
    before, after = (wide(s).clamp_min(lowest) for s in (before, after))
    grad = wide(grad)
    others, top, without_top = without_each_key(before)
    p = before.softmax(-1)
    mass = p * grad
    rest = (mass.sum(-1, keepdim=True) - mass) / torch.where(top, 1, 1 - p)  # others than the top one have P ≤ ½
    mean = torch.where(top, (without_top * grad).sum(-1, keepdim=True), rest)
    return ((torch.sigmoid(after - others) - torch.sigmoid(before - others)) * (grad - mean)).sum(-2)
