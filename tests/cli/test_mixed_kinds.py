"""Circuits of the residual stream and components: what is said of them, and sweeps and suggestions of some kinds alone."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import relp_cli
from relp_cli.nodes.kinds import NODE_KINDS, mixed_warning
from relp_cli.spaces.circuit import Circuit
from relp_cli.spaces.nodes import node_circuit
from relp_cli.spaces.scores import Scores
from relp_cli.studies.evaluating import circuits_of

KINDS = ["resid_pre", "attn_out", "mlp_out"]
SAID = "WARNING: resid_pre carries all that attn_out, mlp_out of lower layers write"


def test_the_stream_carries_what_lower_layers_write():
    """What is said is so: with the stream cut before layer 2, lower components make no difference, kept or not."""
    model, task = relp_cli.load_model("tiny-gpt2"), relp_cli.load_task("ioi")
    pairs = task.pairs(model, 6)
    labels = relp_cli.score(model, pairs, "delta", ["mlp_out"])["mlp_out"].labels

    def circuit(cut, lower):
        masks = {kind: torch.ones(model.shape.n_layers, len(labels), dtype=torch.bool) for kind in KINDS}
        masks[cut][2] = False
        for kind in ("attn_out", "mlp_out"):
            masks[kind][:2] = lower
        return node_circuit(masks, labels)

    for row in NODE_KINDS["resid_pre"], NODE_KINDS["attn_out"]:
        with_lower, without = (
            relp_cli.evaluate(model, pairs, circuit(row.name, lower), exclude_layers=0).iloc[0]
            for lower in (True, False)
        )
        assert (abs(with_lower.F_C - without.F_C) < 1e-5) == row.carries
        assert with_lower.note == "mixed kinds: resid_pre carries attn_out, mlp_out"


@pytest.mark.parametrize(
    ("kinds", "warned"),
    [
        (["resid_pre", "head"], True), (["mlp_dim", "resid_dim", "attn_dim"], True), (["resid_pre"], False),
        (["resid_pre", "resid_dim"], False), (["attn_out", "mlp_out"], False), (["edges"], False), (["feature"], False),
    ],
)  # fmt: skip
def test_only_a_stream_beside_components_is_warned_of(kinds, warned):
    assert bool(mixed_warning(kinds)) == warned


def test_mixed_circuits_warn_everywhere_and_components_alone_do_not(relp):
    relp("score", "ioi", "--pairs", 6, "-o", "run")
    done = relp("circuit", "run", "--top-k", 9)
    assert done.err.count(SAID) == 1
    assert "--nodes attn_out,mlp_out" in done.err
    assert (
        json.loads(Path("run/circuit.json").read_text())["meta"]["note"]
        == "mixed kinds: resid_pre carries attn_out, mlp_out"
    )
    done = relp("evaluate", "run", "--pairs", 4, "--random", 0)
    assert done.err.count(SAID) == 1
    assert "the ablation's means are of these 4 pairs" in done.err.replace("\n", " ")
    assert pd.read_csv("run/evaluation.csv").note.tolist() == ["mixed kinds: resid_pre carries attn_out, mlp_out"]
    assert SAID in relp("show", "run").out.replace("\n", " ")
    relp("report", "run")
    assert Path("run/report.html").read_text().count(SAID) == 1
    refused = relp("evaluate", "run", "--nodes", "mlp_out")
    assert refused.code == 2
    assert "--nodes is for sweeps, run/circuit.json has its own kinds: give --sweep" in refused.err

    done = relp("circuit", "run", "--top-k", 9, "--nodes", "attn_out,mlp_out")
    assert "WARNING" not in done.err
    assert "WARNING" not in relp("evaluate", "run", "--pairs", 4, "--random", 0).err
    assert set(Circuit.load("run/circuit.json").masks) == {"attn_out", "mlp_out"}
    relp("report", "run")
    assert SAID not in Path("run/report.html").read_text()


def test_a_sweep_of_some_kinds_suggests_a_threshold_for_these_alone(relp):
    relp("score", "ioi", "--pairs", 6, "-o", "run")
    relp("score", "ioi", "--pairs", 6, "--nodes", "attn_out,mlp_out", "-o", "components")
    how = ("--sweep", "counts:2,9,30,60", "--pairs", 6, "--random", 0)
    done = relp("evaluate", "run", "--nodes", "mlp_out,attn_out", *how)
    assert (done.code, "WARNING" in done.err) == (0, False)
    relp("evaluate", "components", *how)
    pd.testing.assert_frame_equal(pd.read_csv("run/evaluation.csv"), pd.read_csv("components/evaluation.csv"))
    report = relp("report", "run").out
    assert '"curve":[]' in Path("run/report.html").read_text().replace(" ", ""), report  # its slider is of all kinds

    done = relp("circuit", "run", "--nodes", "attn_out,mlp_out")
    assert done.code == 0, done.err
    assert "has a faithfulness of at least 0.8 (" in done.err
    kept, row = Circuit.load("run/circuit.json"), pd.read_csv("run/evaluation.csv")
    row = row[row.n_nodes == kept.counted(1)].iloc[0]
    assert f": {row.n_nodes} of the {row.n_possible} nodes from layer 1 up" in done.err
    counts = f"{row.n_nodes} of {row.n_possible} of those from layer 1 up"
    assert done.out.startswith(f"{kept.n_nodes} of {kept.n_possible} nodes of all layers, {counts} (τ = ")
    other = relp("circuit", "run")
    assert other.code == 2
    assert "relp evaluate run --nodes resid_pre,attn_out,mlp_out --sweep counts:log:15" in other.err
    for given in ("--sweep", "counts:3"), ("--dry-run",):
        refused = relp("evaluate", "run", "--nodes", "mlp_outt", *given)
        assert (refused.code, refused.out) == (2, "")
        assert "did you mean 'mlp_out'" in refused.err


def test_a_row_of_counts_is_what_its_threshold_keeps_or_says_that_none_does(relp):
    relp("score", "ioi", "--pairs", 6, "--nodes", "mlp_out", "-o", "run")
    scores = Scores.load("run/scores.safetensors")
    upper = scores.dense(scores.mean)[:, scores.units.counted(1)]
    some, of = int((upper != 0).sum()), upper.numel()
    assert 3 < some < of - 3  # tokens before the first changed one have no effect
    sweep = f"counts:1,3,{some},{some + 2},{of}"
    done = relp("evaluate", "run", "--sweep", sweep, "--pairs", 4, "--random", 0, "--exclude-layers", 1)
    assert done.code == 0, done.err
    rows = pd.read_csv("run/evaluation.csv")
    assert rows.n_nodes.tolist() == [1, 3, some, some + 2, of]
    for row, circuit in zip(rows.itertuples(), circuits_of(scores, sweep, 1), strict=True):
        if row.n_nodes == some + 2:
            assert row.tau != row.tau
            assert row.note == f"no τ keeps just these: {of - some - 2} more score 0 too"
        else:
            assert torch.equal(relp_cli.select(scores, row.tau, from_layer=1).mask, circuit.mask)
            assert relp("circuit", "run", "--threshold", row.tau, "-o", "again.json").code == 0
            assert torch.equal(
                Circuit.load("again.json").mask[:, scores.units.counted(1)], circuit.mask[:, scores.units.counted(1)]
            )
    done = relp("circuit", "run", "--top-k", int((scores.mean != 0).sum()) + 1)
    assert "τ" not in done.out.splitlines()[0]
    assert "more score 0, as the last that was kept: no τ keeps just these" in done.err


def test_the_list_of_a_selection_stands_first_and_alone(relp):
    relp("score", "ioi", "--pairs", 4, "--nodes", "mlp_out", "-o", "run")
    out = relp("circuit", "run", "--top-k", 5, "--list").out
    assert out.startswith("5 of ")
    assert "), strongest first\n" in out
    assert out.count("mlp_out") == 5
