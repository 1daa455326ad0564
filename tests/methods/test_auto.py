"""`relp+auto`: the choice is made on exact effects of pairs that are then not scored, and falls back where it is unsure."""

import numpy as np
import pytest
import torch
from oracles.wrapped import case, close, double_by_default, exact_float64, pairs, run

from relp_cli.errors import RelpError
from relp_cli.evaluation.compare import run_comparison
from relp_cli.methods.auto import Candidate, _compare, candidates, exact_cells, set_aside
from relp_cli.methods.request import Request
from relp_cli.tasks.pairs import PairBatch

KINDS = ("attn_out", "mlp_out", "head")


def batches(n=12):
    """Two token lengths with roles, one of which (mid) is patched at two positions jointly."""
    long, short = pairs(n, 7, seed=3), pairs(n, 6, seed=4)
    roles = ("bos", "a", "mid", "b", "mid", "c", "end")
    return [
        PairBatch(long.original, long.patch, long.answer, long.foil, roles),
        PairBatch(short.original, short.patch, short.answer, short.foil, roles[:5] + roles[6:]),
    ]


@pytest.mark.parametrize(
    ("direction", "baseline"), [("noising", "patch"), ("denoising", "patch"), ("noising", "zero"), ("noising", "mean")]
)
def test_exact_cells_are_act_patch(direction, baseline):
    c, given = case("qwen2"), batches(4)
    options = {"direction": direction, "baseline": baseline}
    exact = run(c, "act_patch", KINDS, given, **options)
    rng = np.random.default_rng(0)
    cells = {}
    for kind in KINDS:
        here = exact[kind].present[:, None, :].expand(exact[kind].examples.shape[:3]).nonzero()
        drawn = here[rng.permutation(len(here))[:40]]
        unit = torch.randint(4 if kind == "head" else 1, (len(drawn), 1))
        cells[kind] = torch.cat([drawn, unit], 1).numpy()
    request = Request("logit_diff", direction, baseline)
    with exact_float64(), double_by_default():
        got, forwards = exact_cells(c.model, given, cells, exact, request)
    runs = sum(np.count_nonzero(values) for values in got.values())  # what the patch does not change costs nothing
    assert 60 < runs <= 3 * 40
    for kind in KINDS:
        at = cells[kind] if kind == "head" else cells[kind][:, :3]
        close(torch.from_numpy(got[kind]), exact[kind].examples.double()[tuple(at.T)])
    # The run, and the source or the means; zeros need no pass of their own.
    assert forwards == runs + (8 if baseline == "zero" else 2 * 8)


def test_pairs_of_the_choice_are_not_scored_and_the_rest_is_relp_with_the_chosen_rules():
    c, given = case("qwen2"), batches()
    aside = set_aside(given, seed=0)
    assert sum(int(a.sum()) for a in aside) == 6
    got = run(c, "relp+auto", KINDS, given, keep_examples=True)
    away = torch.cat(aside)
    rest = [b.rows(~a) for b, a in zip(given, aside, strict=True)]
    for kind in KINDS:
        chosen = got.meta["auto"]["chosen"][kind]
        rules = [r for r in chosen if r not in ("endpoints=position", "blend")]
        ends = "position" if "endpoints=position" in chosen else "patch"
        how = {"rules": rules, "endpoints": ends, "blend": "blend" in chosen}
        want = run(c, "relp", [kind], rest, keep_examples=True, **how)[kind]
        assert not got[kind].present[away].any()
        assert (got[kind].examples[away] == 0).all()
        close(got[kind].examples[~away], want.examples)
        close(got[kind].mean, want.mean)
        assert torch.equal(got[kind].n, want.n)
    assert got.meta["method"] == "relp+auto"
    assert got.meta["n_pairs"] == 18
    assert got.meta["auto"]["pairs_set_aside"] == 6
    assert got.meta["forwards_per_pair"] > 2
    taken = [row for row in got.meta["auto"]["table"] if row["taken"]]
    assert [row["kind"] for row in taken] == list(KINDS)
    assert [row["rules"] for row in taken] == list(got.meta["auto"]["chosen"].values())


