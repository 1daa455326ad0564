"""Variance tables against plain sums, a consensus by hand, and settings of a real command against the library, one by one."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch

import relp_cli
from relp_cli.errors import RelpError
from relp_cli.evaluation.robustness import consensus, variance_table
from relp_cli.spaces.circuit import Circuit
from relp_cli.statistics import resample_counts


def test_shares_of_the_variance_are_plain_sums_and_add_up():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 3, 4)) + np.array([0, 1, 5.0])[None, :, None]
    levels = {"a": ["x", "y"], "b": ["p", "q", "r"], "c": list("1234")}
    table = variance_table(values, levels)
    cells = [(at, values[at]) for at in itertools.product(range(2), range(3), range(4))]
    mean = sum(v for _, v in cells) / 24
    total = sum((v - mean) ** 2 for _, v in cells)
    for axis, row in zip(range(3), table.to_dict("records"), strict=False):
        between = 0.0
        for level in range(values.shape[axis]):
            part = [v for at, v in cells if at[axis] == level]
            between += len(part) * (sum(part) / len(part) - mean) ** 2
        assert row["share"] == pytest.approx(between / total)
        assert row["by_chance"] == pytest.approx((values.shape[axis] - 1) / 23)
    assert table.share.sum() == pytest.approx(1)
    assert table.iloc[1].to_dict() | {"lowest": "p", "highest": "r", "levels": 3} == table.iloc[1].to_dict()
    assert table.share[1] > 0.7


def test_a_factor_alone_takes_all_and_noise_takes_what_chance_gives():
    alone = variance_table(np.array([[1.0, 1], [3, 3]]), {"a": ["x", "y"], "b": ["p", "q"]})
    assert alone.share.tolist() == pytest.approx([1, 0, 0])
    product = variance_table(np.array([[1.0, -1], [-1, 1]]), {"a": ["x", "y"], "b": ["p", "q"]})
    assert product.share.tolist() == pytest.approx([0, 0, 1])
    rng = np.random.default_rng(0)
    noise = [variance_table(v, {"a": "xyz", "b": "1234567"}).share[0] for v in rng.normal(size=(200, 3, 7))]
    assert np.mean(noise) == pytest.approx(2 / 20, abs=0.015)
    one = variance_table(np.ones((2, 1)), {"a": ["x", "y"], "b": ["p"]})
    assert one.factor.tolist() == ["a", "interactions and rest"]
    assert one.share.isna().all()
    with pytest.raises(RelpError, match="1 of 2 settings have no faithfulness"):
        variance_table(np.array([1, np.nan]), {"a": ["x", "y"]})


def test_a_consensus_counts_where_a_position_exists():
    def circuit(rows, labels):
        return Circuit.from_mask("mlp_out", torch.tensor(rows, dtype=torch.bool).T, labels)

    a, b, c = circuit([[1, 0], [1, 1]], "st"), circuit([[1, 1], [0, 1]], "su"), circuit([[0, 1], [1, 0]], "st")
    got = consensus([a, b, c], 0.5, {"task": "x"})
    assert got.labels == ("s", "t", "u")
    # Layer 0: s in 2 of 3, t in 2 of 2, u in 0 of 1; layer 1: s in 2 of 3, t in 1 of 2, u in 1 of 1.
    assert got.masks["mlp_out"].tolist() == [[True, True, False], [True, True, True]]
    assert consensus([a, b, c], 1.0, {}).masks["mlp_out"].tolist() == [[False, True, False], [False, False, True]]
    assert got.meta == {"task": "x", "selection": {"consensus": 0.5, "circuits": 3}}
    with pytest.raises(RelpError, match="same units"):
        consensus([a, Circuit.from_mask("attn_out", torch.ones(2, 2) > 0, "st")], 0.5, {})


TEMPLATE = "After {S1=B} and {IO=A} went to the {PLACE}, {S2=B} gave a {OBJECT} to"


def test_the_command(relp, tmp_path):
    assert relp("score", "ioi", "--nodes", "attn_out,mlp_out", "--pairs", 9, "-o", "run").code == 0
    for option, text in {
        "--share=0": "--share", "--keep=2": "--keep", "--methods=relp,relp": "given 2 times", "--methods=rellp": "'relp'",
        "--tasks=ioi": "two tasks", "--ablations=meen": "'mean'", "--ablations=corpus": "--ablations corpus",
        "--sweep=counts:log:4": "--sweep",
    }.items():  # fmt: skip
        done = relp("robustness", "run", option)
        assert done.code == 2
        assert text in done.err
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["pairs.json", "run.json", "scores.safetensors"]
    grid = ("--methods", "relp,atp", "--ablations", "zero,counterfactual", "--sweep", "counts:4,12", "--resamples", 2,
            "--pairs", 12)  # fmt: skip
    cost = json.loads(relp("robustness", "run", *grid, "--dry-run", "--json").out)
    assert cost == {"templates": 3, "circuits": 24, "settings": 48, "forward passes per held-out pair": 20}
    done = relp("robustness", "run", *grid, "--tasks", "ioi,sva_simple", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    settings = pd.DataFrame(found["settings"])
    assert len(settings) == 48
    assert [row["factor"] for row in found["variance"]] == [
        "method", "template", "pairs", "threshold", "ablation", "interactions and rest"
    ]  # fmt: skip

    # One setting from the library: the pairs of the third template alone, as another task has them.
    (tmp_path / "third.yaml").write_text(ONE)
    model, task = relp_cli.load_model("tiny-gpt2"), relp_cli.load_task(tmp_path / "third.yaml")
    scores = relp_cli.score(model, task.pairs(model, 3), "atp", ["attn_out", "mlp_out"], keep_examples=True)
    second = torch.tensor(resample_counts(3, 2, 0)[1]).to(scores.examples.dtype)
    circuit = relp_cli.select(scores.weighed(second), top_k=12, from_layer=1)
    (held,) = task.pairs(model, 4, split="heldout")
    again = held.rows(torch.tensor(np.repeat(np.arange(4), resample_counts(4, 2, 1)[1])))
    want = relp_cli.evaluate(model, [again], circuit, "counterfactual", bootstrap=0).faithfulness[0]
    place = {
        "method": "atp",
        "template": "3",
        "pairs": "resample 2",
        "threshold": "top_k=12",
        "ablation": "counterfactual",
    }
    at = settings[(settings[list(place)] == pd.Series(place)).all(axis=1)]
    assert at.faithfulness.item() == pytest.approx(want, abs=1e-4)
    assert at.n_nodes.item() == 12

    agreed = Circuit.load(tmp_path / "run/consensus.json")
    assert agreed.n_nodes == found["consensus"] > 0
    assert relp("evaluate", "run", "--circuit", "run/consensus.json", "--pairs", 6, "--random", 0).code == 0

    ioi, sva = found["transfer"]
    own = relp_cli.load_task("ioi")
    scores = relp_cli.score(model, own.pairs(model, 9), "relp", ["attn_out", "mlp_out"])
    circuit = relp_cli.select(scores, top_k=2, from_layer=1, aggregate="sum")  # a quarter of six, rounded up
    other = relp_cli.load_task("sva_simple").pairs(model, 12, split="heldout")
    want = relp_cli.evaluate(model, other, circuit, "zero", bootstrap=0).faithfulness[0]
    assert (ioi["found on"], ioi["n_nodes"], sva["found on"]) == ("ioi", 2, "sva_simple")
    assert ioi["sva_simple"] == pytest.approx(want, abs=1e-4)
    stamps = {f: f.stat().st_mtime_ns for f in (tmp_path / "run/robustness").rglob("scores.safetensors")}
    assert relp("robustness", "run", *grid[:6], "--resamples", 1, "--pairs", 3).code == 0
    assert stamps == {f: f.stat().st_mtime_ns for f in (tmp_path / "run/robustness").rglob("scores.safetensors")}


ONE = f"""
name: third
metric: logit_diff
slots:
  A: names
  B: names
  PLACE: places
  OBJECT: objects
templates:
  - "{TEMPLATE}"
patch: {{A: B, B: A}}
balance: [A, B]
answer: "{{A}}"
"""
