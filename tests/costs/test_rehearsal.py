"""The peak that a dry run predicts: that of a batch, of scores that are kept, and of no more than a few seconds' work."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from oracles.wrapped import case

from relp_cli.costs import rehearsal
from relp_cli.runs.spec import ScoreSpec
from relp_cli.tasks.pairs import PairBatch


def batch(pairs: int, positions: int) -> PairBatch:
    ids = torch.randint(0, 40, (2, pairs, positions), generator=torch.Generator().manual_seed(0))
    return PairBatch(ids[0], ids[1], ids[0][:, 0], ids[1][:, 0])


def numbers(said: str) -> list[int]:
    """Whole, held, of the batch, of single scores: MiB."""
    found = re.fullmatch(
        r"about (\d+) MiB .* peak: (\d+) held now .* (\d+) for a batch of \d+ pairs .* (\d+) to keep .*", said
    )
    assert found, said
    return list(map(int, found.groups()))


@pytest.mark.parametrize(("keep", "kept"), [(None, 54), (True, 54), (False, 14)])
def test_the_whole_is_the_sum_of_what_it_says(keep: bool | None, kept: int) -> None:
    spec = ScoreSpec(task="ioi", method="atp", nodes=("mlp_out",), keep_examples=keep)
    cells = 40 * rehearsal.MIB // (100 * 4 * 2)
    said = rehearsal.expected_memory(case("gpt2").model, [batch(100, 6)], spec, {}, cells, "logit_diff")["memory"]
    whole, held, above, single = numbers(said)
    assert whole == pytest.approx(held + above + single, abs=2)
    assert single == kept
    # 40 of them to keep and write; of the 68 pairs of other batches 14 wait to be written in case of an interruption
    assert "batch of 32 pairs" in said  # 192 tokens


def test_a_rehearsal_ends_when_it_has_seen_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = case("gpt2").model, 0
    monkeypatch.setattr(rehearsal, "SECONDS", 0.0)

    def look(_: torch.Tensor) -> None:
        nonlocal passes
        passes += 1

    spec = ScoreSpec(task="ioi", method="act_patch", nodes=("mlp_neuron",), params={"chunk_tokens": 8})
    with model.hooks({"unembed.hook_in": look}):
        rehearsal.expected_memory(model, [batch(3, 6)], spec, {"chunk_tokens": 8}, 1, "logit_diff")
    assert passes == rehearsal.PASSES + 1
    before = sum(len(point._forward_hooks) for point in model.points.values())
    rehearsal.expected_memory(model, [batch(3, 6)], spec, {"chunk_tokens": 8}, 1, "logit_diff")
    assert sum(len(point._forward_hooks) for point in model.points.values()) == before


def test_a_dry_run_predicts_the_peak(relp: Any) -> None:
    said = json.loads(
        relp("score", "ioi", "--nodes", "edges", "--method", "eap", "--pairs", 6, "--dry-run", "--json").out
    )
    assert numbers(said["memory"])[1] > 100
