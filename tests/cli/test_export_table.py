"""`relp export RUN FILE.csv` and `.parquet`: a row a unit, with the numbers of the score file."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from safetensors.torch import load_file

from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import Scores


def test_every_node_has_a_row_with_its_numbers(relp):
    relp("score", "ioi", "--pairs", 5, "--nodes", "mlp_out,head", "-o", "run")
    assert "in_circuit is empty" in relp("export", "run", "bare.csv").err
    assert pd.read_csv("bare.csv").in_circuit.isna().all()
    relp("circuit", "run", "--threshold", 0.05)
    done = relp("export", "run", "scores.csv", "--json")
    assert relp("export", "run", "scores.parquet").code == 0
    table, stored = pd.read_csv("scores.csv"), load_file("run/scores.safetensors")
    labels = json.loads(relp("show", "run", "--json").out)["positions"]
    assert len(table) == stored["head/mean"].numel() + stored["mlp_out/mean"].numel() == json.loads(done.out)["rows"]
    assert not table.duplicated(["kind", "layer", "position", "unit"]).any()
    for row in table.itertuples():
        at = (row.layer, labels.index(row.position)) + ((int(row.unit),) if row.kind == "head" else ())
        mean, variance = (float(stored[f"{row.kind}/{what}"][at]) for what in ("mean", "variance"))
        assert (row.score, row.se) == pytest.approx((mean, (variance / row.n) ** 0.5), rel=1e-6, abs=1e-12)
        assert row.in_circuit == (abs(mean) > 0.05)
    pd.testing.assert_frame_equal(pd.read_parquet("scores.parquet"), table, check_dtype=False)


def test_edges_have_their_names_and_features_only_rows_that_are_not_0(relp):
    relp("score", "ioi", "--pairs", 3, "--method", "eap", "-o", "edges")
    relp("circuit", "edges", "--top-k", 9)
    assert relp("export", "edges", "edges.parquet").code == 0
    table = pd.read_parquet("edges.parquet")
    assert set(table.unit[table.in_circuit]) == set(Circuit.load("edges/circuit.json").edge_names())
    assert len(table) == 479
    relp("score", "ioi", "--pairs", 3, "--model", "tiny-pythia", "--dictionary", "tiny-pythia", "-o", "features")
    relp("circuit", "features", "--top-k", 9)
    said = json.loads(relp("export", "features", "features.csv", "--json").out)
    features, scores = pd.read_csv("features.csv"), Scores.load("features/scores.safetensors")
    assert said["rows"] + said["zeros_left_out"] == scores.n_nodes
    assert features.in_circuit.sum() == 9 == said["in_circuit"]
    assert features.score[features.in_circuit].abs().min() >= features.score[~features.in_circuit].abs().max()
    assert relp("circuit", "features", "--aggregate", "sum", "--top-k", 2).code == 0
    relp("export", "features", "features.csv")
    kept = pd.read_csv("features.csv").query("in_circuit").groupby(["kind", "layer", "unit"], dropna=False).ngroups
    assert kept == 2


def test_other_names_are_refused_before_anything_is_written(relp):
    relp("score", "ioi", "--pairs", 2, "--nodes", "head", "-o", "run")
    for given, expected in (
        (("x.xlsx", "--format", "table"), "x.xlsx: expected a name that ends in .csv or .parquet"),
        (("x.json",), "this format holds edges"),
        (("x.csv", "--format", "eap-ig"), "x.csv"),
        (("run/scores.safetensors/x.csv",), "cannot write"),
    ):
        done = relp("export", "run", *given)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        assert expected in done.err
    assert [path.name for path in Path().iterdir()] == ["run"]


def test_compare_takes_edges_for_methods_that_score_nothing_else(relp):
    done = relp("compare", "ioi", "--methods", "eap,eap_ig", "--reference", "relp_edges", "--pairs", 3, "--json")
    assert {row["kind"] for row in json.loads(done.out)["rows"]} == {"edges"}
