"""Feature circuits: selection, files, and faithfulness against a slow evaluation in plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.forward import forward
from oracles.make import exact_float64
from oracles.wrapped import case, double_by_default, pairs, run
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.features.load import Dictionaries, load_dictionaries
from relp_cli.selection import select
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.features import FeatureScores, counted_sites, feature_masks, sites_of, without_errors
from relp_cli.spaces.sites import Site

from .folders import auto_encoder_state, write_all_sites, write_learning

C = case("pythia")
HELD = pairs(n=5, seed=3)


@pytest.fixture(scope="module")
def dicts(tmp_path_factory: pytest.TempPathFactory) -> Dictionaries:
    return load_dictionaries(write_all_sites(tmp_path_factory.mktemp("dictionaries"), 3, 32, 40), C.model)


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Dictionaries:
    """Sites that the oracle names (it has no node behind the last block), with several widths."""
    root = tmp_path_factory.mktemp("some")
    for i, site in enumerate(("embed", "attn_out_layer1", "mlp_out_layer1", "resid_out_layer1", "mlp_out_layer2")):
        write_learning(root / site, auto_encoder_state(32, 30 + 5 * i, 10 * i), None)
    return load_dictionaries(root, C.model)


def scores_of(found: Dictionaries, method: str = "atp") -> FeatureScores:
    return run(C, method, ["feature"], dictionary=found)["feature"]  # type: ignore[return-value]


def table(circuits: Any, found: Dictionaries, **options: Any) -> Any:
    with exact_float64(), double_by_default():
        return evaluate(C.model, [HELD], circuits, dictionary=found, **options)


def slow(found: Dictionaries, circuit: Circuit | None, exclude: int, ablation: str) -> float:
    """Mean logit difference with everything outside the circuit ablated, by the oracle's forward pass."""
    assert HELD.patch is not None
    nodes = {"embed": ("resid_pre", 0), "attn_out_layer1": ("attn_out", 1), "mlp_out_layer1": ("mlp_out", 1),
             "resid_out_layer1": ("resid_pre", 2), "mlp_out_layer2": ("mlp_out", 2)}  # fmt: skip
    source = forward(C.weights, C.config, HELD.patch)

    def replaced(site: Site) -> Any:
        d, (kind, layer) = found[site], nodes[site.name]

        def parts(x: Tensor) -> tuple[Tensor, Tensor]:
            f = ((x - d.b_dec) @ d.w_enc + d.b_enc).clamp(min=0)
            return f, x - (f @ d.w_dec + d.b_dec)

        other_f, other_e = parts(source[kind][layer])
        if ablation == "mean":
            other_f, other_e = other_f.mean(0, keepdim=True), other_e.mean(0, keepdim=True)
        if ablation == "zero":
            other_f, other_e = other_f * 0, other_e * 0

        def node(x: Tensor) -> Tensor:
            f, e = parts(x)
            keep_f = feature_masks(circuit)[site][0] if circuit else torch.zeros(f.shape[1:]).bool()
            keep_e = feature_masks(circuit)[site][1] if circuit else torch.zeros(f.shape[1]).bool()
            f, e = torch.where(keep_f, f, other_f), torch.where(keep_e[:, None], e, other_e)
            return f @ d.w_dec + d.b_dec + e

        return node

    patch = {nodes[s.name]: replaced(s) for s in found if exclude == 0 or s.layer >= exclude}
    with torch.no_grad():
        logits = forward(C.weights, C.config, HELD.original, patch=patch).logits[:, -1]
    return (logits.gather(1, HELD.answer) - logits.gather(1, HELD.foil)).mean().item()


@pytest.mark.parametrize("ablation", ["mean", "zero", "counterfactual"])
@pytest.mark.parametrize("errors", ["all", "residual", "none"])
def test_figures_match_a_slow_evaluation(some: Dictionaries, ablation: str, errors: str) -> None:
    scores = scores_of(some)
    for exclude in (0, 1, 2):
        circuit = select(scores, top_k=150, errors=errors, from_layer=exclude)
        row = table(circuit, some, exclude_layers=exclude, ablation=ablation).iloc[0]
        complement = circuit.complement()
        want = {"F_C": circuit, "F_complement": complement, "F_empty": None}
        for name, which in want.items():
            assert row[name] == pytest.approx(slow(some, which, exclude, ablation), abs=1e-9), (name, exclude)
        assert row.faithfulness == pytest.approx((row.F_C - row.F_empty) / (row.F_M - row.F_empty), abs=1e-9)
        assert row["errors"] == errors
        assert row.n_nodes == 150


