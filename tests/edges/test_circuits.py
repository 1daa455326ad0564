"""Edge circuits: runs against the oracle, limits, pruning, selection, tables, files, exchange, neuron edges."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import relp_cli as relp
from relp_cli.edges.exchange import export_circuit, import_circuit
from relp_cli.edges.neurons import Neuron, neuron_edges
from relp_cli.edges.run import edge_logits
from relp_cli.edges.stream import written
from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation_table import ABLATIONS
from relp_cli.evaluation.edge_ablation import EdgeAblation
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.edges import circuit_of_names, edge_circuit, edge_mask
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.pruning import prune
from tests.oracles import edges as oracle
from tests.oracles.forward import forward
from tests.oracles.make import SHAPES, exact_float64
from tests.oracles.wrapped import Case, case, close, hook_count, pairs, run


def outcome(f: Callable[[], Any]) -> Any:
    """f() in float64 throughout."""
    with exact_float64():
        return f()


def graph_of(c: Case) -> Graph:
    return Graph.of(c.model.shape)


def some(graph: Graph, share: float = 0.5, seed: int = 0, pos: int = 1) -> Tensor:
    draw = torch.rand(pos, *graph.mask.shape, generator=torch.Generator().manual_seed(seed))
    return (draw < share) & graph.mask


def ablated_by_hand(c: Case, name: str) -> dict[str, Tensor]:
    w, config, original, patch = c.prompts
    if name == "mean_task":
        both = oracle.run(w, config, torch.cat([original, patch])).written
        return {u: x.mean(0, keepdim=True) for u, x in both.items()}
    source = oracle.run(w, config, patch).written
    how = {
        "mean": lambda x: x.mean(0, keepdim=True),
        "mean_all": lambda x: x.mean((0, 1), keepdim=True),
        "zero": torch.zeros_like,
        "counterfactual": lambda x: x,
    }
    return {u: how[name](x) for u, x in source.items()}


@pytest.mark.parametrize("ablation", [a for a, row in ABLATIONS.items() if row.serves("edges")])
@pytest.mark.parametrize("shape", SHAPES)
def test_circuits_run_as_the_oracle_says(shape: str, ablation: str) -> None:
    c = case(shape)
    graph, kept = graph_of(c), some(graph_of(c))[0]
    names = {(graph.writers[u], graph.readers[v]) for u, v in kept.nonzero().tolist()}
    w, config, original, _ = c.prompts
    want = oracle.circuit_logits(w, config, original, names, ablated_by_hand(c, ablation))[:, -1]
    tokens = ABLATIONS[ablation].tokens(c.batch, 0)
    values = outcome(lambda: EdgeAblation.prepare(c.model, [c.batch], ablation).values(c.model, c.batch, tokens))
    close(outcome(lambda: edge_logits(c.model, graph, original, ~kept[None], values)), want, 1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_edges_are_the_model_and_none_the_ablated_one(shape: str) -> None:
    c = case(shape)
    graph, original, patch = graph_of(c), c.batch.original, c.batch.patch
    before = hook_count(c.model)
    with exact_float64():
        source, wanted = written(c.model, patch)
        full = c.model.logits(original)
        close(edge_logits(c.model, graph, original, torch.zeros_like(graph.mask)[None], source), full, 1e-12)
        close(edge_logits(c.model, graph, original, graph.mask[None], source), wanted, 1e-12)
        own, _ = written(c.model, original)  # ablating with its own values changes nothing, whatever is cut
        close(edge_logits(c.model, graph, original, some(graph), own), full, 1e-12)
        one = edge_logits(c.model, graph, original[2:3], some(graph), source.map(lambda t: t[2:3]))
        close(one, edge_logits(c.model, graph, original, some(graph), source)[2:3], 1e-12)
    assert hook_count(c.model) == before


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma2"])
def test_circuits_per_position(shape: str) -> None:
    c = case(shape)
    graph, n = graph_of(c), c.batch.n_pos
    excluded = some(graph, pos=n)
    w, config, original, patch = c.prompts
    source = oracle.run(w, config, patch).written

    def edit(reader: str, x: Tensor, running: Mapping[str, Tensor]) -> Tensor:
        v = graph.reader(reader)
        for u, value in running.items():
            x = x + excluded[:, graph.writer(u), v, None] * (source[u] - value)
        return x

    want = oracle.run(w, config, original, edit).logits[:, -1]
    with exact_float64():
        close(edge_logits(c.model, graph, original, excluded, written(c.model, patch)[0]), want, 1e-9)
    circuit = edge_circuit(graph, graph.mask & ~excluded, labels=[str(i) for i in range(n)])
    table = outcome(lambda: relp.evaluate(c.model, [c.batch], circuit, ablation="counterfactual", bootstrap=5))
    assert table.F_C[0] == pytest.approx(c.metric(want[:, None]).mean().item(), abs=1e-9)


@pytest.mark.parametrize("ablation", [a for a, row in ABLATIONS.items() if row.serves("edges")])
@pytest.mark.parametrize("shape", SHAPES)
def test_faithfulness_table(shape: str, ablation: str) -> None:
    c = case(shape)
    graph, kept = graph_of(c), some(graph_of(c))
    circuits = [
        edge_circuit(graph, graph.mask[None]),
        edge_circuit(graph, torch.zeros_like(kept)),
        edge_circuit(graph, kept),
    ]
    table = outcome(
        lambda: relp.evaluate(c.model, [c.batch], circuits, ablation=ablation, bootstrap=20, random_circuits=1)
    )
    assert (table.faithfulness[0], table.completeness[0]) == pytest.approx((1, 0), abs=1e-9)
    assert (table.faithfulness[1], table.completeness[1]) == pytest.approx((0, 1), abs=1e-9)
    half = table.iloc[2]
    assert half.faithfulness == pytest.approx((half.F_C - half.F_empty) / (half.F_M - half.F_empty))
    assert (half.n_nodes, half.n_possible, half.exclude_layers) == (int(kept.sum()), graph.n_edges, 0)
    nodes = relp.Circuit.from_mask("mlp_out", torch.ones(3, c.batch.n_pos, dtype=torch.bool))
    same = outcome(lambda: relp.evaluate(c.model, [c.batch], nodes, bootstrap=20, random_circuits=1))
    assert list(table.columns) == list(same.columns)
    other = outcome(
        lambda: relp.evaluate(c.model, [c.batch], circuits[2].complement(), ablation=ablation, bootstrap=20)
    )
    assert other.faithfulness[0] == pytest.approx(half.completeness)


def test_excluded_layers_keep_their_edges() -> None:
    c = case("gpt2")
    graph = graph_of(c)
    empty = edge_circuit(graph, torch.zeros_like(graph.mask)[None])
    lower = torch.zeros_like(graph.mask)
    lower[:, graph.readers_of(0)] = graph.mask[:, graph.readers_of(0)]
    options = {"ablation": "counterfactual", "bootstrap": 5}
    with exact_float64():
        table = relp.evaluate(c.model, [c.batch], empty, exclude_layers=1, **options)
        by_hand = relp.evaluate(c.model, [c.batch], edge_circuit(graph, lower[None]), **options)
    assert table.F_C[0] == table.F_empty[0] == pytest.approx(by_hand.F_C[0])
    assert table.n_possible[0] == graph.n_edges - int(lower.sum())
    drawn = edge_circuit(graph, some(graph)).random_like(3, 1)
    assert torch.equal(edge_mask(drawn)[..., graph.readers_of(0)], some(graph)[..., graph.readers_of(0)])
    assert int(drawn.mask.sum()) == int(some(graph).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_pruning_changes_only_what_it_says(shape: str) -> None:
    c = case(shape)
    graph = graph_of(c)
    for share in (0.03, 0.08, 0.2):
        whole = edge_circuit(graph, some(graph, share, seed=int(100 * share)))
        out, both = prune(whole), prune(whole, from_input=True)
        for name in [a for a, row in ABLATIONS.items() if row.serves("edges")]:
            with exact_float64():
                table = relp.evaluate(c.model, [c.batch], [whole, out, both], ablation=name, bootstrap=5)
            # Under zero ablation a stream may be 0 up to rounding, which an RMSNorm divides by √eps.
            assert table.F_C[1] == pytest.approx(table.F_C[0], abs=1e-8)
            if name == "counterfactual":
                assert table.F_C[2] == pytest.approx(table.F_C[0], abs=1e-8)
            assert ("counterfactual" in table.note[2]) == (name != "counterfactual")
    assert whole.n_edges > out.n_edges >= both.n_edges or shape == "gemma2"


def test_pruning_without_the_input_leaves_nothing() -> None:
    graph = Graph(2, 2)
    circuit = circuit_of_names(graph, ["a0.h0->m0", "m0->logits", "a0.h1->a1.h0<v>", "a1.h0->m1"])
    assert prune(circuit).edge_names() == ["a0.h0->m0", "m0->logits"]
    assert prune(circuit, from_input=True).n_edges == 0
    reached = prune(circuit_of_names(graph, ["input->a0.h0<k>", *circuit.edge_names()]), from_input=True)
    assert reached.edge_names() == ["input->a0.h0<k>", "a0.h0->m0", "m0->logits"]


def test_selection() -> None:
    c = case("qwen2")
    scores = run(c, "eap_ig", ["edges"])
    edges = scores["edges"]
    flat = edges.mean[edges.mask]
    assert relp.select(scores, threshold=-1).n_edges == edges.n_edges == relp.select(edges, top_p=1.0).n_edges
    assert relp.select(scores, threshold=float("inf")).n_edges == 0
    assert torch.equal(edge_mask(relp.select(edges, threshold=0.05))[0], edges.mean.abs() > 0.05)
    assert torch.equal(edge_mask(relp.select(edges, threshold=0.05, sign="negative"))[0], edges.mean < -0.05)
    assert relp.select(edges, top_k=17).n_edges == 17
    last, below = flat.abs().sort(descending=True).values[16:18].tolist()
    assert below <= relp.select(edges, top_k=17).meta["selection"]["tau"] < last
    assert edge_mask(relp.select(edges, top_k=17, from_layer=1))[0, :, edges.graph.readers_of(0)].sum() == 0
    kept = run(c, "eap", ["edges"], positions="keep")
    assert relp.select(kept, top_k=40).mask.shape[0] == c.batch.n_pos
    summed = relp.select(kept, top_k=40, aggregate="sum")
    assert torch.equal(summed.mask, relp.select(run(c, "eap", ["edges"]), top_k=40).mask)
    two = [pairs(3, 6, roles=tuple("abcdef")), pairs(2, 5, roles=tuple("abgef"))]  # c, d and g are not in all
    anywhere, each = (run(c, "eap", ["edges"], two, positions=positions) for positions in ("sum", "keep"))
    torch.testing.assert_close(each.summed(each.mean), anywhere.mean, rtol=1e-9, atol=1e-12)
    for bad in ({"top_k": 3, "prune": "some"}, {}, {"top_p": 0.5, "greedy": True}, {"top_k": 3, "threshold": 1}):
        with pytest.raises(RelpError):
            relp.select(edges, **bad)
    with pytest.raises(RelpError, match="positions=sum"):
        relp.select(kept, top_k=3, greedy=True)
    with pytest.raises(RelpError, match="can be selected with greedy"):
        relp.select(run(c, "atp", ["mlp_out"]), top_k=3, greedy=True)


def test_greedy_selection_takes_the_best_edge_into_the_circuit() -> None:
    c = case("gpt2")
    edges = run(c, "eap", ["edges"])["edges"]
    circuit = relp.select(edges, top_k=25, greedy=True)
    assert circuit.n_edges == 25 == prune(circuit).n_edges
    inside, kept = {"logits"}, set(circuit.edge_names())
    strength = dict(zip(edges.edge_names(), edges.mean[edges.mask].abs().tolist(), strict=True))
    for _ in range(25):
        fringe = [n for n in strength if n.partition("->")[2].partition("<")[0] in inside]
        best = max(fringe, key=lambda n: strength[n])
        assert best in kept
        inside.add(best.partition("->")[0])
        del strength[best]
    assert relp.select(edges, threshold=0.05, greedy=True).n_edges <= relp.select(edges, threshold=0.05).n_edges


def test_acdc_is_its_scores_at_its_threshold() -> None:
    c = case("gpt2", layers=2)  # it is a loop over edges, of which there are half as many
    graph, tau = graph_of(c), 0.05
    scores = run(c, "acdc", ["edges"], tau=tau)
    again = run(c, "acdc", ["edges"], tau=tau, batch_size=2)
    close(scores["edges"].mean, again["edges"].mean)
    circuit = relp.select(scores, threshold=tau)
    cut = torch.zeros_like(graph.mask)
    with exact_float64():
        source, _ = written(c.model, c.batch.patch)

        def value(mask: Tensor) -> float:
            logits = edge_logits(c.model, graph, c.batch.original, mask[None], source)
            return c.metric(logits[:, None]).mean().item()

        current = value(cut)
        for v in reversed(range(len(graph.readers))):
            for u in reversed(graph.mask[:, v].nonzero()[:, 0].tolist()):
                cut[u, v] = True
                new = value(cut)
                if abs(new - current) <= tau:
                    current = new
                else:
                    cut[u, v] = False
    assert torch.equal(edge_mask(circuit)[0], graph.mask & ~cut)
    assert 0 < circuit.n_edges < graph.n_edges


@pytest.mark.parametrize("shape", ["pythia", "gemma2"])
def test_information_flow_by_hand(shape: str) -> None:
    c = case(shape)
    scores = run(c, "information_flow", ["edges"])["edges"]
    w, config, original, _ = c.prompts
    streams: dict[str, Tensor] = {}
    plain = oracle.run(w, config, original, lambda r, x, _: streams.setdefault(r, x))
    for v in ("a1.h2<k>", "m2", "logits"):
        column, stream = scores.readers.index(v), streams[v]
        writers = [scores.writers[u] for u in scores.mask[:, column].nonzero()[:, 0].tolist()]
        near = torch.stack(
            [(stream.abs().sum(-1) - (plain.written[u] - stream).abs().sum(-1)).clamp(min=0) for u in writers]
        )
        share = near / near.sum(0)
        want = share[..., -1] if v == "logits" else share.mean(-1)
        close(scores.mean[scores.mask[:, column], column], want.mean(-1))
    assert not scores.meta["signed"]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_signed_selection_ranks_from_support_to_opposition(direction: str) -> None:
    c = case("gpt2")
    scores = run(c, "eap", ["edges"], direction=direction)["edges"]
    support = scores.whole.table("edges").mean.flatten() * (-1 if direction == "noising" else 1)
    names = scores.edge_names()
    for k in (5, 200, 262):
        best = support.argsort(descending=True)[:k].tolist()
        assert set(relp.select(scores, top_k=k, sign="signed").edge_names()) == {names[i] for i in best}
    assert relp.select(scores, threshold=0.1, sign="signed").n_edges == int((support > 0.1).sum())
    nodes = run(c, "atp", ["head"], direction=direction)["head"]
    kept = relp.select(nodes, top_k=7, sign="signed").masks["head"]
    worth = nodes.mean * (-1 if direction == "noising" else 1)
    assert worth[kept].min() > worth[~kept].max()
    for how in ({"top_p": 0.5}, {"threshold": 1, "union": True}):
        with pytest.raises(RelpError, match="signed selection"):
            relp.select(nodes, sign="signed", **how)
    with pytest.raises(RelpError, match="no sign"):
        relp.select(run(c, "atp_star", ["head"])["head"], top_k=3, sign="signed")


def test_files_and_errors(tmp_path) -> None:
    c = case("llama")
    scores = run(c, "eap", ["edges"], positions="keep")
    for circuit in (relp.select(scores, top_k=30), relp.select(scores, top_k=30, aggregate="sum", prune="dangling")):
        circuit.save(tmp_path / "c.json")
        again = Circuit.load(tmp_path / "c.json")
        assert torch.equal(again.mask, circuit.mask)
        assert (again.labels, again.units.structure, again.meta) == (
            circuit.labels,
            circuit.units.structure,
            json.loads(json.dumps(circuit.meta)),
        )
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(RelpError, match=r"cut\.json is not valid JSON"):
        Circuit.load(tmp_path / "cut.json")
    with pytest.raises(RelpError, match="is no edge"):
        edge_circuit(Graph(2, 2), torch.ones(7, 15, dtype=torch.bool))
    with pytest.raises(RelpError, match="did you mean"):
        circuit_of_names(Graph(2, 2), ["inputs->m0"])
    with pytest.raises(RelpError, match="graph"):
        relp.evaluate(c.model, [c.batch], edge_circuit(Graph(2, 2), Graph(2, 2).mask[None]))
    with pytest.raises(RelpError, match="ablation"):
        relp.evaluate(c.model, [c.batch], circuit, ablation="resampled")
    with pytest.raises(RelpError, match="found on model"):
        relp.evaluate(case("gpt2").model, [c.batch], circuit)


@pytest.mark.parametrize("suffix", ["json", "pt"])
@pytest.mark.parametrize("shape", ["gpt2", "pythia", "gemma2"])
def test_exchange(shape: str, suffix: str, tmp_path) -> None:
    c = case(shape)
    scores = run(c, "eap", ["edges"])["edges"]
    circuit, path = relp.select(scores, top_k=30), tmp_path / f"circuit.{suffix}"
    export_circuit(path, 32, circuit, scores)
    again, theirs = import_circuit(path, c.model)
    assert torch.equal(again.mask, circuit.mask)
    assert again.units.structure == circuit.units.structure
    close(theirs.mean, scores.mean, 1e-6)
    assert (theirs.meta["direction"], theirs.meta["signed"], theirs.meta["metric"]) == ("noising", True, "logit_diff")
    assert relp.select(theirs, top_k=30).edge_names() == circuit.edge_names()
    tables = [
        outcome(lambda x=x: relp.evaluate(c.model, [c.batch], x, ablation="zero", bootstrap=5))
        for x in (circuit, again)
    ]
    assert tables[0].F_C[0] == tables[1].F_C[0]
    if suffix == "json":
        content = json.loads(path.read_text())
        assert set(content) == {"cfg", "nodes", "edges"}
        assert content["edges"]["input->m0"] == {
            "score": -scores.mean[0, 12].item(),  # support positive, as MIB ranks
            "in_graph": bool(edge_mask(circuit)[0, 0, 12]),
        }
        assert content["nodes"]["logits"] == {"in_graph": True}
        assert content["cfg"]["relp"] == {
            "sign": "support positive", "method": "eap", "metric": "logit_diff", "direction": "noising", "signed": True,
        }  # fmt: skip
        del content["cfg"]["relp"]  # a file of somebody else's: support is positive in it as well
        path.write_text(json.dumps(content))
        close(import_circuit(path, c.model)[1].mean, scores.mean, 1e-6)
    else:
        content = torch.load(path, weights_only=True)
        assert {"cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph", "nodes_in_graph"} == set(content)
    with pytest.raises(RelpError, match="is not that of"):
        import_circuit(path, case("pythia" if shape != "pythia" else "gpt2").model)


def test_denoising_scores_are_exchanged_as_they_are(tmp_path) -> None:
    scores = run(case("gpt2"), "eap", ["edges"], direction="denoising")["edges"]
    export_circuit(tmp_path / "c.json", 32, None, scores)
    assert json.loads((tmp_path / "c.json").read_text())["edges"]["input->m0"]["score"] == scores.mean[0, 12].item()
    close(import_circuit(tmp_path / "c.json")[1].mean, scores.mean)


FAULTS = {
    "true_text": (lambda c: c["edges"]["a0.h0->m0"].update(in_graph="false"), "edge a0.h0->m0: in_graph is 'false'"),
    "text_score": (lambda c: c["edges"]["a0.h0->m0"].update(score="1"), "edge a0.h0->m0: score is '1'"),
    "infinite": (lambda c: c["edges"]["a0.h0->m0"].update(score=float("inf")), "a0.h0->m0 has no finite score"),
    "missing": (lambda c: c["edges"].pop("a0.h1->m1"), "edge a0.h1->m1 is missing"),
    "backward": (
        lambda c: c["edges"].update({"m1->a0.h0<q>": {"score": 1.0, "in_graph": True}}),
        "m1->a0.h0<q> is no edge",
    ),
    "unknown": (
        lambda c: c["edges"].update({"m7->m9": {"score": 1.0, "in_graph": True}}),
        "edge m7->m9: unknown writer",
    ),
    "layers": (lambda c: c["cfg"].update(n_layers=1e9), "cfg.n_layers is 1000000000.0, expected a whole number"),
    "many": (lambda c: c["cfg"].update(n_layers=10**9), "no model's"),
    "more": (lambda c: c["cfg"].update(n_layers=5000), "is missing"),
    "flag": (lambda c: c["cfg"].update(parallel_attn_mlp="no"), "cfg.parallel_attn_mlp is 'no'"),
    "sign": (lambda c: c["cfg"]["relp"].update(sign="?"), "cfg.relp.sign is '?'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_files_are_refused_by_the_edge_or_key(fault: str, tmp_path) -> None:
    change, says = FAULTS[fault]
    graph = Graph(2, 2)
    export_circuit(tmp_path / "c.json", 8, edge_circuit(graph, graph.mask))
    content = json.loads((tmp_path / "c.json").read_text())
    change(content)
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(RelpError, match=re.escape(says)):
        import_circuit(tmp_path / "c.json")


def test_backward_edges_of_matrices_are_refused(tmp_path) -> None:
    graph = Graph(2, 2)
    export_circuit(tmp_path / "c.pt", 8, edge_circuit(graph, graph.mask))
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    content["edges_in_graph"][-1, 0] = True
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(RelpError, match=re.escape("m1->a0.h0<q> is no edge")):
        import_circuit(tmp_path / "c.pt")


def test_what_cannot_be_exchanged_is_refused(tmp_path) -> None:
    c = case("gpt2")
    kept = run(c, "eap", ["edges"], positions="keep")
    with pytest.raises(RelpError, match="no positions"):
        export_circuit(tmp_path / "a.json", 32, relp.select(kept, top_k=3))
    with pytest.raises(RelpError, match=r"\.json or \.pt"):
        export_circuit(tmp_path / "a.txt", 32, relp.select(run(c, "eap", ["edges"]), top_k=3))
    torch.save({"model": c.model.shape}, tmp_path / "evil.pt")
    with pytest.raises(RelpError, match="more than tensors"):
        import_circuit(tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(RelpError):
        import_circuit(tmp_path / "cut.pt")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(RelpError, match="not a circuit file"):
        import_circuit(tmp_path / "list.json")
    with pytest.raises(RelpError):
        import_circuit(tmp_path / "missing.json")


@pytest.mark.parametrize("shape", SHAPES)
def test_neuron_edges(shape: str) -> None:
    """Against the oracle: perturbing a neuron while every MLP between keeps its neurons changes the target by the weight."""
    c = case(shape)
    w, config, original, patch = c.prompts
    targets = [Neuron(2, 5), Neuron(2, 7, 3), Neuron(1, 0)]
    found = outcome(lambda: neuron_edges(c.model, original, targets))
    plain, source = forward(w, config, original), forward(w, config, patch)
    step = 1e-5
    for edges in found:
        target = edges.target
        close(edges.activation, plain["mlp_neuron"][target.layer][:, target.position, target.unit].detach())
        assert edges.weights.shape == (4, target.layer, 6, 48)
        for layer, pos, unit in [(n, p, u) for n in range(target.layer) for p, u in ((2, 3), (1, 11))]:
            ends = []
            for sign in (1, -1):

                def nudge(x: Tensor, at=(pos, unit), sign=sign) -> Tensor:
                    x = x.clone()
                    x[:, at[0], at[1]] += sign * step
                    return x

                hold = {
                    ("mlp_neuron", n): (lambda _, n=n: plain["mlp_neuron"][n].detach()) for n in range(target.layer)
                }
                hold["mlp_neuron", layer] = lambda _, layer=layer, nudge=nudge: nudge(
                    plain["mlp_neuron"][layer].detach()
                )
                ends.append(
                    forward(w, config, original, patch=hold)["mlp_neuron"][target.layer][
                        :, target.position, target.unit
                    ]
                )
            close(edges.weights[:, layer, pos, unit], ((ends[0] - ends[1]) / (2 * step)).detach(), 1e-6)
        values = torch.stack([x.detach() for x in plain["mlp_neuron"][: target.layer]], 1)
        close(edges.contributions, edges.weights * values)
    paired = outcome(lambda: neuron_edges(c.model, original, targets[:1], source=patch))[0]
    delta = torch.stack([(source["mlp_neuron"][n] - plain["mlp_neuron"][n]).detach() for n in range(2)], 1)
    close(paired.contributions, paired.weights * delta)
    with pytest.raises(RelpError, match="layer from 1 to 2"):
        neuron_edges(c.model, original, [Neuron(0, 1)])
