"""Every family, rule and node kind equals the plain-torch oracle in float64, example by example."""

import pytest
import torch
from oracles import scores as S
from oracles.forward import forward
from oracles.make import SHAPES
from oracles.wrapped import GATED, case, close, pairs, run

from relp_cli.errors import RelpError
from relp_cli.lrp.rules import parse_rules

PRESET = {"gpt2": ("ln", "identity"), "pythia": ("ln", "identity"), "pythia-serial": ("ln", "identity")}
PRESET |= dict.fromkeys(GATED, ("ln", "identity", "half"))
EVERY = ("ln", "identity", "half", "ah", "softcap")
SINGLE = [(r,) for r in (*EVERY, "epsilon=0.1", "gamma=0.3")]
MIXED = [EVERY, (*EVERY, "epsilon=0.01"), (*EVERY, "gamma=0.25"), ("identity", "half"), ("half", "ah", "softcap")]
MODES = [
    {"direction": "noising"}, {"direction": "denoising"}, {"baseline": "zero"}, {"baseline": "mean"},
]  # fmt: skip


def there(shape, rules):
    """The rules that the shape has a layer for."""
    absent = {"half"} if shape not in GATED else set()
    absent |= {"softcap"} if shape != "gemma2" else set()
    return tuple(r for r in rules if r not in absent)


def rule_sets(shape):
    sets = [there(shape, rules) for rules in (PRESET[shape], (*PRESET[shape], "ah"), *SINGLE, *MIXED)]
    return list(dict.fromkeys(rules for rules in sets if rules))


def oracle(c, rules, **mode):
    values = {a.rule.name: a.parameter for a in parse_rules(rules) if a.parameter is not None}
    return S.relp(*c.prompts, c.metric, {r.partition("=")[0] for r in rules}, **mode, **values)


def must_equal(got, want, kinds=S.KINDS):
    for kind in kinds:
        close(got[kind].examples, want[kind])
        close(got[kind].mean, want[kind].mean(0))
        close(got[kind].variance, want[kind].var(0))
        assert got[kind].n.tolist() == [4] * 6
        assert want[kind].abs().max() > 1e-3, "a vacuous comparison"


CELLS = [(shape, rules) for shape in SHAPES for rules in rule_sets(shape)]


