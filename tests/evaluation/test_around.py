"""What surrounds an evaluation: verified candidates, minimality, a circuit run by hand, overlap, areas, behaviour."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles.forward import forward
from oracles.make import exact_float64
from oracles.wrapped import case, close, double_by_default, hook_count, pairs, run

from relp_cli.errors import RelpError
from relp_cli.evaluation.areas import areas
from relp_cli.evaluation.behaviour import against_chance, behaviour, keep_correct
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.evaluation.minimality import applied, minimality
from relp_cli.evaluation.overlap import overlap, stability
from relp_cli.evaluation.verify import candidates, rescore
from relp_cli.scoring import score
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.nodes import node_circuit
from relp_cli.spaces.units import ANY_POSITION
from relp_cli.tasks.metrics import METRICS


def some(shape=(3, 6, 4), share=0.2, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_verified_candidates_have_their_exact_scores(direction):
    c = case("llama")
    kinds = ("mlp_neuron", "head", "mlp_out")
    cheap = [run(c, m, kinds, direction=direction) for m in ("atp", "relp")]
    with exact_float64(), double_by_default():
        got = rescore(c.model, [c.batch], cheap, 5)
    exact = run(c, "act_patch", kinds, direction=direction)
    n_candidates = 0
    for kind in kinds:
        mask = candidates([s[kind] for s in cheap], 5)
        want = torch.zeros_like(mask)
        for s in cheap:
            want.view(-1)[s[kind].mean.abs().flatten().topk(5).indices] = True
        assert torch.equal(mask, want)
        close(got[kind].mean, exact[kind].mean * mask)
        n_candidates += int(mask.sum())
    assert got.meta["n_candidates"] == n_candidates
    other = run(c, "atp", kinds, direction={"noising": "denoising", "denoising": "noising"}[direction])
    for second, message in ((other, "differ in direction"), (run(c, "atp", kinds, baseline="zero"), "differ in")):
        with pytest.raises(RelpError, match=message):
            rescore(c.model, [c.batch], [cheap[0], second], 5)


def test_minimality_drops_one_node_at_a_time():
    c = case("gpt2")
    circuit = Circuit.from_mask("head", some(), tuple("abcdef"))
    with exact_float64():
        batch = replace(c.batch, roles=tuple("abcdef"))
        table = minimality(c.model, [batch], circuit, exclude_layers=1)
        whole = evaluate(c.model, [batch], circuit, exclude_layers=1).iloc[0]
        assert len(table) == int(circuit.masks["head"][1:].sum()) > 3
        assert table.loss.is_monotonic_decreasing
        for row in table.iloc[[0, -1]].itertuples():
            mask = circuit.masks["head"].clone()
            mask[row.layer, "abcdef".index(row.position), row.unit] = False
            left = evaluate(c.model, [batch], Circuit.from_mask("head", mask, tuple("abcdef")), exclude_layers=1).iloc[
                0
            ]
            assert row.loss == pytest.approx(whole.F_C - left.F_C, abs=1e-9)
            assert row.loss_faithfulness == pytest.approx(whole.faithfulness - left.faithfulness, abs=1e-9)


def test_a_circuit_applied_by_hand_is_what_evaluation_runs():
    c = case("qwen2")
    circuit = Circuit.from_mask("mlp_neuron", some((3, 6, 48), 0.5))
    before = hook_count(c.model)
    for ablation in ("mean", "zero", "counterfactual"):
        with exact_float64():
            row = evaluate(c.model, [c.batch], circuit, ablation, 1).iloc[0]
            with applied(c.model, circuit, c.batch, ablation, 1) as model:
                logits = model.logits(c.batch.original)
        values = METRICS["logit_diff"].fn(logits, c.batch.answer, c.batch.foil)
        assert values.mean().item() == pytest.approx(row.F_C, abs=1e-12)
    assert hook_count(c.model) == before


def test_overlap_by_hand():
    a = Circuit.from_mask("mlp_out", torch.tensor([[True, True, False], [True, False, False]]))
    b = Circuit.from_mask("mlp_out", torch.tensor([[True, False, True], [True, True, False]]))
    got = overlap(a, b)
    assert (got["common"], got["n"], got["n_reference"]) == (2, 3, 4)
    assert (got["jaccard"], got["precision"], got["recall"]) == pytest.approx((2 / 5, 2 / 3, 2 / 4))
    nowhere = node_circuit({"mlp_out": torch.tensor([[True], [False]])}, ANY_POSITION)
    got = overlap(a, nowhere)  # layers {0, 1} and {0}
    assert (got["jaccard"], got["precision"], got["recall"], got["positions"]) == (0.5, 0.5, 1.0, "any")
    empty = Circuit.from_mask("mlp_out", torch.zeros(2, 3, dtype=torch.bool))
    assert np.isnan(overlap(empty, empty)["jaccard"])
    for other, message in (
        (Circuit.from_mask("attn_out", torch.ones(2, 3) > 0), "no node kind in common"),
        (Circuit.from_mask("mlp_out", torch.ones(3, 3) > 0), "different shapes"),
        (Circuit.from_mask("mlp_out", torch.ones(2, 3) > 0, ("a", "b", "c")), "different positions"),
    ):
        with pytest.raises(RelpError, match=message):
            overlap(a, other)


def test_stability_is_one_where_all_pairs_agree():
    c = case("gpt2")
    same = c.batch.rows(torch.tensor([1, 1, 1]))
    scores = score(c.model, [same], "atp", ["head"])
    mean, kept = stability(scores, samples=10, top_k=5)
    assert mean == 1
    assert kept["head"].unique().tolist() == pytest.approx([0, 1])
    mean, kept = stability(score(c.model, [c.batch], "atp", ["head"]), samples=50, top_k=5)
    assert 0.1 < mean < 1
    assert kept["head"].sum().item() == pytest.approx(5)


@pytest.mark.parametrize(("method", "nodes"), [("atp", ["head"]), ("eap", ["edges"])])
def test_a_union_over_resampled_pairs_looks_at_those_alone(method, nodes):
    c = case("gpt2")
    scores = score(c.model, [c.batch], method, nodes)
    mean, _ = stability(scores, samples=20, threshold=0.1, union=True)
    assert 0.1 < mean < 1


def test_areas_by_hand():
    cpr, cmd = areas([1.0, 0.0, 0.5], [1.0, 0.0, 1.5])  # order does not matter
    assert cpr == pytest.approx(0.25 * 1.5 + 0.25 * 2.5)
    assert cmd == pytest.approx(0.25 * 1.5 + 0.25 * 0.5)
    for x, y in (([0.1], [1.0]), ([0.0, 0.5], [0.0, 1.0]), ([0.0, 1.0], [0.0, float("nan")])):
        assert np.isnan(areas(x, y)).all()


def _tail(n, p, hits):
    """P(at most `hits` of n), term by term."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in hits)


