"""`relp evaluate mib` as a user runs it: figures are those of the Python API, and the same command again computes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import relp_cli
from relp_cli.evaluation.mib import mib
from relp_cli.models.load import load_model

NAMES = ("Mark", "Susan", "Ryan", "Laura")
MEASURES = ("CPR", "CMD", "acc_auc")


def rows(*subjects: str) -> list[dict[str, Any]]:
    """IOI in MIB's layout, in the words of the embedded models."""

    def prompt(io: str, s: str, again: str) -> str:
        return f"When , {io} and {s} went to the library . {again} gave a snack to"

    return [
        {
            "metadata": {"subject": s, "indirect_object": io},
            "prompt": prompt(io, s, s),
            "choices": [s, io],
            "answerKey": 1,
            "s2_io_flip_counterfactual": {"prompt": prompt(io, s, io), "choices": [s, io], "answerKey": 0},
        }
        for s in subjects
        for io in NAMES
        if io != s
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "mib" / "ioi"
    folder.mkdir(parents=True)
    for name, subjects in (("train", NAMES[:2]), ("validation", NAMES[2:]), ("test", NAMES[3:])):
        (folder / f"{name}.json").write_text(json.dumps(rows(*subjects)))
    return folder


def test_measures_are_those_of_the_python_api(data: Path, relp: Callable[..., Any], tmp_path: Path) -> None:
    command = ("evaluate", "mib", data, "--methods", "relp", "--nodes", "head,mlp_out", "--output", "out", "--json")
    done = relp(*command)
    assert done.code == 0, done.err
    found = json.loads(done.out)
    model, task = load_model("tiny-gpt2"), relp_cli.load_task(data)
    heldout = task.pairs(model, None, split="heldout")
    assert sum(map(len, heldout)) == 6
    (row,) = found["rows"]
    summary, table = mib(model, heldout, relp_cli.score(model, task.pairs(model, None), "relp", ["head", "mlp_out"]))
    assert [row[k] for k in MEASURES] == pytest.approx([summary[k] for k in MEASURES], rel=1e-4)
    assert [r["n_kept"] for r in found["curves"]] == table.n_kept.tolist()
    assert (row["data"], row["scored_on"], row["transfer"], row["kind"]) == ("ioi", "ioi", False, "head+mlp_out")
    assert row["n_pairs"] == 6
    assert any("6 discovery pairs exist, 100 were asked" in line for line in found["notes"])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*") if path.suffix != ".csv"}
    assert len(written) == 4  # scores, pairs.json, run.json, circuits
    assert json.loads(relp(*command).out) == found
    assert {path: path.stat().st_mtime_ns for path in written} == written
    (damaged,) = (tmp_path / "out" / "circuits").glob("ioi-relp-*.json")
    damaged.write_text("{")
    assert json.loads(relp(*command).out) == found


def test_runs_components_and_another_split(data: Path, relp: Callable[..., Any]) -> None:
    assert relp("score", "ioi", "--nodes", "head,mlp_out", "--pairs", "8", "-o", "shipped").code == 0
    assert relp("score", data, "--nodes", "head,mlp_out", "--pairs", "6", "-o", "own", "--method", "atp").code == 0
    done = relp("evaluate", "mib", data, "--runs", "shipped,own", "--on", "test", "-o", "out")
    assert done.code == 0, done.err
    for text in ("CPR", "CMD", "acc-AUC", "3 held-out pairs", "head+mlp_out", "transfer from ioi"):
        assert text in done.out
    assert done.out.count("transfer") == 1
    assert "splits as given by MIB: train for discovery, test for heldout" in done.err
    direct = relp(
        "evaluate", "mib", data, "--methods", "atp", "--nodes", "head,mlp_out", "--on", "test", "-o", "b", "--json"
    )
    again = relp("evaluate", "mib", data, "--runs", "own", "--on", "test", "-o", "c", "--json")
    one, other = (json.loads(x.out)["rows"][0] for x in (direct, again))
    assert [one[k] for k in MEASURES] == pytest.approx([other[k] for k in MEASURES], rel=1e-5)
    refused = relp("evaluate", "mib", data, "--runs", "own", "--methods", "atp")
    assert (refused.code, "--methods is for scoring" in refused.err) == (2, True)


def test_several_data_sets_of_which_one_cannot_be_used(data: Path, relp: Callable[..., Any]) -> None:
    sums = [{"prompt": "1 + 2 =", "label": "3", "random_counterfactual": {"prompt": "1 + 4 =", "label": "5"}}]
    (data.parent / "arithmetic_addition").mkdir()
    (data.parent / "arithmetic_addition" / "train.json").write_text(json.dumps(sums * 2))
    done = relp("evaluate", "mib", data.parent, "--methods", "eap", "--heldout", "3", "-o", "out", "--json")
    assert done.code == 0, done.err
    assert [row["data"] for row in json.loads(done.out)["rows"]] == ["ioi"]
    assert (
        "WARNING: arithmetic_addition is left out: task 'arithmetic_addition': none of 1 pairs fits tiny-gpt2"
        in done.err
    )
    alone = relp("evaluate", "mib", data.parent / "arithmetic_addition", "--methods", "eap", "-o", "out2")
    assert alone.code == 2
    assert "none of 1 pairs fits" in alone.err


def test_dry_run_and_help(data: Path, relp: Callable[..., Any], tmp_path: Path) -> None:
    done = relp("evaluate", "mib", data, "--methods", "eap", "--dry-run", "--json", "-o", "out")
    assert json.loads(done.out)["ioi, eap"]["forward passes per held-out pair"] == "at most 21"
    assert not (tmp_path / "out").exists()
    told = relp("evaluate", "mib", "--help")
    assert told.code == 0
    assert "relp evaluate mib mib/ioi" in told.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--methods", "aep"), "did you mean 'eap'"),
        (("--nodes", "feature"), "MIB measures edges and nodes, not features"),
        (("--split", "all"), "--split is not for MIB's data sets"),
        (("--dictionary", "tiny-pythia"), "--dictionary is not for MIB's data sets"),
        (("--on", "tests"), "did you mean 'test'"),
        (("--methods", "eap", "--nodes", "head"), "method 'eap' does not score nodes"),
        (("--set", "step=3"), "has a parameter 'step'"),
        (("--runs", "nowhere"), "run 'nowhere' does not exist"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(
    arguments: tuple[str, ...],
    says: str,
    data: Path,
    relp: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("relp_cli.runs.scoring.load_model", None)
    done = relp("evaluate", "mib", data, "-o", "out", *arguments)
    assert done.code == 2
    assert done.err.startswith("error: ")
    assert says in done.err
    assert not (tmp_path / "out").exists()
