"""Batches, order, token lengths and roles: what a score is averaged over, and on which positions."""

from dataclasses import replace

import pytest
import torch
from oracles import scores as S
from oracles.forward import forward
from oracles.wrapped import case, close, pairs, run

from relp_cli.errors import RelpError
from relp_cli.methods.score import position_axis
from relp_cli.scoring import score
from relp_cli.tasks.pairs import PairBatch

KINDS = ("resid_pre", "head", "mlp_neuron")
SHORT = ("bos", "subject", "verb", "end")
LONG = ("bos", "subject", "that", "noun", "verb", "end")


def of(c, batch):
    """The same model on other pairs."""
    return replace(c, batch=batch, metric=S.logit_diff(batch.answer[:, 0], batch.foil[:, 0]))


@pytest.mark.parametrize("method", ["atp", "relp", "act_patch", "delta"])
@pytest.mark.parametrize("shape", ["pythia", "gemma2"])
def test_scores_do_not_depend_on_batch_size_or_order(shape, method):
    c = case(shape)
    kinds = KINDS if method != "act_patch" else ("resid_pre", "head")
    whole = run(c, method, kinds)
    order = torch.tensor([2, 0, 3, 1])
    turned = run(c, method, kinds, [c.batch.rows(order)], batch_size=3)
    split = run(c, method, kinds, [c.batch.rows(slice(0, 1)), c.batch.rows(slice(1, 4))], batch_size=2)
    for kind in kinds:
        close(turned[kind].examples, whole[kind].examples[order], 1e-11)
        close(split[kind].examples, whole[kind].examples, 1e-11)
        for got in (whole, turned, split):
            assert got[kind].axis == "position"
            assert got[kind].labels == tuple("012345")
            close(got[kind].mean, whole[kind].examples.mean(0), 1e-11)
            close(got[kind].variance, whole[kind].examples.var(0), 1e-8)


def test_one_pair_has_a_mean_and_no_variance():
    c = case("gpt2")
    got = run(c, "relp", KINDS, [c.batch.rows(slice(1, 2))])
    close(got["head"].mean, run(c, "relp", KINDS)["head"].examples[1])
    assert got["head"].variance.isnan().all()


@pytest.mark.parametrize("keep", [True, False])
def test_examples_are_kept_on_request(keep):
    got = run(case("gpt2"), "atp", ["mlp_out"], keep_examples=keep)["mlp_out"]
    assert (got.examples is not None) == (got.present is not None) == keep


@pytest.mark.parametrize("method", ["relp", "act_patch"])
def test_lengths_meet_on_roles_each_with_its_own_n(method):
    c = case("qwen2")
    short, long = pairs(3, 4, seed=2, roles=SHORT), pairs(5, 6, seed=3, roles=LONG)
    got = run(c, method, ("resid_pre", "head"), [short, long], batch_size=2)["head"]
    assert got.axis == "role"
    assert got.labels == LONG
    assert got.n.tolist() == [8, 8, 5, 5, 8, 8]
    wants = {}
    for name, batch in (("short", short), ("long", long)):
        at = of(c, batch)
        preset = {"ln", "identity", "half"}
        wants[name] = (
            S.act_patch(*at.prompts, at.metric, ["head"])["head"]
            if method == "act_patch"
            else S.relp(*at.prompts, at.metric, preset, ["head"])["head"]
        )
    both = {label: [] for label in LONG}
    for name, roles in (("short", SHORT), ("long", LONG)):
        for i, label in enumerate(roles):
            both[label].append(wants[name][:, :, i])
    for i, label in enumerate(LONG):
        all_examples = torch.cat(both[label])
        close(got.mean[:, i], all_examples.mean(0))
        close(got.variance[:, i], all_examples.var(0), 1e-8)
        close(got.examples[:, :, i][got.present[:, i]], all_examples)
    assert got.present.sum(0).tolist() == got.n.tolist()
    assert not got.examples[:3, :, 2:4].any()