@pytest.mark.parametrize(
    ("hits", "n", "verdict"),
    [(7, 7, "above"), (6, 6, "undecided"), (0, 7, "below"), (0, 6, "at"), (50, 100, "at"), (58, 100, "undecided"),
     (62, 100, "undecided"), (63, 100, "above"), (37, 100, "below"), (38, 100, "at"), (8, 10, "undecided"),
     (15, 30, "undecided"), (500, 1000, "at")],
)  # fmt: skip
def test_chance_is_said_where_a_test_says_so(hits, n, verdict):
    above, below = _tail(n, 0.5, range(hits, n + 1)) <= 0.01, _tail(n, 0.5, range(hits + 1)) <= 0.01
    near = _tail(n, 2 / 3, range(hits + 1)) <= 0.01
    assert verdict == ("above" if above else "below" if below else "at" if near else "undecided")
    assert against_chance(hits, n) == verdict


def test_behaviour_on_originals_and_patches():
    c = case("pythia")
    both = [pairs(3, 4, seed=2), pairs(5, 6, seed=3)]
    with exact_float64():
        got = behaviour(c.model, both, "logit_diff")
    values, patched = [], []
    for b in both:
        for ids, into in ((b.original, values), (b.patch, patched)):
            logits = forward(c.weights, c.config, ids).logits[:, -1]
            into.append((logits.gather(1, b.answer) - logits.gather(1, b.foil))[:, 0].detach())
    values, patched = torch.cat(values), torch.cat(patched)
    assert got.metric_original == pytest.approx(values.mean().item(), abs=1e-12)
    assert got.metric_patch == pytest.approx(patched.mean().item(), abs=1e-12)
    assert got.accuracy == (values > 0).double().mean().item()
    assert torch.equal(torch.cat(got.correct), values > 0)
    assert (got.verdict, got.at_chance) == ("undecided", False)  # of 8 pairs
    kept = keep_correct(both, got)
    assert sum(map(len, kept)) == int((values > 0).sum())
    easy = pairs(30, 4, seed=4)
    logits = c.model.logits(easy.original)
    best = replace(easy, patch=None, answer=logits.argmax(-1), foil=logits.argmin(-1))
    with exact_float64():
        sure = behaviour(c.model, [best], "logit_diff")
    assert (sure.accuracy, sure.at_chance, sure.metric_patch) == (1, False, None)
    assert sure.verdict == "above"
    assert sure.note("m", "t") == ""
    assert sure.interval == pytest.approx((0.025 ** (1 / 30), 1.0))  # P(30 of 30) = 2.5 %
    wrong = replace(best, answer=best.foil, foil=best.answer)
    seen = behaviour(c.model, [wrong], "logit_diff")
    assert seen.note("m", "t").startswith("WARNING: m is below chance on t (accuracy 0.00 [0.00, 0.12], n = 30)")
    with pytest.raises(RelpError, match="leaves no pair"):
        keep_correct([wrong], seen)
