"""`relp report` of what other verbs leave in their folders, and the command that made each of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pandas as pd
import pytest


def sections(done: Any) -> list[str]:
    assert done.code == 0, done.err
    made: list[str] = json.loads(done.out)["sections"]
    return made


def data_of(page: str, id: str = "data") -> dict[str, Any]:
    found = re.search(rf'<script id="{id}" type="application/json">(.*?)</script>', page, re.S)
    assert found is not None
    content: dict[str, Any] = json.loads(found[1])
    return content


def test_a_comparison_and_its_runs(relp, tmp_path):
    command = ("compare", "ioi", "--pairs", 3, "--nodes", "mlp_out,head", "--methods", "atp,delta", "-o", "it's here")
    assert relp(*command).code == 0
    assert sections(relp("report", "it's here", "--json")) == ["agreement", "scores-0", "provenance"]
    page = (tmp_path / "it's here/report.html").read_text()
    data, table = data_of(page), pd.read_csv(tmp_path / "it's here/compare.csv")
    assert [row["title"] for row in data["sets"]["scores-0"]["rows"]] == [
        "MLP", "heads, added up over units", "heads, added up over positions",
    ]  # fmt: skip
    shown = data["tables"]["pcc"]
    assert shown["columns"] == ["task", "model", "kind", "atp", "delta"]
    assert [row[3] for row in shown["rows"]] == pytest.approx(table[table.method == "atp"].pcc.tolist(), rel=1e-5)
    assert "&#39;it&#39;&#34;&#39;&#34;&#39;s here&#39;" in page  # as a shell takes it
    runs = sorted((tmp_path / "it's here/scores").iterdir())
    assert sections(relp("report", *runs, "--json")) == ["scores", "cost", "graph", "provenance"]
    (made,) = (tmp_path / "runs").glob("report-*.html")
    table = data_of(made.read_text())["tables"]["units-scores"]
    assert table["columns"] == ["kind", "layer", "position", "unit", "act_patch", "atp", "delta"]
    graph = data_of(made.read_text(), "graph-data")
    cards = {graph["own"]: graph["units"]["score"]} | {m["name"]: m["score"] for m in graph["methods"]}
    assert list(cards) == ["act_patch", "atp", "delta"]
    assert sum(graph["units"]["kept"]) == 0
    drawn = [row for row in table["rows"] if row[4]]  # what its own method says has no effect is not drawn
    assert len(drawn) == len(graph["nodes"]["name"]) > 10
    for row in drawn:
        unit = "" if row[3] is None else f".{row[3]}"
        at = graph["nodes"]["name"].index(f"{row[0]}.{row[1]}{unit} @ {row[2]}")
        assert [scores[at] for scores in cards.values()] == pytest.approx(row[4:], rel=1e-5, abs=1e-12)
    assert relp("score", "ioi", "--pairs", 3, "--nodes", "mlp_out", "--seed", 1, "-o", "other").code == 0
    refused = relp("report", runs[0], "other")
    assert refused.code == 2
    assert "cannot stand side by side: they differ in seed" in refused.err
    (tmp_path / "it's here/compare.csv").write_text(table_text(tmp_path).replace("atp", "xyz"))
    assert sections(relp("report", "it's here", "--json")) == ["agreement", "provenance"]
    assert "no command is known" in (tmp_path / "it's here/report.html").read_text()


def table_text(folder: Any) -> str:
    return str((folder / "it's here/compare.csv").read_text())


def test_a_run_with_all_that_can_be_made_of_it(relp, tmp_path):
    assert relp("score", "sva_across_pp", "--pairs", 4, "--nodes", "mlp_out", "-o", "run").code == 0
    assert relp("circuit", "run", "--top-k", 4).code == 0
    assert relp("evaluate", "run", "--pairs", 4, "--random", 1, "--minimality").code == 0
    assert relp("evaluate", "run", "--pairs", 4, "--random", 1, "--task", "sva_simple").code == 0
    assert relp("test", "run", "--pairs", 6, "--references", 3, "--permutations", 20).code == 0
    about = ("--resamples", 2, "--pairs", 4, "--sweep", "fractions:.3")
    assert relp("robustness", "run", *about).code == 0
    more = ["evaluation-sva_simple", "minimality", "tests", "robustness"]
    expected = ["behaviour", "scores", "graph", "top", "pairs", "explore", "circuit", "evaluation", *more, "provenance"]
    assert sections(relp("report", "run", "--json")) == expected
    page = (tmp_path / "run/report.html").read_text()
    for verb in ("score sva_across_pp", "circuit run --top-k 4", "test run", "robustness run"):
        assert f"<code>relp {verb}" in page
    robust = pd.read_csv(tmp_path / "run/robustness.csv")
    shown = data_of(page)["tables"]["robustness"]
    assert len(shown["rows"]) == len(robust)
    assert "Of another circuit" not in page
    assert relp("circuit", "run", "--top-k", 3).code == 0
    assert relp("report", "run").code == 0
    assert (tmp_path / "run/report.html").read_text().count("Of another circuit, not of the one above.") == 3


def test_a_diagnosis(relp, tmp_path):
    done = relp("diagnose", "ioi", "--pairs", 4, "--top", 2, "-o", "found", "--json")
    assert done.code == 0, done.err
    about = json.loads((tmp_path / "found/diagnosis.json").read_text())
    assert about["recommended"] == json.loads(done.out)["recommended"]
    got = sections(relp("report", "found", "--json"))
    assert got == [
        "summary",
        "causes",
        "methods",
        "patched",
        "suspects",
        "attention",
        "cancellation",
        "gradient",
        "provenance",
    ]
    nodes = pd.read_csv(tmp_path / "found/nodes.csv")
    data = data_of((tmp_path / "found/report.html").read_text())
    assert len(data["tables"]["patched"]["rows"]) == int(nodes.exact.notna().sum())
    (tmp_path / "found/nodes.csv").write_text("kind\nx\n")
    refused = relp("report", "found")
    assert refused.code == 1
    assert "found/nodes.csv is not the file that this diagnosis wrote" in refused.err


def test_a_job_with_a_cell_that_failed(relp, tmp_path):
    (tmp_path / "job.yaml").write_text(
        "name: small\ntasks: [sva_simple]\nmodels: [tiny-gpt2, nowhere]\nmethods: [relp, atp]\nkinds: [mlp_out]\npairs: 4\n"
        "agreement: {}\nevaluate: {sweep: 'counts:1,4', heldout: 4, random_circuits: 1}\n"
    )
    assert relp("evaluate", "job.yaml", "-o", "job").code == 1
    assert sections(relp("report", "job", "--json")) == [
        "agreement",
        "circuits",
        "failed",
        "rows",
        "scores-0",
        "provenance",
    ]
    page = (tmp_path / "job/report.html").read_text()
    assert "2 cells failed" in page
    data = data_of(page)
    cells = [f"sva_simple / nowhere / {m} / mlp_out" for m in ("relp", "atp")]
    assert [row[0] for row in data["tables"]["failed"]["rows"]] == cells
    assert [panel["name"] for panel in data["sets"]["scores-0"]["rows"][0]["panels"]] == ["act_patch", "relp", "atp"]


def test_what_is_nothing_to_report_is_one_line(relp, tmp_path):
    (tmp_path / "empty").mkdir()
    done = relp("report", "empty")
    assert done.code == 2
    assert (
        "'empty' holds nothing to report: expected a run directory (run.json), a comparison (compare.csv)" in done.err
    )
    assert "run 'nowhere' does not exist" in relp("report", "nowhere").err
    assert relp("report", "empty", "empty").code == 2
