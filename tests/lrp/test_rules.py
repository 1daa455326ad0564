"""The `lrp` context: values stay, hooks go, every rule matches, and what cannot be is refused."""

import contextlib

import pytest
import torch
from oracles import scores as S
from oracles.make import SHAPES, exact_float64
from oracles.wrapped import GATED, case, hook_count, run

from relp_cli.errors import RelpError
from relp_cli.lrp.context import lrp, recording
from relp_cli.lrp.rules import RULES, parse_rules
from relp_cli.models.families import ACTIVATIONS
from relp_cli.tasks.metrics import METRICS

LAYERS = {"norm": 7, "act": 3, "gate": 3, "attention": 3, "softmax": 3, "scores": 3, "linear": 18}


def applicable(shape):
    gate = set() if shape in GATED else {"half", "gate2"}
    return [r for r in RULES if r not in gate and (not r.startswith("softcap") or shape == "gemma2")]


def layers_of(shape, rule):
    if RULES[rule].site == "softcap":
        return 3 + 1
    if shape == "gemma2" and RULES[rule].site == "norm":
        return 4 * 3 + 1
    return LAYERS[RULES[rule].site] + 3 * (shape in GATED and RULES[rule].site == "linear")


@pytest.mark.parametrize("shape", SHAPES)
def test_each_rule_leaves_logits_changes_gradients_and_counts_its_layers(shape):
    c = case(shape)
    leaf = "blocks.0.hook_in"

    def gradient(rules, other):
        seen = []
        start = {leaf: lambda h: (seen.append(h.detach().requires_grad_()), seen[-1])[1]}
        with torch.enable_grad(), lrp(c.model, rules, other) as counts, c.model.hooks(start):
            logits = c.model.logits(c.batch.original)
            value = METRICS["logit_diff"].fn(logits, c.batch.answer, c.batch.foil).sum()
        return logits.detach(), torch.autograd.grad(value, seen[-1])[0], counts

    with exact_float64():
        plain, slope, none = gradient([], None)
        assert none == {}
        for rule in applicable(shape):
            with torch.no_grad(), recording(c.model, [rule]) as other:
                c.model.logits(c.batch.patch)
            logits, changed, counts = gradient([rule], other)
            name = rule if RULES[rule].default is None else f"{rule}={RULES[rule].default:g}"
            assert counts == {name: layers_of(shape, rule)}
            torch.testing.assert_close(logits, plain, rtol=1e-12, atol=1e-12)
            assert (changed - slope).abs().max() > 1e-4 * slope.abs().max(), rule


def test_counts_are_in_the_scores_and_together_count_as_alone():
    got = run(case("gemma2"), "relp+ah+softcap", ["resid_pre"])
    assert got.meta["rules"] == {"ln": 13, "identity": 3, "half": 3, "ah": 3, "softcap": 4}
    got = run(case("gpt2"), "relp+gamma=0.5", ["resid_pre"])
    assert got.meta["rules"] == {"ln": 7, "identity": 3, "gamma=0.5": 18}
    assert [str(a) for a in parse_rules(["ln", "epsilon"])] == ["ln", "epsilon=0.01"]


@pytest.mark.parametrize(
    ("shape", "rules", "message"),
    [
        ("gpt2", ["identiy"], "unknown rule 'identiy'; did you mean 'identity'"),
        ("gpt2", ["secant"], "'secant' is a set of rules, lnx, .*: ask for method 'relp\\+secant'"),
        ("gpt2", ["half"], "'half' matches no layer.*not gated"),
        ("pythia", ["ln", "gate2"], "'gate2' matches no layer.*not gated"),
        ("llama", ["softcap"], "'softcap' matches no layer"),
        ("gpt2", ["ln", "ln2"], "'ln' and 'ln2' both replace the norm"),
        ("qwen2", ["half", "identity", "half"], "'half' and 'half' both replace the gate"),
        ("qwen2", ["epsilon", "gamma"], "both replace the linear"),
        ("gpt2", ["ln=2"], "'ln' takes no parameter"),
        ("gpt2", ["gamma=-1"], "finite and ≥ 0"),
        ("gpt2", ["gamma=nan"], "finite and ≥ 0"),
        ("gpt2", ["epsilon=inf"], "finite and ≥ 0"),
        ("gpt2", ["epsilon=much"], "expected a number after '=', got 'much'"),
    ],
)
def test_impossible_rules_are_refused(shape, rules, message):
    c = case(shape)
    before = hook_count(c.model)
    with pytest.raises(RelpError, match=message) as error:
        run(c, "relp", ["resid_pre"], rules=rules)
    assert "\n" not in str(error.value)
    assert hook_count(c.model) == before


