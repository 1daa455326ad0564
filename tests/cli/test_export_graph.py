"""`relp export RUN graph.json --format circuit-tracer`: the form that viewers read, with the circuit's own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict

import relp_cli as relp_api
from relp_cli.outputs.exporting import Drawn
from relp_cli.spaces.scores import Scores


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Node(_Strict):
    """Neuronpedia's schema requires the first seven; circuit-tracer's reader knows the others."""

    node_id: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: str
    jsNodeId: str
    clerp: str
    token_prob: float
    is_target_logit: bool
    run_idx: int
    reverse_ctx_idx: int
    influence: float | None
    activation: float | None


class _Link(BaseModel):
    source: str
    target: str
    weight: float


class _Metadata(BaseModel):
    slug: str
    scan: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str


class _Params(_Strict):
    pinnedIds: list[str]
    supernodes: list[list[str]]
    linkType: str
    clickedId: str
    sg_pos: str


class _Graph(_Strict):
    metadata: _Metadata
    qParams: _Params
    nodes: list[_Node]
    links: list[_Link]


def read(path: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The file, whose form is checked, and its nodes by id; every link leads upwards between nodes that are there."""
    content = json.loads(Path(path).read_text())
    _Graph.model_validate(content)
    nodes = {node["node_id"]: node for node in content["nodes"]}
    assert len(nodes) == len(content["nodes"]) == len({node["jsNodeId"] for node in content["nodes"]})
    rows = {name: -1 if node["layer"] == "E" else int(node["layer"]) for name, node in nodes.items()}
    for link in content["links"]:
        assert rows[link["source"]] < rows[link["target"]]
    assert max(node["ctx_idx"] for node in nodes.values()) < len(content["metadata"]["prompt_tokens"])
    return content, nodes


def test_features_with_their_edges(relp):
    relp("score", "sva_across_pp", "-m", "tiny-pythia", "--dictionary", "tiny-pythia", "--pairs", 8, "-o", "run")
    relp("circuit", "run", "--top-k", 12)
    assert (
        "edges were not scored: relp circuit run --edge-threshold"
        in relp("export", "run", "g.json", "--format", "circuit-tracer").err
    )
    assert not Path("g.json").exists()
    relp("circuit", "run", "--top-k", 12, "--edge-threshold", 0.02)
    said = json.loads(relp("export", "run", "g.json", "--format", "circuit-tracer", "--json").out)
    content, nodes = read("g.json")
    circuit = json.loads(Path("run/circuit.json").read_text())
    labels, tokens = circuit["labels"], content["metadata"]["prompt_tokens"]
    assert (said["nodes"], said["links"], said["left_out"]) == (len(nodes), len(content["links"]), 0)

    def name(node: dict[str, Any]) -> str:
        if node["feature_type"] == "logit":
            return "metric"
        return f"{node['clerp'].partition(':')[0]}@{labels[node['ctx_idx']]}"

    edges = circuit["edges"]
    wanted = dict(zip(zip(edges["source"], edges["target"], strict=True), edges["score"], strict=True))
    assert {(name(nodes[e["source"]]), name(nodes[e["target"]])): e["weight"] for e in content["links"]} == wanted
    scores = Scores.load("run/scores.safetensors")["feature"]
    own = [n for n in content["nodes"] if n["feature_type"] in ("cross layer transcoder", "mlp reconstruction error")]
    assert len(own) == circuit["n_nodes"] == 12

    def size(node: dict[str, Any]) -> float:
        site, at = name(node).partition("/")[0], node["ctx_idx"]
        return abs(
            float(
                scores.errors()[scores.at(site), at] if node["feature"] < 0 else scores.dense(site)[at, node["feature"]]
            )
        )

    total = sum(map(size, own))
    for node in own:
        stronger = sum(size(other) for other in own if size(other) >= size(node))
        assert node["influence"] == pytest.approx(stronger / total, rel=1e-6)
        assert content["metadata"]["generation_settings"]["rows"][node["layer"]] == node["clerp"].partition("/")[0]
    model = relp_api.load_model("tiny-pythia")
    ids = torch.tensor(
        [[int(n["node_id"].split("_")[1]) for n in content["nodes"] if n["feature_type"] == "embedding"]]
    )
    assert [model.tokenizer.decode([i]) for i in ids[0].tolist()] == tokens
    (logit,) = [n for n in content["nodes"] if n["feature_type"] == "logit"]
    chance = model.logits(ids)[0].softmax(-1)[logit["feature"]]
    assert logit["token_prob"] == pytest.approx(float(chance), rel=1e-5)
    assert "logit_diff: " in logit["clerp"]


