"""Faithfulness and completeness equal the oracle's; a micro-model's by hand; exact ends; intervals that cover."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import scores as S
from oracles.forward import forward
from oracles.make import SHAPES, exact_float64
from oracles.wrapped import case, hook_count, pairs, run
from transformers import GPT2Config, GPT2LMHeadModel

from relp_cli.errors import RelpError
from relp_cli.evaluation.ablation import Ablation
from relp_cli.evaluation.ablation_table import ABLATIONS
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.evaluation.ratios import ratio_row
from relp_cli.models.load import wrap
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.nodes import node_circuit
from relp_cli.spaces.units import ANY_POSITION
from relp_cli.tasks.pairs import PairBatch

ORACLE = {"mean": "mean", "zero": "zero", "counterfactual": "patch"}
NUMBERS = ("F_M", "F_C", "F_empty", "F_complement", "faithfulness", "completeness")
NO_TEXT = [a for a, row in ABLATIONS.items() if row.serves("nodes") and a != "corpus"]
SHORT = ("bos", "subject", "verb", "end")
LONG = ("bos", "subject", "that", "noun", "verb", "end")


def mask_for(model, kind, n_pos=6, seed=0, share=0.5):
    units = {"head": 4, "mlp_neuron": 48, "key": model.shape.n_kv_heads}.get(kind)
    shape = (3, n_pos) if units is None else (3, n_pos, units)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def must_equal(row, want, tol=1e-9):
    for name in NUMBERS:
        assert row[name] == pytest.approx(want[name], rel=tol, abs=tol), name


@pytest.mark.parametrize("exclude", [0, 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle(shape, exclude):
    c = case(shape)
    before = hook_count(c.model)
    for kind in ("mlp_neuron", "head", "mlp_out"):
        circuit = Circuit.from_mask(kind, mask_for(c.model, kind))
        for ablation, name in ORACLE.items():
            with exact_float64():
                row = evaluate(c.model, [c.batch], circuit, ablation, exclude, bootstrap=20).iloc[0]
            must_equal(row, S.faithfulness(*c.prompts, c.metric, circuit.masks, exclude, name))
            counted = circuit.masks[kind][exclude:]
            assert (row.n_nodes, row.n_possible, row.n_pairs) == (int(counted.sum()), counted.numel(), 4)
            assert abs(row.F_M - row.F_empty) > 1e-3
    assert hook_count(c.model) == before


@pytest.mark.parametrize("shape", ["llama", "gemma2"])
def test_mixed_circuits_equal_the_oracle(shape):
    """Kinds at several sites of a layer at once, one of them shared by query heads; the default excludes ⌊3/3⌋ layers."""
    c = case(shape)
    masks = {k: mask_for(c.model, k, seed=i) for i, k in enumerate(("key", "head", "mlp_neuron", "attn_out"))}
    circuit = node_circuit(masks, tuple("012345"))
    with exact_float64():
        row = evaluate(c.model, [c.batch], circuit).iloc[0]
    must_equal(row, S.faithfulness(*c.prompts, c.metric, masks, 1, "mean"))
    assert row.exclude_layers == 1


def test_more_pairs_than_fit_one_batch():
    """70 pairs run in chunks of 32; means are over all of them."""
    c = case("pythia")
    batch = pairs(70, 4, seed=5)
    metric = S.logit_diff(batch.answer[:, 0], batch.foil[:, 0])
    circuit = Circuit.from_mask("head", mask_for(c.model, "head", 4))
    for given in ([batch], [batch.rows(slice(0, 3)), batch.rows(slice(3, 70))]):
        with exact_float64():
            row = evaluate(c.model, given, circuit, exclude_layers=0).iloc[0]
        must_equal(row, S.faithfulness(c.weights, c.config, batch.original, batch.patch, metric, circuit.masks))


def by_role(c, batches, circuit, kind, fill):
    """F of a circuit over batches of several lengths, from the oracle's forward; fill(batch, layer) → ablation values."""
    total = []
    for batch in batches:
        at = [circuit.labels.index(r) for r in batch.roles]
        patch = {}
        for layer in range(3):
            keep = circuit.masks[kind][layer][at][..., None]
            values = fill(batch, layer)
            patch[kind, layer] = lambda t, keep=keep, values=values: torch.where(keep, t, values)
        with torch.no_grad():
            logits = forward(c.weights, c.config, batch.original, patch=patch).logits
        total.append(S.logit_diff(batch.answer[:, 0], batch.foil[:, 0])(logits))
    return torch.cat(total).mean().item()


