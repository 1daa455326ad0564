"""Tests of circuits on models: every figure against evaluations of one pair at a time; random paths; the command line."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from oracles.make import exact_float64
from oracles.wrapped import case, pairs

from relp_cli.errors import RelpError
from relp_cli.evaluation.circuit_tests import circuit_tests, inflations
from relp_cli.evaluation.evaluate import evaluate
from relp_cli.evaluation.hypotheses import hsic_p, sign_p
from relp_cli.evaluation.verdicts import Levels
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.edges import edge_units
from relp_cli.spaces.graph import Graph
from relp_cli.spaces.nodes import node_circuit
from relp_cli.spaces.paths import graph_path, layer_path
from relp_cli.spaces.units import ANY_POSITION, Block, Units

NAMES = tuple("abcdef")


def some(shape=(3, 6, 4), share=0.4, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def drawn(path, count=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [path(generator) for _ in range(count)]


@pytest.mark.parametrize("space", ["nodes", "edges"])
def test_every_figure_is_what_evaluations_of_single_pairs_give(space):
    """The ablation is each pair's own patch run, so that pairs can be evaluated one by one."""
    c, how = case("gpt2"), Levels(references=4, units=3, permutations=60)
    if space == "nodes":
        circuit = Circuit.from_mask("head", some(), [str(i) for i in range(6)])
    else:
        units = edge_units(Graph.of(c.model.shape))
        circuit = Circuit(units, some((1, len(units)), 0.5), ANY_POSITION)
    batch, exclude = pairs(n=5, seed=3), 1 if space == "nodes" else 0
    with exact_float64():
        tests, units = circuit_tests(c.model, [batch], circuit, how, "counterfactual", seed=4)
        references = [circuit.random_like(4 + i, exclude) for i in range(4)]
        paths = inflations(circuit, exclude, 4, None, torch.Generator().manual_seed(4))
        named = {space_row(circuit, u, p): (p, u) for p, u in circuit.mask.nonzero().tolist()}
        less = [circuit.without(*named[row.layer, row.position, row.unit]) for row in units.itertuples()]
        circuits = [circuit, *references, *(one for pair in paths for one in pair), *less]
        tables = [
            evaluate(c.model, [batch.rows(torch.tensor([i]))], circuits, "counterfactual", bootstrap=0)
            for i in range(5)
        ]
    full, own, out = (np.array([t[name].to_numpy() for t in tables]).T for name in ("F_M", "F_C", "F_complement"))
    model = full[0]
    by = tests.set_index("test")
    wins = int((own[0] > model).sum())
    assert by.statistic["equivalence"] == wins
    assert by.p["equivalence"] == pytest.approx(sign_p(wins, 5, 0.1))
    assert by.statistic["independence"] == pytest.approx(hsic_p(model, out[0], 1, 0)[0])
    assert by.p["independence"] == pytest.approx(hsic_p(model, out[0], 60, 4)[2])
    away = np.abs(own - model).mean(1)
    assert by.statistic["sufficiency"] == (away[0] < away[1:5]).sum()
    damage = np.abs(out - model).mean(1)
    assert by.statistic["partial necessity"] == (damage[0] > damage[1:5]).sum()
    assert len(units) == 3 < circuit.counted(exclude)
    assert "3 of the circuit's" in by.note["minimality"]
    parts = np.abs(own[5:13:2] - own[6:13:2]).mean(1)
    change = np.abs(own[0] - own[13:]).mean(1)
    assert units.change.to_numpy() == pytest.approx(change, abs=1e-9)
    assert units.share_below.to_numpy() == pytest.approx((parts < change[:, None] - 1e-12).mean(1))
    assert units.change.is_monotonic_increasing
    assert tests.n_pairs.unique().tolist() == [5]


def space_row(circuit, unit, position):
    from relp_cli.spaces.table import space_of

    row = space_of(circuit.units).row(circuit.units, unit, circuit.labels[position])
    return row["layer"], row["position"], row["unit"]


def test_paths_of_nodes_go_back_through_layers_and_positions():
    units = Units("nodes", (Block("head", 0, 2), Block("head", 1, 2), Block("mlp_out", 0, 1), Block("mlp_out", 1, 1)))
    among = torch.ones(3, 6, dtype=torch.bool)
    among[1, 0] = False
    paths = drawn(lambda g: layer_path(units, among, g))
    for path in paths:
        layers, positions = [int(units.layer[u]) for _, u in path], [p for p, _ in path]
        assert positions[0] == 2
        assert positions == sorted(positions, reverse=True)
        assert layers == sorted(set(layers), reverse=True)
        assert all(among[cell] for cell in path)
    # Of the last position's six units each is as likely; three are of layer 1, from where the input is one of 3·3 − 1 + 1.
    firsts = np.bincount([path[0][1] for path in paths], minlength=6)
    assert firsts.min() > 300 / 6 * 0.6
    ended = [len(path) == 1 for path in paths if units.layer[path[0][1]] == 1]
    assert np.mean(ended) == pytest.approx(1 / 9, abs=0.06)
    assert layer_path(units, torch.zeros_like(among), torch.Generator()) == []