def test_mean_baseline_is_per_role_over_all_lengths():
    c = case("gpt2")
    short, long = pairs(3, 4, seed=2, roles=SHORT), pairs(5, 6, seed=3, roles=LONG)
    got = run(c, "atp", ["mlp_out"], [short, long], baseline="mean", batch_size=2)["mlp_out"]
    traces = [forward(c.weights, c.config, b.original) for b in (short, long)]
    at = of(c, short)
    grads = S.gradients(traces[0], at.metric, ["mlp_out"])["mlp_out"]
    for layer in range(3):
        means = {}
        for label in LONG:
            rows = [t["mlp_out"][layer][:, roles.index(label)] for t, roles in zip(traces, (SHORT, LONG), strict=True)
                    if label in roles]  # fmt: skip
            means[label] = torch.cat(rows).mean(0)
        mean = torch.stack([means[label] for label in SHORT])
        want = ((mean - traces[0]["mlp_out"][layer]) * grads[layer]).sum(-1).detach()
        close(got.examples[:3, layer][:, [LONG.index(label) for label in SHORT]], want)


def test_repeated_roles_add_gradients_and_are_patched_jointly():
    c = case("llama")
    roles = ("bos", "name", "x", "name", "x", "end")
    batch = replace(c.batch, roles=roles)
    got = run(c, "atp", KINDS, [batch])
    want = S.atp(*c.prompts, c.metric, KINDS)
    groups = [[0], [1, 3], [2, 4], [5]]
    for kind in KINDS:
        assert (got[kind].axis, got[kind].labels) == ("role", ("bos", "name", "x", "end"))
        close(got[kind].examples, torch.stack([want[kind][:, :, g].sum(2) for g in groups], 2))
    exact = run(c, "act_patch", ["head"], [batch])["head"].examples
    base, other = (forward(c.weights, c.config, ids) for ids in (c.batch.original, c.batch.patch))
    for slot, group in enumerate(groups):
        for layer, head in ((0, 1), (1, 3), (2, 0)):

            def swap(t, group=group, layer=layer, head=head):
                t = t.clone()
                t[:, group, head] = other["head"][layer][:, group, head]
                return t

            with torch.no_grad():
                patched = forward(c.weights, c.config, c.batch.original, patch={("head", layer): swap})
            close(exact[:, layer, slot, head], (c.metric(patched.logits) - c.metric(base.logits)).detach())


def test_lengths_without_roles_are_refused():
    c = case("gpt2")
    with pytest.raises(RelpError, match=r"several token lengths \(4, 6\) share no position axis"):
        run(c, "atp", KINDS, [pairs(2, 4), pairs(2, 6)])
    with pytest.raises(RelpError, match="share no position axis"):
        run(c, "atp", KINDS, [pairs(2, 4, roles=SHORT), pairs(2, 6)])
    with pytest.raises(RelpError, match="no prompt pairs"):
        run(c, "atp", KINDS, [])


def test_axis_of_equal_and_of_different_templates():
    same = pairs(2, 4, roles=SHORT)
    assert position_axis([same, same]) == ("position", SHORT)
    swapped = pairs(2, 4, roles=("bos", "verb", "subject", "end"))
    axis, labels = position_axis([same, swapped])
    assert axis == "role"
    assert sorted(labels) == sorted(SHORT)
    assert position_axis([same, pairs(2, 6, roles=LONG)]) == position_axis([pairs(2, 6, roles=LONG), same])


def test_roles_of_one_length_only_label_positions():
    c = case("gpt2")
    plain, labelled = run(c, "atp", ["head"]), run(c, "atp", ["head"], [replace(c.batch, roles=LONG)])
    assert (labelled["head"].labels, labelled["head"].axis) == (LONG, "position")
    assert torch.equal(plain["head"].examples, labelled["head"].examples)


