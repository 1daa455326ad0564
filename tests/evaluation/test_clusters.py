"""Clusters of pairs: silhouettes by hand, planted groups, the null's rate of false alarms, and a mixture that comes apart."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import relp_cli
from relp_cli import clustering
from relp_cli.clustering import groups_of, silhouette
from relp_cli.errors import RelpError
from relp_cli.evaluation.mechanisms import batches_of, circuits_of_groups, cross_faithfulness, members_of, unit_scores
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.units import Block, Units


def by_hand(distance, labels):
    """The definition, example by example."""
    found = []
    for i, own in enumerate(labels):
        mean = {g: np.mean([distance[i, j] for j in range(len(labels)) if labels[j] == g and j != i] or [np.nan])
                for g in set(labels)} if (labels == own).sum() > 1 else None  # fmt: skip
        if mean is None:
            found.append(0.0)
            continue
        a, b = mean[own], min(v for g, v in mean.items() if g != own)
        found.append((b - a) / max(a, b))
    return np.mean(found)


def test_silhouette_is_its_definition():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((11, 3))
    distance = np.abs(points[:, None] - points[None]).sum(-1)
    for labels in (np.array([0] * 5 + [1] * 5 + [2]), rng.permutation([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])):
        assert silhouette(distance, labels) == pytest.approx(by_hand(distance, labels), abs=1e-12)


def planted(sizes, spread, seed=0, units=30):
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((units, len(sizes))))[0].T
    labels = np.repeat(np.arange(len(sizes)), sizes)
    values = directions[labels] + spread * rng.standard_normal((len(labels), units)) / np.sqrt(units)
    return values * rng.lognormal(size=(len(labels), 1)), labels


@pytest.mark.parametrize("sizes", [(14, 10), (12, 9, 7)])
def test_planted_groups_are_found_whatever_their_effects_are(sizes):
    values, labels = planted(sizes, 0.4)
    groups = groups_of(values)
    assert groups.found == len(sizes)
    assert (groups.labels == labels).all()  # the largest first
    rotated = np.linalg.qr(np.random.default_rng(1).standard_normal((30, 30)))[0]
    again = groups_of(3 * values @ rotated)
    assert (again.labels == labels).all()
    assert again.tried[len(sizes)] == pytest.approx(groups.tried[len(sizes)])
    # The number that is asked for is cut, and what would have been found is said beside it.
    assert (groups_of(values, 1).n, groups_of(values, 1).found) == (1, len(sizes))


def test_one_group_is_one_group():
    for seed in range(3):
        values, _ = planted((24,), 0.7, seed)
        assert groups_of(values, seed=seed).found == 1
    # Two groups that use the same units in other proportions: silhouettes are large, but their means are less than 45° apart.
    rng = np.random.default_rng(0)
    near = np.where(np.arange(24)[:, None] < 12, [[1.0, 0.5, 0]], [[0.5, 1.0, 0]]) + 0.05 * rng.standard_normal((24, 3))
    groups = groups_of(near)
    assert groups.tried[2][0] > 0.9
    assert groups.found == 1


def test_false_alarms_of_the_null(monkeypatch):
    """Examples of one Gaussian: p ≤ .3 in three of ten sets (99 % of such tests: 3 to 16 of 30); in many dimensions in fewer."""
    monkeypatch.setattr(clustering, "DRAWS", 9)
    rng = np.random.default_rng(0)
    assert 3 <= sum(groups_of(rng.standard_normal((24, 3)), seed=i).p <= 0.3 for i in range(30)) <= 16
    assert sum(groups_of(rng.standard_normal((12, 20)), seed=i).p <= 0.3 for i in range(10)) <= 3


def test_refusals():
    for values, k, why in (
        (np.ones((5, 3)), None, "at least 6 pairs, got 5"),
        (np.ones((8, 3)), 9, "expected 1 to 8 clusters of 8 pairs, got 9"),
        (np.vstack([np.ones((8, 3)), np.zeros((1, 3))]), None, "1 of 9 pairs have no score that is not 0"),
    ):
        with pytest.raises(RelpError, match=why):
            groups_of(values, k)


def test_scores_of_units_are_summed_over_positions_and_absent_positions_are_zero():
    examples = torch.arange(12.0).reshape(3, 4)
    present = torch.tensor([[True, True], [True, False], [True, False]])
    scores = Scores(Units("nodes", (Block("mlp_out", 0, 1), Block("mlp_out", 1, 1), Block("mlp_out", 2, 1))), ("a", "b"), "role",
                    torch.tensor([3, 1]), examples.mean(0), examples.var(0), columns=torch.tensor([0, 2, 3, 5]),
                    examples=examples, present=present)  # fmt: skip
    assert unit_scores(scores).tolist() == [[2, 4], [10, 12], [18, 20]]  # units 0 and 2, at positions 0 and 1
    among = scores.among(torch.tensor([False, True, True]))
    assert among.n.tolist() == [2, 0]
    assert among.mean[:2].tolist() == [6, 7]
    assert torch.isfinite(among.mean).all()
    assert not torch.isfinite(among.variance[2:]).any()


@pytest.fixture(scope="module")
def model():
    return relp_cli.load_model("tiny-gpt2")


def mixture(folder, model, n=24):
    rows = []
    for task in ("sva_across_pp", "ioi"):
        for pair in relp_cli.load_task(task).build(model, n).text_pairs:
            rows.append(
                {"original": pair.original, "patch": pair.patch, "answer": pair.answer[0], "foil": pair.foil[0]}
            )
    path = folder / "mix.jsonl"
    path.write_text("\n".join(json.dumps({**row, "split": "discovery"}) for row in rows))
    return path


def test_a_mixture_comes_apart_on_the_command_line(relp, tmp_path, model):
    mixture(tmp_path, model)
    assert relp("score", "mix.jsonl", "--nodes", "mlp_neuron,head", "-o", "run").code == 0
    (tmp_path / "run/clusters").mkdir()
    (tmp_path / "run/clusters/circuit-3.json").write_text("{}")  # of more clusters, asked for before
    done = relp("circuit", "run", "--clusters", "auto", "--top-k", 20, "--json")
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert said == {"folder": "run/clusters", **json.loads((tmp_path / "run/clusters/clusters.json").read_text())}
    assert sorted(p.name for p in (tmp_path / "run/clusters").iterdir()) == [
        "circuit-1.json",
        "circuit-2.json",
        "clusters.json",
    ]
    task = [" gave a " in pair["original"] for pair in said["pairs"]]
    cluster = [pair["cluster"] == said["pairs"][task.index(True)]["cluster"] for pair in said["pairs"]]
    assert np.mean(np.array(task) == np.array(cluster)) >= 47 / 48
    cells = {(r["circuit"], r["pairs"]): r["faithfulness"] for r in said["cross_faithfulness"]}
    for own, other in ((1, 2), (2, 1)):  # a circuit serves its own pairs, and those better than the other one does
        assert cells[own, own] > cells[other, own] + 0.1
    shown = relp("circuit", "run", "--clusters", "auto", "--top-k", 20)
    assert "2 clusters (2 have silhouette" in shown.out
    assert "cross-faithfulness" in shown.out
    for more, why in ((["--verify"], "--verify is for one circuit"), (["--union"], "--union is for one circuit")):
        refused = relp("circuit", "run", "--clusters", "auto", "--top-k", 5, *more)
        assert (refused.code, why in refused.err) == (2, True)
    assert "--clusters: expected auto or a number" in relp("circuit", "run", "--clusters", "some", "--top-k", 5).err


def test_a_homogeneous_set_does_not(relp):
    assert relp("score", "ioi", "--nodes", "mlp_out,attn_out,head", "--pairs", 40, "-o", "run").code == 0
    said = json.loads(relp("circuit", "run", "--clusters", "auto", "--top-k", 5, "--json").out)
    assert said["clusters"] == 1
    assert said["verdict"].startswith("one cluster (")


def test_cells_are_what_plain_means_and_evaluate_give(model, tmp_path):
    pairs = relp_cli.load_task(mixture(tmp_path, model, 8)).pairs(model, None)
    views = relp_cli.score(model, pairs, method="relp", nodes=["head"], keep_examples=True)
    scores = views["head"].whole
    labels = np.array([0] * 5 + [1] * 11)  # any groups will do
    table = cross_faithfulness(model, pairs, scores, labels, {"top_k": 3})
    values = scores.dense(scores.examples).double().numpy()  # [example, pos, unit]
    for group, members in enumerate((np.arange(0, 5, 2), np.arange(5, 16, 2))):
        there = scores.present.numpy()[members]
        mean = (values[members].sum(0) / np.maximum(there.sum(0), 1)[:, None]).sum(0)
        best = set(np.argsort(-np.abs(mean))[:3].tolist())
        (circuit,) = [circuits_of_groups(scores, labels, {"top_k": 3}, even=True)[group]]
        assert set(circuit.mask[0].nonzero()[:, 0].tolist()) == best
        for other, rows in enumerate((np.arange(1, 5, 2), np.arange(6, 16, 2))):
            want = relp_cli.evaluate(model, batches_of(pairs, rows), circuit)
            got = table[(table.circuit == group + 1) & (table["pairs"] == other + 1)].iloc[0]
            assert got.faithfulness == pytest.approx(want.faithfulness.iloc[0], rel=1e-9)
            assert got.n_pairs == len(rows)
    two = [0, 0, 1, 1, *range(2, 14)]  # each of the first two prompts is on one side
    shared = replace(scores, meta={**scores.meta, "prompt_of": two})
    sides = [members_of(shared, labels, 1, half).tolist() for half in (0, 1)]
    assert sides == [[5, 7, 9, 11, 13, 15], [6, 8, 10, 12, 14]]
    assert [members_of(shared, labels, 0, half).tolist() for half in (0, 1)] == [[0, 1, 4], [2, 3]]
    one = replace(scores, meta={**scores.meta, "prompt_of": [0] * 5 + [1] * 11})
    with pytest.raises(RelpError, match="a cluster of one prompt leaves none"):
        cross_faithfulness(model, pairs, one, labels, {"top_k": 3})
    with pytest.raises(RelpError, match="a cluster of one pair leaves none"):
        cross_faithfulness(model, pairs, scores, np.array([0] * 15 + [1]), {"top_k": 3})


def test_examples_stand_in_the_order_of_pairs(model, tmp_path):
    pairs = relp_cli.load_task(mixture(tmp_path, model, 4)).pairs(model, None)
    scores = relp_cli.score(model, pairs, method="atp", nodes=["mlp_out"], keep_examples=True, batch_size=3)
    whole = unit_scores(scores["mlp_out"].whole)
    for i in (0, 3, 7):
        (alone,) = batches_of(pairs, np.array([i]))
        one = relp_cli.score(model, [alone], method="atp", nodes=["mlp_out"])["mlp_out"].mean.sum(-1)
        assert whole[i] == pytest.approx(one.numpy(), rel=1e-4, abs=1e-5)
