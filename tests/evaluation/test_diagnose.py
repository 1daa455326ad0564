"""`diagnose`: measured failure modes against oracles, and hand-built failures that it must name."""

import numpy as np
import pytest
import torch
from methods.test_atp_star import ASK_A, ASK_B, A, B, attend, feature, hand_built
from oracles import scores as S
from oracles.forward import forward
from oracles.wrapped import case, close, double_by_default, exact_float64, run

from relp_cli.errors import RelpError
from relp_cli.evaluation import failure_modes as modes
from relp_cli.evaluation.diagnose import SATURATION, Options, diagnose
from relp_cli.tasks.pairs import PairBatch

HOW = ("logit_diff", "noising")


@pytest.fixture(autouse=True)
def _double():
    with exact_float64(), double_by_default():
        yield


@pytest.mark.parametrize("shape", ["gpt2", "gemma2"])
def test_saturation_reads_the_oracles_patterns(shape):
    c = case(shape)
    weights, config, *prompts = c.prompts
    runs = [forward(weights, config, ids) for ids in prompts]
    a, b = (torch.stack(r["pattern"], 1).transpose(2, 3) for r in runs)  # [b, layer, query, head, key]
    got = modes.saturation(c.model, [c.batch], *HOW)
    close(got.entropy_run, -torch.xlogy(a, a).sum(-1).mean(0), 1e-6)
    close(got.entropy_source, -torch.xlogy(b, b).sum(-1).mean(0), 1e-6)
    close(got.max_run, a.amax(-1).mean(0), 1e-6)
    close(got.moved, 0.5 * (a - b).abs().sum(-1).mean(0), 1e-6)
    swap = {("query", 1): lambda _: runs[1]["query"][1]}
    moved = forward(weights, config, prompts[0], patch=swap)["pattern"][1].transpose(1, 2)
    close(got.moved_by_query[1], 0.5 * (moved - a[:, 1]).abs().sum(-1).mean(0), 1e-6)


@pytest.mark.parametrize("shape", ["gpt2", "pythia"])
def test_cancellation_splits_a_component_as_the_oracle_does(shape):
    """direct: every contribution detached; through a layer: what is lost when that layer's are."""
    c = case(shape)
    weights, config, *prompts = c.prompts
    base, other = (forward(weights, config, ids) for ids in prompts)
    got = modes.cancellation(c.model, [c.batch], *HOW)
    n = len(base["attn_out"])

    def scores(kind, layer, cut):
        """δ·gradient of one component, contributions of the layers in `cut` detached (its own stays a leaf)."""
        patch = {(k, at): lambda t: t.detach() for k in modes.WRITERS for at in cut if (k, at) != (kind, layer)}
        grad = S.gradients(forward(weights, config, prompts[0], patch=patch), c.metric, [kind])[kind][layer]
        return ((other[kind][layer] - base[kind][layer]) * grad).sum(-1)

    for kind in modes.WRITERS:
        for layer in range(n):
            total, direct = scores(kind, layer, []), scores(kind, layer, range(n))
            parts = torch.stack([direct, *(total - scores(kind, layer, [at]) for at in range(n))])
            up, down = parts.clamp_min(0).sum(0), -parts.clamp_max(0).sum(0)
            close(got[kind].total[layer], total.mean(0))
            close(got[kind].direct[layer], direct.mean(0))
            close(got[kind].offset[layer], torch.minimum(up, down).mean(0))
    atp = run(c, "atp", list(modes.WRITERS))
    close(got["mlp_out"].total, atp["mlp_out"].mean)


def test_gradient_norms_along_the_path():
    c = case("llama")
    got = modes.flat_gradients(c.model, [c.batch], *HOW, points=3)
    weights, config, *prompts = c.prompts
    for point, ids in ((0, prompts[0]), (2, prompts[1])):
        trace = forward(weights, config, ids)
        grads = S.gradients(trace, c.metric, ["resid_pre"])["resid_pre"]
        close(got.norms[point], torch.stack([g.flatten(1).norm(dim=-1) for g in grads]))
        close(got.metric[point], c.metric(trace.logits).detach())
    assert got.relative.shape == (3, len(c.batch))


def test_a_saturated_head_is_named_checked_and_repaired():
    model = hand_built(n_layer=2)
    attend(model, 0, strength=40.0)
    found = diagnose(model, [PairBatch([[A, B, ASK_A]], [[A, B, ASK_B]], [0], [1])])
    row = found.nodes[(found.nodes.kind == "query") & (found.nodes.layer == 0) & (found.nodes.position == "2")].iloc[0]
    assert row.reason == SATURATION
    assert row.repair == "atp_star"
    assert abs(row.atp) < 1e-6 < 1 < abs(row.exact)
    assert row.atp_star == pytest.approx(row.exact, rel=1e-2)
    assert any("saturated attention: 1 nodes" in line for line in found.summary)
    head = found.attention[(found.attention.layer == 0) & (found.attention["query"] == "2")].iloc[0]
    assert head.max_run > 0.999
    assert head.moved_by_query > 0.999


def test_cancelling_parts_are_found_and_their_opponent_named():
    """Attention of layer 0 writes the answer's feature, the MLP of layer 1 takes it away (see test_atp_star)."""
    model = hand_built(n_layer=2)
    attend(model, 0, strength=40.0)
    mlp = dict(model.hf.transformer.h[1].mlp.named_parameters())
    next(p for n, p in mlp.items() if "c_fc" in n and n.endswith("weight")).data[:, 0] = feature(3) / 2
    next(p for n, p in mlp.items() if "c_proj" in n and n.endswith("weight")).data[0] = -feature(3)
    found = diagnose(model, [PairBatch([[A, B, ASK_A]], [[A, B, ASK_B]], [0], [1])])
    table = found.cancelling.set_index(["kind", "layer", "position"])
    row = table.loc[("attn_out", 0, "2")]
    assert row.share > 0.99
    assert abs(row.total) < 0.01 * abs(row.direct)
    assert {row.main, row.opponent} == {"direct", "layer 1"}


def test_the_recommendation_follows_from_the_errors_on_patched_nodes():
    c = case("qwen2")
    found = diagnose(c.model, [c.batch], options=Options(top=3, thorough=True))
    patched = found.nodes[found.nodes.exact.notna()]
    exact = run(c, "act_patch", ["value"])["value"].mean
    rows = patched[patched.kind == "value"]
    labels = [str(i) for i in range(c.batch.n_pos)]
    for row in rows.itertuples():
        assert row.exact == pytest.approx(
            exact[row.layer, labels.index(row.position), row.unit].item(), rel=1e-5, abs=1e-6
        )
    for row in found.methods.itertuples():
        error = np.abs(patched[row.method] - patched.exact).sum() / patched.exact.abs().sum()
        assert row.error == pytest.approx(error)
        assert row.lo <= row.error <= row.hi
    table = found.methods.set_index("method")
    assert table.loc[found.recommended].not_worse
    assert table.loc[found.recommended].error <= 1.25 * table.error.min()
    assert len(patched) <= 2 * 3 * 6
    assert (found.suspects.moved > found.floor).all()


def test_bad_input_is_one_clear_line():
    c = case("gpt2")
    with pytest.raises(RelpError, match="did you mean 'atp'"):
        diagnose(c.model, [c.batch], cheap="apt")
    with pytest.raises(RelpError, match="gradient exactly 0"):
        diagnose(c.model, [c.batch], metric="kl")
