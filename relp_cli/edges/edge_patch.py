"""Exact edge patching: run with u(source) in place of u(run) in one reader's input, for every edge u→v.

All positions are patched jointly (an EAP score is the sum over them), or one at a time with positions="keep". Edges of
one reader are rows of one batch. Cost: one forward pass per edge (and position).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from relp_cli.edges.reads import project, projections, reads
from relp_cli.edges.stream import ungrouped
from relp_cli.methods.patching import effects, every_pair
from relp_cli.methods.room import fitting
from relp_cli.methods.setup import Setup
from relp_cli.models.model import Hook
from relp_cli.spaces.graph import QKV, Graph


@dataclass
class Patcher:
    """deltas: Float[writer, batch, pos, d_model], source − run; streams: the attention norms' inputs in the run, by hook
    point; slots: Bool[slot, pos], what is patched jointly; out: Float[batch, slot, writer, reader].
    """

    setup: Setup
    graph: Graph
    chunk_tokens: int
    deltas: Tensor
    streams: Mapping[str, Tensor]
    slots: Tensor
    out: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.deltas.new_zeros(len(self.setup.batch), len(self.slots), *self.graph.mask.shape)

    def reader(self, reader: int) -> None:
        """c(u→v) = L(run | u's part of v's input ← u(source)) − L(run) of all edges u→v into one reader v, into `out`."""
        setup, graph = self.setup, self.graph
        layer, within = divmod(reader, 3 * graph.n_heads + 1)
        writers = graph.mask[:, reader].nonzero()[:, 0].tolist()
        cells = [(slot, u) for slot in range(len(self.slots)) for u in writers]
        rows = fitting(setup.run.numel(), self.chunk_tokens)
        for part in (cells[i : i + rows] for i in range(0, len(cells), rows)):
            slot, u = (torch.tensor(x, device=self.deltas.device) for x in zip(*part, strict=True))
            changes = self.deltas[u] * self.slots[slot][:, None, :, None]
            if reader == len(graph.readers) - 1:
                hook = ("ln_final.hook_in", self._added(changes))
            elif within == 3 * graph.n_heads:
                read = reads(setup.model, layer)
                hook = (read.mlp, self._through_norm(changes, layer) if read.shared else self._added(changes))
            else:
                kind, head = divmod(within, graph.n_heads)
                hook = (f"blocks.{layer}.attn.{QKV[kind]}.hook_out", self._projected(changes, layer, kind, head))
            with ungrouped(setup.model):
                found = effects(setup, [hook], every_pair(setup, len(part)))
            self.out[:, slot, u, reader] = found.T.to(self.out.dtype)

    def _added(self, changes: Tensor) -> Hook:
        return lambda value: (value + changes.flatten(0, 1)).to(value.dtype)

    def _through_norm(self, changes: Tensor, layer: int) -> Hook:
        read = reads(self.setup.model, layer)
        new = read.norm((self.streams[read.stream] + changes).flatten(0, 1))
        return lambda _: new

    def _projected(self, changes: Tensor, layer: int, kind: int, head: int) -> Hook:
        model = self.setup.model
        read = reads(model, layer)
        weight, bias = projections(model, layer)[kind]
        x = read.norm.centre(self.streams[read.stream] + changes)
        one = slice(head, head + 1)
        new = project(read.norm, x.flatten(0, 1)[None], weight[one], None if bias is None else bias[one])[0]

        def hook(value: Tensor) -> Tensor:
            parts = value.unflatten(-1, (model.shape.n_heads, -1)).clone()
            parts[:, :, head] = new
            return parts.flatten(-2)

        return hook
