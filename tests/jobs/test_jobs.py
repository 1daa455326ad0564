"""Batch jobs: the grid, resuming (also after SIGKILL), failures that stay alone, and numbers equal to the Python API's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import relp_cli
from relp_cli.evaluation.areas import areas
from relp_cli.jobs.grid import Cell, cell_hash, cells, load_job, read_cell
from relp_cli.jobs.group import GroupRun
from relp_cli.jobs.run import run_cells
from relp_cli.jobs.summary import summarise
from relp_cli.runs.scoring import Session

JOB = """
name: small
tasks: [sva_simple]
models: [tiny-gpt2]
methods: [relp, random, act_patch]
kinds: [head, mlp_neuron]
pairs: 6
exact_candidates: 20
agreement: {}
evaluate: {sweep: "counts:1,5,20,1000000", heldout: 6, random_circuits: 1}
"""


FINISHED: list[Path] = []


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "job.yaml").write_text(JOB)
    return tmp_path / "job.yaml"


@pytest.fixture
def finished(relp, job, tmp_path, tmp_path_factory) -> Path:
    """A folder in which the job is finished. It is run once for all tests that only look at the end of it."""
    if not FINISHED:
        done = relp("evaluate", job, "-o", "out")
        assert done.code == 0, done.err
        assert "6 cells computed, 0 found finished, 0 failed" in done.err
        FINISHED.append(shutil.copytree(tmp_path / "out", tmp_path_factory.mktemp("job") / "out"))
    else:
        shutil.copytree(FINISHED[0], tmp_path / "out")
    return tmp_path / "out"


def results(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results.csv")


def test_cells_equal_the_python_api(finished):
    table = results(finished)
    model, task = relp_cli.load_model("tiny-gpt2"), relp_cli.load_task("sva_simple")
    scores = relp_cli.score(model, task.pairs(model, 6), "relp", ["head"])["head"]
    held = task.pairs(model, 6, split="heldout")
    rows = table[(table.what == "evaluation") & (table.method == "relp") & (table.kind == "head")]
    assert rows.n_nodes.tolist() == [1, 5, 20, scores.mean[1:].numel()]
    for k, row in zip((1, 5, 20), rows.itertuples(), strict=False):
        want = relp_cli.evaluate(model, held, relp_cli.select(scores, top_k=k, from_layer=1)).iloc[0]
        assert row.faithfulness == pytest.approx(want.faithfulness, rel=1e-4)
    assert rows.iloc[-1][["faithfulness", "completeness"]].tolist() == [1, 0]
    exact = table[(table.what == "agreement") & (table.method == "act_patch") & (table.kind == "head")].iloc[0]
    assert exact.pcc == pytest.approx(1)
    neurons = table[(table.what == "evaluation") & (table.method == "act_patch") & (table.kind == "mlp_neuron")]
    assert neurons.n_nodes.max() <= 20  # only the candidates have exact scores
    for file in ("summary.md", "summary.tex", "agreement.csv", "curves-tiny-gpt2-head.png", "results.parquet"):
        assert (finished / file).stat().st_size > 0


def test_same_command_again_computes_nothing(relp, job, finished):
    kept = [p for p in finished.rglob("*") if p.suffix in (".json", ".safetensors") and p.name != "job.json"]
    stamps = {p: p.stat().st_mtime_ns for p in kept}
    assert stamps
    done = relp("evaluate", job, "-o", "out")
    assert "0 cells computed, 6 found finished" in done.err
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


def test_a_finished_job_needs_no_model_and_no_folder_of_it(relp, job, tmp_path, monkeypatch):
    source = Path(relp_cli.__file__).parent / "models/embedded/tiny-gpt2"
    shutil.copytree(source, tmp_path / "copy")
    how = (
        "--override",
        "models=[./copy]",
        "--override",
        "methods=[random]",
        "--override",
        "agreement=null",
        "-o",
        "out",
    )
    assert relp("evaluate", job, *how).code == 0
    first = (tmp_path / "out/results.csv").read_bytes()
    assert "seconds" not in first.decode().splitlines()[0]
    assert (tmp_path / "out/timings.csv").read_text().startswith("task,model,kind,method,direction,seed,seconds")
    monkeypatch.setattr("relp_cli.runs.scoring.load_model", None)
    again = relp("evaluate", job, *how)  # the folder is there: known by its content, not loaded
    assert again.code == 0
    assert "not loaded" not in again.err
    shutil.rmtree(tmp_path / "copy")
    gone = relp("evaluate", job, *how)
    assert gone.code == 0
    assert "0 cells computed, 2 found finished, 0 failed" in gone.err
    assert "./copy: not loaded" in gone.err
    assert (tmp_path / "out/results.csv").read_bytes() == first


def test_one_failing_cell_fails_alone_and_is_tried_again(relp, job, tmp_path):
    overrides = (
        "--override",
        "models=[tiny-gpt2, ./copy]",
        "--override",
        "methods=[random]",
        "--override",
        "agreement=null",
    )
    done = relp("evaluate", job, *overrides, "-o", "out")
    assert done.code == 1
    assert "2 cells computed, 0 found finished, 2 failed" in done.err
    assert "model folder './copy' does not exist" in done.err
    errors = [json.loads(p.read_text()).get("error") for p in (tmp_path / "out/cells").glob("*.json")]
    assert sorted(e is not None for e in errors) == [False, False, True, True]
    source = Path(relp_cli.__file__).parent / "models/embedded/tiny-gpt2"
    (tmp_path / "copy").symlink_to(source)
    again = relp("evaluate", job, *overrides, "-o", "out")
    assert again.code == 0
    assert "2 cells computed, 2 found finished, 0 failed" in again.err


def test_a_fault_of_the_program_is_an_error_of_its_cell(job, tmp_path, monkeypatch):
    grid = load_job(str(job), ["methods=[random]", "agreement=null"])
    run = GroupRun.run

    def faulty(self, cell):
        return {}["a\nkey"] if cell.kind == "head" else run(self, cell)

    monkeypatch.setattr(GroupRun, "run", faulty)
    outcome = run_cells(grid, tmp_path / "out", Session("cpu"))
    assert (outcome.computed, outcome.failed) == (1, 1)
    assert read_cell(outcome.paths[cells(grid)[0]])["error"] == "KeyError: 'a\\nkey' (RELP_DEBUG=1 shows where)"
    assert not list((tmp_path / "out/claims").iterdir())
    monkeypatch.setenv("RELP_DEBUG", "1")
    with pytest.raises(KeyError):
        run_cells(grid, tmp_path / "out", Session("cpu"))
    monkeypatch.setattr(GroupRun, "run", _no_room)
    outcome = run_cells(grid, tmp_path / "out", Session("cpu"))
    assert read_cell(outcome.paths[cells(grid)[0]])["error"].startswith("out of memory: a smaller --batch-size")
    monkeypatch.undo()
    assert run_cells(grid, tmp_path / "out", Session("cpu")).computed == 1


def _no_room(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("methodz: [relp]", "did you mean 'methods'?"),
        ("tasks: []", "`tasks` is empty: the grid has no cells"),
        ("methods: [relpp]", "did you mean 'relp'?"),
        ("evaluate: {swep: x}", "did you mean 'sweep'?"),
        ("pairs: many", "bad.yaml:13: pairs"),
        ("params: {atp: {steps: 3}}", "is not among the job's methods"),
        ("name: ../out", "expected a name of at most 100 letters"),
        ("name: /tmp/out", "expected a name of at most 100 letters"),
        ("methods: [relp, relp]", "`methods`: relp is there twice"),
        ("models: [tiny-gpt2, tiny-gpt2]", "`models`: tiny-gpt2 is there twice"),
        ("evaluate: {sweep: 'log:1:inf:3'}", "sweep 'log:1:inf:3': expected"),
        ("evaluate: {metric: logit_dif}", "did you mean 'logit_diff'?"),
        ("evaluate: {ablation: corpus}", "needs a text file"),
        ("tasks: [sva_simpel]", "did you mean 'sva_simple'?"),
        ("dtype: float31", "unknown dtype 'float31'"),
        ("agreement: {reference: act_pach}", "did you mean 'act_patch'?"),
    ],
)
def test_bad_jobs_are_refused_in_one_line(relp, tmp_path, change, expected):
    kept = [line for line in JOB.splitlines() if line.split(":")[0] != change.split(":")[0]]
    (tmp_path / "bad.yaml").write_text("\n".join([*kept, *[""] * (12 - len(kept)), change, ""]))
    done = relp("evaluate", "bad.yaml")
    assert done.code == 2
    assert expected in done.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "content", ['{"rows": []}', '{"rows": {}}', '{"rows": [1]}', '{"rows": [{}]}', "[]", "[" * 100_000]
)
def test_a_cell_without_rows_is_not_finished(tmp_path, content):
    (tmp_path / "cell.json").write_text(content)
    assert read_cell(tmp_path / "cell.json") is None


def test_a_job_without_any_defined_value_still_has_its_summary(job, tmp_path):
    about = {"task": "t", "model": "../a/m", "method": "relp", "kind": "head", "direction": "noising", "seed": 0}
    undefined = dict.fromkeys(("pcc", "pcc_lo", "pcc_hi", "pcc_per_pair", "spearman", "topk"), float("nan"))
    points = {
        "n_nodes": [1, 2],
        "n_possible": 2,
        "faithfulness": float("nan"),
        "completeness": float("nan"),
        "n_pairs": 3,
    }
    rows = pd.DataFrame([{**about, "what": "agreement", **undefined, "note": "reference is constant", "axis": "role"}])
    curve = pd.DataFrame({**about, "what": "evaluation", "note": "F(M) ≈ F(∅)", **points})
    files, tables = summarise(load_job(str(job), []), pd.concat([rows, curve]), tmp_path / "out")
    assert "reference is constant" in (tmp_path / "out/agreement.md").read_text()
    assert next(title for title, _ in tables) == "agreement"
    assert all(path.parent == tmp_path / "out" and path.stat().st_size > 0 for path in files)


def test_hash_changes_with_everything_that_changes_numbers(job):
    base = load_job(str(job), [])
    cell = cells(base)[0]
    seen = {cell_hash(base, cell, revision="a")}
    changes = (
        "pairs=7",
        "evaluate.heldout=7",
        "evaluate.ablation=zero",
        "exact_candidates=3",
        "params={relp: {rules: [ln]}}",
    )
    for override in changes:
        other = load_job(str(job), [override])
        seen.add(cell_hash(other, cells(other)[0], revision="a"))
    seen.add(cell_hash(base, cell, revision="b"))
    seen.add(cell_hash(base, Cell(cell.group, cell.method, "mlp_neuron"), revision="a"))
    assert len(seen) == 8


def test_shipped_jobs_are_valid_and_as_the_paper_says():
    for name in ("table5", "table5_tiny", "figure3", "figure3_tiny", "rules", "edges_tiny"):
        assert cells(load_job(name, []))
    figure3 = load_job("figure3", [])
    assert (figure3.pairs, figure3.evaluate.heldout, figure3.evaluate.exclude_layers) == (300, 100, None)
    assert len(load_job("table5", []).models) == 8


def test_areas_by_hand():
    assert areas([0, 0.5, 1], [0, 1, 1]) == (0.75, 0.25)
    assert areas([1, 0.5, 0], [1, 1, 0]) == (0.75, 0.25)
    assert all(v != v for v in areas([0, 0.5], [0, 1]))


def test_results_that_did_not_come_here_are_failures(relp, job, monkeypatch):
    """As where workers write to a file system of their own."""
    from relp_cli.jobs import engines

    def elsewhere(*asked):
        outcome = engines.local(*asked)
        next(iter(outcome.paths.values())).unlink()
        return outcome

    monkeypatch.setattr(engines, "ENGINES", {"local": elsewhere})
    done = relp("evaluate", job, "--override", "methods=[random]", "--override", "agreement=null", "-o", "out")
    assert done.code == 1
    assert "1 failed" in done.err
    assert "wrote to a file system of its own" in done.err
