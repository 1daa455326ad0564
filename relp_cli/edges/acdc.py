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
from relp_cli.edges.setup import EdgeResult, EdgeSetup, Progress
from relp_cli.errors import RelpError
from relp_cli.methods.table import Params


class AcdcParams(Params):
    """tau: the change of the mean metric up to which an edge is cut."""

    tau: float = Field(default=0.01, ge=0)


def acdc(setups: Sequence[EdgeSetup], params: AcdcParams, progress: Progress | None) -> Iterator[EdgeResult]:
    """1 forward pass per edge over all pairs. Raises RelpError with positions="keep"."""
    if any(s.positions for s in setups):
        raise RelpError("acdc cuts an edge at all positions at once; use positions=sum")
    graph, device = setups[0].graph, setups[0].model.device
    sources = [s.source()[0] for s in setups]
    values = [s.base.prompt_value("run") for s in setups]
    cut = torch.zeros(1, *graph.mask.shape, dtype=torch.bool, device=device)
    scores = [v.new_zeros(len(v), *graph.mask.shape) for v in values]
    edges = [
        (u, v) for v in reversed(range(len(graph.readers))) for u in reversed(graph.mask[:, v].nonzero()[:, 0].tolist())
    ]
    for done, (u, v) in enumerate(edges):
        cut[0, u, v] = True
        new = []
        for setup, source in zip(setups, sources, strict=True):
            new.append(setup.base.value(edge_logits(setup.model, graph, setup.base.run, cut, source)))
            setup.base.passes.forward += 1
        for score, after, before in zip(scores, new, values, strict=True):
            score[:, u, v] = after - before
        if abs((torch.cat(new) - torch.cat(values)).mean().item()) <= params.tau:
            values = new
        else:
            cut[0, u, v] = False
        if progress:
            progress(done + 1, len(edges), "acdc edges")
    for score in scores:
        yield EdgeResult(score)
