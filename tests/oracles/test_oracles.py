"""The oracle proves itself: HF's logits, invariance under rules, conservation, finite differences, patching."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from . import scores as S
from .forward import forward, linear, softcap
from .make import SHAPES, exact_float64, random_model

UNGATED = ("gpt2", "pythia", "pythia-serial")
ALL_RULES = frozenset({"ln", "identity", "half", "ah", "softcap"})
SETS = [*(frozenset({r}) for r in sorted(ALL_RULES)), ALL_RULES, ALL_RULES | {"epsilon"}, ALL_RULES | {"gamma"}]


def setup(shape: str, bias: bool = True, seed: int = 0, batch: int = 3, pos: int = 7) -> tuple[Any, ...]:
    model = random_model(shape, seed, bias)
    ids = torch.randint(50, (4, batch, pos), generator=torch.Generator().manual_seed(seed + 1))
    metric = S.logit_diff(ids[2, :, 0], (ids[2, :, 0] + 7) % 50)
    return model, model.state_dict(), model.config, ids[0], ids[1], metric


def close(a: Tensor, b: Tensor, tol: float) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_parameter_is_random_and_activations_are_order_one(shape: str) -> None:
    model, w, c, ids, _, _ = setup(shape)
    assert all(p.std() > 0.05 for p in model.parameters())
    trace = forward(w, c, ids)
    for kind in S.KINDS:
        assert all(0.1 < t.std() < 10 for t in trace[kind]), kind
    biases = [p for n, p in random_model(shape, 0, bias=False).named_parameters() if n.endswith("bias")]
    assert not any(p.any() for p in biases)
    assert len(biases) == sum(n.endswith("bias") for n in w)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_patterns_equal_hugging_face(shape: str) -> None:
    model, w, c, ids, _, _ = setup(shape)
    trace = forward(w, c, ids)
    with exact_float64():
        out = model(ids, output_attentions=True, output_hidden_states=True)
    close(trace.logits, out.logits, 1e-10)
    for layer in range(3):
        close(trace["pattern"][layer], out.attentions[layer], 1e-10)
        close(trace["resid_pre"][layer], out.hidden_states[layer], 1e-10)
    close(model(ids).logits, trace.logits, 1e-4)  # HF's own float32 islands


@pytest.mark.parametrize("shape", SHAPES)
def test_embeddings_in_place_of_tokens_and_residual_sum(shape: str) -> None:
    _, w, c, ids, _, _ = setup(shape)
    trace = forward(w, c, ids)
    assert torch.equal(forward(w, c, S.embed(w, c, ids)).logits, trace.logits)
    for layer in range(2):
        parts = [trace[k][layer] for k in ("resid_pre", "attn_out", "mlp_out")]
        close(torch.stack(parts).sum(0), trace["resid_pre"][layer + 1], 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_rules_never_change_the_forward_but_change_the_gradient(shape: str) -> None:
    _, w, c, ids, _, metric = setup(shape)
    plain = forward(w, c, ids)
    grad = S.gradients(plain, metric, ["resid_pre"])["resid_pre"][0]
    for rules in SETS:
        trace = forward(w, c, ids, rules)
        close(trace.logits, plain.logits, 1e-10)
        absent = (rules == {"half"} and shape in UNGATED) or (rules == {"softcap"} and shape != "gemma2")
        new = S.gradients(trace, metric, ["resid_pre"])["resid_pre"][0]
        assert torch.allclose(new, grad, rtol=1e-6) == absent, rules


@pytest.mark.parametrize("shape", SHAPES)
def test_conservation_at_every_layer(shape: str) -> None:
    for bias in (False, True):
        _, w, c, ids, _, metric = setup(shape, bias)
        trace = forward(w, c, ids, ALL_RULES)
        total = metric(trace.logits)
        for x, g in zip(trace["resid_pre"], S.gradients(trace, metric, ["resid_pre"])["resid_pre"], strict=True):
            error = ((x * g).sum((1, 2)) - total).abs().max()
            assert error < 1e-8 if not any(k.endswith("bias") for k in w) or not bias else error > 1e-3
    if shape == "gemma2":
        trace = forward(w, c, ids, ALL_RULES - {"softcap"})
        g = S.gradients(trace, metric, ["resid_pre"])["resid_pre"][0]
        assert ((trace["resid_pre"][0] * g).sum((1, 2)) - total).abs().max() > 1e-3


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("shape", SHAPES)
def test_atp_is_the_directional_derivative(shape: str, direction: str) -> None:
    _, w, c, original, patch, metric = setup(shape)
    scores = S.atp(w, c, original, patch, metric, direction=direction)
    base, other = S.pick(direction, original, patch)
    target, h = forward(w, c, other), 1e-4
    nodes = [(k, layer, p) for k in S.KINDS for layer, p in ((0, 2), (1, 6), (2, 6))]
    for kind, layer, pos in nodes:
        unit = (5,) if kind == "mlp_neuron" else (1,) if kind in ("head", "query", "key", "value") else ()
        at = (slice(None), pos, *unit)

        def run(t: float, kind: str = kind, layer: int = layer, at: tuple = at) -> Tensor:
            def move(n: Tensor) -> Tensor:
                n = n.clone()
                n[at] += t * (target[kind][layer][at] - n[at])
                return n

            return metric(forward(w, c, base, patch={(kind, layer): move}).logits)

        slope = (8 * (run(h) - run(-h)) - (run(2 * h) - run(-2 * h))) / (12 * h)
        close(scores[kind][(slice(None), layer, pos, *unit)], slope.detach(), 1e-8)


def test_no_rules_is_atp_and_neurons_sum_to_mlp_out() -> None:
    for shape in SHAPES:
        _, w, c, original, patch, metric = setup(shape)
        plain, empty = S.atp(w, c, original, patch, metric), S.relp(w, c, original, patch, metric, frozenset())
        assert all(torch.equal(plain[k], empty[k]) for k in S.KINDS)
        relp = S.relp(w, c, original, patch, metric, ALL_RULES)
        if shape != "gemma2":  # its mlp_out is after a norm
            close(relp["mlp_neuron"].sum(-1), relp["mlp_out"], 1e-10)
            close(relp["head"].sum(-1), relp["attn_out"], 1e-10)
        assert not torch.cat([relp["query"], relp["key"]], -1).any()  # ah
        assert relp["value"].any()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_patching(shape: str, direction: str) -> None:
    _, w, c, original, patch, metric = setup(shape, batch=2, pos=4)
    base, other = S.pick(direction, original, patch)
    target = forward(w, c, other)
    run = forward(w, c, base, patch={("resid_pre", 0): lambda _: target["resid_pre"][0]})
    close(metric(run.logits), metric(target.logits), 1e-12)
    scores = S.act_patch(w, c, original, patch, metric, direction=direction, chunk=5)
    for kind, values in scores.items():  # against one unbatched forward, and AtP's shapes
        at = (slice(None), 3, 1) if values.ndim == 4 else (slice(None), 3)

        def swap(t: Tensor, kind: str = kind, at: tuple = at) -> Tensor:
            t = t.clone()
            t[at] = target[kind][2][at]
            return t

        one = metric(forward(w, c, base, patch={(kind, 2): swap}).logits) - metric(forward(w, c, base).logits)
        close(values[:, 2][at], one.detach(), 1e-12)
    assert {k: v.shape for k, v in scores.items()} == {
        k: v.shape for k, v in S.atp(w, c, original, patch, metric, direction=direction).items()
    }
    # nothing reads the last mlp_out but the unembedding, and the metric only the last position
    assert not scores["mlp_out"][:, 2, :-1].any()


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("shape", SHAPES)
def test_integrated_gradients_completeness_and_order(shape: str, direction: str) -> None:
    _, w, c, original, patch, metric = setup(shape, batch=1, pos=4)
    patch = torch.where(torch.arange(4) == 2, patch, original)
    base, other = S.pick(direction, original, patch)
    change = (metric(forward(w, c, other).logits) - metric(forward(w, c, base).logits)).detach()

    def error(steps: int, rule: str) -> float:
        score = S.ig_inputs(w, c, original, patch, metric, steps, rule, ["resid_pre"], direction)["resid_pre"]
        return (score[:, 0].sum(-1) - change).abs().max().item()

    assert error(50, "midpoint") < 1e-3 * change.abs().max()
    for rule, factor in (("left", 2), ("right", 2), ("midpoint", 4)):
        assert error(50, rule) / error(100, rule) == pytest.approx(factor, rel=0.05), rule
    one = S.ig_inputs(w, c, original, patch, metric, 1, "left", direction=direction)
    atp = S.atp(w, c, original, patch, metric, direction=direction)
    for kind in S.KINDS:
        close(one[kind], atp[kind], 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_faithfulness_limits(shape: str) -> None:
    _, w, c, original, patch, metric = setup(shape, pos=5)
    trace, rng = forward(w, c, original), torch.Generator().manual_seed(3)
    for kind in ("mlp_neuron", "head", "mlp_out"):
        units = trace[kind][0].shape[1:] if kind == "mlp_neuron" else trace[kind][0].shape[1:-1]
        mask = torch.rand(3, *units, generator=rng) < 0.5
        for ablation in ("mean", "zero", "patch"):
            for m, want in ((torch.ones_like(mask), (1, 0)), (torch.zeros_like(mask), (0, 1))):
                got = S.faithfulness(w, c, original, patch, metric, {kind: m}, 1, ablation)
                assert (got["faithfulness"], got["completeness"]) == pytest.approx(want, abs=1e-12)
        some, other = (S.faithfulness(w, c, original, patch, metric, {kind: m}, 1) for m in (mask, ~mask))
        assert some["completeness"] == pytest.approx(other["faithfulness"])
        assert some["F_C"] != some["F_M"]
        mask[0] = ~mask[0]  # an excluded layer's mask plays no part
        assert S.faithfulness(w, c, original, patch, metric, {kind: mask}, 1) == some
    # one neuron out, by hand: its mean over the patch prompts, at its position
    mask = torch.ones(3, 5, 48, dtype=torch.bool)
    mask[2, 4, 7] = False
    fill = forward(w, c, patch)["mlp_neuron"][2][:, 4, 7].mean()

    def ablate(t: Tensor) -> Tensor:
        t = t.clone()
        t[:, 4, 7] = fill
        return t

    by_hand = metric(forward(w, c, original, patch={("mlp_neuron", 2): ablate}).logits).mean().item()
    assert S.faithfulness(w, c, original, patch, metric, {"mlp_neuron": mask})["F_C"] == pytest.approx(by_hand)


@pytest.mark.parametrize("shape", ["gpt2", "pythia-serial", "qwen2", "llama"])
def test_half_identity_and_ln_each_alone_in_the_last_mlp(shape: str) -> None:
    """Conservation holds for other splits of a gate too, so each rule's pull-back through one MLP is pinned apart.

    In a serial block without post-norms ∂L/∂attn_out − ∂L/∂mlp_out is the gradient pulled back through norm and MLP."""
    _, w, c, ids, _, metric = setup(shape)

    def pulled(rules: set[str]) -> tuple[Tensor, Tensor]:
        grads = S.gradients(forward(w, c, ids, rules), metric, ["attn_out", "mlp_out"])
        return grads["attn_out"][2] - grads["mlp_out"][2], grads["mlp_out"][2]

    if shape not in UNGATED:
        close(pulled({"half"})[0], 0.5 * pulled(set())[0], 1e-12)
        return
    trace = forward(w, c, ids)
    x = trace["resid_pre"][2] + trace["attn_out"][2]
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    at = {"gpt2": "transformer.h.2.{}", "pythia-serial": "gpt_neox.layers.2.{}"}[shape].format
    ln, up, down = {
        "gpt2": ("ln_2", "mlp.c_fc", "mlp.c_proj"),
        "pythia-serial": ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    }[shape]
    w_up, w_down = (w[at(n) + ".weight"].T if shape == "gpt2" else w[at(n) + ".weight"] for n in (up, down))
    a = (centred / scale * w[at(ln) + ".weight"] + w[at(ln) + ".bias"]) @ w_up.T + w[at(up) + ".bias"]
    for rules in ({"ln", "identity"}, {"ln"}):
        got, g = pulled(rules)
        act = torch.nn.functional.gelu(a, approximate="tanh" if shape == "gpt2" else "none")
        factor = act / a if "identity" in rules else torch.autograd.grad(act.sum(), a, retain_graph=True)[0]
        back = ((g @ w_down) * factor) @ w_up * w[at(ln) + ".weight"] / scale
        close(got, (back - back.mean(-1, keepdim=True)).detach(), 1e-10)


def test_softcap_rule_by_hand() -> None:
    x = torch.tensor([-4.0, -0.1, 0.0, 1e-9, 2.0], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(softcap(x, 3.0, True).sum(), x)
    want = torch.tensor([3 * math.tanh(v / 3) / v if v else 1.0 for v in x.tolist()], dtype=torch.float64)
    close(g, want, 1e-12)
    close(softcap(x, 3.0, True), softcap(x, 3.0, False), 1e-12)


def test_epsilon_and_gamma_rule_by_hand() -> None:
    rng = torch.Generator().manual_seed(0)
    x, w, b, g = (torch.randn(n, generator=rng, dtype=torch.float64) for n in ((4,), (3, 4), (3,), (3,)))
    z = w @ x + b
    assert {True, False} <= {bool(v) for v in z > 0}
    for rule in ("epsilon", "gamma"):
        want = torch.zeros(4, dtype=torch.float64)
        for o in range(3):
            sign = 1.0 if z[o] > 0 else -1.0
            if rule == "epsilon":
                parts, rest, eps = w[o] * x, b[o], 0.1
            else:  # contributions of the output's own sign are favoured by 1 + γ
                parts = torch.stack([p * (1 + 0.5 * (p * sign > 0)) for p in w[o] * x])
                rest, eps = b[o] * (1 + 0.5 * bool(b[o] * sign > 0)), 1e-6
            want += parts * z[o] * g[o] / (parts.sum() + rest + sign * eps)
        leaf = x.clone().requires_grad_()
        y = linear(leaf, w, b, frozenset({rule}), 0.1, 0.5)
        close(y.detach(), z, 1e-12)
        close(leaf.detach() * torch.autograd.grad(y @ g, leaf)[0], want, 1e-12)


def test_bad_rules_and_nodes_are_refused() -> None:
    _, w, c, ids, _, _ = setup("gpt2")
    with pytest.raises(ValueError, match="rules"):
        forward(w, c, ids, {"lm"})
    with pytest.raises(ValueError, match="no such nodes"):
        forward(w, c, ids, patch={("mlp_out", 3): lambda t: t})
