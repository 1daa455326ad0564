"""Neuron→neuron edges (Transluce): how MLP neurons of lower layers drive one, through attention and residual stream only.

1. The forward pass runs as usual, but every MLP below the target's reads a detached stream: MLPs in between are stopped.
2. The gradient of the target neuron's activation at every lower neuron is the edge's weight, one backward per target.
3. weight × the lower neuron's activation is its contribution (or × its change, where a patch prompt is compared).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.context import lrp
from relp_cli.models.model import Hook, Model
from relp_cli.nodes.access import units
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.precision import wide


@dataclass(frozen=True)
class Neuron:
    """One MLP hidden unit at one position (negative: from the end)."""

    layer: int
    unit: int
    position: int = -1


@dataclass(frozen=True)
class NeuronEdges:
    """Edges into `target`: weights, contributions Float[batch, layer, pos, unit] from the layers below the target's;
    activation Float[batch]: the target's.
    """

    target: Neuron
    weights: Float[Tensor, "batch layer pos unit"]
    contributions: Float[Tensor, "batch layer pos unit"]
    activation: Float[Tensor, " batch"]


def neuron_edges(
    model: Model,
    tokens: Tensor,
    targets: Sequence[Neuron],
    rules: Sequence[str] = (),
    source: Tensor | None = None,
) -> list[NeuronEdges]:
    """Weights and contributions of all lower neurons to each target neuron.

    rules:  LRP rules (one-point) in place of local gradients; () is Transluce's plain gradient.
    source: other prompts of the same shape: contributions are weight · (n(source) − n(tokens)) instead of weight · n(tokens).
    Cost: 1 forward per distinct target layer, 1 backward per target. Raises: RelpError for neurons that do not exist.
    """
    n_units = units(model, NODE_KINDS["mlp_neuron"])
    for target in targets:
        if not (0 < target.layer < model.shape.n_layers and 0 <= target.unit < n_units):
            raise RelpError(
                f"neuron {target.layer}:{target.unit}: expected a layer from 1 to {model.shape.n_layers - 1} and a unit "
                f"from 0 to {n_units - 1}"
            )
        if not -tokens.shape[1] <= target.position < tokens.shape[1]:
            raise RelpError(f"neuron position {target.position}: the prompts have {tokens.shape[1]} positions")
    found: dict[Neuron, NeuronEdges] = {}
    others = None if source is None else _activations(model, source)
    for layer in sorted({t.layer for t in targets}):
        here = [t for t in targets if t.layer == layer]
        with torch.enable_grad():
            values = _activations(model, tokens, layer, rules)
            below = values[:layer]
            for target in here:
                activation = values[layer][:, target.position, target.unit]
                grads = torch.autograd.grad(activation.sum(), below, retain_graph=True, materialize_grads=True)
                weights = wide(torch.stack(grads, 1))
                of = wide(torch.stack([v.detach() for v in below], 1))
                if others is not None:
                    of = torch.stack(others[:layer], 1) - of
                found[target] = NeuronEdges(target, weights, weights * of, activation.detach())
    return [found[t] for t in targets]


def _activations(
    model: Model, tokens: Tensor, stop_below: int | None = None, rules: Sequence[str] = ()
) -> list[Tensor]:
    """Neurons Float[batch, pos, unit] per layer; below `stop_below` they are leaves, and MLPs read a detached stream."""
    values: list[Tensor] = []

    def neurons(layer: int) -> Hook:
        def hook(value: Tensor) -> Tensor:
            leaf = stop_below is not None and layer < stop_below
            values.append(value.detach().requires_grad_(True) if leaf else value)
            return values[-1]

        return hook

    layers = range(model.shape.n_layers)
    stops = [(f"blocks.{n}.mlp.hook_in", lambda value: value.detach()) for n in range(stop_below or 0)]
    taps = [(f"blocks.{n}.mlp.out.hook_in", neurons(n)) for n in layers]
    with model.hooks(stops), lrp(model, rules), model.hooks(taps), torch.set_grad_enabled(stop_below is not None):
        model.logits(tokens)
    return values
