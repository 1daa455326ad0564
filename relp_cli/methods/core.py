"""The shared gradient core: values and gradients of every requested node from one forward and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from relp_cli.errors import RelpError
from relp_cli.lrp.context import lrp
from relp_cli.methods.setup import Setup
from relp_cli.methods.space import Point, of_point, together
from relp_cli.models.recompute import again
from relp_cli.nodes.access import EMBEDDED, Activations, as_leaf, capture, per_node
from relp_cli.precision import wide

PerExample = dict[str, Tensor]  # node kind → Float[batch, layer, slot, *unit]
Take = Callable[[int, str, int, Tensor, Tensor], None]  # (number of the point, node kind, layer, value, gradient)


@dataclass(frozen=True)
class Gradients:
    """Of one point: values[kind][layer], grads[kind][layer]: Float[batch, pos, width]; metric: Float[batch]; applied: rule →
    layers. For a point with `of`, only leaf: Float[batch, pos, width], the gradient of the value that was moved.
    """

    values: Activations
    grads: Activations
    metric: Float[Tensor, " batch"]
    applied: dict[str, int]
    leaf: Tensor | None = None


def gradients(setup: Setup, points: Sequence[Point], take: Take | None = None) -> list[Gradients]:
    """∂L/∂n of every node at every point, with LRP rules in place of local gradients where given: 1 forward + 1 backward.

    points: of one group (`Batch.gradients`). take: is given each gradient when the backward pass arrives at it, and the value
    that it is of; then neither is kept, and the graph's memory is free before the next layer's. Raises: RelpError for a metric
    that has no gradient, and for nodes that the rules cut off from the output.
    """
    first, k = points[0], len(points)
    refuse_metric(setup, at_run=not first.moved)
    kinds = setup.kinds if first.of is None else ()
    leaves: dict[str, Tensor] = {}
    moved, other = together(points)

    def leaf(name: str, change: Tensor | None) -> Callable[[Tensor], Tensor]:
        def hook(value: Tensor) -> Tensor:
            if not again():
                leaves[name] = as_leaf(value if change is None else (value + change).to(value.dtype))
            return leaves[name]

        return hook

    with torch.enable_grad():
        moves = {name: leaf(name, change) for name, change in moved.items()} or {EMBEDDED: leaf(EMBEDDED, None)}
        with lrp(setup.model, first.rules, other) as applied, capture(setup.model, kinds, moves) as values:
            logits = setup.model.logits(setup.run.repeat(k, 1))
        metric = setup.value(logits)  # outside the hooks: kl runs the model for its reference
        grads, handles = _arriving(values, k, take)
        of_leaves = torch.autograd.grad(metric.sum(), list(leaves.values()), allow_unused=True)
    for handle in handles:
        handle.remove()  # a hook holds values, whose graph holds the hook: nothing would ever free them
    if not moved:
        setup.seen["run"] = of_point(metric.detach(), 0, k)
    setup.passes.forward += k
    setup.passes.backward += k
    if first.of is not None:
        (place,) = moved
        grad = must_reach(of_leaves[0], place, 0, first.rules)
        return [Gradients({}, {}, of_point(metric.detach(), i, k), applied, of_point(grad, i, k)) for i in range(k)]
    arrived = {
        kind: [must_reach(grad, kind, layer, first.rules) for layer, grad in enumerate(layers)]
        for kind, layers in grads.items()
    }
    if take is not None:
        return [Gradients({}, {}, of_point(metric.detach(), i, k), applied) for i in range(k)]
    return [
        Gradients(
            {kind: [of_point(v.detach(), i, k) for v in layers] for kind, layers in values.items()},
            {kind: [of_point(g, i, k) for g in layers] for kind, layers in arrived.items()},
            of_point(metric.detach(), i, k),
            applied,
        )
        for i in range(k)
    ]


def _arriving(
    values: Activations, k: int, take: Take | None
) -> tuple[dict[str, list[Tensor | None]], list[RemovableHandle]]:
    """Kind → per layer its gradient, once a backward pass has arrived there; of rows [point, batch], for k points. And the hooks.

    take: as in `gradients`; then an empty tensor instead, for values and gradients are let go.
    """
    grads: dict[str, list[Tensor | None]] = {kind: [None] * len(layers) for kind, layers in values.items()}
    handles: list[RemovableHandle] = []

    def arrived(kind: str, layer: int, grad: Tensor) -> None:
        grads[kind][layer] = grad
        if take is not None:
            value, values[kind][layer] = values[kind][layer].detach(), grad.new_empty(0)
            grads[kind][layer] = grad.new_empty(0)
            for i in range(k):
                take(i, kind, layer, of_point(value, i, k), of_point(grad, i, k))

    for kind, layers in values.items():
        for layer, value in enumerate(layers):
            if value.requires_grad:
                handles.append(value.register_hook(partial(arrived, kind, layer)))
    return grads, handles


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
