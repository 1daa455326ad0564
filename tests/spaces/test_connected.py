"""Connected edges: against every subset of tiny graphs, and as properties of larger ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from relp_cli.errors import RelpError
from relp_cli.selection import select
from relp_cli.spaces import connected as module
from relp_cli.spaces.connected import connected
from relp_cli.spaces.edges import edge_units
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.pruning import greedy
from relp_cli.spaces.scores import Scores


def ends_of(graph):
    """(writer, node that reads) of every edge, by name."""
    return [tuple(end.partition("<")[0] for end in name.split("->")) for name in graph.edge_names()]


def hangs_together(edges):
    """Whether each edge lies on a path from the input to the logits: a walk from both ends, node by node."""
    edges = list(edges)

    def walk(start, forward):
        seen, at = {start}, [start]
        while at:
            node = at.pop()
            for u, v in edges:
                one, two = (u, v) if forward else (v, u)
                if one == node and two not in seen:
                    seen.add(two)
                    at.append(two)
        return seen

    from_input, to_logits = walk("input", True), walk("logits", False)
    return all(u in from_input and v in to_logits for u, v in edges)


def best_by_hand(values, ends, k):
    sets = (s for s in itertools.combinations(range(len(ends)), k) if all(values[i] > -np.inf for i in s))
    return max((sum(values[i] for i in s) for s in sets if hangs_together(ends[i] for i in s)), default=None)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("kind", ["positive", "signed", "some missing"])
def test_the_best_of_all_subsets(parallel, kind):
    rng = np.random.default_rng(0)
    for layers, heads, ks in ((1, 1, range(8)), (1, 2, (1, 2, 3, 5)), (2, 1, (2, 3))):
        graph = Graph(layers, heads, parallel)
        ends = ends_of(graph)
        for _ in range(2):
            values = rng.exponential(size=len(ends)) if kind != "signed" else rng.standard_normal(len(ends))
            if kind == "some missing":
                values[rng.random(len(ends)) < 0.3] = rng.choice([-np.inf, np.nan])
            for k in (k for k in ks if k <= np.isfinite(values).sum()):
                want = best_by_hand(np.where(np.isnan(values), -np.inf, values), ends, k)
                if want is None:
                    with pytest.raises(RelpError, match="lie on paths"):
                        connected(graph, torch.from_numpy(values)[None], k)
                    continue
                found = connected(graph, torch.from_numpy(values)[None], k)
                kept = found.mask.nonzero()[:, 0].tolist()
                assert len(kept) == k
                assert hangs_together(ends[i] for i in kept)
                assert values[kept].sum() == pytest.approx(want, abs=1e-9)
                assert found.gap == 0


@pytest.mark.parametrize("few", [False, True])
def test_larger_graphs_hang_together_and_beat_what_else_does(few, monkeypatch):
    graph, rng = Graph(4, 3), np.random.default_rng(1)
    ends = ends_of(graph)
    values = torch.from_numpy(rng.lognormal(sigma=2, size=graph.n_edges))[None]
    if few:  # as in a graph of very many edges: the strongest, and those of each node
        monkeypatch.setattr(module, "CANDIDATES", 20)
        monkeypatch.setattr(module, "PER_EDGE", 1)
    for k in (1, 7, 30, 90):
        found = connected(graph, values, k)
        kept = found.mask.nonzero()[:, 0].tolist()
        assert len(kept) == k
        assert hangs_together(ends[i] for i in kept)
        strongest = values[0].topk(k).values.sum()
        assert found.share == pytest.approx(float(values[0, kept].sum() / strongest) if not few else found.share)
        assert found.share <= 1 + 1e-12
        assert (found.candidates < graph.n_edges) == few
        grown = greedy(graph, values, {"top_k": k}, 0.0)[0].nonzero()[:, 0].tolist()
        if not few and hangs_together(ends[i] for i in grown):
            assert values[0, kept].sum() >= values[0, grown].sum() - 1e-9


def test_selected_from_scores():
    graph = Graph(2, 2)
    values = torch.from_numpy(np.random.default_rng(2).standard_normal(graph.n_edges))
    scores = Scores(edge_units(graph), ("*",), "all", torch.tensor([5]), values, values, meta={"method": "eap"})
    circuit = select(scores, top_k=6, connected=True)
    assert circuit.n_nodes == 6
    assert hangs_together(tuple(end.partition("<")[0] for end in name.split("->")) for name in circuit.names())
    assert {"connected": True, "gap": 0.0, "candidates": graph.n_edges}.items() <= circuit.meta["selection"].items()
    wrong = {
        "takes top_k": {"threshold": 0.1},
        "is not greedy": {"top_k": 3, "greedy": True},
        "top_k must": {"top_k": 10**6},
    }
    for why, how in wrong.items():
        with pytest.raises(RelpError, match=why):
            select(scores, connected=True, **how)
    with pytest.raises(RelpError, match="one score per edge"):
        connected(graph, values.repeat(2, 1), 3)
