"""A run is what it says: its scores are the ones it wrote, and its task and model are still those that were scored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import relp_cli
from relp_cli.errors import RelpError, RunFailed
from relp_cli.runs.evaluated import read_evaluation
from relp_cli.runs.rundir import checksum
from relp_cli.spaces.scores import KindScores, Scores, whole_of

EMBEDDED = Path(relp_cli.__file__).parent / "models/embedded"
PAIRS = [
    {"original": f"The {a} {p} the store", "patch": f"The {b} {p} the store", "answer": x, "foil": y}
    for a, b, x, y in (("boy", "boys", " is", " are"), ("girls", "girl", " are", " is"))
    for p in ("near", "behind", "beside")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs (6 and 5 pairs) of a folder model on a file of pairs, each with its circuit."""
    from relp_cli.runs.checked import score_spec
    from relp_cli.runs.scoring import Session, score_run

    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(EMBEDDED / "tiny-gpt2", folder / "model")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)) + "\n")
    session = Session("cpu")
    for name, n in (("run", 3), ("other", 2)):
        spec = score_spec(
            task=str(folder / "pairs.jsonl"),
            model=str(folder / "model"),
            nodes=("mlp_out", "head"),
            pairs=n,
            split="all",
        )
        _, scores, _ = score_run(spec.model_copy(update={"split": "discovery"}), session, folder / name)
        relp_cli.select(scores, top_k=4).save(folder / name / "circuit.json")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path, relp: Callable[..., object]) -> Path:  # noqa: ARG001 - in the command's folder
    for name in ("run", "other"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def edited(work: Path, change: Callable[[dict[str, torch.Tensor]], object], resign: bool) -> None:
    """Scores with other numbers; `resign`: and their checksum in run.json."""
    from safetensors import safe_open

    file = work / "run/scores.safetensors"
    with safe_open(file, "pt") as stream:
        header = stream.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, header)
    if resign:
        record = json.loads((work / "run/run.json").read_text())
        record["files"] = {file.name: checksum(file)}
        (work / "run/run.json").write_text(json.dumps(record))


READERS = {
    "circuit": ("circuit", "run", "-t", "0.1"),
    "evaluate": ("evaluate", "run"),
    "report": ("report", "run"),
    "compare": ("compare", "other", "run"),
    "overlap": ("overlap", "run", "other"),
    "export": ("export", "run", "file.json"),
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_verifies_the_scores(relp, work, reader):
    edited(work, lambda t: t["mlp_out/mean"].mul_(1.001), resign=False)
    done = relp(*READERS[reader])
    assert (done.code, done.out) == (1, "")
    assert "run/scores.safetensors is not the one that this run wrote" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t["mlp_out/mean"].fill_(float("nan")), "mean is not finite"),
        (lambda t: t["head/mean"][0, 0].fill_(float("inf")), "mean is not finite"),
        (lambda t: t.update({"mlp_out/mean": t["mlp_out/mean"][:, :2].clone()}), "mean has shape"),
        (lambda t: t.update({"head/mean": t["mlp_out/mean"].clone()}), "mean has shape"),
        (lambda t: t.update({"head/variance": t["head/variance"][:1].clone()}), "variance has shape"),
        (lambda t: t.pop("head/mean"), "damaged"),
    ],
)
def test_scores_that_cannot_be_are_refused_even_with_a_fitting_checksum(relp, work, change, expected):
    edited(work, change, resign=True)
    done = relp("circuit", "run", "-t", "0.1")
    assert done.code == 1
    assert expected in done.err
    assert "score again to replace it" in done.err


@pytest.mark.parametrize("content", [b"", b'{"spec": {', b"\xff\xfe\x92"])
def test_a_damaged_record_is_replaced_by_scoring_again(relp, tmp_path, content):
    assert relp("score", "ioi", "--pairs", 2, "-o", "run").code == 0
    (tmp_path / "run/run.json").write_bytes(content)
    done = relp("show", "./run")
    assert (done.code, done.out, done.err.count("\n")) == (1, "", 1)
    assert done.err.endswith("; score again to replace it\n")
    assert relp("score", "ioi", "--pairs", 2, "-o", "run").code == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["spec"]["pairs"] == 2


