"""A model may run in bfloat16; what is computed from its values and gradients is not rounded to it."""

import pytest
import torch
from oracles.make import random_model
from oracles.wrapped import pairs

import relp_cli as relp
from relp_cli.edges.space import EdgeBatch
from relp_cli.errors import RelpError
from relp_cli.evaluation.behaviour import behaviour
from relp_cli.features.load import load_dictionaries
from relp_cli.features.space import FeatureBatch
from relp_cli.methods.core import gradients
from relp_cli.methods.nodes import NodeBatch
from relp_cli.methods.setup import Setup
from relp_cli.methods.space import Point
from relp_cli.models.load import wrap
from relp_cli.nodes.kinds import NODE_KINDS
from relp_cli.runs.scoring import scoring_notes
from relp_cli.spaces.graph import Graph
from relp_cli.tasks.metrics import METRICS

KINDS = ("resid_pre", "head", "mlp_neuron")


@pytest.fixture(scope="module")
def model():
    return relp.load_model("tiny-pythia", dtype="bfloat16", device="cpu")


@pytest.fixture(scope="module")
def batch(model):
    return relp.load_task("sva_across_pp").pairs(model, n=3)[0]


def test_scores_are_the_float32_products_of_the_models_own_tensors(model, batch):
    setup = Setup(model, batch, METRICS["logit_diff"], tuple(NODE_KINDS[k] for k in KINDS))
    source, (at,) = setup.source_activations(), gradients(setup, [Point()])
    found = NodeBatch(setup).attribute([Point()]).scores
    n = model.shape
    for kind, split in (("resid_pre", 1), ("head", n.n_heads), ("mlp_neuron", n.d_mlp)):
        assert at.grads[kind][0].dtype == torch.bfloat16
        for layer in range(n.n_layers):
            delta = source[kind][layer].float() - at.values[kind][layer].float()
            want = (delta * at.grads[kind][layer].float()).unflatten(-1, (split, -1)).sum(-1)
            got = found[kind][:, layer]
            assert got.dtype == torch.float32
            assert torch.equal(got.reshape(want.shape), want)


def test_edges_too(model, batch):
    on = EdgeBatch(Setup(model, batch, METRICS["logit_diff"], ()), Graph.of(model.shape))
    source, (at,) = on.source, on.gradients([Point()])
    scores = on.attribute([Point()]).scores["edges"]
    want = ((source.input.float() - at.values.input.float()) * at.logits.float()).sum((1, 2))
    torch.testing.assert_close(scores[:, 0, -1], want, rtol=1e-5, atol=1e-7)
    mlp = at.values.mlps[0].float(), source.mlps[0].float()
    want = ((mlp[1] - mlp[0]) * at.logits.float()).sum((1, 2))
    torch.testing.assert_close(scores[:, on.graph.n_heads + 1, -1], want, rtol=1e-5, atol=1e-7)


def test_features_too(model, batch):
    dictionaries = load_dictionaries("tiny-pythia", model)
    kinds = tuple(dict.fromkeys(site.node_kind for site in dictionaries))
    on = FeatureBatch(Setup(model, batch, METRICS["logit_diff"], kinds), dictionaries)
    scores, (at,) = on.attribute([Point()]).scores, on.gradients([Point()])
    site, d = next(iter(dictionaries.items()))
    (f, e), (f_source, e_source) = (d.split(runs[site.node_kind.name][site.at]) for runs in (on.run, on.source))
    g = at.grads[site.node_kind.name][site.at].float()
    assert torch.equal(scores[site.name], (f_source.float() - f.float()) * (g @ d.w_dec.float().T))
    assert torch.equal(scores[f"{site.name}/error"], ((e_source.float() - e.float()) * g).sum(-1))


def test_kl_is_never_positive_and_that_of_the_float64_logits(model, batch):
    logits, reference = model.logits(batch.patch), model.logits(batch.original)
    assert logits.dtype == torch.bfloat16
    found = METRICS["kl"].fn(logits, batch.answer, batch.foil, reference)
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    torch.testing.assert_close(found.double(), -(p.exp() * (p - q)).sum(-1), rtol=1e-5, atol=1e-7)
    scores = relp.score(model, [batch], "act_patch", ["mlp_out", "head"], metric="kl", keep_examples=True)
    assert all(scores[kind].examples.max() <= 0 for kind in ("mlp_out", "head"))
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(200, 5000, generator=generator)
    near = (one + 1e-4 * torch.randn(200, 5000, generator=generator)).bfloat16()
    answers = torch.zeros(200, 1, dtype=torch.long)
    assert METRICS["kl"].fn(near, answers, answers, one.bfloat16()).max() <= 0


@pytest.mark.parametrize("metric", list(METRICS))
def test_a_metric_that_is_no_number_is_refused_by_name_and_prompt(model, batch, metric, monkeypatch):
    def broken(tokens, all_positions=False):  # noqa: ARG001
        logits = torch.zeros(len(tokens), model.shape.vocab)
        logits[1] = float("nan")
        return logits

    monkeypatch.setattr(type(model), "logits", lambda _, tokens: broken(tokens))
    prompt = model.tokenizer.decode(batch.original[1])
    with pytest.raises(RelpError, match=f"metric '{metric}' is nan in 1 of 3 runs .* first on the prompt") as caught:
        behaviour(model, [batch], metric)
    assert prompt in str(caught.value)


@pytest.mark.parametrize("method", ["relp", "relp+secant", "relp+local"])
def test_rules_on_a_large_stream_do_not_overflow_float16(method):
    """Sums of squares of such a stream are beyond float16's largest number, which a surrogate would turn into NaN."""
    models = []
    for dtype in (torch.float32, torch.float16):
        hf = random_model("llama", 0).to(torch.float32)
        hf.get_input_embeddings().weight.data.mul_(100 / hf.get_input_embeddings().weight.std())
        models.append(wrap(hf.to(dtype), None, "large"))
    full, half = (relp.score(m, [pairs()], method, ["resid_pre", "mlp_out"]) for m in models)
    for kind in ("resid_pre", "mlp_out"):
        got, want = half[kind].mean.flatten(), full[kind].mean.flatten()
        assert torch.isfinite(got).all()
        assert torch.corrcoef(torch.stack([got, want]))[0, 1] > 0.99


def test_exact_effects_that_the_dtype_rounds_away_are_pointed_at(model, batch):
    """Of a bfloat16 model's logits, some differences are below the last bit: their share is in the metadata and in a note."""
    scores = relp.score(model, [batch], "act_patch", ["head"], keep_examples=True)
    lost = scores.meta["patched_share_no_effect"]
    ran = scores.meta["forwards_per_pair"] - 2
    still = (scores["head"].examples != 0).sum() / len(batch)
    assert 0.05 < lost < 1
    assert still == pytest.approx((1 - lost) * ran, rel=0.01)
    assert scoring_notes(scores) == [
        f"WARNING: in bfloat16 {lost:.0%} of the patched runs left the metric as it was, to the last bit: effects smaller than "
        "the rounding of logits become 0; float32 keeps them"
    ]
    assert scoring_notes(relp.score(model, [batch], "atp", ["head"])) == []
