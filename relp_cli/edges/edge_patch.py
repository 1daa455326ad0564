"""Exact edge patching: run with u(source) in place of u(run) in one reader's input, for every edge u→v.

All positions are patched jointly (an EAP score is the sum over them), or one at a time with positions="keep". Edges of
one reader are rows of one batch. Cost: one forward pass per edge (and position).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import Field
from torch import Tensor

from relp_cli.edges.gradients import Products
from relp_cli.edges.graph import QKV
from relp_cli.edges.reads import project, projections, reads
from relp_cli.edges.setup import EdgeResult, EdgeSetup, Progress
from relp_cli.edges.stream import ungrouped
from relp_cli.methods.table import Params
from relp_cli.models.model import Hook


class EdgePatchParams(Params):
    """chunk_tokens: how many tokens one forward pass may hold (edges are patched in parallel rows)."""

    chunk_tokens: int = Field(default=16384, gt=0)


def edge_patch(setups: Sequence[EdgeSetup], params: EdgePatchParams, progress: Progress | None) -> Iterator[EdgeResult]:
    """c(u→v) = L(run | u's part of v's input ← u(source)) − L(run), for every edge."""
    for done, setup in enumerate(setups):
        patcher = _Patcher.of(setup, params.chunk_tokens)
        readers = len(setup.graph.readers)
        for reader in range(readers):
            patcher.reader(reader)
            if progress:
                progress(done * readers + reader + 1, len(setups) * readers, "edge_patch readers")
        yield EdgeResult(patcher.out if setup.positions else patcher.out[:, 0])


@dataclass
class _Patcher:
    """deltas: Float[writer, batch, pos, d_model]; streams: the norms' inputs in the run; out: Float[batch, slot, writer, reader];
    slots: per slot (one for all positions, or one each) Bool[pos].
    """

    setup: EdgeSetup
    chunk_tokens: int
    deltas: Tensor
    streams: dict[str, Tensor]
    slots: Tensor
    out: Tensor = field(init=False)

    def __post_init__(self) -> None:
        batch, graph = len(self.setup), self.setup.graph
        self.out = self.deltas.new_zeros(batch, len(self.slots), *graph.mask.shape)

    @classmethod
    def of(cls, setup: EdgeSetup, chunk_tokens: int) -> _Patcher:
        source, _ = setup.source()
        streams: dict[str, Tensor] = {}

        def keep(name: str) -> Hook:
            return lambda value: streams.__setitem__(name, value)

        names = [reads(setup.model, n).stream for n in range(setup.graph.n_layers)]
        with setup.model.hooks([(name, keep(name)) for name in names]):
            run = setup.run()
        products = Products(setup.model, setup.graph, source - run)
        deltas = torch.cat([products.deltas(rows) for rows in products.parts], 1)
        base = setup.base
        slots = torch.ones(1, base.batch.n_pos, dtype=torch.bool, device=setup.model.device)
        if setup.positions:
            slots = base.slots[None] == torch.arange(len(base.labels), device=setup.model.device)[:, None]
        return cls(setup, chunk_tokens, deltas, streams, slots)

    def reader(self, reader: int) -> None:
        """All edges into one reader."""
        setup, graph = self.setup, self.setup.graph
        layer, within = divmod(reader, 3 * graph.n_heads + 1)
        writers = graph.mask[:, reader].nonzero()[:, 0].tolist()
        cells = [(slot, u) for slot in range(len(self.slots)) for u in writers]
        rows = max(1, self.chunk_tokens // setup.base.run.numel())
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
            with torch.no_grad(), ungrouped(setup.model), setup.model.hooks([hook]):
                logits = setup.model.logits(setup.base.run.repeat(len(part), 1))
            setup.base.passes.forward += len(part)
            effects = setup.base.value(logits).unflatten(0, (len(part), -1)) - setup.base.prompt_value("run")
            self.out[:, slot, u, reader] = effects.T.to(self.out.dtype)

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
