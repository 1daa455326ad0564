"""`relp show RUN`: what it says is what the files of the run hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from relp_cli import score as relp_score
from relp_cli.cli.common import Terminal
from relp_cli.report.characters import Strongest, digit, print_map, strongest
from relp_cli.spaces.nodes import NODES
from relp_cli.spaces.scores import KindScores


@pytest.fixture
def run(relp):
    assert relp("score", "ioi", "--pairs", 6, "--nodes", "mlp_out,head", "-o", "run").code == 0


@pytest.mark.usefixtures("run")
def test_it_says_what_the_files_hold(relp):
    done = relp("show", "run", "--json", "--top", 3)
    said, stored = json.loads(done.out), load_file("run/scores.safetensors")
    heads = stored["head/mean"].double()  # layer, pos, head
    layers, positions, _ = heads.shape
    for layer in range(layers):
        for pos in range(positions):
            of = heads[layer, pos]
            assert said["maps"]["head"]["scores"][layer][pos] == pytest.approx(float(of[of.abs().argmax()]))
    best = [row for row in said["top"] if row["kind"] == "head"]
    assert [abs(row["score"]) for row in best] == pytest.approx(sorted(heads.abs().flatten().tolist())[-3:][::-1])
    assert said["n_units"] == heads.numel() + stored["mlp_out/mean"].numel()
    assert (said["circuit"], said["evaluation"], said["problems"]) == (None, None, [])
    assert said["behaviour"]["n"] == 6


@pytest.mark.usefixtures("run")
def test_it_follows_the_circuit_and_its_evaluation(relp):
    assert "circuit: none yet" in relp("show", "run").out
    relp("circuit", "run", "--top-k", 5)
    shown = relp("show", "run").out
    assert "circuit: 5 of 320 nodes" in shown
    assert "evaluation: none yet" in shown
    relp("evaluate", "run", "--pairs", 4, "--random", 0)
    assert "evaluation of this circuit: faithfulness" in relp("show", "run").out
    relp("circuit", "run", "--top-k", 6)
    assert "evaluation.csv is of another circuit" in relp("show", "run").out.replace("\n", " ")
    relp("evaluate", "run", "--pairs", 4, "--random", 0, "--sweep", "counts:2,50")
    assert "a sweep of 2 circuits of mlp_out+head (2 to 50 of 240)" in relp("show", "run").out
    Path("run/circuit.json").write_text("{}")
    shown = relp("show", "run")
    assert shown.code == 0
    assert "circuit: circuit file run/circuit.json" in shown.out


@pytest.mark.usefixtures("run")
def test_options_of_tasks_and_runs_do_not_mix(relp):
    done = relp("show", "run", "--pairs", 3)
    assert (done.code, done.out) == (2, "")
    assert "--pairs is for tasks; 'run' is a run" in done.err
    assert "--top is for runs; 'ioi' is none" in relp("show", "ioi", "--top", 3).err


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1.0, "9"), (0.81, "9"), (0.8, "8"), (0.09, "3"), (-0.09, "-3"), (0.0099, "·"), (-0.01, "-1"), (0, "·")],
)
def test_digits_squared_are_percent_of_the_largest(value, expected):
    assert digit(value, 1.0) == expected
    assert digit(value * 7.3, 7.3) == expected


def test_of_units_the_strongest_is_shown_with_its_sign():
    mean = torch.zeros(2, 3, 2)
    mean[1, 2] = torch.tensor([0.5, -2.0])
    mean[0, 0] = torch.tensor([float("nan"), 1.0])
    labels = ("a", "b", "c")
    of = KindScores("head", mean, torch.zeros_like(mean), torch.full((3,), 2), labels, "position", meta={})
    (found,) = strongest(NODES.joined({"head": of}, {}))
    assert found.values.tolist() == [[1, 0, 0], [0, 0, -2]]
    assert (found.largest, found.of, found.layers) == (2, 2, (0, 1))


def test_thirty_layers_and_many_positions_fit_eighty_columns(capsys):
    values = torch.zeros(30, 60, dtype=torch.float64)
    values[29, 59], values[3, 1] = -4.0, 2.0
    print_map(Terminal(width=80), Strongest("mlp_out", tuple(range(30)), values, 1), [str(i) for i in range(60)])
    out = capsys.readouterr().out
    assert all(len(line) <= 80 for line in out.splitlines())
    lines = [line.split() for line in out.splitlines()]
    assert lines.count(["3", "·", "7", *["·"] * 22]) == 1
    (last,) = [line for line in lines if line[-1] == "-9"]
    assert last[0] == "29"
    assert "to layer 28" in out


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "atp"),
        ("--method", "act_patch", "--nodes", "edges"),
        ("--method", "ig_activations"),
        ("--method", "learned", "--nodes", "head"),
        ("--method", "screened"),
        ("--method", "eap_gp"),
    ],
)
def test_a_dry_run_says_how_long(relp, options):
    done = relp("score", "ioi", "--pairs", 4, "--dry-run", "--json", *options)
    assert done.code == 0
    assert json.loads(done.out)["time"].startswith("about ")
    assert not list(Path().iterdir())


@pytest.mark.parametrize("method", ["ig_inputs", "relp_ig", "expected_gradients", "conductance", "ig_activations"])
def test_the_gradients_that_a_dry_run_counts_are_taken(method):
    from relp_cli.costs.timing import Timing, points_of
    from relp_cli.models.load import load_model
    from relp_cli.runs.spec import ScoreSpec
    from relp_cli.tasks.task import load_task

    model = load_model("tiny-gpt2")
    params = {"samples" if method == "expected_gradients" else "steps": 2}
    spec = ScoreSpec(task="ioi", method=method, nodes=("head", "mlp_out"), params=params, pairs=3)
    pairs = load_task("ioi").pairs(model, 3)
    taken = relp_score(model, pairs, method, spec.nodes, **params).meta["backwards_per_pair"]
    assert points_of(Timing(model, pairs, spec, params, "logit_diff")) == taken
