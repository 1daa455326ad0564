"""Capture and patch: with `kinds.py` and `lrp/`, the only code that knows hook names.

Shapes: a site's tensor is Float[batch, pos, width]; split into nodes it is Float[batch, pos, n_units, d_unit], where
n_units · d_unit = width (n_units = 1 for vector nodes, d_unit = 1 for units).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.models.model import Hook, Model
from relp_cli.models.recompute import again
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind

Activations = dict[str, list[Tensor]]  # node kind → one Float[batch, pos, width] per layer
EMBEDDED = NODE_KINDS["resid_pre"].point(0)  # what the first block reads


def as_leaf(value: Tensor) -> Tensor:
    """The value as a leaf of the graph."""
    return value.detach().requires_grad_(True)


def units(model: Model, kind: NodeKind) -> int:
    """Nodes per layer and position. Raises RelpError for MLP neurons where the MLPs are mixtures of experts."""
    shape = model.shape
    if kind.width == "d_mlp" and shape.moe:
        raise RelpError(
            f"model {model.name} ({model.family.name}) has no {kind.name} nodes: its MLPs are mixtures of experts, and "
            "TransformerLens shows no expert's hidden units or output; mlp_out and mlp_dim stand for the whole mixture"
        )
    if kind.split == "unit":
        return int(getattr(shape, kind.width))
    return {"vector": 1, "head": shape.n_heads, "kv_head": shape.n_kv_heads}[kind.split]


def split(model: Model, kind: NodeKind, value: Float[Tensor, "... width"]) -> Float[Tensor, "... units d_unit"]:
    """A site's last axis as nodes × the dimensions of one node."""
    return value.unflatten(-1, (units(model, kind), -1))


def per_node(model: Model, kind: NodeKind, product: Float[Tensor, "... width"]) -> Tensor:
    """Sum an elementwise product (δ·gradient) over each node's own dimensions: [..., ] or [..., units]."""
    summed = split(model, kind, product).sum(-1)
    return summed[..., 0] if kind.split == "vector" else summed


@contextmanager
def capture(
    model: Model, kinds: Sequence[NodeKind], leaves: Mapping[str, Callable[[Tensor], Tensor]] | None = None
) -> Iterator[Activations]:
    """Collect the activations of every kind and layer during the forward passes inside the block.

    Enter it *inside* any `lrp` block: hooks run in the order of registration, and a node must be read downstream of a
    rule that sits at the same hook point (docs/methods.md: the Half-rule and `mlp_neuron` share one). With gradients on,
    leaves of the graph are needed (parameters are frozen): hook point → the leaf to put there, made of the running value;
    by default what the first block reads.
    """
    seen: Activations = {kind.name: [] for kind in kinds}
    hooks: list[tuple[str, Hook]] = []
    if torch.is_grad_enabled():
        hooks += (leaves or {EMBEDDED: as_leaf}).items()
    for kind in kinds:
        for layer in range(model.shape.n_layers):
            hooks.append((kind.point(layer), _collect(seen[kind.name])))
    with model.hooks(hooks):
        yield seen


def _collect(values: list[Tensor]) -> Hook:
    def hook(value: Tensor) -> None:
        if not again():
            values.append(value)

    return hook


def activations(model: Model, tokens: Tensor, kinds: Sequence[NodeKind]) -> Activations:
    """Activations of one plain forward pass, without gradients."""
    with torch.no_grad(), capture(model, kinds) as seen:
        model.logits(tokens)
    return seen
