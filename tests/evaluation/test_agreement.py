"""Agreement with exact scores: numbers by hand, flags, and intervals."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from oracles.wrapped import case
from scipy import stats

from relp_cli.errors import RelpError
from relp_cli.evaluation.agreement import agreement, top
from relp_cli.evaluation.compare import compare, run_comparison
from relp_cli.report.lead import agreement_lead
from relp_cli.report.tables import rests_on_one
from relp_cli.scoring import score
from relp_cli.spaces.scores import KindScores
from relp_cli.statistics import interval, pearson, resample_counts, resample_picks


def scores(examples, kind="mlp_out", present=None, mean=None):
    """Examples Float[example, layer, pos, *unit]."""
    x = torch.as_tensor(examples, dtype=torch.float32)
    here = torch.ones(len(x), x.shape[2], dtype=torch.bool) if present is None else torch.as_tensor(present)
    n = here.sum(0)
    mean = x.double().sum(0) / n.view(1, -1, *([1] * (x.ndim - 3))) if mean is None else mean
    return KindScores(kind, mean, mean * 0, n, tuple(chr(97 + i) for i in range(x.shape[2])), "position", x, here)


def flat(*rows):
    """One layer, one position per number, one example per row."""
    return scores(torch.tensor(rows, dtype=torch.float32)[:, None])


@pytest.mark.parametrize("unsigned", [False, True])
def test_rows_at_a_time_change_nothing(monkeypatch, unsigned):
    """Per-pair PCC and interval, with units and with positions that some pairs lack, against all draws at once."""
    rng = np.random.default_rng(0)
    present = rng.random((12, 3)) < 0.8
    x, noise = (rng.normal(size=(12, 2, 3, 4)) * present[:, None, :, None] for _ in range(2))
    estimate, exact = (scores(values, "mlp_neuron", present) for values in (x, x + noise))
    got = agreement(estimate, exact, bootstrap=50, unsigned=unsigned)
    monkeypatch.setattr("relp_cli.evaluation.agreement.AT_ONCE", 100)
    few = agreement(estimate, exact, bootstrap=50, unsigned=unsigned)
    for name in ("pcc_lo", "pcc_hi", "pcc_per_pair"):
        assert getattr(few, name) == pytest.approx(getattr(got, name), abs=1e-6)

    def signed(y):
        return np.abs(y) if unsigned else y

    there = np.broadcast_to(present[:, None, :, None], x.shape)
    own = [stats.pearsonr(a[t], signed(b)[t])[0] for a, b, t in zip(x, x + noise, there, strict=True)]
    assert got.pcc_per_pair == pytest.approx(np.mean(own), abs=1e-6)
    zs = []
    for draw in resample_counts(12, 50, 0):
        n = (draw @ present)[None, :, None]
        means = [np.tensordot(draw, v, 1) / np.maximum(n, 1) for v in (x, x + noise)]
        t = np.broadcast_to(n > 0, means[0].shape)
        zs.append(np.arctanh(stats.pearsonr(means[0][t], signed(means[1])[t])[0]))
    n = np.maximum(present.sum(0), 1)[None, :, None]
    z = np.arctanh(stats.pearsonr((x.sum(0) / n).ravel(), signed((x + noise).sum(0) / n).ravel())[0])
    low, high = interval(np.array(zs))
    assert (got.pcc_lo, got.pcc_hi) == pytest.approx((np.tanh(2 * z - high), np.tanh(2 * z - low)), abs=1e-5)


def test_by_hand():
    got = agreement(flat([1.0, 2, 3, 4]), flat([1.0, 3, 2, 4]), k=2)
    assert (got.pcc, got.spearman) == pytest.approx((0.8, 0.8))
    assert (got.topk, got.k) == (0.5, 2)  # {4, 3} and {4, 2}
    assert (got.n_pairs, got.n_nodes, got.axis, got.note) == (1, 4, "layer × position", "")
    assert got.pcc_per_pair == pytest.approx(0.8)
    got = agreement(flat([1.0, 2, 3, 8]), flat([-1.0, -2, -3, -4]), k=10)
    assert got.pcc == pytest.approx(np.corrcoef([1, 2, 3, 8], [-1, -2, -3, -4])[0, 1])
    assert (got.spearman, got.topk, got.k) == (pytest.approx(-1), 1, 4)
    assert got.slope == pytest.approx(-(1 + 4 + 9 + 32) / (1 + 4 + 9 + 16))


def test_the_slope_is_the_factor_that_pcc_does_not_see():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=40)
    for factor in (2.0, 0.5, -1.0):
        got = agreement(flat(list(factor * exact)), flat(list(exact)))
        assert (abs(got.pcc), got.slope) == pytest.approx((1, factor), rel=1e-6)
    noisy = exact + 0.1 * rng.normal(size=40)
    least = np.linalg.lstsq(exact[:, None], noisy, rcond=None)[0][0]
    assert agreement(flat(list(noisy)), flat(list(exact))).slope == pytest.approx(least, rel=1e-6)
    assert agreement(flat(list(np.abs(noisy))), flat(list(exact)), unsigned=True).slope == pytest.approx(
        np.abs(noisy) @ np.abs(exact) / (exact @ exact), rel=1e-6
    )


def test_what_rests_on_one_node_is_said_with_the_pcc_without_it():
    exact, estimate = [0.0, 1, 2, 3, 14], [1.0, 0, 3, 2, 14]  # mean 4, squared deviations 16, 9, 4, 1, 100
    got = agreement(flat(estimate), flat(exact))
    assert (got.largest, got.largest_share) == ("layer 0, e", pytest.approx(100 / 130))
    assert got.pcc_without == pytest.approx(0.6)  # (1, 0, 3, 2) with (0, 1, 2, 3): 3 / 5
    assert got.pcc == pytest.approx(np.corrcoef(estimate, exact)[0, 1])
    other = agreement(flat([-x for x in exact]), flat([0.0, 1, 2, -3, 14]), unsigned=True)  # of |exact|
    assert (other.largest_share, other.pcc_without) == (pytest.approx(100 / 130), pytest.approx(-1))
    units = agreement(scores([[[[1.0, 0], [0, 2]]]]), scores([[[[0.0, 0], [0, 5]]]]))  # without it the rest is constant
    assert (units.largest, units.largest_share) == ("layer 0, b, unit 1", pytest.approx(0.75))
    assert np.isnan(units.pcc_without)
    flat_one = agreement(flat([1.0, 2]), flat([3.0, 3]))
    assert (flat_one.largest, np.isnan(flat_one.largest_share)) == ("", True)
    rows = [{"kind": "mlp_out", "method": m, **asdict(r)} for m, r in (("atp", got), ("delta", other))]
    rows += [{"kind": "head", "method": "atp", **asdict(agreement(flat([1.0, 2, 3, 4]), flat([1.0, 3, 2, 4])))}]
    line = (
        "MLP: one node (layer 0, e) is 77 % of the variance of the exact effects: PCC and slope rest on it; PCC without it: "
        "atp 0.600, delta -1.000"
    )
    assert rests_on_one(pd.DataFrame(rows)) == [line]  # of the heads the largest is 2.25 / 5
    assert dict(agreement_lead(pd.DataFrame(rows)))["One alone"] == f"{line}."


def test_top_is_by_size_with_ties_in_order():
    assert top(np.array([1.0, -3, 3, 2]), 2) == [1, 2]
    assert top(np.array([1.0, 1, 1]), 2) == [0, 1]


def test_pearson_weights_choose_entries():
    rng = np.random.default_rng(0)
    a, b, w = rng.normal(size=(3, 20)), rng.normal(size=(3, 20)), rng.integers(0, 2, size=(3, 20)).astype(float)
    for i, got in enumerate(pearson(a, b, w)):
        on = w[i] > 0
        assert got == pytest.approx(stats.pearsonr(a[i][on], b[i][on]).statistic)


def test_per_pair_is_the_mean_of_each_pairs_own():
    a, b = [[1.0, 2, 3, 4], [1.0, 2, 3, 4]], [[1.0, 3, 2, 4], [4.0, 3, 2, 1]]
    got = agreement(flat(*a), flat(*b))
    assert got.pcc_per_pair == pytest.approx((0.8 - 1) / 2)
    assert got.pcc == pytest.approx(np.corrcoef(np.mean(a, 0), np.mean(b, 0))[0, 1])


def test_pairs_without_a_position_leave_it_out():
    """The first pair lacks position b: its zeros there are not scores."""
    present = [[True, False, True, True], [True, True, True, True]]
    a = torch.tensor([[1.0, 0, 2, 3], [1.0, 5, 2, 3]])[:, None]
    b = torch.tensor([[2.0, 0, 4, 7], [1.0, 9, 5, 3]])[:, None]
    got = agreement(scores(a, present=present), scores(b, present=present))
    own = [np.corrcoef([1, 2, 3], [2, 4, 7])[0, 1], np.corrcoef([1, 5, 2, 3], [1, 9, 5, 3])[0, 1]]
    assert got.pcc_per_pair == pytest.approx(np.mean(own), abs=1e-6)
    assert got.pcc == pytest.approx(np.corrcoef([1, 5, 2, 3], [1.5, 9, 4.5, 5])[0, 1])


def test_constant_arrays_are_flagged_not_correlated():
    varied, flat_one = flat([1.0, 2, 3]), flat([0.0, 0, 0])
    for a, b, note in (
        (flat_one, varied, "estimate is constant"),
        (varied, flat_one, "reference is constant"),
        (flat_one, flat_one, "estimate is constant; reference is constant"),
        (flat([5.0, 5, 5]), varied, "estimate is constant"),
    ):
        got = agreement(a, b)
        assert got.note == note
        assert np.isnan([got.pcc, got.spearman, got.topk, got.pcc_lo, got.pcc_hi, got.pcc_per_pair]).all()
    assert agreement(flat([1e-20, 2e-20, 4e-20]), varied).note == ""


def test_unsigned_estimates_are_compared_with_sizes():
    size, exact = flat([1.0, 2, 3], [2.0, 2, 5]), flat([-1.0, 2, -3], [-2.0, 2, -5])
    got = agreement(size, exact, unsigned=True)
    assert (got.pcc, got.spearman, got.pcc_per_pair) == pytest.approx((1, 1, 1), abs=1e-6)
    assert agreement(size, exact).pcc < 0


def test_intervals():
    """Pairs differ from one another, and both methods see the same pairs, as in practice."""
    rng = np.random.default_rng(0)
    truth, shared = rng.normal(size=(3, 6)), rng.normal(0, 1, size=(200, 3, 6))

    def noisy(size):
        error = rng.normal(0, 0.3, size=(3, 6)) + rng.normal(0, size, size=(200, 3, 6))
        return scores(truth + shared + error)

    exact = scores(truth + shared)
    wide, narrow = agreement(noisy(8.0), exact), agreement(noisy(0.3), exact)
    assert wide.pcc_hi - wide.pcc_lo > 2 * (narrow.pcc_hi - narrow.pcc_lo) > 0
    assert narrow.pcc_lo < narrow.pcc < narrow.pcc_hi
    again = agreement(exact, exact)
    assert (again.pcc, again.pcc_lo, again.pcc_hi, again.pcc_per_pair) == pytest.approx((1, 1, 1, 1), abs=1e-5)
    estimate = noisy(1.0)
    one, two, other = (agreement(estimate, exact, seed=seed) for seed in (3, 3, 4))
    assert (one.pcc_lo, one.pcc_hi) == (two.pcc_lo, two.pcc_hi) != (other.pcc_lo, other.pcc_hi)


def test_intervals_are_of_resampled_pairs():
    """Against a slow bootstrap written out pair by pair."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(8, 2, 3)), rng.normal(size=(8, 2, 3))
    b += a
    got = agreement(scores(a), scores(b), bootstrap=200, seed=5)
    draws = np.random.default_rng(5).multinomial(8, np.full(8, 1 / 8), size=200)
    values = [np.corrcoef(*(np.repeat(x, d, axis=0).mean(0).ravel() for x in (a, b)))[0, 1] for d in draws]
    high, low = np.quantile(np.arctanh(values), [0.975, 0.025])
    middle = np.arctanh(np.corrcoef(a.mean(0).ravel(), b.mean(0).ravel())[0, 1])
    want = np.tanh([2 * middle - high, 2 * middle - low])
    assert (got.pcc_lo, got.pcc_hi) == pytest.approx(tuple(want), abs=1e-5)