def test_lengths_meet_on_roles():
    c = case("qwen2")
    batches = [pairs(3, 4, seed=2, roles=SHORT), pairs(5, 6, seed=3, roles=LONG)]
    circuit = Circuit.from_mask("head", mask_for(c.model, "head"), LONG)
    patched = {id(b): forward(c.weights, c.config, b.patch)["head"] for b in batches}

    def mean(batch, layer):
        values = []
        for role in batch.roles:
            rows = [patched[id(b)][layer][:, b.roles.index(role)] for b in batches if role in b.roles]
            values.append(torch.cat(rows).mean(0))
        return torch.stack(values).detach()

    fills = {"mean": mean, "counterfactual": lambda b, layer: patched[id(b)][layer].detach()}
    for ablation, fill in fills.items():
        with exact_float64():
            row = evaluate(c.model, batches, circuit, ablation, 0).iloc[0]
        assert row["F_C"] == pytest.approx(by_role(c, batches, circuit, "head", fill), abs=1e-9)
        nothing = replace(circuit, mask=torch.zeros_like(circuit.mask))
        assert row["F_empty"] == pytest.approx(by_role(c, batches, nothing, "head", fill), abs=1e-9)
        complement = by_role(c, batches, circuit.complement(), "head", fill)
        assert row["F_complement"] == pytest.approx(complement, abs=1e-9)
        assert row.n_pairs == 8
    # One length only needs a part of the circuit's roles.
    with exact_float64():
        row = evaluate(c.model, batches[:1], circuit, "zero", 0).iloc[0]
    zeros = by_role(c, batches[:1], circuit, "head", lambda _b, _l: torch.zeros((), dtype=torch.float64))
    assert row["F_C"] == pytest.approx(zeros, abs=1e-9)


def test_circuits_without_positions_hold_everywhere():
    c = case("gpt2")
    anywhere = mask_for(c.model, "head")[:, :1]
    everywhere = Circuit.from_mask("head", anywhere.expand(-1, 6, -1).clone())
    got = [
        evaluate(c.model, [c.batch], x, "zero", 0) for x in (node_circuit({"head": anywhere}, ANY_POSITION), everywhere)
    ]
    for name in NUMBERS:
        assert got[0][name].item() == got[1][name].item()
    batches = [pairs(3, 4, seed=2), pairs(5, 6, seed=3)]
    row = evaluate(c.model, batches, node_circuit({"head": anywhere}, ANY_POSITION), "counterfactual", 0).iloc[0]
    alone = [
        evaluate(c.model, [b], node_circuit({"head": anywhere}, ANY_POSITION), "counterfactual", 0) for b in batches
    ]
    assert row["F_C"] == pytest.approx((3 * alone[0].F_C.item() + 5 * alone[1].F_C.item()) / 8, rel=1e-9)


@pytest.mark.parametrize("ablation", NO_TEXT)
@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
def test_the_ends_are_exact(shape, ablation):
    """The full circuit has (1, 0), the empty one (0, 1), bit for bit, in float32 too and beside a sweep."""
    c = case(shape, dtype=torch.float32)
    for kind in ("mlp_neuron", "head", "resid_pre"):
        full = torch.ones_like(mask_for(c.model, kind))
        sweep = [Circuit.from_mask(kind, m) for m in (full, ~full, mask_for(c.model, kind))]
        table = evaluate(c.model, [c.batch], sweep, ablation, bootstrap=50)
        assert table.faithfulness.tolist()[:2] == [1, 0]
        assert table.completeness.tolist()[:2] == [0, 1]
        assert table.F_C[0] == table.F_M[0]
        assert table.F_C[1] == table.F_empty[1]
        low, high = table.faithfulness_lo[0], table.faithfulness_hi[0]
        assert (low, high) == pytest.approx((1, 1))


def test_selected_ends_are_exact_with_and_without_excluded_layers():
    c = case("qwen2")
    scores = run(c, "relp", ["mlp_neuron"])["mlp_neuron"]
    for exclude in (0, 1, 2):
        ends = [select(scores, t, from_layer=exclude) for t in (-1, float("inf"))]
        table = evaluate(c.model, [c.batch], ends, exclude_layers=exclude, bootstrap=20)
        assert table.faithfulness.tolist() == [1, 0]
        assert table.completeness.tolist() == [0, 1]
        assert table.n_nodes.tolist() == [(3 - exclude) * 6 * 48, 0]
        assert table.tau.tolist() == [-1, float("inf")]


# --- a micro-model whose every number is worked out by hand


