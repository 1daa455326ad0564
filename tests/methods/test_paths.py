"""Integrated gradients, conductance and RelP along a path: oracles, completeness and its orders, brute-force integrals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import scores as S
from oracles.forward import embed, forward
from oracles.make import SHAPES
from oracles.wrapped import GATED, case, close, run

from relp_cli.errors import RelpError
from relp_cli.methods.points import quadrature

PRESET = {shape: ("ln", "identity", *(["half"] if shape in GATED else [])) for shape in SHAPES}


def change(c, direction="noising"):
    """L(source) − L(run) per pair, from the oracle."""
    weights, config, *prompts = c.prompts
    original, patch = (c.metric(forward(weights, config, ids).logits) for ids in prompts)
    return patch - original if direction == "noising" else original - patch


@pytest.mark.parametrize("rule", ["left", "right", "midpoint", "trapezoid", "gauss_legendre"])
def test_quadrature_integrates_polynomials_to_its_degree(rule):
    points, weights = quadrature(rule, 8)
    assert weights.sum() == pytest.approx(1, abs=1e-14)
    assert (np.diff(points) > 0).all()
    degree = {"left": 0, "right": 0, "midpoint": 1, "trapezoid": 1, "gauss_legendre": 15}[rule]
    for power in range(degree + 1):
        assert (weights * points**power).sum() == pytest.approx(1 / (power + 1), abs=1e-13)
    assert abs((weights * points ** (degree + 1)).sum() - 1 / (degree + 2)) > 1e-13


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["left", "right", "midpoint"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_ig_inputs_and_relp_ig_equal_the_oracle(shape, rule, direction):
    c = case(shape)
    options = {"steps": 4, "rule": rule, "direction": direction, "chunk_tokens": 100}  # two points per pass
    got = run(c, "ig_inputs", **options)
    want = S.ig_inputs(*c.prompts, c.metric, 4, rule, direction=direction)
    for kind in S.KINDS:
        close(got[kind].examples, want[kind])
    kinds = ("resid_pre", "mlp_out", "head", "mlp_neuron")
    got = run(c, "relp_ig", kinds, **options)
    want = S.ig_inputs(*c.prompts, c.metric, 4, rule, kinds, direction, PRESET[shape])
    for kind in kinds:
        close(got[kind].examples, want[kind])
    assert list(got.meta["rules"]) == list(PRESET[shape])


@pytest.mark.parametrize("shape", SHAPES)
def test_one_left_step_is_atp_and_fifty_are_not(shape):
    """The trap of docs/methods.md: an IG that reads the α = 0 rows only."""
    c = case(shape)
    atp, one, fifty = run(c, "atp"), run(c, "ig_inputs", steps=1, rule="left"), run(c, "ig_inputs", steps=50)
    for kind in S.KINDS:
        close(one[kind].examples, atp[kind].examples)
        assert (fifty[kind].mean - atp[kind].mean).abs().max() > 1e-2 * atp[kind].mean.abs().max()


@pytest.mark.parametrize("method", ["relp", "relp+ah", "relp+two_point"])
@pytest.mark.parametrize("shape", ["gpt2", "qwen2"])
def test_one_left_step_of_relp_ig_is_relp(shape, method):
    c, kinds = case(shape), ("resid_pre", "head", "mlp_neuron")
    relp = run(c, method, kinds)
    path = run(c, method.replace("relp", "relp_ig"), kinds, steps=1, rule="left")
    for kind in kinds:
        close(path[kind].examples, relp[kind].examples)


@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
@pytest.mark.parametrize(("rule", "order"), [("left", 1), ("right", 1), ("midpoint", 2), ("trapezoid", 2)])
def test_completeness_error_falls_with_the_stated_order(shape, rule, order):
    c = case(shape)
    want = change(c).mean()
    errors = [
        (run(c, "ig_inputs", ["resid_pre"], steps=m, rule=rule)["resid_pre"].mean[0].sum() - want).abs().item()
        for m in (200, 400)
    ]
    assert 1e-12 < errors[1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_completeness_with_gauss_legendre(shape, direction):
    c = case(shape)
    options = {"steps": 400, "rule": "gauss_legendre", "direction": direction}
    got = run(c, "ig_inputs", ["resid_pre"], **options)["resid_pre"].examples[:, 0].sum(-1)
    close(got, change(c, direction))


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_the_path_ends_at_the_baseline(baseline):
    """Zero or mean embeddings; batch_size 2: the mean is over all pairs, not over a batch. δn is to the baseline too.

    (Completeness towards zero needs thousands of points: at 0 a norm's slope is 1/√eps.)
    """
    c, steps = case("qwen2"), 5
    weights, config, original, _ = c.prompts
    inputs = embed(weights, config, original)

    def end(t):
        return torch.zeros_like(t) if baseline == "zero" else t.mean(0, keepdim=True).expand_as(t)

    total = {}
    for k in range(steps):
        at = inputs + (k + 0.5) / steps * (end(inputs) - inputs)
        for kind, grads in S.gradients(forward(weights, config, at), c.metric, S.KINDS).items():
            total[kind] = torch.stack(grads, 1) / steps + total.get(kind, 0)
    values = forward(weights, config, inputs)
    got = run(c, "ig_inputs", baseline=baseline, steps=steps, batch_size=2)
    for kind in S.KINDS:
        n = torch.stack(values[kind], 1).detach()
        scores = (end(n) - n) * total[kind]
        close(got[kind].examples, scores if kind == "mlp_neuron" else scores.sum(-1))
    if baseline == "mean":
        want = c.metric(forward(weights, config, end(inputs)).logits) - c.metric(values.logits)
        options = {"steps": 300, "rule": "gauss_legendre", "batch_size": 2, "baseline": "mean"}
        close(run(c, "ig_inputs", ["resid_pre"], **options)["resid_pre"].examples[:, 0].sum(-1), want, 1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_conductance_over_every_cut_tends_to_the_whole_change(shape):
    c = case(shape)
    want = change(c).mean()
    for options in ({"steps": 200}, {"steps": 200, "rule": "midpoint"}, {"steps": 200, "rule": "gauss_legendre"}):
        got = run(c, "conductance", ["resid_pre"], **options)["resid_pre"].mean.sum(-1)
        close(got, want.expand(3), 1e-3)


@pytest.mark.parametrize(("rule", "order"), [("left", 1), ("right", 1), ("trapezoid", 2), ("midpoint", 2)])
def test_conductance_error_falls_with_the_stated_order(rule, order):
    c = case("gpt2")
    want = change(c).mean()
    errors = [
        (run(c, "conductance", ["resid_pre"], steps=m, rule=rule)["resid_pre"].mean.sum(-1) - want).abs()
        for m in (200, 400)
    ]
    close(errors[0] / errors[1], torch.full((3,), 2.0**order), 0.15)


@pytest.mark.parametrize("rule", ["left", "right", "trapezoid", "midpoint", "gauss_legendre"])
def test_conductance_does_not_depend_on_how_the_path_is_cut_into_passes(rule):
    c = case("pythia")
    whole, cut = (run(c, "conductance", steps=7, rule=rule, chunk_tokens=n) for n in (16384, 70))
    for kind in S.KINDS:
        close(cut[kind].examples, whole[kind].examples)


def test_conductance_of_the_inputs_is_ig_inputs():
    c = case("llama")
    for rule in ("left", "midpoint", "trapezoid"):
        a, b = (
            run(c, m, ["resid_pre"], steps=5, rule=rule)["resid_pre"].examples for m in ("conductance", "ig_inputs")
        )
        close(a[:, 0], b[:, 0])


def site(c, kind, layer, prompt):
    weights, config, *prompts = c.prompts
    return forward(weights, config, prompts[prompt])[kind][layer].detach()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["mlp_neuron", "head", "attn_out", "resid_pre", "key"])
def test_joint_ig_activations_equal_clamping_the_site(shape, kind):
    c, layer, steps = case(shape), 1, 4
    weights, config, original, _ = c.prompts
    a, b = (site(c, kind, layer, prompt) for prompt in (0, 1))
    total = torch.zeros_like(a)
    for k in range(steps):
        leaf = (a + (k + 0.5) / steps * (b - a)).requires_grad_()
        logits = forward(weights, config, original, patch={(kind, layer): lambda _, leaf=leaf: leaf}).logits
        total += torch.autograd.grad(c.metric(logits).sum(), leaf)[0] / steps
    want = total * (b - a)
    scores = run(c, "ig_activations", [kind], steps=steps)
    close(scores[kind].examples[:, layer], want if kind == "mlp_neuron" else want.sum(-1))
    assert scores.meta["interpolation"].startswith("joint")


@pytest.mark.parametrize("shape", ["gpt2", "qwen2", "gemma2"])
def test_ig_activations_of_one_node_equal_a_brute_force_integral(shape):
    """Neuron 5 and head 1 of layer 1, every position; as steps grow the integral is the exact patching effect."""
    c, layer, steps = case(shape), 1, 6
    weights, config, original, _ = c.prompts
    for kind, unit in (("mlp_neuron", 5), ("head", 1)):
        a, b = (site(c, kind, layer, prompt) for prompt in (0, 1))
        got = run(c, "ig_activations", [kind], steps=steps, exact=[(layer, unit)], chunk_tokens=300)
        joint = run(c, "ig_activations", [kind], steps=steps)
        for pos in range(original.shape[1]):
            where = torch.zeros_like(a, dtype=torch.bool)
            where[:, pos, unit] = True
            slopes = []
            for k in range(steps):
                alpha = torch.full((len(a), *[1] * (a.ndim - 1)), (k + 0.5) / steps, requires_grad=True, dtype=a.dtype)
                moved = torch.where(where, a + alpha * (b - a), a)
                logits = forward(weights, config, original, patch={(kind, layer): lambda _, moved=moved: moved}).logits
                slopes.append(torch.autograd.grad(c.metric(logits).sum(), alpha)[0].flatten())
            close(got[kind].examples[:, layer, pos, unit], torch.stack(slopes).mean(0))
        others = torch.arange(got[kind].mean.shape[-1]) != unit
        close(got[kind].examples[..., others], joint[kind].examples[..., others])
        assert got.meta["interpolation"].startswith("exact (one node at a time) for layer, unit [(1, ")
        many = run(c, "ig_activations", [kind], steps=60, rule="gauss_legendre", exact=[(layer, unit)])
        exact = run(c, "act_patch", [kind])
        close(many[kind].examples[:, layer, :, unit], exact[kind].examples[:, layer, :, unit], 1e-6)


def test_exact_interpolation_of_all_vector_nodes_and_of_shared_roles():
    """Positions that share a role move together, as in exact patching."""
    c = case("gpt2")
    batch = replace(c.batch, roles=("a", "b", "c", "b", "c", "d", "end")[-c.batch.n_pos :])
    options = {"steps": 60, "rule": "gauss_legendre", "exact": "all", "batches": [batch]}
    got = run(c, "ig_activations", ["attn_out"], **options)
    close(got["attn_out"].examples, run(c, "act_patch", ["attn_out"], [batch])["attn_out"].examples, 1e-6)
    assert got.meta["interpolation"] == "exact (one node at a time)"


def test_bad_parameters_are_one_clear_line():
    c = case("gpt2")
    with pytest.raises(RelpError, match="rule"):
        run(c, "ig_inputs", rule="simpson")
    with pytest.raises(RelpError, match="steps"):
        run(c, "ig_inputs", steps=0)
    with pytest.raises(RelpError, match="mlp_neuron has no layer 3, unit 0; there are 3 layers of 48 units"):
        run(c, "ig_activations", ["mlp_neuron"], exact=[(3, 0)])
    with pytest.raises(RelpError, match="takes no rules"):
        run(c, "ig_inputs+ah")


def test_cost_in_passes_is_what_was_promised():
    c = case("gpt2")
    for method, options, cost in (
        ("ig_inputs", {"steps": 10}, (12, 10)),
        ("relp_ig", {"steps": 3}, (5, 3)),
        ("conductance", {"steps": 10}, (13, 11)),
        ("ig_activations", {"steps": 2, "nodes": ["attn_out", "mlp_out"]}, (2 + 2 * 2 * 3, 2 * 2 * 3)),
    ):
        meta = run(c, method, options.pop("nodes", ["attn_out"]), **options).meta
        assert (meta["forwards_per_pair"], meta["backwards_per_pair"]) == cost, method


def test_kl_can_be_attributed_along_the_path():
    """Its gradient is 0 at the original only: the path's other points see it."""
    c = case("gpt2")
    assert run(c, "ig_inputs", ["resid_pre"], metric="kl")["resid_pre"].mean.abs().max() > 1e-3
    assert run(c, "atp", ["resid_pre"], metric="kl", direction="denoising")["resid_pre"].mean.abs().max() > 1e-3
    with pytest.raises(RelpError, match="gradient exactly 0"):
        run(c, "atp", ["resid_pre"], metric="kl")
