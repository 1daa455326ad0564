"""Running a model with some of its nodes, or a share of each: the kept part of the running value, another value for the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from relp_cli.models.model import Hook, Model
from relp_cli.nodes.access import Activations, split
from relp_cli.nodes.kinds import NodeKind


def mixed(kept: Tensor, value: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """kept·value + (1 − kept)·other, exactly `value` and `other` at 1 and 0; kept: Bool or Float in [0, 1], broadcast."""
    if kept.dtype == torch.bool:
        return torch.where(kept, value, other)
    return torch.lerp(other, value, kept.to(value.dtype))


def keeping(
    model: Model,
    kinds: Sequence[NodeKind],
    keep: Mapping[str, Tensor] | None,
    other: Activations | None,
    first_layer: int = 0,
) -> list[tuple[str, Hook]]:
    """Hooks under which each node of layers ≥ `first_layer` is its running value where kept, else its `other` value.

    keep:  node kind → Bool or Float[layer, pos, unit], the share that is kept, on the model's device; None: nothing is.
    other: node kind → layer → Float[batch, pos, width], or without the batch axis; None: zeros.
    """
    return [
        (kind.point(layer), _hook(model, kind, layer, None if keep is None else keep[kind.name][layer], other))
        for kind in kinds
        for layer in range(first_layer, model.shape.n_layers)
    ]


def _hook(model: Model, kind: NodeKind, layer: int, kept: Tensor | None, other: Activations | None) -> Hook:
    def hook(value: Tensor) -> Tensor:
        rest = torch.zeros_like(value) if other is None else other[kind.name][layer].expand_as(value)
        if kept is None:
            return rest.contiguous()  # GPT-2's linear layers view their input
        if kind.split == "unit":
            return mixed(kept, value, rest)
        pieces = mixed(kept[..., None], split(model, kind, value), split(model, kind, rest))
        return pieces.reshape(value.shape)

    return hook
