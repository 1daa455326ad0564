"""One set of options for score, compare and jobs, and circuits evaluated on tasks that they were not selected on."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch

import relp_cli

HOW = ("--baseline", "mean", "--no-bos", "--rules", "ln", "--pairs", 6, "--batch-size", 4)


def saved(folder):
    """Method → scores of the runs below a folder."""
    return {
        json.loads((path / "run.json").read_text())["spec"]["method"]: relp_cli.Scores.load(path / "scores.safetensors")
        for path in folder.iterdir()
    }


def test_compare_and_jobs_score_as_score_does(relp, tmp_path):
    done = relp("score", "ioi", "--nodes", "mlp_out", *HOW, "-o", "alone")
    assert done.code == 0, done.err
    alone = relp_cli.Scores.load(tmp_path / "alone/scores.safetensors")
    done = relp(
        "compare", "ioi", "--nodes", "mlp_out", "--methods", "relp,ig_inputs", "--set", "steps=2", *HOW, "-o", "c"
    )
    assert done.code == 0, done.err
    compared = saved(tmp_path / "c/scores")
    assert compared["ig_inputs"].meta["params"]["steps"] == 2
    (tmp_path / "job.yaml").write_text(
        "name: j\ntasks: [ioi]\nmodels: [tiny-gpt2]\nmethods: [relp, act_patch]\nkinds: [mlp_out]\npairs: 6\n"
        "baseline: mean\nbos: false\nrules: [ln]\nagreement: {}\n"
    )
    done = relp("evaluate", "job.yaml", "--batch-size", 4, "-o", "j")
    assert done.code == 0, done.err
    job = saved(tmp_path / "j/scores")
    for scores in (compared, job):
        assert torch.equal(scores["relp"]["mlp_out"].examples, alone["mlp_out"].examples)
        assert scores["act_patch"].meta["baseline"] == "mean"
        assert scores["relp"].meta["rules"] == {"ln": alone.meta["rules"]["ln"]}
        assert scores["relp"].meta["bos"] == alone.meta["bos"]


def test_edges_are_compared_with_their_exact_effects(relp):
    """The reference has one name in all spaces; a run under its alias is the same method."""
    done = relp("compare", "ioi", "--nodes", "edges", "--methods", "atp,eap", "--pairs", 2, "-o", "c", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert rows[0]["pcc"] == rows[1]["pcc"]
    for name, method in (("a", "edge_patch"), ("b", "atp")):
        assert relp("score", "ioi", "--nodes", "edges", "--method", method, "--pairs", 2, "-o", name).code == 0
    again = json.loads(relp("compare", "a", "b", "-o", "again", "--json").out)["rows"]
    assert again[0]["pcc"] == pytest.approx(rows[0]["pcc"], abs=1e-6)


def test_options_that_would_do_nothing_are_refused(relp, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")
    for arguments, says in (
        (("compare", "run", "--pairs", "3"), "--pairs is for comparing methods on tasks"),
        (("evaluate", "table5_tiny", "--ablation", "zero"), "--ablation is for runs; 'table5_tiny' is a job"),
        (("evaluate", "nix", "--ablation", "zero"), "'nix'"),
        (("compare", "ioi", "--set", "stesp=3", "--methods", "ig_inputs"), "has a parameter 'stesp'; did you mean 'steps'"),
        (("compare", "ioi", "--methods", "relp+auto", "--rules", "ln"), "rules 'auto' stand alone"),
    ):  # fmt: skip
        done = relp(*arguments)
        assert done.code == 2
        assert says in done.err


def test_a_circuit_is_evaluated_on_another_task(relp, tmp_path):
    """The table is `evaluate` on the other task's held-out pairs, says so, and stands beside the run's own."""
    assert relp("score", "sva_across_pp", "--nodes", "head,mlp_out", "--pairs", 8, "-o", "run").code == 0
    assert relp("circuit", "run", "--top-k", 5, "--aggregate", "sum").code == 0
    done = relp("evaluate", "run", "--task", "ioi", "--pairs", 10, "--random", 0)
    assert done.code == 0, done.err
    assert "transfer: circuits of task sva_across_pp, evaluated on ioi" in done.err
    table = pd.read_csv(tmp_path / "run/evaluation-ioi.csv")
    assert (table.task[0], table.evaluated_on[0], table.metric[0]) == ("sva_across_pp", "ioi", "logit_diff")
    assert not (tmp_path / "run/evaluation.csv").exists()
    model = relp_cli.load_model("tiny-gpt2")
    pairs = relp_cli.load_task("ioi").pairs(model, n=10, seed=0, split="heldout")
    mine = relp_cli.evaluate(model, pairs, relp_cli.Circuit.load(tmp_path / "run/circuit.json"), metric="logit_diff")
    for column in ("faithfulness", "F_M", "F_C", "F_empty"):
        assert table[column][0] == pytest.approx(mine[column][0], rel=1e-5)
    assert relp("evaluate", "run", "--task", "sva_across_pp", "--pairs", 4).code == 0
    assert list(pd.read_csv(tmp_path / "run/evaluation.csv").evaluated_on) == ["sva_across_pp"]


def test_positions_that_the_other_task_lacks_are_named(relp):
    assert relp("score", "sva_across_pp", "--nodes", "mlp_out", "--pairs", 4, "-o", "run").code == 0
    done = relp("evaluate", "run", "--task", "ioi", "--pairs", 4)
    assert done.code == 2
    assert "the circuit has no position" in done.err
    assert "--aggregate sum" in done.err