def test_edges_at_positions(relp):
    relp("score", "ioi", "--pairs", 4, "--nodes", "edges", "--set", "positions=keep", "-o", "run")
    relp("circuit", "run", "--top-k", 60)
    said = json.loads(relp("export", "run", "g.json", "--format", "circuit-tracer", "--json").out)
    content, nodes = read("g.json")
    model = relp_api.load_model("tiny-gpt2")
    batches = {
        model.tokenizer.decode(b.original[0].tolist()): b for b in relp_api.load_task("ioi").pairs(model, n=4, seed=0)
    }
    labels = batches[content["metadata"]["prompt"]].labels
    circuit, scores = (
        json.loads(Path("run/circuit.json").read_text())["edges"],
        Scores.load("run/scores.safetensors")["edges"],
    )
    wanted: dict[tuple[str, str, str, str], float] = {}
    for writer, reader, position in zip(circuit["writer"], circuit["reader"], circuit["pos"], strict=True):
        score = float(
            scores.mean[scores.labels.index(position), scores.writers.index(writer), scores.readers.index(reader)]
        )
        target, _, part = reader.partition("<")
        wanted[writer, target, position, part[:1]] = score
    lost = [key for key in wanted if key[2] not in labels]
    assert (
        said["left_out"] == len(lost) == min(len([k for k in wanted if k[2] not in b.labels]) for b in batches.values())
    )
    wanted = {key: score for key, score in wanted.items() if key not in lost}
    seen, weights = {}, {}

    def name(node: dict[str, Any]) -> str:
        return {"embedding": "input", "logit": "logits"}.get(node["feature_type"], node["clerp"])

    for link in content["links"]:
        u, v = nodes[link["source"]], nodes[link["target"]]
        ends = (name(u), name(v), labels[u["ctx_idx"]])
        weights[ends] = link["weight"]
        seen |= {(*ends, part): weight for part, weight in link.get("parts", {"": link["weight"]}).items()}
    assert seen == pytest.approx(wanted, rel=1e-6)
    for ends, weight in weights.items():
        assert weight == pytest.approx(sum(w for key, w in wanted.items() if key[:3] == ends), rel=1e-6)


def test_what_has_no_graph_is_refused(relp):
    relp("score", "ioi", "--pairs", 2, "--nodes", "edges", "-o", "edges")
    relp("score", "ioi", "--pairs", 2, "--nodes", "head", "-o", "heads")
    for run, file, expected in (
        ("edges", "g.json", "run 'edges' has no circuit; select one: relp circuit edges --top-k 50"),
        ("edges", "g.csv", "g.csv: expected a name that ends in .json"),
    ):
        assert expected in relp("export", run, file, "--format", "circuit-tracer").err
    relp("circuit", "edges", "--top-k", 5)
    relp("circuit", "heads", "--top-k", 5)
    for run, expected in (("edges", "--set positions=keep keeps them"), ("heads", "an attribution graph has edges")):
        done = relp("export", run, "g.json", "--format", "circuit-tracer")
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert expected in done.err
    assert not Path("g.json").exists()


def test_a_device_map_is_taken(relp, monkeypatch):
    places = []
    monkeypatch.setattr(
        "relp_cli.outputs.exporting.export_graph", lambda *given: places.append(given[2]) or Drawn(0, 0, 0, "")
    )
    relp("score", "ioi", "--pairs", 2, "--nodes", "mlp_out", "--method", "atp", "-o", "run")
    assert relp("export", "run", "g.json", "--format", "circuit-tracer", "--device-map", "offload").code == 0
    assert places == ["offload"]
    both = relp("export", "run", "g.json", "--format", "circuit-tracer", "--device-map", "auto", "--device", "cpu")
    assert (both.code, "give one of them" in both.err) == (2, True)
