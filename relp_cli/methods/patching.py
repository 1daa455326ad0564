"""Exact patching, for every space and question: part of a run is replaced, all downstream is computed again, and L compared.

`effects` is the one place where that is done; a space says what its hooks put where. Nodes are put by `patch_sets` (sets of
nodes, of any kinds and layers, at once) and `patch_each` (single nodes of one kind and layer).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from relp_cli.methods.setup import CHUNK_TOKENS, Setup, fitting
from relp_cli.models.model import Hook
from relp_cli.nodes.access import Activations, split, units
from relp_cli.nodes.kinds import NODE_KINDS, NodeKind


def effects(setup: Setup, hooks: Iterable[tuple[str, Hook]], example: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """L(run under the hooks) − L(run): row r of the one pass is the run's prompt example[r]. Rows count as forward passes."""
    rows = example.flatten()
    with torch.no_grad(), setup.model.hooks(list(hooks)):
        logits = setup.model.logits(setup.run[rows])
    setup.passes.forward += len(rows) / len(setup.batch)
    return (setup.value(logits, rows) - setup.prompt_value("run")[rows]).view(example.shape)


def every_pair(setup: Setup, n: int) -> Int[Tensor, "n pairs"]:
    """Numbers of the batch's pairs, n times: what `n` patches are tried on."""
    return torch.arange(len(setup.batch), device=setup.model.device).expand(n, -1)


def patch_sets(
    setup: Setup,
    source: Activations,
    masks: Mapping[tuple[str, int], Bool[Tensor, "sets pos units"]],
    example: Int[Tensor, "sets pairs"],
) -> Float[Tensor, "sets pairs"]:
    """L(run | n ← n(source) for all n of a set) − L(run), in one pass; masks: (node kind, layer) → which nodes a set has."""
    hooks = [
        (NODE_KINDS[kind].point(layer), _put(setup, NODE_KINDS[kind], mask, source[kind][layer], example))
        for (kind, layer), mask in masks.items()
    ]
    return effects(setup, hooks, example)


def patch_each(
    setup: Setup,
    source: Activations,
    at: tuple[NodeKind, int],
    nodes: Int[Tensor, "nodes 2"],
    example: Int[Tensor, "nodes pairs"] | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Tensor, "nodes pairs"]:
    """L(run | n ← n(source)) − L(run) of every node (slot, unit) of one (kind, layer) on its own, on its pairs `example` (all).

    Positions that share a slot are patched jointly.
    """
    kind, layer = at
    example = every_pair(setup, len(nodes)) if example is None else example
    size = fitting(example.shape[1] * setup.batch.n_pos, chunk_tokens)
    found = []
    for part, pairs in zip(nodes.split(size), example.split(size), strict=True):
        slot, unit = part.to(setup.model.device).unbind(1)
        mask = torch.zeros(len(part), setup.batch.n_pos, units(setup.model, kind), dtype=torch.bool, device=slot.device)
        mask[torch.arange(len(part), device=slot.device), :, unit] = setup.slots == slot[:, None]
        found.append(patch_sets(setup, source, {(kind.name, layer): mask}, pairs))
    return torch.cat(found)


def _put(setup: Setup, kind: NodeKind, mask: Tensor, source: Tensor, example: Tensor) -> Hook:
    def hook(value: Tensor) -> Tensor:
        current = split(setup.model, kind, value).unflatten(0, example.shape)
        new = split(setup.model, kind, source[example])
        return torch.where(mask[:, None, :, :, None], new, current).reshape(value.shape)

    return hook