def test_random_scores_belong_to_roles_not_to_lengths():
    c = case("gpt2")
    short, long = pairs(3, 4, seed=2, roles=SHORT), pairs(5, 6, seed=3, roles=LONG)
    both = run(c, "random", ["head"], [short, long])["head"]
    alone = run(c, "random", ["head"], [long])["head"]
    close(both.mean, alone.mean, 1e-14)
    assert both.variance.abs().max() < 1e-12
    other = run(c, "random", ["head"], [long], seed=1)["head"]
    assert not torch.allclose(other.mean, alone.mean)


def test_delta_is_the_norm_of_the_change():
    c = case("gemma2")
    got = run(c, "delta", ("mlp_out", "head", "mlp_neuron"))
    base, other = (forward(c.weights, c.config, ids) for ids in (c.batch.original, c.batch.patch))
    for kind in got:
        change = torch.stack([o - n for n, o in zip(base[kind], other[kind], strict=True)], 1).detach()
        close(got[kind].examples, change.abs() if kind == "mlp_neuron" else change.norm(dim=-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rlp"}, "unknown method 'rlp'; did you mean 'relp'"),
        ({"kinds": ["mlp_outt"]}, "unknown node kind 'mlp_outt'; did you mean 'mlp_out'"),
        ({"kinds": []}, "expected at least one node kind"),
        ({"kinds": ["head", "head"]}, "each once"),
        ({"metric": "logitdiff"}, "unknown metric 'logitdiff'; did you mean 'logit_diff'"),
        ({"direction": "denoise"}, "unknown direction 'denoise'; did you mean 'denoising'"),
        ({"baseline": "zeros"}, "unknown baseline 'zeros'; did you mean 'zero'"),
        ({"rule": ["ln"]}, "method 'relp' has no parameter 'rule'; did you mean 'rules'"),
        ({"method": "relp+ahh"}, "unknown rule 'ahh'"),
        ({"method": "act_patch", "chunk_tokens": 0}, "parameter 'chunk_tokens': .*greater than 0"),
        ({"method": "atp", "steps": 3}, "method 'atp' has no parameter 'steps'"),
        ({"metric": "accuracy"}, "metric 'accuracy' has no gradient"),
        ({"baseline": "mean", "direction": "denoising"}, "has no denoising direction"),
    ],
)
def test_bad_arguments_name_themselves(options, message):
    options = {"method": "relp", "kinds": ["mlp_out"]} | options
    with pytest.raises(RelpError, match=message) as error:
        run(case("gpt2"), **options)
    assert "\n" not in str(error.value)


def test_scores_that_overflow_are_refused():
    c = case("gpt2", dtype=torch.float16)
    huge = {"ln_final.hook_out": lambda v: v * float("inf")}
    with pytest.raises(RelpError, match="not finite"), c.model.hooks(huge):
        score(c.model, [c.batch], "act_patch", ["mlp_out"])


def test_costs_are_counted():
    """Forward and backward passes per pair, however the pairs are batched."""
    c = case("gpt2")
    batches = [c.batch, PairBatch(**vars(c.batch.rows(slice(0, 3))))]
    differ = [
        b.original != b.patch for b in batches
    ]  # tokens: the first layer's stream; later ones from the first change on
    moved = sum(int(d.sum()) + 2 * int((d.cumsum(1) > 0).sum()) for d in differ) / 7
    assert 12 < moved < 18
    costs = [
        ("atp", "patch", 2, 1),
        ("relp", "patch", 2, 1),
        ("delta", "patch", 2, 0),
        ("act_patch", "patch", 2 + moved, 0),
    ]
    costs += [("atp", "zero", 2, 1), ("atp", "mean", 2, 1), ("act_patch", "zero", 19, 0)]
    for method, baseline, forwards, backwards in costs:
        for size in (1, 3, 32):
            meta = run(c, method, ["resid_pre"], batches, batch_size=size, baseline=baseline).meta
            assert meta["forwards_per_pair"] == pytest.approx(forwards, abs=1e-3), (method, size)
            assert meta["backwards_per_pair"] == pytest.approx(backwards, abs=1e-3), (method, size)
            assert meta["n_pairs"] == 7