def test_scores_of_another_run_are_refused(relp, work):
    shutil.copy(work / "other/scores.safetensors", work / "run/scores.safetensors")
    edited(work, lambda _: None, resign=True)
    done = relp("circuit", "run", "-t", "0.1")
    assert done.code == 1
    assert "is not the one that this run wrote" in done.err


@pytest.mark.parametrize("reader", ["report", "evaluate", "overlap"])
def test_a_circuit_of_another_run_is_refused(relp, work, made, reader):
    shutil.copy(work / "other/circuit.json", work / "run/circuit.json")
    (work / "model").symlink_to(made / "model")
    done = relp(*READERS[reader])
    assert done.code == 2
    assert "circuit run/circuit.json is of other scores than this run's; select it again" in done.err


def test_content_that_changed_since_is_refused(relp, made, tmp_path):
    """The same paths with another content: verification and evaluation stop, and scoring does not take the run for its own."""
    here = tmp_path / "moved"
    shutil.copytree(made, here)
    for name in ("run", "other"):
        record = (here / name / "run.json").read_text()
        (here / name / "run.json").write_text(record.replace(str(made), str(here)))
    for what, file, change in (
        ("model", "model/config.json", lambda text: text.replace("{", "{ ", 1)),
        ("task", "pairs.jsonl", lambda text: text.replace("near", "by", 1)),
    ):
        path = here / file
        before = path.read_text()
        path.write_text(change(before))
        for arguments in (("circuit", here / "run", "--top-k", 3, "--verify"), ("evaluate", here / "run")):
            done = relp(*arguments)
            assert done.code == 2
            assert f"{what} '{here}" in done.err
            assert "the content has changed since this run was scored" in done.err
        path.write_text(before)


def test_two_folders_of_one_name_are_two_rows(relp, tmp_path):
    for name, other in (("a", "tiny-gpt2"), ("b", "tiny-pythia")):
        shutil.copytree(EMBEDDED / other, tmp_path / name / "model")
    models = ",".join(("a/model", "b/model"))
    done = relp(
        "compare", "sva_simple", "-m", models, "--pairs", 3, "--nodes", "mlp_out", "--methods", "atp", "-o", "c"
    )
    assert done.code == 0, done.err
    assert pd.read_csv(tmp_path / "c/compare.csv").model.tolist() == ["a/model", "b/model"]
    assert len(list((tmp_path / "c").glob("heatmaps-*.png"))) == 2
    again = relp("compare", "sva_simple", "-m", "a/model,./a/model/", "--pairs", 3, "-o", "d")
    assert again.code == 2
    assert "given 2 times" in again.err


def test_a_circuits_hash_of_digits_stays_text(tmp_path):
    (tmp_path / "evaluation.csv").write_text("circuit,faithfulness,note\n456640645983,0.5,\n")
    table = read_evaluation(tmp_path / "evaluation.csv")
    assert table is not None
    assert table["circuit"].tolist() == ["456640645983"]


@pytest.mark.parametrize(
    ("text", "why"), [('a\n"', "cannot be read"), ("\udce9", "cannot be read"), ("", "has no rows")]
)
def test_a_table_that_is_damaged_is_computed_again(tmp_path, text, why):
    path = tmp_path / "evaluation.csv"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(RunFailed, match=rf"evaluation.csv {why}.*; compute it again to replace it"):
        read_evaluation(path)


