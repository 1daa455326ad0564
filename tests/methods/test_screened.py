"""Screened scores: exact where the budget reaches, the scaled estimate elsewhere, and an audit of the rest."""

from __future__ import annotations

import json

import pytest
import torch
from oracles.wrapped import case, close, pairs, run

from relp_cli.errors import RelpError
from relp_cli.methods.screened import ScreenedParams, choose, unpack
from relp_cli.tasks.pairs import PairBatch

KINDS = ["resid_pre", "head", "mlp_neuron"]


def batches() -> list[PairBatch]:
    """Two lengths that share some roles."""
    return [pairs(3, 4, roles=("a", "b", "c", "end")), pairs(2, 5, seed=2, roles=("a", "b", "b2", "c", "end"))]


def test_patched_nodes_are_exact_and_the_others_scaled_estimates() -> None:
    c = case("qwen2")
    got = run(c, "screened", KINDS, batches(), budget=0.15)
    exact, estimate = (run(c, method, KINDS, batches()) for method in ("act_patch", "relp+secant"))
    for kind in KINDS:
        row = got.meta["screened"][kind]
        want, base, have = (
            s[kind].mean if s[kind].mean.ndim == 3 else s[kind].mean[..., None] for s in (exact, estimate, got)
        )
        known = unpack(row["patched"], have.shape)
        assert int(known.sum()) == row["exact"]
        alive = int((base != 0).sum())
        assert 0.15 * alive <= row["exact"] - row["audited"] < 0.15 * alive + 2
        close(have[known], want[known])
        close(have[~known], row["slope"] * base[~known])
        assert row["audited"] >= 1
        assert row["audit_95%"] <= row["audit_largest_error"]


def test_slope_and_audit_are_of_the_nodes_that_they_say() -> None:
    c = case("gpt2")
    few, more = (run(c, "screened", ["mlp_out"], audit=a, budget=0.3) for a in (0, 0.5))
    row, known = few.meta["screened"]["mlp_out"], unpack(few.meta["screened"]["mlp_out"]["patched"], (3, 6, 1))[..., 0]
    exact, base = (run(c, m, ["mlp_out"])["mlp_out"].mean for m in ("act_patch", "relp+secant"))
    assert row["slope"] == pytest.approx(((exact * base)[known].sum() / base[known].square().sum()).item())
    audited = more.meta["screened"]["mlp_out"]
    drawn = unpack(audited["patched"], (3, 6, 1))[..., 0] & ~known
    assert (row["audited"], audited["audited"]) == (0, int(drawn.sum()))
    assert audited["audit_largest_error"] == pytest.approx((exact - row["slope"] * base)[drawn].abs().max().item())


def test_the_whole_budget_is_exact_patching() -> None:
    c = case("gpt2")
    got, exact = (run(c, m, ["attn_out", "query"], **o) for m, o in (("screened", {"budget": 1.0}), ("act_patch", {})))
    for kind in ("attn_out", "query"):
        close(got[kind].examples, exact[kind].examples)


def test_every_estimate_has_a_say_in_turn() -> None:
    means = {"one": torch.tensor([5.0, 1, 0, 0, 0, 2]), "two": torch.tensor([0.0, 1, 9, 0, 3, 0])}
    means = {k: v.view(1, 1, 6) for k, v in means.items()}
    top, drawn = choose(means, ScreenedParams(budget=0.6, audit=0))
    assert top.flatten().tolist() == [True, False, True, False, False, True]  # 5, 9, then 2; one node is 0 for both
    assert not drawn.any()
    with pytest.raises(RelpError, match="changes no node"):
        choose({"one": torch.zeros(1, 1, 3)}, ScreenedParams())


def test_on_the_terminal(relp) -> None:  # type: ignore[no-untyped-def]
    asked = ("score", "ioi", "--method", "screened", "--nodes", "mlp_out", "--pairs", 4)
    done = relp(*asked, "--budget", "0.5", "--json", "-o", "run")
    assert done.code == 0, done.err
    row = json.loads(done.out)["scores"]["screened"]["mlp_out"]
    assert f"screened: {row['exact']} of {row['of']} mlp_out nodes patched exactly" in done.err
    assert "budget" in relp(*asked, "--budget", "2", "-o", "x").err
    assert "does not score edges" in relp("score", "ioi", "--method", "screened", "--nodes", "edges", "-o", "x").err
    assert "no baseline 'zero'" in relp(*asked, "--baseline", "zero", "-o", "x").err
