"""The shared gradient core: values and gradients of every requested node from one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.context import lrp
from relp_cli.methods.setup import Setup
from relp_cli.nodes.access import Activations, capture, per_node
from relp_cli.precision import wide

PerExample = dict[str, Tensor]  # node kind → Float[batch, layer, slot, *unit]


@dataclass(frozen=True)
class Gradients:
    """values[kind][layer], grads[kind][layer]: Float[rows, pos, width]; metric: Float[rows]; applied: rule → layers."""

    values: Activations
    grads: Activations
    metric: Float[Tensor, " rows"]
    applied: dict[str, int]


def gradients(
    setup: Setup,
    rules: Sequence[str] = (),
    other: Mapping[str, Mapping[str, Tensor]] | None = None,
    tokens: Tensor | None = None,
    leaf: Tensor | None = None,
) -> Gradients:
    """∂L/∂n of every node at `tokens` (default: the run), with LRP rules in place of local gradients where given.

    leaf: the first block's input Float[rows, pos, d_model] to run from instead of the tokens' own embeddings.

    Raises: RelpError for a metric that has no gradient, and for nodes that the rules cut off from the output.
    """
    refuse_metric(setup, at_run=tokens is None and leaf is None)
    tokens = setup.run if tokens is None else tokens
    with torch.enable_grad():
        with lrp(setup.model, rules, other) as applied, capture(setup.model, setup.kinds, leaf) as values:
            logits = setup.model.logits(tokens)
        metric = setup.value(logits)  # outside the hooks: kl runs the model for its reference
        flat = [v for layers in values.values() for v in layers]
        grads = torch.autograd.grad(metric.sum(), flat, allow_unused=True)
    if tokens is setup.run and leaf is None:
        setup.seen["run"] = metric.detach()
    times = len(tokens) / len(setup.batch)
    setup.passes.forward += times
    setup.passes.backward += times
    by_kind: Activations = {}
    position = iter(grads)
    for kind, layers in values.items():
        by_kind[kind] = [must_reach(next(position), kind, layer, rules) for layer in range(len(layers))]
    detached = {kind: [v.detach() for v in layers] for kind, layers in values.items()}
    return Gradients(detached, by_kind, metric.detach(), applied)


def refuse_metric(setup: Setup, at_run: bool = True) -> None:
    """Raises RelpError for a metric without gradient, or (at_run) whose gradient at the run is 0 by construction."""
    if not setup.metric.differentiable:
        raise RelpError(f"metric '{setup.metric.name}' has no gradient; it serves act_patch and evaluation only")
    if at_run and setup.metric.zero_grad_at_original and setup.direction == "noising":
        raise RelpError(
            f"metric '{setup.metric.name}' has gradient exactly 0 at the original prompt, where this method evaluates "
            "it; use --direction denoising, act_patch, or another metric"
        )


def must_reach(grad: Tensor | None, kind: str, layer: int, rules: Sequence[str]) -> Tensor:
    """The gradient. Raises RelpError where there is none."""
    if grad is None:
        raise RelpError(
            f"no gradient reaches {kind} nodes of layer {layer} under rules {', '.join(rules) or '(none)'}; "
            "the AH-rule holds attention patterns constant, so queries and keys have no score"
        )
    return grad


def products(setup: Setup, deltas: Activations, grads: Activations) -> PerExample:
    """Σ over each node's dimensions of δ·g, stacked over layers, on the slot axis; in float32 at least."""
    out: PerExample = {}
    for kind in setup.kinds:
        pairs = zip(deltas[kind.name], grads[kind.name], strict=True)
        layers = [per_node(setup.model, kind, wide(d) * wide(g)) for d, g in pairs]
        out[kind.name] = setup.to_slots(torch.stack(layers, 1))
    return out


def differences(source: Activations, values: Activations) -> Activations:
    """δn = n(source) − n(run), in float32 at least."""
    return {k: [wide(s) - wide(v) for s, v in zip(source[k], values[k], strict=True)] for k in values}