def test_intervals_cover_the_correlation_of_noiseless_averages():
    """Independent noise per pair and method: the percentile interval would cover far less often (its values are biased)."""
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(60):
        truth = rng.normal(size=(4, 8))
        estimate = truth + 0.5 * rng.normal(size=truth.shape)
        target = np.corrcoef(truth.ravel(), estimate.ravel())[0, 1]
        a, b = (x + rng.normal(size=(40, *truth.shape)) for x in (truth, estimate))
        got = agreement(scores(b), scores(a), bootstrap=200, seed=trial)
        covered += got.pcc_lo <= target <= got.pcc_hi
    assert covered >= 45  # 57 would be 95 %; this interval reaches 50 of 60 here, the percentile interval 22


def test_mismatches_are_refused():
    with pytest.raises(RelpError, match="must be of the same kind and positions"):
        agreement(flat([1.0, 2]), flat([1.0, 2, 3]))
    with pytest.raises(RelpError, match="must be of the same kind and positions"):
        agreement(scores(torch.ones(1, 1, 2)), scores(torch.ones(1, 1, 2), kind="attn_out"))
    with pytest.raises(RelpError, match="different numbers of pairs"):
        agreement(flat([1.0, 2]), flat([1.0, 3], [2.0, 5]))


def test_without_examples_there_is_no_interval():
    mean = torch.tensor([[1.0, 2, 4]], dtype=torch.float64)
    bare = KindScores("mlp_out", mean, mean, torch.ones(3, dtype=torch.long), ("a", "b", "c"), "position")
    got = agreement(bare, flat([1.0, 3, 4]))
    assert np.isfinite(got.pcc)
    assert np.isnan([got.pcc_lo, got.pcc_hi, got.pcc_per_pair]).all()