def test_one_damaged_record_does_not_hide_the_others(relp, work):
    (work / "runs").mkdir()
    shutil.move(work / "run", work / "runs/good")
    for name, content in (("a", "[]"), ("b", "{"), ("c", '{"spec": [], "hash": 1}'), ("d", "[" * 100_000)):
        (work / "runs" / name).mkdir()
        (work / "runs" / name / "run.json").write_text(content)
    done = relp("ls", "runs", "--json")
    rows = json.loads(done.out)
    assert [r["task"] for r in rows[:4]] == ["(damaged run.json)"] * 4
    assert rows[4]["method"] == "relp"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("compare", "ioi", "ioi"), "task 'ioi' is given 2 times"),
        (("compare", "ioi", "--methods", "atp,atp"), "method 'atp' is given 2 times"),
        (("compare", "ioi", "-m", "tiny-gpt2,tiny-gpt2"), "model 'tiny-gpt2' is given 2 times"),
        (("compare", "run", "run"), "given 2 times"),
        (("score", "ioi", "--nodes", "head,head"), "one is there twice"),
        (("compare", "ioi", "--top-k", "-5"), "greater than or equal"),
        (("diagnose", "ioi", "--top", "-5"), "greater than or equal"),
        (("circuit", "run", "--top-k", "-5"), "greater than or equal"),
        (("circuit", "run", "-t", "0", "--verify", "--confirm", "nan"), "--confirm: expected a number from 0 up"),
        (("evaluate", "run", "--random", "-1"), "greater than or equal"),
        (("evaluate", "run", "--sweep", "lin:0:inf:3"), "sweep 'lin:0:inf:3'"),
        (("evaluate", "run", "-o", "nope/../table.csv"), "'..' stands after a folder that does not exist"),
        (("report", "run", "-o", "run/run.json/page.html"), "is not a folder"),
        (("score", "ioi", "-o", ""), "--output '': expected a name"),
    ],
)
def test_refused_before_a_model_is_loaded(relp, work, monkeypatch, arguments, expected):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("relp_cli.runs.scoring.load_model", load)
    before = sorted(p for p in work.rglob("*"))
    done = relp(*arguments)
    assert done.code == 2, done.err
    assert expected in done.err
    assert sorted(p for p in work.rglob("*")) == before


def test_a_record_names_no_folder_that_was_not_typed(made):
    """Where a run lies, and who made it, is not in it: only what was asked for is."""
    text = (made / "run/run.json").read_text()
    for typed in (str(made / "pairs.jsonl"), str(made / "model")):
        text = text.replace(json.dumps(typed), '""')
    for private in (str(made), str(Path.home()), str(Path.cwd())):
        assert private not in text


def test_corpus_is_not_ignored_for_edges_and_features(tmp_path):
    from relp_cli.evaluation.evaluate import evaluate
    from relp_cli.spaces.edges import edge_circuit
    from relp_cli.spaces.graph import Graph

    model = relp_cli.load_model("tiny-gpt2")
    graph, pairs = Graph.of(model.shape), relp_cli.load_task("sva_simple").pairs(model, n=2)
    with pytest.raises(RelpError, match="only circuits of nodes are ablated with a corpus"):
        evaluate(model, pairs, edge_circuit(graph, graph.mask), corpus=tmp_path / "text.txt")


def test_json_on_stdout_has_no_nan(capsys):
    from relp_cli.cli.common import print_json

    print_json(
        {"a": float("nan"), "b": [float("inf"), torch.tensor([1.5, float("nan")])], "c": torch.tensor(2), "d": None}
    )
    text = capsys.readouterr().out
    assert json.loads(text) == {"a": None, "b": [None, [1.5, None]], "c": 2, "d": None}


def test_scores_survive_a_round_trip_whole(tmp_path):
    mean = torch.rand(2, 3, dtype=torch.float64)
    scores = KindScores("mlp_out", mean, mean * float("nan"), torch.ones(3, dtype=torch.long), ("a", "b", "c"), "role")
    whole_of({"mlp_out": scores}, {"hash": "x"}).save(tmp_path / "s.safetensors")
    assert torch.equal(Scores.load(tmp_path / "s.safetensors")["mlp_out"].mean, mean)
