"""Edges on every architecture, against the plain Hugging Face model run reader by reader."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import relp_cli as relp
from relp_cli.edges.run import edge_logits
from relp_cli.edges.stream import written
from relp_cli.errors import RelpError
from relp_cli.models.load import wrap
from relp_cli.models.model import Model
from relp_cli.spaces.edges import edge_circuit
from relp_cli.spaces.graph import Graph
from tests.oracles.plain import ROWS, build, ungrouped
from tests.oracles.wrapped import close, double_by_default, exact_float64, pairs

BATCH = pairs(2, 5)
FORMS = (
    "phi3-gqa",
    "gpt_bigcode",
    "gptj",
    "stablelm-qk",
    "olmo2",
)  # fused, one key, shared norm, norms of keys, no norm


@cache
def wrapped(name: str) -> Model:
    with exact_float64():
        return wrap(build(ROWS[name]), None, name)


def metric(logits: Tensor) -> Tensor:
    return (logits.gather(1, BATCH.answer) - logits.gather(1, BATCH.foil))[:, 0]


@pytest.mark.parametrize("name", ROWS)
def test_edges_equal_plain_hugging_face(name: str) -> None:
    """eap: autograd at each reader's own input; a circuit: every excluded edge ablated."""
    with exact_float64(), double_by_default():
        model, oracle = wrapped(name), ungrouped(name)
        run, source = oracle.run(BATCH.original), oracle.run(BATCH.patch)
        delta = {u: source.written[u] - run.written[u] for u in run.written}
        copies: dict[str, Tensor] = {}
        seen: dict[str, set[str]] = {}

        def fork(reader: str, x: Tensor, written: dict[str, Tensor]) -> Tensor:
            copies[reader], seen[reader] = torch.zeros_like(x).requires_grad_(), set(written)
            return x + copies[reader]

        with torch.enable_grad():
            value = metric(oracle.run(BATCH.original, fork).logits)
            slopes = dict(zip(copies, torch.autograd.grad(value.sum(), list(copies.values())), strict=True))

        scores = relp.score(model, [BATCH], "eap", ["edges"], keep_examples=True)["edges"]
        graph = scores.graph
        assert {
            r: {graph.writers[u] for u in graph.mask[:, v].nonzero()[:, 0]} for v, r in enumerate(graph.readers)
        } == seen
        names = [tuple(n.split("->")) for n in scores.edge_names()]
        close(scores.examples[:, 0], torch.stack([(delta[u] * slopes[v]).sum((1, 2)) for u, v in names], 1))

        rng = torch.Generator().manual_seed(0)
        mask = graph.mask & (torch.rand(graph.mask.shape, generator=rng) < 0.6)
        kept = {graph.name(u, v) for u, v in mask.nonzero().tolist()}

        def ablate(reader: str, x: Tensor, written: dict[str, Tensor]) -> Tensor:
            return x + sum(source.written[u] - y for u, y in written.items() if f"{u}->{reader}" not in kept)

        table = relp.evaluate(model, [BATCH], edge_circuit(graph, mask), "counterfactual", bootstrap=2)
        close(torch.tensor(table.F_C[0]), metric(oracle.run(BATCH.original, ablate).logits).mean())


@pytest.mark.parametrize("name", FORMS)
def test_edge_patch_equals_moving_one_readers_input(name: str) -> None:
    with exact_float64(), double_by_default():
        model, oracle = wrapped(name), ungrouped(name)
        run, source = oracle.run(BATCH.original), oracle.run(BATCH.patch)
        exact = relp.score(model, [BATCH], "edge_patch", ["edges"], keep_examples=True)["edges"]
        names = [tuple(n.split("->")) for n in exact.edge_names()]
        rng = torch.Generator().manual_seed(0)
        for i in torch.randperm(len(names), generator=rng)[:12].tolist():
            u, v = names[i]
            change = source.written[u] - run.written[u]
            moved = oracle.run(BATCH.original, lambda r, x, _, v=v, change=change: x + change if r == v else x)
            close(exact.examples[:, 0, i], metric(moved.logits) - metric(run.logits))


def test_relevance_reaches_an_mlp_that_shares_the_attentions_norm() -> None:
    """RelP's edges into a layer's readers, where an MLP reads attention's norm: Σ over u's edges = its node score."""
    with exact_float64(), double_by_default():
        model = wrapped("gptj")
        for rules in (["ln"], ["ln", "identity"], ["ln2", "act2"]):
            edges = relp.score(model, [BATCH], "relp_edges", ["edges"], rules=rules)["edges"]
            nodes = relp.score(model, [BATCH], "relp", ["resid_pre", "mlp_out"], rules=rules)
            close(edges.mean[0].sum(), nodes["resid_pre"].mean[0].sum())
            close(edges.mean[edges.writers.index("m0")].sum(), nodes["mlp_out"].mean[0].sum())


def test_an_assumption_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relp_cli.edges.reads._epsilon", lambda *_: 0.5)
    monkeypatch.setattr("relp_cli.edges.check._checked", set())
    with exact_float64(), pytest.raises(RelpError, match=r"llama .*edges do not know how layer 0's q reads"):
        relp.evaluate(wrapped("llama"), [BATCH], edge_circuit(Graph(2, 4), Graph(2, 4).mask), "zero")


@pytest.mark.parametrize("name", [*FORMS, "gemma2", "falcon"])
def test_shares_of_edges_equal_plain_hugging_face(name: str) -> None:
    """Value and gradient of a run in which every edge carries a share of its writer's source value, by plain autograd."""
    with exact_float64(), double_by_default():
        model, oracle = wrapped(name), ungrouped(name)
        graph, source = Graph.of(model.shape), oracle.run(BATCH.patch).written
        share = torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(1)).requires_grad_()

        def mix(reader: str, x: Tensor, before: dict[str, Tensor]) -> Tensor:
            v = graph.reader(reader)
            return x + sum(share[graph.writer(u), v] * (source[u] - y) for u, y in before.items())

        values = written(model, BATCH.patch)[0]
        with torch.enable_grad():
            want = metric(oracle.run(BATCH.original, mix).logits)
            (slopes,) = torch.autograd.grad(want.sum(), share)
            got = metric(edge_logits(model, graph, BATCH.original, share[None], values))
            (found,) = torch.autograd.grad(got.sum(), share)
    close(got.detach(), want.detach())
    close(found, slopes)
    assert slopes.abs().max() > 1e-3