def test_two_point_rules_need_a_patch_prompt():
    c = case("gpt2")
    with pytest.raises(RelpError, match="need a patch prompt"), lrp(c.model, ["ln2"]):
        pass
    with pytest.raises(RelpError, match="need a patch prompt, not baseline 'zero'"):
        run(c, "relp", ["resid_pre"], rules=["ln", "act2"], baseline="zero")


def test_ah_leaves_queries_and_keys_without_a_score():
    with pytest.raises(RelpError, match="AH-rule holds attention patterns constant"):
        run(case("llama"), "relp+ah", ["query"])


@pytest.mark.parametrize("shape", SHAPES)
def test_hooks_are_gone_after_success_and_failure(shape):
    c = case(shape)
    before = hook_count(c.model)
    with exact_float64():
        plain = c.model.logits(c.batch.original)
    rules = [r for r in ("ln", "identity", "half", "ah", "epsilon", "softcap") if r in applicable(shape)]
    for method, options in (("relp", {"rules": rules}), ("relp+two_point", {}), ("act_patch", {}), ("delta", {})):
        run(c, method, ["resid_pre", "mlp_neuron"] if method != "act_patch" else ["resid_pre"], **options)
        assert hook_count(c.model) == before
    with pytest.raises(ZeroDivisionError), lrp(c.model, rules):
        raise ZeroDivisionError
    assert hook_count(c.model) == before

    def bad(_):
        raise ZeroDivisionError

    failing = c.model.hooks({"blocks.1.hook_out": bad})
    with pytest.raises(ZeroDivisionError), exact_float64(), lrp(c.model, rules), failing:
        c.model.logits(c.batch.original)
    assert hook_count(c.model) == before
    with pytest.raises(RelpError):
        run(c, "relp", ["resid_pre"], rules=rules, metric="accuracy")
    assert hook_count(c.model) == before
    with exact_float64():
        assert torch.equal(c.model.logits(c.batch.original), plain)


def test_a_layer_that_the_forward_went_past_is_an_error():
    """A pass that runs some of a rule's layers and not others has mixed gradients."""
    c = case("gpt2")

    def stop(_):
        raise StopIteration

    def half_a_pass():
        stopping = c.model.hooks({"blocks.1.hook_in": stop})
        with lrp(c.model, ["ln"]), contextlib.suppress(StopIteration), stopping:
            c.model.logits(c.batch.original)

    with pytest.raises(RelpError, match=r"rules were not applied at .*ln"), exact_float64():
        half_a_pass()


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_ratio_is_the_activation_over_its_input_and_finite_at_zero(name):
    act = ACTIVATIONS[name]
    x = torch.cat([torch.linspace(-8, 8, 1001, dtype=torch.float64), torch.tensor([0.0, 1e-300, -1e-300])])
    torch.testing.assert_close(x * act.ratio(x), act.fn(x), rtol=1e-10, atol=1e-14)
    at_zero = act.ratio(torch.zeros(1, dtype=torch.float64)).item()
    assert at_zero == (0 if name == "relu" else 0.5)


# --- two-point rules: each layer's pull-back, from the values of the two runs


def pull_back(shape, rules, points, same=False):
    """Values in the run and in the patch run, and gradients, at hook points, under two-point rules."""
    c = case(shape)
    here, there = {}, {}

    def keep(store):
        return {p: (lambda v, p=p: store.__setitem__(p, v)) for p in points}

    source = c.batch.original if same else c.batch.patch
    with exact_float64():
        with torch.no_grad(), recording(c.model, rules) as other, c.model.hooks(keep(there)):
            c.model.logits(source)
        leaf = [("blocks.0.hook_in", lambda h: h.detach().requires_grad_())]
        with torch.enable_grad(), lrp(c.model, rules, other), c.model.hooks([*leaf, *keep(here).items()]):
            logits = c.model.logits(c.batch.original)
            value = METRICS["logit_diff"].fn(logits, c.batch.answer, c.batch.foil).sum()
        grads = torch.autograd.grad(value, [here[p] for p in points])
    return [(here[p].detach(), there[p], g) for p, g in zip(points, grads, strict=True)]


def total_change(part):
    """Σ (patch − run) · ρ per pair."""
    run_value, other, rho = part
    return ((other - run_value) * rho).flatten(1).sum(1)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", ["gpt2", "pythia"])
def test_act2_is_the_secant(shape):
    """Position 0 is the same token in both prompts: nothing changes there, and the secant is the derivative."""
    (x, x_other, g_in), (y, y_other, g_out) = pull_back(shape, ["act2"], [f"blocks.1.mlp.{p}" for p in MLP["ungated"]])
    secant = (y_other - y) / (x_other - x)
    torch.testing.assert_close(g_in[:, 1:], (g_out * secant)[:, 1:], rtol=1e-6, atol=1e-9)
    act = case(shape).model.activation.fn
    same(g_in[:, 0], (g_out * torch.autograd.functional.jvp(act, x, torch.ones_like(x))[1])[:, 0])


