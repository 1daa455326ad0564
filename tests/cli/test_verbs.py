"""Every verb on an embedded model, in the order a user meets them; numbers are checked against the Python API."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import relp_cli
from relp_cli.costs import bench


def test_help_and_import_load_no_torch():
    code = "import sys, relp_cli, relp_cli.cli.app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [
        "False",
        "False",
    ]


@pytest.mark.parametrize("what", ["tasks", "methods", "models", "nodes", "jobs", "runs"])
def test_ls_lists_without_torch(what):
    code = f"""
import sys
sys.argv = ["relp", "ls", "{what}", "--json"]
from relp_cli.cli.main import run
try:
    run()
except SystemExit as stop:
    sys.stderr.write(f"{{stop.code or 0}} {{'torch' in sys.modules}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "0 False"
    rows = json.loads(done.stdout)
    assert what == "runs" or len(rows) >= 4


def test_every_verb_has_help_with_an_example(relp):
    for verb in (
        "score",
        "circuit",
        "evaluate",
        "test",
        "robustness",
        "compare",
        "overlap",
        "report",
        "ls",
        "bench",
        "validate",
        "show",
        "reproduce",
    ):
        done = relp(verb, "--help")
        assert done.code == 0
        assert f"relp {verb} " in done.out.replace("\n", " "), verb


def test_score_circuit_evaluate(relp, tmp_path):
    first = relp("score", "ioi", "--nodes", "mlp_neuron,head", "--pairs", 12, "-o", "run")
    assert first.code == 0, first.err
    assert "accuracy 1.00" in first.err
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["scores"]["rules"] == {"ln": 9, "identity": 4}
    assert record["behaviour"]["n"] == 12
    stamp = (tmp_path / "run/scores.safetensors").stat().st_mtime_ns
    again = relp("score", "ioi", "--nodes", "mlp_neuron,head", "--pairs", 12, "-o", "run")
    assert "already done" in again.err
    assert (tmp_path / "run/scores.safetensors").stat().st_mtime_ns == stamp

    chosen = relp("circuit", "run", "--nodes", "mlp_neuron", "--top-k", 25, "--json")
    assert json.loads(chosen.out)["n_nodes"] == 25
    done = relp("evaluate", "run", "--pairs", 10, "--random", 1, "--json")
    assert done.code == 0, done.err
    row = json.loads(done.out)["rows"][0]

    model, task = relp_cli.load_model("tiny-gpt2"), relp_cli.load_task("ioi")
    scores = relp_cli.score(model, task.pairs(model, 12), "relp", ["mlp_neuron"])
    circuit = relp_cli.select(scores["mlp_neuron"], top_k=25)
    want = relp_cli.evaluate(model, task.pairs(model, 10, split="heldout"), circuit).iloc[0]
    assert row["faithfulness"] == pytest.approx(want.faithfulness, rel=1e-5)
    assert row["completeness"] == pytest.approx(want.completeness, rel=1e-5)
    assert row["n_nodes"] == int(circuit.masks["mlp_neuron"][1:].sum())
    below = int(circuit.masks["mlp_neuron"][0].sum())
    assert f"{below} of the circuit's 25 nodes lie in the first 1 layers" in done.err

    before = (tmp_path / "run/evaluation.csv").read_bytes()
    elsewhere = relp("evaluate", "run", "--pairs", 10, "--ablation", "zero", "-o", "zero.csv")
    assert elsewhere.code == 0, elsewhere.err
    assert (tmp_path / "run/evaluation.csv").read_bytes() == before
    assert pd.read_csv(tmp_path / "zero.csv").ablation.tolist() == ["zero"]


def test_sweep_writes_one_row_per_threshold_and_nested_circuits(relp, tmp_path):
    relp("score", "sva_simple", "--nodes", "mlp_neuron", "--pairs", 8, "-o", "run")
    done = relp("evaluate", "run", "--sweep", "log:1e-3:1:4", "--pairs", 8, "--random", 0)
    assert done.code == 0, done.err
    table = pd.read_csv(tmp_path / "run/evaluation.csv")
    np.testing.assert_allclose(table.tau, np.geomspace(1e-3, 1, 4))
    assert table.n_nodes.is_monotonic_decreasing


def test_compare_tells_runs_of_one_method_apart(relp, tmp_path):
    for name, more in (("exact", ("--method", "act_patch")), ("a", ()), ("b", ("--rules", "ln"))):
        assert relp("score", "ioi", "--nodes", "mlp_out", "--pairs", 4, *more, "-o", name).code == 0
    rows = json.loads(relp("compare", "exact", "a", "b", "-o", "out", "--json").out)["rows"]
    assert [row["method"] for row in rows] == ["relp (a)", "relp (b)"]
    assert rows[0]["pcc"] != rows[1]["pcc"]
    shutil.copytree(tmp_path / "exact", tmp_path / "again")
    done = relp("compare", "exact", "again", "a", "-o", "out")
    assert done.code == 2
    assert "2 of these runs are of the reference 'act_patch'" in done.err


def test_compare_matches_numpy_and_reuses_scores(relp, tmp_path):
    arguments = ("compare", "ioi", "--methods", "atp,relp", "--pairs", 6, "-o", "out")
    done = relp(*arguments)
    assert done.code == 0, done.err
    table = pd.read_csv(tmp_path / "out/compare.csv").set_index(["method", "kind"])
    saved = {
        p.name.split("-")[3]: relp_cli.Scores.load(p / "scores.safetensors")
        for p in (tmp_path / "out/scores").iterdir()
    }
    for method in ("atp", "relp"):
        for kind in ("resid_pre", "attn_out", "mlp_out"):
            a, b = saved[method][kind].mean.flatten(), saved["act_patch"][kind].mean.flatten()
            assert table.loc[(method, kind)].pcc == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert (tmp_path / "out/heatmaps-ioi-tiny-gpt2-noising.png").read_bytes()[:4] == b"\x89PNG"
    started = time.perf_counter()
    assert relp(*arguments).code == 0
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/scores").rglob("*.safetensors")}
    assert len(stamps) == 3
    assert all(t < time.time_ns() - (time.perf_counter() - started) for t in stamps.values())
    runs = sorted(str(p) for p in (tmp_path / "out/scores").iterdir())
    other = relp("compare", *runs, "-o", "again")
    assert other.code == 0, other.err
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "again/compare.csv").set_index(["method", "kind"])[["pcc", "spearman"]].sort_index(),
        table[["pcc", "spearman"]].sort_index(),
    )


