"""The page holds what it was given, and nothing from outside."""

from __future__ import annotations

import base64
import json
import re

import pandas as pd
import pytest
import torch

from relp_cli.errors import RelpError
from relp_cli.report.digest import circuit_counts, top_nodes
from relp_cli.report.html import write_html
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.scores import KindScores
from tests.report.made import LABELS, evaluation, node_scores, scores

RECORD = {
    "hash": "abc123",
    "behaviour": {"accuracy": 0.9876, "metric_original": 3.25, "metric_patch": None, "n": 4, "at_chance": False},
    "provenance": {"command": "relp score <ioi>", "created": "2026-01-02T03:04:05+00:00", "versions": {"torch": "2"}},
    "notes": ["3 pairs exist, 4 were asked"],
}


@pytest.fixture
def run():
    return {"relp": scores("relp", node_scores("mlp_out", 3, 5), node_scores("head", 3, 5, 2, seed=1))}


def test_top_nodes_are_the_largest_with_their_standard_errors(run):
    table = top_nodes(run["relp"], k=4)
    heads = run["relp"]["head"].mean
    best = table[table.kind == "head"].iloc[0]
    assert best.score == pytest.approx(heads.flatten()[heads.abs().argmax()].item())
    assert heads[best.layer, LABELS.index(best.position), best.unit].item() == pytest.approx(best.score)
    assert best.se == pytest.approx((0.25 / 4) ** 0.5)
    assert table.kind.value_counts().to_dict() == {"mlp_out": 4, "head": 4}
    assert table[table.kind == "mlp_out"].unit.isna().all()


def test_circuit_counts_per_layer_and_position():
    mask = torch.zeros(3, 5, 2, dtype=torch.bool)
    mask[1, 4], mask[2, 0, 1] = True, True
    table, possible = circuit_counts(Circuit.from_mask("head", mask, LABELS))["head"]
    assert possible == mask.numel()
    assert list(table.columns) == list(LABELS)
    assert (table.loc[1, "end"], table.loc[2, "bos"], table.to_numpy().sum()) == (2, 1, 3)
    assert list(circuit_counts(Circuit.from_mask("head", mask[:, :1], ("*",)))["head"][0].columns) == ["any"]


def test_the_page_is_complete_and_self_contained(tmp_path, run):
    circuit = Circuit.from_mask("mlp_out", run["relp"]["mlp_out"].mean.abs() > 1, LABELS, selection={"threshold": 1.0})
    table = evaluation(points={1: 0.0, 10: 0.4321, 100: 1.0})
    written = write_html(tmp_path, RECORD, run, circuit, table, ["<bos>", "a", "b", "c", "to"])
    assert [p.name for p in written] == ["report.html", "heatmaps.png", "heatmap-head.png", "curves.png"]
    page = written[0].read_text()
    assert not re.search(r"<script[^>]* src|<link|@import|url\(|fetch\(|(src|srcset|href)=\"(?!data:|#)", page)
    assert "default-src 'none'" in page  # a browser would refuse what the page asked for
    images = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    assert len(images) == 3  # figures, where there is no script
    assert all(base64.b64decode(image).startswith(b"\x89PNG\r\n") for image in images)
    best = top_nodes(run["relp"], 1).iloc[0]
    assert f"{best.score:+.3f}" in page
    for text in (
        "98.8 %",
        "3.25",
        "0.432 [0.33, 0.53]",
        "threshold = 1",
        "3 pairs exist",
        "abc123",
        "ln",
        "&lt;bos&gt;",
    ):
        assert text in page
    assert "relp score &lt;ioi&gt;" in page
    assert "prefers-color-scheme: dark" in page
    assert f"<strong>{circuit.n_nodes}</strong> of 15 nodes" in page


def test_parts_that_are_missing_are_left_out(tmp_path, run):
    out = tmp_path / "elsewhere" / "page.html"
    path = write_html(tmp_path, {}, run, output=out)[0]
    assert path == out
    page = out.read_text()
    assert 'id="circuit"' not in page
    assert 'id="evaluation"' not in page


def test_a_single_evaluated_circuit_is_a_table_without_a_curve(tmp_path, run):
    written = write_html(tmp_path, RECORD, run, evaluation=evaluation(points={7: 0.5}))
    assert "curves.png" not in [p.name for p in written]
    assert 'id="evaluation"' in written[0].read_text()


def test_chance_is_said_on_top(tmp_path, run):
    record = json.loads(json.dumps(RECORD))
    record["behaviour"]["at_chance"] = True
    assert "at chance on this task" in write_html(tmp_path, record, run)[0].read_text()


def test_the_same_run_gives_the_same_page(tmp_path, run):
    one, two = (write_html(tmp_path / name, RECORD, run, evaluation=evaluation())[0].read_bytes() for name in "ab")
    assert one == two


def test_bad_input_is_one_line(tmp_path, run):
    with pytest.raises(RelpError, match="no scores"):
        write_html(tmp_path, RECORD, {})
    with pytest.raises(RelpError, match="2 tokens for 5 positions"):
        write_html(tmp_path, RECORD, run, tokens=["a", "b"])
    (tmp_path / "file").write_text("")
    with pytest.raises(RelpError, match="cannot write"):
        write_html(tmp_path / "file", RECORD, run)


def test_what_a_user_named_stands_in_the_page_as_text(tmp_path):
    """Tags, quotes and the end of a script in every name, note, token and cell that people or files may give."""
    bad = "\"'><script>alert(1)</script>&amp;$x^{"
    kind = KindScores("head", torch.randn(2, 2, 2), torch.ones(2, 2, 2), torch.ones(2, dtype=torch.long), (bad, "end"), "role",
                      meta={"signed": True, "metric": "logit_diff"})  # fmt: skip
    made = scores("relp", kind)
    made.meta.update(dict.fromkeys(("task", "model", "bos", "dictionary", "family"), bad), params={bad: bad})
    record = json.loads(json.dumps(RECORD)) | {"notes": [bad], "spec": {"task": bad}}
    record["provenance"] |= {"command": bad, "versions": {bad: bad}}
    circuit = Circuit.from_mask("head", kind.mean > 0, kind.labels, selection={"threshold": 0.0, bad: bad})
    table = evaluation(points={1: 0.0, 10: 0.5}, note=bad, ablation=bad)
    meanings = pd.DataFrame({"node": [bad], "meaning": [bad]})
    page = write_html(tmp_path, record, {"relp": made}, circuit, table, [bad, bad], meanings=meanings)[0].read_text()
    assert page.count("<script") == 4  # the page's own: data and code, and the graph's
    assert "<script>alert" not in page
    assert "&amp;amp;$x^{" in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 10