MLP = {"ungated": ("in.hook_out", "out.hook_in"), "gated": ("gate.hook_out", "in.hook_out", "out.hook_in")}


@pytest.mark.parametrize("shape", GATED)
def test_act2_and_gate2_give_the_exact_change_of_a_gated_layer(shape):
    points, act = [f"blocks.1.mlp.{p}" for p in MLP["gated"]], case(shape).model.activation.fn
    (g, g_other, rho_gate), (u, u_other, rho_up), (_, _, rho) = pull_back(shape, ["gate2"], points)
    same(rho_up, rho * (act(g) + act(g_other)) / 2)
    same(rho_gate, rho * torch.autograd.functional.jvp(act, g, torch.ones_like(g))[1] * (u + u_other) / 2)
    for rules, exact in ((["act2", "gate2"], True), (["act2", "half"], False), (["identity", "gate2"], False)):
        gate, up, out = (total_change(part) for part in pull_back(shape, rules, points))
        error = (gate + up - out).abs().max() / out.abs().max()
        assert (error < 1e-9) == exact, rules


@pytest.mark.parametrize("shape", ["gpt2", "pythia-serial", "qwen2", "gemma2"])
def test_attn2_splits_the_change_of_a_head_between_pattern_and_value(shape):
    """Under attn2, ΔP·ρ_P + Δv·ρ_v = Δz·ρ_z in every layer, shared values included."""
    points = [f"blocks.1.attn.{p}" for p in ("hook_pattern", "v.hook_out", "o.hook_in")]
    pattern, value, z = (total_change(part) for part in pull_back(shape, ["attn2"], points))
    same(pattern + value, z)
    assert pattern.abs().min() > 1e-6


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gemma2"])
def test_ln2_takes_the_mean_of_the_two_inverse_scales(shape):
    c, seen, at = case(shape), {}, "blocks.1.ln1."
    ends = (".1.ln_1.weight", ".1.input_layernorm.weight")
    weight = next(v for k, v in c.weights.items() if k.endswith(ends))
    weight = weight + 1 if shape == "gemma2" else weight

    def keep(name):
        return lambda v: seen.__setitem__(name, v)

    def start(v):  # a leaf, so that its gradient is what comes through the norm alone
        seen["in"] = v.detach().requires_grad_()
        return seen["in"]

    with exact_float64():
        with torch.no_grad(), recording(c.model, ["ln2"]) as other, c.model.hooks({at + "hook_scale": keep("other")}):
            c.model.logits(c.batch.patch)
        first = c.model.hooks({at + "hook_in": start})
        last = c.model.hooks({at + "hook_out": keep("out"), at + "hook_scale": keep("scale")})
        with torch.enable_grad(), first, lrp(c.model, ["ln2"], other), last:
            logits = c.model.logits(c.batch.original)
            value = METRICS["logit_diff"].fn(logits, c.batch.answer, c.batch.foil).sum()
        through, rho = torch.autograd.grad(value, [seen["in"], seen["out"]])
    want = rho * weight * (1 / seen["scale"] + 1 / seen["other"]).detach() / 2
    same(through, want - want.mean(-1, keepdim=True) if shape == "gpt2" else want)


@pytest.mark.parametrize("shape", ["gpt2", "qwen2", "gemma2"])
def test_two_point_rules_with_the_run_itself_reduce(shape):
    """Patch = original: ln2 is the LN-rule; act2, gate2 and attn2 are the plain gradient."""
    c = case(shape)
    for rule, limit in (("ln2", ["ln"]), ("act2", []), ("gate2", []), ("attn2", [])):
        if rule not in applicable(shape):
            continue
        points = ["blocks.1.hook_in", "blocks.0.hook_mlp_out", "blocks.2.attn.v.hook_out"]
        got = [-(x * g) for x, _, g in pull_back(shape, [rule], points, same=True)]
        want = run(c, "relp", ["resid_pre", "mlp_out", "value"], rules=limit, baseline="zero")
        same(got[0].sum(-1), want["resid_pre"].examples[:, 1])
        same(got[1].sum(-1), want["mlp_out"].examples[:, 0])
        same(got[2].unflatten(-1, (c.model.shape.n_kv_heads, -1)).sum(-1), want["value"].examples[:, 2])


def test_plus_replaces_the_rule_of_the_same_place():
    got = run(case("qwen2"), "relp+two_point", ["resid_pre"])
    assert set(got.meta["rules"]) == {"ln2", "act2", "gate2", "attn2"}
    got = run(case("gpt2"), "relp+ln2", ["resid_pre"], rules="ln,identity,ah")
    assert set(got.meta["rules"]) == {"identity", "ah", "ln2"}
    with pytest.raises(RelpError, match="takes no rules"):
        run(case("gpt2"), "atp+ah", S.KINDS[:1])