def test_everything_kept_is_exactly_one_and_nothing_exactly_zero(dicts: Dictionaries) -> None:
    scores = scores_of(dicts)
    rows = table([select(scores, threshold=t) for t in (-1, float("inf"))], dicts, exclude_layers=0)
    assert rows.faithfulness.tolist() == [1.0, 0.0]
    assert rows.completeness.tolist() == [0.0, 1.0]
    assert rows.n_nodes.tolist() == [scores.n_nodes, 0]
    assert rows.n_possible.tolist() == [scores.n_nodes] * 2
    removed = table([select(scores, threshold=-1, errors=e) for e in ("residual", "none")], dicts, exclude_layers=0)
    assert all(abs(removed.faithfulness - 1) > 1e-3)
    assert removed.n_possible.tolist() == [scores.n_nodes - 6 * 6, scores.n_nodes - 10 * 6]


def test_first_third_of_the_layers_is_excluded(dicts: Dictionaries) -> None:
    row = table(select(scores_of(dicts), threshold=-1), dicts).iloc[0]
    assert row.exclude_layers == 1
    assert row.n_nodes == row.n_possible == 6 * 6 * 41
    assert [s.name for s in counted_sites(tuple(dicts), 2)] == ["attn_out_layer2", "mlp_out_layer2", "resid_out_layer2"]


def test_selection_ranks_features_and_errors_together(dicts: Dictionaries) -> None:
    scores = scores_of(dicts)
    everything = torch.cat([*(scores.dense(s).flatten() for s in dicts), scores.error_mean.flatten()]).abs()
    cut = everything.sort(descending=True).values[99].item()
    circuit = select(scores, top_k=100)
    assert circuit.n_nodes == 100
    by_threshold = select(scores, threshold=cut * (1 - 1e-9))
    for site in dicts:
        assert torch.equal(feature_masks(circuit)[site][0], scores.dense(site).abs() >= cut)
        assert torch.equal(feature_masks(circuit)[site][1], scores.error_mean[scores.at(site)].abs() >= cut)
        assert torch.equal(feature_masks(circuit)[site][0], feature_masks(by_threshold)[site][0])
    assert select({"feature": scores}, threshold=cut, sign="negative").n_nodes < 100
    summed = select(scores, top_k=20, aggregate="sum")
    assert summed.labels == ("*",)
    assert summed.n_nodes == 20
    assert 0 < table(summed, dicts, random_circuits=2).iloc[0].n_nodes <= 20


def test_a_circuit_file_holds_it(dicts: Dictionaries, tmp_path: Path) -> None:
    circuit = select(scores_of(dicts), top_k=60, errors="residual")
    circuit.save(tmp_path / "circuit.json")
    again = Circuit.load(tmp_path / "circuit.json")
    assert again.labels == circuit.labels
    assert sites_of(again.units).removed == "residual"
    assert all(torch.equal(feature_masks(again)[s][0], feature_masks(circuit)[s][0]) for s in dicts)
    assert all(torch.equal(feature_masks(again)[s][1], feature_masks(circuit)[s][1]) for s in dicts)
    random = circuit.random_like(0, 1)
    assert random.counted(1) == circuit.counted(1)
    assert not feature_masks(without_errors(random, "none"))[Site("resid", 2)][1].any()
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(RelpError, match="expected a relp circuit"):
        Circuit.load(tmp_path / "broken.json")


def test_refusals(dicts: Dictionaries, some: Dictionaries) -> None:
    scores = scores_of(dicts)
    circuit = select(scores, top_k=5)
    for options, message in (
        ({"ablation": "resample"}, "unknown ablation of features 'resample'"),
        ({"exclude_layers": 3}, "exclude_layers must be from 0 to 2"),
    ):
        with pytest.raises(RelpError, match=message):
            table(circuit, dicts, **options)
    with pytest.raises(RelpError, match="found with dictionary hash"):
        table(circuit, some)
    with pytest.raises(RelpError, match="numbers of features"):
        table(replace(circuit, meta={}), some)
    with pytest.raises(RelpError, match="unknown choice of error terms"):
        select(scores, threshold=0.1, errors="some")
    with pytest.raises(RelpError, match="only edge and feature circuits"):
        select(run(C, "atp", ["mlp_out"])["mlp_out"], threshold=0.1, errors="none")
