"""Edges of feature circuits: against the oracle, finite differences, and that the edges out of a node sum to its score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import scores as S
from oracles.forward import embed, forward
from oracles.make import exact_float64
from oracles.wrapped import case, close, double_by_default, pairs, run
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.features.edges import feature_edges
from relp_cli.features.load import Dictionaries, load_dictionaries
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.feature_graph import METRIC, FeatureEdges, FeatureNode, parse_node
from relp_cli.spaces.features import FeatureScores, feature_circuit, feature_masks, feature_nodes, without_errors
from relp_cli.spaces.sites import Site

from .folders import auto_encoder_state, write_learning

RULES: dict[str, frozenset[str]] = {"atp": frozenset(), "relp": frozenset({"ln", "identity"})}
# Sites that the oracle names (it has no node behind the last block), in the order of a forward pass.
NAMED = ("attn_out_layer0", "mlp_out_layer0", "resid_out_layer0", "attn_out_layer1", "mlp_out_layer1", "mlp_out_layer2")
ALL = tuple(f"{kind}_out_layer{n}" for n in range(3) for kind in ("attn", "mlp", "resid"))


@pytest.fixture(scope="session")
def dicts(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dictionaries]:
    root = tmp_path_factory.mktemp("edges")

    @cache
    def at(shape: str, names: tuple[str, ...] = NAMED, size: int = 12) -> Dictionaries:
        folder = root / f"{shape}-{len(names)}-{size}"
        for i, name in enumerate(names):
            write_learning(folder / name, auto_encoder_state(32, size, 10 * i, bias=0.2), None)
        return load_dictionaries(folder, case(shape).model)

    return at


def everything(found: Dictionaries, labels: tuple[str, ...], **meta: Any) -> Circuit:
    return feature_circuit(
        {s: torch.ones(len(labels), d.n_features, dtype=torch.bool) for s, d in found.items()},
        {s: torch.ones(len(labels), dtype=torch.bool) for s in found}, labels, "all", meta,
    )  # fmt: skip


def positions(*roles: str) -> tuple[str, ...]:
    return roles or tuple(str(i) for i in range(6))


def found_edges(shape: str, circuit: Circuit, method: str, batches: Any = None, **options: Any) -> FeatureEdges:
    c = case(shape)
    with exact_float64(), double_by_default():
        return feature_edges(c.model, batches or [c.batch], circuit, method, **options)


def scores_of(found: Dictionaries) -> FeatureScores:
    return run(case("pythia"), "atp", ["feature"], dictionary=found)["feature"]  # type: ignore[return-value]


def some_nodes(found: Dictionaries, per_site: int = 9) -> Circuit:
    """A few features at several positions and an error term of every site."""
    circuit = everything(found, positions())
    rng = torch.Generator().manual_seed(0)
    masks = feature_masks(circuit)
    features = {s: torch.rand(m.shape, generator=rng) < per_site / m.numel() for s, (m, _) in masks.items()}
    errors = {s: torch.arange(6) == 5 - i % 3 for i, s in enumerate(masks)}
    return feature_circuit(features, errors, circuit.labels, meta=circuit.meta)


class Oracle:
    """The definition in plain torch: every site's tensor a leaf, one full Jacobian-vector product per pair of nodes."""

    def __init__(self, shape: str, found: Dictionaries, method: str, direction: str, baseline: str = "patch") -> None:
        c = case(shape)
        assert c.batch.patch is not None
        self.c, self.found = c, found
        rules = RULES.get(method, frozenset())
        ids, other_ids = S.pick(direction, c.batch.original, c.batch.patch)
        self.base, other = forward(c.weights, c.config, ids), forward(c.weights, c.config, other_ids)
        self.delta = {}
        for site in found:
            (f, e), (f2, e2) = (self.parts(site, self.at(t, site).detach()) for t in (self.base, other))
            self.delta[site] = (f2 - f, e2 - e) if baseline == "patch" else (-f, -e)
        self.g = {site: torch.zeros(()) for site in found}
        if method == "ig_inputs":  # the mean gradient over 3 midpoints
            start, end = (embed(c.weights, c.config, i) for i in (ids, other_ids))
            runs = [start + (k + 0.5) / 3 * (end - start) for k in range(3)]
        else:
            runs = [ids]
        for tokens in runs:
            trace = forward(c.weights, c.config, tokens, rules)
            grads = torch.autograd.grad(c.metric(trace.logits).sum(), [self.at(trace, s) for s in found])
            self.g = {s: self.g[s] + g / len(runs) for s, g in zip(found, grads, strict=True)}
        self.leaves: dict[Site, Tensor] = {}
        self.reached: dict[Site, Tensor] = {}
        self.direct = {site: torch.zeros(()) for site in found}

        def link(site: Site) -> Callable[[Tensor], Tensor]:
            def swap(x: Tensor) -> Tensor:
                self.reached[site], self.leaves[site] = x, x.detach().requires_grad_()
                return self.leaves[site]

            return swap

        for tokens in [*runs, ids]:  # the last one stays
            linked = forward(c.weights, c.config, tokens, rules, {self.name(s): link(s) for s in found})
            ends = list(self.leaves.values())
            grads = torch.autograd.grad(
                c.metric(linked.logits).sum(), ends, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            if tokens is not ids or runs[0] is ids:
                self.direct = {s: self.direct[s] + g / len(runs) for s, g in zip(self.leaves, grads, strict=True)}
            if runs[0] is ids:
                break

    def name(self, site: Site) -> tuple[str, int]:
        return ("resid_pre", site.layer + 1) if site.kind == "resid" else (f"{site.kind}_out", site.layer)

    def at(self, trace: Any, site: Site) -> Tensor:
        kind, layer = self.name(site)
        return trace[kind][layer]

    def parts(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        d = self.found[site]
        f = ((x - d.b_dec) @ d.w_enc + d.b_enc).clamp(min=0)
        return f, x - f @ d.w_dec - d.b_dec

    def edge(self, u: FeatureNode, v: FeatureNode | None) -> Tensor:
        """Per example; None: the metric."""
        p = int(u.position)
        if v is None:
            h = self.direct[u.site]
        else:
            q, (f, e), g = int(v.position), self.parts(v.site, self.reached[v.site]), self.g[v.site]
            if v.feature is None:
                value = (e[:, q] * g[:, q]).sum()
            else:
                value = (f[:, q, v.feature] * (g[:, q] @ self.found[v.site].w_dec[v.feature])).sum()
            (h,) = torch.autograd.grad(
                value, self.leaves[u.site], retain_graph=True, allow_unused=True, materialize_grads=True
            )
        delta_f, delta_e = self.delta[u.site]
        if u.feature is None:
            return (delta_e[:, p] * h[:, p]).sum(-1)
        return delta_f[:, p, u.feature] * (h[:, p] @ self.found[u.site].w_dec[u.feature])


@pytest.mark.parametrize(
    ("shape", "method", "options"),
    [
        ("pythia", "relp", {}),
        ("pythia", "atp", {"direction": "denoising"}),
        ("pythia", "ig_inputs", {"steps": 3}),
        ("gpt2", "relp", {}),
        ("gpt2", "atp", {"baseline": "zero"}),
        ("gemma2", "atp", {}),
    ],
)
def test_edges_against_the_oracle(
    dicts: Callable[..., Dictionaries], shape: str, method: str, options: dict[str, Any]
) -> None:
    circuit = some_nodes(dicts(shape))
    got = found_edges(shape, circuit, method, dictionary=dicts(shape), **options)
    plain = {k: v for k, v in options.items() if k != "steps"}
    oracle = Oracle(shape, dicts(shape), method, **{"direction": "noising", **plain})
    names = dict(zip(got.names(), zip(got.mean, got.variance, strict=True), strict=True))
    assert len(names) > 60
    nodes = feature_nodes(circuit)
    for u in nodes:
        for v in (*nodes, None):
            want = oracle.edge(u, v) if v is None or u.site < v.site else torch.zeros(4)
            mean, variance = names.get((u.name, METRIC if v is None else v.name), (torch.zeros(()), torch.zeros(())))
            close(mean, want.mean())
            close(variance, want.var())


@pytest.mark.parametrize("shape", ["pythia", "gpt2", "qwen2", "gemma2"])
@pytest.mark.parametrize("method", ["atp", "relp", "relp+two_point"])
def test_edges_out_of_a_node_sum_to_its_score(dicts: Callable[..., Dictionaries], shape: str, method: str) -> None:
    """With every feature and error term of every site as a target, all paths out of a node are counted once."""
    found = dicts(shape, ALL, 10)
    scores = run(case(shape), method, ["feature"], dictionary=found)["feature"]
    assert isinstance(scores, FeatureScores)
    edges = found_edges(shape, everything(found, ("*",)), method, dictionary=found)
    total = torch.zeros(len(edges.nodes), dtype=torch.float64).index_add_(0, edges.index[:, 0], edges.mean)
    want = [
        (scores.error_mean[scores.at(n.site)] if n.feature is None else scores.dense(n.site)[:, n.feature]).sum()
        for n in edges.nodes
    ]
    close(total, torch.stack(want))
    direct = {name for name, t in edges.names() if t == METRIC}
    assert {parse_node(name).site for name in direct} == {
        Site("resid", 2)
    }  # the residual stream stands in every other path


@pytest.mark.parametrize("method", ["ig_inputs", "ig_activations"])
def test_behind_the_last_site_an_edge_to_the_metric_is_the_node_score(
    dicts: Callable[..., Dictionaries], method: str
) -> None:
    """Whatever a method's gradient is, it is the same along direct paths; with these sites only the last one has all."""
    found = dicts("pythia", ("attn_out_layer0", "resid_out_layer1", "mlp_out_layer2", "resid_out_layer2"), 10)
    options = {"steps": 3, "chunk_tokens": 60}  # two points at once, then one
    scores = run(case("pythia"), method, ["feature"], dictionary=found, **options)["feature"]
    assert isinstance(scores, FeatureScores)
    edges = found_edges("pythia", everything(found, positions()), method, dictionary=found, **options)
    direct = {u: score for (u, v), score in zip(edges.names(), edges.mean, strict=True) if v == METRIC}
    assert {parse_node(name).site for name in direct} == {Site("resid", 2)}
    for name, score in direct.items():
        node = parse_node(name)
        p = int(node.position)
        close(score, scores.error_mean[-1, p] if node.feature is None else scores.dense(node.site)[p, node.feature])


@pytest.mark.parametrize("shape", ["pythia", "gpt2"])
def test_edges_against_finite_differences(dicts: Callable[..., Dictionaries], shape: str) -> None:
    """An edge is how much ∂L/∂v · v moves per step of u towards the source, all other sites held at their run values."""
    c, found = case(shape), dicts(shape, ALL, 10)
    assert c.batch.patch is not None
    edges = found_edges(shape, everything(found, positions()), "atp", dictionary=found)
    seen: dict[Site, Tensor] = {}

    def run_with(tokens: Tensor, hooks: dict[str, Any]) -> dict[Site, Tensor]:
        with exact_float64(), torch.no_grad(), c.model.hooks(hooks):
            c.model.logits(tokens)
        return dict(seen)

    def keep(site: Site) -> Callable[[Tensor], None]:
        return lambda x: seen.__setitem__(site, x)

    plain = run_with(c.batch.original, {s.point: keep(s) for s in found})
    other = run_with(c.batch.patch, {s.point: keep(s) for s in found})
    strongest = edges.strongest(4000)
    for wanted in (("feature", "feature"), ("feature", "error"), ("error", "feature"), ("error", "error")):
        number = next(
            i for i, (u, v) in enumerate(strongest.index.tolist())
            if v < len(edges.nodes)
            and tuple("error" if edges.nodes[n].feature is None else "feature" for n in (u, v)) == wanted
        )  # fmt: skip
        u, v = (edges.nodes[n] for n in strongest.index[number].tolist())
        p, q = int(u.position), int(v.position)
        (f, e), (f2, e2) = (found[u.site].split(t[u.site]) for t in (plain, other))
        move = torch.zeros_like(plain[u.site])
        move[:, p] = (
            (e2 - e)[:, p] if u.feature is None else (f2 - f)[:, p, u.feature, None] * found[u.site].w_dec[u.feature]
        )

        def clamp(site: Site, x: Tensor) -> Callable[[Tensor], Tensor]:
            def hook(value: Tensor) -> Tensor:
                seen[site] = value
                return x

            return hook

        def value(t: float, u: FeatureNode = u, v: FeatureNode = v, move: Tensor = move, q: int = q) -> Tensor:
            hooks = {s.point: clamp(s, x + t * move if s == u.site else x) for s, x in plain.items()}
            f, e = found[v.site].split(run_with(c.batch.original, hooks)[v.site])
            return e[:, q] if v.feature is None else f[:, q, v.feature, None]

        slope = (value(1e-6) - value(-1e-6)) / 2e-6
        with exact_float64():
            leaf = plain[v.site].clone().requires_grad_()
            with c.model.hooks({v.site.point: lambda _, leaf=leaf: leaf}):
                (g,) = torch.autograd.grad(c.metric(c.model.logits(c.batch.original)[:, None]).sum(), leaf)
        weight = g[:, q] if v.feature is None else (g[:, q] @ found[v.site].w_dec[v.feature])[:, None]
        close(strongest.mean[number], (slope * weight).sum(-1).mean(), 1e-6)


def test_a_node_at_all_positions_sums_over_them(dicts: Callable[..., Dictionaries]) -> None:
    found = dicts("pythia", NAMED, 12)
    chosen = [FeatureNode(s, "*", unit) for s in found for unit in (1, 5)]

    def circuit(labels: tuple[str, ...]) -> Circuit:
        features = {s: torch.zeros(len(labels), d.n_features, dtype=torch.bool) for s, d in found.items()}
        for node in chosen:
            features[node.site][:, node.feature] = True
        whole = everything(found, labels)
        errors = {s: e for s, (_, e) in feature_masks(whole).items()}
        return feature_circuit(features, errors, labels, meta=whole.meta)

    roles = ("a", "b", "b", "c", "d", "d")
    every, role, one = (
        found_edges("pythia", circuit(labels), "relp", batch, dictionary=found)
        for labels, batch in ((positions(), None), (("a", "b", "c", "d"), [pairs(roles=roles)]), (("*",), None))
    )

    def summed(edges: FeatureEdges, rename: Callable[[str], str]) -> dict[tuple[str, str], float]:
        out: dict[tuple[str, str], float] = {}
        for (u, v), score in zip(edges.names(), edges.mean.tolist(), strict=True):
            ends = tuple(
                n if n == METRIC else replace(m := parse_node(n), position=rename(m.position)).name for n in (u, v)
            )
            out[ends] = out.get(ends, 0) + score
        return out

    for joint, rename in ((role, lambda p: roles[int(p)]), (one, lambda _: "*")):
        want, got = summed(every, rename), summed(joint, lambda p: p)
        assert got.keys() == want.keys()
        close(torch.tensor([got[k] for k in want]), torch.tensor(list(want.values())))
    assert every.n.unique().tolist() == [4]


def test_examples_without_a_position_do_not_count(dicts: Callable[..., Dictionaries]) -> None:
    """Two lengths: an edge's n is how many examples have both ends, and its mean is over these."""
    found = dicts("pythia")
    short, long = (
        pairs(n=2, pos=5, seed=5, roles=("a", "b", "c", "d", "end")),
        pairs(roles=("a", "b", "x", "c", "d", "end")),
    )
    labels = ("a", "b", "x", "c", "d", "end")
    circuit = replace(some_nodes(found, 12), labels=labels)
    both = found_edges("pythia", circuit, "atp", [short, long], dictionary=found)
    alone = found_edges("pythia", circuit, "atp", [long], dictionary=found)
    first = found_edges("pythia", circuit, "atp", [short], dictionary=found)
    counts = dict(zip(both.names(), both.n.tolist(), strict=True))
    assert {n for (u, v), n in counts.items() if "@x" in u + v} == {4}
    assert {n for (u, v), n in counts.items() if "@x" not in u + v} == {6}
    means = [dict(zip(e.names(), e.mean.tolist(), strict=True)) for e in (both, alone, first)]
    for name, n in counts.items():
        close(torch.tensor(means[0][name] * n), torch.tensor(4 * means[1].get(name, 0) + 2 * means[2].get(name, 0)))


def test_batches_do_not_change_edges(dicts: Callable[..., Dictionaries]) -> None:
    found = dicts("gpt2")
    circuit = some_nodes(found)
    whole, small = (found_edges("gpt2", circuit, "relp", dictionary=found, batch_size=n) for n in (32, 1))
    assert whole.names() == small.names()
    close(whole.mean, small.mean)
    close(whole.variance, small.variance)


def test_threshold_paths_and_files(dicts: Callable[..., Dictionaries], tmp_path: Path) -> None:
    found = dicts("pythia")
    scores = run(case("pythia"), "atp", ["feature"], dictionary=found)["feature"]
    circuit = select(scores, top_k=20)
    edges = found_edges("pythia", circuit, None, dictionary=found)  # type: ignore[arg-type]
    assert (edges.meta["method"], edges.meta["n_nodes"]) == ("atp", 20)
    cut = float(edges.mean.abs().median())
    kept = edges.above(cut)
    assert len(kept) == int((edges.mean.abs() > cut).sum())
    assert kept.meta["n_scored"] == len(edges)
    assert kept.table().score.abs().is_monotonic_decreasing
    path = tmp_path / "circuit.json"
    replace(circuit, edges=kept).save(path)
    again = Circuit.load(path)
    assert again.edges is not None
    assert feature_nodes(again) == feature_nodes(circuit)
    assert again.edges.names() == kept.names()
    close(again.edges.mean, kept.mean)
    assert again.complement().edges is None
    assert without_errors(again, "none").edges is None
    path.write_text(path.read_text().replace(kept.names()[0][0], "mlp_out_layer0/9999@0"))
    with pytest.raises(RelpError, match=r"circuit.json: edges: 'mlp_out_layer0/9999@0' is no node"):
        Circuit.load(path)


def test_nodes_that_lead_to_the_metric() -> None:
    nodes = tuple(FeatureNode(Site("resid", n), "*", n) for n in range(4))
    index = torch.tensor([[0, 1], [0, 2], [2, 4], [1, 3]])
    edges = FeatureEdges(nodes, index, torch.ones(4), torch.ones(4), torch.ones(4, dtype=torch.long))
    assert edges.reaching() == {0, 2}


def test_refusals(dicts: Callable[..., Dictionaries], monkeypatch: pytest.MonkeyPatch) -> None:
    found = dicts("pythia")
    circuit = some_nodes(found)
    with pytest.raises(
        RelpError,
        match=r"need gradients \(atp, relp, ig_inputs, expected_gradients, relp_ig, .*\), not method 'act_patch'",
    ):
        found_edges("pythia", circuit, "act_patch", dictionary=found)
    with pytest.raises(RelpError, match="unknown direction for features 'noise'"):
        found_edges("pythia", circuit, "atp", dictionary=found, direction="noise")
    with pytest.raises(RelpError, match="the circuit has no position 'a'"):
        found_edges("pythia", circuit, "atp", [pairs(n=3, pos=4, roles=("a", "b", "c", "end"))], dictionary=found)
    nothing = found_edges("pythia", select(scores_of(found), top_k=0), "atp", dictionary=found)
    assert (len(nothing), len(nothing.above(0).table()), nothing.reaching()) == (0, 0, set())
    with pytest.raises(RelpError, match="does not say its dictionary"):
        found_edges("pythia", circuit, "atp")
    monkeypatch.setattr("relp_cli.features.edges.MAX_NODES", 3)
    with pytest.raises(RelpError, match=r"among at most 3: select fewer"):
        found_edges("pythia", circuit, "atp", dictionary=found)
