"""AtP*: the QK fix against naive recomputation, GradDrop against detached oracles, and hand-built failures of AtP."""

import pytest
import torch
from oracles import scores as S
from oracles.forward import forward
from oracles.make import SHAPES
from oracles.wrapped import case, close, exact_float64, run
from transformers import GPT2Config, GPT2LMHeadModel

from relp_cli.errors import RelpError
from relp_cli.methods.atp_star import key_effects, query_effects
from relp_cli.models.load import wrap
from relp_cli.scoring import score
from relp_cli.tasks.pairs import PairBatch

QK = ("query", "key")


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("shape", SHAPES)
def test_qk_fix_equals_recomputing_the_softmax_one_node_at_a_time(shape, direction):
    """P' comes from the oracle's forward pass with one query or key replaced; everything after P is ∂L/∂P."""
    c = case(shape)
    weights, config, *_ = c.prompts
    base_ids, other_ids = S.pick(direction, *c.prompts[2:])
    base, other = (forward(weights, config, ids) for ids in (base_ids, other_ids))
    slope = S.gradients(base, c.metric, ["pattern"])["pattern"]
    got = run(c, "atp_star", QK, grad_drop=False, direction=direction)
    for kind in QK:
        for layer, target in enumerate(other[kind]):
            for pos in range(target.shape[1]):
                for head in range(target.shape[2]):

                    def swap(t, pos=pos, head=head, target=target):
                        t = t.clone()
                        t[:, pos, head] = target[:, pos, head]
                        return t

                    moved = forward(weights, config, base_ids, patch={(kind, layer): swap})["pattern"][layer]
                    want = ((moved - base["pattern"][layer]) * slope[layer]).sum((1, 2, 3))
                    close(got[kind].examples[:, layer, pos, head], want)
    assert got.meta["signed"]


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_qk_fix_towards_a_baseline(baseline):
    """The rotation applies to what is put in: a zero or mean key, before rotary, in place of the run's."""
    c = case("llama")
    weights, config, ids, _ = c.prompts
    base = forward(weights, config, ids)
    slope = S.gradients(base, c.metric, ["pattern"])["pattern"]
    got = run(c, "atp_star", QK, grad_drop=False, baseline=baseline, batch_size=2)
    for kind in QK:
        for layer, pos, head in ((0, 1, 0), (2, 3, 1)):

            def swap(t, pos=pos, head=head):
                t = t.clone()
                t[:, pos, head] = 0 if baseline == "zero" else t[:, pos, head].mean(0, keepdim=True)
                return t

            moved = forward(weights, config, ids, patch={(kind, layer): swap})["pattern"][layer]
            close(
                got[kind].examples[:, layer, pos, head],
                ((moved - base["pattern"][layer]) * slope[layer]).sum((1, 2, 3)),
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_other_kinds_are_unchanged_by_the_qk_fix(shape):
    c = case(shape)
    kinds = tuple(k for k in S.KINDS if k not in QK)
    for drop in (False, True):
        fixed, plain = (run(c, "atp_star", S.KINDS, grad_drop=drop, qk_fix=fix) for fix in (True, False))
        for kind in kinds:
            assert torch.equal(fixed[kind].examples, plain[kind].examples)
        for kind in QK:
            assert (fixed[kind].mean - plain[kind].mean).abs().max() > 1e-3
    atp, off = run(c, "atp"), run(c, "atp_star", grad_drop=False, qk_fix=False)
    for kind in S.KINDS:
        close(off[kind].examples, atp[kind].examples)


@pytest.mark.parametrize("shape", SHAPES)
def test_grad_drop_equals_detaching_each_layer(shape):
    """|score| averaged over ℓ, layer ℓ's contributions detached in the oracle; a layer's own nodes skip their own ℓ."""
    c = case(shape)
    weights, config, original, patch = c.prompts
    base, other = (forward(weights, config, ids) for ids in (original, patch))
    n_layers = len(base["attn_out"])
    total = {}
    for dropped in range(n_layers):
        cut = {(kind, dropped): lambda t: t.detach() for kind in ("attn_out", "mlp_out")}
        grads = S.gradients(forward(weights, config, original, patch=cut), c.metric, S.KINDS)
        for kind in S.KINDS:
            product = torch.stack(
                [(o - n) * g for o, n, g in zip(other[kind], base[kind], grads[kind], strict=True)], 1
            )
            value = (product if kind == "mlp_neuron" else product.sum(-1)).detach().abs()
            if kind != "resid_pre":
                value[:, dropped] = 0
            total[kind] = total.get(kind, 0) + value
    got = run(c, "atp_star", S.KINDS, qk_fix=False)
    for kind in S.KINDS:
        close(got[kind].examples, total[kind] / (n_layers if kind == "resid_pre" else n_layers - 1))
    assert not got.meta["signed"]


def test_closed_forms_neither_overflow_nor_cancel():
    """Scores of ±1000 and patterns saturated to 1e-40, in float64 against a softmax with 100 further digits of range."""
    rng = torch.Generator().manual_seed(0)
    before = 300 * torch.randn(3, 2, 5, 5, generator=rng, dtype=torch.float64)
    after = 1000 * torch.randn(3, 2, 5, 5, generator=rng, dtype=torch.float64)
    after[0] = before[0]
    grad = torch.randn(3, 2, 5, 5, generator=rng, dtype=torch.float64)
    mask = torch.ones(5, 5).triu(1).bool()
    before, after = (t.masked_fill(mask, torch.finfo(t.dtype).min) for t in (before, after))
    p = before.softmax(-1)
    close(query_effects(before, after, grad), ((after.softmax(-1) - p) * grad).sum(-1), 1e-12)
    got = key_effects(before, after, grad)
    for t in range(5):
        one = before.clone()
        one[..., t] = after[..., t]
        close(got[..., t], ((one.softmax(-1) - p) * grad).sum((-1, -2)), 1e-12)
    assert (got[0] == 0).all()


def test_one_layer_has_nothing_to_drop():
    model = hand_built(n_layer=1)
    with pytest.raises(RelpError, match="one-layer"):
        score(model, [PairBatch([[0, 1, 2]], [[0, 1, 3]], [0], [1])], "atp_star", ["head"])


def test_cost_of_the_parts():
    c = case("gpt2")
    for options, kinds, cost in (
        ({}, ["head"], (2, 3)),
        ({"grad_drop": False}, ["head"], (2, 1)),
        ({"grad_drop": False}, list(QK), (4, 1)),
        ({"qk_fix": False}, list(QK), (2, 3)),
        ({}, list(QK), (4, 3)),
    ):
        meta = run(c, "atp_star", kinds, **options).meta
        assert (meta["forwards_per_pair"], meta["backwards_per_pair"]) == cost


# Hand-built models. Dimensions 0, 1 hold ±BIG, which makes every layer norm a division by nearly the same constant.
BIG = 100.0
A, B, ASK_A, ASK_B = range(4)  # tokens: two that are attended to, two that ask for one or the other


def hand_built(n_layer: int, d: int = 12):
    """GPT-2 with all weights 0 but the embeddings and the norms' weights; features are ± couples of dimensions.

    Features: 1 is A (+) or B (−), 2 asks for A (+) or B (−), 3 and 4 are written by components; the logits of token 0
    and 1 read ± feature 3. The mean over dimensions is 0 throughout, and σ = BIG/√(d/2).
    """
    config = GPT2Config(
        vocab_size=4, n_positions=8, n_embd=d, n_layer=n_layer, n_head=1, n_inner=2, activation_function="relu",
        tie_word_embeddings=False, attn_implementation="eager", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with exact_float64():
        hf = GPT2LMHeadModel(config).double().eval()
    for name, p in hf.named_parameters():
        p.data.fill_(BIG / (d / 2) ** 0.5 if "ln_" in name and name.endswith("weight") else 0.0)  # norms ≈ identity
    for token, values in {A: {1: 1}, B: {1: -1}, ASK_A: {2: 1}, ASK_B: {2: -1}}.items():
        hf.transformer.wte.weight.data[token] = sum(v * feature(f, d) for f, v in values.items()) + BIG * feature(0, d)
    hf.lm_head.weight.data[0], hf.lm_head.weight.data[1] = feature(3, d), -feature(3, d)
    return wrap(hf, None, "hand-built")


def feature(n: int, d: int = 12) -> torch.Tensor:
    out = torch.zeros(d, dtype=torch.float64)
    out[2 * n], out[2 * n + 1] = 1.0, -1.0
    return out


def attend(model, layer: int, strength: float) -> None:
    """The head of a layer attends to A or B as the query's token asks, and copies feature 1 into feature 3."""
    block, d = model.hf.transformer.h[layer].attn, model.shape.d_model
    attn = getattr(block, "original_component", block)
    weight = next(
        p for n, p in attn.named_parameters() if "c_attn" in n and n.endswith("weight") and p.shape == (d, 3 * d)
    )
    out = next(p for n, p in attn.named_parameters() if "c_proj" in n and n.endswith("weight"))
    weight.data[:, 0] = strength * feature(2)
    weight.data[:, d] = feature(1)
    weight.data[:, 2 * d] = feature(1) / 2
    out.data[0] = feature(3)


def test_a_saturated_head_is_invisible_to_atp_and_right_in_atp_star():
    """The query attends to A with probability 1 − 1e-20; with the patch's query (or keys) it attends to B."""
    model = hand_built(n_layer=1)
    attend(model, 0, strength=40.0)
    pairs = [PairBatch([[A, B, ASK_A]], [[A, B, ASK_B]], [0], [1])]
    exact, atp = (score(model, pairs, m, ["query"])["query"].mean[0, 2, 0].item() for m in ("act_patch", "atp"))
    star = score(model, pairs, "atp_star", ["query"], grad_drop=False)["query"].mean[0, 2, 0].item()
    assert abs(exact) > 1
    assert abs(atp) < 1e-6
    assert star == pytest.approx(
        exact, rel=1e-2
    )  # the norms are constant to 1 %, so what follows the pattern is linear

    swapped = [PairBatch([[A, B, ASK_A]], [[B, A, ASK_A]], [0], [1])]  # a key that no longer matches: attention halves
    exact, atp = (score(model, swapped, m, ["key"])["key"].mean[0, 0, 0].item() for m in ("act_patch", "atp"))
    star = score(model, swapped, "atp_star", ["key"], grad_drop=False)["key"].mean[0, 0, 0].item()
    assert abs(exact) > 0.5
    assert abs(atp) < 1e-6
    assert star == pytest.approx(exact, rel=1e-2)


def test_a_cancelling_pair_is_invisible_to_atp_and_recovered_by_grad_drop():
    """Attention of layer 0 adds +1 to the answer's feature, and the MLP of layer 1 takes away whatever is positive of
    it. At the run the two cancel, so the gradient is 0. Patched to −1, the MLP is off and the effect is there.
    """
    model = hand_built(n_layer=2)
    attend(model, 0, strength=40.0)
    mlp = {n.replace("original_component.", ""): p for n, p in model.hf.transformer.h[1].mlp.named_parameters()}
    weight_in = next(p for n, p in mlp.items() if "c_fc" in n and n.endswith("weight"))
    weight_out = next(p for n, p in mlp.items() if "c_proj" in n and n.endswith("weight"))
    weight_in.data[:, 0], weight_out.data[0] = feature(3) / 2, -feature(3)
    pairs = [PairBatch([[A, B, ASK_A]], [[A, B, ASK_B]], [0], [1])]
    kinds = ["attn_out", "head"]
    exact, atp, drop = (score(model, pairs, m, kinds) for m in ("act_patch", "atp", "atp_star"))
    direct = run_direct(model, pairs)
    for kind in kinds:
        at = (0, 2) if kind == "attn_out" else (0, 2, 0)
        assert abs(exact[kind].mean[at]) > 1
        assert abs(atp[kind].mean[at]) < 0.01
        assert drop[kind].mean[at].item() == pytest.approx(abs(direct), rel=1e-6)  # only layer 1 is dropped for it
        assert drop[kind].mean[at] > abs(exact[kind].mean[at])


def run_direct(model, pairs) -> float:
    """δ · gradient of attn_out[0] at the last position with layer 1's MLP at 0 instead: the direct effect alone."""
    with model.hooks({"blocks.1.hook_mlp_out": lambda h: h.detach()}):
        return score(model, pairs, "atp", ["attn_out"])["attn_out"].mean[0, 2].item()
