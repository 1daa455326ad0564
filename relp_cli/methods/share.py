"""How far a node moves what follows it: the share of its layer's change of the residual stream that it makes up.

A node that moves the stream only a little meets the tangent of what follows, one that moves it all the way the secant. For a
quadratic function the coefficient of a move by the fraction t of the way is exactly (1 − t)·tangent + t·secant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.lrp.sites import centred, linear_layer, weighted
from relp_cli.methods.setup import Setup
from relp_cli.models.model import Hook
from relp_cli.nodes.access import EMBEDDED, per_node, split
from relp_cli.nodes.kinds import NodeKind
from relp_cli.precision import wide

STREAM = "blocks.{l}.hook_out"  # what a layer leaves behind
# hook of a node kind → the linear layer, and the norm behind it, through which it reaches the stream; those without an entry
# (the stream itself; queries, keys and values) count as the whole of what they move
WRITES: dict[str, tuple[str, str]] = {
    "blocks.{l}.attn.o.hook_in": ("attn.o", "ln1_post"),
    "blocks.{l}.mlp.out.hook_in": ("mlp.out", "ln2_post"),
    "blocks.{l}.hook_attn_out": ("", ""),
    "blocks.{l}.hook_mlp_out": ("", ""),
    "blocks.{l}.hook_out": ("", ""),
}


def share_of(along: Tensor, square: Tensor) -> Tensor:
    """⟨contribution, Δr⟩ / ‖Δr‖², from 0 to 1; 1 where nothing changes."""
    return (along / square).nan_to_num(1.0).clamp(0, 1)


class Streams:
    """What stands at some hook points in run and source (2 forward passes), by default what every layer leaves behind, and the
    scales of post-norms.
    """

    def __init__(self, setup: Setup, points: Sequence[str] = ()) -> None:
        self.setup, self.model = setup, setup.model
        layers = range(self.model.shape.n_layers)
        scales = [f"blocks.{n}.{norm}.hook_scale" for n in layers for norm in ("ln1_post", "ln2_post")]
        default = [EMBEDDED, *(STREAM.format(l=n) for n in layers), *(p for p in scales if p in self.model.points)]
        self.points = list(dict.fromkeys(points or default))
        self.run, self.source = self._read(setup.run), self._read(setup.source)

    def _read(self, tokens: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Hook:
            return lambda value: seen.__setitem__(name, value)

        with torch.no_grad(), self.model.hooks([(name, keep(name)) for name in self.points]):
            self.model.logits(tokens)
        self.setup.passes.forward += 1
        return seen

    def at(self, point: str) -> Float[Tensor, "batch pos d_model"]:
        """Source − run."""
        return wide(self.source[point]) - wide(self.run[point])

    def change(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """Of a layer's resid_post; −1: of what the first block reads."""
        return self.at(STREAM.format(l=layer) if layer >= 0 else EMBEDDED)

    def shares(self, kind: NodeKind, layer: int, delta: Float[Tensor, "batch pos width"]) -> Tensor:
        """⟨a node's contribution to the stream, Δr⟩ / ‖Δr‖², from 0 to 1, of each node; over the width of its site."""
        if kind.hook not in WRITES:
            return torch.ones_like(delta)
        change = self.change(layer)
        along = per_node(self.model, kind, delta * self._read_back(kind, layer, change))
        along = along[..., None] if kind.split == "vector" else along
        share = share_of(along, change.square().sum(-1, keepdim=True))
        return share[..., None].expand_as(split(self.model, kind, delta)).flatten(-2)

    def _read_back(self, kind: NodeKind, layer: int, change: Tensor) -> Tensor:
        """Of a site's width: the transpose of its way to the stream, applied to the stream's change."""
        linear, norm = WRITES[kind.hook]
        if not linear:
            return change
        change = change * self.model.shape.residual_multiplier
        scale = self.run.get(f"blocks.{layer}.{norm}.hook_scale")
        if scale is not None:
            component = self.model.component(f"blocks.{layer}.{norm}")
            change = centred(component, weighted(component, change)) / scale
        weight, _ = linear_layer(self.model, f"blocks.{layer}.{linear}")
        return change @ weight.to(change.dtype)