@pytest.mark.parametrize(("shape", "rules"), CELLS, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_relp_equals_the_oracle(shape, rules):
    """batch_size 3: the mean baseline is over all 4 pairs, not over a chunk."""
    c = case(shape)
    kinds = [k for k in S.KINDS if "ah" not in rules or k not in ("query", "key")]
    for mode in MODES if rules == PRESET[shape] else MODES[:2]:
        got = run(c, "relp", kinds, rules=rules, batch_size=3, **mode)
        must_equal(got, oracle(c, rules, **mode), kinds)


@pytest.mark.parametrize("shape", SHAPES)
def test_atp_equals_the_oracle_and_relp_without_rules(shape):
    c = case(shape)
    for mode in MODES:
        got = run(c, "atp", batch_size=3, **mode)
        must_equal(got, S.atp(*c.prompts, c.metric, **mode))
        same = run(c, "relp", rules=[], batch_size=3, **mode)
        assert all(torch.equal(got[k].examples, same[k].examples) for k in S.KINDS)
        assert same.meta["rules"] == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_default_is_the_family_preset(shape):
    c = case(shape)
    got = run(c, "relp")
    assert tuple(got.meta["rules"]) == PRESET[shape]
    must_equal(got, oracle(c, PRESET[shape]))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("shape", SHAPES)
def test_act_patch_equals_the_oracle(shape, direction):
    c = case(shape)
    kinds = S.KINDS if direction == "noising" else S.KINDS[:-1]
    got = run(c, "act_patch", kinds, direction=direction, batch_size=3, chunk_tokens=4000)
    must_equal(got, S.act_patch(*c.prompts, c.metric, kinds, direction), kinds)


@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
@pytest.mark.parametrize("method", ["atp", "act_patch"])
def test_output_dimensions_as_nodes(shape, method):
    """Marks et al.'s nodes, each dimension on its own; resid_dim is the residual *leaving* the block."""
    c = case(shape)
    kinds = ("attn_dim", "mlp_dim", "resid_dim")
    got = run(c, method, kinds)
    base, other = (forward(c.weights, c.config, ids) for ids in (c.batch.original, c.batch.patch))
    value = {"attn_dim": "attn_out", "mlp_dim": "mlp_out"}
    grads = S.gradients(base, c.metric, ["resid_pre", *value.values()])

    def leaving(trace):
        return [*trace["resid_pre"][1:], sum(trace[k][-1] for k in ("resid_pre", "attn_out", "mlp_out"))]

    if method == "atp":
        want = {k: [(o - n) * g for n, o, g in zip(base[v], other[v], grads[v], strict=True)] for k, v in value.items()}
        last = [*grads["resid_pre"][1:], grads["mlp_out"][-1]]  # nothing else reads the last residual
        want["resid_dim"] = [(o - n) * g for n, o, g in zip(leaving(base), leaving(other), last, strict=True)]
        for kind in kinds:
            close(got[kind].examples, torch.stack(want[kind], 1).detach())
        return
    for layer, pos, dim in ((0, 1, 3), (1, 5, 31), (2, 5, 0)):
        for kind, node in (*value.items(), ("resid_dim", "resid_pre")):
            at = layer + (kind == "resid_dim")
            if at == 3:
                continue

            def swap(t, pos=pos, dim=dim, node=node, at=at):
                t = t.clone()
                t[:, pos, dim] = other[node][at][:, pos, dim]
                return t

            with torch.no_grad():
                patched = forward(c.weights, c.config, c.batch.original, patch={(node, at): swap})
            want = c.metric(patched.logits) - c.metric(base.logits)
            close(got[kind].examples[:, layer, pos, dim], want.detach())


def prob_diff(batch):
    def metric(logits):
        probs = logits[:, -1].softmax(-1)
        rows = torch.arange(len(batch))
        return probs[rows, batch.answer[:, 0]] - probs[rows, batch.foil[:, 0]]

    return metric


def kl(c):
    reference = forward(c.weights, c.config, c.batch.original).logits[:, -1].detach().log_softmax(-1)
    return lambda logits: -(reference.exp() * (reference - logits[:, -1].log_softmax(-1))).sum(-1)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("method", ["atp", "relp", "act_patch"])
def test_other_metrics(method, direction):
    c = case("qwen2")
    kinds = ("resid_pre", "mlp_out", "head")
    for name, metric in (("prob_diff", prob_diff(c.batch)), ("kl", kl(c))):
        if name == "kl" and method != "act_patch" and direction == "noising":
            with pytest.raises(RelpError, match=r"gradient exactly 0 at the original"):
                run(c, method, kinds, metric=name)
            continue
        got = run(c, method, kinds, metric=name, direction=direction, batch_size=3)
        if method == "act_patch":
            want = S.act_patch(*c.prompts, metric, kinds, direction)
        else:
            want = S.relp(*c.prompts, metric, set(PRESET["qwen2"]) if method == "relp" else set(), kinds, direction)
        for kind in kinds:
            close(got[kind].examples, want[kind])
        values = metric(forward(c.weights, c.config, c.batch.original).logits)
        assert got.meta["mean_metric"] == pytest.approx(values.mean().item(), abs=1e-12)
        assert got.meta["mean_abs_metric"] == pytest.approx(values.abs().mean().item(), abs=1e-12)


def test_answer_sets_and_single_prompts():
    """p(answers) − p(foils) over sets of different sizes; without a patch prompt, zero and mean baselines."""
    c = case("gpt2")
    sets = pairs()
    answer, foil = [(1, 2, 3), (4,), (5, 6), (7,)], [(10,), (11, 12), (13,), (14, 15, 16)]
    batch = type(sets)(original=sets.original, patch=None, answer=answer, foil=foil)

    def metric(logits):
        probs = logits[:, -1].softmax(-1)
        return torch.stack([p[list(a)].sum() - p[list(f)].sum() for p, a, f in zip(probs, answer, foil, strict=True)])

    for baseline in ("zero", "mean"):
        got = run(c, "relp", batches=[batch], metric="prob_diff", baseline=baseline, batch_size=3)
        want = S.relp(*c.prompts, metric, set(PRESET["gpt2"]), baseline=baseline)
        for kind in S.KINDS:
            close(got[kind].examples, want[kind])
    with pytest.raises(RelpError, match="no patch prompt"):
        run(c, "relp", batches=[batch], metric="prob_diff")
    with pytest.raises(RelpError, match="no patch prompt"):
        run(c, "act_patch", batches=[batch], metric="prob_diff", direction="denoising")
    with pytest.raises(RelpError, match="needs one answer and one foil"):
        run(c, "relp", batches=[batch], baseline="zero")


def test_act_patch_towards_zero_and_mean():
    c = case("pythia")
    base = forward(c.weights, c.config, c.batch.original)
    for baseline in ("zero", "mean"):
        got = run(c, "act_patch", ("attn_out",), baseline=baseline, batch_size=3)
        for layer, pos in ((0, 2), (1, 5), (2, 5)):

            def swap(t, pos=pos):
                fill = torch.zeros_like(t) if baseline == "zero" else t.mean(0, keepdim=True).expand_as(t)  # noqa: B023
                return torch.where((torch.arange(6) == pos)[:, None], fill, t)

            with torch.no_grad():
                patched = forward(c.weights, c.config, c.batch.original, patch={("attn_out", layer): swap})
            close(got["attn_out"].examples[:, layer, pos], c.metric(patched.logits) - c.metric(base.logits).detach())


# Error relative to the largest score of a kind. Seen: float32 up to 4e-6, bfloat16 (8 bits of mantissa) up to 7e-2.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.12)])
@pytest.mark.parametrize("shape", SHAPES)
def test_narrow_dtypes(shape, dtype, tolerance):
    from relp_cli.scoring import score

    c = case(shape, dtype=dtype)
    rules = there(shape, EVERY)
    kinds = ("resid_pre", "attn_out", "mlp_out", "head", "mlp_neuron")
    for method, options, want in (
        ("relp", {"rules": rules}, oracle(c, rules)),
        ("atp", {}, S.atp(*c.prompts, c.metric)),
        ("act_patch", {}, S.act_patch(*c.prompts, c.metric, kinds[:3])),
    ):
        got = score(c.model, [c.batch], method, [k for k in kinds if k in want], **options)
        for kind in got:
            error = (got[kind].examples - want[kind]).abs().max() / want[kind].abs().max()
            assert error < tolerance, (method, kind, error.item())