def test_show_aligns_roles(relp):
    done = relp("show", "ioi", "--pairs", 6, "--json")
    content = json.loads(done.out)
    assert content["accuracy"] == 1.0
    for pair in content["examples"]:
        changed = [r for r, a, b in zip(pair["roles"], pair["original"], pair["patch"], strict=True) if a != b]
        assert changed == ["S1", "IO", "S2"]
        assert pair["roles"][-1] == "end"


def test_dry_run_writes_nothing(relp, tmp_path):
    done = relp("score", "ioi", "--method", "act_patch", "--nodes", "mlp_neuron", "--pairs", 5, "--dry-run", "--json")
    cost = json.loads(done.out)
    assert cost["nodes"]["mlp_neuron"] == 4 * 16 * 256
    assert "patched runs" in cost["forwards"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [("--nodes", "attn_out,head"), ("--nodes", "value", "--baseline", "zero")])
def test_a_dry_run_of_exact_patching_says_what_it_takes(relp, options):
    given = ("score", "ioi", "--method", "act_patch", "--pairs", 2, *options)
    said = json.loads(relp(*given, "--dry-run", "--json").out)["forwards"]
    found = json.loads(relp(*given, "-o", "run", "--json").out)
    runs = round(2 * found["scores"]["forwards_per_pair"]) + (2 if "zero" in options else 0)
    assert said.startswith(f"at most {runs:,} patched runs of one pair")