def test_the_same_seed_makes_the_same_choice_and_rules_auto_is_the_same_method():
    c, given = case("gpt2"), batches()
    a, b = run(c, "relp+auto", KINDS, given), run(c, "relp", KINDS, given, rules="auto")
    assert a.meta["auto"]["table"] == b.meta["auto"]["table"]
    for kind in KINDS:
        assert torch.equal(a[kind].examples, b[kind].examples)
    other = run(c, "relp+auto", KINDS, given, auto_seed=1)
    assert not torch.equal(other[KINDS[0]].present, a[KINDS[0]].present)


def test_a_clear_winner_is_taken_and_a_doubtful_one_is_not():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(200)
    poor, good = exact + 1.5 * rng.standard_normal(200), exact + 0.1 * rng.standard_normal(200)
    rows, taken = _compare("head", {"preset": poor, "other": good}, exact, seed=0)
    assert taken == "other"
    assert rows[1]["margin_lo"] > 0
    assert rows[1]["pcc"] == pytest.approx(np.corrcoef(good, exact)[0, 1])
    twin = poor + 0.01 * rng.standard_normal(200)
    better = twin if np.corrcoef(twin, exact)[0, 1] > np.corrcoef(poor, exact)[0, 1] else poor - (twin - poor)
    rows, taken = _compare("head", {"preset": poor, "other": better}, exact, seed=0)
    assert rows[1]["pcc"] > rows[0]["pcc"]  # better on the sample, but not measurably
    assert taken == "preset"


def test_candidates_fit_the_model_the_nodes_and_the_baseline():
    gpt2, qwen2 = case("gpt2").model, case("qwen2").model
    assert candidates(gpt2, KINDS)["two-point"] == Candidate(("ln2", "act2", "attn2"))
    assert candidates(qwen2, KINDS)["two-point, half"] == Candidate(("ln2", "act2", "half", "attn2"))
    secant = ("lnx", "act2", "attn2", "softmax2", "qk2")
    assert candidates(gpt2, KINDS)["secant, blend"] == Candidate(secant, "position", blend=True)
    assert candidates(gpt2, KINDS)["secant, blend"].words == [*secant, "endpoints=position", "blend"]
    assert next(iter(candidates(gpt2, KINDS))) == "preset"
    assert "preset + ah" not in candidates(gpt2, ("query",))
    assert set(candidates(qwen2, KINDS, "zero")) == {"preset", "preset + ah", "no rules"}
    run(case("gpt2"), "relp+auto", ("query", "key"), batches())


def test_a_comparison_is_over_pairs_that_every_method_scored():
    c, given = case("gpt2"), batches()
    with exact_float64(), double_by_default():
        result = run_comparison(c.model, given, ["relp", "relp+auto"], KINDS, bootstrap=10)
        rest = [b.rows(~a) for b, a in zip(given, set_aside(given, 0), strict=True)]
        alone = run_comparison(c.model, rest, ["relp"], KINDS, bootstrap=10)
    assert set(result.table.n_pairs) == {18}
    ours = result.table[result.table.method == "relp"]
    np.testing.assert_allclose(ours.pcc, alone.table.pcc, rtol=1e-6)
    np.testing.assert_allclose(ours.pcc_per_pair, alone.table.pcc_per_pair, rtol=1e-5)


def test_bad_requests_are_one_clear_line():
    c, given = case("gpt2"), batches()
    with pytest.raises(RelpError, match="at least 8 pairs, got 5"):
        run(c, "relp+auto", KINDS, [pairs(5)])
    with pytest.raises(RelpError, match="for method relp only"):
        run(c, "relp_ig+auto", KINDS, given)
    with pytest.raises(RelpError, match="stand alone"):
        run(c, "relp+auto+ah", KINDS, given)
