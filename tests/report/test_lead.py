"""What a page says first is what its scores and tables hold."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from relp_cli.report.interval_data import agreement_panels, interval_panel
from relp_cli.report.lead import agreement_lead, run_lead
from relp_cli.spaces.circuit import Circuit
from tests.report.made import LABELS, evaluation, node_scores, scores

DOES = {"accuracy": 0.75, "accuracy_lo": 0.61, "accuracy_hi": 0.85, "n": 52, "against_chance": "above"}


@pytest.fixture
def of():
    return scores("relp", node_scores("mlp_out", 3, 5), node_scores("head", 3, 5, 2, seed=1))


def test_the_lead_names_the_largest_score_of_every_kind_and_the_circuits_own_faithfulness(of):
    mean = of["head"].mean
    at = int(mean.abs().argmax())
    layer, position, head = at // 10, at // 2 % 5, at % 2
    circuit = Circuit.from_mask("mlp_out", of["mlp_out"].mean.abs() > 1 / 11, LABELS, selection={"threshold": 1 / 11})
    table = evaluation(points={1: 0.0, 10: 0.4321, 100: 1.0}, kind="mlp_out")  # τ = 1 / (n + 1); from layer 1 up
    said = dict(run_lead({**of.meta, "n_pairs": 4}, DOES, of, circuit, table))
    assert said["Model"] == "does the task: 39 of 52 pairs right (accuracy 0.75 [0.61, 0.85])."
    value = f"{mean.flatten()[at]:+.2f}".replace("-", "−")
    assert f"layer {layer} head {head} at {LABELS[position]} {value} ± 0.25" in said["Strongest"]
    assert said["Strongest"].endswith(
        ". Estimated by relp, not measured; ± is the standard error over pairs, without the error of relp."
    )
    assert said["Circuit"] == (
        f"{circuit.n_nodes} of 15 nodes; measured: its 10 of 200 nodes from layer 1 up, lower layers whole, mean ablation: "
        "faithfulness 0.43 [0.33, 0.53], on 7 held-out pairs."
    )
    whole = dict(run_lead(of.meta, DOES, of, circuit, table.assign(exclude_layers=0, n_nodes=circuit.n_nodes)))[
        "Circuit"
    ]
    assert f"{circuit.n_nodes} of 15 nodes; measured: mean ablation: faithfulness 0.43" in whole
    assert said["Trust"].startswith("4 pairs, which is few: standard errors are rough. relp is an estimate")
    assert "within 2" not in said["Trust"]  # none is: they are the strongest
    for other in (table.assign(kind="mlp_neuron"), table.assign(n_nodes=table.n_nodes + 1)):
        assert "not evaluated itself" in dict(run_lead(of.meta, DOES, of, circuit, other))["Circuit"]
    noisy = replace(of, variance=of.variance * 16)  # standard errors of 1
    unsure = sum(int((t.flatten().abs().topk(10).values < 2).sum()) for t in (of["mlp_out"].mean, mean))
    assert f"{unsure} of the 20 in the tables below are within 2" in dict(run_lead(of.meta, DOES, noisy))["Trust"]


def test_the_command_that_is_named_is_of_what_the_run_was_asked(of):
    spec = {
        "task": "my tasks/comparatives.yaml", "model": "/tmp/smol", "method": "relp+ah", "nodes": ["mlp_out", "head"],
        "direction": "denoising", "baseline": "patch", "metric": None,
        "params": {"rules": ["ln", "half"], "grad_drop": False},
    }  # fmt: skip
    said = dict(run_lead({**of.meta, "task": "comparatives"}, {}, of, spec=spec))["Trust"]
    asked = (
        "compare 'my tasks/comparatives.yaml' --model /tmp/smol --methods relp+ah --nodes mlp_out,head --rules ln,half"
    )
    assert f"`relp {asked} --set grad_drop=false --direction denoising`" in said
    assert "`relp compare ioi --model tiny --methods relp`" in dict(run_lead(of.meta, {}, of))["Trust"]
    many = scores("relp", node_scores("mlp_neuron", 3, 5, 700))
    assert "`relp circuit RUN --top-k 20 --verify`" in dict(run_lead(many.meta, {}, many))["Trust"]


def test_the_lead_says_what_is_not_known(of):
    exact = scores("edge_patch", node_scores("mlp_out", 3, 5))
    said = dict(run_lead({**of.meta, "method": "edge_patch", "n_pairs": 400}, {}, exact))
    assert "Model" not in said
    assert "Circuit" not in said
    assert "exact patching effects" in said["Trust"]
    assert "stimated" not in said["Strongest"]
    noise = dict(run_lead({**of.meta, "method": "random"}, {}, of))["Strongest"]
    assert noise.endswith(" These are scores of random, not effects; ± is the standard error over pairs.")
    assert "few" not in said["Trust"]
    undecided = dict(run_lead(of.meta, DOES | {"against_chance": "undecided"}, of))["Model"]
    assert undecided.endswith("too few to tell from chance.")
    sweep = evaluation(points={5: 0.9, 10: 0.7, 50: 0.85, 100: 1.0}, kind="mlp_out+head")
    others = dict(run_lead(of.meta, {}, of, None, sweep))
    assert (
        "from 50 of 200 on (from layer 1 up, lower layers whole), circuits" in others["Circuit"]
    )  # 5 nodes reach .8 too, but 10 do not


def test_agreement_is_ordered_and_stands_in_panels_of_one_axis():
    rows = [
        {"task": t, "model": m, "method": e, "kind": "head", "pcc": v, "pcc_lo": v - 0.1, "pcc_hi": v + 0.05,
         "n_pairs": 8, "note": ""}
        for t, m, e, v in (
            ("a", "x", "atp", 0.5), ("a", "x", "relp", 0.9), ("b", "x", "atp", -0.1), ("b", "x", "relp", 0.8),
        )
    ]  # fmt: skip
    table = pd.DataFrame(
        [*rows, {**rows[0], "method": "flat", "pcc": None, "pcc_lo": None, "pcc_hi": None, "note": "constant"}]
    )
    said = dict(agreement_lead(table))
    assert said["heads"] == "relp 0.850, atp 0.200"
    assert "the mean of 2 tasks × models" in said["PCC"]
    first, second = agreement_panels(table)
    assert (first["title"], second["title"]) == ("heads, a", "heads, b")
    assert first["low"] == second["low"] == pytest.approx(-0.2)
    assert [r["value"] for r in first["groups"][0]["rows"]] == [0.5, 0.9, None]
    assert first["groups"][0]["rows"][2]["why"] == "constant"
    (panel,) = interval_panel(table[:4], "method", ("pcc", "pcc_lo", "pcc_hi"), "error")
    assert panel["high"] == pytest.approx(1.02 * 0.95)
