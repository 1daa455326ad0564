"""Bad dictionaries, circuit files, jobs and requests: exit code 2 and one line, never other numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.wrapped import case

from relp_cli.errors import RelpError
from relp_cli.features.load import load_dictionaries
from relp_cli.models.load import load_model
from relp_cli.runs.scoring_notes import scoring_notes
from relp_cli.scoring import score
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.features import feature_masks
from relp_cli.spaces.sites import Site
from relp_cli.tasks.task import load_task

from .folders import auto_encoder_state, write_learning, write_lens
from .formulas import LEARNING, LENS

MODEL = case("pythia").model


def with_values(name: str, value: float) -> dict[str, torch.Tensor]:
    state = auto_encoder_state(32, 40, 0)
    state[name].view(-1)[3] = value
    return state


@pytest.mark.parametrize(
    ("state", "name", "message"),
    [
        (with_values("encoder.weight", float("nan")), "AutoEncoder", "encoder.weight holds values that are not finite"),
        (with_values("decoder.weight", float("inf")), "AutoEncoder", "decoder.weight holds values that are not finite"),
        (with_values("encoder.bias", float("nan")), "AutoEncoder", "encoder.bias holds values that are not finite"),
        (auto_encoder_state(32, 0, 0), "AutoEncoder", "has no features"),
        ({**LEARNING["AutoEncoderTopK"][0], "k": torch.tensor(0)}, "AutoEncoderTopK", "k = 0, expected 1 to 40"),
        ({**LEARNING["AutoEncoderTopK"][0], "k": torch.tensor(7.5)}, "AutoEncoderTopK", "expected one whole number k"),
        (
            {**LEARNING["AutoEncoderTopK"][0], "k": torch.tensor([3, 4])},
            "AutoEncoderTopK",
            "expected one whole number k",
        ),
    ],
)
def test_weights_that_make_no_dictionary(tmp_path: Path, state: Any, name: str, message: str) -> None:
    write_learning(tmp_path / "resid_out_layer1", state, name)
    with pytest.raises(RelpError, match=message) as error:
        load_dictionaries(tmp_path, MODEL)
    assert "resid_out_layer1" in str(error.value)


@pytest.mark.parametrize("content", [b"text", b"", b"PK\x03\x04 cut short", bytes(range(256))])
def test_files_that_torch_did_not_write(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "embed").mkdir()
    (tmp_path / "embed/ae.pt").write_bytes(content)
    with pytest.raises(RelpError, match=r"embed/ae.pt is not a state dict of tensors saved by torch"):
        load_dictionaries(tmp_path, MODEL)


@pytest.mark.parametrize(
    "config", [{"metadata": "x"}, {"activation_fn_kwargs": [3], "architecture": "topk"}, {"k": True}]
)
def test_configurations_of_other_types(tmp_path: Path, config: dict[str, Any]) -> None:
    base, state = LENS["topk"]
    write_lens(tmp_path / "any", {**{k: v for k, v in base.items() if k != "k" or "k" in config}, **config}, state)
    with pytest.raises(RelpError, match=str(tmp_path / "any")):
        load_dictionaries(tmp_path, MODEL)


@pytest.mark.parametrize(
    ("about", "other"),
    [
        ({"model_name": "gpt2-small"}, "gpt2-small"),
        ({"model_name": "EleutherAI/pythia"}, None),
        ({"model_name": "pythia-70m"}, None),
        ({"model_name": "pythia", "revision": "elsewhere"}, "pythia@elsewhere"),
        ({"model_name": "renamed", "revision": MODEL.revision}, None),
        ({}, None),
    ],
)
def test_dictionaries_of_another_model_say_so(tmp_path: Path, about: dict[str, str], other: str | None) -> None:
    config, state = LENS["standard"]
    write_lens(tmp_path / "any", {**config, "metadata": {"hook_name": "blocks.1.hook_mlp_out", **about}}, state)
    assert load_dictionaries(tmp_path, MODEL).model == other


EDGES = {
    "meta": {},
    "source": ["embed/1@a"],
    "target": ["resid_out_layer0/2@b"],
    "score": [0.5],
    "variance": [0.1],
    "n": [4],
}


def circuit_file() -> dict[str, Any]:
    sites = {
        "embed": {"n_features": 9, "pos": [0], "feature": [1], "error_pos": []},
        "resid_out_layer0": {"n_features": 9, "pos": [1], "feature": [2], "error_pos": [1]},
    }
    return {"schema": 1, "type": "relp feature circuit", "meta": {}, "labels": ["a", "b"], "errors": "all", "n_nodes": 3,
            "sites": sites, "edges": json.loads(json.dumps(EDGES))}  # fmt: skip


def in_embed(**columns: Any) -> Callable[[dict[str, Any]], None]:
    return lambda c: c["sites"]["embed"].update(columns)


def in_edges(**columns: Any) -> Callable[[dict[str, Any]], None]:
    return lambda c: c["edges"].update(columns)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_embed(feature=[-1]), "sites.embed.feature.0: Input should be greater than or equal to 0"),
        (in_embed(feature=[1.0]), "sites.embed.feature.0: Input should be a valid integer"),
        (in_embed(feature=[9]), "positions below 2 and features below 9"),
        (in_embed(error_pos=[2]), "positions below 2 and features below 9"),
        (in_embed(pos=[0, 1]), "2 positions for 1 features"),
        (in_embed(other=1), "sites.embed.other: Extra inputs"),
        (lambda c: c.update(errors="some"), "unknown choice of error terms 'some'"),
        (lambda c: c.update(n_nodes=4), "n_nodes says 4, but there are 3"),
        (lambda c: c.pop("labels"), "labels: Field required"),
        (lambda c: c.update(labels=["a", "a"]), "position labels must be distinct"),
        (lambda c: c["sites"].update(resid_0=c["sites"]["resid_out_layer0"]), "'resid_0' is there twice"),
        (lambda c: c["sites"].update(nowhere=c["sites"]["embed"]), "'nowhere' is no site"),
        (lambda c: c.update(edges=3), "edges: Input should be a valid dictionary"),
        (in_edges(score=["x"]), "edges.score.0: Input should be a valid number"),
        (in_edges(score=[float("nan")]), "edges.score.0: Input should be a finite number"),
        (in_edges(n=[0]), "edges.n.0: Input should be greater than 0"),
        (in_edges(variance=[-1.0]), "edges.variance.0: Input should be greater than or equal to 0"),
        (in_edges(n=[4, 4]), "columns of different lengths"),
        (in_edges(source=["embed/2@a"]), "'embed/2@a' is no node of the circuit"),
        (in_edges(source=["metric"]), "does not lead to a later site"),
        (in_edges(source=["resid_out_layer0/error@b"]), "does not lead to a later site"),
        (lambda c: c["edges"].update({k: v * 2 for k, v in EDGES.items() if k != "meta"}), "some are there twice"),
    ],
)
def test_circuit_files_changed_by_hand(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(circuit_file()))
    whole = Circuit.load(path)
    assert (whole.n_nodes, len(whole.edges or ())) == (3, 1)
    assert feature_masks(whole)[Site("resid", 0)][0].nonzero().tolist() == [[1, 2]]
    content = circuit_file()
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(RelpError, match=message) as error:
        Circuit.load(path)
    assert str(error.value).startswith(f"circuit file {path}: ")


def test_requests(relp, tmp_path: Path) -> None:
    score = ("score", "sva_simple", "-m", "tiny-pythia", "--pairs", "4")
    features = (*score, "--dictionary", "tiny-pythia")
    assert relp(*features, "-o", "run").code == 0
    assert relp(*features, "--method", "act_patch", "--set", "chunk_tokens=4096", "-o", "exact").code == 0
    trained = ("train-dictionary", "-m", "tiny-pythia", "--steps", "2", "--lines", "20", "--features", "12", "--k", "2")
    assert relp(*trained, "--sites", "resid_1,resid_out_layer1", "-o", "mine", "--json").code == 0
    assert relp(*score, "--dictionary", "mine", "-o", "other").code == 0
    (tmp_path / "job.yaml").write_text(
        "name: j\ntasks: [sva_simple]\nmodels: [tiny-pythia]\nmethods: [relp]\nkinds: [feature]\ndictionary: tiny-pythia\n"
        "evaluate: {}\n"
    )
    compared = relp(
        "compare", "sva_simple", "-m", "tiny-pythia", "--dictionary", "mine", "--pairs", "4", "-o", "table", "--json"
    )
    assert [(r["kind"], r["method"]) for r in json.loads(compared.out)["rows"]] == [
        ("feature", "atp"),
        ("feature", "relp"),
    ]
    (tmp_path / "high.jsonl").write_text('{"Name": "resid_1/512", "Annotation": "x"}')
    (tmp_path / "above.jsonl").write_text('{"Name": "resid_7/5", "Annotation": "x"}')
    (tmp_path / "odd.jsonl").write_text('{"Name": "embed/1", "Annotation": 5}')
    for arguments, message in (
        (("compare", "exact", "other"), "they are of different dictionaries"),
        ((*score, "--nodes", "features"), "did you mean 'feature'?"),
        ((*score, "--nodes", "feature_error"), "--nodes feature"),
        ((*score, "--nodes", "mlp_out", "--set", "dictionary=tiny-pythia"), "--dictionary is for features"),
        ((*score, "--dictionary", ""), "got an empty name"),
        ((*features, "--method", "atp_star", "--dry-run"), "does not score features"),
        ((*features, "--rules", "auto"), "not for features"),
        (("circuit", "run", "--top-k", "3", "--greedy"), "--greedy is for edge circuits"),
        (("circuit", "run", "--top-k", "3", "-e", "nan"), "--edge-threshold: expected a number"),
        (("circuit", "run", "--top-k", "3", "-e", "0", "--annotations", "odd.jsonl"), "odd.jsonl:1: expected"),
        (("report", "run", "--annotations", "high.jsonl"), "resid_out_layer1 has features up to 511, not 512"),
        (("report", "run", "--annotations", "above.jsonl"), "resid_out_layer7: tiny-pythia has layers 0 to 3"),
        (("report", "run", "--annotations", "nowhere"), "annotations nowhere cannot be read"),
        (("evaluate", "run", "--override", "pairs=3"), "--override is for jobs"),
        (("evaluate", "job.yaml", "--override", "methods=[atp_star]", "--dry-run"), "does not score features"),
        (("evaluate", "job.yaml", "--override", "dictionary=nowhere"), "neither a folder nor shipped"),
        (
            ("evaluate", "job.yaml", "--override", "evaluate.ablation=resample"),
            "unknown ablation of features 'resample'",
        ),
        ((*trained, "-m", "tiny-gpt2", "-o", "mine"), "holds dictionaries of another model"),
    ):
        done = relp(*arguments)
        assert done.code == 2, (arguments, done.err)
        assert message in done.err
        assert "Traceback" not in done.err
    assert not (tmp_path / "run/circuit.json").exists()
    assert relp("circuit", "run", "--top-k", "0", "-e", "inf").code == 2
    assert relp("circuit", "run", "--threshold", "inf", "-e", "0").code == 0
    json.loads((tmp_path / "run/circuit.json").read_text(), parse_constant=pytest.fail)
    (tmp_path / "run/circuit.json").unlink()
    planned = relp("evaluate", "run", "--sweep", "counts:1,2,3", "--random", "2", "--dry-run", "--json")
    assert json.loads(planned.out)["forward passes per pair"] == 2 + 2 * 3 * 3
    assert not (tmp_path / "run/evaluation.csv").exists()
    assert relp("circuit", "run", "--top-k", "4").code == 0
    copied = relp("evaluate", "other", "--circuit", "run/circuit.json", "--pairs", "4")
    assert copied.code == 2
    assert "was found with dictionary hash" in copied.err
    both = relp("evaluate", "run", "--pairs", "5", "--random", "0", "--minimality", "--metric", "accuracy", "--json")
    losses = [5 * row["loss"] for row in json.loads(both.out)["minimality"]]
    assert losses == pytest.approx([round(loss) for loss in losses])
    assert relp("score", *score[1:], "--nodes", "mlp_out", "-o", "nodes").code == 0
    assert relp("circuit", "nodes", "--top-k", "3", "-o", "run/circuit.json").code == 0
    theirs = relp("report", "run")
    assert (theirs.code, "is of other scores than this run's" in theirs.err) == (2, True)
    (tmp_path / "run/circuit.json").unlink()
    assert relp("report", "run").code == 0
    lowest = (*trained, "--sites", "embed", "-o", "lowest")
    assert relp(*lowest).code == 0
    assert relp(*score, "--dictionary", "lowest", "-o", "low").code == 0
    for sweep in ("log:1e-3:1:2", "counts:1,5"):
        done = relp("evaluate", "low", "--sweep", sweep, "--pairs", "4")
        assert done.code == 2
        assert "no site with a dictionary lies in layer 1 or above" in done.err


def test_training_that_diverges_writes_nothing(relp, tmp_path: Path) -> None:
    trained = (
        "train-dictionary",
        "-m",
        "tiny-pythia",
        "--steps",
        "40",
        "--lines",
        "20",
        "--features",
        "12",
        "--k",
        "2",
    )
    done = relp(*trained, "--sites", "resid_1", "--lr", "1e30", "-o", "mine")
    assert done.code == 1
    assert "training diverged at resid_out_layer1" in done.err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_dictionary_of_what_enters_gpt2_can_be_used(relp, tmp_path: Path) -> None:
    """Its first block reads token and position embeddings together: the hook is blocks.0.hook_resid_pre."""
    trained = ("train-dictionary", "-m", "tiny-gpt2", "--steps", "2", "--lines", "20", "--features", "12", "--k", "2")
    assert relp(*trained, "--sites", "embed,resid_0", "-o", "mine").code == 0
    assert (
        json.loads((tmp_path / "mine/embed/cfg.json").read_text())["metadata"]["hook_name"] == "blocks.0.hook_resid_pre"
    )
    done = relp("score", "sva_simple", "-m", "tiny-gpt2", "--pairs", "4", "--dictionary", "mine", "-o", "run")
    assert done.code == 0, done.err
    other = relp("score", "sva_simple", "-m", "tiny-pythia", "--pairs", "4", "--dictionary", "mine", "-o", "other")
    assert "WARNING: these dictionaries say that they are of model 'tiny-gpt2', not of 'tiny-pythia'" in other.err


def test_dictionaries_of_other_weights_of_the_same_name_say_which() -> None:
    """A model that was trained again is called as before: names alone would say that they are of it, and not of it."""
    model = load_model("tiny-pythia")
    pairs = load_task("sva_simple").pairs(model, n=2)
    mine = score(model, pairs, "atp", "feature", dictionary="tiny-pythia")
    assert "dictionary_of" not in mine.meta
    again = replace(model, revision="0123456789abcdef")
    notes = scoring_notes(score(again, pairs, "atp", "feature", dictionary="tiny-pythia"))
    theirs, its = f"tiny-pythia@{model.revision}", "tiny-pythia@0123456789abcdef"
    assert notes == [f"WARNING: these dictionaries say that they are of model '{theirs}', not of '{its}'"]
