"""Secant rules: each is exact between its two runs, together they are complete, and with one endpoint they are the gradient."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from oracles.plain import ROWS, build
from oracles.wrapped import Case, case, close, double_by_default, exact_float64, pairs, run
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.lrp.context import lrp, recording
from relp_cli.lrp.local import cap_slope, local, logarithmic_mean
from relp_cli.lrp.rules import RULE_SETS, RULES, parse_rules
from relp_cli.methods.points import changed_groups
from relp_cli.methods.score import with_extra_rules
from relp_cli.models.load import wrap
from relp_cli.nodes.access import capture
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.tasks.metrics import METRICS
from relp_cli.tasks.pairs import PairBatch

# LayerNorm and RMSNorm, learned and rotary positions, ALiBi, grouped keys, norms on queries and keys, norms behind, parallel
# blocks, softcaps, sliding windows, fused projections, multipliers
COMPLETE = ("gpt2", "gpt_neox", "bloom", "falcon", "mpt", "phi3-gqa", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2",
            "cohere", "granite", "starcoder2", "gpt_bigcode")  # fmt: skip


@cache
def built(name: str, n_pairs: int = 2) -> Case:
    with exact_float64():
        return Case(wrap(build(ROWS[name]), None, name), {}, None, pairs(n_pairs, 5), lambda _: None)  # type: ignore[arg-type, return-value]


def value(c: Case, tokens: Tensor) -> Tensor:
    with exact_float64(), torch.no_grad():
        return METRICS["logit_diff"].fn(c.model.logits(tokens), c.batch.answer, c.batch.foil)


@pytest.mark.parametrize("name", COMPLETE)
def test_scores_of_every_layers_stream_sum_to_the_change_of_the_metric(name: str) -> None:
    c = built(name)
    assert c.batch.patch is not None
    change = value(c, c.batch.patch) - value(c, c.batch.original)
    for direction, sign in (("noising", 1), ("denoising", -1)):
        got = run(c, "relp+secant", ["resid_pre"], endpoints="patch", direction=direction)["resid_pre"].examples.sum(2)
        close(got, sign * change[:, None].expand_as(got))
    less = run(c, "relp+two_point", ["resid_pre"])["resid_pre"].examples.sum(2)
    assert (less - change[:, None]).abs().max() > 1e-3  # the new rules are what does it


@pytest.mark.parametrize("shape", ["gpt2", "pythia", "gemma2", "qwen3"])
def test_edges_are_complete_and_make_up_the_stream(shape: str) -> None:
    """Edges into the logits sum to the change; those out of the embedding to the score of the first block's input, for which
    queries' gradients go back through the norm by hand, also where every changed position has its own endpoint.
    """
    c = built(shape) if shape == "qwen3" else case(shape)  # norms on queries, keys shared by a group
    assert c.batch.patch is not None
    got = run(c, "relp+secant", ["edges"], endpoints="patch", blend=False)["edges"]
    writers, readers = zip(*(name.split("->") for name in got.edge_names()), strict=True)
    assert got.examples is not None
    into_logits = torch.tensor([reader == "logits" for reader in readers])
    close(got.examples[:, 0, into_logits].sum(-1), value(c, c.batch.patch) - value(c, c.batch.original))
    from_input = torch.tensor([writer == writers[0] for writer in writers])
    for ends in ("patch", "position"):
        edges = run(c, "relp+secant", ["edges"], endpoints=ends, blend=False)["edges"].examples
        nodes = run(c, "relp+secant", ["resid_pre"], endpoints=ends)["resid_pre"].examples
        close(edges[:, 0, from_input].sum(-1), nodes[:, 0].sum(-1))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gemma3"])
def test_with_the_run_as_endpoint_they_are_the_plain_gradient(name: str) -> None:
    c = built(name)
    rules = with_extra_rules(c.model, (), ["secant"])

    def gradients(active: tuple[str, ...], other: object) -> list[Tensor]:
        with torch.enable_grad(), lrp(c.model, active, other), capture(c.model, [NODE_KINDS["resid_pre"]]) as seen:  # type: ignore[arg-type]
            logits = c.model.logits(c.batch.original)
        total = METRICS["logit_diff"].fn(logits, c.batch.answer, c.batch.foil).sum()
        return list(torch.autograd.grad(total, seen["resid_pre"]))

    with exact_float64():
        with torch.no_grad(), recording(c.model, rules) as own:
            c.model.logits(c.batch.original)
        for got, want in zip(gradients(rules, own), gradients((), None), strict=True):
            close(got, want)


def test_norm_softmax_and_cap_are_exact_between_their_runs() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 7, 16, generator=rng, dtype=torch.float64)
    inverse = [1 / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() for v in (x, y)]
    form = RULES["lnx"].fn(x, inverse[0], y, inverse[1])
    close(form(y) - form(x), y * inverse[1] - x * inverse[0], 1e-12)
    s, t = 4 * torch.randn(2, 5, 9, generator=rng, dtype=torch.float64)
    s[:, 7:] = t[:, 7:] = -torch.inf
    f = [RULES["softmax2"].fn(v, s.log_softmax(-1), t.log_softmax(-1)) for v in (s, t)]
    close(f[1] - f[0], t.softmax(-1) - s.softmax(-1), 1e-12)
    slope = cap_slope(x, y, 3.0)
    close(slope * (y - x), 3 * torch.tanh(y / 3) - 3 * torch.tanh(x / 3), 1e-12)
    a, b = torch.tensor([[0.0, 0.0, 0.3, 0.2], [0.0, 0.2, 0.3, 0.1]], dtype=torch.float64)
    close(logarithmic_mean(a.log(), b.log()), torch.tensor([0, 0, 0.3, 0.1 / math.log(2)], dtype=torch.float64), 1e-12)
    far = logarithmic_mean(torch.tensor(-200.0), torch.tensor(0.0))  # e⁻²⁰⁰ is 0 in float32
    assert far == pytest.approx(1 / 200)


def test_two_temperatures_and_halves() -> None:
    """GIM's softmax backward is diag(P₂) − P₂P₂ᵀ with P₂ = softmax(S/2); AttnLRP's products hand half to each factor."""
    s = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p = (s.detach() / 2).softmax(-1)
    want = torch.diag(p) - p[:, None] * p[None]
    got = torch.stack(
        [torch.autograd.grad(v, s, retain_graph=True)[0] for v in RULES["softmax_t2"].fn(s, s.softmax(-1), None)]
    )
    close(got, want, 1e-12)
    c = case("llama", layers=1)
    plain, halved = (run(c, "relp", ["query", "key", "value"], rules=r) for r in ((), ("half_pv", "half_qk")))
    for kind, share in (("query", 0.25), ("key", 0.25), ("value", 0.5)):
        assert plain[kind].mean.abs().max() > 1e-6
        close(halved[kind].mean, share * plain[kind].mean)


def test_the_joint_rule_changes_one_thing_at_a_time() -> None:
    """Queries: the exact change of z. One key: the exact change, its value taken at the mean. One value: the mean of the pattern
    before and after its key changed. Written from the definitions, one key at a time.
    """
    rng = torch.Generator().manual_seed(1)
    (q, k, v), (q2, k2, v2) = 1.5 * torch.randn(2, 3, 1, 1, 5, 4, generator=rng, dtype=torch.float64)
    scale, cap = 0.5, 2.0
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)

    def pattern(queries: Tensor, keys: Tensor) -> Tensor:
        raw = queries @ keys.transpose(-2, -1) * scale
        return (cap * torch.tanh(raw / cap) + mask).softmax(-1)

    scores = cap * torch.tanh(q @ k.transpose(-2, -1) * scale / cap) + mask
    p = pattern(q, k)

    def surrogate(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        z = local((tuple(inputs), (q2, k2, v2)), scores, p, scale, cap)  # type: ignore[arg-type]
        change = torch.zeros_like(z)
        for i in range(5):
            for j in range(4):
                grads = torch.autograd.grad(z[0, 0, i, j], inputs, retain_graph=True)
                moved = zip(grads, (queries - q, keys - k, values - v), strict=True)
                change[0, 0, i, j] = sum((g * d).sum() for g, d in moved)
        return change.detach()

    close(surrogate(q2, k, v), (pattern(q2, k) - p) @ v)
    for t in range(5):
        keys = k.clone()
        keys[..., t, :] = k2[..., t, :]
        mean = v.clone()
        mean[..., t, :] = (v + v2)[..., t, :] / 2
        close(surrogate(q, keys, v), (pattern(q, keys) - p) @ mean)
        values = v.clone()
        values[..., t, :] = v2[..., t, :]
        close(surrogate(q, k, values), (pattern(q, keys) + p)[..., t, None] / 2 * (v2 - v)[..., t, None, :])


def test_the_joint_rule_is_finite_and_right_where_patterns_are_saturated() -> None:
    """In float32, with patterns that are 1 to the last bit, coefficients are those of float64."""
    rng = torch.Generator().manual_seed(3)
    run, other = 1.5 * torch.randn(2, 3, 4, 2, 6, 4, generator=rng, dtype=torch.float64)
    mask = torch.full((6, 6), torch.finfo(torch.float32).min, dtype=torch.float64).triu(1)

    def coefficients(dtype: torch.dtype, scale: float) -> tuple[list[Tensor], Tensor]:
        (q, k, v), theirs = (tuple(t.to(dtype) for t in x) for x in (run, other))
        inputs = tuple(t.clone().requires_grad_() for t in (q, k, v))
        scores = q @ k.transpose(-2, -1) * scale + mask.to(dtype)
        p = scores.softmax(-1)
        z = local((inputs, theirs), scores, p, scale, None)  # type: ignore[arg-type]
        weight = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
        return list(torch.autograd.grad((z * weight).sum(), inputs)), p

    for scale in (0.5, 8.0, 40.0):
        (narrow, p), (wide, _) = coefficients(torch.float32, scale), coefficients(torch.float64, scale)
        for got, want in zip(narrow, wide, strict=True):
            assert torch.isfinite(got).all()
            torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-4 * float(want.abs().max()))
    assert (p[..., 1:, :] == 1).any()  # more keys than one, and all on one of them


@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
def test_each_changed_position_has_its_own_endpoint(shape: str) -> None:
    """δ of the full patch times the coefficients between the run and the run with this token alone replaced; elsewhere the
    mean over them. The second pair has one changed position fewer.
    """
    c = case(shape)
    ids = c.batch.original[:2].clone()
    patch = ids.clone()
    patch[:, 2], patch[0, 4] = (ids[:, 2] + 1) % 50, (ids[0, 4] + 3) % 50
    batch = PairBatch(ids, patch, c.batch.answer[:2], c.batch.foil[:2])
    got = run(c, "relp+secant", ["resid_pre", "mlp_out"], [batch], blend=False)
    rules = with_extra_rules(c.model, c.model.family.rules, ["secant"])
    for rows, cost in ((slice(0, 1), (4 + 2 * 2, 1 + 2)), (slice(1, 2), (5, 2))):  # as docs/methods.md says
        meta = run(c, "relp+secant", ["resid_pre", "mlp_out"], [batch.rows(rows)]).meta
        assert (meta["forwards_per_pair"], meta["backwards_per_pair"]) == cost
    assert got.meta["endpoints"] == 2
    assert (got.meta["forwards_per_pair"], got.meta["backwards_per_pair"]) == (1 + 2 * 2, 2)
    kinds = [NODE_KINDS[k] for k in ("resid_pre", "mlp_out")]

    def coefficients(pair: int, position: int) -> dict[str, Tensor]:
        tokens, end = ids[pair : pair + 1], ids[pair : pair + 1].clone()
        end[0, position] = patch[pair, position]
        with torch.no_grad(), recording(c.model, rules) as other:
            c.model.logits(end)
        with torch.enable_grad(), lrp(c.model, rules, other), capture(c.model, kinds) as seen:
            logits = c.model.logits(tokens)
        total = METRICS["logit_diff"].fn(logits, batch.answer[[pair]], batch.foil[[pair]]).sum()
        grads = iter(torch.autograd.grad(total, [v for layers in seen.values() for v in layers]))
        return {k: torch.stack([next(grads)[0] for _ in layers]) for k, layers in seen.items()}

    with exact_float64(), double_by_default():
        values = []
        for tokens in (ids, patch):
            with torch.no_grad(), capture(c.model, kinds) as seen:
                c.model.logits(tokens)
            values.append({k: torch.stack(layers, 1) for k, layers in seen.items()})
        for pair, positions in ((0, (2, 4)), (1, (2,))):
            each = {p: coefficients(pair, p) for p in positions}
            for kind in ("resid_pre", "mlp_out"):
                rho = torch.stack([each[p][kind] for p in positions]).mean(0)
                for p in positions:
                    rho[:, p] = each[p][kind][:, p]
                delta = values[1][kind][pair] - values[0][kind][pair]
                close(got[kind].examples[pair], (delta * rho).sum(-1))


def test_more_changed_positions_than_endpoints_share_them_with_neighbours() -> None:
    run_, source = torch.zeros(2, 7, dtype=torch.long), torch.tensor([[0, 1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0]])
    none = -1
    assert changed_groups(run_, source, 8).tolist() == [[none, 0, 1, 2, none, 3, 4], [none] * 3 + [0] + [none] * 3]
    assert changed_groups(run_, source, 2).tolist() == [[none, 0, 0, 0, none, 1, 1], [none] * 3 + [0] + [none] * 3]
    got = run(case("gpt2"), "relp+secant", ["resid_pre"], max_endpoints=2, blend=False)
    assert got.meta["endpoints"] == 2


def test_one_changed_token_is_exact_and_costs_what_relp_costs() -> None:
    c = case("llama", layers=1)
    patch = c.batch.original.clone()
    patch[:, 3] = (patch[:, 3] + 1) % 50
    batch = PairBatch(c.batch.original, patch, c.batch.answer, c.batch.foil)
    got, exact = run(c, "relp+secant", ["resid_pre"], [batch], blend=False), run(c, "act_patch", ["resid_pre"], [batch])
    close(got["resid_pre"].examples, exact["resid_pre"].examples)
    assert (got.meta["forwards_per_pair"], got.meta["backwards_per_pair"]) == (2, 1)


def test_what_needs_two_prompts_or_two_points_says_so() -> None:
    c = case("gpt2")
    with pytest.raises(RelpError, match="endpoints=position is for two-point rules; there is none among ln, identity"):
        run(c, "relp", ["resid_pre"], endpoints="position")
    with pytest.raises(
        RelpError, match="a blend needs a patch prompt, whose streams shares are of, not baseline 'zero'"
    ):
        run(c, "relp", ["resid_pre"], blend=True, baseline="zero")
    with pytest.raises(RelpError, match="not baseline 'zero'"):
        run(c, "relp+secant", ["resid_pre"], baseline="zero")


def test_rule_sets_stand_in_place_of_all_but_linear_rules() -> None:
    gpt2, gemma2 = case("gpt2").model, case("gemma2").model
    assert with_extra_rules(gpt2, ("ln", "identity", "gamma=0.5"), ["secant"]) == (
        "gamma=0.5", "lnx", "act2", "attn2", "softmax2", "qk2",
    )  # fmt: skip
    assert with_extra_rules(gemma2, (), ["secant"]) == RULE_SETS["secant"].rules
    assert with_extra_rules(gpt2, ("ln", "identity"), ["secant", "ah"]) == ("lnx", "act2", "ah")
    for name, row in RULE_SETS.items():
        parse_rules(list(row.rules))
        assert run(case("llama"), f"relp+{name}", ["resid_pre"])["resid_pre"].mean.isfinite().all(), name
    with pytest.raises(RelpError, match="unknown rule 'secnat'; did you mean 'secant'"):
        run(case("gpt2"), "relp+secnat", ["resid_pre"])
    with pytest.raises(RelpError, match="'local' stands in place of rule 'softmax2'"):
        run(case("gpt2"), "relp+local", ["resid_pre"], rules=["gamma=0.5", "softmax2"])
    with pytest.raises(RelpError, match="'local' and 'softmax2' both replace the softmax"):
        run(case("gpt2"), "relp", ["resid_pre"], rules=["local", "softmax2"])


def test_expected_gradients_are_integrated_gradients_at_random_points() -> None:
    c = case("gpt2")
    many = run(c, "expected_gradients", ["resid_pre"], samples=400)["resid_pre"]
    fine = run(c, "ig_inputs", ["resid_pre"], steps=40)["resid_pre"]
    one = run(c, "expected_gradients", ["resid_pre"])
    assert (one.meta["forwards_per_pair"], one.meta["backwards_per_pair"]) == (3, 1)
    assert (many.mean - fine.mean).abs().max() < 0.1 * fine.mean.abs().max()
    assert (one["resid_pre"].mean - fine.mean).abs().max() > (many.mean - fine.mean).abs().max()
    halves = [run(c, "expected_gradients", ["resid_pre"], [c.batch.rows(slice(i, i + 2))])["resid_pre"] for i in (0, 2)]
    close(torch.cat([h.examples for h in halves]), one["resid_pre"].examples)


def contribution(c: Case, kind: str, layer: int, delta: Tensor) -> Tensor:
    """What each node of a GPT-2 or Gemma-2 layer adds to the stream where its value moves by delta, [batch, pos, unit, d_model],
    from the Hugging Face weights; a post-norm divides by what it divides by in the run.
    """
    w, gpt2 = c.weights, c.config.model_type == "gpt2"
    at = f"transformer.h.{layer}." if gpt2 else f"model.layers.{layer}."
    name = {"head": ("attn.c_proj", "self_attn.o_proj"), "mlp_neuron": ("mlp.c_proj", "mlp.down_proj")}[kind][not gpt2]
    weight = w[f"{at}{name}.weight"] if gpt2 else w[f"{at}{name}.weight"].T  # [in, out]
    n_units = c.config.num_attention_heads if kind == "head" else delta.shape[-1]
    out = torch.einsum("bpui,uio->bpuo", delta.unflatten(-1, (n_units, -1)), weight.unflatten(0, (n_units, -1)))
    if gpt2:
        return out
    norm, point = {"head": ("post_attention", "ln1_post"), "mlp_neuron": ("post_feedforward", "ln2_post")}[kind]
    seen: dict[str, Tensor] = {}
    with torch.no_grad(), c.model.hooks({f"blocks.{layer}.{point}.hook_in": lambda v: seen.__setitem__("x", v)}):
        c.model.logits(c.batch.original)
    scale = (seen["x"].square().mean(-1) + c.config.rms_norm_eps).sqrt()
    return out * (1 + w[f"{at}{norm}_layernorm.weight"]) / scale[:, :, None, None]


@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
def test_a_blend_is_the_secant_by_the_root_of_the_share_and_the_gradient_by_the_rest(shape: str) -> None:
    c = case(shape)
    kinds = ["resid_pre", "query", "mlp_out", "head", "mlp_neuron"]
    whole = run(c, "relp+secant", kinds, blend=False)
    plain, got = run(c, "atp", kinds), run(c, "relp+secant", kinds)
    for kind in ("resid_pre", "query"):
        close(got[kind].examples, whole[kind].examples)
    streams = {}
    for which, tokens in (("run", c.batch.original), ("source", c.batch.patch)):
        with exact_float64(), torch.no_grad(), capture(c.model, [NODE_KINDS[k] for k in (*kinds, "resid_dim")]) as seen:
            c.model.logits(tokens)
        streams[which] = seen
    for kind in ("head", "mlp_neuron", "mlp_out"):
        for layer in range(3):
            change = streams["source"]["resid_dim"][layer] - streams["run"]["resid_dim"][layer]
            delta = streams["source"][kind][layer] - streams["run"][kind][layer]
            with exact_float64():
                parts = delta[:, :, None] if kind == "mlp_out" else contribution(c, kind, layer, delta)
            t = ((parts * change[:, :, None]).sum(-1) / change.square().sum(-1, keepdim=True)).nan_to_num(1).clamp(0, 1)
            w = (t[..., 0] if kind == "mlp_out" else t).sqrt()
            assert 0.01 < w.mean() < 0.99
            close(
                got[kind].examples[:, layer],
                w * whole[kind].examples[:, layer] + (1 - w) * plain[kind].examples[:, layer],
            )


def test_a_blend_of_edges_is_by_each_writers_share_of_what_its_reader_reads() -> None:
    """Per position: the embedding is all that changes what the first block's heads read, so they have the secant; elsewhere a
    score lies between the two, or is one of them.
    """
    c = case("gpt2")
    blend, whole = (run(c, "relp+secant", ["edges"], positions="keep", blend=b)["edges"] for b in (True, False))
    plain = run(c, "atp", ["edges"], positions="keep")["edges"]
    names = blend.edge_names()
    first = torch.tensor([n.startswith(names[0].split("->")[0] + "->a0.") for n in names])
    assert first.any()
    close(blend.examples[..., first], whole.examples[..., first])
    low, high = torch.minimum(whole.examples, plain.examples), torch.maximum(whole.examples, plain.examples)
    assert ((blend.examples >= low - 1e-12) & (blend.examples <= high + 1e-12)).all()
    assert (blend.examples - whole.examples).abs().max() > 1e-3
