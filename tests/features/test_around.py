"""What stands around feature scores and circuits: single examples, unions, verification, random circuits, minimality, overlap."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles.make import exact_float64
from oracles.wrapped import case, close, double_by_default, pairs, run
from torch import Tensor

from relp_cli.errors import RelpError
from relp_cli.evaluation.circuit_tests import circuit_tests, inflations
from relp_cli.evaluation.compare import compare
from relp_cli.evaluation.evaluate import Ablating, evaluate
from relp_cli.evaluation.feature_circuits import FeatureAblator
from relp_cli.evaluation.minimality import minimality
from relp_cli.evaluation.overlap import overlap, stability
from relp_cli.evaluation.verdicts import Levels
from relp_cli.evaluation.verify import confirmed
from relp_cli.features.load import Dictionaries, load_dictionaries
from relp_cli.methods.request import Request
from relp_cli.methods.score import score_units
from relp_cli.selection import select
from relp_cli.spaces.features import FeatureScores, feature_circuit, feature_masks
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.sites import Site
from relp_cli.statistics import pearson

from .folders import write_all_sites

C = case("pythia")
ROLES = ("a", "b", "b", "c", "d", "end")
LONG, SHORT = pairs(roles=ROLES), pairs(n=3, pos=4, seed=7, roles=("a", "b", "c", "end"))


@pytest.fixture(scope="module")
def dicts(tmp_path_factory: pytest.TempPathFactory) -> Dictionaries:
    return load_dictionaries(write_all_sites(tmp_path_factory.mktemp("dictionaries"), 3, 32, 20), C.model)


def scored(found: Dictionaries, method: str = "relp", batches: object = None, **options: object) -> FeatureScores:
    return run(C, method, ["feature"], batches, dictionary=found, **options)["feature"]  # type: ignore[return-value]


def alone(found: Dictionaries) -> list[FeatureScores]:
    """Every pair scored on its own, in order."""
    return [scored(found, batches=[b.rows(torch.tensor([i]))]) for b in (LONG, SHORT) for i in range(len(b))]


def at(scores: FeatureScores, site: Site, label: str) -> Tensor:
    """Float[feature + 1] at a label: features and the error term; NaN where the label is missing."""
    if label not in scores.labels:
        return torch.full((scores.sizes[0] + 1,), float("nan"), dtype=torch.float64)
    p = scores.labels.index(label)
    return torch.cat([scores.dense(site)[p], scores.error_mean[scores.at(site), p, None]]).double()


def test_single_examples_are_kept_sparsely(dicts: Dictionaries, tmp_path: Path) -> None:
    both, each = scored(dicts, batches=[LONG, SHORT]), alone(dicts)
    flat = both.whole.table("feature")
    assert flat.examples is not None
    assert both.present is not None
    assert both.present.tolist() == [[True] * 5] * 4 + [[True, True, True, False, True]] * 3
    for example, one in enumerate(each):
        for label in both.labels:
            parts = [at(one, site, label).nan_to_num() for site in dicts]
            want = torch.cat([*(p[:-1] for p in parts), *(p[-1:] for p in parts)])
            close(flat.examples[example, 0, both.labels.index(label)].double(), want, 1e-5)
    assert both.whole.examples is not None
    assert int((both.whole.examples != 0).sum()) < 0.7 * flat.examples.numel()
    both.whole.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")["feature"].whole.table("feature")  # type: ignore[attr-defined]
    assert torch.equal(again.examples, flat.examples)
    without = scored(dicts, keep_examples=False)
    assert without.whole.examples is without.present is without.whole.table("feature").examples is None
    without.whole.save(tmp_path / "scores.safetensors")
    assert Scores.load(tmp_path / "scores.safetensors").examples is None


def test_too_many_examples_are_not_kept_unless_asked_for(dicts: Dictionaries, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relp_cli.spaces.totals.KEEP_LIMIT", 100)
    assert scored(dicts).whole.examples is None
    assert scored(dicts, keep_examples=True).whole.examples is not None


def test_resampled_pairs_are_counted_as_often_as_drawn(dicts: Dictionaries) -> None:
    both, each = scored(dicts, batches=[LONG, SHORT]), alone(dicts)
    weights = [2, 0, 1, 0, 0, 3, 1]
    got = both.whole.weighed(torch.tensor(weights).float())["feature"]
    for site in dicts:
        for label in both.labels:
            rows = [(w, at(one, site, label)) for w, one in zip(weights, each, strict=True) if label in one.labels]
            close(at(got, site, label), sum(w * v for w, v in rows) / sum(w for w, _ in rows), 1e-5)


@pytest.mark.parametrize("aggregate", ["none", "sum"])
@pytest.mark.parametrize("sign", ["absolute", "positive", "negative"])
def test_a_union_keeps_what_passes_for_any_example(dicts: Dictionaries, sign: str, aggregate: str) -> None:
    both, each = scored(dicts, batches=[LONG, SHORT]), alone(dicts)
    circuit = select(both, threshold=0.02, union=True, sign=sign, aggregate=aggregate)
    strength = {"absolute": torch.abs, "positive": torch.clone, "negative": torch.neg}[sign]
    for site in dicts:
        values = torch.stack(
            [torch.stack([at(one, site, label) for label in both.labels]).nan_to_num() for one in each]
        )
        values = values.sum(1, keepdim=True) if aggregate == "sum" else values
        want = (strength(values) > 0.02).any(0)
        assert torch.equal(
            torch.cat([feature_masks(circuit)[site][0], feature_masks(circuit)[site][1][:, None]], 1), want
        )
    assert 0 < circuit.n_nodes < circuit.n_possible
    with pytest.raises(RelpError, match="needs a threshold or fraction"):
        select(both, top_k=5, union=True)
    with pytest.raises(RelpError, match="score again with --per-example"):
        select(scored(dicts, keep_examples=False), threshold=0.1, union=True)


def test_agreement_has_intervals_over_pairs(dicts: Dictionaries) -> None:
    with exact_float64(), double_by_default():
        rows = compare(C.model, [LONG, SHORT], methods=["relp"], nodes=["feature"], scores={
            m: run(C, m, ["feature"], [LONG, SHORT], dictionary=dicts) for m in ("relp", "act_patch")
        })  # fmt: skip
    (row,) = rows.to_dict("records")
    assert row["pcc_lo"] < row["pcc"] < row["pcc_hi"]
    exact = scored(dicts, "act_patch", [LONG, SHORT]).whole.table("feature")
    estimate = scored(dicts, batches=[LONG, SHORT]).whole.table("feature")
    assert exact.examples is not None
    assert estimate.examples is not None
    own = [
        float(pearson(*(s.examples[i][:, s.present[i]].numpy().ravel() for s in (estimate, exact))))  # type: ignore[index,union-attr]
        for i in range(7)
    ]
    assert row["pcc_per_pair"] == pytest.approx(np.mean(own), abs=1e-5)


def test_stability_and_overlap(dicts: Dictionaries) -> None:
    same = C.batch.rows(torch.tensor([1, 1, 1]))
    mean, kept = stability(scored(dicts, batches=[same]).whole, samples=5, top_k=30)  # type: ignore[dict-item]
    assert mean == 1
    assert sum(int((share > 0.999).sum()) for share in kept.values()) == 30
    scores = scored(dicts)
    mean, _ = stability(scores.whole, samples=20, top_k=30)  # type: ignore[dict-item]
    assert 0.1 < mean < 1
    drawn = scores.whole.weighed(torch.tensor([2.0, 0, 1, 0]))["feature"]
    want = select(scored(dicts, batches=[C.batch.rows(torch.tensor([0, 2]))]), threshold=0.05, union=True)
    again = select(drawn, threshold=0.05, union=True)
    assert all(torch.equal(feature_masks(again)[s][0], feature_masks(want)[s][0]) for s in dicts)
    assert all(torch.equal(feature_masks(again)[s][1], feature_masks(want)[s][1]) for s in dicts)
    mean, _ = stability(scores.whole, samples=20, threshold=0.05, union=True)  # type: ignore[dict-item]
    assert 0.1 < mean < 1
    first, second = select(scores, top_k=40), select(scores, top_k=30)
    got = overlap(first, second)
    assert (got["kinds"], got["n"], got["n_reference"], got["common"]) == ("feature", 40, 30, 30)
    assert (got["jaccard"], got["precision"], got["recall"]) == (0.75, 0.75, 1)
    with pytest.raises(RelpError, match="of different dictionaries"):
        overlap(first, replace(second, meta={**second.meta, "dictionary_hash": "other"}))
    with pytest.raises(RelpError, match="a circuit of features and one of nodes"):
        overlap(first, select(run(C, "relp", ["mlp_out"])["mlp_out"], top_k=3))


@pytest.mark.parametrize("options", [{}, {"direction": "denoising"}, {"baseline": "zero"}])
def test_verification_patches_the_circuits_nodes_alone(dicts: Dictionaries, options: dict[str, str]) -> None:
    scores, exact = scored(dicts, **options), scored(dicts, "act_patch", **options)
    circuit = select(scores, top_k=60)
    values = [exact.dense(s)[feature_masks(circuit)[s][0]] for s in dicts]
    values += [exact.error_mean[exact.at(s)][feature_masks(circuit)[s][1]] for s in dicts]
    sizes = torch.cat(values).abs().sort().values
    # τ in the widest gap of the middle third: a value compared with itself would pass or not as rounding has it.
    widest = 20 + int((sizes[21:41] - sizes[20:40]).argmax())
    tau = float(sizes[widest : widest + 2].mean())
    assert (sizes - tau).abs().min() > 1e-5 * tau
    with exact_float64(), double_by_default():
        kept = confirmed(C.model, [C.batch], circuit, tau, scores.meta, dicts)
        request = Request("logit_diff", scores.meta["direction"], scores.meta["baseline"])
        only = score_units(C.model, [C.batch], "act_patch", ["feature"], request, only=circuit, dictionary=dicts)
    assert 0 < only.meta["patched_runs"] <= 4 * 60 < exact.meta["patched_runs"]
    for site in dicts:
        assert torch.equal(
            feature_masks(kept)[site][0], feature_masks(circuit)[site][0] & (exact.dense(site).abs() > tau)
        )
        assert torch.equal(
            feature_masks(kept)[site][1],
            feature_masks(circuit)[site][1] & (exact.error_mean[exact.at(site)].abs() > tau),
        )
    assert 0 < kept.n_nodes < 60
    assert kept.meta["verified"] == {"method": "act_patch", "confirm": tau}


def test_prompts_that_do_not_differ_have_no_effects(dicts: Dictionaries) -> None:
    same = replace(C.batch, patch=C.batch.original)
    found = scored(dicts, "act_patch", [same])
    assert found.meta["patched_runs"] == 0
    assert found.whole.columns is not None
    assert len(found.whole.columns) == 0


def test_random_circuits_are_drawn_among_active_features(dicts: Dictionaries) -> None:
    scores = scored(dicts, batches=[LONG, SHORT])
    with exact_float64(), double_by_default():
        circuit = select(scores, top_k=50, from_layer=1)
        runs = FeatureAblator(C.model, [LONG, SHORT], [circuit], Ablating("mean", 1, dictionary=dicts))
        active = runs.active
    assert set(active) == {s for s in dicts if s.layer >= 1}
    for site, mask in active.items():
        want = torch.zeros_like(mask)
        for batch in (LONG, SHORT):
            for tokens in (batch.original, batch.patch):
                with exact_float64():
                    f, _ = runs.parts(tokens)[site]  # type: ignore[arg-type]
                for p, label in enumerate(batch.labels):
                    want[runs.labels.index(label)] |= (f[:, p] > 0).any(0)
        assert torch.equal(mask, want)
        assert not mask.all()
    random = circuit.random_like(0, 1, runs.drawable(circuit))
    assert random.counted(1) == 50
    assert all(not (feature_masks(random)[s][0] & ~active[s]).any() for s in active)
    of_features = circuit.units.span("feature")
    few = torch.zeros_like(circuit.mask)
    few[:, of_features] = runs.drawable(circuit)[:, of_features] & (torch.arange(of_features.stop) % 5 == 0)
    few &= circuit.units.counted(1)
    wanted = min(int(few.sum()), int(circuit.mask[:, of_features].sum()))
    drawn = circuit.random_like(0, 1, few)
    assert int(drawn.mask[:, of_features].sum()) == wanted
    assert not (drawn.mask & ~few)[:, of_features].any()


def test_minimality_drops_one_feature_or_error_at_a_time(dicts: Dictionaries) -> None:
    circuit = select(scored(dicts), top_k=12, from_layer=1)
    held = pairs(n=5, seed=3)
    with exact_float64(), double_by_default():
        table = minimality(C.model, [held], circuit, exclude_layers=1, dictionary=dicts)
        whole = evaluate(C.model, [held], circuit, exclude_layers=1, dictionary=dicts).iloc[0]
        assert len(table) == 12
        assert table.loss.is_monotonic_decreasing
        for row in table.to_dict("records"):
            site = next(s for s in dicts if s.name == row["layer"])
            masks = {s: (f.clone(), e.clone()) for s, (f, e) in feature_masks(circuit).items()}
            if row["kind"] == "feature":
                masks[site][0][int(row["position"]), int(row["unit"])] = False
            else:
                masks[site][1][int(row["position"])] = False
            features, errors = ({s: both[i] for s, both in masks.items()} for i in (0, 1))
            smaller = feature_circuit(features, errors, circuit.labels, meta=circuit.meta)
            assert smaller.n_nodes == 11
            left = evaluate(C.model, [held], smaller, exclude_layers=1, dictionary=dicts).iloc[0]
            assert row["loss"] == pytest.approx(whole.F_C - left.F_C, abs=1e-9)
    assert set(table.kind) == {"feature", "feature_error"}


def test_a_circuit_of_features_is_tested_unit_by_unit(dicts: Dictionaries) -> None:
    """Paths go over features that are active in some prompt alone; each change is that of the evaluator."""
    circuit = select(scored(dicts), top_k=6, from_layer=1)
    held, how = pairs(n=3, seed=3), Levels(references=4, permutations=20)
    smaller = [circuit, *(circuit.without(*cell) for cell in circuit.mask.nonzero().tolist())]
    with exact_float64(), double_by_default():
        tests, units = circuit_tests(C.model, [held], circuit, how, "zero", 1, dictionary=dicts)
        single = [held.rows(torch.tensor([i])) for i in range(3)]
        tables = [evaluate(C.model, [one], smaller, "zero", 1, dictionary=dicts, bootstrap=0) for one in single]
        active = FeatureAblator(C.model, [held], [circuit], Ablating("zero", 1, dictionary=dicts)).drawable(circuit)
    alone = np.array([table.F_C for table in tables])
    want = np.abs(alone[:, 1:] - alone[:, :1]).mean(0)
    assert units.change.to_numpy() == pytest.approx(np.sort(want), abs=1e-9)
    assert tests.n[tests.test == "minimality"].item() == 4
    for inflated, _ in inflations(circuit, 1, 30, active, torch.Generator()):
        assert active[inflated.mask & ~circuit.mask].all()