@pytest.fixture(scope="module")
def micro():
    """Two layers that add constants: x = e + b₀ + b₁ with e = b₀ = (1, −1, 0, 0), b₁ = (0, 0, 2, −2).

    L = third coordinate of x / σ(x), as means are 0: σ² = 4 with both, ½ + ½·3 = 2 with b₀ alone, 10/4 with b₁ alone.
    """
    config = GPT2Config(
        vocab_size=3, n_embd=4, n_layer=2, n_head=1, n_inner=4, n_positions=4, layer_norm_epsilon=0.0, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    hf = GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for name, p in hf.named_parameters():
            p.fill_(1.0 if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")) else 0.0)
        hf.transformer.wte.weight[:] = torch.tensor([1.0, -1, 0, 0])
        hf.transformer.h[0].mlp.c_proj.bias[:] = torch.tensor([1.0, -1, 0, 0])
        hf.transformer.h[1].mlp.c_proj.bias[:] = torch.tensor([0.0, 0, 2, -2])
        hf.lm_head.weight[1] = torch.tensor([0.0, 0, 1, 0])
    ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
    return wrap(hf, None, "micro"), PairBatch(original=ids, patch=ids.flip(0), answer=[1, 1], foil=[2, 2])


def keeping(*layers):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[list(layers)] = True
    return Circuit.from_mask("mlp_out", mask)


def test_micro_model_in_closed_form(micro):
    model, batch = micro
    table = evaluate(model, [batch], [keeping(0), keeping(1), keeping(0, 1), keeping()], "zero", 0)
    only_b1 = 2 / 2.5**0.5  # 1.2649: without b₀ the norm is smaller
    assert table.F_M.tolist() == pytest.approx([1] * 4)
    assert table.F_empty.tolist() == pytest.approx([0] * 4)
    assert table.F_C.tolist() == pytest.approx([0, only_b1, 1, 0])
    assert table.faithfulness.tolist() == pytest.approx([0, only_b1, 1, 0])
    assert table.completeness.tolist() == pytest.approx([only_b1, 0, 0, 1])
    last_only = torch.zeros(2, 3, dtype=torch.bool)
    last_only[1, 2] = True  # nothing but the last position is read, with e + b₁ there
    row = evaluate(model, [batch], Circuit.from_mask("mlp_out", last_only), "zero", 0).iloc[0]
    assert row.faithfulness == pytest.approx(only_b1)
    assert (row.n_nodes, row.n_possible) == (1, 6)
    # Layer 0 excluded: it runs in the empty circuit too, where L = 0; only b₁ counts.
    row = evaluate(model, [batch], keeping(), "zero", 1).iloc[0]
    assert (row.F_M, row.F_empty, row.F_complement) == pytest.approx((1, 0, 1))
    assert row.n_possible == 3


def test_micro_model_scores_by_hand(micro):
    """Towards zero. act_patch: L without b₀, or b₁, minus 1. LN-rule: δ·ρ = −b·(0, 0, 1, 0)/2, the mean differentiable.

    Plain gradient of x₃/σ: (1 − y₃·y)/σ on the third, −y₃·y/σ elsewhere, y = x/σ = (1, −1, 1, −1), here over 4 dimensions.
    """
    from relp_cli.scoring import score

    model, batch = micro
    y = torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)
    unit = torch.tensor([0, 0, 1.0, 0], dtype=torch.float64)
    plain = (unit - 0.25 - y / 4) / 2  # Jacobian of a norm: (I − 1/d − y·yᵀ/d)/σ
    b0, b1 = torch.tensor([[1.0, -1, 0, 0], [0, 0, 2, -2]], dtype=torch.float64)
    want = {
        "act_patch": (2 / 2.5**0.5 - 1, -1.0),
        "relp": (-(b0 @ (unit - 0.25)).item() / 2, -(b1 @ (unit - 0.25)).item() / 2),
        "atp": (-(b0 @ plain).item(), -(b1 @ plain).item()),
    }
    assert want["relp"] == (0, -1)
    assert want["atp"] == (0.25, -0.5)
    for method, values in want.items():
        options = {"rules": ["ln"]} if method == "relp" else {}
        got = score(model, [batch], method, ["mlp_out"], baseline="zero", **options)["mlp_out"]
        assert got.mean[:, -1].tolist() == pytest.approx(list(values))
        assert not got.mean[:, :-1].any()
        assert got.meta["mean_metric"] == pytest.approx(1)


def test_ill_posed_ratios_say_so(micro):
    model, batch = micro
    row = evaluate(model, [batch], keeping(0), "mean", 0).iloc[0]  # constants are their own means
    assert "ill-posed" in row.note
    assert np.isnan([row.faithfulness, row.completeness, row.faithfulness_lo, row.completeness_hi]).all()
    assert row["F_M"] == pytest.approx(row.F_empty)


def test_a_gap_within_its_noise_says_so():
    c = case("gpt2")
    batch = pairs(4, 6)
    flipped = replace(batch, answer=torch.cat([batch.answer[:2], batch.foil[:2]]),
                      foil=torch.cat([batch.foil[:2], batch.answer[:2]]), original=batch.original[[0, 1, 0, 1]],
                      patch=batch.patch[[0, 1, 0, 1]])  # fmt: skip
    row = evaluate(c.model, [flipped], Circuit.from_mask("mlp_out", mask_for(c.model, "mlp_out")), "zero", 0).iloc[0]
    assert row.note


def test_random_circuits_beside_a_circuit():
    c = case("gpt2")
    circuit = Circuit.from_mask("mlp_neuron", mask_for(c.model, "mlp_neuron", share=0.2))
    with exact_float64():
        row = evaluate(c.model, [c.batch], circuit, exclude_layers=1, random_circuits=2, seed=3).iloc[0]
        drawn = [evaluate(c.model, [c.batch], circuit.random_like(3 + i, 1), exclude_layers=1).iloc[0] for i in (0, 1)]
    for name in ("faithfulness", "completeness"):
        assert row[f"random_{name}"] == pytest.approx(np.mean([r[name] for r in drawn]), rel=1e-9)


def test_other_metrics_and_the_circuits_own():
    c = case("gpt2")
    circuit = Circuit.from_mask("head", mask_for(c.model, "head"), metric="prob_diff")
    with exact_float64():
        for asked, used in ((None, "prob_diff"), ("logit_diff", "logit_diff"), ("kl", "kl"), ("accuracy", "accuracy")):
            row = evaluate(c.model, [c.batch], circuit, "counterfactual", 0, asked).iloc[0]
            assert row.metric == used
            assert used != "kl" or (row["F_M"] == pytest.approx(0, abs=1e-12) and row.F_C < 0 and row.F_empty < 0)

        def prob_diff(logits):
            probs, rows = logits[:, -1].softmax(-1), torch.arange(4)
            return probs[rows, c.batch.answer[:, 0]] - probs[rows, c.batch.foil[:, 0]]

        row = evaluate(c.model, [c.batch], circuit, exclude_layers=0).iloc[0]
    must_equal(row, S.faithfulness(*c.prompts, prob_diff, circuit.masks))


def test_resampling_takes_another_pairs_patch_prompt():
    c = case("gpt2")
    circuit = Circuit.from_mask("head", mask_for(c.model, "head"))
    rows = [evaluate(c.model, [c.batch], circuit, "resample", 0, seed=s).iloc[0].F_C for s in (0, 0, 1, 2, 3)]
    assert rows[0] == rows[1]
    assert len(set(rows)) > 2
    kinds = (NODE_KINDS["mlp_out"],)
    ablation = Ablation.prepare(c.model, [c.batch], "resample", kinds)
    with exact_float64():
        values = ablation.values(c.model, c.batch, ABLATIONS["resample"].tokens(c.batch, 0))["mlp_out"][0]
        own = Ablation.prepare(c.model, [c.batch], "counterfactual", kinds).values(c.model, c.batch, c.batch.patch)
    match = torch.isclose(values[:, None], own["mlp_out"][0][None]).flatten(2).all(-1)  # [pair, donor]
    assert match.sum(1).tolist() == [1] * 4
    assert not match.diagonal().any()
    same = replace(c.batch, patch=c.batch.patch[:1].expand(4, -1))
    with pytest.raises(RelpError, match="two different patch prompts"):
        evaluate(c.model, [same], circuit, "resample", 0)
    with pytest.raises(RelpError, match="at least two pairs"):
        evaluate(c.model, [c.batch.rows(slice(0, 1))], circuit, "resample", 0)


def test_mean_task_is_over_both_prompts():
    c = case("pythia")
    with exact_float64():
        got = Ablation.prepare(c.model, [c.batch], "mean_task", (NODE_KINDS["head"],)).values(c.model, c.batch, None)
    traces = [forward(c.weights, c.config, ids)["head"] for ids in (c.batch.original, c.batch.patch)]
    for layer in range(3):
        want = torch.cat([t[layer] for t in traces]).mean(0).flatten(-2).detach()
        torch.testing.assert_close(got["head"][layer], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("options", "message"), [
    ({"ablation": "means"}, "unknown ablation of nodes 'means'; did you mean 'mean'"),
    ({"exclude_layers": 3}, "from 0 to 2, got 3"),
    ({"exclude_layers": -1}, "from 0 to 2, got -1"),
    ({"metric": "logitdiff"}, "unknown metric"),
    ({"circuit": Circuit.from_mask("mlp_out", torch.ones(4, 6) > 0)}, "mlp_out has 4 layers of 1, model gpt2 needs 3 of 1"),
    ({"circuit": Circuit.from_mask("head", torch.ones(3, 6, 5) > 0)}, "head has 3 layers of 5, model gpt2 needs 3 of 4"),
    ({"circuit": Circuit.from_mask("mlp_out", torch.ones(3, 8) > 0)}, "positions are 0, 1, .* have 6 without roles"),
    ({"circuit": Circuit.from_mask("mlp_out", torch.ones(3, 6) > 0, LONG)}, "have 6 without roles"),
    ({"circuit": Circuit.from_mask("mlp_out", torch.ones(3, 6) > 0, model="other")}, "found on model 'other'"),
    ({"circuit": Circuit.from_mask("mlp_out", torch.ones(3, 6) > 0, revision="x")}, "found on revision 'x'"),
    ({"circuit": []}, "nothing to evaluate"),
    ({"pairs": []}, "nothing to evaluate"),
    ({"pairs": [PairBatch(pairs().original, None, [1] * 4, [2] * 4)]}, "needs patch prompts"),
    ({"pairs": [pairs(2, 4), pairs(2, 6)]}, "share no position axis"),
    ({"pairs": [pairs(roles=("other", *LONG[1:]))], "circuit": Circuit.from_mask("mlp_out", torch.ones(3, 6) > 0, LONG)},
     "the circuit has no position 'other'"),
    ({"circuit": [Circuit.from_mask("mlp_out", torch.ones(3, 6) > 0),
                  Circuit.from_mask("attn_out", torch.ones(3, 6) > 0)]}, "different node kinds"),
])  # fmt: skip
def test_refusals(options, message):
    c = case("gpt2")
    call = {"pairs": [c.batch], "circuit": Circuit.from_mask("mlp_out", torch.ones(3, 6) > 0)} | options
    with pytest.raises(RelpError, match=message):
        evaluate(c.model, **call)


# --- intervals


class Simulated:
    """Per-prompt values of a circuit that recovers 70 % of the gap, and of its complement that recovers 10 %."""

    def __init__(self, rng, n):
        full, empty = rng.normal(3, 1.5, n), rng.normal(1, 1.0, n)
        part = empty + 0.7 * (full - empty) + rng.normal(0, 0.8, n)
        rest = empty + 0.1 * (full - empty) + rng.normal(0, 0.8, n)
        self.values = {"full": full, "empty": empty, "circuit": part, "complement": rest}
        self.n = self.n_prompts = n

    def get(self, name, _=0):
        return self.values[name]


def test_bootstrap_intervals_cover_the_truth():
    """95 % nominal over 400 simulated evaluations of 60 prompts: between 91 and 98 %."""
    rng, hits = np.random.default_rng(0), {"faithfulness": 0, "completeness": 0}
    for _ in range(400):
        draws = rng.multinomial(60, np.full(60, 1 / 60), size=300)
        row = ratio_row(Simulated(rng, 60), 0, draws)
        for name, truth in (("faithfulness", 0.7), ("completeness", 0.1)):
            assert row[f"{name}_lo"] < row[name] < row[f"{name}_hi"]
            hits[name] += row[f"{name}_lo"] <= truth <= row[f"{name}_hi"]
    assert all(0.91 <= h / 400 <= 0.98 for h in hits.values()), hits


def test_intervals_are_seeded_and_shrink():
    widths = []
    for n in (20, 2000):
        values = Simulated(np.random.default_rng(1), n)
        draws = np.random.default_rng(2).multinomial(n, np.full(n, 1 / n), size=300)
        row = ratio_row(values, 0, draws)
        widths.append(row["faithfulness_hi"] - row["faithfulness_lo"])
    assert widths[1] < widths[0] / 5
    c = case("gpt2")
    circuit = Circuit.from_mask("head", mask_for(c.model, "head"))
    a, b = (evaluate(c.model, [c.batch], circuit, exclude_layers=0, bootstrap=50).iloc[0] for _ in range(2))
    assert (a.faithfulness_lo, a.faithfulness_hi) == (b.faithfulness_lo, b.faithfulness_hi)