def test_compare_tabulates_every_method_and_kind():
    c = case("gpt2", dtype=torch.float32)
    kinds = ("resid_pre", "mlp_out")
    done = run_comparison(c.model, [c.batch], ["atp", "relp", "act_patch", "delta"], kinds, bootstrap=50)
    assert done.table[["method", "kind"]].values.tolist() == [
        [m, k] for m in ("atp", "relp", "act_patch", "delta") for k in kinds
    ]
    exact = done.table[done.table.method == "act_patch"]
    assert exact.pcc.tolist() == pytest.approx([1, 1])
    at = done.table[(done.table.method == "atp") & (done.table.kind == "mlp_out")].iloc[0]
    want = agreement(*(score(c.model, [c.batch], m, kinds)["mlp_out"] for m in ("atp", "act_patch")))
    assert at.pcc == pytest.approx(want.pcc, abs=1e-4)
    unsigned = done.table[(done.table.method == "delta") & (done.table.kind == "mlp_out")].iloc[0]
    a, b = done.scores["delta"]["mlp_out"].mean.numpy().ravel(), done.scores["act_patch"]["mlp_out"].mean.abs().numpy()
    assert unsigned.pcc == pytest.approx(np.corrcoef(a, b.ravel())[0, 1])
    reused = compare(c.model, [c.batch], ["atp"], nodes=kinds, scores=done.scores, bootstrap=50)
    assert reused.pcc.tolist() == done.table[done.table.method == "atp"].pcc.tolist()


def test_resamples_and_their_intervals():
    values = np.random.default_rng(1).normal(size=50)
    counts, picks = resample_counts(50, 4000, 0), resample_picks(50, 4000, 0)
    assert (counts.sum(1) == 50).all()
    for means in (counts @ values / 50, values[picks].mean(1)):
        low, high = interval(means)
        assert ((means < low).sum(), (means > high).sum()) == (100, 100)
        assert means.std() == pytest.approx(values.std() / np.sqrt(50), rel=0.05)
    assert np.isnan(interval(np.zeros((0, 3)))).all()
    assert interval(np.zeros((0, 3))).shape == (2, 3)
