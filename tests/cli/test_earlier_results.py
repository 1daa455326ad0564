"""Results of other settings are never replaced without a word."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from relp_cli.runs.made import read_made
from relp_cli.spaces.circuit import Circuit


def test_an_evaluation_of_other_settings_is_kept_and_named(relp):
    relp("score", "ioi", "--pairs", 4, "--nodes", "head", "-o", "run")
    how = ("evaluate", "run", "--pairs", 4, "--random", 0)
    assert relp(*how, "--sweep", "counts:2,8").err.count("kept") == 0
    sweep = Path("run/evaluation.csv").read_bytes()
    assert "other settings" not in relp(*how, "--sweep", "counts:2,8").err  # the same again
    assert Path("run/evaluation.csv").read_bytes() == sweep

    said = relp(*how, "--sweep", "counts:2,8", "--ablation", "zero").err
    kept = Path("run/evaluation-sweep-head-mean-logit_diff-1.csv")
    assert f"evaluation.csv was of other settings, and is kept as {kept.name}" in said
    assert kept.read_bytes() == sweep
    assert "means are of these" not in said  # of zeros
    assert (read_made(kept) or {}).get("provenance")
    assert set(pd.read_csv("run/evaluation.csv").ablation) == {"zero"}

    relp("circuit", "run", "--top-k", 3)
    assert "kept as evaluation-sweep-head-zero-logit_diff-1.csv" in relp(*how).err
    relp("circuit", "run", "--top-k", 5)
    assert "evaluation.csv was of another circuit" in relp(*how).err
    assert "had 2 rows" in relp(*how, "--sweep", "counts:2,8").err + relp(*how, "--sweep", "counts:2,5,8").err
    names = {path.name for path in Path("run").glob("evaluation*.csv")}
    assert names == {"evaluation.csv", kept.name, "evaluation-sweep-head-zero-logit_diff-1.csv",
                     "evaluation-circuit-head-mean-logit_diff-1.csv"}  # fmt: skip
    assert relp("report", "run").code == 0
    page = Path("run/report.html").read_text()
    assert "Evaluation: sweep-head-zero-logit_diff-1" in page


def test_what_is_kept_in_place_of_an_earlier_one_says_so(relp):
    """Two circuits' evaluations of the same settings have one name."""
    relp("score", "ioi", "--pairs", 4, "--nodes", "head", "-o", "run")
    how = ("evaluate", "run", "--pairs", 4, "--random", 0)
    for kept in (3, 5):
        relp("circuit", "run", "--top-k", kept)
        relp(*how)
        said = relp(*how, "--ablation", "zero").err
        assert "kept as evaluation-circuit-head-mean-logit_diff-1.csv" in said
        assert said.count("in place of what had this name") == (kept == 5)
        relp(*how)  # the zeros are kept, and stand in the place of nothing else next time
        Path("run/evaluation-circuit-head-zero-logit_diff-1.csv").unlink()
    assert "in place of" not in relp(*how, "--ablation", "zero").err  # the same table once more


def test_a_kept_sweep_still_chooses_and_is_drawn(relp):
    relp("score", "ioi", "--pairs", 4, "--nodes", "head", "-o", "run")
    how = ("evaluate", "run", "--pairs", 4, "--random", 0)
    relp(*how, "--sweep", "counts:2,8,96,400")
    first, tau = relp("circuit", "run"), Circuit.load("run/circuit.json").meta["selection"]["threshold"]
    assert first.code == 0
    relp(*how)
    assert "circuit" in pd.read_csv("run/evaluation.csv")
    again = relp("circuit", "run")
    assert again.code == 0
    assert "in evaluation-sweep-head-mean-logit_diff-1.csv that" in again.err.replace("\n", " ")
    assert Circuit.load("run/circuit.json").meta["selection"]["threshold"] == tau
    done = relp("report", "run")
    assert "curves.png" in done.out + done.err
    page = Path("run/report.html").read_text()
    assert "curves are those of evaluation-sweep-head-mean-logit_diff-1.csv" in page
    graph = json.loads(page.split('id="graph-data" type="application/json">')[1].split("</script>")[0])
    assert [row["own"] for row in graph["curve"]].count(True) == 1
    assert sum(row["kept"] is not None for row in graph["curve"]) >= 3


def test_tests_keep_their_units_beside_them(relp):
    relp("score", "ioi", "--pairs", 4, "--nodes", "head", "-o", "run")
    relp("circuit", "run", "--top-k", 2)
    how = ("test", "run", "--pairs", 4, "--references", 2, "--permutations", 3)
    relp(*how)
    units = Path("run/tests-units.csv").read_bytes()
    assert "tests.csv was of other settings" in relp(*how, "--ablation", "zero").err
    assert Path("run/tests-units-head-mean-logit_diff-1.csv").read_bytes() == units
    assert Path("run/tests-head-mean-logit_diff-1.csv").is_file()
