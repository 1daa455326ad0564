"""ACDC (Conmy et al. 2023): greedy exact pruning at τ, as a baseline.

1. All edges are in. Readers are visited from the logits down, each one's writers from the last to the first.
2. An edge is cut (it carries u(source) from now on) if cutting it changes the mean metric over all pairs by at most τ.
3. Its score is that change, L(circuit without it) − L(circuit), so `select(scores, threshold=τ)` is ACDC's circuit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field

from relp_cli.edges.run import edge_logits
from relp_cli.edges.space import EdgeBatch
from relp_cli.errors import RelpError
from relp_cli.methods.table import Params, Result
from relp_cli.spaces.edges import KIND


class AcdcParams(Params):
    """tau: the change of the mean metric up to which an edge is cut."""

    tau: float = Field(default=0.01, ge=0)


def acdc(batches: Sequence[EdgeBatch], params: AcdcParams) -> Iterator[Result]:
    """1 forward pass per edge over all pairs. Raises RelpError with positions="keep"."""
    if any(on.positions for on in batches):
        raise RelpError("acdc cuts an edge at all positions at once; use positions=sum")
    graph, device = batches[0].graph, batches[0].model.device
    sources = [on.source for on in batches]
    values = [on.setup.prompt_value("run") for on in batches]
    cut = torch.zeros(1, *graph.mask.shape, dtype=torch.bool, device=device)
    scores = [v.new_zeros(len(v), *graph.mask.shape) for v in values]
    edges = [
        (u, v) for v in reversed(range(len(graph.readers))) for u in reversed(graph.mask[:, v].nonzero()[:, 0].tolist())
    ]
    for done, (u, v) in enumerate(edges):
        cut[0, u, v] = True
        new = []
        for on, source in zip(batches, sources, strict=True):
            new.append(on.setup.value(edge_logits(on.model, graph, on.setup.run, cut, source)))
            on.setup.passes.forward += 1
        for score, after, before in zip(scores, new, values, strict=True):
            score[:, u, v] = after - before
        if abs((torch.cat(new) - torch.cat(values)).mean().item()) <= params.tau:
            values = new
        else:
            cut[0, u, v] = False
        batches[0].tick((done + 1) * len(batches), len(edges), "acdc edges")
    for score in scores:
        yield Result({KIND: score})
