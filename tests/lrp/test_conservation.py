"""LN + Identity + Half + AH + softcap make a model linear: relevance is conserved, but for the biases' share."""

import pytest
import torch
from oracles.make import SHAPES, exact_float64
from oracles.wrapped import GATED, case, close, run

from relp_cli.lrp.context import lrp
from relp_cli.nodes.access import capture
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.tasks.metrics import METRICS

EVERY = ("ln", "identity", "half", "ah", "softcap")


def everything(shape):
    return [r for r in EVERY if (r != "half" or shape in GATED) and (r != "softcap" or shape == "gemma2")]


def relevance(c, rules):
    """−(baseline-zero score) summed over positions: Σ n·ρ per layer, and L(x_o); Float[batch layer], Float[batch]."""
    got = run(c, "relp", ["resid_pre"], rules=rules, baseline="zero")["resid_pre"]
    logits = c.model.logits(c.batch.original)
    return -got.examples.sum(2), METRICS["logit_diff"].fn(logits, c.batch.answer, c.batch.foil)


@pytest.mark.parametrize("shape", SHAPES)
def test_without_biases_relevance_is_the_metric_at_every_layer(shape):
    c = case(shape, bias=False)
    with exact_float64():
        total, value = relevance(c, everything(shape))
        close(total, value[:, None].expand_as(total))
        for missing in everything(shape):  # each rule is needed
            total, _ = relevance(c, [r for r in everything(shape) if r != missing])
            assert (total - value[:, None]).abs().max() > 1e-4, missing


def bias_points(c):
    """Hook point behind a bias → that bias, from the Hugging Face weights by their names."""
    w, family = c.weights, c.config.model_type
    heads, d = c.config.num_attention_heads, c.config.hidden_size
    points = {}
    for i in range(3):
        if family == "gpt2":
            at, b = f"transformer.h.{i}.", f"blocks.{i}."
            points[b + "ln1.hook_out"] = w[at + "ln_1.bias"]
            points[b + "ln2.hook_out"] = w[at + "ln_2.bias"]
            points[b + "attn.v.hook_out"] = w[at + "attn.c_attn.bias"][2 * d :]
            points[b + "attn.o.hook_out"] = w[at + "attn.c_proj.bias"]
            points[b + "mlp.in.hook_out"] = w[at + "mlp.c_fc.bias"]
            points[b + "mlp.out.hook_out"] = w[at + "mlp.c_proj.bias"]
        elif family == "gpt_neox":
            at, b = f"gpt_neox.layers.{i}.", f"blocks.{i}."
            points[b + "ln1.hook_out"] = w[at + "input_layernorm.bias"]
            points[b + "ln2.hook_out"] = w[at + "post_attention_layernorm.bias"]
            points[b + "attn.v.hook_out"] = w[at + "attention.query_key_value.bias"].view(heads, 3, -1)[:, 2].flatten()
            points[b + "attn.o.hook_out"] = w[at + "attention.dense.bias"]
            points[b + "mlp.in.hook_out"] = w[at + "mlp.dense_h_to_4h.bias"]
            points[b + "mlp.out.hook_out"] = w[at + "mlp.dense_4h_to_h.bias"]
        else:  # Qwen2: queries, keys and values only; queries and keys carry no relevance under the AH-rule
            points[f"blocks.{i}.attn.v.hook_out"] = w[f"model.layers.{i}.self_attn.v_proj.bias"]
    if family in ("gpt2", "gpt_neox"):
        name = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}[family]
        points["ln_final.hook_out"] = w[name + ".bias"]
    return points


@pytest.mark.parametrize("shape", ["gpt2", "pythia", "pythia-serial", "qwen2"])
def test_with_biases_the_missing_part_is_the_biases_relevance(shape):
    """z = Wx + b gives z·ρ = x·Wᵀρ + b·ρ: layer l lacks Σ b·ρ over the biases at and above it."""
    c = case(shape)
    points, values = bias_points(c), {}
    with exact_float64(), torch.enable_grad():
        keep = {name: (lambda v, name=name: values.__setitem__(name, v)) for name in points}
        with lrp(c.model, everything(shape)), capture(c.model, [NODE_KINDS["resid_pre"]]) as seen, c.model.hooks(keep):
            logits = c.model.logits(c.batch.original)
        value = METRICS["logit_diff"].fn(logits, c.batch.answer, c.batch.foil)
        flat = [*values.values(), *seen["resid_pre"]]
        grads = dict(zip([*values, 0, 1, 2], torch.autograd.grad(value.sum(), flat, allow_unused=True), strict=True))
    for layer in range(3):
        above = [n for n in points if not n.startswith("blocks.") or int(n.split(".")[1]) >= layer]
        held = sum((grads[n] * points[n]).flatten(1).sum(1) for n in above)
        total = (seen["resid_pre"][layer] * grads[layer]).sum((1, 2))
        close((value - total).detach(), held.detach())
        assert held.abs().min() > 1e-3


@pytest.mark.parametrize("rules", [["ln"], ["identity"], EVERY], ids=lambda r: "+".join(r))
@pytest.mark.parametrize("shape", SHAPES)
def test_parts_of_a_linear_layer_sum_to_its_output(shape, rules):
    """Σ neurons = mlp_out and Σ heads = attn_out (the 0-rule); the Half-rule shares a hook with the neurons."""
    c = case(shape)
    rules = [r for r in rules if r in everything(shape)]
    kinds = ["attn_out", "mlp_out", "head", "mlp_neuron"]
    modes = [{"direction": "noising"}, {"direction": "denoising"}]
    if shape == "gemma2":  # its outputs are behind a post-norm: only a whole, bias-free LN-rule pass conserves
        modes = [{"baseline": "zero"}] if "ln" in rules else []
    for mode in modes:
        got = run(c, "relp", kinds, rules=rules, **mode)
        close(got["head"].examples.sum(-1), got["attn_out"].examples)
        close(got["mlp_neuron"].examples.sum(-1), got["mlp_out"].examples)


@pytest.mark.parametrize("shape", SHAPES)
def test_under_ah_values_hold_what_heads_hold(shape):
    """z = P·v with P constant: over all positions, values hold as much as heads, also where heads share them."""
    got = run(case(shape), "relp", ["head", "value"], rules=["ah"], baseline="zero")
    close(got["value"].examples.sum((2, 3)), got["head"].examples.sum((2, 3)))
