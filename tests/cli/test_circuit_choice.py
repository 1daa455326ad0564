"""`relp circuit` where nothing, or nothing sensible, was chosen, and its list of units."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from relp_cli.runs.evaluated import suggested
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores
from relp_cli.spaces.top import circuit_table, top_units, unit_table


@pytest.fixture
def stored(relp):
    assert relp("score", "ioi", "--pairs", 6, "--nodes", "mlp_out,head", "-o", "run").code == 0
    return {k: v.double() for k, v in load_file("run/scores.safetensors").items()}


def test_an_empty_circuit_replaces_no_file_unless_it_may(relp, stored):
    file, largest = Path("run/circuit.json"), max(float(stored[f"{k}/mean"].abs().max()) for k in ("head", "mlp_out"))
    assert relp("circuit", "run", "--top-k", 3).code == 0
    before = file.read_bytes()
    for given in (("--threshold", largest), ("--top-k", 0), ("--fraction", 1e9)):
        done = relp("circuit", "run", *given)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith(f"error: {given[0]} ")
        assert "keeps nothing, and run/circuit.json is there already; --allow-empty" in done.err
        assert file.read_bytes() == before
    assert relp("circuit", "run", "--top-k", 0, "-o", "other.json").code == 0  # a new file
    assert relp("circuit", "run", "--top-k", 0, "--allow-empty").code == 0
    assert Circuit.load(file).n_nodes == 0


def test_without_a_choice_it_says_what_thresholds_would_keep(relp, stored):
    done = relp("circuit", "run", "--json")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "choose by --threshold" in done.err
    sizes = torch.cat([stored["head/mean"].flatten(), stored["mlp_out/mean"].flatten()]).abs()
    for row in json.loads(done.out)["choices"]:
        assert row["kept"] == int((sizes > row["--threshold"]).sum())
        assert row["of"] == len(sizes)
    assert not Path("run/circuit.json").exists()


def _curve(*points):
    """(tau, nodes, faithfulness) …"""
    rows = [{"tau": t, "n_nodes": n, "n_possible": 100, "faithfulness": f, "n_pairs": 9} for t, n, f in points]
    return pd.DataFrame(rows).assign(ablation="mean", exclude_layers=0)


@pytest.mark.parametrize(
    ("points", "tau"),
    [
        (((0.1, 50, 0.99), (0.2, 20, 0.9), (0.4, 5, 0.3)), 0.2),
        (((0.4, 5, 0.3), (0.2, 20, 0.9), (0.1, 50, 0.99)), 0.2),
        (((0.1, 50, 0.99), (0.2, 20, 0.5), (0.4, 5, 0.95)), 0.1),  # beyond a dip nothing is trusted
        (((0.1, 50, 0.79), (0.2, 20, 0.9)), None),
        (((0.1, 50, float("nan")), (0.2, 20, 0.9)), None),
        (((0.1, 50, 0.8), (9.0, 0, 1.0)), 0.1),  # an empty circuit is none
    ],
)
def test_the_smallest_circuit_that_like_all_larger_ones_is_faithful_is_suggested(points, tau):
    found = suggested(_curve(*points))
    assert (None if found is None else found.tau) == tau
    assert suggested(_curve(*points).assign(circuit="a")) is None


def test_an_evaluated_sweep_chooses_and_says_why(relp, stored):
    assert relp("evaluate", "run", "--pairs", 6, "--random", 0, "--sweep", "log:1e-3:10:9").code == 0
    best = suggested(pd.read_csv("run/evaluation.csv"))
    done = relp("circuit", "run", "--json")
    assert done.code == 0
    assert "no threshold was given; τ = " in done.err
    assert json.loads(done.out)["selection"]["threshold"] == best.tau
    sizes = torch.cat([stored["head/mean"].flatten(), stored["mlp_out/mean"].flatten()]).abs()
    assert json.loads(done.out)["n_nodes"] == int((sizes > best.tau).sum())
    other = relp("circuit", "run", "--sign", "positive")  # the sweep was of another selection
    assert other.code == 2


def test_the_list_is_of_all_that_is_kept_with_their_scores(relp, stored):
    assert relp("circuit", "run", "--list").code == 2
    relp("circuit", "run", "--threshold", 0.05)
    rows = json.loads(relp("circuit", "run", "--list", "--json").out)["units"]
    labels = json.loads(relp("show", "run", "--json").out)["positions"]
    kept = {
        (kind, *at): (float(stored[f"{kind}/mean"][at]), float(stored[f"{kind}/variance"][at]))
        for kind in ("mlp_out", "head")
        for at in map(tuple, (stored[f"{kind}/mean"].abs() > 0.05).nonzero().tolist())
    }
    assert len(rows) == len(kept)
    for row in rows:
        unit = () if row["unit"] is None else (row["unit"],)
        score, variance = kept[row["kind"], row["layer"], labels.index(row["position"]), *unit]
        assert (row["score"], row["se"]) == pytest.approx((score, (variance / row["n"]) ** 0.5))
    assert [abs(r["score"]) for r in rows] == sorted((abs(r["score"]) for r in rows), reverse=True)
    text = relp("circuit", "run", "--list").out
    assert text.count("\n") > len(kept)
    refused = relp("circuit", "run", "--list", "--sign", "positive")
    assert refused.code == 2
    assert "--sign selects" in refused.err


def test_the_list_of_a_circuit_without_positions_has_sums(relp, stored):
    done = relp("circuit", "run", "--nodes", "head", "--aggregate", "sum", "--top-k", 4, "--list", "--json")
    sums = stored["head/mean"].sum(1)
    for row in json.loads(done.out)["units"]:
        assert row["score"] == pytest.approx(float(sums[row["layer"], row["unit"]]), rel=1e-5)
        assert (row["position"], row["se"]) == ("*", None)
    best = sums.abs().flatten().sort(descending=True).values[:4].tolist()
    assert [abs(r["score"]) for r in json.loads(done.out)["units"]] == pytest.approx(best, rel=1e-5)


def test_edges_are_listed_by_name_and_the_strongest_are_as_before(relp):
    relp("score", "ioi", "--pairs", 4, "--method", "eap", "-o", "edges")
    relp("circuit", "edges", "--top-k", 7)
    scores, circuit = Scores.load("edges/scores.safetensors"), Circuit.load("edges/circuit.json")
    table, everything, top = circuit_table(scores, circuit), unit_table(scores), top_units(scores, 7)
    assert set(table.unit) == set(circuit.edge_names())
    assert everything.unit.tolist() == scores["edges"].edge_names()
    assert everything.score.tolist() == pytest.approx(scores["edges"].mean[scores["edges"].mask].tolist())
    assert top.position.tolist() == table.unit.tolist()
    assert top.score.tolist() == table.score.tolist()


def test_top_n_rows_are_printed(relp):
    out = relp("score", "ioi", "--pairs", 4, "--nodes", "head", "--top", 3, "-o", "run").out
    assert out.count("head ") == 3
