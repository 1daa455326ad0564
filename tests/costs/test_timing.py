"""What a dry run says of time, held against whole runs by a clock that ticks once per row of a pass: it does not depend on how
fast a machine is, or on who else uses it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from oracles.wrapped import case

from relp_cli.costs import timing
from relp_cli.evaluation.diagnose import CANDIDATES
from relp_cli.runs.spec import ScoreSpec
from relp_cli.scoring import score
from relp_cli.tasks.pairs import PairBatch

CASES: dict[str, tuple[str, tuple[str, ...], int, dict[str, Any], float]] = {  # …, and how far off it may be
    "pairs": ("atp", ("mlp_out",), 20, {}, 1.01),
    "points of a path": ("ig_inputs", ("mlp_out",), 20, {"steps": 10}, 1.5),
    "steps of learning": ("learned", ("mlp_out",), 20, {"steps": 40}, 1.2),
    "steps of learning edges": ("learned", ("edges",), 20, {"steps": 40}, 1.2),
    "a path that follows gradients": ("eap_gp", ("edges",), 20, {"steps": 3}, 1.01),
    "a search over edges": ("acdc", ("edges",), 20, {"tau": 0.01}, 1.1),
    "estimates and patched runs": ("screened", ("attn_out", "mlp_out"), 40, {"budget": 0.5}, 2.0),
    "a choice of rules": ("relp+auto", ("attn_out", "mlp_out"), 40, {"auto_cells": 30}, 1.5),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_passes_are_foretold(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, nodes, n, params, factor = CASES[name]
    model, rows = case("gpt2").model, 0
    ids = torch.randint(0, 40, (2, n, 6), generator=torch.Generator().manual_seed(0))
    pairs = [PairBatch(ids[0], ids[1], ids[0][:, 0], ids[1][:, 0])]

    def count(value: torch.Tensor) -> None:
        nonlocal rows
        rows += len(value)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(rows))
    spec = ScoreSpec(task="ioi", method=method, nodes=nodes, params=params)
    with model.hooks({"unembed.hook_in": count}):
        said = timing.expected_time(model, pairs, spec, dict(params))
        rehearsed, rows = rows, 0
        score(model, pairs, method, nodes, **params)
    assert said is not None
    assert 1 / factor <= said.seconds / rows <= factor, (said, rows, rehearsed)
    if method in ("learned", "acdc"):
        assert rehearsed < rows / 2, "broken off"


def test_a_comparison_and_a_diagnosis_say_what_they_would_run(relp: Any, tmp_path: Any) -> None:
    done = relp(
        "compare", "ioi", "--pairs", 8, "--nodes", "attn_out", "--methods", "atp,screened", "--dry-run", "--json"
    )
    said = json.loads(done.out)
    assert [row["method"] for row in said["scorings"]] == ["act_patch", "atp", "screened"]
    assert all({"forwards", "time", "memory"} <= set(row) for row in said["scorings"])
    assert said["time"].startswith("about ")
    said = json.loads(relp("diagnose", "ioi", "--pairs", 8, "--top", 3, "--dry-run", "--json").out)
    assert "at most 36 nodes, 288 runs" in said["exact patching"]
    assert [row["method"] for row in said["scorings"]] == list(CANDIDATES)
    assert list(tmp_path.iterdir()) == []


def test_training_dictionaries_says_what_it_would_take(relp: Any, tmp_path: Any) -> None:
    how = ("--lines", 60, "--steps", 30, "--sites", "resid_out_layer1,mlp_out_layer0", "--dry-run", "--json")
    said = json.loads(relp("train-dictionary", *how).out)
    assert (said["sites"], said["steps"]) == (2, "30 at each site")
    assert said["time"].startswith("about ")
    assert list(tmp_path.iterdir()) == []


def test_edges_that_are_patched_position_by_position_take_as_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(0, 40, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    pairs = [PairBatch(ids[0], ids[1], ids[0][:, 0], ids[1][:, 0])]
    monkeypatch.setattr(timing.Timing, "forward", lambda *_: 1.0)
    together, alone = (
        timing.expected_time(
            case("gpt2").model, pairs, ScoreSpec(task="ioi", method="act_patch", nodes=("edges",)), given
        )
        for given in ({}, {"positions": "keep"})
    )
    assert alone.seconds == 6 * together.seconds
