"""Activation patching (RelP eq. 1), exactly: run with n(source) in place of n(run), one forward pass per node."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from relp_cli.methods.core import PerExample
from relp_cli.methods.setup import Setup
from relp_cli.methods.space import CHUNK_TOKENS, Batch
from relp_cli.methods.table import Params, Result
from relp_cli.nodes.access import Activations, split, units
from relp_cli.nodes.kinds import NodeKind


class ActPatchParams(Params):
    """chunk_tokens: how many tokens one forward pass may hold (units are patched in parallel rows)."""

    chunk_tokens: int = Field(default=CHUNK_TOKENS, gt=0)


def act_patch(on: Batch, params: ActPatchParams) -> Result:  # noqa: ARG001 - chunk_tokens is the batch's
    """Patch every unit on its own; positions that share a label are patched jointly."""
    return on.patch()


def patch_nodes(setup: Setup, source: Activations, chunk_tokens: int) -> PerExample:
    """c(n) of every node of every kind."""
    scores: PerExample = {}
    for kind in setup.kinds:
        n_units = units(setup.model, kind)
        nodes = [(slot, unit) for slot in range(len(setup.labels)) for unit in range(n_units)]
        layers = [
            patch_effects(setup, kind, layer, nodes, source[kind.name][layer], chunk_tokens)
            for layer in range(setup.model.shape.n_layers)
        ]
        shape = (len(setup.labels),) if kind.split == "vector" else (len(setup.labels), n_units)
        scores[kind.name] = torch.stack(layers, 1).unflatten(-1, shape)
    return scores


def patch_effects(
    setup: Setup,
    kind: NodeKind,
    layer: int,
    nodes: Sequence[tuple[int, int]],
    source: Float[Tensor, "batch pos width"],
    chunk_tokens: int,
) -> Float[Tensor, "batch nodes"]:
    """L(run | n ← n(source)) − L(run) for some (slot, unit) nodes of one layer."""
    rows = max(1, chunk_tokens // setup.run.numel())
    effects = [_patched_values(setup, kind, layer, nodes[i : i + rows], source) for i in range(0, len(nodes), rows)]
    return torch.cat(effects, 1) - setup.prompt_value("run")[:, None]


def _patched_values(
    setup: Setup, kind: NodeKind, layer: int, nodes: Sequence[tuple[int, int]], source: Tensor
) -> Float[Tensor, "batch nodes"]:
    n_units, device = units(setup.model, kind), setup.model.device
    where: Bool[Tensor, "nodes pos units"] = torch.zeros(
        len(nodes), setup.batch.n_pos, n_units, dtype=torch.bool, device=device
    )
    for row, (slot, unit) in enumerate(nodes):
        where[row, setup.slots == slot, unit] = True

    def patch(value: Tensor) -> Tensor:
        current = split(setup.model, kind, value).unflatten(0, (len(nodes), -1))
        patched = torch.where(where[:, None, :, :, None], split(setup.model, kind, source), current)
        return patched.reshape(value.shape)

    with torch.no_grad(), setup.model.hooks({kind.point(layer): patch}):
        logits = setup.model.logits(setup.run.repeat(len(nodes), 1))
    setup.passes.forward += len(nodes)
    return setup.value(logits).unflatten(0, (len(nodes), -1)).T
