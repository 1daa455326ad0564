"""Training, shipped dictionaries, annotations and descriptions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from relp_cli.errors import RelpError
from relp_cli.features.annotations import read_annotations
from relp_cli.features.load import SHIPPED, load_dictionaries, shipped_dictionaries
from relp_cli.features.show import described, promoted, top_features
from relp_cli.features.train import Text, TrainSpec, activations_at, quality, train_dictionary
from relp_cli.features.trainset import task_lines, train_dictionaries
from relp_cli.methods.request import Request
from relp_cli.methods.score import score_units
from relp_cli.models.load import load_model
from relp_cli.models.model import Model
from relp_cli.spaces.sites import Site, all_sites
from relp_cli.tasks.task import load_task

SITE = Site("mlp", 1)
QUICK = TrainSpec(features=64, k=4, steps=150, batch=128, seed=3)


@cache
def model() -> Model:
    return load_model("tiny-pythia", device="cpu")


@cache
def lines() -> tuple[str, ...]:
    return tuple(task_lines(400))


def test_training_is_seeded_and_reaches_its_goal(tmp_path: Path) -> None:
    text = Text.of(model(), lines())
    x = activations_at(model(), text.train, [SITE], text.skip)[SITE]
    first, again, other = (train_dictionary(x, QUICK.model_copy(update={"seed": s})) for s in (3, 3, 4))
    assert torch.equal(first.w_dec, again.w_dec)
    assert not torch.equal(first.w_dec, other.w_dec)
    assert torch.allclose(first.w_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    measured = quality(model(), SITE, first, text)
    assert measured.l0 <= 4
    assert measured.variance_explained > 0.5
    assert measured.loss_recovered > 0.5
    dense = quality(
        model(), SITE, train_dictionary(x, QUICK.model_copy(update={"architecture": "standard", "l1": 0.01})), text
    )
    sparse = quality(
        model(), SITE, train_dictionary(x, QUICK.model_copy(update={"architecture": "standard", "l1": 0.3})), text
    )
    assert sparse.l0 < dense.l0
    table = train_dictionaries(model(), lines(), [SITE], QUICK, tmp_path)
    assert table.site.tolist() == ["mlp_out_layer1"]
    assert list(load_dictionaries(tmp_path, model())) == [SITE]
    assert json.loads((tmp_path / "card.json").read_text())["spec"]["seed"] == 3


def test_refusals() -> None:
    with pytest.raises(RelpError, match="at least 20 lines"):
        Text.of(model(), ["The king"])
    with pytest.raises(RelpError, match="do not vary"):
        train_dictionary(torch.ones(50, 4), QUICK)
    with pytest.raises(RelpError, match="k = 4 is more than 3 features"):
        train_dictionary(torch.randn(50, 4), QUICK.model_copy(update={"features": 3}))


def test_shipped_dictionaries() -> None:
    assert shipped_dictionaries() == ["tiny-pythia"]
    found = load_dictionaries("tiny-pythia", model())
    assert tuple(found) == all_sites(model())
    assert sum(f.stat().st_size for f in SHIPPED.rglob("*") if f.is_file()) < 3 * 2**20
    card = json.loads((SHIPPED / "tiny-pythia" / "card.json").read_text())
    assert card["revision"] == model().revision  # trained on the model that ships beside them
    text = Text.of(model(), lines())
    for site, said in ((Site("resid", 2), card["sites"][9]), (Site("embed", -1), card["sites"][0])):
        measured = quality(model(), site, found[site], text)
        assert said["site"] == site.name
        assert measured.variance_explained == pytest.approx(said["variance_explained"], abs=0.02)
        assert measured.loss_recovered == pytest.approx(said["loss_recovered"], abs=0.02)


def test_command_line(tmp_path: Path) -> None:
    from relp_cli.cli.app import app

    text = tmp_path / "text.txt"
    text.write_text("\n".join(lines()[:60]))
    arguments = [
        "train-dictionary",
        "--sites",
        "embed,resid_1",
        "--features",
        "16",
        "--k",
        "2",
        "--steps",
        "5",
        "--json",
    ]
    done = CliRunner().invoke(
        app, [*arguments, "--text", str(text), "-o", str(tmp_path / "out")], catch_exceptions=False
    )
    assert [row["site"] for row in json.loads(done.stdout)["sites"]] == ["embed", "resid_out_layer1"]
    for wrong, message in (("--sites", "unknown site"), ("--architecture", "--architecture")):
        with pytest.raises(RelpError, match=message):
            CliRunner().invoke(app, [*arguments, wrong, "nothing", "-o", str(tmp_path)], catch_exceptions=False)


def test_annotations(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text(
        '{"Name": "resid_3/17", "Annotation": "plural"}\n\n{"site": "embed", "feature": 4, "annotation": "names"}\n'
    )
    assert read_annotations(path) == {(Site("resid", 3), 17): "plural", (Site("embed", -1), 4): "names"}
    for line in ("nothing", '{"Name": "here/17", "Annotation": "x"}', '{"site": "embed"}', "[1]"):
        path.write_text('{"Name": "embed/1", "Annotation": "x"}\n' + line)
        with pytest.raises(RelpError, match=r"notes.jsonl:2: (expected|not a JSON object)"):
            read_annotations(path)


def test_features_are_described() -> None:
    pairs = load_task("sva_across_pp").pairs(model(), n=20, seed=0, split="discovery")
    found = load_dictionaries("tiny-pythia", model())
    scores = score_units(model(), pairs, "relp", ["feature"], Request(), dictionary=found)["feature"]
    table = top_features(scores, 12)  # type: ignore[arg-type]
    assert len(table) == 12
    assert table.score.abs().is_monotonic_decreasing
    best = table[table.kind == "feature"].iloc[0]
    site, unit = next(s for s in found if s.name == best.site), int(best.feature)
    dense = scores.dense(site)[scores.labels.index(best.position), unit]  # type: ignore[attr-defined]
    assert best.score == pytest.approx(dense.item())
    plain = described(table, model(), found, pairs)
    assert "[" in plain.meaning.iloc[0]
    assert "↑" in plain.meaning.iloc[0]
    noted = described(table, model(), found, pairs, {(site, unit): "what it means"})
    assert "what it means" in noted.meaning.tolist()
    up, _ = promoted(model(), found[site].w_dec[unit], 3)
    logits = model().hf.get_output_embeddings()(found[site].w_dec[unit][None, None])[0, 0]
    assert up == [model().tokenizer.decode([int(i)]).strip() for i in logits.topk(3).indices]


def test_a_run_is_scored_selected_evaluated_and_reported(tmp_path: Path) -> None:
    from relp_cli.cli.app import app

    def relp(*arguments: str) -> str:
        return CliRunner().invoke(app, list(arguments), catch_exceptions=False).stdout

    run = str(tmp_path / "run")
    scoring = ("score", "sva_across_pp", "-m", "tiny-pythia", "--dictionary", "tiny-pythia", "--pairs", "8")
    assert "resid_out_layer" in relp(*scoring, "-o", run)
    assert json.loads(relp(*scoring, "-o", run, "--json"))["cached"] is True
    assert "nodes: feature 33345" in relp(*scoring, "--dry-run")
    assert json.loads(relp("circuit", run, "--top-k", "30", "--errors", "none", "--json"))["n_nodes"] == 30
    rows = json.loads(relp("evaluate", run, "--pairs", "8", "--random", "1", "--json"))["rows"]
    assert rows[0]["errors"] == "none"
    assert rows[0]["kind"] == "feature"
    notes = tmp_path / "notes.jsonl"
    selected = ("circuit", run, "--top-k", "12", "--edge-threshold", "0.01")
    edges = json.loads(relp(*selected, "--json"))["edges"]
    assert 10 < len(edges["score"]) == sum(abs(score) > 0.01 for score in edges["score"])
    assert json.loads((tmp_path / "run" / "circuit.json").read_text())["edges"] == edges
    strongest = max(range(len(edges["score"])), key=lambda i: abs(edges["score"][i]))
    name = edges["source"][strongest].partition("@")[0]
    notes.write_text(json.dumps({"Name": name, "Annotation": "what it means"}))
    shown = relp(*selected, "--annotations", str(notes))
    assert f"{len(edges['score'])} of {edges['meta']['n_scored']} edges (|score| > 0.01)" in " ".join(shown.split())
    assert edges["source"][strongest] in shown
    assert "what it means" in shown
    assert "↑" in shown
    exact = str(tmp_path / "exact")
    relp(*scoring, "--method", "act_patch", "--set", "chunk_tokens=4096", "-o", exact)
    compared = json.loads(relp("compare", exact, run, "-o", str(tmp_path / "compared"), "--json"))
    (row,) = compared["rows"]
    assert (row["kind"], row["method"]) == ("feature", "relp")
    assert row["pcc"] > 0.9
    relp("report", run)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "attention: features and error terms" in page
    assert "evaluation.csv is of another circuit" in page
    relp("evaluate", run, "--pairs", "8", "--random", "0")
    relp("report", run, "--annotations", str(notes))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "evaluation.csv is of another circuit" not in page
    assert "what it means" in page
    assert page.count("↑") > 3
    for wrong, message in (
        (("circuit", run, "--top-k", "5", "--verify", "--aggregate", "sum"), "at their positions"),
        (("circuit", run, "--top-k", "5", "--annotations", str(notes)), "--annotations belongs to --edge-threshold"),
        (("circuit", exact, "--top-k", "5", "-e", "0.1"), "not method 'act_patch'"),
        ((*scoring, "--nodes", "feature,mlp_out"), "on their own"),
        (("evaluate", run, "--errors", "some"), "unknown choice of error terms"),
    ):
        with pytest.raises(RelpError, match=message):
            relp(*wrong)