def test_paths_of_edges_lead_from_the_logits_to_the_input():
    graph = Graph(3, 2)
    units, names = edge_units(graph), graph.edge_names()
    among = torch.ones(4, graph.n_edges, dtype=torch.bool)
    paths = drawn(lambda g: graph_path(units, among, g))
    for path in paths:
        reader, position = "logits", 3
        for at, edge in path:
            u, _, v = names[edge].partition("->")
            assert v.partition("<")[0] == reader
            assert at <= position if v.endswith(("<k>", "<v>")) else at == position
            reader, position = u, at
        assert reader == "input"
    assert {len(path) for path in paths} >= {1, 2, 3}


def test_inflated_circuits_have_the_circuit_and_lose_one_of_what_was_added():
    circuit = Circuit.from_mask("head", some(share=0.2), NAMES)
    got = inflations(circuit, 1, 40, None, torch.Generator().manual_seed(0))
    assert len(got) == 40
    for inflated, deflated in got:
        new = inflated.mask & ~circuit.mask
        lost = inflated.mask & ~deflated.mask
        assert (circuit.mask & ~inflated.mask).sum() == 0
        assert not (deflated.mask & ~inflated.mask).any()
        assert lost.sum() == 1
        assert new[lost].all()
        assert circuit.units.counted(1)[new.nonzero()[:, 1]].all()
    full = Circuit.from_mask("head", torch.ones(3, 6, 4) > 0, NAMES)
    assert inflations(full, 0, 5, None, torch.Generator()) == []


def test_the_whole_model_is_neither_tested_for_equivalence_nor_minimality():
    c = case("llama")
    for circuit in (
        node_circuit({"head": torch.ones(3, 1, 4) > 0}, ANY_POSITION),
        Circuit(edge_units(Graph.of(c.model.shape)), torch.ones(1, Graph.of(c.model.shape).n_edges) > 0, ANY_POSITION),
    ):
        tests, units = circuit_tests(c.model, [c.batch], circuit, Levels(references=2, units=2), "zero", 0)
        by = tests.set_index("test")
        assert by.verdict["equivalence"] == "not tested: circuit and model score every pair the same"
        assert by.verdict["minimality"] == "not tested: no random path leaves the circuit"
        assert not by.rejected["sufficiency"]
        assert len(units) == 0
    empty = Circuit.from_mask("head", torch.zeros(3, 6, 4) > 0)
    with pytest.raises(RelpError, match="no unit in layers from 1 up"):
        circuit_tests(c.model, [c.batch], empty)


def test_the_command(relp, tmp_path):
    assert relp("score", "ioi", "--nodes", "attn_out,mlp_out", "--pairs", 16, "-o", "run").code == 0
    missing = relp("test", "run")
    assert missing.code == 2
    assert "has no circuit to test; run `relp circuit run" in missing.err
    relp("circuit", "run", "--top-k", 12)
    for option in ("--alpha=1.5", "--epsilon=0.5", "--quantile=0", "--references=0", "--permutations=x"):
        done = relp("test", "run", option)
        assert done.code == 2
        assert option.partition("=")[0] in done.err
    assert not list(tmp_path.glob("run/tests*"))
    cost = json.loads(relp("test", "run", "--dry-run", "--references", 30, "--json").out)
    assert cost["forward passes per pair"] == "at most 136"
    short = ("--pairs", 12, "--references", 30)
    done = relp("test", "run", *short, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    rows = {row["test"]: row for row in found["tests"]}
    assert list(rows) == [
        "equivalence", "equivalence, reversed", "independence", "minimality", "sufficiency", "partial necessity"
    ]  # fmt: skip
    # Attention and MLPs that RelP ranks first carry IOI: no random twelve come as close, or do as much harm.
    assert rows["sufficiency"]["rejected"]
    assert rows["partial necessity"]["rejected"]
    assert rows["equivalence, reversed"]["note"].endswith(
        "no outcome of 12 pairs could be rejected at 0.05: ask for more"
    )
    table = pd.read_csv(tmp_path / "run/tests.csv")
    assert table.p.tolist() == pytest.approx([row["p"] for row in found["tests"]], nan_ok=True)
    assert table.evaluated_on.unique().tolist() == ["ioi"]
    units = pd.read_csv(tmp_path / "run/tests-units.csv")
    assert len(units) == len(found["units"]) == rows["minimality"]["n_nodes"]
    assert units.kind.tolist() == [unit["kind"] for unit in found["units"]]
    assert set(units.kind) == {"attn_out", "mlp_out"}
    assert units.task.unique().tolist() == ["ioi"]
    said = relp("test", "run", "--pairs", 4, "--references", 2)
    again = relp("test", "run", "--pairs", 4, "--references", 2, "--json")
    for row in json.loads(again.out)["tests"]:
        assert f"• {row['test']}: {row['verdict']}" in said.out
        assert f"H0: {row['null']}" in said.out
    # Compared with its own run, the model has no performance.
    kl = json.loads(relp("test", "run", "--pairs", 4, "--metric", "kl", "--references", 2, "--json").out)["tests"]
    assert [row["test"] for row in kl if row["rejected"] is None] == [
        "equivalence",
        "equivalence, reversed",
        "independence",
    ]
