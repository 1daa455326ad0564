"""Every edge method against an oracle that computes each reader from its own copy of the stream, and the identities."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import relp_cli as relp
from relp_cli.errors import RelpError
from relp_cli.spaces.edges import EdgeScores
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.scores import Scores
from tests.oracles import edges as oracle
from tests.oracles.forward import embed
from tests.oracles.make import SHAPES, exact_float64
from tests.oracles.scores import pick
from tests.oracles.wrapped import Case, case, close, hook_count, pairs, run

PRESET = {"gpt2": {"ln", "identity"}, "pythia": {"ln", "identity"}, "pythia-serial": {"ln", "identity"}}
GRADIENT = ("eap", "eap_ig", "eap_ig_activations", "clean_corrupted", "eap_gp", "relp_edges", "relp_edges_ig")


def score(c: Case, method: str, **options: object) -> EdgeScores:
    return run(c, method, ["edges"], **options)["edges"]


def compare(got: EdgeScores, want: Mapping[tuple[str, str], Tensor], tol: float = 1e-9) -> None:
    """Per example, in every edge and nowhere else."""
    assert got.examples is not None
    names = {f"{u}->{v}": value for (u, v), value in want.items()}
    assert set(got.edge_names()) == set(names)
    assert got.examples.dtype == torch.float64 or tol >= 1e-6
    close(got.examples[:, 0].double(), torch.stack([names[n] for n in got.edge_names()], 1), tol)
    assert not got.mean[~got.mask].any()


def attributed(c: Case, grads: Mapping[str, Tensor], direction: str = "noising") -> dict[tuple[str, str], Tensor]:
    """Σ_pos (u(other) − u(base))·grads[v]."""
    w, config, original, patch = c.prompts
    base, other = pick(direction, original, patch)
    run_, source = oracle.run(w, config, base), oracle.run(w, config, other)
    every = oracle.edges_of(lambda edit: oracle.run(w, config, base, edit))
    return {(u, v): ((source.written[u] - run_.written[u]) * grads[v]).sum((1, 2)) for u, v in every}


def mean_gradients(
    c: Case, alphas: list[float], direction: str = "noising", rules: set[str] | None = None
) -> dict[str, Tensor]:
    w, config, original, patch = c.prompts
    start, end = (embed(w, config, ids) for ids in pick(direction, original, patch))
    found = [oracle.reader_gradients(w, config, start + a * (end - start), c.metric, rules or set()) for a in alphas]
    return {v: sum(g[v] for g in found) / len(found) for v in found[0]}


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("shape", SHAPES)
def test_edge_patch_equals_path_patching_edge_by_edge(shape: str, direction: str) -> None:
    c = case(shape)
    want = oracle.edge_patch(*c.prompts, c.metric, direction)
    compare(score(c, "edge_patch", direction=direction), want)
    compare(score(c, "edge_patch", direction=direction, chunk_tokens=400), want)


@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
def test_edge_patch_at_one_position(shape: str) -> None:
    c = case(shape)
    got = score(c, "edge_patch", positions="keep")
    want = oracle.edge_patch(*c.prompts, c.metric, position=2)
    at = got.examples[:, 2]
    close(at, torch.stack([want[tuple(n.split("->"))] for n in got.edge_names()], 1))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("shape", SHAPES)
def test_eap(shape: str, direction: str) -> None:
    c = case(shape)
    want = attributed(c, mean_gradients(c, [0.0], direction), direction)
    compare(score(c, "eap", direction=direction), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_eap_ig_on_the_grids_of_code_and_paper(shape: str) -> None:
    c, m = case(shape), 4
    grids = {"right": [1 - k / m for k in range(m)], "left": [1 - k / m for k in range(1, m + 1)]}
    grids["midpoint"] = [(k + 0.5) / m for k in range(m)]
    for rule, alphas in grids.items():
        compare(score(c, "eap_ig", steps=m, rule=rule), attributed(c, mean_gradients(c, alphas)))


@pytest.mark.parametrize("shape", SHAPES)
def test_clean_corrupted_and_eap_gp_from_either_side(shape: str) -> None:
    c = case(shape)
    run_, source = (attributed(c, mean_gradients(c, [a])) for a in (0.0, 1.0))
    compare(score(c, "clean_corrupted"), {e: (run_[e] + source[e]) / 2 for e in run_})
    compare(score(c, "eap_gp", steps=1), source)
    compare(score(c, "eap_gp", steps=1, start="original"), run_)


@pytest.mark.parametrize(
    ("shape", "extra"), [*((s, e) for s in SHAPES for e in (set(), {"ah"})), ("gemma2", {"softcap"})]
)
def test_relp_on_edges(shape: str, extra: set[str]) -> None:
    c = case(shape)
    rules = PRESET.get(shape, {"ln", "identity", "half"}) | extra
    got = score(c, "relp_edges", rules=sorted(rules))
    compare(got, attributed(c, mean_gradients(c, [0.0], rules=rules)))
    assert set(got.meta["rules"]) == rules
    assert all(n > 0 for n in got.meta["rules"].values())
    if not extra:
        close(score(c, "relp_edges").mean, got.mean)
        close(score(c, "relp_edges_ig", steps=1, rule="left").mean, got.mean)
        compare(score(c, "relp_edges_ig", steps=2), attributed(c, mean_gradients(c, [0.25, 0.75], rules=rules)))


@pytest.mark.parametrize("shape", SHAPES)
def test_two_point_rules_reach_the_attention_norm(shape: str) -> None:
    """Edges into a layer's heads sum, over readers, to what node RelP says flows through its attention norm."""
    c = case(shape)
    got = score(c, "relp_edges+two_point+ah")
    nodes = run(c, "relp+two_point+ah", ["mlp_out", "attn_out"])
    for layer in range(3):
        writers = [i for i, n in enumerate(got.writers) if n.startswith(f"a{layer}.")]
        close(got.mean[writers].sum(), nodes["attn_out"].mean[layer].sum())
        close(got.mean[got.writers.index(f"m{layer}")].sum(), nodes["mlp_out"].mean[layer].sum())


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("shape", SHAPES)
def test_edges_of_a_writer_sum_to_its_node_score(shape: str, direction: str) -> None:
    """Σ over u's edges = δu · ∂L/∂(residual after u)."""
    c = case(shape)
    nodes = run(c, "atp", ["resid_pre", "attn_out", "mlp_out", "head"], direction=direction)
    edges = score(c, "eap", direction=direction)
    close(edges.mean[0].sum(), nodes["resid_pre"].mean[0].sum())
    for layer in range(3):
        heads = [edges.writers.index(f"a{layer}.h{h}") for h in range(4)]
        if shape == "gemma2":  # heads' shares sum to attn_out; a head's z alone does not determine its share
            close(edges.mean[heads].sum(), nodes["attn_out"].mean[layer].sum())
        else:
            close(edges.mean[heads].sum(1), nodes["head"].mean[layer].sum(0))
        close(edges.mean[edges.writers.index(f"m{layer}")].sum(), nodes["mlp_out"].mean[layer].sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_input_edges_are_complete(shape: str) -> None:
    c = case(shape)
    w, config, original, patch = c.prompts
    change = (c.metric(oracle.run(w, config, patch).logits) - c.metric(oracle.run(w, config, original).logits)).mean()
    errors = [(score(c, "eap_ig", steps=m).mean[0].sum() - change).abs().item() for m in (100, 200)]
    assert errors[0] < 1e-2 * change.abs().item()
    assert errors[1] < errors[0] / 3 or errors[1] < 1e-6  # O(1/m²)


@pytest.mark.parametrize("shape", ["gpt2", "pythia", "llama", "gemma2"])
def test_eap_ig_activations_holds_one_site(shape: str) -> None:
    """Edges of one MLP: the stream after it moves from run to source, all else is the run's."""
    c = case(shape)
    got = score(c, "eap_ig_activations", steps=2, rule="midpoint")
    w, config, original, patch = c.prompts
    run_, source = oracle.run(w, config, original), oracle.run(w, config, patch)
    for site in (["m0"], [f"a1.h{h}" for h in range(4)], ["input"]):
        change = sum(source.written[u] - run_.written[u] for u in site)
        found = []
        for alpha in (0.25, 0.75):
            copies: dict[str, Tensor] = {}

            def edit(reader, x, written, alpha=alpha, copies=copies, site=site, change=change):
                own = reader.startswith("a") and reader.partition(".")[0] == site[0].partition(".")[0]
                copies[reader] = torch.zeros_like(x).requires_grad_()
                return x + copies[reader] + (alpha * change if site[0] in written and not own else 0)

            loss = c.metric(oracle.run(w, config, original, edit).logits).sum()
            grads = torch.autograd.grad(loss, list(copies.values()), materialize_grads=True, allow_unused=True)
            found.append(dict(zip(copies, grads, strict=True)))
        for u in site:
            row = got.writers.index(u)
            for v in got.mask[row].nonzero()[:, 0].tolist():
                g = (found[0][got.readers[v]] + found[1][got.readers[v]]) / 2
                want = ((source.written[u] - run_.written[u]) * g).sum((1, 2)).mean()
                close(got.mean[row, v], want.detach())


@pytest.mark.parametrize("method", GRADIENT)
@pytest.mark.parametrize("shape", ["pythia", "qwen2", "gemma2"])
def test_scores_do_not_depend_on_the_batch(shape: str, method: str) -> None:
    c = case(shape)
    options = {} if method in ("eap", "clean_corrupted", "relp_edges") else {"steps": 2}
    whole = score(c, method, **options)
    close(score(c, method, batch_size=1, **options).mean, whole.mean)
    close(score(c, method, batches=[c.batch.rows(slice(0, 3)), c.batch.rows(slice(3, 9))], **options).mean, whole.mean)
    kept = score(c, method, positions="keep", **options)
    close(kept.mean.sum(0), whole.mean)
    close(kept.examples.sum(1), whole.examples[:, 0])
    assert kept.mean.shape == (c.batch.n_pos, len(whole.writers), len(whole.readers))


def test_parts_of_a_batch_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    c = case("gemma2")
    want = score(c, "eap")
    monkeypatch.setattr("relp_cli.edges.gradients.CHUNK", 1)
    close(score(c, "eap").mean, want.mean)
    close(score(c, "eap_ig", steps=2).mean.sum(), score(c, "eap_ig", steps=2, batch_size=2).mean.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_baselines(shape: str) -> None:
    """zero: u(x_p) = 0; mean: what the writer writes on average over the originals, per position."""
    c = case(shape)
    w, config, original, _ = c.prompts
    plain, g = oracle.run(w, config, original), mean_gradients(c, [0.0])
    every = oracle.edges_of(lambda edit: oracle.run(w, config, original, edit))
    for baseline in ("zero", "mean"):
        other = {u: x.mean(0, keepdim=True) * (baseline == "mean") for u, x in plain.written.items()}
        want = {(u, v): ((other[u] - plain.written[u]) * g[v]).sum((1, 2)) for u, v in every}
        compare(score(c, "eap", baseline=baseline), want)


def test_roles_align_prompts_of_different_lengths() -> None:
    c = case("gpt2")
    short, long = pairs(3, 4, 5, roles=("bos", "a", "b", "end")), pairs(2, 5, 6, roles=("bos", "a", "b", "c", "end"))
    got = score(c, "eap", batches=[short, long], positions="keep")
    assert (got.labels, got.axis, got.n.tolist()) == (("bos", "a", "b", "c", "end"), "role", [5, 5, 5, 2, 5])
    one = score(c, "eap", batches=[long], positions="keep")
    close(got.mean[3], one.mean[3])
    summed = score(c, "eap", batches=[short, long])
    parts = [score(c, "eap", batches=[b]) for b in (short, long)]
    close(summed.mean, (3 * parts[0].mean + 2 * parts[1].mean) / 5)


@pytest.mark.parametrize("shape", ["gpt2", "pythia", "pythia-serial"])
def test_the_bridges_own_edge_attribution_agrees(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TransformerLens: gradient at `corrupt`, towards `clean`; no grouped-query attention, no post-norms."""
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    c = case(shape)
    got, parts = score(c, "eap", positions="keep"), {"q_input": "q", "k_input": "k", "v_input": "v"}

    def name(node) -> str:
        plain = {"embed": "input", "mlp_out": f"m{node.layer}", "mlp_in": f"m{node.layer}", "logits": "logits"}
        head = f"a{node.layer}.h{node.head}"
        return plain.get(node.kind) or (head if node.kind == "attn_head_out" else f"{head}<{parts[node.kind]}>")

    table = next(p for n, p in c.model.hf.named_parameters() if "embed_in" in n or "wte" in n)
    monkeypatch.setattr(table, "requires_grad", True)  # the tool needs a graph
    for i in range(2):
        answer, foil = int(c.batch.answer[i, 0]), int(c.batch.foil[i, 0])
        with exact_float64(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = attribution_patch(
                c.model.bridge, c.batch.patch[i : i + 1], c.batch.original[i : i + 1],
                lambda logits, a=answer, f=foil: logits[0, -1, a] - logits[0, -1, f],
                EdgeAttributionConfig(granularity="edge"),
            )  # fmt: skip
        index = {n: j for j, n in enumerate(got.edge_names())}
        theirs = torch.zeros(c.batch.n_pos, len(index), dtype=torch.float64)
        for (writer, reader), value in result.edge_scores.items():
            theirs[writer.position, index[f"{name(writer)}->{name(reader)}"]] += value
        close(got.examples[i], theirs, 1e-6)


def test_gpt2_small_has_32491_edges_and_the_orders_of_eap_ig() -> None:
    graph = Graph(12, 12)
    assert (graph.n_edges, len(graph.writers), len(graph.readers)) == (32491, 157, 445)
    assert graph.writers[:3] == ("input", "a0.h0", "a0.h1")
    assert graph.writers[13] == "m0"
    assert graph.readers[36] == "m0"
    assert graph.readers[12] == "a0.h0<k>"
    assert graph.name(1, 36) == "a0.h0->m0"
    assert not Graph(2, 2, parallel=True).mask[1, 6]


def test_files_round_trip(tmp_path) -> None:
    for positions in ("sum", "keep"):
        scores = run(case("qwen2"), "eap", ["edges"], positions=positions)
        scores.save(tmp_path / "s.safetensors")
        again = Scores.load(tmp_path / "s.safetensors")["edges"]
        want = scores["edges"]
        for name in ("mean", "variance", "n", "examples", "present"):
            assert torch.equal(getattr(again, name), getattr(want, name))
        assert (again.graph, again.labels, again.axis, again.meta["method"]) == (
            want.graph,
            want.labels,
            want.axis,
            "eap",
        )


def test_what_cannot_be_scored_is_refused() -> None:
    c = case("gpt2")
    for method, options, says in (
        ("atp_star", {}, "'atp_star' does not score edges"),
        ("relp_edges", {"rules": ["epsilon"]}, "no rule on linear layers"),
        ("eap", {"metric": "kl"}, "exactly 0"),
        ("eap", {"metric": "accuracy"}, "no gradient"),
        ("eap", {"positions": "some"}, "positions"),
        ("clean_corrupted", {"baseline": "zero"}, "patch prompt"),
        ("eap_gp", {"baseline": "zero"}, "two prompts"),
        ("acdc", {"positions": "keep"}, "positions=sum"),
        ("eap_ig", {"step": 3}, "steps"),
    ):
        with pytest.raises(RelpError, match=says):
            score(c, method, **options)
    with pytest.raises(RelpError, match="scores edges"):
        run(c, "eap", ["mlp_out"])


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_nothing_is_left_behind(shape: str) -> None:
    c = case(shape, layers=2)
    before = hook_count(c.model)
    for method in (*GRADIENT, "edge_patch", "acdc", "information_flow"):
        score(c, method)
    with pytest.raises(RelpError):
        score(c, "eap", metric="accuracy")
    assert hook_count(c.model) == before
    groups = [
        getattr(c.model.component(f"blocks.{n}.attn").original_component, "num_key_value_groups", None)
        for n in range(2)
    ]
    assert groups == [None if shape == "gpt2" else 2] * 2


def test_public_entry_points() -> None:
    c = case("gpt2")
    scores = relp.score(c.model, [c.batch], method="eap", nodes=["edges"], metric="prob_diff")
    assert isinstance(scores["edges"], EdgeScores)
    assert scores["edges"].meta["metric"] == "prob_diff"
    assert scores["edges"].n_edges == 262
