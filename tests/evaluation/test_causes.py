"""Causes of errors: parts that add up, by hand; layers whose curvature alone is there are named; what diagnose prints fits."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from methods.test_atp_star import ASK_A, ASK_B, A, B, attend, hand_built
from oracles.wrapped import case, double_by_default, exact_float64, run

from relp_cli.cli.common import Terminal
from relp_cli.evaluation.causes import causes_table, column_of, in_words, parts, secants_alone, secants_by_cause, whys
from relp_cli.evaluation.diagnose import KINDS, Options, diagnose
from relp_cli.tasks.pairs import PairBatch

NODES = pd.DataFrame(
    {"atp": [1.0, 0.0, 2.0, 5.0], "relp": [2.0, 0.0, 2.0, 5.0], "relp+secant": [4.0, -1.0, 2.5, 9.0],
     column_of("norms"): [2.0, 0.5, 2.0, 0.0], column_of("MLPs"): [1.0, -1.0, 2.0, 0.0], "exact": [5.0, -1.0, 2.0, np.nan]}
)  # fmt: skip


def test_parts_and_shares_by_hand():
    got = parts(NODES, "atp")
    assert got.columns.tolist() == ["norms", "MLPs", "several at once", "unknown"]
    assert got.iloc[0].tolist() == [1, 0, 2, 1]  # error 4
    assert got.iloc[1].tolist() == [0.5, -1, -0.5, 0]  # error −1
    assert got.iloc[2].tolist() == [0, 0, 0.5, -0.5]  # error 0
    assert got.iloc[3].isna().all()  # not patched
    table = causes_table(NODES, "atp").set_index("cause")
    assert table.share.to_dict() == pytest.approx(
        {"norms": 0.5 / 5, "MLPs": 1 / 5, "several at once": 2.5 / 5, "unknown": 1 / 5}
    )
    assert table.share.sum() == pytest.approx(1)
    assert table.nodes.to_dict() == {"several at once": 1, "MLPs": 1, "norms": 0, "unknown": 0}
    assert set(table.of_nodes) == {2}
    assert whys(NODES, "atp") == [
        "several at once 50 %, norms 25 %, unknown 25 %",
        "MLPs 100 %, several at once 50 %, norms −50 %",
        "",
        "",
    ]
    assert parts(NODES, "relp").iloc[0].to_dict() == {"curvature": 2, "unknown": 1}
    assert in_words({"norms": 0.04, "unknown": 0.96}) == "unknown 96 %"


def test_secants_alone_are_those_of_their_layers_and_parts_add_up():
    assert "gate2" not in str(secants_by_cause(case("gpt2").model))
    c = case("gemma2")
    with exact_float64(), double_by_default():
        rules = secants_by_cause(c.model)
        assert rules == {
            "norms": ("lnx",), "MLPs": ("act2", "gate2"), "attention": ("attn2", "softmax2", "qk2"), "softcaps": ("softcap2",)
        }  # fmt: skip
        alone = secants_alone(c.model, [c.batch], ["mlp_out"], "logit_diff", "noising")
        norms = run(c, "relp", ["mlp_out"], rules=["lnx"], endpoints="position", blend=True)
        found = diagnose(c.model, [c.batch], options=Options(top=2))
    torch.testing.assert_close(alone["norms"]["mlp_out"].mean, norms["mlp_out"].mean)
    patched = found.nodes[found.nodes.exact.notna()]
    split = parts(found.nodes, "atp").loc[patched.index]
    np.testing.assert_allclose(split.sum(axis=1), patched.exact - patched.atp, rtol=1e-9, atol=1e-9)
    assert found.causes.share.sum() == pytest.approx(1)
    at = found.nodes.kind == "mlp_out"
    np.testing.assert_allclose(found.nodes[at][column_of("norms")], norms["mlp_out"].mean.flatten(), rtol=1e-6)


def test_the_cause_is_where_the_only_curvature_is():
    """A head whose attention a patch turns round: nothing else moves what it reads, so the error is attention's."""
    with exact_float64(), double_by_default():
        model = hand_built(n_layer=2)
        attend(model, 0, strength=40.0)
        found = diagnose(model, [PairBatch([[A, B, ASK_A]], [[A, B, ASK_B]], [0], [1])])
    row = found.nodes[(found.nodes.kind == "query") & (found.nodes.layer == 0) & (found.nodes.position == "2")].iloc[0]
    assert row.why.startswith("attention ")
    assert found.causes.cause.iloc[0] == "attention"


def test_the_terminal_has_no_line_that_is_cut_and_files_have_all(relp, monkeypatch):
    monkeypatch.setattr("relp_cli.cli.common.out", Terminal(width=80))
    monkeypatch.setattr("relp_cli.cli.diagnose.out", Terminal(width=80))
    done = relp("diagnose", "ioi", "--pairs", 4, "--top", 2, "--show", 4, "-o", "out")
    assert done.code == 0, done.err
    assert max(map(len, done.out.splitlines())) <= 80
    assert "other curvature" not in done.out
    assert "• why atp is off, in shares of its Σ|error| over the patched nodes: " in done.out.replace("\n", " ")
    shares = pd.read_csv("out/causes.csv")
    assert {"norms", "MLPs", "attention", "several at once", "unknown"} == set(shares.cause)
    assert column_of("norms") in pd.read_csv("out/nodes.csv")
    assert relp("report", "out").code == 0
    assert "Causes of errors" in Path("out/report.html").read_text()
    Path("out/causes.csv").unlink()  # as an older version left it
    record = json.loads(Path("out/diagnosis.json").read_text())
    record["files"].pop("causes.csv")
    Path("out/diagnosis.json").write_text(json.dumps(record))
    assert relp("report", "out").code == 0
    assert set(KINDS) >= set(pd.read_csv("out/nodes.csv").kind)