def test_baselines_score_single_prompts(relp, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(
        '{"prompt": "Then, Mary and John went to the store. John gave a ring to", "answer": " Mary", "foil": " John"}\n'
    )
    patchless = relp("score", "prompts.jsonl", "--split", "all", "--pairs", 1, "-o", "a")
    assert patchless.code == 2
    assert "--baseline zero or mean" in patchless.err
    done = relp("score", "prompts.jsonl", "--split", "all", "--pairs", 1, "--baseline", "zero", "-o", "b")
    assert done.code == 0, done.err


def test_verify_keeps_exactly_what_patching_confirms(relp, tmp_path):
    relp("score", "ioi", "--nodes", "head", "--pairs", 6, "-o", "cheap")
    relp("score", "ioi", "--nodes", "head", "--pairs", 6, "--method", "act_patch", "-o", "exact")
    exact = relp_cli.Scores.load(tmp_path / "exact/scores.safetensors")["head"].mean
    cheap = relp_cli.Scores.load(tmp_path / "cheap/scores.safetensors")["head"].mean
    done = relp("circuit", "cheap", "--threshold", 0.05, "--verify")
    assert done.code == 0, done.err
    circuit = relp_cli.Circuit.load(tmp_path / "cheap/circuit.json")
    assert (circuit.masks["head"] == ((cheap.abs() > 0.05) & (exact.abs() > 0.05))).all()


def test_bench_reports_ratios_of_one_run(relp, monkeypatch):
    monkeypatch.setattr("relp_cli.costs.bench.fixture", cache(bench.fixture))
    done = relp("bench", "--layers", 1, "--rounds", 1, "--only", "circuit", "--json")
    assert done.code == 0, done.err
    row = json.loads(done.out)[0]
    assert row["ratio"] == pytest.approx(row["s"] / row["baseline s"])
    assert relp("bench", "--layers", 1, "--rounds", 1, "--only", "circuit").code == 0


def test_report_is_one_self_contained_page(relp, tmp_path):
    relp("score", "ioi", "--pairs", 4, "-o", "run")
    relp("circuit", "run", "--top-k", 5)
    relp("evaluate", "run", "--pairs", 4)
    assert relp("report", "run").code == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "tiny-gpt2" in page
    assert 'src="http' not in page
    assert "<script src" not in page


def test_overlap_of_a_run_with_itself_is_complete(relp):
    relp("score", "ioi", "--nodes", "head", "--pairs", 4, "-o", "run")
    relp("circuit", "run", "--top-k", 5)
    row = json.loads(relp("overlap", "run", "run", "--json").out)
    assert (row["jaccard"], row["precision"], row["recall"], row["n"]) == (1, 1, 1, 5)
    assert row["PCC of head scores"] == pytest.approx(1)
    relp(
        "score", "ioi", "--nodes", "head", "--pairs", 4, "--method", "delta", "-o", "sizes"
    )  # no sign: sizes correlate
    relp("circuit", "sizes", "--top-k", 5)
    size, score = (load_file(f"{run}/scores.safetensors")["head/mean"].flatten().double() for run in ("sizes", "run"))
    want = torch.corrcoef(torch.stack([size, score.abs()]))[0, 1].item()
    for order in (("run", "sizes"), ("sizes", "run")):
        assert json.loads(relp("overlap", *order, "--json").out)["PCC of |head scores|"] == pytest.approx(
            want, abs=1e-6
        )
    refused = relp("overlap", "run", "ioi_gpt2_small")
    assert refused.code == 2
    assert "gpt2 and tiny-gpt2" in refused.err


def test_edges_from_score_to_export(relp, tmp_path):
    about = ("--nodes", "edges", "--model", "tiny-qwen2", "--pairs", 8)
    assert relp("score", "sva_across_pp", *about, "--method", "eap_ig", "--set", "steps=2", "-o", "run").code == 0
    cost = json.loads(relp("score", "ioi", *about, "--method", "edge_patch", "--dry-run", "--json").out)
    assert cost["nodes"] == {"edges": 479}
    assert cost["forwards"].startswith("3,848 runs")
    chosen = json.loads(relp("circuit", "run", "--top-k", 40, "--greedy", "--prune", "dangling", "--json").out)
    assert chosen["n_nodes"] == 40
    done = relp("evaluate", "run", "--pairs", 6, "--ablation", "counterfactual", "--random", 1, "--json")
    row = json.loads(done.out)["rows"][0]
    assert (row["kind"], row["n_nodes"], row["exclude_layers"]) == ("edges", 40, 0)
    assert relp("report", "run").code == 0
    for suffix in ("json", "pt"):
        assert relp("export", "run", f"c.{suffix}").code == 0
        again = relp(
            "evaluate", "run", "--circuit", f"c.{suffix}", "--pairs", 6, "--ablation", "counterfactual", "--json"
        )
        assert json.loads(again.out)["rows"][0]["F_C"] == pytest.approx(row["F_C"], rel=1e-5)
    assert relp("import", "c.pt", "--model", "tiny-qwen2", "-o", "c2.json").code == 0
    assert json.loads(relp("overlap", "run", "c2.json", "--json").out)["jaccard"] == 1
    table = relp("evaluate", "run", "--sweep", "fractions:mib", "--pairs", 6, "--random", 0, "--json")
    assert json.loads(table.out)["rows"][-1]["faithfulness"] == pytest.approx(1)
    done = relp("compare", "ioi", *about[:4], "--methods", "eap,relp_edges", "--pairs", 4, "-o", "out")
    assert done.code == 0, done.err
    rows = pd.read_csv(tmp_path / "out/compare.csv")
    assert rows.axis.tolist() == ["edges", "edges"]
    assert rows.n_nodes.tolist() == [479, 479]
    done = relp("compare", "ioi", *about[:4], "--methods", "atp,relp+two_point,ig_inputs", "--pairs", 4, "-o", "more")
    assert done.code == 0, done.err
    more = pd.read_csv(tmp_path / "more/compare.csv")
    assert more.pcc[0] == pytest.approx(rows.pcc[0], abs=1e-9)
    bad = relp("score", "ioi", *about, "--method", "atp_star")
    assert (bad.code, "methods for edges: act_patch, atp, relp" in bad.err) == (2, True)
    bad = relp("score", "ioi", *about[2:4], "--nodes", "mlp_out", "--method", "eap")
    assert (bad.code, "'eap' scores edges" in bad.err) == (2, True)
    plain = json.loads(relp("score", "ioi", *about[2:4], "--method", "eap", "--pairs", 4, "--json").out)
    assert (plain["spec"]["nodes"], plain["scores"]["method"]) == (["edges"], "eap")


def test_reproduce_takes_methods_and_pairs_and_sets_the_papers_numbers_beside(relp):
    few = ("--models", "tiny-gpt2", "--methods", "relp,relp+secant", "--pairs", 3)
    done = relp("reproduce", "table5", *few, "-o", "t5", "--json")
    assert done.code == 0
    rows = json.loads(done.out)["rows"]
    assert {r["method"] for r in rows} == {"relp", "relp+secant"}
    assert {r["n_pairs"] for r in rows} == {3}
    text = relp("reproduce", "table5", *few, "-o", "t5").out
    assert "relp+secant ours" in text
    assert "GPT-2 small" in text
    assert relp("reproduce", "table5", "--methods", "relp+secnt").code == 2
