"""Feature scores: unchanged forward, sums at a site, exact patching and gradient scores against the oracle."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import scores as S
from oracles.forward import embed, forward
from oracles.make import exact_float64
from oracles.wrapped import case, close, double_by_default, pairs, run

from relp_cli.errors import RelpError
from relp_cli.features.load import Dictionaries, load_dictionaries
from relp_cli.spaces.features import FeatureScores
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.sites import Site

from .folders import write_all_sites

SHAPE = "pythia"


@cache
def dictionaries(root: str) -> Dictionaries:
    return load_dictionaries(write_all_sites(Path(root) / "random", 3, 32, 40), case(SHAPE).model)


@pytest.fixture(scope="session")
def dicts(tmp_path_factory: pytest.TempPathFactory) -> Dictionaries:
    return dictionaries(str(tmp_path_factory.mktemp("dictionaries")))


def scored(dicts: Dictionaries, method: str, batches: Any = None, **options: Any) -> FeatureScores:
    return run(case(SHAPE), method, ["feature"], batches, dictionary=dicts, **options)["feature"]  # type: ignore[return-value]


def node(site: Site, layers: int = 3) -> tuple[str, int]:
    """The oracle's node at a site: what leaves block l enters block l + 1 (the last block's output it does not name)."""
    if site.kind == "embed":
        return "resid_pre", 0
    if site.kind == "resid":
        return ("resid_pre", site.layer + 1) if site.layer < layers - 1 else ("", -1)
    return f"{site.kind}_out", site.layer


def test_reconstruction_and_error_leave_the_logits_unchanged(dicts: Dictionaries) -> None:
    c = case(SHAPE)

    def through(site: Site):
        def hook(x: torch.Tensor) -> torch.Tensor:
            f, error = dicts[site].split(x)
            assert error.abs().max() > 0.1
            return dicts[site].decode(f) + error

        return hook

    with torch.no_grad(), exact_float64():
        plain = c.model.logits(c.batch.original)
        with c.model.hooks({site.point: through(site) for site in dicts}):
            close(c.model.logits(c.batch.original), plain, 1e-9)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("method", ["atp", "relp", "ig_inputs", "ig_activations", "relp_ig", "conductance"])
def test_features_and_error_sum_to_the_sites_node_score(dicts: Dictionaries, method: str, direction: str) -> None:
    steps = {"steps": 3} if method not in ("atp", "relp") else {}
    found = scored(dicts, method, direction=direction, **steps)
    kinds = ["resid_pre", "attn_out", "mlp_out"]
    nodes = run(case(SHAPE), method, kinds, direction=direction, **steps)
    for site in dicts:
        kind, layer = node(site)
        if kind:
            close(found.total(site), nodes[kind].mean[layer].double())
    assert found.meta["n_pairs"] == 4
    assert found.meta["forwards_per_pair"] > 0
    assert 0 < len(found.whole.columns) < found.n_nodes


def oracle_parts(dicts: Dictionaries, site: Site, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    d = dicts[site]
    f = ((x - d.b_dec) @ d.w_enc + d.b_enc).clamp(min=0)
    return f, x - f @ d.w_dec - d.b_dec


@pytest.mark.parametrize("rules", [frozenset(), frozenset({"ln", "identity"})])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_gradient_scores_against_the_oracle(dicts: Dictionaries, rules: frozenset[str], direction: str) -> None:
    c = case(SHAPE)
    assert c.batch.patch is not None
    ids, other_ids = S.pick(direction, c.batch.original, c.batch.patch)
    trace, other = forward(c.weights, c.config, ids, rules), forward(c.weights, c.config, other_ids)
    found = scored(dicts, "relp" if rules else "atp", direction=direction)
    loss = c.metric(trace.logits).sum()
    for site in dicts:
        kind, layer = node(site)
        if not kind:
            continue
        x = trace[kind][layer]
        (g,) = torch.autograd.grad(loss, x, retain_graph=True)
        (f, e), (f_other, e_other) = (oracle_parts(dicts, site, t.detach()) for t in (x, other[kind][layer]))
        close(found.dense(site), ((f_other - f) * (g @ dicts[site].w_dec.T)).mean(0))
        close(found.error_mean[found.at(site)], ((e_other - e) * g).sum(-1).mean(0))
        close(found.dense(site, "variance"), ((f_other - f) * (g @ dicts[site].w_dec.T)).var(0))


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_exact_patching_against_the_oracle(dicts: Dictionaries, direction: str) -> None:
    c = case(SHAPE)
    assert c.batch.patch is not None
    ids, other_ids = S.pick(direction, c.batch.original, c.batch.patch)
    found = scored(dicts, "act_patch", direction=direction, chunk_tokens=500)
    base, other = forward(c.weights, c.config, ids), forward(c.weights, c.config, other_ids)
    for site, pos, unit in (
        (Site("embed", -1), 2, 7),
        (Site("mlp", 1), 4, 11),
        (Site("attn", 2), 5, 3),
        (Site("resid", 0), 1, 30),
    ):
        kind, layer = node(site)
        (f, e), (f_other, e_other) = (oracle_parts(dicts, site, t[kind][layer].detach()) for t in (base, other))

        def effect(
            f_new: torch.Tensor, e_new: torch.Tensor, site: Site = site, kind: str = kind, layer: int = layer
        ) -> torch.Tensor:
            x = f_new @ dicts[site].w_dec + dicts[site].b_dec + e_new
            patched = forward(c.weights, c.config, ids, patch={(kind, layer): lambda _: x})
            return (c.metric(patched.logits) - c.metric(base.logits)).detach().mean()

        one = f.clone()
        one[:, pos, unit] = f_other[:, pos, unit]
        close(found.dense(site)[pos, unit], effect(one, e))
        error = e.clone()
        error[:, pos] = e_other[:, pos]
        close(found.error_mean[found.at(site), pos], effect(f, error))
    assert found.meta["patched_runs"] < 0.6 * 4 * found.n_nodes  # only what differs between the prompts is run


def test_integrated_gradients_over_a_site_are_complete(dicts: Dictionaries) -> None:
    """Moving the whole residual stream from run to source changes L by L(source) − L(run)."""
    c = case(SHAPE)
    found = scored(dicts, "ig_activations", steps=30, rule="gauss_legendre")
    gap = c.metric(forward(c.weights, c.config, c.batch.patch).logits) - c.metric(
        forward(c.weights, c.config, c.batch.original).logits
    )
    for layer in range(3):
        close(found.total(Site("resid", layer)).sum(), gap.detach().mean(), 1e-3)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_paths_of_embeddings_against_plain_formulas(dicts: Dictionaries, direction: str) -> None:
    """relp_ig: δf·W_dec·(mean over the path of g under the rules). conductance: Σ_j (f_{j+1} − f_j)·W_dec·(g_j + g_{j+1})/2."""
    c, m = case(SHAPE), 3
    assert c.batch.patch is not None
    ids, other_ids = S.pick(direction, c.batch.original, c.batch.patch)
    start, end = (embed(c.weights, c.config, t) for t in (ids, other_ids))
    rules = frozenset({"ln", "identity"})
    averaged = scored(dicts, "relp_ig", direction=direction, steps=m, rule="left", chunk_tokens=50)
    conducted = scored(dicts, "conductance", direction=direction, steps=m)
    traces = [
        [forward(c.weights, c.config, start + j / m * (end - start), r) for j in range(m + 1)] for r in (rules, ())
    ]
    for site in dicts:
        kind, layer = node(site)
        if not kind:
            continue
        slopes = [
            [torch.autograd.grad(c.metric(t.logits).sum(), t[kind][layer], retain_graph=True)[0] for t in path]
            for path in traces
        ]
        w_dec = dicts[site].w_dec.T
        parts = [oracle_parts(dicts, site, t[kind][layer].detach()) for t in traces[1]]
        g = sum(slopes[0][:m]) / m
        close(averaged.dense(site), ((parts[m][0] - parts[0][0]) * (g @ w_dec)).mean(0))
        close(averaged.error_mean[averaged.at(site)], ((parts[m][1] - parts[0][1]) * g).sum(-1).mean(0))
        mean = [(slopes[1][j] + slopes[1][j + 1]) / 2 for j in range(m)]
        want = sum((parts[j + 1][0] - parts[j][0]) * (mean[j] @ w_dec) for j in range(m))
        close(conducted.dense(site), want.mean(0))
        want = sum(((parts[j + 1][1] - parts[j][1]) * mean[j]).sum(-1) for j in range(m))
        close(conducted.error_mean[conducted.at(site)], want.mean(0))


def test_positions_of_one_label_are_one_node(dicts: Dictionaries) -> None:
    roles = ("a", "b", "b", "c", "d", "d")
    joint = scored(dicts, "atp", [pairs(roles=roles)])
    plain = scored(dicts, "atp", [pairs()])
    assert joint.axis == "role"
    for site in dicts:
        close(joint.dense(site)[1], plain.dense(site)[1:3].sum(0))
        close(joint.error_mean[:, 3], plain.error_mean[:, 4:].sum(1))
    exact = scored(dicts, "act_patch", [pairs(roles=roles)])
    assert exact.dense("resid_out_layer2").shape == (4, 40)


def test_a_score_file_holds_them(dicts: Dictionaries, tmp_path: Path) -> None:
    found = scored(dicts, "atp")
    found.whole.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")["feature"]
    assert isinstance(again, FeatureScores)
    assert again.sites == found.sites
    close(again.dense("mlp_out_layer1"), found.dense("mlp_out_layer1"))
    assert len(again.whole.columns) < found.n_nodes
    with pytest.raises(RelpError, match="no scores for site"):
        found.dense("mlp_out_layer7")


def test_zero_baseline(dicts: Dictionaries) -> None:
    c = case(SHAPE)
    trace = forward(c.weights, c.config, c.batch.original)
    found = scored(dicts, "atp", baseline="zero")
    site = Site("mlp", 1)
    (g,) = torch.autograd.grad(c.metric(trace.logits).sum(), trace["mlp_out"][1])
    f, _ = oracle_parts(dicts, site, trace["mlp_out"][1].detach())
    close(found.dense(site), (-f * (g @ dicts[site].w_dec.T)).mean(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "atp_star"}, "does not score features; methods for features: act_patch, atp, relp"),
        ({"method": "atp", "baseline": "mean"}, "unknown baseline for features 'mean'"),
        ({"method": "atp", "dictionary": None}, "--dictionary PATH"),
        ({"method": "ig_activations", "exact": "all"}, "'exact' is not for features"),
        ({"method": "atp", "dictionary": "nowhere"}, "neither a folder nor shipped"),
    ],
)
def test_refusals(dicts: Dictionaries, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RelpError, match=message), double_by_default():
        run(case(SHAPE), kinds=["feature"], **{"dictionary": dicts, **options})
